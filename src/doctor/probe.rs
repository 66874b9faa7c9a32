//! Asking another host whether it is there: ICMP echo, and a datagram to a port. They block, for no longer than they are told.

use std::{
    io::{self, Read},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    process,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::packet::{IcmpPacket, Ipv4Packet, build, icmp, ipv4};

/// The length of a packet that passes everywhere: every host takes one of 68 bytes (RFC 791).
pub(super) const SMALL: usize = 68;

/// How often a question is put before it counts as unanswered: datagrams get lost.
const TRIES: u32 = 3;

/// How an echo request was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Echo {
    /// After this time.
    Answered(Duration),
    /// Not at all.
    Silent,
    /// The last router, or this host's own kernel, cannot find the host (`EHOSTUNREACH`).
    HostUnreachable,
    /// There is no route (`ENETUNREACH`).
    NetworkUnreachable,
    /// A link on the way, or this host's own, does not take packets of this length (`EMSGSIZE`).
    TooBig,
    /// It could not be sent.
    Failed(String),
}

/// What came back from a UDP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Port {
    /// Nothing: somebody takes datagrams there, or something drops them.
    Silent,
    /// The host says that nobody listens (`ECONNREFUSED`).
    Refused,
    /// Something else.
    Failed(String),
}

/// Sends echo requests of `length` bytes, IP header included, that must not be fragmented.
pub(super) fn echo(to: Ipv4Addr, length: usize, patience: Duration) -> Echo {
    try_echo(to, length, patience).unwrap_or_else(|error| match error.raw_os_error() {
        Some(libc::EHOSTUNREACH) => Echo::HostUnreachable,
        Some(libc::ENETUNREACH) => Echo::NetworkUnreachable,
        Some(libc::EMSGSIZE) => Echo::TooBig,
        _ => Echo::Failed(error.to_string()),
    })
}

fn try_echo(to: Ipv4Addr, length: usize, patience: Duration) -> io::Result<Echo> {
    // Tells our answers from those to others: all of the host's come to each such socket.
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let ident = (process::id() as u16).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));

    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    socket.set_header_included_v4(true)?;
    // Without, the kernel keeps to itself that a host is unreachable (ip(7)).
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    socket.connect(&SocketAddrV4::new(to, 0).into())?;

    let payload = vec![0; length.saturating_sub(ipv4::HEADER_LEN + icmp::HEADER_LEN)];
    let begun = Instant::now();
    let mut buffer = vec![0; length.max(SMALL) + ipv4::HEADER_LEN];
    for number in 0..TRIES {
        // The kernel puts the source in.
        let request = build::Ipv4::new(Ipv4Addr::UNSPECIFIED, to)
            .dont_fragment(true)
            .icmp_echo(ident, number as u16, &payload);
        socket.send(&request)?;
        let until = patience * (number + 1) / TRIES;
        while let Some(left) = until.checked_sub(begun.elapsed()).filter(|left| !left.is_zero()) {
            socket.set_read_timeout(Some(left))?;
            match (&socket).read(&mut buffer) {
                Ok(len) if is_answer(&buffer[..len], to, ident) => return Ok(Echo::Answered(begun.elapsed())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(Echo::Silent)
}

fn is_answer(packet: &[u8], from: Ipv4Addr, ident: u16) -> bool {
    let Ok(packet) = Ipv4Packet::new_checked(packet) else {
        return false;
    };
    let Ok(message) = IcmpPacket::new_checked(packet.payload()) else {
        return false;
    };
    packet.src() == from && message.kind() == icmp::ECHO_REPLY && message.rest() >> 16 == u32::from(ident)
}

/// Sends datagrams of one byte, which no backend takes for a packet.
pub(super) fn port(to: Ipv4Addr, port: u16, patience: Duration) -> Port {
    let ask = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((to, port))?;
        socket.set_read_timeout(Some(patience / TRIES))?;
        for _ in 0..TRIES {
            socket.send(&[0])?;
            match socket.recv(&mut [0; 64]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Whatever it is, somebody is there.
                Ok(_) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    match ask() {
        Ok(()) => Port::Silent,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Port::Refused,
        Err(error) => Port::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_our_own_request_counts() {
        let peer = Ipv4Addr::new(192, 0, 2, 2);
        let reply = |from: Ipv4Addr, ident: u32, kind: u8| {
            build::Ipv4::new(from, [192, 0, 2, 1].into()).icmp(kind, 0, ident << 16 | 5, b"x")
        };
        assert!(is_answer(&reply(peer, 7, icmp::ECHO_REPLY), peer, 7));
        assert!(!is_answer(&reply(peer, 8, icmp::ECHO_REPLY), peer, 7));
        assert!(!is_answer(&reply(peer, 7, icmp::ECHO_REQUEST), peer, 7));
        assert!(!is_answer(&reply([192, 0, 2, 3].into(), 7, icmp::ECHO_REPLY), peer, 7));
        assert!(!is_answer(b"short", peer, 7));
    }

    #[test]
    fn a_port_that_nobody_has_is_told_from_one_that_somebody_has() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        let number = taken.local_addr().unwrap().port();
        let patience = Duration::from_millis(60);
        assert_eq!(port(Ipv4Addr::LOCALHOST, number, patience), Port::Silent);
        drop(taken);
        assert_eq!(port(Ipv4Addr::LOCALHOST, number, patience), Port::Refused);
    }
}
