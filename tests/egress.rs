//! What cannot be answered does not leave a host, packet by packet or in bulk; all else does. Needs root.

mod lab;

use std::{
    io, mem,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use flannel::{
    lab::{HostOptions, wait_for},
    observe::status::{Status, Worker},
    offload::{GsoKind, PartialChecksum, VirtioNetHdr},
    packet::{
        IpPacket, Ipv4Packet, TcpFlags,
        build::{self, Tcp},
        checksum, protocol,
    },
};
use lab::{Overlay, PATIENCE, Registry, inside, new_lab, plain_peer::PlainPeer, wire::End};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:12:13::/48"}"#;

/// What each piece of a superpacket carries.
const PIECE: u16 = 1_000;

/// Hands packets to a device past the host's own routing, which would stop most of them (packet(7)).
struct Injector(OwnedFd);

impl Injector {
    /// Into `device` of the calling thread's network namespace.
    fn open(device: &str) -> io::Result<Injector> {
        let name = std::ffi::CString::new(device)?;
        let check = |result: libc::c_int| match result {
            0.. => Ok(result),
            _ => Err(io::Error::last_os_error()),
        };
        let on: libc::c_int = 1;
        // SAFETY: each call is given memory that lives through it, with its length; the descriptor is new and has no other owner.
        unsafe {
            let socket = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0))?;
            let socket = OwnedFd::from_raw_fd(socket);
            check(libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                mem::size_of_val(&on) as libc::socklen_t,
            ))?;
            let mut address: libc::sockaddr_ll = mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = (libc::ETH_P_IP as u16).to_be();
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as libc::c_int;
            check(libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                mem::size_of_val(&address) as libc::socklen_t,
            ))?;
            Ok(Injector(socket))
        }
    }

    fn send(&self, header: VirtioNetHdr, packet: &[u8]) {
        let bytes = [&header.emit()[..], packet].concat();
        // SAFETY: the bytes live through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(sent, bytes.len() as isize, "{}", io::Error::last_os_error());
    }
}

/// linux/if_packet.h
const PACKET_VNET_HDR: libc::c_int = 15;

fn udp(from: IpAddr, to: IpAddr, payload: &str) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => build::Ipv4::new(from, to).udp(7, 9, payload.as_bytes()),
        (IpAddr::V6(from), IpAddr::V6(to)) => build::Ipv6::new(from, to).udp(7, 9, payload.as_bytes()),
        _ => panic!("two families"),
    }
}

/// Three pieces of TCP in one, as a kernel hands it to a device that cuts them itself.
fn superpacket(from: IpAddr, to: IpAddr) -> (VirtioNetHdr, Vec<u8>) {
    let (IpAddr::V4(from), IpAddr::V4(to)) = (from, to) else {
        panic!("IPv4 only");
    };
    let header = Tcp {
        src_port: 7,
        dst_port: 9,
        flags: TcpFlags::ACK,
        window: 100,
        ..Tcp::default()
    };
    let mut bytes = build::Ipv4::new(from, to).tcp(&header, &vec![b'x'; 3 * usize::from(PIECE)]);
    let sum = checksum::fold(Ipv4Packet::new_checked(&bytes).unwrap().pseudo_header());
    bytes[36..38].copy_from_slice(&sum.to_be_bytes());
    let header = VirtioNetHdr {
        gso: GsoKind::TcpV4,
        gso_size: PIECE,
        hdr_len: 40,
        checksum: Some(PartialChecksum { start: 20, offset: 16 }),
        ..VirtioNetHdr::default()
    };
    (header, bytes)
}

fn counts(overlay: &Overlay) -> Worker {
    let file = format!("--subnet-file={}", overlay.daemons[0].subnet_file().display());
    let json = overlay
        .registry
        .flanneld(overlay.hosts[0].ns(), &["status", "--json", &file]);
    let status: Status = serde_json::from_str(&json).unwrap();
    Worker::total(&status.backend.unwrap().engine.unwrap().workers)
}

#[test]
fn what_cannot_be_answered_stays_on_its_host() {
    let lab = new_lab("egress");
    let registry = Registry::embedded(&lab);
    // One worker, so that little is to be waited for.
    let mut overlay = Overlay::start_hosts(lab, registry, CONFIG, &[(HostOptions::default(), &["--workers=1"])]);
    let peer = PlainPeer::join(&mut overlay, &HostOptions::default());
    let own = overlay.daemons[0].subnet().subnet.trunc();
    let own_v6 = overlay.daemons[0].subnet_v6().unwrap();
    let injector = inside(overlay.hosts[0].ns(), || Injector::open("flannel0")).unwrap();

    let ours = IpAddr::from(own.hosts().next().unwrap());
    let theirs = IpAddr::from(peer.subnet.hosts().next().unwrap());
    let ours_v6 = IpAddr::from(own_v6.hosts().nth(1).unwrap());
    let theirs_v6 = IpAddr::from(peer.subnet_v6.unwrap().hosts().nth(1).unwrap());
    let parsed = |address: &str| address.parse::<IpAddr>().unwrap();
    let plain = |from, to, payload: &str| injector.send(VirtioNetHdr::default(), &udp(from, to, payload));
    let in_bulk = |from, to| {
        let (header, bytes) = superpacket(from, to);
        injector.send(header, &bytes);
    };
    // Until the peer is there; what comes before was for nobody.
    wait_for(PATIENCE, "a packet to reach the peer", || {
        plain(ours, theirs, "first");
        Ok::<_, flannel::lab::LabError>(peer.recv(std::time::Duration::from_millis(100)))
    })
    .unwrap();
    let before = counts(&overlay);

    let bad_sources = ["0.0.0.0", "127.0.0.1", "224.0.0.5", "240.0.0.1", "255.255.255.255"];
    let bad_sources_v6 = ["::", "::1", "fe80::1", "ff02::5", "::ffff:10.5.1.2"];
    for source in bad_sources {
        plain(parsed(source), theirs, source);
    }
    plain(own.broadcast().into(), theirs, "our broadcast");
    for source in bad_sources_v6 {
        plain(parsed(source), theirs_v6, source);
    }
    in_bulk(parsed("127.0.0.1"), theirs);
    let bad_targets = ["0.0.0.0", "127.0.0.1", "240.0.0.1"];
    let bad_targets_v6 = ["::1", "fe80::9"];
    for target in bad_targets {
        plain(ours, parsed(target), target);
    }
    for target in bad_targets_v6 {
        plain(ours_v6, parsed(target), target);
    }
    let martians = bad_sources.len() + 1 + bad_sources_v6.len() + 1 + bad_targets.len() + bad_targets_v6.len();
    plain(ours, parsed("224.0.0.251"), "group");
    plain(ours_v6, parsed("ff02::fb"), "group");
    let groups = 2;
    for target in [
        parsed("255.255.255.255"),
        own.broadcast().into(),
        peer.subnet.broadcast().into(),
    ] {
        plain(ours, target, "all");
    }
    in_bulk(ours, peer.subnet.broadcast().into());
    let broadcasts = 4;

    // What arrives is what can be answered: in both families, in bulk, and from another network behind this host.
    in_bulk(ours, theirs);
    plain(ours_v6, theirs_v6, "good");
    plain(parsed("172.17.0.2"), theirs, "last");
    // Flows in any order: the worker has two queues for them.
    let mut pieces = Vec::new();
    let mut others = Vec::new();
    while pieces.len() + others.len() < 5 {
        let packet = peer.recv(PATIENCE).expect("not all of it has arrived");
        match IpPacket::parse(&packet).unwrap() {
            IpPacket::V4(ip) if ip.protocol() == protocol::TCP => {
                let sequence = u32::from_be_bytes(ip.payload()[4..8].try_into().unwrap());
                pieces.push((sequence, ip.payload().len() - 20));
            }
            _ if packet.ends_with(b"first") => {}
            _ => others.push(packet[packet.len() - 4..].to_vec()),
        }
    }
    let piece = usize::from(PIECE);
    assert_eq!(pieces, [0, 1, 2].map(|number| (number * u32::from(PIECE), piece)));
    others.sort_unstable();
    assert_eq!(others, [b"good", b"last"]);

    let dropped = [
        ("martian", martians as u64),
        ("broadcast", broadcasts),
        ("multicast", groups),
    ];
    let after = wait_for(PATIENCE, "all others to be dropped", || {
        let after = counts(&overlay);
        let all = dropped
            .iter()
            .all(|&(reason, count)| after.dropped[reason] - before.dropped[reason] >= count);
        Ok::<_, flannel::lab::LabError>(all.then_some(after))
    })
    .unwrap();
    // All has been looked at: what arrives now came before it.
    while let Some(packet) = peer.recv(std::time::Duration::from_millis(100)) {
        assert!(packet.ends_with(b"first"), "{packet:02x?}");
    }
    let more = |reason: &str| after.dropped[reason] - before.dropped[reason];
    assert_eq!(more("martian"), martians as u64);
    assert_eq!(more("broadcast"), broadcasts);
    // The kernel itself talks to groups on a new device.
    assert!(more("multicast") >= groups, "{after:?}");
    assert_eq!(after.icmp_errors, before.icmp_errors, "nobody is there to be told");
    assert_eq!(after.superpackets_split, before.superpackets_split + 1);
}
