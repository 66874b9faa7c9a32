//! Planning a batch's messages: what the engine does between reading packets and the one call that sends them.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flannel::{
    offload::{GsoKind, Headers, PartialChecksum, Segments, SendPlan, VirtioNetHdr, split},
    packet::{Ipv4Packet, build, checksum},
};

/// Packets in a batch of small ones.
const PACKETS: usize = 128;

/// A 64-byte UDP payload and its headers.
const SMALL: usize = 92;

/// Small packets, each for one of `peers` in turn.
fn packets(c: &mut Criterion, name: &str, peers: usize) {
    let mut group = c.benchmark_group("send plan");
    group.throughput(Throughput::Elements(PACKETS as u64));
    let mut plan = SendPlan::default();
    group.bench_function(name, |b| {
        b.iter(|| {
            plan.clear();
            for index in 0..PACKETS {
                plan.push_packet(64 + index * SMALL, SMALL, black_box(index % peers), true);
            }
            plan.runs().len()
        });
    });
    group.finish();
}

/// 45 datagrams that fill an overlay MTU of 1,472 bytes.
fn superpacket(headers: &mut Headers) -> Segments {
    const PAYLOAD: u16 = 1_444;
    let ip = build::Ipv4::new([10, 5, 34, 2].into(), [10, 5, 72, 9].into());
    let mut packet = ip.udp(1, 2, &vec![7; 45 * usize::from(PAYLOAD)]);
    let pseudo_header = Ipv4Packet::new_checked(&packet).unwrap().pseudo_header();
    packet[26..28].copy_from_slice(&checksum::fold(pseudo_header).to_be_bytes());
    let header = VirtioNetHdr {
        gso: GsoKind::UdpL4,
        gso_size: PAYLOAD,
        checksum: Some(PartialChecksum { start: 20, offset: 6 }),
        ..VirtioNetHdr::default()
    };
    split::plan(&header, &mut packet, headers).unwrap()
}

fn superpackets(c: &mut Criterion) {
    let mut headers = Headers::default();
    let segments = superpacket(&mut headers);
    let mut group = c.benchmark_group("send plan");
    group.throughput(Throughput::Bytes(2 * segments.total_len() as u64));
    let mut plan = SendPlan::default();
    group.bench_function("two superpackets and their pieces", |b| {
        b.iter(|| {
            plan.clear();
            for start in [64, 66_000] {
                plan.push_segments(black_box(&segments), start, 1, true);
            }
            let pieces = plan.runs().iter().flat_map(|run| plan.pieces(run));
            pieces.count()
        });
    });
    group.finish();
}

fn send_plan(c: &mut Criterion) {
    packets(c, "128 small packets to one peer", 1);
    packets(c, "128 small packets to 8 peers in turn", 8);
    packets(c, "128 small packets to 128 peers", 128);
    superpackets(c);
}

criterion_group!(benches, send_plan);
criterion_main!(benches);
