//! How fast a swap file moves bytes with the options that it has.
//!
//! Goes through the same requests, pieces and checksums as training does: what is measured is what a run gets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use windlass_tensor::Category;
use windlass_tensor::kernels::memory::{Buffer, Memory};

use super::{AioOptions, Direction, Reading, Region, SwapFile, Writing};
use crate::error::Result;

/// Requests hold this much at least: what a unit of a model may have.
const REQUEST: usize = 8 << 20;
/// Requests under way or ready beyond what the disk is given at once, so that it never waits for the caller.
const SPARE: usize = 2;

/// What a measurement moved, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Bytes moved.
    pub bytes: u64,
    /// Seconds from the first request to the end of the last.
    pub seconds: f64,
}

impl Measured {
    /// Speed in GB/s (1e9 bytes).
    pub fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.seconds.max(1e-9) * 1e-9
    }
}

enum Moving {
    Write(Writing),
    Read(Reading),
}

/// Memory that [`measure`] takes for its buffers with these options, in bytes.
pub fn memory_for(options: &AioOptions) -> usize {
    let (request, count) = requests(options);
    request.saturating_mul(count)
}

/// The size of a request, and how many are under way or ready.
fn requests(options: &AioOptions) -> (usize, usize) {
    let depth = options.queue_depth.saturating_mul(options.threads);
    let at_once = options.block_size.saturating_mul(depth);
    let request = REQUEST.max(options.block_size);
    (request, at_once.div_ceil(request) + SPARE)
}

/// Moves the whole `region` once in `direction`, or as much of it as fits into `limit`.
///
/// A region must have been written whole before a read of it says anything: disks answer faster for what is not there.
///
/// # Errors
/// As [`Writing::wait`] and [`Reading::wait`].
pub fn measure(
    file: &SwapFile,
    region: &Region,
    direction: Direction,
    limit: Option<Duration>,
) -> Result<Measured> {
    let memory = Memory::new();
    let (request, count) = requests(file.options());
    let mut idle: Vec<Buffer> = (0..count.min(region.bytes().div_ceil(request)))
        .map(|seed| filled(&memory, request, seed))
        .collect();
    let mut moving = VecDeque::new();
    let start = Instant::now();
    let (mut next, mut bytes) = (0, 0);
    loop {
        let in_time = limit.is_none_or(|limit| start.elapsed() < limit);
        if in_time && next < region.bytes() {
            let rest = region.bytes() - next;
            let buffer = match idle.pop() {
                Some(buffer) if rest >= request => Some(buffer),
                // The last request of a region whose size is no multiple of a request's.
                Some(_) => Some(filled(&memory, rest, 0)),
                None => None,
            };
            if let Some(buffer) = buffer {
                let len = buffer.bytes();
                moving.push_back(match direction {
                    Direction::Write => Moving::Write(file.write_at(region, next, buffer)),
                    Direction::Read => Moving::Read(file.read_at(region, next, buffer)),
                });
                next += len;
                bytes += len as u64;
                continue;
            }
        }
        match moving.pop_front() {
            Some(Moving::Write(write)) => idle.push(write.wait()?),
            Some(Moving::Read(read)) => idle.push(read.wait()?),
            None => break,
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Measured { bytes, seconds })
}

/// Bytes that no disk can make smaller.
fn filled(memory: &Memory, bytes: usize, seed: usize) -> Buffer {
    let mut buffer = memory.alloc(bytes, Category::Workspace);
    let mut state = seed as u64 + 1;
    for word in buffer.block_mut().chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    buffer
}
