//! Whether a worker can work under its filter on this system: a thread does what workers do, and nothing may be refused.
//!
//! Which system call a function of the C library makes is the library's own choice (`poll` was `ppoll`, on some systems, from one
//! version to the next). A worker whose `sendmmsg` is refused would carry nothing; so it is found out before there is one.

use std::{
    hint::black_box,
    io::{self, IoSlice, Read, Write},
    net::UdpSocket,
    os::fd::AsRawFd,
    thread,
    time::Duration,
};

use mio::{Events, Poll, Token, Waker};

use super::calls;
use crate::sys::{
    capabilities::gain_no_more,
    poll::wait_readable,
    seccomp::{self, Filter},
    udp::{self, Message, RecvBatch, SendBatch},
};

/// More than the allocator takes from what it has: it has to ask the system (the threshold of glibc's is 128 KiB at first, and at
/// most 32 MiB).
const MUCH: usize = 64 << 20;

/// # Errors
/// Why there is no saying, or which call was refused.
pub(super) fn run(filter: &Filter) -> Result<(), String> {
    let filter = filter.clone();
    let tried = thread::Builder::new().name("trial".to_owned()).spawn(move || {
        let outcome = work(&filter);
        (outcome, seccomp::last_refusal())
    });
    let tried = tried.map(|thread| thread.join());
    match tried {
        Ok(Ok((_, Some(refused)))) => Err(format!(
            "this system's libraries make a call that is not on its list ({}): please report this",
            calls::name(refused)
        )),
        Ok(Ok((Err(error), None))) | Err(error) => Err(format!("it cannot be tried out: {error}")),
        Ok(Err(_)) => Err("a worker would panic under it".to_owned()),
        Ok(Ok((Ok(()), None))) => Ok(()),
    }
}

/// What a worker does, with a pipe in the place of the device. Only refusals count, not what comes of it.
fn work(filter: &Filter) -> io::Result<()> {
    let (mut device, mut far) = io::pipe()?;
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    socket.set_nonblocking(true)?;
    let address = socket.local_addr()?;
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(4);
    let waker = Waker::new(poll.registry(), Token(0))?;
    let (mut sending, mut receiving) = (SendBatch::new(), RecvBatch::new());

    // Without it no filter is taken.
    gain_no_more()?;
    filter.install()?;

    let message = Message {
        to: address,
        slices: 1,
        segment: None,
    };
    let mut buffer = [0; 16];
    let packet: &[u8] = b"packet";
    let _ = far.write_vectored(&[IoSlice::new(packet), IoSlice::new(packet)]);
    waker.wake()?;
    wait_readable([device.as_raw_fd(), poll.as_raw_fd()], None)?;
    poll.poll(&mut events, Some(Duration::ZERO))?;
    let _ = device.read(&mut buffer);
    let _ = sending.send(&socket, &[message], std::iter::once(packet));
    let _ = receiving.recv(&socket, 1);
    let _ = socket.send_to(packet, address);
    udp::wait_writable(&socket, Duration::ZERO);
    thread::yield_now();
    // Asked for, given back in part and then wholly, and hardly touched.
    let mut much: Vec<u8> = Vec::new();
    // A system that gives so much to nobody has refused no call.
    if much.try_reserve_exact(MUCH).is_ok() {
        much = black_box(much);
        much.extend_from_slice(packet);
        much.shrink_to(MUCH / 2);
        drop(black_box(much));
    }
    Ok(())
}
