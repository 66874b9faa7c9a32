//! What the engine does with each packet, without the system calls.

use std::hint::black_box;
use std::net::{Ipv4Addr, Ipv6Addr};

use criterion::{Criterion, criterion_group, criterion_main};
use flannel::packet::{IcmpError, IpPacket, Ipv4Packet, Ipv6Packet, build, icmp, icmpv6};

const SRC: Ipv4Addr = Ipv4Addr::new(10, 5, 34, 2);
const DST: Ipv4Addr = Ipv4Addr::new(10, 5, 72, 9);
const SRC_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 2);
const DST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x12, 0x14, 0, 0, 0, 0, 9);

/// Payload of a packet that fills an overlay MTU of 1,472 bytes, as bulk TCP does.
const PAYLOAD: [u8; 1_400] = [7; 1_400];

fn forward(c: &mut Criterion) {
    let bytes = build::Ipv4::new(SRC, DST).tcp(&build::Tcp::default(), &PAYLOAD);
    c.bench_function("packet/parse", |b| {
        b.iter(|| IpPacket::parse(black_box(&bytes)).map(|packet| packet.dst()))
    });

    let fresh = build::Ipv4::new(SRC, DST)
        .ttl(255)
        .tcp(&build::Tcp::default(), &PAYLOAD);
    let mut bytes = fresh.clone();
    c.bench_function("packet/ipv4 parse and decrement", |b| {
        b.iter(|| {
            // Restoring TTL and checksum keeps the packet alive; it costs two stores.
            bytes[8..12].copy_from_slice(&fresh[8..12]);
            let mut packet = Ipv4Packet::new_checked(black_box(bytes.as_mut_slice())).unwrap();
            (packet.decrement_ttl(), packet.dst())
        });
    });

    let mut bytes = build::Ipv6::new(SRC_V6, DST_V6).tcp(&build::Tcp::default(), &PAYLOAD);
    c.bench_function("packet/ipv6 parse and decrement", |b| {
        b.iter(|| {
            bytes[7] = 64;
            let mut packet = Ipv6Packet::new_checked(black_box(bytes.as_mut_slice())).unwrap();
            (packet.decrement_hop_limit(), packet.dst())
        });
    });
}

fn icmp_error(c: &mut Criterion) {
    let original = build::Ipv4::new(SRC, DST).udp(33_434, 33_434, &PAYLOAD);
    let mut out = [0; icmp::MAX_ERROR_LEN];
    c.bench_function("packet/icmp error", |b| {
        b.iter(|| icmp::error_reply(black_box(&original), IcmpError::TimeExceeded, DST, black_box(&mut out)));
    });

    let original = build::Ipv6::new(SRC_V6, DST_V6).udp(33_434, 33_434, &PAYLOAD);
    let mut out = [0; icmpv6::MAX_ERROR_LEN];
    c.bench_function("packet/icmpv6 error", |b| {
        b.iter(|| {
            icmpv6::error_reply(
                black_box(&original),
                IcmpError::TimeExceeded,
                DST_V6,
                black_box(&mut out),
            )
        });
    });
}

criterion_group!(benches, forward, icmp_error);
criterion_main!(benches);
