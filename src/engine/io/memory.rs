//! No kernel at all: queues of bytes. Tests and fuzzers fill the one end, run a [`Worker`](crate::engine::worker::Worker),
//! and look at the other; what the kernel might refuse can be refused here.

use std::{
    cell::Cell,
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::{
    offload::VirtioNetHdr,
    sys::udp::{Message, Received},
};

use super::{DatagramSink, DatagramSource, InParts, Io, LocalSink, Packet, PacketSink, PacketSource, Parts, Ready};
use crate::engine::flows::{Class, Moves};

/// A worker's surroundings.
#[derive(Debug, Default)]
pub struct Memory {
    /// What the device will hand over.
    pub packets: Packets,
    /// What peers were sent.
    pub peers: Peers,
    /// What peers have sent.
    pub datagrams: Datagrams,
    /// What the device was given.
    pub device: Device,
    /// The ICMP errors that this host was sent.
    pub local: Local,
    /// Whether the bell was rung.
    pub bell: bool,
}

impl Io for Memory {
    type Packets = Packets;
    type Peers = Peers;
    type Datagrams = Datagrams;
    type Device = Device;
    type Local = Local;

    fn wait(&mut self, _limit: Option<Duration>) -> io::Result<Ready> {
        Ok(Ready {
            packets: !self.packets.waiting.is_empty(),
            datagrams: !self.datagrams.waiting.is_empty(),
            bell: std::mem::take(&mut self.bell),
        })
    }

    fn parts(&mut self) -> Parts<'_, Packets, Peers, Datagrams, Device, Local> {
        Parts {
            packets: &mut self.packets,
            peers: &mut self.peers,
            datagrams: &mut self.datagrams,
            device: &mut self.device,
            local: &mut self.local,
        }
    }
}

/// Packets from the device.
#[derive(Debug, Default)]
pub struct Packets {
    /// Each as it is read: with its virtio header if `headers`.
    pub waiting: VecDeque<Vec<u8>>,
    /// Whether the device has virtio headers.
    pub headers: bool,
    /// The class whose queue they come by.
    pub from: Class,
    /// How flows can be moved.
    pub moves: Moves,
    /// Whether the last batch was to begin with what sparse flows have sent.
    pub sparse_first: bool,
    arena: Vec<u8>,
    last: usize,
}

impl PacketSource for Packets {
    fn start(&mut self, sparse_first: bool) {
        self.sparse_first = sparse_first;
        self.arena.clear();
        self.last = 0;
    }

    fn next(&mut self) -> io::Result<Packet> {
        let read = self.waiting.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let (header, packet) = if self.headers {
            let header_len = VirtioNetHdr::LEN.min(read.len());
            (VirtioNetHdr::parse(&read), &read[header_len..])
        } else {
            (Ok(VirtioNetHdr::default()), &read[..])
        };
        self.last = self.arena.len();
        self.arena.extend_from_slice(packet);
        Ok(Packet {
            header,
            bytes: self.last..self.arena.len(),
            from: self.from,
        })
    }

    fn forget(&mut self) {
        self.arena.truncate(self.last);
    }

    fn moves(&self) -> Moves {
        self.moves
    }

    fn arena(&mut self) -> &mut [u8] {
        &mut self.arena
    }
}

/// A datagram that was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The number of the source port.
    pub source: u8,
    /// Where to.
    pub to: SocketAddr,
    /// What it held.
    pub bytes: Vec<u8>,
}

/// Datagrams to peers.
#[derive(Debug, Default)]
pub struct Peers {
    /// What was sent, cut into datagrams, in order.
    pub sent: Vec<Sent>,
    /// How many messages that was.
    pub messages: usize,
    /// The error that segmented messages are refused with.
    pub refuse_segmented: Option<i32>,
    /// The errors that the next sends are refused with, one each.
    pub refuse_next: VecDeque<i32>,
    /// The error that all sends are refused with.
    pub refuse_all: Option<i32>,
    /// How often the sender has waited for room.
    pub waits: Cell<usize>,
}

impl DatagramSink for Peers {
    fn send<'bytes>(
        &mut self,
        source: u8,
        messages: &[Message],
        mut slices: impl Iterator<Item = &'bytes [u8]>,
    ) -> io::Result<usize> {
        if let Some(errno) = self.refuse_next.pop_front().or(self.refuse_all) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        for (index, message) in messages.iter().enumerate() {
            if let (Some(errno), Some(_)) = (self.refuse_segmented, message.segment) {
                // As the kernel does: the error is told when the message is the first.
                return if index == 0 {
                    Err(io::Error::from_raw_os_error(errno))
                } else {
                    Ok(index)
                };
            }
            let bytes = slices.by_ref().take(message.slices).collect::<Vec<_>>().concat();
            let segment = message.segment.map_or(bytes.len(), usize::from).max(1);
            self.sent.extend(bytes.chunks(segment).map(|datagram| Sent {
                source,
                to: message.to,
                bytes: datagram.to_vec(),
            }));
            self.messages += 1;
        }
        Ok(messages.len())
    }

    fn send_one(&mut self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        self.sent.push(Sent {
            source: 0,
            to,
            bytes: datagram.to_vec(),
        });
        Ok(())
    }

    fn wait_writable(&self, _source: u8, _limit: Duration) {
        self.waits.set(self.waits.get() + 1);
    }
}

/// A message that will be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Who sent it.
    pub from: IpAddr,
    /// Length of each of its datagrams but the last; `None`: it is one.
    pub segment: Option<usize>,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// Datagrams from peers.
#[derive(Debug, Default)]
pub struct Datagrams {
    /// What will be received.
    pub waiting: VecDeque<Incoming>,
    arena: Vec<u8>,
    batch: Vec<Received>,
}

impl DatagramSource for Datagrams {
    fn recv(&mut self, most: usize) -> io::Result<usize> {
        self.arena.clear();
        self.batch.clear();
        if self.waiting.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for message in self.waiting.drain(..most.min(self.waiting.len())) {
            let start = self.arena.len();
            self.arena.extend_from_slice(&message.bytes);
            self.batch.push(Received {
                bytes: start..self.arena.len(),
                segment: message.segment.unwrap_or(message.bytes.len()),
                from: message.from,
            });
        }
        Ok(self.batch.len())
    }

    fn message(&self, index: usize) -> Received {
        self.batch[index].clone()
    }

    fn arena(&mut self) -> &mut [u8] {
        &mut self.arena
    }
}

/// Packets to the device.
#[derive(Debug, Default)]
pub struct Device {
    /// Each as it was written: with its virtio header if `headers`.
    pub written: Vec<Vec<u8>>,
    /// The class of each one's flow.
    pub classes: Vec<Class>,
    /// Whether the device has virtio headers.
    pub headers: bool,
    /// The error that superpackets are refused with.
    pub refuse_superpackets: Option<i32>,
}

impl PacketSink for Device {
    fn has_headers(&self) -> bool {
        self.headers
    }

    fn write<'bytes, P: InParts<'bytes>>(
        &mut self,
        packets: impl Iterator<Item = P>,
        mut outcome: impl FnMut(P, io::Result<()>),
    ) {
        for packet in packets {
            let (parts, class): (Vec<&[u8]>, Class) = (packet.parts().collect(), packet.class());
            let refused = self.refuse_superpackets.filter(|_| self.headers && parts.len() > 2);
            outcome(
                packet,
                match refused {
                    Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                    None => {
                        self.written.push(parts.concat());
                        self.classes.push(class);
                        Ok(())
                    }
                },
            );
        }
    }
}

/// ICMP errors to this host.
#[derive(Debug, Default)]
pub struct Local {
    /// Each with its receiver.
    pub sent: Vec<(IpAddr, Vec<u8>)>,
}

impl LocalSink for Local {
    fn send(&mut self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        self.sent.push((to, packet.to_vec()));
        Ok(())
    }
}
