//! The tasks of a run that belong to a thread, until another takes of them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Task numbers that a thread has not begun: the first in the lower 32 bits, the end in the upper ones. Nobody else's line.
///
/// No number comes back to a share that it has left, so what was read once and is still there is the same share.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Share(AtomicU64);

impl Share {
    /// Begins anew: nobody else may write to it meanwhile but to take nothing.
    pub fn set(&self, tasks: Range<usize>) {
        self.0
            .store((tasks.end as u64) << 32 | tasks.start as u64, Relaxed);
    }

    /// Takes what `part` says of the tasks that are left, and leaves the rest.
    fn take(
        &self,
        part: impl Fn(Range<usize>) -> (Range<usize>, Range<usize>),
    ) -> Option<Range<usize>> {
        let mut share = self.0.load(Relaxed);
        loop {
            let left = (share & u64::from(u32::MAX)) as usize..(share >> 32) as usize;
            if left.is_empty() {
                return None;
            }
            let (taken, rest) = part(left);
            let rest = (rest.end as u64) << 32 | rest.start as u64;
            match self.0.compare_exchange_weak(share, rest, Relaxed, Relaxed) {
                Ok(_) => return Some(taken),
                Err(now) => share = now,
            }
        }
    }

    /// Takes the first.
    pub fn first(&self) -> Option<usize> {
        let first = self.take(|left| (left.start..left.start + 1, left.start + 1..left.end))?;
        Some(first.start)
    }

    /// Takes the second half, at least one.
    pub fn half(&self) -> Option<Range<usize>> {
        self.take(|left| {
            let middle = left.start + left.len() / 2;
            (middle..left.end, left.start..middle)
        })
    }
}
