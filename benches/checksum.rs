//! Checksum throughput, next to that of a copy: the checksum should not be what the packet waits for.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use flannel::packet::checksum;

/// A small packet, one of the underlay's MTU, and a superpacket of segmentation offload.
const LENGTHS: [usize; 3] = [64, 1_400, 65_000];

fn throughput(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for len in LENGTHS {
        let bytes: Vec<u8> = (0..len).map(|at| at as u8).collect();
        let mut copy = vec![0; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::new("sum", len), &bytes, |b, bytes| {
            b.iter(|| checksum::checksum(black_box(bytes)));
        });
        group.bench_with_input(BenchmarkId::new("memcpy", len), &bytes, |b, bytes| {
            b.iter(|| black_box(&mut copy).copy_from_slice(black_box(bytes)));
        });
    }
    group.finish();
}

fn header(c: &mut Criterion) {
    let header = [0x45u8; 20];
    c.bench_function("checksum/ipv4 header", |b| {
        b.iter(|| checksum::checksum(black_box(&header)))
    });
    c.bench_function("checksum/update", |b| {
        b.iter(|| checksum::update_u16(black_box(0x1234), black_box(0x4006), black_box(0x3f06)));
    });
}

criterion_group!(benches, throughput, header);
criterion_main!(benches);
