//! A flow comes from the kernel by that queue of the device that its answers are written to: flows that send little by another
//! one than bulk. Needs root.

mod lab;

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use flannel::{
    engine::{
        IcmpSource, Offloads,
        admission::{Admission, SourceCheck},
        io::{Queues, mmsg::Mmsg},
        worker::{Setup, Worker},
    },
    packet::build,
    route_table::{Peer, PeerId, RouteTable, Routes},
    sys::{poll::wait_readable, tun},
};
use lab::{PATIENCE, inside, new_lab};

/// This host and another one's container.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 1);
const THERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 5, 2, 2)), 53);

/// More than a sparse flow sends at once: 32 KiB.
const BULK: [u8; 1_000] = [7; 1_000];
const DATAGRAMS: usize = 40;

#[test]
fn bulk_and_what_sends_little_come_by_different_queues_once_they_are_answered() {
    let mut lab = new_lab("queues");
    let host = lab.host("h1").unwrap();
    let ns = host.ns();
    let (device, _) = inside(ns, || tun::open_offload("tun%d", 2)).unwrap();
    ns.ip(&format!("address add {HERE}/16 dev {}", device.name)).unwrap();
    ns.ip(&format!("link set {} up", device.name)).unwrap();
    let local = || inside(ns, || UdpSocket::bind("127.0.0.1:0")).unwrap();
    let (tunnel, far_tunnel) = (local(), local());
    tunnel.set_nonblocking(true).unwrap();
    let tunnel_address = tunnel.local_addr().unwrap();

    let routes = Routes::default();
    let peer = Peer {
        addr: far_tunnel.local_addr().unwrap(),
        id: PeerId::new(1).unwrap(),
    };
    routes.publish(RouteTable::new([("10.5.2.0/24".parse().unwrap(), peer)]));
    let queues = Queues::new(Arc::clone(&device.queues[0]), Some(Arc::clone(&device.queues[1])));
    // Its raw socket is one of the namespace's, too.
    let (io, _bell) = inside(ns, || Mmsg::new(queues, [tunnel].into())).unwrap();
    let setup = Setup {
        routes,
        admission: Admission::new(SourceCheck::Strict, ["10.5.1.0/24".parse().unwrap()]),
        icmp_source: IcmpSource { v4: HERE, v6: None },
        offloads: Offloads {
            tun_tcp: true,
            tun_udp: true,
            ..Offloads::default()
        },
        sources: 1,
        busy_poll: Duration::ZERO,
        sharers: 1,
        counters: Arc::default(),
        fallbacks: Arc::default(),
    };
    let mut worker = Worker::new(io, setup);

    let [bulk, sparse] = [(); 2].map(|()| {
        let socket = inside(ns, || UdpSocket::bind((HERE, 0))).unwrap();
        socket.connect(THERE).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    let answer = |worker: &mut Worker<Mmsg>, socket: &UdpSocket| {
        let port = socket.local_addr().unwrap().port();
        let packet = build::Ipv4::new([10, 5, 2, 2].into(), HERE).udp(53, port, b"answer");
        far_tunnel.send_to(&packet, tunnel_address).unwrap();
        worker.drain().unwrap();
        let mut buffer = [0; 10];
        assert_eq!(socket.recv(&mut buffer).unwrap(), 6);
    };
    // Which queues have something after a datagram.
    let queues_of = |worker: &mut Worker<Mmsg>, socket: &UdpSocket| {
        socket.send(b"x").unwrap();
        let files = [0, 1].map(|queue| device.queues[queue].as_raw_fd());
        let waiting = wait_readable(files, Some(Duration::ZERO)).unwrap();
        worker.drain().unwrap();
        waiting
    };
    // What is bulk is so for 256 ms only, in which a busy machine may get nothing done.
    let deadline = Instant::now() + PATIENCE;
    loop {
        for _ in 0..DATAGRAMS {
            bulk.send(&BULK).unwrap();
        }
        sparse.send(b"question").unwrap();
        worker.drain().unwrap();
        answer(&mut worker, &bulk);
        answer(&mut worker, &sparse);
        let came = [&bulk, &sparse].map(|socket| queues_of(&mut worker, socket));
        if came == [[true, false], [false, true]] {
            break;
        }
        assert!(Instant::now() < deadline, "bulk and the other: {came:?}");
    }
    // Quiet for long enough, it is as good as any other.
    std::thread::sleep(Duration::from_millis(300));
    answer(&mut worker, &bulk);
    assert_eq!(queues_of(&mut worker, &bulk), [false, true]);
}
