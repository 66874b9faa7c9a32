//! How a worker's packets move between it and the kernel: one interface, several ways.
//!
//! | file | way |
//! | --- | --- |
//! | [`mmsg`] | one system call for each packet of the device and for each batch of datagrams; sleeps in `ppoll` |
//! | [`uring`] | io_uring: one call waits and brings packets and datagrams, one call writes a batch to the device |
//! | [`memory`] | none: queues of bytes, for tests and fuzzing |
//!
//! An [`Io`] is made of parts, one for each direction and side, so that a worker can hold on to what one part has brought
//! while it hands it to another.

pub mod memory;
pub mod mmsg;
mod turns;
pub mod uring;

use std::{
    fmt,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use super::flows::{Class, Moves};
use crate::{
    offload::{Malformed, VirtioNetHdr},
    sys::{
        tun::TunQueue,
        udp::{Message, Received},
    },
};

/// The ways to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Way {
    /// [`mmsg`].
    #[default]
    Mmsg,
    /// [`mod@uring`].
    Uring,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mmsg => "mmsg",
            Self::Uring => "uring",
        })
    }
}

/// One worker's way to the kernel: TUN queues, UDP sockets, and a bell that others ring.
pub trait Io {
    /// Packets from the device.
    type Packets: PacketSource;
    /// Datagrams to peers.
    type Peers: DatagramSink;
    /// Datagrams from peers.
    type Datagrams: DatagramSource;
    /// Packets to the device.
    type Device: PacketSink;
    /// ICMP errors to this host and its containers.
    type Local: LocalSink;

    /// Waits until something is new, at most for `limit` (`None`: for ever).
    ///
    /// Readiness is told once: a side counts as ready from then until its source says `WouldBlock`. Batches end here: what
    /// they have brought is spent.
    ///
    /// # Errors
    /// When it can never be waited for again.
    fn wait(&mut self, limit: Option<Duration>) -> io::Result<Ready>;

    /// Takes nothing more from the kernel, from now on; what has been taken already, and has to be given out before this goes.
    /// There is no waiting after it. Only a way that takes things before it is asked for them has any.
    ///
    /// # Errors
    /// When the kernel cannot be told; what has been taken may still come out.
    fn leave(&mut self) -> io::Result<Ready> {
        Ok(Ready::default())
    }

    /// All parts at once.
    #[expect(
        clippy::type_complexity,
        reason = "the one place where all of them are named together"
    )]
    fn parts(&mut self) -> Parts<'_, Self::Packets, Self::Peers, Self::Datagrams, Self::Device, Self::Local>;
}

/// Wakes a worker that waits, from any thread.
pub type Bell = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// A worker's queues of the device, one or two.
#[derive(Debug, Clone)]
pub struct Queues(Vec<Arc<TunQueue>>);

impl Queues {
    /// One queue, and one for sparse flows alone if the device has so many.
    pub fn new(queue: Arc<TunQueue>, sparse: Option<Arc<TunQueue>>) -> Self {
        Self([Some(queue), sparse].into_iter().flatten().collect())
    }

    /// Where among [`all`](Self::all) the flows of a class have their place.
    #[inline]
    pub fn index(&self, class: Class) -> usize {
        match class {
            Class::Bulk => 0,
            Class::Sparse => self.0.len() - 1,
        }
    }

    /// Where the queue is that this packet is to be written to. Its flow is only looked up if there is a choice.
    #[inline]
    fn index_for<'bytes>(&self, packet: &impl InParts<'bytes>) -> usize {
        if self.0.len() > 1 {
            self.index(packet.class())
        } else {
            0
        }
    }

    /// All of them.
    #[inline]
    pub fn all(&self) -> &[Arc<TunQueue>] {
        &self.0
    }
}

/// What has become ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ready {
    /// There are packets of the device.
    pub packets: bool,
    /// There are datagrams.
    pub datagrams: bool,
    /// The bell was rung.
    pub bell: bool,
}

/// The parts of an [`Io`].
#[derive(Debug)]
pub struct Parts<'a, P, S, D, W, L> {
    /// Packets from the device.
    pub packets: &'a mut P,
    /// Datagrams to peers.
    pub peers: &'a mut S,
    /// Datagrams from peers.
    pub datagrams: &'a mut D,
    /// Packets to the device.
    pub device: &'a mut W,
    /// ICMP errors to this host.
    pub local: &'a mut L,
}

/// A packet that the device handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// What came in front of it.
    pub header: Result<VirtioNetHdr, Malformed>,
    /// Where it is in the arena.
    pub bytes: Range<usize>,
    /// The class whose queue it came by, either if there is only one.
    pub from: Class,
}

/// Packets from the device, in batches.
pub trait PacketSource {
    /// Starts a batch: the packets of the last one are spent. With `sparse_first`, what lies in the queue for sparse flows now, up
    /// to what a queue holds, comes before anything of the other one; a source with one queue, or in no certain order, has no use
    /// for that.
    fn start(&mut self, sparse_first: bool);

    /// The next packet, of at most 64 KiB. It stays in the arena until the next batch.
    ///
    /// # Errors
    /// `WouldBlock`: none is waiting. `EBADFD`: the device is gone.
    fn next(&mut self) -> io::Result<Packet>;

    /// The last packet is spent already: its space may be used again.
    fn forget(&mut self);

    /// How flows can be moved between the queues after this batch.
    fn moves(&self) -> Moves {
        Moves::Both
    }

    /// What the batch's packets lie in.
    fn arena(&mut self) -> &mut [u8];
}

/// Datagrams to peers.
pub trait DatagramSink {
    /// Sends `messages`, at most [`crate::sys::udp::BATCH`] of them, from source port number `source`; how many were taken,
    /// at least one unless there are none. Their bytes are the next of `slices`, each in its turn.
    ///
    /// # Errors
    /// Why the *first* was not taken. An error of a later one shows when it is the first.
    fn send<'bytes>(
        &mut self,
        source: u8,
        messages: &[Message],
        slices: impl Iterator<Item = &'bytes [u8]>,
    ) -> io::Result<usize>;

    /// Sends one datagram from the tunnel's own port.
    ///
    /// # Errors
    /// As `sendto(2)`.
    fn send_one(&mut self, datagram: &[u8], to: SocketAddr) -> io::Result<()>;

    /// Waits until source port number `source` takes datagrams again, at most for `limit`.
    fn wait_writable(&self, source: u8, limit: Duration);
}

/// Datagrams from peers, in batches.
pub trait DatagramSource {
    /// Receives a batch of at most `most` messages, in place of the last one; how many came.
    ///
    /// # Errors
    /// `WouldBlock`: none is waiting. Others are about earlier datagrams, and the next call is clean.
    fn recv(&mut self, most: usize) -> io::Result<usize>;

    /// Message `index` of the batch.
    fn message(&self, index: usize) -> Received;

    /// What the batch's messages lie in.
    fn arena(&mut self) -> &mut [u8];
}

/// A packet in parts, one behind another.
pub trait InParts<'bytes> {
    /// The parts, at most 1,024.
    fn parts(&self) -> impl Iterator<Item = &'bytes [u8]> + Clone;

    /// The class of its flow.
    fn class(&self) -> Class;
}

/// Packets to the device.
pub trait PacketSink {
    /// Whether a virtio header must stand in front of each packet.
    fn has_headers(&self) -> bool;

    /// Hands packets over in order and gives each back to `outcome` with how that went. Each begins with the virtio header
    /// where there must be one, and goes by the queue for its class.
    ///
    /// The errors are those of [`TunQueue::send`](crate::sys::tun::TunQueue::send).
    fn write<'bytes, P: InParts<'bytes>>(
        &mut self,
        packets: impl Iterator<Item = P>,
        outcome: impl FnMut(P, io::Result<()>),
    );
}

/// ICMP errors to this host and its containers.
pub trait LocalSink {
    /// Sends a whole IP packet as one that this host has made.
    ///
    /// # Errors
    /// As [`RawSender::send`](crate::sys::raw::RawSender::send).
    fn send(&mut self, packet: &[u8], to: IpAddr) -> io::Result<()>;
}

/// The parts of one packet, gathered for a vectored write.
struct Gather<'bytes, const N: usize> {
    parts: [IoSlice<'bytes>; N],
    count: usize,
}

impl<'bytes, const N: usize> Gather<'bytes, N> {
    /// The first `N` of `parts`.
    fn of(parts: impl Iterator<Item = &'bytes [u8]>) -> Self {
        let mut gathered = Self {
            parts: [IoSlice::new(&[]); N],
            count: 0,
        };
        for (slot, part) in gathered.parts.iter_mut().zip(parts) {
            *slot = IoSlice::new(part);
            gathered.count += 1;
        }
        gathered
    }

    fn parts(&self) -> &[IoSlice<'bytes>] {
        &self.parts[..self.count]
    }
}
