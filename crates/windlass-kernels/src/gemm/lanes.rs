//! The few vector operations that packing and micro-kernels need beyond [`crate::simd::Simd`]: transposition, pairs of
//! `bf16` in 32-bit words, and the product step of a kernel.

use std::arch::x86_64::*;

use half::{bf16, f16};

use crate::simd::{Avx2, Avx512, Simd};

/// A vector of 32-bit words and the product step of a micro-kernel.
///
/// # Safety
/// Every function requires the CPU features of the implementation; pointers must be valid for the elements named.
pub(super) trait Lanes: Copy {
    /// Words in a vector.
    const N: usize;
    /// The vector.
    type V: Copy;

    unsafe fn zero() -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// One word in every lane.
    unsafe fn broadcast(from: *const f32) -> Self::V;
    /// `c + a b` in every lane: one product of `f32`, or two of `bf16` pairs.
    unsafe fn step(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of two vectors of `f32`.
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;

    /// The first `n` words, zeros after.
    unsafe fn load_partial(from: *const f32, n: usize) -> Self::V;
    /// The first `n` of `2 N` `bf16`, zeros after: two in a word.
    unsafe fn load_pairs(from: *const bf16, n: usize) -> Self::V;
    /// The first `n` of `N` `bf16` widened to `f32`, zeros after.
    unsafe fn load_widened(from: *const bf16, n: usize) -> Self::V;
    /// The first `n` of `N` `f16` widened to `f32`, zeros after.
    unsafe fn load_half(from: *const f16, n: usize) -> Self::V;
    /// The lower `bf16` of every word as `f32`.
    unsafe fn low(v: Self::V) -> Self::V;
    /// The upper `bf16` of every word as `f32`.
    unsafe fn high(v: Self::V) -> Self::V;
    /// The inverse of [`Lanes::low`] and [`Lanes::high`].
    unsafe fn pair(low: Self::V, high: Self::V) -> Self::V;
    /// Transposes the first `N` vectors as a square matrix.
    unsafe fn transpose(rows: &mut [Self::V; 16]);
}

/// AVX2: eight lanes, `f32` products.
#[derive(Clone, Copy)]
pub(super) struct Lanes8;
/// AVX-512: sixteen lanes, `f32` products.
#[derive(Clone, Copy)]
pub(super) struct Lanes16;
/// AVX-512 BF16: sixteen lanes, products of `bf16` pairs.
#[derive(Clone, Copy)]
pub(super) struct Pairs16;

impl Lanes for Lanes8 {
    const N: usize = 8;
    type V = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> __m256 {
        unsafe { _mm256_broadcast_ss(&*from) }
    }
    #[inline(always)]
    unsafe fn step(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, n: usize) -> __m256 {
        if n >= 8 {
            return unsafe { _mm256_loadu_ps(from) };
        }
        let mut words = [0f32; 8];
        unsafe {
            std::ptr::copy_nonoverlapping(from, words.as_mut_ptr(), n);
            _mm256_loadu_ps(words.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const bf16, n: usize) -> __m256 {
        if n >= 16 {
            return unsafe { _mm256_loadu_ps(from.cast()) };
        }
        let mut halves = [bf16::ZERO; 16];
        unsafe {
            std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr(), n);
            _mm256_loadu_ps(halves.as_ptr().cast())
        }
    }
    #[inline(always)]
    unsafe fn load_widened(from: *const bf16, n: usize) -> __m256 {
        let mut halves = [bf16::ZERO; 8];
        let from = if n >= 8 {
            from
        } else {
            unsafe { std::ptr::copy_nonoverlapping(from, halves.as_mut_ptr(), n) };
            halves.as_ptr()
        };
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_half(from: *const f16, n: usize) -> __m256 {
        unsafe {
            if n >= 8 {
                Avx2::load_f16(from).0
            } else {
                Avx2::load_f16_partial(from, n).0
            }
        }
    }
    #[inline(always)]
    unsafe fn low(v: __m256) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(v))) }
    }
    #[inline(always)]
    unsafe fn high(v: __m256) -> __m256 {
        unsafe {
            let mask = _mm256_set1_epi32(0xffff_0000u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v), mask))
        }
    }
    #[inline(always)]
    unsafe fn pair(low: __m256, high: __m256) -> __m256 {
        unsafe {
            let low = _mm256_srli_epi32::<16>(_mm256_castps_si256(low));
            _mm256_castsi256_ps(_mm256_or_si256(low, _mm256_castps_si256(high)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(r: &mut [__m256; 16]) {
        unsafe {
            let mut u = [_mm256_setzero_ps(); 8];
            for g in [0, 4] {
                let (a, b) = (
                    _mm256_unpacklo_ps(r[g], r[g + 1]),
                    _mm256_unpackhi_ps(r[g], r[g + 1]),
                );
                let (c, d) = (
                    _mm256_unpacklo_ps(r[g + 2], r[g + 3]),
                    _mm256_unpackhi_ps(r[g + 2], r[g + 3]),
                );
                u[g] = _mm256_shuffle_ps::<0x44>(a, c);
                u[g + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                u[g + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                u[g + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for j in 0..4 {
                r[j] = _mm256_permute2f128_ps::<0x20>(u[j], u[4 + j]);
                r[4 + j] = _mm256_permute2f128_ps::<0x31>(u[j], u[4 + j]);
            }
        }
    }
}

/// The sixteen lanes' operations, which differ in the product step only.
macro_rules! sixteen_lanes {
    ($name:ty, |$a:ident, $b:ident, $c:ident| $step:expr) => {
        impl Lanes for $name {
            const N: usize = 16;
            type V = __m512;

            #[inline(always)]
            unsafe fn zero() -> __m512 {
                unsafe { _mm512_setzero_ps() }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, v: __m512) {
                unsafe { _mm512_storeu_ps(to, v) }
            }
            #[inline(always)]
            unsafe fn broadcast(from: *const f32) -> __m512 {
                unsafe { _mm512_set1_ps(*from) }
            }
            #[inline(always)]
            unsafe fn step($a: __m512, $b: __m512, $c: __m512) -> __m512 {
                unsafe { $step }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn load_partial(from: *const f32, n: usize) -> __m512 {
                let mask = if n >= 16 { u16::MAX } else { (1 << n) - 1 };
                unsafe { _mm512_maskz_loadu_ps(mask, from) }
            }
            #[inline(always)]
            unsafe fn load_pairs(from: *const bf16, n: usize) -> __m512 {
                let mask = if n >= 32 { u32::MAX } else { (1 << n) - 1 };
                unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from.cast())) }
            }
            #[inline(always)]
            unsafe fn load_widened(from: *const bf16, n: usize) -> __m512 {
                let mask = if n >= 16 { u16::MAX } else { (1 << n) - 1 };
                unsafe {
                    let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
            #[inline(always)]
            unsafe fn load_half(from: *const f16, n: usize) -> __m512 {
                unsafe { Avx512::load_f16_partial(from, n).0 }
            }
            #[inline(always)]
            unsafe fn low(v: __m512) -> __m512 {
                unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(v))) }
            }
            #[inline(always)]
            unsafe fn high(v: __m512) -> __m512 {
                unsafe {
                    let mask = _mm512_set1_epi32(0xffff_0000u32 as i32);
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), mask))
                }
            }
            #[inline(always)]
            unsafe fn pair(low: __m512, high: __m512) -> __m512 {
                unsafe {
                    let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
                    _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(high)))
                }
            }
            #[inline(always)]
            unsafe fn transpose(rows: &mut [__m512; 16]) {
                unsafe { transpose16(rows) }
            }
        }
    };
}
sixteen_lanes!(Lanes16, |a, b, c| _mm512_fmadd_ps(a, b, c));
sixteen_lanes!(Pairs16, |a, b, c| dot_pairs(a, b, c));

#[inline(always)]
unsafe fn dot_pairs(a: __m512, b: __m512, c: __m512) -> __m512 {
    // SAFETY: both are 64 bytes of plain bits; the CPU has AVX512-BF16 by `Pairs16`'s contract.
    unsafe {
        _mm512_dpbf16_ps(
            c,
            std::mem::transmute::<__m512, __m512bh>(a),
            std::mem::transmute::<__m512, __m512bh>(b),
        )
    }
}

/// Pairs of rows, pairs of pairs, then the 128-bit blocks.
#[inline(always)]
unsafe fn transpose16(r: &mut [__m512; 16]) {
    unsafe {
        let mut u = [_mm512_setzero_ps(); 16];
        for g in [0, 4, 8, 12] {
            let (a, b) = (
                _mm512_unpacklo_ps(r[g], r[g + 1]),
                _mm512_unpackhi_ps(r[g], r[g + 1]),
            );
            let (c, d) = (
                _mm512_unpacklo_ps(r[g + 2], r[g + 3]),
                _mm512_unpackhi_ps(r[g + 2], r[g + 3]),
            );
            u[g] = _mm512_shuffle_ps::<0x44>(a, c);
            u[g + 1] = _mm512_shuffle_ps::<0xee>(a, c);
            u[g + 2] = _mm512_shuffle_ps::<0x44>(b, d);
            u[g + 3] = _mm512_shuffle_ps::<0xee>(b, d);
        }
        for j in 0..4 {
            let even = _mm512_shuffle_f32x4::<0x88>(u[j], u[4 + j]);
            let odd = _mm512_shuffle_f32x4::<0xdd>(u[j], u[4 + j]);
            let even2 = _mm512_shuffle_f32x4::<0x88>(u[8 + j], u[12 + j]);
            let odd2 = _mm512_shuffle_f32x4::<0xdd>(u[8 + j], u[12 + j]);
            r[j] = _mm512_shuffle_f32x4::<0x88>(even, even2);
            r[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even, even2);
            r[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
            r[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd, odd2);
        }
    }
}
