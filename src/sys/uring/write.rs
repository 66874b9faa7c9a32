//! Many packets handed to a device in one call, by whichever of its queues.

use std::{io, marker::PhantomData, os::fd::AsRawFd, process};

use io_uring::{IoUring, opcode, types::Fd};

use super::{enable, passing, set_up};

/// Packets in one call. 64 spreads the cost of the call to some 10 ns each; more only makes the first wait for the last.
pub const MOST_WRITES: usize = 64;

/// Writes packets to several `Q`. Stays in the thread that has made it.
pub struct Writer<Q: AsRawFd> {
    uring: IoUring,
    queues: Vec<Q>,
    /// Parts of all packets of a batch, and for each where to and how many it has.
    parts: Vec<libc::iovec>,
    packets: Vec<(Fd, usize)>,
    results: [i32; MOST_WRITES],
}

impl<Q: AsRawFd> Writer<Q> {
    /// For TUN queues.
    ///
    /// # Errors
    /// What the kernel says when it refuses; [`probe`](super::probe()) finds words for it.
    pub fn new(queues: Vec<Q>) -> io::Result<Self> {
        let uring = set_up(MOST_WRITES as u32, 2 * MOST_WRITES as u32)?;
        enable(&uring, &[opcode::Writev::CODE])?;
        Ok(Self {
            uring,
            queues,
            parts: Vec::new(),
            packets: Vec::with_capacity(MOST_WRITES),
            results: [0; MOST_WRITES],
        })
    }

    /// An empty batch.
    pub fn batch<'bytes>(&mut self) -> WriteBatch<'_, 'bytes, Q> {
        self.parts.clear();
        self.packets.clear();
        WriteBatch {
            queues: &self.queues,
            uring: &mut self.uring,
            parts: &mut self.parts,
            packets: &mut self.packets,
            results: &mut self.results,
            bytes: PhantomData,
        }
    }
}

/// Packets that are going to be written together.
pub struct WriteBatch<'writer, 'bytes, Q> {
    queues: &'writer [Q],
    uring: &'writer mut IoUring,
    parts: &'writer mut Vec<libc::iovec>,
    packets: &'writer mut Vec<(Fd, usize)>,
    results: &'writer mut [i32; MOST_WRITES],
    /// The packets are borrowed until they are written.
    bytes: PhantomData<&'bytes [u8]>,
}

impl<'writer, 'bytes, Q: AsRawFd> WriteBatch<'writer, 'bytes, Q> {
    /// Adds a packet for one of the queues in parts, at most 1,024. A batch takes [`MOST_WRITES`].
    ///
    /// # Panics
    /// When it is full, or there is no such queue.
    pub fn add(&mut self, queue: usize, parts: impl Iterator<Item = &'bytes [u8]>) {
        assert!(
            self.packets.len() < MOST_WRITES,
            "a batch of {MOST_WRITES} packets is full"
        );
        let before = self.parts.len();
        self.parts.extend(parts.map(|part| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        }));
        let descriptor = Fd(self.queues[queue].as_raw_fd());
        self.packets.push((descriptor, self.parts.len() - before));
    }

    /// Writes all packets, in order; how that went with each.
    ///
    /// The errors are those of `writev(2)` on a file that does not block.
    pub fn write(self) -> impl Iterator<Item = io::Result<()>> + use<'writer, Q> {
        let mut rest = &self.parts[..];
        let mut queue = self.uring.submission();
        for (number, (descriptor, count)) in self.packets.iter().enumerate() {
            let (parts, after) = rest.split_at(*count);
            rest = after;
            let write = opcode::Writev::new(*descriptor, parts.as_ptr(), *count as u32)
                // A device that takes no more says so, as with writev(2); otherwise the kernel would wait for it.
                .rw_flags(libc::RWF_NOWAIT)
                .build()
                .user_data(number as u64);
            // SAFETY: the kernel reads the list of parts, in a vector that is not touched before the requests have completed,
            // and the bytes that they point at, which are borrowed for 'bytes, longer than this call: it returns only after
            // every request has completed.
            let pushed = unsafe { queue.push(&write) };
            assert!(pushed.is_ok(), "the ring has room for a batch and was empty");
        }
        drop(queue);
        let mut pending = self.packets.len();
        while pending > 0 {
            if let Err(error) = passing(self.uring.submit_and_wait(pending)) {
                // A ring of this thread that is set up has no such error (io_uring_enter(2)). The kernel may be reading packets
                // that their owners are about to change: there is no way to go on, and none to unwind.
                eprintln!("io_uring fails in the midst of a write: {error}");
                process::abort();
            }
            for completion in self.uring.completion() {
                self.results[completion.user_data() as usize] = completion.result();
                pending -= 1;
            }
        }
        self.results[..self.packets.len()].iter().map(|&result| match result {
            0.. => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        })
    }
}
