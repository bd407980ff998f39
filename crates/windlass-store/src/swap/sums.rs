//! Checksums of what was written, so that a read can tell whether the disk gave back the same.
//!
//! One CRC-32 for every [`BLOCK`] bytes: a tenth of a percent of the file's size in memory. Transfers start and end on
//! such blocks, so that every byte read is verified, however it was cut when it was written.

use std::sync::atomic::{AtomicU32, Ordering};

/// The grain of transfers, in bytes: what any disk accepts, and a page of memory.
pub(super) const BLOCK: usize = 4096;

/// The checksums of one region.
#[derive(Debug)]
pub(super) struct Sums(Box<[AtomicU32]>);

impl Sums {
    /// Of `blocks` blocks of zeros: what a region holds before it is written.
    pub(super) fn zeros(blocks: usize) -> Self {
        let zero = crc32fast::hash(&[0; BLOCK]);
        Sums((0..blocks).map(|_| AtomicU32::new(zero)).collect())
    }

    /// Remembers `bytes`, whole blocks, as the content from block `first` on.
    pub(super) fn record(&self, first: usize, bytes: &[u8]) {
        for (sum, block) in self.0[first..].iter().zip(bytes.chunks_exact(BLOCK)) {
            // The order of transfers of the same bytes is kept by the queue's lock.
            sum.store(crc32fast::hash(block), Ordering::Relaxed);
        }
    }

    /// The first block whose content is not what was remembered, counted from the region's start.
    pub(super) fn first_wrong(&self, first: usize, bytes: &[u8]) -> Option<usize> {
        let sums = self.0[first..].iter();
        let wrong = sums
            .zip(bytes.chunks_exact(BLOCK))
            .position(|(sum, block)| sum.load(Ordering::Relaxed) != crc32fast::hash(block));
        wrong.map(|at| first + at)
    }
}
