//! Raw sockets: whole IP packets sent by this host as if it had made them.
//!
//! An ICMP error about a packet that came out of the TUN device must not be written back into it: its source address is the
//! host's own, and the kernel drops an arriving packet with such a source as a martian (unless `accept_local` is set).
//! Sent from here it leaves, or is delivered locally, like the kernel's own ICMP errors.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use socket2::{Domain, Protocol, Socket, Type};

/// Sends whole IP packets, IPv4 and IPv6. Non-blocking.
#[derive(Debug)]
pub struct RawSender {
    v4: Socket,
    /// `None` where the kernel has no IPv6.
    v6: Option<Socket>,
}

impl RawSender {
    /// # Errors
    /// `EPERM` without `CAP_NET_RAW`.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            v4: open(Domain::IPV4)?,
            v6: open(Domain::IPV6).ok(),
        })
    }

    /// Sends `packet`, a whole IP packet whose destination address is `destination`.
    ///
    /// # Errors
    /// As `sendto(2)`: `ENETUNREACH`, `EPERM` (a firewall), `EAGAIN`; `EAFNOSUPPORT` for IPv6 where there is none.
    pub fn send(&self, packet: &[u8], destination: IpAddr) -> io::Result<()> {
        let socket = match (destination, &self.v6) {
            (IpAddr::V4(_), _) => &self.v4,
            (IpAddr::V6(_), Some(v6)) => v6,
            (IpAddr::V6(_), None) => return Err(io::Error::from_raw_os_error(libc::EAFNOSUPPORT)),
        };
        socket
            .send_to(packet, &SocketAddr::new(destination, 0).into())
            .map(drop)
    }
}

/// `IPPROTO_RAW` means that packets come with their IP header (raw(7); the same for IPv6 since Linux 4.5).
fn open(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
