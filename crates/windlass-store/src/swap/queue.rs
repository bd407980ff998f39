//! Requests and the pieces they are cut into: who goes next, what is still missing, who waits.
//!
//! Requests run side by side, except that a request waits for earlier ones that touch the same bytes of the file
//! unless both only read: the result is as if they ran in the order in which they were made.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::EventfdFlags;
use windlass_tensor::kernels::memory::{Buffer, Memory};

use super::file::DiskFile;
use super::ring::{Cutter, Slice};
use super::sums::{BLOCK, Sums};
use crate::error::{Error, Result};

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From memory to the disk.
    Write,
    /// From the disk to memory.
    Read,
}

/// Where the bytes lie in the file, and their checksums.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Where the region starts in the file, in bytes.
    pub(super) region: u64,
    /// Where the transfer starts in the region, in bytes; a multiple of [`BLOCK`].
    pub(super) offset: usize,
    /// The region's checksums.
    pub(super) sums: Arc<Sums>,
}

/// Where the result of a request appears.
pub(super) struct Ticket {
    result: Mutex<Option<Result<Buffer>>>,
    done: Condvar,
    waited: Arc<AtomicU64>,
}

impl Ticket {
    /// Whether the result is there.
    pub(super) fn is_done(&self) -> bool {
        lock(&self.result).is_some()
    }

    /// Takes the result, once.
    pub(super) fn wait(&self) -> Result<Buffer> {
        let mut result = lock(&self.result);
        if let Some(done) = result.take() {
            return done;
        }
        let start = Instant::now();
        loop {
            result = self
                .done
                .wait(result)
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(done) = result.take() {
                let nanos = start.elapsed().as_nanos() as u64;
                self.waited.fetch_add(nanos, Ordering::Relaxed);
                return done;
            }
        }
    }

    fn put(&self, result: Result<Buffer>) {
        *lock(&self.result) = Some(result);
        self.done.notify_all();
    }
}

/// A part of a request, at most a block long: what one system call or ring entry moves.
///
/// Dropping a piece tells its request how it went; one that was never completed counts as failed.
pub(super) struct Piece {
    queue: Arc<Queue>,
    request: u64,
    /// Which way.
    pub(super) direction: Direction,
    /// Where in the file, in bytes.
    pub(super) at: u64,
    /// The memory. Only none while the piece is being dropped, or when the kernel never gave it back.
    pub(super) slice: Option<Slice>,
    /// Bytes already moved.
    pub(super) moved: usize,
    place: Place,
    len: usize,
    result: Option<Result<()>>,
}

impl Piece {
    /// Bytes to move in all.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Remembers the checksums of what is being written. A read has nothing to remember.
    pub(super) fn record(&self) {
        if let (Direction::Write, Some(slice)) = (self.direction, &self.slice) {
            self.place
                .sums
                .record(self.place.offset / BLOCK, slice.bytes());
        }
    }

    /// Ends the piece: bytes that were read are verified and handed over.
    pub(super) fn complete(mut self, moved: rustix::io::Result<()>) {
        let path = self.queue.file.path();
        let result = match (moved, self.direction, &mut self.slice) {
            (Err(e), Direction::Read, _) => Err(Error::io("read", path, e.into())),
            (Err(e), Direction::Write, _) => Err(Error::io("write", path, e.into())),
            (Ok(()), Direction::Read, Some(slice)) => {
                let first = self.place.offset / BLOCK;
                let wrong = self.place.sums.first_wrong(first, slice.bytes());
                slice.settle();
                wrong.map_or(Ok(()), |block| {
                    let at = self.place.region + (block * BLOCK) as u64;
                    let what = "are not what was written there";
                    let problem = format!("the {BLOCK} bytes at offset {at} {what}");
                    Err(Error::corrupt(path, problem))
                })
            }
            (Ok(()), _, _) => Ok(()),
        };
        self.result = Some(result);
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // The slice goes first: the request takes its buffer back when no slice is left.
        drop(self.slice.take());
        let lost = || Err(ended(&self.queue.file));
        let result = self.result.take().unwrap_or_else(lost);
        self.queue
            .ended(self.request, self.direction, self.len, result);
    }
}

struct Request {
    direction: Direction,
    span: Range<u64>,
    place: Place,
    /// Gives out slices in order.
    cutter: Cutter,
    /// Bytes not yet given out.
    uncut: usize,
    /// Bytes given out or not, but not yet done with.
    left: usize,
    /// Earlier requests to wait for.
    blocked_by: usize,
    error: Option<Error>,
    ticket: Arc<Ticket>,
}

impl Request {
    fn conflicts(&self, direction: Direction, span: &Range<u64>) -> bool {
        let overlap = self.span.start < span.end && span.start < self.span.end;
        overlap && (self.direction == Direction::Write || direction == Direction::Write)
    }
}

#[derive(Default)]
struct State {
    /// By age.
    requests: BTreeMap<u64, Request>,
    /// Those with slices to give, by age.
    ready: VecDeque<u64>,
    next: u64,
    closed: bool,
    servants: usize,
    busy_since: Option<Instant>,
    busy: f64,
    read: u64,
    written: u64,
}

/// The requests of one file.
pub(super) struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    wakes: Vec<OwnedFd>,
    waited: Arc<AtomicU64>,
    scratch: Memory,
    block: usize,
    file: Arc<DiskFile>,
}

/// Bytes read, bytes written, seconds with work, seconds that callers waited.
pub(super) type Counts = (u64, u64, f64, f64);

impl Queue {
    /// A queue whose pieces are at most `block` bytes, with `rings` events that tell of new requests.
    ///
    /// # Errors
    /// The system's, when it has no event left.
    pub(super) fn new(
        file: Arc<DiskFile>,
        block: usize,
        rings: usize,
    ) -> rustix::io::Result<Arc<Self>> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wakes: rustix::io::Result<_> = (0..rings)
            .map(|_| rustix::event::eventfd(0, flags))
            .collect();
        Ok(Arc::new(Queue {
            state: Mutex::default(),
            arrived: Condvar::new(),
            wakes: wakes?,
            waited: Arc::default(),
            scratch: Memory::new(),
            block,
            file,
        }))
    }

    /// The file behind the queue.
    pub(super) fn file(&self) -> &Arc<DiskFile> {
        &self.file
    }

    /// The event of the ring `index`: readable when there may be something new.
    pub(super) fn wake(&self, index: usize) -> &OwnedFd {
        &self.wakes[index]
    }

    /// Adds a request for the bytes of `buffer`, rounded up to whole blocks.
    pub(super) fn submit(&self, direction: Direction, place: Place, buffer: Buffer) -> Arc<Ticket> {
        let ticket = Arc::new(Ticket {
            result: Mutex::default(),
            done: Condvar::new(),
            waited: self.waited.clone(),
        });
        let len = buffer.bytes().next_multiple_of(BLOCK);
        if len == 0 {
            ticket.put(Ok(buffer));
            return ticket;
        }
        let start = place.region + place.offset as u64;
        let span = start..start + len as u64;
        let mut state = lock(&self.state);
        if state.servants == 0 {
            ticket.put(Err(ended(&self.file)));
            return ticket;
        }
        let earlier = state.requests.values();
        let blocked_by = earlier.filter(|r| r.conflicts(direction, &span)).count();
        let request = Request {
            direction,
            span,
            place,
            cutter: Cutter::new(buffer),
            uncut: len,
            left: len,
            blocked_by,
            error: None,
            ticket: ticket.clone(),
        };
        let id = state.next;
        state.next += 1;
        state.requests.insert(id, request);
        if blocked_by == 0 {
            state.ready.push_back(id);
        }
        state.busy_since.get_or_insert_with(Instant::now);
        drop(state);
        self.wake_all();
        ticket
    }

    /// No more requests will come: servants leave when the last is done.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.wake_all();
    }

    /// Whether [`Queue::close`] was called and nothing is left to hand out.
    pub(super) fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.closed && state.requests.values().all(|r| r.uncut == 0)
    }

    /// The next piece, if one can be moved now.
    pub(super) fn take(self: &Arc<Self>) -> Option<Piece> {
        self.next_piece(&mut lock(&self.state))
    }

    /// The next piece, as soon as there is one; none when the queue was closed and is empty.
    pub(super) fn take_or_wait(self: &Arc<Self>) -> Option<Piece> {
        let mut state = lock(&self.state);
        loop {
            let piece = self.next_piece(&mut state);
            if piece.is_some() || (state.closed && state.requests.is_empty()) {
                return piece;
            }
            state = self
                .arrived
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn next_piece(self: &Arc<Self>, state: &mut State) -> Option<Piece> {
        let id = *state.ready.front()?;
        let request = state.requests.get_mut(&id)?;
        let done = request.place_len() - request.uncut;
        let len = request.uncut.min(self.block);
        request.uncut -= len;
        let piece = Piece {
            queue: self.clone(),
            request: id,
            direction: request.direction,
            at: request.span.start + done as u64,
            slice: Some(request.cutter.cut(len, request.direction, &self.scratch)),
            moved: 0,
            place: Place {
                offset: request.place.offset + done,
                ..request.place.clone()
            },
            len,
            result: None,
        };
        if request.uncut == 0 {
            state.ready.pop_front();
        }
        Some(piece)
    }

    /// A piece of a request is done with.
    fn ended(&self, id: u64, direction: Direction, len: usize, result: Result<()>) {
        let mut state = lock(&self.state);
        match (&result, direction) {
            (Ok(()), Direction::Read) => state.read += len as u64,
            (Ok(()), Direction::Write) => state.written += len as u64,
            (Err(_), _) => {}
        }
        let Some(request) = state.requests.get_mut(&id) else {
            return;
        };
        request.left -= len;
        if let Err(error) = result {
            state.fail(id, error);
        }
        let freed = state.settle(id);
        let over = state.closed && state.requests.is_empty();
        drop(state);
        if freed || over {
            self.wake_all();
        }
    }

    /// A thread that serves the queue begins.
    pub(super) fn servant_began(&self) {
        lock(&self.state).servants += 1;
    }

    /// A thread that serves the queue ends; with the last one, so do the requests that no one will serve.
    pub(super) fn servant_ended(&self) {
        let mut state = lock(&self.state);
        state.servants -= 1;
        if state.servants > 0 {
            return;
        }
        for id in state.requests.keys().copied().collect::<Vec<_>>() {
            state.fail(id, ended(&self.file));
            state.settle(id);
        }
    }

    /// What was done so far.
    pub(super) fn counts(&self) -> Counts {
        let state = lock(&self.state);
        let current = state.busy_since.map_or(0.0, |t| t.elapsed().as_secs_f64());
        let waited = self.waited.load(Ordering::Relaxed) as f64 * 1e-9;
        (state.read, state.written, state.busy + current, waited)
    }

    fn wake_all(&self) {
        for wake in &self.wakes {
            // A full counter is as good as one more: the ring is awake already.
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
        self.arrived.notify_all();
    }
}

impl Request {
    fn place_len(&self) -> usize {
        (self.span.end - self.span.start) as usize
    }
}

impl State {
    /// Keeps the first error of a request and hands out no more of it.
    fn fail(&mut self, id: u64, error: Error) {
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        request.error.get_or_insert(error);
        request.left -= request.uncut;
        request.uncut = 0;
        self.ready.retain(|&other| other != id);
    }

    /// Ends the request if nothing of it is left; says whether others may start.
    fn settle(&mut self, id: u64) -> bool {
        if self.requests.get(&id).is_none_or(|r| r.left > 0) {
            return false;
        }
        let Some(request) = self.requests.remove(&id) else {
            return false;
        };
        let mut freed = false;
        for (&later, other) in self.requests.range_mut(id..) {
            if other.conflicts(request.direction, &request.span) {
                other.blocked_by -= 1;
                if other.blocked_by == 0 && other.uncut > 0 {
                    self.ready.push_back(later);
                    freed = true;
                }
            }
        }
        if self.requests.is_empty() {
            let since = self.busy_since.take();
            self.busy += since.map_or(0.0, |t| t.elapsed().as_secs_f64());
        }
        let result = match (request.error, request.cutter.finish()) {
            (None, Some(buffer)) => Ok(buffer),
            (Some(error), _) => Err(error),
            (None, None) => unreachable!("a slice outlived its piece"),
        };
        request.ticket.put(result);
        freed
    }
}

/// The error of requests whose thread is gone.
fn ended(file: &DiskFile) -> Error {
    let why = std::io::Error::other("the thread that moves its bytes has ended");
    Error::io("use", file.path(), why)
}

/// A panic elsewhere does not make what is guarded here wrong: all updates are single assignments or come last.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
