//! Numbers as A and B of tile products: rounded to `bf16`, and two rows of stored ones beside each other.

use std::arch::x86_64::*;

use super::{LANES, STEP};
use crate::attention::forward::{Scratch, TileData};
use crate::attention::tile::{KEYS, prefetch};
use crate::simd::{Avx512, SimdLoad};
use half::bf16;

/// See [`seen`].
pub const SMALL: f32 = 1.0 / (1u64 << 50) as f32;

/// Stored numbers that are `bf16`, or become such without rounding.
pub trait Stored: SimdLoad {
    /// The pairs of two rows of 32 numbers, as B of a product has them.
    unsafe fn pairs(a: *const Self, b: *const Self) -> [__m512i; 2];
}

impl Stored for bf16 {
    #[inline(always)]
    unsafe fn pairs(a: *const Self, b: *const Self) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
            let (even, odd) = (_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b));
            let places = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            let behind = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            [
                _mm512_permutex2var_epi64(even, places, odd),
                _mm512_permutex2var_epi64(even, behind, odd),
            ]
        }
    }
}

impl Stored for i8 {
    #[inline(always)]
    unsafe fn pairs(a: *const Self, b: *const Self) -> [__m512i; 2] {
        // SAFETY: the caller's promise.
        unsafe {
            [0, LANES].map(|at| {
                let [a, b] = [a, b].map(|x| bits(x.add(at)));
                _mm512_or_si512(_mm512_srli_epi32::<16>(a), b)
            })
        }
    }
}

/// Numbers that are not taken for zero. The smallest ones are, and stored ones too, so that no product and no sum of products is
/// denormal: tiles take that for zero, vectors do not.
#[inline(always)]
pub unsafe fn seen(x: __m512) -> __mmask16 {
    // SAFETY: the features are there by the caller's promise.
    unsafe { _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(x), _mm512_set1_ps(SMALL)) }
}

/// Stores 32 numbers as `bf16`, or as `f32` of the same values.
#[inline(always)]
pub unsafe fn store(numbers: [__m512; 2], to: *mut f32, halves: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        let numbers = numbers.map(|x| {
            let half = _mm512_set1_epi32(0x8000);
            _mm512_maskz_add_epi32(seen(x), _mm512_castps_si512(x), half)
        });
        if halves {
            let odd: [u16; 32] = std::array::from_fn(|i| 2 * i as u16 + 1);
            let odd = _mm512_loadu_si512(odd.as_ptr().cast());
            let [a, b] = numbers;
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(a, odd, b));
            return;
        }
        for (i, x) in numbers.into_iter().enumerate() {
            let upper = _mm512_and_si512(x, _mm512_set1_epi32(!0xffff));
            _mm512_storeu_si512(to.add(i * LANES).cast(), upper);
        }
    }
}

/// Copies the keys of a tile to scratch, as B of a product: two rows beside each other.
#[inline(always)]
pub unsafe fn pack_keys<B: Stored>(
    [tile, next]: [&TileData<'_, B>; 2],
    keys: usize,
    d: usize,
    scratch: &mut Scratch,
) {
    let to = scratch.keys.as_mut_ptr();
    // SAFETY: a tile has `d` rows of `KEYS` keys; scratch has room for them.
    unsafe {
        for row in (0..d).step_by(2) {
            for column in (0..keys).step_by(STEP) {
                let from = tile.keys.add(row * KEYS + column);
                let ahead = next.keys.wrapping_add(row * KEYS + column);
                prefetch(ahead);
                prefetch(ahead.wrapping_add(KEYS));
                put(
                    B::pairs(from, from.add(KEYS)),
                    to.add(row / 2 * KEYS + column),
                );
            }
        }
    }
}

/// As [`pack_keys`] the values of a tile; those of missing keys are zeros.
#[inline(always)]
pub unsafe fn pack_values<B: Stored>(
    [tile, next]: [&TileData<'_, B>; 2],
    keys: usize,
    d: usize,
    scratch: &mut Scratch,
) {
    let to = scratch.values.as_mut_ptr();
    // SAFETY: a tile has `KEYS` rows of `d` values; scratch has room for them.
    unsafe {
        for row in (0..KEYS).step_by(2) {
            for column in (0..d).step_by(STEP) {
                let from = tile.values.add(row * d + column);
                let ahead = next.values.wrapping_add(row * d + column);
                prefetch(ahead);
                prefetch(ahead.wrapping_add(d));
                let mut pairs = [_mm512_setzero_si512(); 2];
                if row < keys {
                    pairs = B::pairs(from, from.add(d));
                }
                if row + 1 == keys {
                    pairs = pairs.map(|x| _mm512_and_si512(x, _mm512_set1_epi32(0xffff)));
                }
                put(pairs, to.add(row / 2 * d + column));
            }
        }
    }
}

/// Stores two vectors of pairs.
#[inline(always)]
unsafe fn put(pairs: [__m512i; 2], to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_storeu_si512(to.cast(), pairs[0]);
        _mm512_storeu_si512(to.add(LANES).cast(), pairs[1]);
    }
}

/// The bits of numbers as `f32`.
#[inline(always)]
unsafe fn bits<B: Stored>(from: *const B) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe { _mm512_castps_si512(B::load_vector::<Avx512>(from).0) }
}
