//! What multishot requests have brought: one request for each file, a completion for each packet, until the kernel ends it.

use std::{
    collections::VecDeque,
    io,
    mem::{self, offset_of},
    net::IpAddr,
    ops::Range,
};

use io_uring::{cqueue, types::RecvMsgOut};

use super::pool::{Pool, SLOTS};
use crate::sys::udp::Received;

/// The fewest buffers to offer: with fewer even the longest packets would come one by one.
const LEAST: usize = 4;

/// How many requests may fill one source: one for each file.
pub(super) const MOST_REQUESTS: usize = 2;

/// What comes with a datagram (io_uring_prep_recvmsg_multishot(3)): a header of 16 bytes, then the sender's address in as
/// many bytes as the longest takes, then control messages, here one that holds a `c_int`.
const OUT: usize = 16;
const NAME: usize = size_of::<libc::sockaddr_in6>();
const CONTROL: usize = 24;
const DATAGRAM_OVERHEAD: usize = OUT + NAME + CONTROL;

pub(super) struct Source {
    pub(super) pool: Pool,
    /// Which of its requests are under way.
    pub(super) armed: [bool; MOST_REQUESTS],
    /// What has come and was not taken, in order: where it is, or the error that has ended a request.
    backlog: VecDeque<io::Result<Filled>>,
    /// Buffers of what was taken, until it is spent.
    taken: Vec<u16>,
    /// How many bytes it should bring at once, and how many buffers that takes.
    target: usize,
    window: usize,
    /// What has come since the window was last adapted.
    bytes: usize,
    count: usize,
}

/// A buffer with something in it.
struct Filled {
    slot: u16,
    bytes: Range<usize>,
    request: usize,
}

impl Source {
    fn new(overhead: usize, target: usize) -> io::Result<Self> {
        Ok(Self {
            pool: Pool::new(overhead)?,
            armed: [false; MOST_REQUESTS],
            backlog: VecDeque::with_capacity(SLOTS + 1),
            taken: Vec::with_capacity(SLOTS),
            target,
            window: SLOTS,
            bytes: 0,
            count: 0,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.backlog.is_empty()
    }

    /// What was taken is spent: offers the kernel as many buffers as can be of use.
    pub(super) fn reuse(&mut self) {
        for slot in self.taken.drain(..) {
            self.pool.free(slot);
        }
        self.pool.offer(self.window.saturating_sub(self.backlog.len()));
    }

    pub(super) fn is_armed(&self) -> bool {
        self.armed.contains(&true)
    }

    /// Whether a request is to be made (again): not without a buffer, for lack of which it would end at once.
    pub(super) fn wants_arming(&self, request: usize) -> bool {
        !self.armed[request] && self.pool.offered() > 0
    }

    /// Takes in a completion of a request.
    pub(super) fn complete(&mut self, request: usize, result: i32, flags: u32) {
        self.armed[request] = cqueue::more(flags);
        match (cqueue::buffer_select(flags), usize::try_from(result)) {
            (Some(slot), Ok(length)) => {
                let bytes = self.pool.filled(slot, length);
                self.bytes += bytes.len();
                self.count += 1;
                self.backlog.push_back(Ok(Filled { slot, bytes, request }));
            }
            // Not from packets or datagrams: a stream's end.
            (None, Ok(_)) => self.backlog.push_back(Err(io::ErrorKind::UnexpectedEof.into())),
            (_, Err(_)) => {
                let errno = -result;
                // No buffer was left, or the kernel could not wait any more: nothing is lost, and the request is made again.
                if !matches!(errno, libc::ENOBUFS | libc::ECANCELED | libc::EINTR | libc::EAGAIN) {
                    self.backlog.push_back(Err(io::Error::from_raw_os_error(errno)));
                }
            }
        }
    }

    /// Chooses the number of buffers by what has come.
    pub(super) fn adapt(&mut self) {
        if let Some(mean) = self.bytes.checked_div(self.count) {
            self.window = (self.target / mean.max(1)).clamp(LEAST, SLOTS);
        }
        (self.bytes, self.count) = (0, 0);
    }

    /// How many buffers are out.
    #[cfg(test)]
    pub(super) fn taken(&self) -> usize {
        self.taken.len()
    }

    #[inline]
    fn take(&mut self) -> Option<io::Result<(Range<usize>, usize)>> {
        Some(self.backlog.pop_front()?.map(|filled| {
            self.taken.push(filled.slot);
            (filled.bytes, filled.request)
        }))
    }
}

/// Packets that have come from TUN queues.
pub struct Packets {
    pub(super) source: Source,
    header_len: usize,
}

impl Packets {
    pub(super) fn new(header_len: usize, target: usize) -> io::Result<Self> {
        Ok(Self {
            source: Source::new(header_len, target)?,
            header_len,
        })
    }

    /// How many bytes come in front of each packet.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Where the next one is in the arena, with what comes in front of it, and from which queue it is.
    ///
    /// # Errors
    /// `WouldBlock`: no more have come. Others as `read(2)`; `EBADFD`: the device is gone.
    #[inline]
    pub fn recv(&mut self) -> io::Result<(Range<usize>, usize)> {
        self.source.take().unwrap_or(Err(io::ErrorKind::WouldBlock.into()))
    }

    /// What all packets lie in.
    pub fn arena(&mut self) -> &mut [u8] {
        self.source.pool.bytes()
    }
}

/// Datagrams that have come on a UDP socket.
pub struct Datagrams {
    pub(super) source: Source,
    /// Tells the kernel how much room to leave for an address and control messages. It is read while a request is made.
    header: Box<libc::msghdr>,
    batch: Vec<Received>,
}

impl Datagrams {
    pub(super) fn new(target: usize) -> io::Result<Self> {
        // SAFETY: a message header is plain data, for which zeros are valid.
        let mut header: Box<libc::msghdr> = Box::new(unsafe { mem::zeroed() });
        header.msg_namelen = NAME as libc::socklen_t;
        header.msg_controllen = CONTROL as _;
        Ok(Self {
            source: Source::new(DATAGRAM_OVERHEAD, target)?,
            header,
            batch: Vec::with_capacity(SLOTS),
        })
    }

    pub(super) fn message_header(&self) -> *const libc::msghdr {
        &raw const *self.header
    }

    /// Makes a batch of the next messages, at most `most`, in place of the last batch; how many there are.
    ///
    /// # Errors
    /// `WouldBlock`: no more have come. Others as `recvmsg(2)`.
    pub fn recv(&mut self, most: usize) -> io::Result<usize> {
        self.batch.clear();
        // An error ends the batch in front of it.
        while self.batch.len() < most
            && (self.batch.is_empty() || matches!(self.source.backlog.front(), Some(Ok(_))))
            && let Some(arrival) = self.source.take()
        {
            let message = self.parse(arrival?.0);
            self.batch.push(message);
        }
        if self.batch.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(self.batch.len())
    }

    /// Message `index` of the batch.
    ///
    /// # Panics
    /// When there is none.
    #[inline]
    pub fn message(&self, index: usize) -> Received {
        self.batch[index].clone()
    }

    /// What all messages lie in.
    pub fn arena(&mut self) -> &mut [u8] {
        self.source.pool.bytes()
    }

    /// Takes apart what the kernel has written. Without a sender that is known, a message is from the unspecified address.
    fn parse(&mut self, filled: Range<usize>) -> Received {
        let end = filled.end;
        let written = &self.source.pool.bytes()[filled.clone()];
        let start = (filled.start + DATAGRAM_OVERHEAD).min(end);
        let (from, segment) = match RecvMsgOut::parse(written, &self.header) {
            Ok(message) => (sender(message.name_data()), gro_segment(message.control_data())),
            Err(()) => (None, None),
        };
        Received {
            bytes: start..end,
            segment: segment.unwrap_or(end - start),
            from: from.unwrap_or(IpAddr::from([0; 4])),
        }
    }
}

/// The IP address in a `sockaddr_in` or `sockaddr_in6`.
fn sender(name: &[u8]) -> Option<IpAddr> {
    match libc::c_int::from(libc::sa_family_t::from_ne_bytes(field(name, 0)?)) {
        libc::AF_INET => Some(field::<4>(name, offset_of!(libc::sockaddr_in, sin_addr))?.into()),
        libc::AF_INET6 => Some(field::<16>(name, offset_of!(libc::sockaddr_in6, sin6_addr))?.into()),
        _ => None,
    }
}

/// What GRO says, if it is that which the first control message says: the length of each datagram.
fn gro_segment(control: &[u8]) -> Option<usize> {
    let level = libc::c_int::from_ne_bytes(field(control, offset_of!(libc::cmsghdr, cmsg_level))?);
    let kind = libc::c_int::from_ne_bytes(field(control, offset_of!(libc::cmsghdr, cmsg_type))?);
    if (level, kind) != (libc::SOL_UDP, libc::UDP_GRO) {
        return None;
    }
    let size = libc::c_int::from_ne_bytes(field(control, size_of::<libc::cmsghdr>())?);
    usize::try_from(size).ok().filter(|size| *size > 0)
}

/// `N` bytes from `at` on.
fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
