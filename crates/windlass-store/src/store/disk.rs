//! The other tier: arrays on a fast disk, on their way to and from memory.

use crate::error::Result;
use crate::swap::{Reading, Region, SwapFile, Writing};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use windlass_tensor::kernels::memory::Buffer;

/// A disk with writes under way. Without a file (in a dry run) nothing is moved, and buffers are kept as long as they
/// would be.
pub(super) struct Disk {
    file: Option<SwapFile>,
    writing: Mutex<VecDeque<Going>>,
    /// Most writes under way before the next one waits.
    limit: usize,
}

/// A place on the disk; none in a dry run.
pub(super) type Spot = Option<Region>;

/// A buffer on its way into memory.
pub(super) enum Coming {
    Reading(Reading),
    Here(Buffer),
}

/// A buffer on its way to the disk.
pub(super) enum Going {
    Writing(Writing),
    Kept(Buffer),
}

impl Going {
    pub(super) fn wait(self) -> Result<Buffer> {
        match self {
            Going::Writing(writing) => writing.wait(),
            Going::Kept(buffer) => Ok(buffer),
        }
    }
}

impl Coming {
    pub(super) fn wait(self) -> Result<Buffer> {
        match self {
            Coming::Reading(reading) => reading.wait(),
            Coming::Here(buffer) => Ok(buffer),
        }
    }
}

impl Disk {
    pub(super) fn new(file: Option<SwapFile>, limit: usize) -> Self {
        Disk {
            file,
            writing: Mutex::default(),
            limit: limit.max(1),
        }
    }

    pub(super) fn file(&self) -> Option<&SwapFile> {
        self.file.as_ref()
    }

    /// Takes space for `bytes`, all zero.
    pub(super) fn reserve(&self, bytes: usize) -> Result<Spot> {
        self.file
            .as_ref()
            .map(|file| file.reserve(bytes))
            .transpose()
    }

    /// Starts to fill a buffer from `offset` bytes into a place.
    pub(super) fn read(&self, spot: &Spot, offset: usize, buffer: Buffer) -> Coming {
        match (&self.file, spot) {
            (Some(file), Some(region)) => Coming::Reading(file.read_at(region, offset, buffer)),
            _ => Coming::Here(buffer),
        }
    }

    /// Starts to write a buffer to the start of a place; the caller sees to it that [`Disk::flush`] bounds how many are
    /// under way.
    pub(super) fn send(&self, spot: &Spot, buffer: Buffer) {
        let going = self.start(spot, 0, buffer);
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.push_back(going);
    }

    /// Starts to write a buffer, which the caller waits for.
    pub(super) fn start(&self, spot: &Spot, offset: usize, buffer: Buffer) -> Going {
        match (&self.file, spot) {
            (Some(file), Some(region)) => Going::Writing(file.write_at(region, offset, buffer)),
            _ => Going::Kept(buffer),
        }
    }

    /// Starts to write a buffer to `offset` bytes into a place; waits for the oldest of too many writes, and for none
    /// before: what is held does not depend on the disk's speed, so that a plan knows it.
    pub(super) fn write(&self, spot: &Spot, offset: usize, buffer: Buffer) -> Result<()> {
        let going = self.start(spot, offset, buffer);
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.push_back(going);
        while writing.len() > self.limit {
            let oldest = writing.pop_front().expect("a write under way");
            oldest.wait()?;
        }
        Ok(())
    }

    /// Waits for all writes.
    pub(super) fn flush(&self) -> Result<()> {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(oldest) = writing.pop_front() {
            oldest.wait()?;
        }
        Ok(())
    }
}
