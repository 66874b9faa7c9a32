//! Buffers that the kernel fills: it takes one for each packet from a queue of those that it was offered (a "provided buffer
//! ring", Linux 5.19).

use std::{
    io,
    ops::Range,
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicU16, Ordering},
};

use io_uring::{Submitter, types::BufRingEntry};

/// Number of buffers, a power of two (the kernel's rule). As many as a batch has messages; 4 MiB of address space, of which
/// only what was filled once is memory.
pub(super) const SLOTS: usize = 64;

/// The longest packet or datagram (16-bit lengths in IPv4 and UDP).
const LONGEST: usize = 65_535;

/// Packets begin at multiples of this, a cache line, whatever is in front of them.
const ALIGNMENT: usize = 64;

/// The distance of two buffers: room for the longest packet, and two cache lines for what comes in front. The odd number of
/// cache lines keeps their first bytes out of one cache set.
const STRIDE: usize = 65_536 + 3 * ALIGNMENT;

/// The most that may come in front of a packet.
const MOST_OVERHEAD: usize = 2 * ALIGNMENT;

pub(super) struct Pool {
    slots: Mapping,
    /// The queue, of [`SLOTS`] entries: shared with the kernel, which only reads it.
    queue: Mapping,
    /// The number of buffers that were ever offered, modulo 2¹⁶: where the next one goes.
    tail: u16,
    /// Where a buffer begins within its slot, and how much may be written there.
    lead: usize,
    length: usize,
    /// What may be offered, the last one back first: it is in the processor's cache.
    free: Vec<u16>,
    /// How many the kernel has.
    offered: usize,
}

impl Pool {
    /// For packets with `overhead` bytes in front.
    pub(super) fn new(overhead: usize) -> io::Result<Self> {
        assert!(overhead <= MOST_OVERHEAD, "{overhead} bytes in front of a packet");
        Ok(Self {
            slots: Mapping::new(SLOTS * STRIDE)?,
            queue: Mapping::new(SLOTS * size_of::<BufRingEntry>())?,
            tail: 0,
            lead: overhead.next_multiple_of(ALIGNMENT) - overhead,
            length: overhead + LONGEST,
            free: (0..SLOTS as u16).rev().collect(),
            offered: 0,
        })
    }

    /// Where the memory is: no two pools have the same.
    pub(super) fn address(&self) -> usize {
        self.slots.start.as_ptr() as usize
    }

    /// Makes the pool known to a ring under the number `group`.
    pub(super) fn register(&self, ring: &Submitter<'_>, group: u16) -> io::Result<()> {
        let address = self.queue.start.as_ptr() as u64;
        // SAFETY: the queue's memory has room for that many entries and begins a page; a `Ring` frees it after the ring itself.
        unsafe { ring.register_buf_ring_with_flags(address, SLOTS as u16, group, 0) }
    }

    /// How many buffers the kernel has.
    pub(super) fn offered(&self) -> usize {
        self.offered
    }

    /// Offers the kernel buffers until it has `count` of them, or all.
    pub(super) fn offer(&mut self, count: usize) {
        while self.offered < count
            && let Some(slot) = self.free.pop()
        {
            self.offered += 1;
            let place = usize::from(self.tail) % SLOTS;
            self.tail = self.tail.wrapping_add(1);
            let start = usize::from(slot) * STRIDE + self.lead;
            // SAFETY: `place` is below the number of entries that the queue has room for, and the buffer lies within its slot, by
            // `MOST_OVERHEAD`. An entry is plain data, for which zeros are valid. The kernel reads entries only while this thread
            // is inside it, and this one not before the tail below says that it is there.
            unsafe {
                let entry = self.queue.start.cast::<BufRingEntry>().add(place).as_mut();
                entry.set_addr(self.slots.start.add(start).as_ptr() as u64);
                entry.set_len(self.length as u32);
                entry.set_bid(slot);
            }
        }
        // SAFETY: the tail is a field of the first entry, for which there is room, aligned as it must be; the memory lives
        // through the store, and nobody else writes to it.
        unsafe {
            let tail = BufRingEntry::tail(self.queue.start.cast().as_ptr()).cast_mut();
            AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
        }
    }

    /// The kernel has filled a buffer with `length` bytes; where they are in [`bytes`](Self::bytes).
    pub(super) fn filled(&mut self, slot: u16, length: usize) -> Range<usize> {
        self.offered -= 1;
        let start = usize::from(slot) * STRIDE + self.lead;
        start..start + length.min(self.length)
    }

    /// A buffer that was filled is free again.
    pub(super) fn free(&mut self, slot: u16) {
        self.free.push(slot);
    }

    /// All buffers.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is that long, initialized (with zeros) and owned by `self`, which is borrowed as long as the slice.
        // The kernel writes to it only while this thread is in a function that has exclusive access to the `Ring` and with it
        // to this pool, see the documentation of `uring`.
        unsafe { slice::from_raw_parts_mut(self.slots.start.as_ptr(), self.slots.length) }
    }
}

/// Zeroed memory of its own, in whole pages.
struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn new(length: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing that is there already.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from a value that is dropped. The kernel no longer uses
        // it, since a `Ring` ends its requests and its ring before it frees its memory.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
