//! Splitting and coalescing of the bulk of a TCP stream, checksums included, without the system calls.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flannel::{
    offload::{Coalescer, GsoKind, Headers, Merge, PartialChecksum, VirtioNetHdr, split},
    packet::{Ipv4Packet, TcpFlags, build, checksum},
};

/// TCP payload in a packet that fills an overlay MTU of 1,472 bytes, timestamps on.
const MSS: usize = 1_420;

/// The longest superpacket that still fits into one segmented send.
const SUPERPACKET: usize = 63_000;

fn ip(ident: u16) -> build::Ipv4 {
    build::Ipv4::new([10, 5, 34, 2].into(), [10, 5, 72, 9].into())
        .ident(ident)
        .dont_fragment(true)
}

fn tcp(seq: u32) -> build::Tcp<'static> {
    build::Tcp {
        src_port: 40_000,
        dst_port: 5_201,
        seq,
        ack: 1,
        flags: TcpFlags::ACK,
        window: 501,
        options: &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
    }
}

fn split(c: &mut Criterion) {
    let mut packet = ip(0).tcp(&tcp(0), &vec![7; SUPERPACKET - 52]);
    let pseudo_header = Ipv4Packet::new_checked(&packet).unwrap().pseudo_header();
    packet[36..38].copy_from_slice(&checksum::fold(pseudo_header).to_be_bytes());
    let header = VirtioNetHdr {
        gso: GsoKind::TcpV4,
        gso_size: MSS as u16,
        checksum: Some(PartialChecksum { start: 20, offset: 16 }),
        ..Default::default()
    };
    let mut headers = Headers::default();
    let mut group = c.benchmark_group("offload");
    group.throughput(Throughput::Bytes(packet.len() as u64));
    group.bench_function("split 63,000 bytes of TCP", |b| {
        b.iter(|| {
            headers.clear();
            let segments = split::plan(&header, black_box(&mut packet), &mut headers).unwrap();
            segments
                .iter(&headers, &packet)
                .map(|(header, payload)| header.len() + payload.len())
                .sum::<usize>()
        });
    });
}

fn coalesce(c: &mut Criterion) {
    let mut group = c.benchmark_group("offload");
    let tcp_stream: Vec<_> = (0..44)
        .map(|index| ip(index).tcp(&tcp(u32::from(index) * 1_420), &[7; MSS]))
        .collect();
    let datagrams: Vec<_> = (0..44).map(|index| ip(index).udp(1, 2, &[7; 36])).collect();
    // Eight flows in turn: the flow table is asked for each packet.
    let flows: Vec<_> = (0..64).map(|index| ip(index / 8).udp(index % 8, 2, &[7; 36])).collect();
    for (name, packets, merge) in [
        ("coalesce 44 TCP segments", &tcp_stream, Merge::ALL),
        ("coalesce 44 datagrams of 64 bytes", &datagrams, Merge::ALL),
        ("coalesce 64 datagrams of 8 flows", &flows, Merge::ALL),
        ("pass 44 TCP segments unmerged", &tcp_stream, Merge::NOTHING),
    ] {
        let arena = packets.concat();
        let len = packets[0].len();
        let mut coalescer = Coalescer::new(merge);
        group.throughput(Throughput::Bytes(arena.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                coalescer.clear();
                for index in 0..packets.len() {
                    coalescer.push(black_box(&arena), index * len..(index + 1) * len);
                }
                coalescer
                    .writes(&arena)
                    .map(|write| write.parts().map(<[u8]>::len).sum::<usize>())
                    .sum::<usize>()
            });
        });
    }
}

criterion_group!(benches, split, coalesce);
criterion_main!(benches);
