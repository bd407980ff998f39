//! Slices lent between the threads of a world, and the collectives that read them in place.
//!
//! The one file of the crate that names memory of another thread. Why that is sound: a rank lends its slice in
//! [`Hub::arrive`] and stays in this file, its borrow with it, until [`Hub::pass`] says that every rank has read. A
//! request is only met by requests of the same collective, type and extent, and [`crate::Group`] has checked each
//! rank's extent against its own slice: what is read exists on the other side. In between a rank writes only where no
//! other one reads, as said at each function. A panic in between could end a borrow early, so it ends the process.

use std::ops::Range;
use std::slice;

use super::Member;
use super::hub::Hub;
use crate::datum::{Datum, Real};
use crate::error::Result;
use crate::fold::{BLOCK, fold, sum_of};
use crate::request::Request;

/// The start of a slice that a rank lends to the others for the length of a collective.
#[derive(Clone, Copy)]
pub struct Lent(*const ());

// SAFETY: an address; it is followed only here, under the rules of the module.
unsafe impl Send for Lent {}

impl Lent {
    /// For collectives without data.
    pub fn nothing() -> Self {
        Lent(std::ptr::null())
    }
}

/// A meeting that took place: memory is lent until it is dropped.
struct Lending<'h> {
    hub: &'h Hub,
    rank: usize,
}

impl<'h> Lending<'h> {
    fn new<T>(member: &'h Member, request: &Request<'_>, at: *const T) -> Result<Self> {
        let Member { hub, rank, .. } = member;
        hub.arrive(*rank, request, Lent(at.cast()))?;
        Ok(Self { hub, rank: *rank })
    }

    /// Where the slice of each rank starts.
    fn starts<T>(&self) -> Vec<*const T> {
        self.hub.brought(|_, lent| lent.0.cast())
    }
}

impl Drop for Lending<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
        self.hub.pass(self.rank);
    }
}

/// Every rank's shard into `data` of all. A rank's own shard is what others read; it writes only the other shards.
pub fn all_gather<T: Datum>(
    member: &Member,
    request: &Request<'_>,
    shards: &[Range<usize>],
    data: &mut [T],
) -> Result<()> {
    let own = data.as_mut_ptr();
    let lending = Lending::new(member, request, own)?;
    copy_shards(&lending.starts(), lending.rank, shards, own);
    Ok(())
}

/// Copies the shards of all others to their places in `own`, starting behind the own one so that ranks do not
/// queue at the same memory.
fn copy_shards<T: Datum>(starts: &[*const T], rank: usize, shards: &[Range<usize>], own: *mut T) {
    let (before, after) = (0..rank, rank + 1..starts.len());
    for other in after.chain(before) {
        let Range { start, end } = shards[other].clone();
        // SAFETY: the shard lies inside the slice of either rank, the two slices are different ones, and the other
        // rank does not write its own shard.
        unsafe {
            own.add(start)
                .copy_from_nonoverlapping(starts[other].add(start), end - start)
        };
    }
}

/// This rank's shard of the sum into `out`. Nobody writes to `data`.
pub fn reduce_scatter<T: Real>(
    member: &Member,
    request: &Request<'_>,
    shard: Range<usize>,
    data: &[T],
    out: &mut [T::Sum],
    accumulate: bool,
) -> Result<()> {
    let lending = Lending::new(member, request, data.as_ptr())?;
    let starts = lending.starts::<T>();
    let sources: Vec<&[T]> = starts
        .iter()
        // SAFETY: the shard lies inside every rank's slice, which is borrowed until the lending ends.
        .map(|start| unsafe { slice::from_raw_parts(start.add(shard.start), shard.len()) })
        .collect();
    fold(&sources, out, accumulate);
    Ok(())
}

/// The sum of all ranks' `data` in place. First each rank sums its shard, which is read by it alone and is the only
/// part that it writes; then, after a meeting of all, the shards are gathered.
pub fn all_reduce<T: Real<Sum = T>>(
    member: &Member,
    request: &Request<'_>,
    shards: &[Range<usize>],
    data: &mut [T],
) -> Result<()> {
    let own = data.as_mut_ptr();
    let lending = Lending::new(member, request, own)?;
    let starts = lending.starts::<T>();
    let mut sum = [T::default(); BLOCK];
    let shard = shards[lending.rank].clone();
    for at in shard.clone().step_by(BLOCK) {
        let sum = &mut sum[..BLOCK.min(shard.end - at)];
        // SAFETY: the block lies inside every rank's slice; of each, only this rank reads and writes this shard.
        let block = |start: &*const T| unsafe { slice::from_raw_parts(start.add(at), sum.len()) };
        let blocks: Vec<&[T]> = starts.iter().map(block).collect();
        sum_of(blocks.into_iter(), sum);
        // SAFETY: as above; the borrows of the block have ended.
        unsafe {
            own.add(at)
                .copy_from_nonoverlapping(sum.as_ptr(), sum.len())
        };
    }
    lending.hub.pass(lending.rank);
    copy_shards(&starts, lending.rank, shards, own);
    Ok(())
}

/// The root's `data` into everybody's. The root's is read, and written by nobody.
pub fn broadcast<T: Datum>(
    member: &Member,
    request: &Request<'_>,
    root: usize,
    data: &mut [T],
) -> Result<()> {
    let (own, length) = (data.as_mut_ptr(), data.len());
    let lending = Lending::new(member, request, own)?;
    let source = lending.starts::<T>()[root];
    if lending.rank != root {
        // SAFETY: all ranks have the same length, and the two slices are different ones.
        unsafe { own.copy_from_nonoverlapping(source, length) };
    }
    Ok(())
}

/// The pieces that all ranks have for this one, in rank order. Nobody writes to `send`.
pub fn all_to_all<T: Datum>(
    member: &Member,
    request: &Request<'_>,
    send: &[T],
    recv: &mut [T],
    counts: &[usize],
) -> Result<()> {
    let lending = Lending::new(member, request, send.as_ptr())?;
    let rank = lending.rank;
    let pieces = lending.hub.brought(|call, lent| {
        let start: *const T = lent.0.cast();
        // SAFETY: the pieces before the one for this rank lie inside the other rank's slice.
        unsafe { start.add(call.sent_before(rank)) }
    });
    let mut rest = recv;
    for (piece, &count) in pieces.into_iter().zip(counts) {
        let (here, after) = rest.split_at_mut(count);
        // SAFETY: the sender's count for this rank is the same, so the piece lies inside its slice.
        here.copy_from_slice(unsafe { slice::from_raw_parts(piece, count) });
        rest = after;
    }
    Ok(())
}

/// The values of all ranks, in rank order. Nobody writes to `value`.
pub fn collect<T: Datum>(member: &Member, request: &Request<'_>, value: &[T]) -> Result<Vec<T>> {
    let lending = Lending::new(member, request, value.as_ptr())?;
    let mut all = Vec::new();
    for start in lending.starts::<T>() {
        // SAFETY: all ranks have the same length, and nobody writes.
        all.extend_from_slice(unsafe { slice::from_raw_parts(start, value.len()) });
    }
    Ok(all)
}
