//! The loops of memory-bound kernels, written once: whole vectors, then one partial vector.
//!
//! A kernel is a struct of pointers and constants with one method that handles the vector at an index, generic over
//! the vector type and over [`Width`] (a whole vector or the first lanes of one).

use half::bf16;

use crate::simd::{Simd, SimdElement};

/// How much of a vector is in range.
///
/// # Safety
/// As for [`Simd`]: pointers are valid for the lanes in range.
pub(crate) trait Width: Copy {
    /// Reads the lanes in range; the others are zero.
    unsafe fn load<S: Simd, E: SimdElement>(self, from: *const E) -> S;
    /// Writes the lanes in range.
    unsafe fn store<S: Simd, E: SimdElement>(self, to: *mut E, value: S);
    /// Reads split masters.
    unsafe fn load_split<S: Simd>(self, hi: *const bf16, lo: *const i16) -> S;
    /// Writes split masters.
    unsafe fn store_split<S: Simd>(self, hi: *mut bf16, lo: *mut i16, value: S);
    /// `new` in the lanes in range, `old` in the others.
    unsafe fn keep<S: Simd>(self, new: S, old: S) -> S;
}

/// All lanes.
#[derive(Clone, Copy)]
pub(crate) struct Whole;

/// The first lanes.
#[derive(Clone, Copy)]
pub(crate) struct First(pub usize);

// SAFETY (both implementations): the methods' contract is that of what they call.
impl Width for Whole {
    #[inline(always)]
    unsafe fn load<S: Simd, E: SimdElement>(self, from: *const E) -> S {
        unsafe { E::load_vector(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, E: SimdElement>(self, to: *mut E, value: S) {
        unsafe { E::store_vector(to, value) }
    }
    #[inline(always)]
    unsafe fn load_split<S: Simd>(self, hi: *const bf16, lo: *const i16) -> S {
        unsafe { S::load_split(hi, lo) }
    }
    #[inline(always)]
    unsafe fn store_split<S: Simd>(self, hi: *mut bf16, lo: *mut i16, value: S) {
        unsafe { value.store_split(hi, lo) }
    }
    #[inline(always)]
    unsafe fn keep<S: Simd>(self, new: S, _old: S) -> S {
        new
    }
}

/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

impl Width for First {
    #[inline(always)]
    unsafe fn load<S: Simd, E: SimdElement>(self, from: *const E) -> S {
        unsafe { E::load_vector_partial(from, self.0) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, E: SimdElement>(self, to: *mut E, value: S) {
        unsafe { E::store_vector_partial(to, value, self.0) }
    }
    #[inline(always)]
    unsafe fn load_split<S: Simd>(self, hi: *const bf16, lo: *const i16) -> S {
        let (mut his, mut los) = ([bf16::ZERO; MAX_LANES], [0i16; MAX_LANES]);
        unsafe {
            std::ptr::copy_nonoverlapping(hi, his.as_mut_ptr(), self.0);
            std::ptr::copy_nonoverlapping(lo, los.as_mut_ptr(), self.0);
            S::load_split(his.as_ptr(), los.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_split<S: Simd>(self, hi: *mut bf16, lo: *mut i16, value: S) {
        let (mut his, mut los) = ([bf16::ZERO; MAX_LANES], [0i16; MAX_LANES]);
        unsafe {
            value.store_split(his.as_mut_ptr(), los.as_mut_ptr());
            std::ptr::copy_nonoverlapping(his.as_ptr(), hi, self.0);
            std::ptr::copy_nonoverlapping(los.as_ptr(), lo, self.0);
        }
    }
    #[inline(always)]
    unsafe fn keep<S: Simd>(self, new: S, old: S) -> S {
        unsafe { S::select(S::first_lanes(self.0), new, old) }
    }
}

/// What a kernel does with the vectors at index `i` of its streams.
pub(crate) trait Step {
    /// # Safety
    /// The streams hold `i..i + LANES`, or the lanes in range.
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W);
}

/// Steps over `0..len`.
///
/// # Safety
/// The streams of `op` hold `len` elements, and the CPU has the features of `S`.
#[inline(always)]
pub(crate) unsafe fn stream<S: Simd>(len: usize, op: impl Step) {
    let mut i = 0;
    unsafe {
        while i + 2 * S::LANES <= len {
            op.step::<S, _>(i, Whole);
            op.step::<S, _>(i + S::LANES, Whole);
            i += 2 * S::LANES;
        }
        if i + S::LANES <= len {
            op.step::<S, _>(i, Whole);
            i += S::LANES;
        }
        if i < len {
            op.step::<S, _>(i, First(len - i));
        }
    }
}

/// How a kernel takes the vectors at index `i` of its streams into `K` running results.
pub(crate) trait Fold<const K: usize> {
    /// Every result starts from this.
    const START: f32 = 0.0;
    /// # Safety
    /// As [`Step::step`].
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, held: [S; K]) -> [S; K];
    /// Joins two results.
    #[inline(always)]
    fn join<S: Simd>(a: S, b: S) -> S {
        a + b
    }
}

/// Folds `0..len` in four interleaved runs, joined in a fixed order; the lanes are left to the caller to join.
///
/// # Safety
/// As [`stream`].
#[inline(always)]
pub(crate) unsafe fn fold<S: Simd, const K: usize, F: Fold<K>>(len: usize, op: F) -> [S; K] {
    unsafe {
        let mut runs = [[S::splat(F::START); K]; 4];
        let mut i = 0;
        while i + 4 * S::LANES <= len {
            runs[0] = op.step(i, Whole, runs[0]);
            runs[1] = op.step(i + S::LANES, Whole, runs[1]);
            runs[2] = op.step(i + 2 * S::LANES, Whole, runs[2]);
            runs[3] = op.step(i + 3 * S::LANES, Whole, runs[3]);
            i += 4 * S::LANES;
        }
        while i + S::LANES <= len {
            runs[0] = op.step(i, Whole, runs[0]);
            i += S::LANES;
        }
        if i < len {
            let width = First(len - i);
            let new = op.step(i, width, runs[1]);
            let mut k = 0;
            while k < K {
                runs[1][k] = width.keep(new[k], runs[1][k]);
                k += 1;
            }
        }
        let mut result = runs[0];
        let mut k = 0;
        while k < K {
            result[k] = F::join(
                F::join(runs[0][k], runs[1][k]),
                F::join(runs[2][k], runs[3][k]),
            );
            k += 1;
        }
        result
    }
}

/// What a kernel adds to `K` sums of a column, row by row.
pub(crate) trait Column<const K: usize> {
    /// The terms of row `r` for the vector at column `c`, added to `held`.
    ///
    /// # Safety
    /// As [`Step::step`], with `c` in place of `i`.
    unsafe fn step<S: Simd, W: Width>(&self, r: usize, c: usize, width: W, held: [S; K]) -> [S; K];
    /// The address of row `r`, column `c` in each matrix read, to fetch ahead; any number may be given.
    fn address(&self, r: usize, c: usize) -> [*const u8; 2];
}

/// Rows fetched ahead: strides beyond a page are not predicted by the hardware.
const AHEAD: usize = 8;

/// Adds the terms of `rows` rows, in order, to the sums of columns `0..cols`.
///
/// # Safety
/// The matrices of `op` hold `rows` rows and the columns; `sums` are valid for `cols` numbers each.
#[inline(always)]
pub(crate) unsafe fn columns<S: Simd, const K: usize>(
    rows: usize,
    cols: usize,
    sums: [*mut f32; K],
    op: impl Column<K>,
) {
    unsafe {
        let mut c = 0;
        while c + 4 * S::LANES <= cols {
            column_group::<S, _, K, 4>(rows, c, sums, &op, Whole);
            c += 4 * S::LANES;
        }
        while c + S::LANES <= cols {
            column_group::<S, _, K, 1>(rows, c, sums, &op, Whole);
            c += S::LANES;
        }
        if c < cols {
            column_group::<S, _, K, 1>(rows, c, sums, &op, First(cols - c));
        }
    }
}

/// `V` neighboring vectors of columns, their sums in registers.
///
/// # Safety
/// As [`columns`].
#[inline(always)]
unsafe fn column_group<S: Simd, W: Width, const K: usize, const V: usize>(
    rows: usize,
    start: usize,
    sums: [*mut f32; K],
    op: &impl Column<K>,
    width: W,
) {
    unsafe {
        let mut held = [[S::splat(0.0); K]; V];
        for (v, held) in held.iter_mut().enumerate() {
            for (held, sum) in held.iter_mut().zip(sums) {
                *held = width.load(sum.add(start + v * S::LANES).cast_const());
            }
        }
        for r in 0..rows {
            let ahead = (r + AHEAD).min(rows - 1);
            for address in op.address(ahead, start) {
                prefetch(address);
                prefetch(address.wrapping_add(V * S::LANES * 2 - 1));
            }
            for (v, held) in held.iter_mut().enumerate() {
                *held = op.step(r, start + v * S::LANES, width, *held);
            }
        }
        for (v, held) in held.iter().enumerate() {
            for (held, sum) in held.iter().zip(sums) {
                width.store(sum.add(start + v * S::LANES), *held);
            }
        }
    }
}

/// Asks for a cache line; a hint, any address will do.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of the architecture; the instruction never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
