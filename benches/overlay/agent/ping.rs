//! Ping-pong over UDP, one datagram at a time.

use super::super::statistics::percentile;
use super::{ECHO_PORT, Pinged, Pings};
use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

/// A datagram without an answer for so long is lost.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// A run without any answer goes on beyond its time until so many pings are lost: beside a load that fills all queues the
/// first few may be.
const GIVE_UP: usize = 10;

/// Longer than any datagram of the benchmark.
const DATAGRAM: usize = 2048;

/// Sends back what comes to `address`, in a thread of its own, until the process ends.
pub(super) fn start_echo(address: (Ipv4Addr, u16)) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    thread::Builder::new().name("echo".to_owned()).spawn(move || {
        let mut buffer = [0; DATAGRAM];
        loop {
            // An error is an ICMP answer to an earlier datagram, whose sender has gone: no reason to stop.
            if let Ok((len, sender)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..len], sender);
            }
        }
    })?;
    Ok(())
}

/// Plays for as long as `pings` says.
pub(super) fn ping(pings: &Pings) -> io::Result<Pinged> {
    let socket = UdpSocket::bind((pings.from, 0))?;
    socket.connect((pings.to, ECHO_PORT))?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut times = Vec::new();
    let mut lost = 0;
    let start = Instant::now();
    for number in 0_u64.. {
        let is_over = start.elapsed().as_secs_f64() >= pings.seconds;
        if is_over && (!times.is_empty() || lost >= GIVE_UP) {
            break;
        }
        match round_trip(&socket, number, pings.size) {
            // No round trip takes 500 years.
            Ok(time) => times.push(time.as_nanos() as u64),
            Err(_) => lost += 1,
        }
    }
    times.sort_unstable();
    let micros = |share| percentile(&times, share).map(|nanos| nanos as f64 / 1_000.0);
    Ok(Pinged {
        answers: times.len(),
        lost,
        p50: micros(0.5),
        p99: micros(0.99),
    })
}

/// The time until datagram `number` has come back.
fn round_trip(socket: &UdpSocket, number: u64, size: usize) -> io::Result<Duration> {
    let mut datagram = [0; DATAGRAM];
    let number = number.to_le_bytes();
    datagram[..number.len()].copy_from_slice(&number);
    let start = Instant::now();
    socket.send(&datagram[..size.clamp(number.len(), DATAGRAM)])?;
    loop {
        socket.recv(&mut datagram)?;
        // A late answer to an earlier one may come first.
        if datagram.starts_with(&number) {
            return Ok(start.elapsed());
        }
    }
}
