//! A whole worker on random bytes: against the slow, obvious router of the fuzz targets.

#[path = "../fuzz/targets.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "the same file is the library of the fuzz crate"
)]
mod targets;

use proptest::{collection::vec, prelude::*};

proptest! {
    // A quarter of the usual number: each is a run of several workers, and the fuzzers have done millions.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_arrives_is_delivered_or_counted(bytes in vec(any::<u8>(), 0..300)) {
        targets::ingress(&bytes);
    }

    // Nearly all from an honest peer, of one flow, and merged by the kernel.
    #[test]
    fn bulk_that_arrives_is_delivered(
        setup in any::<u8>(),
        messages in vec((0x20..=0xffu8, 0..5u8, vec(0x40..0x60u8, 8)), 0..30),
    ) {
        let messages = messages.into_iter().flat_map(|(form, who, packets)| [vec![form, who], packets].concat());
        targets::ingress(&[setup, 0].into_iter().chain(messages).collect::<Vec<_>>());
    }

    #[test]
    fn whatever_is_read_is_sent_or_counted(bytes in vec(any::<u8>(), 0..300)) {
        targets::egress(&bytes);
    }

    #[test]
    fn the_fast_path_delivers_what_the_plain_one_does(bytes in vec(any::<u8>(), 0..200)) {
        targets::fast_plain(&bytes);
    }
}
