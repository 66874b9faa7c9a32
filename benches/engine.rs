//! The whole engine, TUN to TUN: two hosts as network namespaces with the `udp` backend each, TCP and small UDP packets
//! between their overlay addresses. What `cargo bench` shows of it is this machine at this moment; comparisons with other
//! tunnels are in `scripts/bench`.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flannel::{
    backend::{
        Backend, Descriptors,
        udp::{IoMode, Options, TunMode, Udp},
    },
    kernel::external::External,
    lab::{Host, Lab},
    lease::{
        record::{BackendType, Lease, LeaseValue, Subnets},
        watch::{PeerSet, Picture},
    },
    network::{self, BackendKind, Network},
    registry::Revision,
    sandbox::Sandbox,
};
use nix::unistd::Uid;
use tokio::sync::mpsc;

const NETWORK: &str = "10.5.0.0/16";
const PORT: u16 = 7_000;

/// Bytes that one TCP measurement sends at a time, and is told of: enough that the answer's way back does not count.
const CHUNK: usize = 16 << 20;

/// Payload of a small packet.
const SMALL: usize = 64;

/// A datagram that has not come back after this long is lost, and with it the measurement.
const PATIENCE: Duration = Duration::from_secs(5);

/// A host with its part of the overlay.
struct Member {
    host: Host,
    backend: Udp,
    lease: Lease,
}

impl Member {
    fn join(host: Host, number: u8, options: Options) -> Self {
        let lease = Lease {
            subnets: Subnets::new(format!("10.5.{number}.0/24").parse().unwrap(), None),
            value: LeaseValue {
                public_ip: host.ip(),
                public_ipv6: None,
                backend_type: BackendType::Known(BackendKind::Udp),
                backend_data: None,
                backend_v6_data: None,
            },
            revision: Revision(1),
            created: Revision(1),
            ttl: None,
        };
        let network = Network::parse(&format!(r#"{{"Network":"{NETWORK}"}}"#))
            .unwrap()
            .network;
        let backend = host.ns().inside(|| {
            let external = External {
                index: 0,
                name: "eth0".to_owned(),
                mtu: 1_500,
                address: host.ip(),
                public_ip: host.ip(),
            };
            let (failures, _) = mpsc::unbounded_channel();
            let mut backend = Udp::new(
                &external,
                network::Udp::default(),
                options,
                Descriptors::default(),
                failures,
                Sandbox::default(),
            )
            .unwrap();
            backend.start(&network, &lease).unwrap();
            backend.resume().unwrap();
            backend
        });
        Self {
            backend: backend.unwrap(),
            host,
            lease,
        }
    }

    fn meet(&mut self, other: &Lease) {
        let peers = PeerSet::from([(other.subnets, Arc::new(other.clone()))]);
        self.backend.apply(&Picture::complete(peers)).unwrap();
    }

    fn address(&self) -> Ipv4Addr {
        self.lease.subnets.v4().addr()
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.host.ns().inside(work).unwrap()
    }
}

/// Time that `times` chunks of TCP take from one to the other.
fn transfer(stream: &mut TcpStream, times: u64) -> Duration {
    let chunk = vec![7; CHUNK];
    let start = Instant::now();
    for _ in 0..times {
        stream.write_all(&chunk).unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    start.elapsed()
}

/// Reads chunks and says so after each, until the other side has closed.
fn sink(mut stream: TcpStream) {
    let mut chunk = vec![0; CHUNK];
    while stream.read_exact(&mut chunk).is_ok() && stream.write_all(&[1]).is_ok() {}
}

/// Returns what comes, until it is empty.
fn echo(socket: &UdpSocket) {
    let mut buffer = [0; SMALL];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        socket.send_to(&buffer[..length], from).unwrap();
        if length == 0 {
            return;
        }
    }
}

fn measure(c: &mut Criterion, name: &str, options: Options) {
    let mut lab = Lab::new("bench").unwrap();
    let hosts = ["h1", "h2"].map(|name| lab.host(name).unwrap());
    let [mut one, mut two] = {
        let [one, two] = hosts;
        [Member::join(one, 1, options), Member::join(two, 2, options)]
    };
    one.meet(&two.lease);
    two.meet(&one.lease);
    let to = SocketAddr::from((two.address(), PORT));

    let mut group = c.benchmark_group(format!("engine/{name}"));
    group.sample_size(10);

    let listener = two.inside(|| TcpListener::bind(to).unwrap());
    let receiver = thread::spawn(move || sink(listener.accept().unwrap().0));
    let mut stream = one.inside(|| TcpStream::connect(to).unwrap());
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("TCP, one stream", |b| {
        b.iter_custom(|times| transfer(&mut stream, times));
    });
    drop(stream);
    receiver.join().unwrap();

    let far = two.inside(|| UdpSocket::bind(to).unwrap());
    let echoing = thread::spawn(move || echo(&far));
    let near = one.inside(|| UdpSocket::bind((one.address(), 0)).unwrap());
    near.connect(to).unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; SMALL];
    group.throughput(Throughput::Elements(1));
    group.bench_function("64-byte round trip", |b| {
        b.iter(|| {
            near.send(&buffer).unwrap();
            near.recv(&mut buffer).unwrap()
        });
    });
    near.send(&[]).unwrap();
    echoing.join().unwrap();
    group.finish();
}

fn engine(c: &mut Criterion) {
    if !Uid::effective().is_root() {
        println!("engine: skipped: it makes network namespaces and TUN devices, which needs root");
        return;
    }
    let fast = Options {
        workers: None,
        offload: true,
        tun: TunMode::Auto,
        io: IoMode::Mmsg,
        pin: false,
        busy_poll: Duration::ZERO,
    };
    measure(c, "mmsg", fast);
    measure(c, "without offload", Options { offload: false, ..fast });
    measure(
        c,
        "plain, tun-tap",
        Options {
            offload: false,
            tun: TunMode::Plain,
            ..fast
        },
    );
}

criterion_group!(benches, engine);
criterion_main!(benches);
