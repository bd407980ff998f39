//! What an exchange carries: where chunks are read and what becomes of those that arrive.

use std::ops::Range;

use super::wire::{Buffer, bytes_of};
use crate::datum::{Datum, Real};
use crate::fold::fold;

/// The data of a collective. Positions are bytes, counted from the start of what goes between two ranks.
pub trait Cargo {
    /// Bytes for another rank.
    fn outgoing(&self, to: usize) -> usize;
    /// Bytes from another rank.
    fn incoming(&self, from: usize) -> usize;
    /// Copies a chunk for another rank.
    fn load(&self, to: usize, at: Range<usize>, chunk: &mut [u8]);
    /// Takes the chunks that start at a position from all ranks that had one there.
    fn unload(&mut self, at: usize, chunks: &[Option<Buffer>]);
}

/// Bytes that arrive as they are.
pub struct Places<'a> {
    /// Where chunks are read, unless in `data`.
    source: Option<&'a [u8]>,
    data: &'a mut [u8],
    sends: Vec<Range<usize>>,
    receives: Vec<Range<usize>>,
}

impl<'a> Places<'a> {
    /// Reads and writes the same bytes; the ranges to send to and to receive from each rank.
    pub fn in_place(
        data: &'a mut [u8],
        sends: Vec<Range<usize>>,
        receives: Vec<Range<usize>>,
    ) -> Self {
        Self {
            source: None,
            data,
            sends,
            receives,
        }
    }

    /// Reads and writes different bytes.
    pub fn apart(
        source: &'a [u8],
        data: &'a mut [u8],
        sends: Vec<Range<usize>>,
        receives: Vec<Range<usize>>,
    ) -> Self {
        Self {
            source: Some(source),
            data,
            sends,
            receives,
        }
    }
}

impl Cargo for Places<'_> {
    fn outgoing(&self, to: usize) -> usize {
        self.sends[to].len()
    }

    fn incoming(&self, from: usize) -> usize {
        self.receives[from].len()
    }

    fn load(&self, to: usize, at: Range<usize>, chunk: &mut [u8]) {
        let source = self.source.unwrap_or(self.data);
        chunk.copy_from_slice(&source[self.sends[to].clone()][at]);
    }

    fn unload(&mut self, at: usize, chunks: &[Option<Buffer>]) {
        for (place, chunk) in self.receives.iter().zip(chunks) {
            if let Some(chunk) = chunk {
                let bytes = chunk.bytes();
                self.data[place.clone()][at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
    }
}

/// Numbers that are summed in rank order.
pub struct Sums<'a, T: Real> {
    pub rank: usize,
    pub shards: &'a [Range<usize>],
    pub data: &'a [T],
    /// The sum of the own shard.
    pub out: &'a mut [T::Sum],
    pub accumulate: bool,
}

impl<T: Real> Cargo for Sums<'_, T> {
    fn outgoing(&self, to: usize) -> usize {
        self.shards[to].len() * size_of::<T>()
    }

    fn incoming(&self, _from: usize) -> usize {
        self.shards[self.rank].len() * size_of::<T>()
    }

    fn load(&self, to: usize, at: Range<usize>, chunk: &mut [u8]) {
        let shard = &self.data[self.shards[to].clone()];
        chunk.copy_from_slice(&bytes_of(shard)[at]);
    }

    fn unload(&mut self, at: usize, chunks: &[Option<Buffer>]) {
        let own = &self.data[self.shards[self.rank].clone()];
        let (ranks, place) = in_rank_order(self.rank, own, at, chunks);
        fold(&ranks, &mut self.out[place], self.accumulate);
    }
}

/// Numbers that are summed in rank order, where they are.
pub struct SumsInPlace<'a, T> {
    pub rank: usize,
    pub shards: &'a [Range<usize>],
    pub data: &'a mut [T],
    /// The sum of a chunk; empty at first.
    pub sum: Vec<T>,
}

impl<T: Real<Sum = T>> Cargo for SumsInPlace<'_, T> {
    fn outgoing(&self, to: usize) -> usize {
        self.shards[to].len() * size_of::<T>()
    }

    fn incoming(&self, _from: usize) -> usize {
        self.shards[self.rank].len() * size_of::<T>()
    }

    fn load(&self, to: usize, at: Range<usize>, chunk: &mut [u8]) {
        let shard = &self.data[self.shards[to].clone()];
        chunk.copy_from_slice(&bytes_of(shard)[at]);
    }

    fn unload(&mut self, at: usize, chunks: &[Option<Buffer>]) {
        let own = &mut self.data[self.shards[self.rank].clone()];
        let (ranks, place) = in_rank_order(self.rank, own, at, chunks);
        self.sum.resize(place.len(), T::default());
        fold(&ranks, &mut self.sum, false);
        own[place].copy_from_slice(&self.sum);
    }
}

/// The numbers that all ranks have from a position on, and the place in the own shard where their sum goes.
fn in_rank_order<'c, T: Datum>(
    rank: usize,
    own: &'c [T],
    at: usize,
    chunks: &'c [Option<Buffer>],
) -> (Vec<&'c [T]>, Range<usize>) {
    let start = at / size_of::<T>();
    let chunks = chunks.iter().flatten().map(Buffer::numbers::<T>);
    let mut ranks: Vec<&[T]> = chunks.collect();
    // Alone, the own numbers are the sum.
    let length = ranks.first().map_or(own.len() - start, |chunk| chunk.len());
    let place = start..start + length;
    ranks.insert(rank, &own[place.clone()]);
    (ranks, place)
}
