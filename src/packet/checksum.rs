//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! A *partial sum* is a `u32` in which 16-bit words, read in network order, are added up with end-around carry. Partial
//! sums of pieces add up with [`combine`] as long as each piece but the last has an even length.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::sys::simd::{self, BLOCK};

/// Messages of so many blocks are worth a function call with wide vectors.
const WIDE_BLOCKS: usize = 3;

/// Partial sum of `bytes`, an odd last byte padded with a zero (RFC 1071 section 1). At most `0xffff`.
///
/// The words are added in the machine's byte order, several at a time, and turned round once at the end: RFC 1071 section 2
/// (B) and (C) show that neither changes the result.
#[inline]
pub fn sum(bytes: &[u8]) -> u32 {
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    let mut total = sum_rest(rest);
    if !blocks.is_empty() {
        let wide = if blocks.len() >= WIDE_BLOCKS {
            simd::sum_words(blocks)
        } else {
            None
        };
        total = add64(total, wide.unwrap_or_else(|| sum_blocks(blocks)));
    }
    u32::from(fold64(total).to_be())
}

/// The sum of all blocks, with the vectors that the compiler makes of it.
fn sum_blocks(blocks: &[[u8; BLOCK]]) -> u64 {
    // The accumulators do not depend on one another, and no carry has to be carried: 2^32 words, that is 16 GiB, fit.
    let mut lanes = [0u64; 8];
    for block in blocks {
        for half in block.as_chunks::<32>().0 {
            for (lane, word) in lanes.iter_mut().zip(half.as_chunks::<4>().0) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
    }
    lanes.into_iter().sum()
}

/// The sum of less than a block: all there is of most headers.
#[inline]
fn sum_rest(bytes: &[u8]) -> u64 {
    let (words, mut tail) = bytes.as_chunks::<8>();
    let total = words
        .iter()
        .fold(0, |total, word| add64(total, u64::from_ne_bytes(*word)));
    let mut last = 0;
    if let Some((word, rest)) = tail.split_first_chunk() {
        last += u64::from(u32::from_ne_bytes(*word));
        tail = rest;
    }
    if let Some((word, rest)) = tail.split_first_chunk() {
        last += u64::from(u16::from_ne_bytes(*word));
        tail = rest;
    }
    if let [byte] = tail {
        last += u64::from(u16::from_ne_bytes([*byte, 0]));
    }
    add64(total, last)
}

/// Sum of `a` and `b` with end-around carry.
#[inline]
fn add64(a: u64, b: u64) -> u64 {
    let (total, carry) = a.overflowing_add(b);
    total + u64::from(carry)
}

/// The 64-bit partial sum as 16 bits.
#[inline]
fn fold64(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    fold(sum as u32)
}

/// Partial sum of two pieces of one message. The first must have an even length.
#[inline]
pub fn combine(a: u32, b: u32) -> u32 {
    let (total, carry) = a.overflowing_add(b);
    total + u32::from(carry)
}

/// The partial sum as 16 bits. Zero only if every word of the message is zero.
#[inline]
pub fn fold(sum: u32) -> u16 {
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

/// Checksum of a message whose checksum field is zero: the one's complement of its sum.
///
/// Over a message with its checksum in place the result is zero if it arrived intact.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    !fold(sum(bytes))
}

/// Partial sum of the pseudo header of TCP and UDP over IPv4 (RFC 9293 section 3.1, RFC 768).
///
/// `len` is the length in bytes of the TCP or UDP header and its payload.
#[inline]
pub fn pseudo_header_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, len: u16) -> u32 {
    let src = u32::from(src);
    let dst = u32::from(dst);
    (src >> 16) + (src & 0xffff) + (dst >> 16) + (dst & 0xffff) + u32::from(protocol) + u32::from(len)
}

/// Partial sum of the pseudo header of TCP, UDP and ICMPv6 over IPv6 (RFC 8200 section 8.1).
///
/// `len` is the length in bytes of the upper layer's header and payload, without any extension header.
#[inline]
pub fn pseudo_header_v6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, len: u32) -> u32 {
    let addresses = combine(sum(&src.octets()), sum(&dst.octets()));
    addresses + (len >> 16) + (len & 0xffff) + u32::from(protocol)
}

/// The checksum of a message after one 16-bit word of it went from `old` to `new`: RFC 1624 equation 3.
///
/// A checksum that was wrong stays wrong by the same amount, so the damage is still seen at the far end.
#[inline]
pub fn update_u16(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 section 4.1, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// Bytes without a pattern that a sum could cancel out.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn rfc_1071_example_adds_up() {
        // Section 3: the words 0001 f203 f4f5 f6f7 sum to ddf2.
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    #[test]
    fn every_length_and_alignment_agrees_with_the_naive_loop() {
        let bytes = noise(400);
        for start in 0..BLOCK {
            for end in start..bytes.len() {
                let piece = &bytes[start..end];
                assert_eq!(fold(sum(piece)), naive(piece), "bytes {start}..{end}");
            }
        }
    }

    #[test]
    fn the_portable_sum_and_the_wide_one_agree() {
        let bytes = noise(64 * 20);
        let (blocks, _) = bytes.as_chunks::<BLOCK>();
        for len in 0..blocks.len() {
            let wide = simd::sum_words(&blocks[..len]).unwrap_or_else(|| sum_blocks(&blocks[..len]));
            assert_eq!(fold64(sum_blocks(&blocks[..len])), fold64(wide), "{len} blocks");
        }
    }

    #[test]
    fn large_messages_do_not_overflow() {
        for len in [65_535, 1 << 20] {
            let bytes = vec![0xff; len];
            assert_eq!(fold(sum(&bytes)), naive(&bytes), "{len} bytes of 0xff");
        }
    }

    #[test]
    fn pseudo_header_is_the_sum_of_its_bytes() {
        let (src, dst) = (Ipv4Addr::new(255, 254, 253, 252), Ipv4Addr::new(10, 5, 34, 2));
        let mut bytes = [src.octets(), dst.octets()].concat();
        bytes.extend([0, 17, 0xff, 0xf0]);
        assert_eq!(fold(pseudo_header_v4(src, dst, 17, 0xfff0)), naive(&bytes));

        let (src, dst) = (Ipv6Addr::from([0xfd; 16]), Ipv6Addr::from([0xff; 16]));
        let mut bytes = [src.octets(), dst.octets()].concat();
        bytes.extend([0, 1, 0xff, 0xf0, 0, 0, 0, 58]);
        assert_eq!(fold(pseudo_header_v6(src, dst, 58, 0x1_fff0)), naive(&bytes));
    }

    #[test]
    fn rfc_1624_example_is_not_negative_zero() {
        // Section 4: the checksum dd2f, a word from 5555 to 3285, gives 0000 and not ffff.
        assert_eq!(update_u16(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_agree_with_the_naive_loop(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
            prop_assert_eq!(fold(sum(&bytes)), naive(&bytes));
        }

        #[test]
        fn pieces_combine_to_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..500), at in 0usize..250) {
            let at = (2 * at).min(bytes.len() & !1);
            let (head, tail) = bytes.split_at(at);
            prop_assert_eq!(fold(combine(sum(head), sum(tail))), fold(sum(&bytes)));
        }

        #[test]
        fn update_equals_recomputation(mut bytes in proptest::collection::vec(any::<u8>(), 2..100), new in any::<u16>()) {
            // A first byte that is not zero, as in each IP header, keeps both sides away from negative zero.
            bytes.insert(0, 0x45);
            bytes.insert(1, 0);
            let before = checksum(&bytes);
            let old = u16::from_be_bytes([bytes[2], bytes[3]]);
            bytes[2..4].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update_u16(before, old, new), checksum(&bytes));
        }
    }
}
