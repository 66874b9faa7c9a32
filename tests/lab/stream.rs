//! Numbered UDP datagrams from one container to another, to see what is lost while something happens.

use super::inside;
use flannel::lab::Container;
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};
use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Any port will do in a container of its own.
const PORT: u16 = 7000;

/// What the receiver's kernel may hold, so that a receiver that waits for a processor loses nothing: some 5,000 datagrams by the
/// kernel's accounting.
const BUFFER_BYTES: usize = 4 << 20;

/// When nothing has come for this long after the sender's end, nothing is under way any more.
const QUIET: Duration = Duration::from_millis(300);

/// A stream under way.
#[derive(Debug)]
pub(crate) struct Stream {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    arrived: Arc<AtomicU64>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Arrivals>,
}

/// What came of a stream.
#[derive(Debug)]
pub(crate) struct Report {
    /// Datagrams handed to the sender's kernel, numbered from 0.
    pub(crate) sent: u64,
    /// The numbers that did not arrive, in order.
    pub(crate) lost: Vec<u64>,
    /// Datagrams that arrived a second time.
    pub(crate) duplicates: u64,
    /// Datagrams that arrived after a later one.
    pub(crate) reordered: u64,
    /// The longest time between two arrivals.
    pub(crate) longest_silence: Duration,
}

#[derive(Debug, Default)]
struct Arrivals {
    numbers: BTreeSet<u64>,
    duplicates: u64,
    reordered: u64,
    longest_silence: Duration,
}

impl Stream {
    /// Sends a datagram each `interval` from one container to another, until [`Stream::finish`].
    pub(crate) fn start(from: &Container, to: &Container, interval: Duration) -> Stream {
        Stream::start_long(from, to, interval, size_of::<u64>())
    }

    /// As [`Stream::start`], with datagrams of `length` bytes, of which all but the first eight are zeroes.
    pub(crate) fn start_long(from: &Container, to: &Container, interval: Duration, length: usize) -> Stream {
        let receiving = inside(&to.ns, || UdpSocket::bind((to.ip, PORT))).unwrap();
        receiving.set_read_timeout(Some(QUIET)).unwrap();
        setsockopt(&receiving, RcvBufForce, &BUFFER_BYTES).unwrap();
        let sending = inside(&from.ns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        let (sent_so_far, arrived) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let (counting_sent, counting_arrived) = (Arc::clone(&sent_so_far), Arc::clone(&arrived));
        let stop = Arc::new(AtomicBool::new(false));
        let (target, stop_sending, stop_receiving) = ((to.ip, PORT), Arc::clone(&stop), Arc::clone(&stop));
        let sender = thread::spawn(move || {
            let (start, mut sent) = (Instant::now(), 0_u64);
            let mut datagram = vec![0; length];
            while !stop_sending.load(Ordering::Relaxed) {
                // An error is one that came back by ICMP for an earlier datagram, or no route: this one is lost.
                datagram[..size_of::<u64>()].copy_from_slice(&sent.to_be_bytes());
                let _ = sending.send_to(&datagram, target);
                sent += 1;
                counting_sent.store(sent, Ordering::Relaxed);
                // By the clock, so that a late wake-up does not slow the stream down.
                let due = start + interval.mul_f64(sent as f64);
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            sent
        });
        let receiver = thread::spawn(move || receive(&receiving, &stop_receiving, &counting_arrived));
        Stream {
            stop,
            sent: sent_so_far,
            arrived,
            sender,
            receiver,
        }
    }

    /// How many datagrams have been sent so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The number behind the latest that has arrived so far.
    pub(crate) fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Ends the stream and waits for what is under way.
    pub(crate) fn finish(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let Arrivals {
            numbers,
            duplicates,
            reordered,
            longest_silence,
        } = self.receiver.join().unwrap();
        let lost = (0..sent).filter(|number| !numbers.contains(number)).collect();
        Report {
            sent,
            lost,
            duplicates,
            reordered,
            longest_silence,
        }
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, arrived: &AtomicU64) -> Arrivals {
    let mut arrivals = Arrivals::default();
    let mut last: Option<Instant> = None;
    loop {
        let mut number = [0; 8];
        match socket.recv(&mut number) {
            Ok(_) => {
                let (number, now) = (u64::from_be_bytes(number), Instant::now());
                arrived.fetch_max(number + 1, Ordering::Relaxed);
                if let Some(last) = last.replace(now) {
                    arrivals.longest_silence = arrivals.longest_silence.max(now - last);
                }
                arrivals.reordered += u64::from(arrivals.numbers.last().is_some_and(|&latest| latest > number));
                arrivals.duplicates += u64::from(!arrivals.numbers.insert(number));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if stop.load(Ordering::Relaxed) {
                    return arrivals;
                }
            }
            Err(error) => panic!("cannot receive: {error}"),
        }
    }
}
