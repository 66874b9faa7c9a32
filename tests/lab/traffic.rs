//! What programs in containers send to one another, looked at byte by byte: TCP streams and bursts of UDP datagrams.

use super::{PATIENCE, inside, wire::LONGEST};
use flannel::lab::Container;
use nix::sys::socket::{
    setsockopt,
    sockopt::{RcvBufForce, UdpGsoSegment},
};
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::Duration,
};

/// Length of what a stream repeats: a prime, so that it divides no segment and lost or doubled bytes show.
const PERIOD: usize = 65_521;

/// A port that no stream or burst of this test program goes to. Each is used once: what another test forks off holds copies
/// of all sockets until its `exec`, also of those that are closed here.
pub(crate) fn new_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(7000);
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    assert!(port < 32_768, "the kernel gives out these ports itself");
    port
}

/// What the receiver of a burst may hold: more than ever comes at once.
const BUFFER_BYTES: usize = 4 << 20;

/// How often a burst is sent again when a part of it is lost, as may happen to any datagram on a busy machine.
const ATTEMPTS: u16 = 10;

/// When nothing has come for this long, what is missing of a burst is taken for lost.
pub(crate) const QUIET: Duration = Duration::from_secs(1);

/// `length` bytes that differ for each `seed`.
pub(crate) fn pattern(length: usize, seed: usize) -> Vec<u8> {
    let byte = |at: usize| ((at + seed) as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0];
    let period: Vec<u8> = (0..PERIOD.min(length)).map(byte).collect();
    let mut bytes = period.repeat(length.div_ceil(PERIOD));
    bytes.truncate(length);
    bytes
}

/// Carries `bytes` over TCP from the first to the second of each pair, all pairs at once, and looks at each byte.
pub(crate) fn transfer(pairs: &[(&Container, &Container)], bytes: usize) {
    thread::scope(|scope| {
        for (number, (from, to)) in pairs.iter().enumerate() {
            let address = SocketAddr::from((to.ip, new_port()));
            let listener = inside(&to.ns, || TcpListener::bind(address)).unwrap();
            let mut sending = inside(&from.ns, || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
            sending.set_write_timeout(Some(PATIENCE)).unwrap();
            scope.spawn(move || {
                sending.write_all(&pattern(bytes, number)).unwrap();
            });
            scope.spawn(move || {
                let mut receiving = listener.accept().unwrap().0;
                receiving.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut received = Vec::new();
                receiving.read_to_end(&mut received).unwrap();
                assert!(
                    received == pattern(bytes, number),
                    "{} to {}: {} of {bytes} bytes arrived, some of them wrong",
                    from.name,
                    to.name,
                    received.len()
                );
            });
        }
    });
}

/// A burst of UDP datagrams that the sender's kernel gets as one message (`UDP_SEGMENT`); a single one may be longer than the MTU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Burst {
    /// Payload of each datagram but the last, in bytes: at least [`Burst::LABEL`].
    pub(crate) segment: usize,
    /// Payload of the last one; not more than the others'.
    pub(crate) last: usize,
    /// How many datagrams: at most 64, all the kernel takes before Linux 6.9.
    pub(crate) count: usize,
}

impl Burst {
    /// The attempt and the datagram's number, in front of each payload.
    pub(crate) const LABEL: usize = 4;

    /// A single datagram.
    pub(crate) fn of_one(length: usize) -> Burst {
        Burst {
            segment: length,
            last: length,
            count: 1,
        }
    }

    /// What the attempt's datagrams hold.
    fn payloads(self, attempt: u16) -> Vec<Vec<u8>> {
        let payload = |index: usize| {
            let length = if index + 1 == self.count {
                self.last
            } else {
                self.segment
            };
            let label = [attempt.to_be_bytes(), (index as u16).to_be_bytes()].concat();
            [label, pattern(length - Self::LABEL, index)].concat()
        };
        (0..self.count).map(payload).collect()
    }

    /// Sends it to `to`, and fails the test unless all payloads arrive as they were sent. `recv` gives the next payload that
    /// has come to that address, if one comes in the time given.
    pub(crate) fn send(self, from: &Container, to: SocketAddr, mut recv: impl FnMut(Duration) -> Option<Vec<u8>>) {
        let socket = inside(&from.ns, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
        if self.count > 1 {
            setsockopt(&socket, UdpGsoSegment, &(self.segment as i32)).unwrap();
        }
        for attempt in 0..ATTEMPTS {
            let mut missing = self.payloads(attempt);
            socket.send_to(&missing.concat(), to).unwrap();
            while !missing.is_empty()
                && let Some(payload) = recv(QUIET)
            {
                if payload[..2] == attempt.to_be_bytes() {
                    let found = missing.iter().position(|expected| *expected == payload);
                    missing.swap_remove(
                        found.unwrap_or_else(|| panic!("{self:?}: not sent, or only once: {payload:02x?}")),
                    );
                }
            }
            if missing.is_empty() {
                return;
            }
        }
        panic!("{self:?} from {} does not arrive whole", from.name);
    }

    /// As [`Burst::send`], to a socket in another container.
    pub(crate) fn exchange(self, from: &Container, to: &Container) {
        let address = SocketAddr::from((to.ip, new_port()));
        let socket = inside(&to.ns, || UdpSocket::bind(address)).unwrap();
        setsockopt(&socket, RcvBufForce, &BUFFER_BYTES).unwrap();
        self.send(from, address, |limit| {
            let mut buffer = vec![0; LONGEST];
            socket.set_read_timeout(Some(limit)).unwrap();
            // An error is that nothing came in time.
            let length = socket.recv(&mut buffer).ok()?;
            buffer.truncate(length);
            Some(buffer)
        });
    }
}
