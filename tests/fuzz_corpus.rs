//! Replays the fuzz corpora through the fuzz targets, on stable and in each run of the tests.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use flannel::packet::{Ipv4Packet, TcpFlags, build};

#[path = "../fuzz/targets.rs"]
#[expect(unreachable_pub, reason = "the same file is the library of the fuzz crate")]
mod targets;

fn fuzz_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

#[test]
fn each_corpus_holds_what_its_target_promises() {
    for (name, target) in targets::TARGETS {
        let corpus = fuzz_dir().join("corpus").join(name);
        let files: Vec<PathBuf> = fs::read_dir(&corpus)
            .unwrap_or_else(|error| panic!("target {name} needs seeds in {}: {error}", corpus.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(!files.is_empty(), "target {name} needs seeds in {}", corpus.display());
        for file in files {
            // Shown if the target panics.
            println!("{}", file.display());
            target(&fs::read(&file).unwrap());
        }
    }
}

#[test]
fn each_target_can_be_fuzzed() {
    let manifest = fs::read_to_string(fuzz_dir().join("Cargo.toml")).unwrap();
    for (name, _) in targets::TARGETS {
        assert!(
            manifest.contains(&format!("name = \"{name}\"")),
            "fuzz/Cargo.toml has no [[bin]] named {name}"
        );
        let wrapper = fs::read_to_string(fuzz_dir().join(format!("fuzz_targets/{name}.rs"))).unwrap_or_default();
        assert!(
            wrapper.contains(&format!("targets::{name}")),
            "fuzz/fuzz_targets/{name}.rs does not run {name}"
        );
    }
}

/// With `FLANNEL_WRITE_SEEDS=1` in the environment it writes them first, after a change of [`packet_seeds`].
#[test]
fn each_packet_seed_is_committed() {
    let write = std::env::var_os("FLANNEL_WRITE_SEEDS").is_some();
    for (target, name, bytes) in packet_seeds() {
        assert!(bytes.len() <= 2_000, "{target}/{name} is large for a seed");
        let corpus = fuzz_dir().join("corpus").join(target);
        if write {
            fs::create_dir_all(&corpus).unwrap();
            fs::write(corpus.join(name), &bytes).unwrap();
        }
        let committed = fs::read(corpus.join(name)).unwrap_or_default();
        assert_eq!(
            committed, bytes,
            "{target}/{name} differs: run this with FLANNEL_WRITE_SEEDS=1"
        );
    }
}

/// Target, file name and bytes of the seeds that nobody can write by hand.
fn packet_seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let v4 = build::Ipv4::new(Ipv4Addr::new(10, 5, 34, 2), Ipv4Addr::new(10, 5, 72, 9)).ident(0x1c46);
    let v6 = build::Ipv6::new(
        Ipv6Addr::new(0xfd00, 0x12, 0x13, 0, 0, 0, 0, 2),
        Ipv6Addr::new(0xfd00, 0x12, 0x14, 0, 0, 0, 0, 9),
    );
    let header = build::Tcp {
        src_port: 40_000,
        dst_port: 443,
        seq: 1_000,
        ack: 2_000,
        flags: TcpFlags::ACK | TcpFlags::PSH,
        window: 501,
        // Two NOPs and a timestamp.
        options: &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
    };
    let quoted = v4.ttl(1).udp(33_434, 33_434, b"probe");
    let icmp_error = v4.icmp(11, 0, 0, &quoted);
    let icmpv6_error = v6.icmp(3, 0, 0, &v6.hop_limit(1).udp(33_434, 33_434, b"probe"));

    let mut fragment = v4.udp(4_000, 53, b"first of two");
    let mut packet = Ipv4Packet::new_checked(fragment.as_mut_slice()).unwrap();
    packet.set_fragment(0, true);
    packet.fill_checksum();
    let mut with_options = v4.raw(17, b"\x01\x01\x01\x00");
    with_options[0] = 0x46;
    let padded = [v4.udp(4_000, 53, b""), vec![0; 18]].concat();
    let truncated = v4.udp(4_000, 53, b"cut off")[..30].to_vec();

    // Hop-by-hop options, a routing header, a first fragment, an echo request.
    let chain = [
        &[43, 0, 1, 4, 0, 0, 0, 0][..],
        &[44, 0, 0, 0, 0, 0, 0, 0],
        &[58, 0, 0, 1, 0, 0, 0, 7],
        &[128, 0, 0, 0, 0, 1, 0, 1],
    ]
    .concat();
    let chain = v6.raw(0, &chain);
    let later_fragment = v6.raw(44, &[17, 0, 5, 0xa8, 0, 0, 0, 7, 1, 2, 3, 4]);
    let endless = v6.raw(60, &[60, 0, 0, 0, 0, 0, 0, 0].repeat(12));

    let with_room = |room: u8, packet: &[u8]| [&[room], packet].concat();
    let segment = v4.tcp(&header, b"GET / HTTP/1.1\r\n")[20..].to_vec();
    let mut short_offset = segment.clone();
    short_offset[12] = 0x40;
    let datagram = v4.udp(8_285, 8_285, b"datagram")[20..].to_vec();
    let mut no_checksum = datagram.clone();
    no_checksum[6..8].fill(0);
    let mut too_long = datagram.clone();
    too_long[5] = 200;

    // Operations of the target: add (0 and 1), remove (4), look up (6 and 7), the odd ones IPv6.
    let subnets = [
        &[0, 24, 10, 5, 34, 0][..],
        &[0, 24, 10, 5, 35, 0],
        &[6, 24, 10, 5, 34, 7],
        &[4, 24, 10, 5, 34, 0],
        &[6, 24, 10, 5, 34, 7],
    ];
    let mixed = [
        &[0, 0, 0, 0, 0, 0][..],
        &[0, 16, 10, 5, 0, 0],
        &[0x80, 24, 10, 5, 34, 0],
        &[0, 32, 255, 255, 255, 255],
        &[6, 25, 10, 5, 34, 128],
        &[6, 0, 0, 0, 0, 0],
    ];
    let ipv6 = [
        &[1, 64, 0xfd, 0, 0, 0x12][..],
        &[0x81, 64, 0xfd, 0, 0, 0x13],
        &[7, 64, 0xfd, 0, 0, 0x12],
        &[1, 128, 0xff, 0xff, 0xff, 0xff],
        &[7, 10, 0xfd, 0, 0, 0x13],
    ];

    vec![
        ("ipv4", "udp", v4.udp(4_000, 53, b"query")),
        ("ipv4", "tcp", v4.tcp(&header, b"data")),
        ("ipv4", "expired", quoted.clone()),
        ("ipv4", "fragment", fragment.clone()),
        ("ipv4", "options", with_options),
        ("ipv4", "padded", padded.clone()),
        ("ipv4", "truncated", truncated),
        ("ipv6", "udp", v6.udp(4_000, 53, b"query")),
        ("ipv6", "chain", chain.clone()),
        ("ipv6", "later-fragment", later_fragment),
        ("ipv6", "endless-chain", endless),
        ("ipv6", "truncated", v6.udp(4_000, 53, b"cut off")[..50].to_vec()),
        ("icmp", "udp", with_room(255, &quoted)),
        ("icmp", "echo", with_room(96, &v4.icmp_echo(1, 1, b"ping"))),
        ("icmp", "error", with_room(255, &icmp_error)),
        ("icmp", "fragment", with_room(9, &fragment)),
        ("icmp", "padded", with_room(255, &padded)),
        ("icmp", "large", with_room(255, &v4.udp(33_434, 33_434, &[7; 700]))),
        ("icmp", "udp6", with_room(255, &v6.udp(33_434, 33_434, &[7; 1_300]))),
        ("icmp", "echo6", with_room(255, &chain)),
        ("icmp", "error6", with_room(255, &icmpv6_error)),
        ("tcp", "data", segment.clone()),
        ("tcp", "short-offset", short_offset),
        ("tcp", "truncated-options", segment[..24].to_vec()),
        ("udp", "data", datagram.clone()),
        ("udp", "no-checksum", no_checksum),
        ("udp", "too-long", too_long),
        ("route_table", "subnets", subnets.concat()),
        ("route_table", "mixed-lengths", mixed.concat()),
        ("route_table", "ipv6", ipv6.concat()),
    ]
}
