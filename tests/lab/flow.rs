//! Flows between two containers that must outlive whatever happens to the daemons: UDP of which no datagram may be lost, and a
//! TCP connection.

use super::{
    Overlay, PATIENCE, inside,
    stream::{Report, Stream},
    traffic::new_port,
};
use flannel::lab::Container;
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// 1,000 datagrams, and messages over TCP, a second.
pub(crate) const INTERVAL: Duration = Duration::from_millis(1);

/// Both kinds of flow under way.
pub(crate) struct Flows {
    udp: Stream,
    tcp: TcpFlow,
}

impl Flows {
    /// Starts them from one container to the other, which must be reachable.
    pub(crate) fn start(from: &Container, to: &Container) -> Flows {
        Flows::start_for(from, to, PATIENCE)
    }

    /// As [`Flows::start`], with a connection that nothing may pass over for as long as `patience`.
    pub(crate) fn start_for(from: &Container, to: &Container, patience: Duration) -> Flows {
        Flows::start_every(from, to, patience, INTERVAL)
    }

    fn start_every(from: &Container, to: &Container, patience: Duration, interval: Duration) -> Flows {
        Flows {
            udp: Stream::start(from, to, interval),
            tcp: TcpFlow::start(from, to, patience, interval),
        }
    }

    /// The datagrams.
    pub(crate) fn udp(&self) -> &Stream {
        &self.udp
    }

    /// Ends them, and fails the test if the connection did not hold; datagrams may have been lost: what came of them.
    pub(crate) fn finish(self) -> Report {
        let report = self.udp.finish();
        self.tcp.finish();
        report
    }

    /// Ends them, and fails the test if a single datagram was lost or the connection did not hold.
    pub(crate) fn finish_without_loss(self) {
        let report = self.finish();
        assert_eq!(report.lost, [0; 0], "of {} datagrams", report.sent);
        // For whoever wants to know how much that was.
        println!("lost none of {} datagrams", report.sent);
    }
}

/// Flows between the first two containers of an overlay, in both directions.
pub(crate) struct BothWays([Flows; 2]);

/// What came of them.
#[derive(Debug)]
pub(crate) struct Lost {
    /// Datagrams that did not arrive, in each direction.
    pub(crate) each_way: [usize; 2],
    /// Datagrams sent, in both.
    pub(crate) sent: u64,
}

impl BothWays {
    /// Starts them, with as many datagrams and messages as [`Flows::start`].
    pub(crate) fn start(overlay: &Overlay) -> BothWays {
        BothWays::start_every(overlay, INTERVAL)
    }

    /// As [`BothWays::start`], with a datagram and a message each `interval`.
    pub(crate) fn start_every(overlay: &Overlay, interval: Duration) -> BothWays {
        let [one, two, ..] = &overlay.containers[..] else {
            unreachable!("two hosts at least")
        };
        BothWays([(one, two), (two, one)].map(|(from, to)| Flows::start_every(from, to, PATIENCE, interval)))
    }

    /// Ends them, and fails the test if the connections did not hold.
    pub(crate) fn finish(self) -> Lost {
        let reports = self.0.map(Flows::finish);
        Lost {
            sent: reports.iter().map(|report| report.sent).sum(),
            each_way: reports.map(|report| report.lost.len()),
        }
    }
}

impl Lost {
    /// In the direction that has lost more.
    pub(crate) fn most(&self) -> usize {
        self.each_way.into_iter().max().unwrap_or_default()
    }
}

/// A TCP connection with a numbered message each interval.
struct TcpFlow {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<u64>,
}

impl TcpFlow {
    fn start(from: &Container, to: &Container, patience: Duration, interval: Duration) -> TcpFlow {
        let address = SocketAddr::from((to.ip, new_port()));
        let listener = inside(&to.ns, || TcpListener::bind(address)).unwrap();
        let mut sending = inside(&from.ns, || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
        let mut receiving = listener.accept().unwrap().0;
        sending.set_nodelay(true).unwrap();
        sending.set_write_timeout(Some(patience)).unwrap();
        receiving.set_read_timeout(Some(patience)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let sender = thread::spawn(move || {
            let (start, mut sent) = (Instant::now(), 0_u64);
            while !stopping.load(Ordering::Relaxed) {
                sending.write_all(&sent.to_be_bytes()).unwrap();
                sent += 1;
                let due = start + interval.mul_f64(sent as f64);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            sent
        });
        let receiver = thread::spawn(move || {
            let mut received = 0_u64;
            let mut message = [0; 8];
            loop {
                match receiving.read_exact(&mut message) {
                    Ok(()) => assert_eq!(u64::from_be_bytes(message), received, "TCP is in order"),
                    // The sender has closed it.
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => return received,
                    Err(error) => panic!("the connection did not hold: {error}"),
                }
                received += 1;
            }
        });
        TcpFlow { stop, sender, receiver }
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        assert_eq!(self.receiver.join().unwrap(), sent, "messages over TCP");
        assert!(sent > 0, "nothing was sent");
    }
}
