//! Numbers as A and B of tile products: rounded to `bf16`, and two rows of stored ones beside each other.

use std::arch::x86_64::*;

use super::{LANES, STEP};
use crate::attention::tile::prefetch;
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
                let [a, b] = [a, b].map(|x| {
                    let x = i8::load_vector::<Avx512>(x.add(at)).0;
                    _mm512_castps_si512(x)
                });
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

/// Copies rows to `to`, as B of a product: two beside each other. Those from `present` on are zeros.
/// `next` is what will be packed after them.
#[inline(always)]
pub unsafe fn pack<B: Stored>(
    [from, next]: [*const B; 2],
    stride: usize,
    [rows, present]: [usize; 2],
    columns: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        for row in (0..rows).step_by(2) {
            for column in (0..columns).step_by(STEP) {
                let at = row * stride + column;
                prefetch(next.wrapping_add(at));
                prefetch(next.wrapping_add(at + stride));
                let mut pairs = [_mm512_setzero_si512(); 2];
                if row < present {
                    pairs = B::pairs(from.add(at), from.add(at + stride));
                }
                if row + 1 == present {
                    pairs = pairs.map(|x| _mm512_and_si512(x, _mm512_set1_epi32(0xffff)));
                }
                let to = to.add(row / 2 * stride + column);
                _mm512_storeu_si512(to.cast(), pairs[0]);
                _mm512_storeu_si512(to.add(LANES).cast(), pairs[1]);
            }
        }
    }
}
