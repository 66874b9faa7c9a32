//! Splitting and coalescing through the public door: against the slow, obvious implementations of the fuzz targets.

#[path = "../fuzz/targets.rs"]
#[expect(
    unreachable_pub,
    dead_code,
    reason = "the same file is the library of the fuzz crate"
)]
mod targets;

use proptest::prelude::*;

proptest! {
    #[test]
    fn any_bytes_are_split_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        targets::virtio(&bytes);
        targets::split(&bytes);
    }

    #[test]
    fn any_stream_is_coalesced_by_the_rules(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        targets::coalesce(&bytes);
    }

    // Bulk: nearly all packets continue their flow.
    #[test]
    fn bulk_is_coalesced_by_the_rules(bytes in proptest::collection::vec(prop_oneof![9 => 0x40..0x60u8, 1 => any::<u8>()], 0..200)) {
        targets::coalesce(&bytes);
    }

    #[test]
    fn what_is_split_is_coalesced_to_the_same(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
        targets::split_coalesce(&bytes);
    }
}
