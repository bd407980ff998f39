//! Memory that a disk reads or fills by itself, and the io_uring that asks it to.
//!
//! The only file of the swap with `unsafe` code; it knows no requests and no checksums. What makes it sound:
//! a buffer is given away to a [`Cutter`], which cuts it into slices that do not overlap; every slice keeps the
//! buffer alive, and the buffer comes back only when no slice is left; a slice whose transfer the kernel has begun
//! stays in its ring until the kernel has said that it is done, also when the ring is dropped.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use windlass_tensor::Category;
use windlass_tensor::kernels::memory::{Buffer, Memory, PAGE};

use super::file::DiskFile;
use super::queue::{Direction, Piece, Queue};
use super::sums::BLOCK;

/// A buffer in transit. Its memory is only reached through slices.
struct Transit {
    buffer: Buffer,
    start: *mut u8,
    len: usize,
}

// SAFETY: `start` points into the block that `buffer` owns, wherever the buffer moves; a buffer may change threads.
unsafe impl Send for Transit {}
// SAFETY: a shared `Transit` offers nothing; slices of it do not overlap.
unsafe impl Sync for Transit {}

/// Cuts a buffer into slices, from front to back.
pub(super) struct Cutter {
    transit: Arc<Transit>,
    cut: usize,
}

impl Cutter {
    /// Takes `buffer` until [`Cutter::finish`].
    pub(super) fn new(mut buffer: Buffer) -> Self {
        let block = buffer.block_mut();
        let (start, len) = (block.as_mut_ptr(), block.len());
        Cutter {
            transit: Arc::new(Transit { buffer, start, len }),
            cut: 0,
        }
    }

    /// The next `len` bytes, which may pass the end of the block.
    ///
    /// Where the block ends early, or is too short to lie on a page boundary, memory from `scratch` stands in.
    pub(super) fn cut(&mut self, len: usize, direction: Direction, scratch: &Memory) -> Slice {
        let from = self.cut.min(self.transit.len);
        let held = len.min(self.transit.len - from);
        // SAFETY: `from` is at most the block's length.
        let start = unsafe { self.transit.start.add(from) };
        self.cut += len;
        let whole = held == len && (start as usize).is_multiple_of(PAGE);
        let mut slice = Slice {
            _owner: self.transit.clone(),
            start,
            held,
            len,
            stand_in: None,
        };
        if !whole {
            let mut block = scratch.alloc(len, Category::Workspace);
            if direction == Direction::Write {
                block.block_mut()[..held].copy_from_slice(slice.held());
                block.block_mut()[held..len].fill(0);
            }
            slice.stand_in = Some(block);
        }
        slice
    }

    /// The buffer, if no slice of it is left.
    pub(super) fn finish(self) -> Option<Buffer> {
        Arc::into_inner(self.transit).map(|transit| transit.buffer)
    }
}

/// A part of a buffer in transit that no other slice touches.
pub(super) struct Slice {
    _owner: Arc<Transit>,
    start: *mut u8,
    held: usize,
    len: usize,
    stand_in: Option<Buffer>,
}

// SAFETY: a slice has its part of the buffer for itself and keeps the buffer alive.
unsafe impl Send for Slice {}

impl Slice {
    fn held(&self) -> &[u8] {
        // SAFETY: `held` bytes from `start` lie in the block, are initialized, and belong to this slice.
        unsafe { std::slice::from_raw_parts(self.start, self.held) }
    }

    fn held_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `held`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.held) }
    }

    /// What is written, or was read.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.stand_in {
            Some(block) => &block.block()[..self.len],
            None => self.held(),
        }
    }

    /// Where to read to.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        if self.stand_in.is_none() {
            return self.held_mut();
        }
        let block = self.stand_in.as_mut().expect("checked above");
        &mut block.block_mut()[..len]
    }

    /// Brings what was read to where it belongs.
    pub(super) fn settle(&mut self) {
        if let Some(block) = self.stand_in.take() {
            let held = self.held;
            self.held_mut().copy_from_slice(&block.block()[..held]);
        }
    }
}

/// A piece that the kernel is done with, and how it went.
pub(super) type Moved = (Piece, rustix::io::Result<()>);

/// The mark of the event that tells of new requests, among the indices of slots.
const WAKE: u64 = u64::MAX;

/// An io_uring with at most `depth` transfers of one file under way.
pub(super) struct Ring {
    uring: IoUring,
    file: Arc<DiskFile>,
    /// Transfers under way, by the number that the kernel hands back.
    slots: Vec<Option<Piece>>,
    free: Vec<usize>,
    /// Slots whose transfers began since [`Ring::record_new`].
    new: Vec<usize>,
    wake_armed: bool,
}

impl Ring {
    /// A ring for transfers of `file`.
    ///
    /// # Errors
    /// The system's, when it has no io_uring or forbids it.
    pub(super) fn new(file: Arc<DiskFile>, depth: usize) -> io::Result<Self> {
        let entries = (depth as u32 + 1).next_power_of_two();
        // The first form spares interrupts of this thread; kernels before 6.0 know only the second.
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| IoUring::new(entries))?;
        Ok(Ring {
            uring,
            file,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            new: Vec::new(),
            wake_armed: false,
        })
    }

    /// Transfers under way.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether another transfer may begin.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Begins the transfer of a piece at the next [`Ring::submit`].
    pub(super) fn push(&mut self, piece: Piece) {
        let slot = self.free.pop().expect("a free slot");
        self.slots[slot] = Some(piece);
        self.new.push(slot);
        self.push_slot(slot);
    }

    fn push_slot(&mut self, slot: usize) {
        let piece = self.slots[slot].as_mut().expect("a piece in the slot");
        let (at, moved) = (piece.at + piece.moved as u64, piece.moved);
        let slice = piece.slice.as_mut().expect("the slice of a live piece");
        let fd = types::Fd(self.file.as_fd().as_raw_fd());
        let len = (slice.len - moved) as u32;
        let entry = match piece.direction {
            Direction::Write => {
                { opcode::Write::new(fd, slice.bytes()[moved..].as_ptr(), len).offset(at) }.build()
            }
            Direction::Read => {
                { opcode::Read::new(fd, slice.bytes_mut()[moved..].as_mut_ptr(), len).offset(at) }
                    .build()
            }
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the memory belongs to the slice in `slots[slot]`, which leaves it when the kernel is done (`reap`,
        // `drop`); the file is open as long as the ring. There is an entry for every slot and the wake event.
        unsafe { self.uring.submission().push(&entry) }.expect("an entry for every slot");
    }

    /// Tells the kernel of new transfers; with `wait`, sleeps until one is done or `queue` has something new.
    pub(super) fn submit(&mut self, queue: &Queue, index: usize, wait: bool) -> io::Result<()> {
        if !self.wake_armed {
            let fd = types::Fd(queue.wake(index).as_raw_fd());
            let poll = opcode::PollAdd::new(fd, rustix::event::PollFlags::IN.bits().into());
            let entry = poll.build().user_data(WAKE);
            // SAFETY: the entry refers to no memory.
            unsafe { self.uring.submission().push(&entry) }.expect("an entry for the event");
            self.wake_armed = true;
        }
        loop {
            match self.uring.submit_and_wait(usize::from(wait)) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory for the moment: what is under way will free some.
                Err(e) if is_passing(&e) && (wait || self.in_flight() > 0) => {
                    std::thread::yield_now();
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Remembers the checksums of what began to be written since the last call.
    pub(super) fn record_new(&mut self) {
        for slot in self.new.drain(..) {
            if let Some(piece) = &self.slots[slot] {
                piece.record();
            }
        }
    }

    /// Moves transfers that are done to `done`; those done in part go on with the rest. Says whether `queue` told
    /// of something new.
    pub(super) fn reap(&mut self, queue: &Queue, index: usize, done: &mut Vec<Moved>) -> bool {
        let mut woken = false;
        let mut again = Vec::new();
        for entry in self.uring.completion() {
            if entry.user_data() == WAKE {
                // Nothing to read is an event that another look has already answered.
                let _ = rustix::io::read(queue.wake(index), &mut [0u8; 8]);
                self.wake_armed = false;
                woken = true;
                continue;
            }
            let slot = entry.user_data() as usize;
            let mut piece = self.slots[slot].take().expect("a piece in the slot");
            match advance(piece.moved, piece.len(), answer(entry.result())) {
                Advance::Rest(moved) => {
                    piece.moved = moved;
                    self.slots[slot] = Some(piece);
                    again.push(slot);
                }
                Advance::Done(result) => {
                    self.free.push(slot);
                    done.push((piece, result));
                }
            }
        }
        for slot in again {
            self.push_slot(slot);
        }
        woken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut patience = 0;
        while self.in_flight() > 0 && patience < 1000 {
            if let Err(e) = self.uring.submit_and_wait(1)
                && e.kind() != io::ErrorKind::Interrupted
            {
                patience += 1;
                std::thread::yield_now();
            }
            for entry in self.uring.completion() {
                if entry.user_data() != WAKE {
                    let slot = entry.user_data() as usize;
                    self.slots[slot] = None;
                    self.free.push(slot);
                }
            }
        }
        // The kernel may still use memory that it did not give back: it is lost rather than used twice.
        for mut piece in self.slots.iter_mut().filter_map(Option::take) {
            std::mem::forget(piece.slice.take());
        }
    }
}

fn is_passing(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::ResourceBusy
    )
}

fn answer(result: i32) -> rustix::io::Result<usize> {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result))
}

/// How a transfer goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Advance {
    /// It is over.
    Done(rustix::io::Result<()>),
    /// So many bytes are moved; the rest is asked for again.
    Rest(usize),
}

/// What follows from the system's `answer` to a transfer of the bytes from `moved` to `len`.
///
/// A direct transfer cannot go on in the middle of a block: the last, broken one is moved again. An answer without
/// progress is an error, also at the end of the file, which is never shorter than its regions.
pub(super) fn advance(moved: usize, len: usize, answer: rustix::io::Result<usize>) -> Advance {
    match answer {
        Ok(n) if moved + n >= len => Advance::Done(Ok(())),
        Ok(n) if n >= BLOCK => Advance::Rest(moved + n / BLOCK * BLOCK),
        Ok(_) => Advance::Done(Err(Errno::IO)),
        Err(Errno::INTR | Errno::AGAIN) => Advance::Rest(moved),
        Err(e) => Advance::Done(Err(e)),
    }
}
