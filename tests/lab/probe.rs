//! Round trips of small datagrams between two containers, one after the other: how long packets take while something happens.

use super::{inside, traffic::new_port};
use flannel::lab::Container;
use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long an answer is waited for.
const LIMIT: Duration = Duration::from_secs(1);

/// How often there is a round trip.
const INTERVAL: Duration = Duration::from_millis(2);

/// Round trips under way.
pub(crate) struct Probe {
    stop: Arc<AtomicBool>,
    prober: JoinHandle<Times>,
    echo: JoinHandle<()>,
}

/// What came of them.
#[derive(Debug, Default)]
pub(crate) struct Times {
    /// In ascending order.
    sorted: Vec<Duration>,
    /// Datagrams without an answer.
    pub(crate) lost: usize,
}

impl Times {
    /// How many were answered.
    pub(crate) fn count(&self) -> usize {
        self.sorted.len()
    }

    /// Adds those of another time.
    pub(crate) fn add(&mut self, others: Times) {
        self.sorted.extend(others.sorted);
        self.sorted.sort_unstable();
        self.lost += others.lost;
    }

    /// The time within which this share of them, from 0 to 1, were answered.
    pub(crate) fn quantile(&self, share: f64) -> Duration {
        let last = self.sorted.len().saturating_sub(1);
        self.sorted[(last as f64 * share).round() as usize]
    }
}

impl Probe {
    /// Starts them from one container to the other.
    pub(crate) fn start(from: &Container, to: &Container) -> Probe {
        let port = new_port();
        let answering = inside(&to.ns, || UdpSocket::bind((to.ip, port))).unwrap();
        let asking = inside(&from.ns, || UdpSocket::bind((from.ip, port))).unwrap();
        asking.connect((to.ip, port)).unwrap();
        asking.set_read_timeout(Some(LIMIT)).unwrap();
        answering.set_read_timeout(Some(LIMIT)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stop_asking, stop_answering) = (Arc::clone(&stop), Arc::clone(&stop));
        let prober = thread::spawn(move || {
            let mut times = Times::default();
            for number in 0_u64.. {
                if stop_asking.load(Ordering::Relaxed) {
                    break;
                }
                let sent = Instant::now();
                match round_trip(&asking, number) {
                    true => times.sorted.push(sent.elapsed()),
                    false => times.lost += 1,
                }
                thread::sleep((sent + INTERVAL).saturating_duration_since(Instant::now()));
            }
            times.sorted.sort_unstable();
            times
        });
        let echo = thread::spawn(move || {
            let mut number = [0; 8];
            while !stop_answering.load(Ordering::Relaxed) {
                // An error is that nothing came for a while.
                if let Ok((_, from)) = answering.recv_from(&mut number) {
                    let _ = answering.send_to(&number, from);
                }
            }
        });
        Probe { stop, prober, echo }
    }

    /// Ends them.
    pub(crate) fn finish(self) -> Times {
        self.stop.store(true, Ordering::Relaxed);
        let times = self.prober.join().unwrap();
        self.echo.join().unwrap();
        times
    }
}

/// Whether the answer to this number came; late answers to others are passed over.
fn round_trip(socket: &UdpSocket, number: u64) -> bool {
    // An error is an ICMP answer to an earlier one: this one is lost then.
    if socket.send(&number.to_be_bytes()).is_err() {
        return false;
    }
    let mut answer = [0; 8];
    while socket.recv(&mut answer).is_ok() {
        if u64::from_be_bytes(answer) == number {
            return true;
        }
    }
    false
}
