//! A tile of scores becomes exponentials, and every row's maximum and sum run along.

use super::forward::Edges;
use super::tile::{KEYS, Part, ROWS, Tiles};
use crate::simd::Simd;

/// The part of a tile that a row sees when it sees all of a whole tile.
const WHOLE: Part = (0, KEYS as u8);

/// 0, 1, 2 and so on, to compare vectors of indices.
const INDICES: [f32; KEYS] = {
    let mut indices = [0.0; KEYS];
    let mut i = 0;
    while i < KEYS {
        indices[i] = i as f32;
        i += 1;
    }
    indices
};

/// Turns scores into exponentials relative to the new running maximum, and says by which `factors` older sums shrink.
///
/// A key that a row does not see has an exponential of exactly 0, and a tile of which a row sees nothing has a factor
/// of exactly 1: such tiles leave the row as it is.
#[inline(always)]
pub(super) unsafe fn softmax<S: Tiles>(
    softcap: Option<f32>,
    scores: &mut [f32],
    keys: usize,
    edges: &Edges,
    max: &mut [f32],
    sum: &mut [f32],
    factors: &mut [f32; ROWS],
) {
    let used = keys.next_multiple_of(S::LANES);
    let mut newest = [0.0f32; ROWS];
    // SAFETY: `used` scores of each row are in bounds, and the features are there by the caller's promise.
    unsafe {
        for (row, line) in scores.chunks_exact_mut(KEYS).enumerate().take(max.len()) {
            if let Some(cap) = softcap {
                cap_scores::<S>(cap, &mut line[..used]);
            }
            newest[row] = match edges.seen[row] {
                WHOLE => maximum::<S>(max[row], line),
                seen => masked_maximum::<S>(max[row], line, seen),
            };
        }
        for row in (0..max.len()).step_by(S::LANES) {
            let n = max.len() - row;
            let old = S::load_partial(max.as_ptr().add(row), n);
            let new = S::load(newest.as_ptr().add(row));
            (old - new)
                .exp_or_zero()
                .store(factors.as_mut_ptr().add(row));
            new.store_partial(max.as_mut_ptr().add(row), n);
        }
        for (row, line) in scores.chunks_exact_mut(KEYS).enumerate().take(max.len()) {
            let total = match edges.seen[row] {
                WHOLE => exponentials::<S>(max[row], line),
                seen => masked_exponentials::<S>(max[row], &mut line[..used], seen),
            };
            sum[row] = sum[row] * factors[row] + total;
        }
    }
}

/// The largest of a row's scores and `max`.
#[inline(always)]
unsafe fn maximum<S: Simd>(max: f32, line: &[f32]) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let mut most = S::splat(max);
        for at in (0..KEYS).step_by(S::LANES) {
            most = S::load(line[at..at + S::LANES].as_ptr()).max(most);
        }
        most.hmax()
    }
}

/// The largest of the scores in `seen` and `max`; other scores of the same vectors become -∞.
#[inline(always)]
unsafe fn masked_maximum<S: Simd>(max: f32, line: &mut [f32], (start, end): Part) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let hidden = S::splat(f32::NEG_INFINITY);
        let (first, last) = (S::splat(f32::from(start)), S::splat(f32::from(end)));
        let mut most = S::splat(max);
        for at in (start as usize / S::LANES * S::LANES..end as usize).step_by(S::LANES) {
            let index = S::load(INDICES[at..at + S::LANES].as_ptr());
            let at = line[at..at + S::LANES].as_mut_ptr();
            let score = S::select(index.lt(first), hidden, S::load(at));
            let score = S::select(index.lt(last), score, hidden);
            score.store(at);
            most = score.max(most);
        }
        most.hmax()
    }
}

/// Replaces a row's scores by their exponentials relative to `max`; returns their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(max: f32, line: &mut [f32]) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let max = S::splat(max);
        let mut total = S::splat(0.0);
        for at in (0..KEYS).step_by(S::LANES) {
            let at = line[at..at + S::LANES].as_mut_ptr();
            let p = (S::load(at) - max).exp_or_zero();
            p.store(at);
            total = total + p;
        }
        total.sum()
    }
}

/// As [`exponentials`] after [`masked_maximum`]; vectors without a visible key become 0.
#[inline(always)]
unsafe fn masked_exponentials<S: Simd>(max: f32, line: &mut [f32], (start, end): Part) -> f32 {
    let (start, end) = (
        start as usize / S::LANES * S::LANES,
        (end as usize).next_multiple_of(S::LANES),
    );
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let max = S::splat(max);
        let mut total = S::splat(0.0);
        for at in (0..line.len()).step_by(S::LANES) {
            let p = match (start..end).contains(&at) {
                true => (S::load(line[at..at + S::LANES].as_ptr()) - max).exp_or_zero(),
                false => S::splat(0.0),
            };
            p.store(line[at..at + S::LANES].as_mut_ptr());
            total = total + p;
        }
        total.sum()
    }
}

/// `cap * tanh(score / cap)`.
#[inline(always)]
pub(super) unsafe fn cap_scores<S: Tiles>(cap: f32, line: &mut [f32]) {
    // SAFETY: `line` is whole vectors.
    unsafe {
        let (cap, inverse) = (S::splat(cap), S::splat(1.0 / cap));
        for at in (0..line.len()).step_by(S::LANES) {
            let at = line.as_mut_ptr().add(at);
            (cap * (S::load(at) * inverse).tanh()).store(at);
        }
    }
}

/// Multiplies the first columns of lines of [`KEYS`] numbers by factors of their own.
#[inline(always)]
pub(super) unsafe fn multiply_columns<S: Simd>(lines: &mut [f32], factors: &[f32]) {
    for line in lines.chunks_exact_mut(KEYS) {
        for (x, factor) in line
            .chunks_exact_mut(S::LANES)
            .zip(factors.chunks_exact(S::LANES))
        {
            // SAFETY: whole vectors; the features are there by the caller's promise.
            unsafe { (S::load(x.as_ptr()) * S::load(factor.as_ptr())).store(x.as_mut_ptr()) };
        }
    }
}
