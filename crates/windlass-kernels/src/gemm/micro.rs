//! Packing and the micro-kernel of the vector levels.
//!
//! A packed sliver holds, for every step of the inner dimension, one 32-bit word a lane (row of A or column of B): an
//! `f32`, widened from `bf16` or `f16` where needed, or a pair of `bf16` for the kernel that multiplies pairs. The micro-kernel
//! keeps `R x 2 N` sums in registers over a whole K block.

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

use half::{bf16, f16};

use super::kernel::Source;
use super::lanes::Lanes;

/// How a packed word is made.
pub(super) const F32: u8 = 0;
/// A `bf16` widened to `f32`.
pub(super) const WIDEN: u8 = 1;
/// An `f16` widened to `f32`.
pub(super) const HALF: u8 = 3;
/// Two consecutive `bf16` of the inner dimension.
pub(super) const PAIRS: u8 = 2;

/// Packs `lanes` lanes of `depth` elements into `pitch` words a step; lanes past `lanes` and a missing half pair are
/// zero. `dst` has room for `N` words more than the sliver: vectors are stored whole.
///
/// # Safety
/// As [`super::kernel::Kernel::pack_b`].
#[inline(always)]
pub(super) unsafe fn pack<L: Lanes, const MODE: u8>(
    src: Source,
    lanes: usize,
    depth: usize,
    dst: *mut f32,
    pitch: usize,
) {
    let mut first = 0;
    while first < pitch {
        let count = lanes.saturating_sub(first).min(L::N);
        // SAFETY: the lanes are in range; a group writes words `first..first + N` of each step, of which those past
        // `pitch` are overwritten by the next step or lie in the room at the end.
        unsafe {
            let dst = dst.add(first);
            if src.k_contiguous {
                pack_across::<L, MODE>(src.skip_lanes(first), count, depth, dst, pitch);
            } else {
                pack_along::<L, MODE>(src.skip_lanes(first), count, depth, dst, pitch);
            }
        }
        first += L::N;
    }
}

/// Lanes are rows of memory: square blocks are transposed.
#[inline(always)]
unsafe fn pack_across<L: Lanes, const MODE: u8>(
    src: Source,
    lanes: usize,
    depth: usize,
    dst: *mut f32,
    pitch: usize,
) {
    let per_word = if MODE == F32 || MODE == HALF { 1 } else { 2 };
    let block = L::N * per_word;
    let mut k = 0;
    while k < depth {
        let left = (depth - k).min(block);
        // SAFETY: rows `..lanes`, elements `k..k + left`.
        unsafe {
            let mut rows = [L::zero(); 16];
            if lanes == L::N && left == block {
                for (i, row) in rows.iter_mut().take(L::N).enumerate() {
                    let at = src.at(i, k);
                    *row = match MODE {
                        F32 => L::load(at.cast()),
                        HALF => L::load_half(at.cast::<f16>(), block),
                        _ => L::load_pairs(at.cast(), block),
                    };
                    // The next block of this row: a row is read in short runs, which hides it from the hardware.
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH).cast());
                }
            } else {
                for (i, row) in rows.iter_mut().take(lanes).enumerate() {
                    let at = src.at(i, k);
                    *row = match MODE {
                        F32 => L::load_partial(at.cast(), left),
                        HALF => L::load_half(at.cast::<f16>(), left),
                        _ => L::load_pairs(at.cast(), left),
                    };
                }
            }
            L::transpose(&mut rows);
            let words = left.div_ceil(per_word);
            if MODE == WIDEN {
                let dst = dst.add(k * pitch);
                if left == block {
                    for (i, row) in rows.iter().take(L::N).enumerate() {
                        L::store(dst.add(2 * i * pitch), L::low(*row));
                        L::store(dst.add((2 * i + 1) * pitch), L::high(*row));
                    }
                } else {
                    for (i, row) in rows.iter().take(words).enumerate() {
                        L::store(dst.add(2 * i * pitch), L::low(*row));
                        if 2 * i + 1 < left {
                            L::store(dst.add((2 * i + 1) * pitch), L::high(*row));
                        }
                    }
                }
            } else {
                let dst = dst.add(k / per_word * pitch);
                if words == L::N {
                    for (i, row) in rows.iter().take(L::N).enumerate() {
                        L::store(dst.add(i * pitch), *row);
                    }
                } else {
                    for (i, row) in rows.iter().take(words).enumerate() {
                        L::store(dst.add(i * pitch), *row);
                    }
                }
            }
        }
        k += block;
    }
}

/// How far ahead steps are fetched where each is another row of memory, often another page.
const STEPS_AHEAD: usize = 16;
/// How far ahead a row is fetched, in bytes.
const PREFETCH: usize = 512;

/// Lanes are neighbors in memory: steps are copied.
#[inline(always)]
unsafe fn pack_along<L: Lanes, const MODE: u8>(
    src: Source,
    lanes: usize,
    depth: usize,
    dst: *mut f32,
    pitch: usize,
) {
    if lanes == 0 {
        // SAFETY: only writes zeros to the destination.
        unsafe {
            for word in 0..if MODE == PAIRS {
                depth.div_ceil(2)
            } else {
                depth
            } {
                L::store(dst.add(word * pitch), L::zero());
            }
        }
        return;
    }
    // SAFETY: lanes `..lanes` of step `k < depth`.
    unsafe {
        match MODE {
            F32 => {
                for k in 0..depth {
                    _mm_prefetch::<_MM_HINT_T0>(src.at(0, k + STEPS_AHEAD).cast());
                    L::store(
                        dst.add(k * pitch),
                        L::load_partial(src.at(0, k).cast(), lanes),
                    );
                }
            }
            HALF => {
                for k in 0..depth {
                    _mm_prefetch::<_MM_HINT_T0>(src.at(0, k + STEPS_AHEAD).cast());
                    L::store(
                        dst.add(k * pitch),
                        L::load_half(src.at(0, k).cast::<f16>(), lanes),
                    );
                }
            }
            WIDEN => {
                for k in 0..depth {
                    _mm_prefetch::<_MM_HINT_T0>(src.at(0, k + STEPS_AHEAD).cast());
                    L::store(
                        dst.add(k * pitch),
                        L::load_widened(src.at(0, k).cast::<bf16>(), lanes),
                    );
                }
            }
            _ => {
                for word in 0..depth / 2 {
                    _mm_prefetch::<_MM_HINT_T0>(src.at(0, 2 * word + STEPS_AHEAD).cast());
                    _mm_prefetch::<_MM_HINT_T0>(src.at(0, 2 * word + 1 + STEPS_AHEAD).cast());
                    let low = L::load_widened(src.at(0, 2 * word).cast(), lanes);
                    let high = L::load_widened(src.at(0, 2 * word + 1).cast(), lanes);
                    L::store(dst.add(word * pitch), L::pair(low, high));
                }
                if depth % 2 == 1 {
                    let low = L::load_widened(src.at(0, depth - 1).cast(), lanes);
                    L::store(dst.add(depth / 2 * pitch), L::pair(low, L::zero()));
                }
            }
        }
    }
}

/// `sums[R, 2 N] (+)= A B` over `steps` words of two packed slivers, A's pitch being `R`: one chain of products a sum,
/// then one addition to what `sums` held unless `first`. Meanwhile fetches `steps / 2` cache lines from `ahead`, the
/// next sliver of B, to the L2 cache: a sliver crosses pages, which the hardware's fetching does not.
///
/// # Safety
/// The slivers hold `steps` words; `sums` has room for `R` rows of `2 N`. `ahead` may be anything.
#[inline(always)]
pub(super) unsafe fn multiply<L: Lanes, const R: usize>(
    steps: usize,
    a: *const f32,
    b: *const f32,
    sums: *mut f32,
    first: bool,
    ahead: *const f32,
) {
    // SAFETY: as the caller promised.
    unsafe {
        let mut c = [[L::zero(); 2]; R];
        let (mut a, mut b, mut ahead) = (a, b, ahead);
        for _ in 0..steps / 4 {
            _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(16).cast());
            ahead = ahead.wrapping_add(32);
            for step in 0..4 {
                multiply_step::<L, R>(a.add(step * R), b.add(step * 2 * L::N), &mut c);
            }
            (a, b) = (a.add(4 * R), b.add(4 * 2 * L::N));
        }
        for step in 0..steps % 4 {
            multiply_step::<L, R>(a.add(step * R), b.add(step * 2 * L::N), &mut c);
        }
        for (r, c) in c.iter().enumerate() {
            for (v, c) in c.iter().enumerate() {
                let at = sums.add((2 * r + v) * L::N);
                L::store(at, if first { *c } else { L::add(L::load(at), *c) });
            }
        }
    }
}

#[inline(always)]
unsafe fn multiply_step<L: Lanes, const R: usize>(
    a: *const f32,
    b: *const f32,
    c: &mut [[L::V; 2]; R],
) {
    // SAFETY: as the caller promised.
    unsafe {
        let (b0, b1) = (L::load(b), L::load(b.add(L::N)));
        for (r, c) in c.iter_mut().enumerate() {
            let x = L::broadcast(a.add(r));
            c[0] = L::step(x, b0, c[0]);
            c[1] = L::step(x, b1, c[1]);
        }
    }
}
