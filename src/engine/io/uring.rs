//! io_uring (Linux 6.7), where it helps: packets and datagrams are received without being asked for, one system call waits for
//! both, and a batch of writes to the device is one call. Sending stays `sendmmsg(2)`, which is faster than as many requests.

use std::{io, net::UdpSocket, sync::Arc, time::Duration};

use crate::{
    offload::VirtioNetHdr,
    sys::{
        raw::RawSender,
        tun::TunQueue,
        udp::Received,
        uring::{self, MOST_WRITES, Ring, Targets},
    },
};

use super::{
    Bell, DatagramSource, InParts, Io, Packet, PacketSink, PacketSource, Parts, Queues, Ready,
    mmsg::{self, Peers},
};
use crate::engine::{
    egress::FLUSH_BYTES,
    flows::{Class, Moves},
    ingress::BATCH_BYTES,
};

/// See the module. Stays in the thread that has made it.
pub struct Uring {
    ring: Ring<Arc<TunQueue>, UdpSocket>,
    peers: Peers,
    device: Device,
    local: RawSender,
}

impl Uring {
    /// As [`Mmsg::new`](mmsg::Mmsg::new), but in the worker's own thread.
    ///
    /// # Errors
    /// When the system gives no ring or no raw socket; `InvalidInput` without a socket.
    pub fn new(queues: Queues, sockets: Arc<[UdpSocket]>) -> io::Result<(Self, Bell)> {
        let tunnel = sockets.first().ok_or(io::ErrorKind::InvalidInput)?.try_clone()?;
        let header = if queues.all()[0].has_headers() {
            VirtioNetHdr::LEN
        } else {
            0
        };
        let targets = Targets {
            packets: FLUSH_BYTES,
            datagrams: BATCH_BYTES,
        };
        let ring = Ring::new(queues.all().to_vec(), header, tunnel, targets)?;
        let bell = ring.bell();
        let uring = Self {
            ring,
            peers: Peers::new(sockets),
            device: Device {
                writer: uring::Writer::new(queues.all().to_vec())?,
                singly: mmsg::Device::new(queues.clone()),
                queues,
            },
            local: RawSender::new()?,
        };
        Ok((uring, Box::new(bell)))
    }
}

impl Io for Uring {
    type Packets = uring::Packets;
    type Peers = Peers;
    type Datagrams = uring::Datagrams;
    type Device = Device;
    type Local = RawSender;

    fn wait(&mut self, limit: Option<Duration>) -> io::Result<Ready> {
        Ok(ready(self.ring.wait(limit)?))
    }

    fn leave(&mut self) -> io::Result<Ready> {
        Ok(ready(self.ring.leave()?))
    }

    fn parts(&mut self) -> Parts<'_, uring::Packets, Peers, uring::Datagrams, Device, RawSender> {
        let (packets, datagrams) = self.ring.sources();
        Parts {
            packets,
            peers: &mut self.peers,
            datagrams,
            device: &mut self.device,
            local: &mut self.local,
        }
    }
}

fn ready(arrivals: uring::Arrivals) -> Ready {
    Ready {
        packets: arrivals.packets,
        datagrams: arrivals.datagrams,
        bell: arrivals.bell,
    }
}

/// Each packet has a buffer of its own, which goes back to the kernel at the next wait.
impl PacketSource for uring::Packets {
    fn start(&mut self, _sparse_first: bool) {}

    #[inline]
    fn next(&mut self) -> io::Result<Packet> {
        let (read, queue) = self.recv()?;
        // The queue for all, which is the first one, or that for sparse flows.
        let from = if queue == 0 { Class::Bulk } else { Class::Sparse };
        if self.header_len() == 0 {
            return Ok(Packet {
                header: Ok(VirtioNetHdr::default()),
                bytes: read,
                from,
            });
        }
        let header = VirtioNetHdr::parse(&self.arena()[read.clone()]);
        Ok(Packet {
            header,
            bytes: (read.start + VirtioNetHdr::LEN).min(read.end)..read.end,
            from,
        })
    }

    fn forget(&mut self) {}

    fn moves(&self) -> Moves {
        Moves::Never
    }

    fn arena(&mut self) -> &mut [u8] {
        uring::Packets::arena(self)
    }
}

impl DatagramSource for uring::Datagrams {
    fn recv(&mut self, most: usize) -> io::Result<usize> {
        uring::Datagrams::recv(self, most)
    }

    #[inline]
    fn message(&self, index: usize) -> Received {
        uring::Datagrams::message(self, index)
    }

    fn arena(&mut self) -> &mut [u8] {
        uring::Datagrams::arena(self)
    }
}

/// Packets to the device, a batch in a call.
pub struct Device {
    writer: uring::Writer<Arc<TunQueue>>,
    /// For a packet that comes alone, as merged ones mostly do: the ring's bookkeeping saves it nothing.
    singly: mmsg::Device,
    queues: Queues,
}

impl PacketSink for Device {
    fn has_headers(&self) -> bool {
        self.singly.has_headers()
    }

    fn write<'bytes, P: InParts<'bytes>>(
        &mut self,
        packets: impl Iterator<Item = P>,
        mut outcome: impl FnMut(P, io::Result<()>),
    ) {
        let mut packets = packets.peekable();
        while let Some(first) = packets.next() {
            if packets.peek().is_none() {
                let result = self.singly.write_one(&first);
                return outcome(first, result);
            }
            let mut written = [const { None }; MOST_WRITES];
            let mut batch = self.writer.batch();
            let all = std::iter::once(first).chain(packets.by_ref());
            for (slot, packet) in written.iter_mut().zip(all) {
                batch.add(self.queues.index_for(&packet), packet.parts());
                *slot = Some(packet);
            }
            for (packet, result) in written.into_iter().flatten().zip(batch.write()) {
                outcome(packet, result);
            }
        }
    }
}
