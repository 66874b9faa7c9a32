//! Counts datagrams.

use super::Counted;
use nix::sys::socket::{MsgFlags, MultiHeaders, recvmmsg, setsockopt, sockopt};
use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsRawFd,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Instant,
};

/// Datagrams taken by one call: spreads its cost to some ns each.
const BATCH: usize = 64;

/// Longer than any datagram that the benchmark sends: it stays within the MTU.
const DATAGRAM: usize = 2048;

/// What the socket may hold while this thread waits for its turn: 16 MiB, some 20,000 datagrams by the kernel's accounting
/// (768 bytes for a short one). What is lost is to be lost on the way.
const RECEIVE_BUFFER: usize = 16 << 20;

/// Counts in a thread of its own, until the process ends.
pub(super) struct Sink {
    arrivals: Arc<Mutex<Arrivals>>,
}

/// The datagrams of the newest run.
#[derive(Clone, Copy, Debug, Default)]
struct Arrivals {
    run: u32,
    datagrams: u64,
    /// When the first and the last were taken from the socket.
    span: Option<(Instant, Instant)>,
    /// The counting has come to an end: this error number.
    broken: Option<i32>,
}

impl Arrivals {
    fn add(&mut self, run: u32, at: Instant) {
        if run > self.run {
            *self = Arrivals {
                run,
                ..Arrivals::default()
            };
        }
        if run == self.run {
            self.datagrams += 1;
            self.span = Some((self.span.map_or(at, |(first, _)| first), at));
        }
    }
}

impl Sink {
    /// Begins to count what comes to `address`.
    pub(super) fn start(address: (Ipv4Addr, u16)) -> io::Result<Sink> {
        let socket = UdpSocket::bind(address)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        let arrivals = Arc::default();
        let shared = Arc::clone(&arrivals);
        thread::Builder::new().name("sink".to_owned()).spawn(move || {
            let error = count(&socket, &shared);
            shared.lock().unwrap_or_else(PoisonError::into_inner).broken = Some(error as i32);
        })?;
        Ok(Sink { arrivals })
    }

    /// What has arrived of `run`.
    pub(super) fn counted(&self, run: u32) -> io::Result<Counted> {
        let arrivals = *self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = arrivals.broken {
            return Err(io::Error::from_raw_os_error(error));
        }
        let span = arrivals.span.filter(|_| arrivals.run == run);
        Ok(span.map_or_else(Counted::default, |(first, last)| Counted {
            datagrams: arrivals.datagrams,
            seconds: (last - first).as_secs_f64(),
        }))
    }
}

/// Receives for ever; the error that ended it.
fn count(socket: &UdpSocket, arrivals: &Mutex<Arrivals>) -> nix::errno::Errno {
    let mut buffers = vec![[0; DATAGRAM]; BATCH];
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    loop {
        let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
        // Waits for one datagram, and takes what else is there.
        let flags = MsgFlags::MSG_WAITFORONE;
        match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, flags, None) {
            Ok(received) => {
                let at = Instant::now();
                let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                for datagram in received {
                    let run = datagram.iovs().next().and_then(|bytes| bytes.first_chunk());
                    if let Some(run) = run {
                        arrivals.add(u32::from_le_bytes(*run), at);
                    }
                }
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return error,
        }
    }
}
