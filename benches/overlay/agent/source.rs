//! Sends datagrams, at a steady rate or as fast as it can.

use super::{Offer, SINK_PORT, Sent};
use nix::{
    errno::Errno,
    sys::{
        prctl,
        socket::{ControlMessage, MsgFlags, MultiHeaders, sendmmsg, setsockopt, sockopt},
    },
};
use std::{
    io::{self, IoSlice},
    net::UdpSocket,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

/// Datagrams given to one call, with one flow and with several: enough to spread its cost, and short against the queue of
/// a TUN device (500 packets), which a burst must not fill by itself.
const BATCH: usize = 32;
const BATCH_OF_SEVERAL: usize = 16;

/// How long to wait when no datagram is due: at 300,000 a second, a dozen are then.
const PAUSE: Duration = Duration::from_micros(40);

/// How late the kernel may wake this thread, ns; by default 50 µs.
const TIMER_SLACK: u64 = 1_000;

/// What the socket may hold, bytes: the kernel's accounting of short datagrams in a queue must not slow down the sender.
const SEND_BUFFER: usize = 4 << 20;

/// Sends what `offer` says; how much that was.
pub(super) fn send(offer: &Offer) -> io::Result<Sent> {
    prctl::set_timerslack(TIMER_SLACK)?;
    let sockets = (0..offer.flows.max(1))
        .map(|_| open(offer))
        .collect::<io::Result<Vec<_>>>()?;
    let mut payload = vec![0; offer.size];
    let run = offer.run.to_le_bytes();
    payload
        .get_mut(..run.len())
        .ok_or_else(|| io::Error::other("a datagram must have room for the number of its run"))?
        .copy_from_slice(&run);
    let mut headers = MultiHeaders::<()>::preallocate(BATCH, None);
    let batch = if sockets.len() > 1 { BATCH_OF_SEVERAL } else { BATCH };
    let mut turn = sockets.iter().cycle();
    let (start, mut sent) = (Instant::now(), 0);
    loop {
        let elapsed = start.elapsed().as_secs_f64();
        if elapsed >= offer.seconds {
            return Ok(Sent {
                datagrams: sent,
                seconds: elapsed,
            });
        }
        let due = offer
            .rate
            .map_or(u64::MAX, |rate| ((elapsed * rate) as u64).saturating_sub(sent));
        // No larger than the batch.
        let count = due.min(batch as u64) as usize;
        match turn.next() {
            Some(socket) if count > 0 => sent += send_batch(socket, &mut headers, &payload, count)?,
            _ => thread::sleep(PAUSE),
        }
    }
}

/// A socket of its own, and so a port of its own, for each flow; connected, which spares the kernel a route lookup for each
/// datagram.
fn open(offer: &Offer) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((offer.from, 0))?;
    setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER)?;
    socket.connect((offer.to, SINK_PORT))?;
    Ok(socket)
}

/// Sends `payload` `count` times with one call; how often the kernel took it.
fn send_batch(socket: &UdpSocket, headers: &mut MultiHeaders<()>, payload: &[u8], count: usize) -> io::Result<u64> {
    let slices = [[IoSlice::new(payload)]; BATCH];
    let connected = [None::<()>; BATCH];
    let nothing: [ControlMessage<'_>; 0] = [];
    let flags = MsgFlags::empty();
    match sendmmsg(socket.as_raw_fd(), headers, &slices[..count], connected, nothing, flags) {
        Ok(sent) => Ok(sent.count() as u64),
        // A full queue on the way: lost there, as it may be, and not a reason to stop.
        Err(Errno::ENOBUFS | Errno::EAGAIN | Errno::EINTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}
