//! io_uring (Linux 6.7): a [`Ring`] that receives for one worker, and a [`Writer`] that writes for it.
//!
//! | file | what |
//! | --- | --- |
//! | `uring.rs` | the [`Ring`]: packets and datagrams come without being asked for one by one, and one call waits for both |
//! | `pool.rs` | the buffers that they come into |
//! | `source.rs` | what has come: [`Packets`] and [`Datagrams`] |
//! | `write.rs` | the [`Writer`]: many packets handed over in one call |
//! | `probe.rs` | whether this kernel has, and lets us have, all of it |
//!
//! # Who writes to the buffers, and when
//! The kernel picks a buffer and fills it when a request runs. With `IORING_SETUP_DEFER_TASKRUN` (Linux 6.1) requests run only
//! inside a system call of this thread that enters the ring: neither in an interrupt, nor at the end of other system calls,
//! nor in a thread of the kernel's, since multishot requests of files that can be polled are not handed to those. The
//! ring enters in [`Ring::wait`], in [`Ring::leave`] and when it is dropped, each of which needs the whole ring for itself, sources and all, so
//! that no slice of a source's memory lives through it.
//!
//! # Files are not registered
//! A multishot request looks its file up once, so that there is nothing to be gained. And there is something to lose: a killed
//! process's rings are taken down by a thread of the kernel's, which closes registered files last. Until then the daemon that is
//! started in its place finds the port taken: for 12 to 21 ms as it is, 36 to 72 ms with registered files (Linux 6.18).

mod pool;
mod probe;
mod source;
mod write;

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use io_uring::{
    EnterFlags, IoUring, cqueue, opcode,
    register::Restriction,
    squeue,
    types::{CancelBuilder, Fd, SubmitArgs, Timespec},
};

pub use probe::{Refused, probe};
pub use source::{Datagrams, Packets};
pub use write::{MOST_WRITES, WriteBatch, Writer};

// What a completion belongs to.
const PACKETS: u64 = 0;
const DATAGRAMS: u64 = 1;
const BELL: u64 = 2;
const MORE_PACKETS: u64 = 3;

/// Those of the packets, each for a queue.
const FROM_QUEUES: [u64; source::MOST_REQUESTS] = [PACKETS, MORE_PACKETS];

/// Requests under way in a receiving ring: those above.
const REQUESTS: u32 = 4;

/// Completions between two looks: one for each buffer of two sources, and the end of each request. With fewer the kernel would
/// end requests for want of room.
const COMPLETIONS: u32 = 4 * pool::SLOTS as u32;

/// What has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// There are packets.
    pub packets: bool,
    /// There are datagrams.
    pub datagrams: bool,
    /// The bell was rung.
    pub bell: bool,
}

/// How much a source should bring at once, in bytes: fewer buffers are offered to the kernel when each holds much.
#[derive(Debug, Clone, Copy)]
pub struct Targets {
    /// Packets.
    pub packets: usize,
    /// Datagrams.
    pub datagrams: usize,
}

/// Receives packets from one `Q` or two, and datagrams from an `S`. Stays in the thread that has made it.
///
/// All are kept open as long as the ring.
pub struct Ring<Q: AsRawFd, S: AsRawFd> {
    uring: IoUring,
    /// Behind `uring`, so that its memory goes after it.
    packets: Packets,
    datagrams: Datagrams,
    /// Which memory the kernel knows, see [`Self::is_whole`].
    memory: [usize; 2],
    queues: Vec<Q>,
    socket: S,
    bell: Arc<File>,
    bell_armed: bool,
    /// Whether waiting may be kept out of the host's time "waiting for disks", where it would alarm people: Linux 6.15.
    no_iowait: bool,
}

impl<Q: AsRawFd, S: AsRawFd> Ring<Q, S> {
    /// For one or two TUN queues, whose packets begin with `header` bytes that are no part of them, and a UDP socket.
    ///
    /// # Errors
    /// What the kernel says when it refuses; [`probe`] finds words for it.
    pub fn new(queues: Vec<Q>, header: usize, socket: S, targets: Targets) -> io::Result<Self> {
        let uring = set_up(REQUESTS, COMPLETIONS)?;
        let packets = Packets::new(header, targets.packets)?;
        let datagrams = Datagrams::new(targets.datagrams)?;
        let memory = [packets.source.pool.address(), datagrams.source.pool.address()];
        let no_iowait = uring.params().is_feature_no_iowait();
        let ring = Self {
            uring,
            packets,
            datagrams,
            memory,
            queues,
            socket,
            bell: Arc::new(event_file()?),
            bell_armed: false,
            no_iowait,
        };
        for (source, group) in [(&ring.packets.source, PACKETS), (&ring.datagrams.source, DATAGRAMS)] {
            source.pool.register(&ring.uring.submitter(), group as u16)?;
        }
        let requests = [
            opcode::ReadMulti::CODE,
            opcode::RecvMsgMulti::CODE,
            opcode::PollAdd::CODE,
        ];
        enable(&ring.uring, &requests)?;
        Ok(ring)
    }

    /// Wakes this ring's [`wait`](Self::wait) from any thread.
    pub fn bell(&self) -> impl Fn() -> io::Result<()> + Send + Sync + 'static {
        let bell = Arc::clone(&self.bell);
        move || (&*bell).write_all(&1u64.to_ne_bytes())
    }

    /// Waits until something has come, at most for `limit` (`None`: for ever). With a limit of zero it costs no system call
    /// unless there is something to do in the kernel.
    ///
    /// What was taken from the sources before is spent: its space is used again.
    ///
    /// # Errors
    /// When the kernel can no longer be asked.
    ///
    /// # Panics
    /// When a source of this ring was exchanged for one of another.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<Arrivals> {
        assert!(self.is_whole(), "a ring's sources are its own");
        for source in [&mut self.packets.source, &mut self.datagrams.source] {
            source.reuse();
        }
        self.arm();
        if self.packets.source.is_empty() && self.datagrams.source.is_empty() && limit != Some(Duration::ZERO) {
            self.sleep(limit)?;
        } else {
            let queue = self.uring.submission();
            let due = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
            drop(queue);
            if due {
                passing(self.uring.submit())?;
            }
        }
        let bell = self.reap();
        Ok(Arrivals {
            packets: !self.packets.source.is_empty(),
            datagrams: !self.datagrams.source.is_empty(),
            bell,
        })
    }

    /// Ends the requests, so that nothing more comes, for good; what has come and was not taken. There is no
    /// [`wait`](Self::wait) after it.
    ///
    /// # Errors
    /// When the kernel does not end them.
    ///
    /// # Panics
    /// As [`wait`](Self::wait).
    pub fn leave(&mut self) -> io::Result<Arrivals> {
        assert!(self.is_whole(), "a ring's sources are its own");
        self.cancel()?;
        Ok(Arrivals {
            packets: !self.packets.source.is_empty(),
            datagrams: !self.datagrams.source.is_empty(),
            bell: false,
        })
    }

    /// Ends the requests. What they have brought until then is kept.
    fn cancel(&mut self) -> io::Result<()> {
        if !self.is_armed() {
            return Ok(());
        }
        self.uring
            .submitter()
            .register_sync_cancel(None, CancelBuilder::any())?;
        // With a request that the kernel has not even seen there would be no end of waiting.
        while self.is_armed() && self.uring.submission().is_empty() {
            passing(self.uring.submit_and_wait(1))?;
            self.reap();
        }
        Ok(())
    }

    /// What has come, to be taken.
    pub fn sources(&mut self) -> (&mut Packets, &mut Datagrams) {
        (&mut self.packets, &mut self.datagrams)
    }

    /// Enters the kernel until a request completes.
    fn sleep(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let timespec = limit.map(Timespec::from);
        let args = SubmitArgs::new();
        let args = match &timespec {
            Some(timespec) => args.timespec(timespec),
            None => args,
        };
        let flags = if self.no_iowait {
            EnterFlags::NO_IOWAIT
        } else {
            EnterFlags::empty()
        };
        passing(self.uring.submitter().submit_with_args_and_flags(1, &args, flags))
    }

    /// Queues the requests that are not under way. A source without a buffer in the kernel's hands has to be emptied first.
    fn arm(&mut self) {
        for (index, name) in FROM_QUEUES.into_iter().enumerate().take(self.queues.len()) {
            if self.packets.source.wants_arming(index) {
                // A length of 0: that of the buffer. A position of 0 is what sockets insist on and devices ignore.
                let read = opcode::ReadMulti::new(Fd(self.queues[index].as_raw_fd()), 0, PACKETS as u16).build();
                self.packets.source.armed[index] = self.push(read.user_data(name));
            }
        }
        if self.datagrams.source.wants_arming(0) {
            let message = self.datagrams.message_header();
            let recv = opcode::RecvMsgMulti::new(Fd(self.socket.as_raw_fd()), message, DATAGRAMS as u16).build();
            self.datagrams.source.armed[0] = self.push(recv.user_data(DATAGRAMS));
        }
        if !self.bell_armed {
            let poll = opcode::PollAdd::new(Fd(self.bell.as_raw_fd()), libc::POLLIN as u32).multi(true);
            self.bell_armed = self.push(poll.build().user_data(BELL));
        }
    }

    /// Queues a request; whether there was room, which there is for one of each kind.
    fn push(&mut self, request: squeue::Entry) -> bool {
        // SAFETY: the requests are those of `arm`. Poll touches no memory. The others fill buffers of their source's pool,
        // and receiving reads `Datagrams`' message header: both have a fixed place in memory that is freed after the ring, and
        // the buffers are written to only where the module's documentation says.
        unsafe { self.uring.submission().push(&request) }.is_ok()
    }

    /// Takes what the kernel has completed; whether the bell is in it.
    fn reap(&mut self) -> bool {
        let mut rung = false;
        for completion in self.uring.completion() {
            let (source, request) = match completion.user_data() {
                PACKETS => (&mut self.packets.source, 0),
                MORE_PACKETS => (&mut self.packets.source, 1),
                DATAGRAMS => (&mut self.datagrams.source, 0),
                _ => {
                    rung = true;
                    self.bell_armed = cqueue::more(completion.flags());
                    continue;
                }
            };
            source.complete(request, completion.result(), completion.flags());
        }
        for source in [&mut self.packets.source, &mut self.datagrams.source] {
            source.adapt();
        }
        rung
    }

    fn is_armed(&self) -> bool {
        self.packets.source.is_armed() || self.datagrams.source.is_armed() || self.bell_armed
    }

    /// Whether no source was exchanged for one of another ring: this ring would write to memory that is borrowed from there.
    fn is_whole(&self) -> bool {
        let there = [&self.packets.source, &self.datagrams.source].map(|source| source.pool.address());
        there == self.memory
    }
}

impl<Q: AsRawFd, S: AsRawFd> Drop for Ring<Q, S> {
    /// Ends the requests, so that neither the files nor the buffers are in the kernel's hands any more.
    fn drop(&mut self) {
        if !self.is_whole() {
            // The ring's end writes nothing: the kernel ends the requests in a thread that does not see this process's memory.
            return;
        }
        // A kernel that does not let us do this does it by itself, when the ring goes.
        let _ = self.cancel();
    }
}

/// A ring for this thread. It takes no requests until it is [enabled](enable).
fn set_up(requests: u32, completions: u32) -> io::Result<IoUring> {
    IoUring::builder()
        // For one thread, which alone lets requests run: see the module. A flag in shared memory tells when there are any.
        .setup_single_issuer()
        .setup_coop_taskrun()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        // A request that is refused at once does not hold up those behind it.
        .setup_submit_all()
        // Until it is told which it may ever be given.
        .setup_r_disabled()
        .setup_cqsize(completions)
        .dontfork()
        .build(requests)
}

/// Lets the ring take requests of these kinds, and no others for as long as it lives: what goes through a ring passes a seccomp
/// filter by, and could be any system call (Linux 5.10).
fn enable(uring: &IoUring, requests: &[u8]) -> io::Result<()> {
    // Cancelling is all that is asked for later on, when the ring is taken down (linux/io_uring.h).
    const SYNC_CANCEL: u8 = 24;
    // Multishot requests take their buffers from a pool: IOSQE_BUFFER_SELECT.
    let mut allowed = vec![
        Restriction::register_op(SYNC_CANCEL),
        Restriction::sqe_flags_allowed(squeue::Flags::BUFFER_SELECT.bits()),
    ];
    allowed.extend(requests.iter().copied().map(Restriction::sqe_op));
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut allowed)?;
    submitter.register_enable_rings()
}

/// Lets the errors pass after which the same is simply tried again: a signal, the end of the time, and a kernel that is short
/// of memory or has completions to hand over first (io_uring_enter(2)).
fn passing(entered: io::Result<usize>) -> io::Result<()> {
    match entered {
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::EINTR | libc::ETIME | libc::EAGAIN | libc::EBUSY)
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

/// A counter that can be polled, and is written to from any thread.
fn event_file() -> io::Result<File> {
    // SAFETY: no memory is involved.
    let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it, so that this is its only owner.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

#[cfg(test)]
mod tests;
