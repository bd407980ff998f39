//! The threads that move bytes: one for each ring, or one for each blocking call under way.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::{io, thread};

use super::file::DiskFile;
use super::queue::{Direction, Piece, Queue};
use super::ring::{Advance, Moved, Ring, advance};
use super::{AioOptions, Backend};

/// More blocking calls than this at a time are not faster on any disk and cost a stack each.
const MAX_WORKERS: usize = 64;

/// Starts the threads of `backend`.
///
/// # Errors
/// The system's, when it has no io_uring or forbids it, or has no thread or event left.
pub(super) fn start(
    file: &Arc<DiskFile>,
    options: &AioOptions,
    backend: Backend,
) -> io::Result<(Arc<Queue>, Vec<JoinHandle<()>>)> {
    let rings = match backend {
        Backend::IoUring => options.threads,
        Backend::Threads => 0,
    };
    let queue = Queue::new(file.clone(), options.block_size, rings)?;
    let started = match backend {
        Backend::IoUring => (0..rings)
            .map(|index| start_ring(&queue, index, options.clone()))
            .collect(),
        Backend::Threads => {
            let workers = options.threads.saturating_mul(options.queue_depth);
            (0..workers.clamp(1, MAX_WORKERS))
                .map(|_| spawn(&queue, work))
                .collect::<io::Result<Vec<_>>>()
        }
    };
    match started {
        Ok(threads) => Ok((queue, threads)),
        Err(e) => {
            queue.close();
            Err(e)
        }
    }
}

/// Says that a thread serves the queue, until it is dropped.
struct Servant(Arc<Queue>);

impl Drop for Servant {
    fn drop(&mut self) {
        self.0.servant_ended();
    }
}

fn spawn(
    queue: &Arc<Queue>,
    serve: impl FnOnce(&Arc<Queue>) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    queue.servant_began();
    let servant = Servant(queue.clone());
    thread::Builder::new()
        .name("windlass-swap".to_owned())
        .spawn(move || {
            let servant = servant;
            serve(&servant.0);
        })
}

fn start_ring(queue: &Arc<Queue>, index: usize, options: AioOptions) -> io::Result<JoinHandle<()>> {
    // A ring belongs to the thread that makes it; whether it could be made is told through a channel.
    let (tell, told) = std::sync::mpsc::channel();
    let thread = spawn(queue, move |queue| {
        match Ring::new(queue.file().clone(), options.queue_depth) {
            Ok(mut ring) => {
                // The starter waits for the answer.
                let _ = tell.send(Ok(()));
                // An error of the ring itself ends the thread; the queue fails what is left.
                let _ = drive(queue, index, &mut ring, &options);
            }
            Err(e) => {
                let _ = tell.send(Err(e));
            }
        }
    })?;
    told.recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread of the ring ended")))?;
    Ok(thread)
}

/// Keeps the ring full; checksums are computed while the disk is at work.
fn drive(
    queue: &Arc<Queue>,
    index: usize,
    ring: &mut Ring,
    options: &AioOptions,
) -> io::Result<()> {
    let mut done: Vec<Moved> = Vec::new();
    loop {
        if options.overlap_events || ring.in_flight() == 0 {
            while ring.has_room() {
                let Some(piece) = queue.take() else { break };
                ring.push(piece);
                if options.single_submit {
                    ring.submit(queue, index, false)?;
                }
            }
        }
        ring.submit(queue, index, false)?;
        ring.record_new();
        for (piece, moved) in done.drain(..) {
            piece.complete(moved);
        }
        // What the event told of must be looked for before the thread sleeps: it tells only once.
        if ring.reap(queue, index, &mut done) || !done.is_empty() {
            continue;
        }
        if ring.in_flight() == 0 && queue.is_over() {
            return Ok(());
        }
        ring.submit(queue, index, true)?;
        ring.reap(queue, index, &mut done);
    }
}

/// Moves one piece after the other.
fn work(queue: &Arc<Queue>) {
    while let Some(mut piece) = queue.take_or_wait() {
        piece.record();
        let moved = transfer(queue.file(), &mut piece);
        piece.complete(moved);
    }
}

fn transfer(file: &DiskFile, piece: &mut Piece) -> rustix::io::Result<()> {
    loop {
        let (moved, at) = (piece.moved, piece.at + piece.moved as u64);
        let len = piece.len();
        let direction = piece.direction;
        let Some(slice) = &mut piece.slice else {
            return Err(rustix::io::Errno::FAULT);
        };
        let answer = match direction {
            Direction::Write => rustix::io::pwrite(file, &slice.bytes()[moved..], at),
            Direction::Read => rustix::io::pread(file, &mut slice.bytes_mut()[moved..], at),
        };
        match advance(moved, len, answer) {
            Advance::Done(result) => return result,
            Advance::Rest(moved) => piece.moved = moved,
        }
    }
}
