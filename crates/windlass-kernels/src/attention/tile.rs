//! What forward and backward tiles are made of: loading rows into `f32` scratch, straight or transposed, and one
//! register-blocked product.
//!
//! Scratch rows of a head are padded with zeros to [`padded`] elements. Every element of a product is one chain of
//! fused multiply-adds in the order of the inner index, so its bits do not depend on the shape of the block around it.

#![expect(
    clippy::needless_range_loop,
    reason = "indices of register arrays address memory too"
)]

use super::forward::Scratch;
use super::paged::Walk;
use crate::simd::{Simd, SimdElement, SimdLoad};

/// Keys of a tile, and the stride of a tile of scores.
pub(super) const KEYS: usize = 64;
/// Query rows that a tile of scores holds at most.
pub(super) const ROWS: usize = 64;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of a block of a product: 6 times 4 vectors of sums leave 8 of 32 registers, 6 times 2 leave 4 of 16.
const HEIGHT: usize = 6;

/// Elements of a head's row in scratch: whole vectors at every level.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Cuts the next `len` elements, rounded up to whole cache lines, off `rest`.
pub(super) fn take<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (part, left) = std::mem::take(rest).split_at_mut(len.next_multiple_of(16));
    *rest = left;
    part
}

/// Where a [`Product`] starts from.
#[derive(Clone, Copy)]
pub(super) enum Start {
    /// Zeros.
    Zero,
    /// What `c` holds.
    Sum,
    /// What `c` holds, row `i` times the `i`-th factor.
    Scaled(*const f32),
}

/// A range of at most [`KEYS`] keys or [`ROWS`] rows.
pub(super) type Part = (u8, u8);

/// What of a [`Product`] matters to each row, so that the rest need not be computed.
#[derive(Clone, Copy)]
pub(super) enum Bounds<'a> {
    /// Everything.
    All,
    /// Row `i` of `c` is read in these columns only.
    Columns(&'a [Part]),
    /// `a[i, p]` is zero for all other `p`.
    Inner(&'a [Part]),
}

/// The smallest range that covers all.
fn cover(parts: &[Part]) -> (usize, usize) {
    let (mut start, mut end) = (KEYS, 0);
    for part in parts.iter().filter(|part| part.0 < part.1) {
        start = start.min(part.0 as usize);
        end = end.max(part.1 as usize);
    }
    (start.min(end), end)
}

/// `c[i, j] = start + sum_p a[i, p] b[p, j]` for `m` rows and `n` columns, a multiple of the lanes.
///
/// `a[i, p]` is `a[i * a_row + p * a_step]`; the rows of `b` and `c` are `b_stride` and `c_stride` apart. The numbers of
/// `b` are widened as they are read.
#[derive(Clone, Copy)]
pub(super) struct Product<'a, B = f32> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_step: usize,
    pub b: *const B,
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    pub start: Start,
    pub bounds: Bounds<'a>,
}

impl<'a, B: SimdLoad> Product<'a, B> {
    /// Scores `[m, KEYS]` of rows `a` against the first `keys` columns of `[head_dim, KEYS]`.
    pub fn scores(m: usize, keys: usize, head_dim: usize) -> Self {
        Product {
            n: keys,
            k: head_dim,
            a_row: padded(head_dim),
            b_stride: KEYS,
            c_stride: KEYS,
            ..Product::rows(m, 0, head_dim)
        }
    }

    /// Rows `[m, padded]`: scores `[m, KEYS]` of `k` keys times rows `[k, padded]`.
    pub fn rows(m: usize, k: usize, head_dim: usize) -> Self {
        let width = padded(head_dim);
        Product {
            m,
            n: width,
            k,
            a: std::ptr::null(),
            a_row: KEYS,
            a_step: 1,
            b: std::ptr::null(),
            b_stride: width,
            c: std::ptr::null_mut(),
            c_stride: width,
            start: Start::Zero,
            bounds: Bounds::All,
        }
    }

    /// Rows `[keys, padded]`: scores `[rows, KEYS]`, transposed, times rows `[rows, padded]`.
    pub fn transposed(keys: usize, rows: usize, head_dim: usize) -> Self {
        Product {
            a_row: 1,
            a_step: KEYS,
            ..Product::rows(keys, rows, head_dim)
        }
    }

    /// With the operands and the place of the result.
    pub fn of(self, a: *const f32, b: *const B, c: *mut f32) -> Self {
        Product { a, b, c, ..self }
    }

    /// With another start and bounds than zeros and everything.
    pub fn from(self, start: Start, bounds: Bounds<'a>) -> Self {
        Product {
            start,
            bounds,
            ..self
        }
    }
}

/// What attention needs of a vector beyond [`Simd`].
///
/// # Safety
/// As for [`Simd`].
pub(super) trait Tiles: Simd {
    /// Transposes the square of the first `LANES` vectors.
    unsafe fn transpose(square: &mut [Self; 16]);
    /// Computes a [`Product`] whose pointers are valid; `c` overlaps nothing else.
    unsafe fn product<B: SimdLoad>(product: &Product<B>);
    /// [`walk`](super::paged::walk), compiled once for each storage.
    unsafe fn walk<B: SimdLoad>(walk: &Walk<B>, scratch: &mut Scratch);
}

/// Asks for the cache line at `at` (any address) to be brought to the second-level cache.
#[inline(always)]
pub(super) fn prefetch<E>(at: *const E) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    let _ = at;
}

/// Copies `rows` of `width` elements to rows of `padded(width)`, times `scale`; prefetches the rows `ahead`.
#[inline(always)]
pub(super) unsafe fn load_rows<S: Simd, E: SimdElement>(
    rows: &[*const E],
    ahead: &[*const E],
    width: usize,
    scale: f32,
    to: &mut [f32],
) {
    let stride = padded(width);
    assert!(to.len() >= rows.len() * stride);
    // SAFETY: each row has `width` elements by the caller's promise, `to` has room for all.
    unsafe {
        let scale = S::splat(scale);
        for (i, &row) in rows.iter().enumerate() {
            let to = to.as_mut_ptr().add(i * stride);
            if let Some(row) = ahead.get(i) {
                for column in (0..width).step_by(LINE / size_of::<E>()) {
                    prefetch(row.wrapping_add(column));
                }
            }
            let mut column = 0;
            while column + S::LANES <= width {
                (E::load_vector::<S>(row.add(column)) * scale).store(to.add(column));
                column += S::LANES;
            }
            while column < stride {
                let left = width.saturating_sub(column);
                let from = row.add(column.min(width));
                (E::load_vector_partial::<S>(from, left) * scale).store(to.add(column));
                column += S::LANES;
            }
        }
    }
}

/// Copies `rows` of `width` elements to the first columns of `width` rows of [`KEYS`] elements. Columns up to the next
/// multiple of the lanes receive copies of the last row. Prefetches the rows `ahead`.
#[inline(always)]
pub(super) unsafe fn load_columns<S: Tiles, E: SimdElement>(
    rows: &[*const E],
    ahead: &[*const E],
    width: usize,
    to: &mut [f32],
) {
    assert!(!rows.is_empty() && rows.len() <= KEYS && to.len() >= width * KEYS);
    // SAFETY: each row has `width` elements by the caller's promise, `to` has room for all.
    unsafe {
        let to = to.as_mut_ptr();
        let mut square = [S::splat(0.0); 16];
        for first in (0..rows.len()).step_by(S::LANES) {
            let mut from = [rows[rows.len() - 1]; 16];
            let present = S::LANES.min(rows.len() - first);
            from[..present].copy_from_slice(&rows[first..first + present]);
            let ahead = &ahead[first.min(ahead.len())..(first + S::LANES).min(ahead.len())];
            let mut column = 0;
            while column + S::LANES <= width {
                if (column * size_of::<E>()).is_multiple_of(LINE) {
                    for row in ahead {
                        prefetch(row.wrapping_add(column));
                    }
                }
                for i in 0..S::LANES {
                    square[i] = E::load_vector::<S>(from[i].add(column));
                }
                S::transpose(&mut square);
                for i in 0..S::LANES {
                    square[i].store(to.add((column + i) * KEYS + first));
                }
                column += S::LANES;
            }
            if column < width {
                for i in 0..S::LANES {
                    square[i] = E::load_vector_partial::<S>(from[i].add(column), width - column);
                }
                S::transpose(&mut square);
                for (i, line) in square.iter().enumerate().take(width - column) {
                    line.store(to.add((column + i) * KEYS + first));
                }
            }
        }
    }
}

/// Copies rows of `padded(width)` elements, times `scale`, to rows of `width`.
#[inline(always)]
pub(super) unsafe fn store_row<S: Simd, E: SimdElement>(
    from: *const f32,
    width: usize,
    scale: f32,
    to: &mut [E],
) {
    assert_eq!(to.len(), width);
    let to = to.as_mut_ptr();
    // SAFETY: `from` has `padded(width)` elements by the caller's promise, `to` has `width`.
    unsafe {
        let scale = S::splat(scale);
        let mut column = 0;
        while column + S::LANES <= width {
            E::store_vector::<S>(to.add(column), S::load(from.add(column)) * scale);
            column += S::LANES;
        }
        if column < width {
            E::store_vector_partial::<S>(
                to.add(column),
                S::load(from.add(column)) * scale,
                width - column,
            );
        }
    }
}

/// The whole product.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, B: SimdLoad>(p: &Product<B>) {
    let Bounds::Columns(seen) = p.bounds else {
        // SAFETY: the caller's promise.
        return unsafe { panels::<S, B>(p) };
    };
    for row in (0..p.m).step_by(HEIGHT) {
        let rows = HEIGHT.min(p.m - row);
        let (start, end) = cover(&seen[row..row + rows]);
        let (first, end) = (start / S::LANES * S::LANES, end.next_multiple_of(S::LANES));
        // SAFETY: a part of the product.
        unsafe {
            panels::<S, B>(&Product {
                m: rows,
                n: end - first,
                a: p.a.add(row * p.a_row),
                b: p.b.add(first),
                c: p.c.add(row * p.c_stride + first),
                bounds: Bounds::All,
                ..*p
            });
        }
    }
}

/// Panels of at most 4 vectors, 2 where there are 16 registers.
#[inline(always)]
unsafe fn panels<S: Simd, B: SimdLoad>(p: &Product<B>) {
    let vectors = p.n / S::LANES;
    let most = if S::LANES == 16 { 4 } else { 2 };
    let panels = vectors.div_ceil(most);
    let mut done = 0;
    for panel in 0..panels {
        // Even widths: 5 vectors are 3 and 2, since a panel of 1 waits for its own sums.
        let wide = (vectors - done).div_ceil(panels - panel);
        // SAFETY: the panel lies in `b` and `c` by the caller's promise.
        unsafe {
            let part = Product {
                b: p.b.add(done * S::LANES),
                c: p.c.add(done * S::LANES),
                ..*p
            };
            match wide {
                4 if S::LANES == 16 => panel_of::<S, B, 4>(&part),
                3 if S::LANES == 16 => panel_of::<S, B, 3>(&part),
                2 => panel_of::<S, B, 2>(&part),
                _ => panel_of::<S, B, 1>(&part),
            }
        }
        done += wide;
    }
}

#[inline(always)]
unsafe fn panel_of<S: Simd, B: SimdLoad, const N: usize>(p: &Product<B>) {
    let mut row = 0;
    // SAFETY: rows below `m` are valid by the caller's promise.
    unsafe {
        while p.m - row >= HEIGHT {
            block::<S, B, HEIGHT, N>(p, row);
            row += HEIGHT;
        }
        if p.m - row >= 4 {
            block::<S, B, 4, N>(p, row);
            row += 4;
        }
        if p.m - row >= 2 {
            block::<S, B, 2, N>(p, row);
            row += 2;
        }
        if p.m - row >= 1 {
            block::<S, B, 1, N>(p, row);
        }
    }
}

/// `M` rows of `N` vectors, held in registers over the whole inner dimension.
#[inline(always)]
unsafe fn block<S: Simd, B: SimdLoad, const M: usize, const N: usize>(p: &Product<B>, row: usize) {
    // SAFETY: the block lies in the product by the caller's promise.
    unsafe {
        let c = p.c.add(row * p.c_stride);
        let mut sums = [[S::splat(0.0); N]; M];
        match p.start {
            Start::Zero => {}
            Start::Sum => {
                for i in 0..M {
                    for j in 0..N {
                        sums[i][j] = S::load(c.add(i * p.c_stride + j * S::LANES));
                    }
                }
            }
            Start::Scaled(factors) => {
                for i in 0..M {
                    let factor = S::splat(*factors.add(row + i));
                    for j in 0..N {
                        sums[i][j] = S::load(c.add(i * p.c_stride + j * S::LANES)) * factor;
                    }
                }
            }
        }
        let (first, end) = match p.bounds {
            Bounds::Inner(parts) => cover(&parts[row..row + M]),
            _ => (0, p.k),
        };
        let mut a = p.a.add(row * p.a_row + first * p.a_step);
        let mut b = p.b.add(first * p.b_stride);
        for _ in first..end {
            let mut line = [S::splat(0.0); N];
            for j in 0..N {
                line[j] = B::load_vector::<S>(b.add(j * S::LANES));
            }
            for i in 0..M {
                let x = S::splat(*a.add(i * p.a_row));
                for j in 0..N {
                    sums[i][j] = x.fma(line[j], sums[i][j]);
                }
            }
            a = a.add(p.a_step);
            b = b.add(p.b_stride);
        }
        for i in 0..M {
            for j in 0..N {
                sums[i][j].store(c.add(i * p.c_stride + j * S::LANES));
            }
        }
    }
}
