//! The way that every kernel has: `read` and `writev` on the device, `recvmmsg` and `sendmmsg` on the sockets, and `ppoll` to sleep.
//!
//! Not epoll for device and sockets: it listens to them all the time, and so the kernel would call it for each packet that a
//! socket has sent and that is freed, to say that there is room again. That was 4 % of the processor's time with one stream of TCP.
//! The bell is mio's: it is hardly ever rung.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::Arc,
    time::Duration,
};

use mio::{Events, Poll, Token, Waker};

use crate::{
    offload::{VirtioNetHdr, coalesce::MAX_MERGED},
    sys::{
        poll::wait_readable,
        raw::RawSender,
        udp::{self, Message, Received, RecvBatch, SendBatch},
    },
};

use super::{
    Bell, DatagramSink, DatagramSource, Gather, InParts, Io, LocalSink, Packet, PacketSink, PacketSource, Parts,
    Queues, Ready, turns::Turns,
};
use crate::engine::{
    egress::FLUSH_BYTES,
    flows::{Class, Moves},
};

const BELL: Token = Token(0);

/// The longest that one read brings: a virtio header and the longest IP packet.
const MAX_READ: usize = VirtioNetHdr::LEN + 65_535;

/// Where the first packet of a batch lies: a cache line in, so that there is room for its virtio header.
const FIRST: usize = 64;

/// What a batch may grow to before it is sent, and a read more.
const BUFFER_BYTES: usize = FIRST + FLUSH_BYTES + MAX_READ;

/// The parts in a write: the virtio header with the headers of a merged packet, and a payload for each packet in it.
const WRITE_PARTS: usize = 1 + MAX_MERGED;

/// See the module.
pub struct Mmsg {
    bell: Poll,
    rung: Events,
    packets: Packets,
    peers: Peers,
    datagrams: Datagrams,
    device: Device,
    local: RawSender,
}

impl Mmsg {
    /// For a worker's queues and sockets: the tunnel's own, which receives, and behind it those that packets leave from by the
    /// number of their source port from 1 on. The bell with it.
    ///
    /// # Errors
    /// When the system gives no poller or no raw socket; `InvalidInput` without a socket.
    pub fn new(queues: Queues, sockets: Arc<[UdpSocket]>) -> io::Result<(Self, Bell)> {
        if sockets.is_empty() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bell = Poll::new()?;
        let waker = Waker::new(bell.registry(), BELL)?;
        let mmsg = Self {
            bell,
            rung: Events::with_capacity(1),
            packets: Packets::new(queues.clone()),
            peers: Peers::new(Arc::clone(&sockets)),
            datagrams: Datagrams {
                sockets,
                batch: RecvBatch::new(),
            },
            device: Device::new(queues),
            local: RawSender::new()?,
        };
        Ok((mmsg, Box::new(move || waker.wake())))
    }
}

impl Io for Mmsg {
    type Packets = Packets;
    type Peers = Peers;
    type Datagrams = Datagrams;
    type Device = Device;
    type Local = RawSender;

    fn wait(&mut self, limit: Option<Duration>) -> io::Result<Ready> {
        // Twice the same, if there is only one.
        let [bulk, sparse] = [Class::Bulk, Class::Sparse].map(|class| self.packets.queues.index(class));
        let queues = self.packets.queues.all();
        let files = [
            queues[bulk].as_raw_fd(),
            queues[sparse].as_raw_fd(),
            self.datagrams.sockets[0].as_raw_fd(),
            self.bell.as_raw_fd(),
        ];
        let [in_bulk, in_sparse, datagrams, bell] = wait_readable(files, limit)?;
        if in_sparse {
            self.packets.turns.wake(Class::Sparse);
        }
        if in_bulk && bulk != sparse {
            self.packets.turns.wake(Class::Bulk);
        }
        if bell {
            self.bell.poll(&mut self.rung, Some(Duration::ZERO))?;
        }
        Ok(Ready {
            packets: in_bulk || in_sparse,
            datagrams,
            bell,
        })
    }

    fn parts(&mut self) -> Parts<'_, Packets, Peers, Datagrams, Device, RawSender> {
        Parts {
            packets: &mut self.packets,
            peers: &mut self.peers,
            datagrams: &mut self.datagrams,
            device: &mut self.device,
            local: &mut self.local,
        }
    }
}

/// Packets one behind another in one buffer, so that equal ones are one slice of a segmented message.
pub struct Packets {
    queues: Queues,
    turns: Turns,
    buffer: Box<[u8]>,
    /// Where the last packet begins, and where the next one will.
    last: usize,
    next: usize,
}

impl Packets {
    fn new(queues: Queues) -> Self {
        Self {
            turns: Turns::new(queues.all().len() > 1),
            queues,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            last: FIRST,
            next: FIRST,
        }
    }

    /// A virtio header comes in front of its packet, where the last packet ends. That one's bytes are put back, so that
    /// packets lie without a gap.
    #[inline]
    fn read(&mut self, from: Class) -> io::Result<Packet> {
        let queue = &self.queues.all()[self.queues.index(from)];
        let at = self.next;
        let (header, length) = if queue.has_headers() {
            let space = &mut self.buffer[at - VirtioNetHdr::LEN..][..MAX_READ];
            let mut saved = [0; VirtioNetHdr::LEN];
            saved.copy_from_slice(&space[..VirtioNetHdr::LEN]);
            let read = queue.recv(space);
            let header = VirtioNetHdr::parse(space);
            space[..VirtioNetHdr::LEN].copy_from_slice(&saved);
            (header, read?.saturating_sub(VirtioNetHdr::LEN))
        } else {
            let space = &mut self.buffer[at..][..MAX_READ - VirtioNetHdr::LEN];
            (Ok(VirtioNetHdr::default()), queue.recv(space)?)
        };
        (self.last, self.next) = (at, at + length);
        Ok(Packet {
            header,
            bytes: at..self.next,
            from,
        })
    }
}

impl PacketSource for Packets {
    fn start(&mut self, sparse_first: bool) {
        (self.last, self.next) = (FIRST, FIRST);
        self.turns.start(sparse_first);
    }

    #[inline]
    fn next(&mut self) -> io::Result<Packet> {
        while let Some(class) = self.turns.next() {
            match self.read(class) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.turns.emptied(class),
                Err(error) => return Err(error),
                Ok(packet) => {
                    self.turns.read(class);
                    return Ok(packet);
                }
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    #[inline]
    fn forget(&mut self) {
        self.next = self.last;
    }

    fn moves(&self) -> Moves {
        self.turns.moves()
    }

    fn arena(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// Datagrams to peers, from several sockets where flows have several source ports.
pub struct Peers {
    sockets: Arc<[UdpSocket]>,
    batch: SendBatch,
}

impl Peers {
    pub(super) fn new(sockets: Arc<[UdpSocket]>) -> Self {
        Self {
            sockets,
            batch: SendBatch::new(),
        }
    }
}

impl DatagramSink for Peers {
    fn send<'bytes>(
        &mut self,
        source: u8,
        messages: &[Message],
        slices: impl Iterator<Item = &'bytes [u8]>,
    ) -> io::Result<usize> {
        self.batch.send(&self.sockets[usize::from(source)], messages, slices)
    }

    fn send_one(&mut self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.sockets[0].send_to(datagram, to).map(drop)
    }

    fn wait_writable(&self, source: u8, limit: Duration) {
        udp::wait_writable(&self.sockets[usize::from(source)], limit);
    }
}

/// Datagrams from peers.
pub struct Datagrams {
    sockets: Arc<[UdpSocket]>,
    batch: RecvBatch,
}

impl DatagramSource for Datagrams {
    fn recv(&mut self, most: usize) -> io::Result<usize> {
        self.batch.recv(&self.sockets[0], most)
    }

    #[inline]
    fn message(&self, index: usize) -> Received {
        self.batch.message(index)
    }

    fn arena(&mut self) -> &mut [u8] {
        self.batch.arena()
    }
}

/// Packets to the device, one call each.
pub struct Device(Queues);

impl Device {
    pub(super) fn new(queues: Queues) -> Self {
        Self(queues)
    }

    #[inline]
    pub(super) fn write_one<'bytes>(&self, packet: &impl InParts<'bytes>) -> io::Result<()> {
        let queue = &self.0.all()[self.0.index_for(packet)];
        let mut parts = packet.parts();
        let all = parts.clone();
        // A packet as it stands is by far the most frequent, and the long list of parts takes its time.
        let few = Gather::<2>::of(&mut parts);
        match parts.next() {
            None => queue.send_parts(few.parts()),
            Some(_) => queue.send_parts(Gather::<WRITE_PARTS>::of(all).parts()),
        }
    }
}

impl PacketSink for Device {
    fn has_headers(&self) -> bool {
        self.0.all()[0].has_headers()
    }

    fn write<'bytes, P: InParts<'bytes>>(
        &mut self,
        packets: impl Iterator<Item = P>,
        mut outcome: impl FnMut(P, io::Result<()>),
    ) {
        for packet in packets {
            let result = self.write_one(&packet);
            outcome(packet, result);
        }
    }
}

impl LocalSink for RawSender {
    fn send(&mut self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        RawSender::send(self, packet, to)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::sys::tun::TunQueue;

    /// A queue and its far end.
    fn queue() -> (Arc<TunQueue>, File) {
        // Of these as many wait as there is memory for.
        let kind = SockType::SeqPacket;
        let (near, far) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap();
        (Arc::new(File::from(near).into()), far.into())
    }

    /// What a batch holds.
    fn batch(packets: &mut Packets) -> String {
        packets.start(false);
        let mut names = String::new();
        loop {
            match packets.next() {
                Ok(packet) => names.push(char::from(packets.arena()[packet.bytes][0])),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return names;
                }
            }
        }
    }

    #[test]
    fn a_batch_begins_with_packets_of_sparse_flows() {
        let ((bulk, from_bulk), (sparse, from_sparse)) = (queue(), queue());
        let mut packets = Packets::new(Queues::new(bulk, Some(sparse)));
        let send = |bulk, sparse| {
            (0..bulk).for_each(|_| assert_eq!((&from_bulk).write(b"b").unwrap(), 1));
            (0..sparse).for_each(|_| assert_eq!((&from_sparse).write(b"s").unwrap(), 1));
        };
        send(3, 2);
        assert_eq!(batch(&mut packets), "ssbbb");
        // It is told anew when there are more.
        send(1, 1);
        assert_eq!(batch(&mut packets), "");
        packets.turns.wake(Class::Bulk);
        assert_eq!(batch(&mut packets), "b");
        packets.turns.wake(Class::Sparse);
        assert_eq!(batch(&mut packets), "s");
        send(1, 1);
        packets.turns.wake(Class::Bulk);
        packets.turns.wake(Class::Sparse);
        assert_eq!(batch(&mut packets), "sb");
    }

    #[test]
    fn a_device_with_one_queue_has_it_for_all_flows() {
        let (only, far) = queue();
        let mut packets = Packets::new(Queues::new(only, None));
        (0..9).for_each(|_| assert_eq!((&far).write(b"x").unwrap(), 1));
        assert_eq!(batch(&mut packets), "x".repeat(9));
    }
}
