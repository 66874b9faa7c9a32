//! The end of a wire in the test's own hands: whole IP packets go into a host's kernel and come out of it, one at a time.

use super::inside;
use flannel::lab::Namespace;
use ipnet::IpNet;
use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use std::{
    io::{self, ErrorKind},
    os::fd::{AsRawFd, RawFd},
    time::{Duration, Instant},
};
use tun_tap::{Iface, Mode};

/// Room for the longest IP packet.
pub(crate) const LONGEST: usize = 65_535;

/// Something that takes and gives whole IP packets.
pub(crate) trait End {
    /// Sends one packet, or what is to be taken for one.
    fn send(&self, packet: &[u8]);

    /// The next packet, if one comes within `limit`.
    fn recv(&self, limit: Duration) -> Option<Vec<u8>>;
}

/// A TUN device without any offload on a host: the kernel cuts superpackets and finishes checksums before it hands them over.
/// It goes when it is dropped.
pub(crate) struct Wire {
    device: Iface,
}

impl Wire {
    /// A device in `ns` that packets for `nets` are routed to.
    pub(crate) fn open(ns: &Namespace, mtu: u32, nets: &[IpNet]) -> Wire {
        let device = inside(ns, || Iface::without_packet_info("wire%d", Mode::Tun)).unwrap();
        device.set_non_blocking().unwrap();
        let name = device.name();
        ns.ip(&format!("link set {name} mtu {mtu} up")).unwrap();
        for net in nets {
            let family = if net.addr().is_ipv4() { "-4" } else { "-6" };
            ns.ip(&format!("{family} route add {net} dev {name}")).unwrap();
        }
        Wire { device }
    }

    /// The device's name.
    pub(crate) fn name(&self) -> &str {
        self.device.name()
    }

    /// Hands over one packet. An error is that the device is down or gone.
    pub(crate) fn try_send(&self, packet: &[u8]) -> io::Result<()> {
        self.device.send(packet).map(drop)
    }

    /// Reads the next packet into `buffer`; its length. `WouldBlock`: none is waiting.
    pub(crate) fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.device.recv(buffer)
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl End for Wire {
    fn send(&self, packet: &[u8]) {
        self.try_send(packet).unwrap();
    }

    fn recv(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; LONGEST];
        let length = recv_within(limit, self, || self.try_recv(&mut buffer))?;
        buffer.truncate(length);
        Some(buffer)
    }
}

/// What `recv`, which does not block, brings from `source` within `limit`.
pub(crate) fn recv_within<T>(
    limit: Duration,
    source: &impl AsRawFd,
    mut recv: impl FnMut() -> io::Result<T>,
) -> Option<T> {
    let deadline = Instant::now() + limit;
    let mut poll = None;
    loop {
        match recv() {
            Ok(received) => return Some(received),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("cannot receive: {error}"),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        // Made only when it is needed. What was there before it was registered is reported too.
        let (poll, events) = poll.get_or_insert_with(|| {
            let poll = Poll::new().unwrap();
            let registry = poll.registry();
            registry
                .register(&mut SourceFd(&source.as_raw_fd()), Token(0), Interest::READABLE)
                .unwrap();
            (poll, Events::with_capacity(1))
        });
        match poll.poll(events, Some(left)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => panic!("cannot wait: {error}"),
            _ => {}
        }
    }
}
