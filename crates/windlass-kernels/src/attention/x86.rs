//! Transposition and products at each level of x86-64.

use std::arch::x86_64::*;

use super::forward::Scratch;
use super::paged::{Walk, walk};
use super::tile::{Product, Tiles, product};
use crate::simd::{Avx2, Avx512, SimdLoad};

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product_avx2<B: SimdLoad>(p: &Product<B>) {
    // SAFETY: the caller's promise.
    unsafe { product::<Avx2, B>(p) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn walk_avx2<B: SimdLoad>(w: &Walk<B>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { walk::<Avx2, B>(w, scratch) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn product_avx512<B: SimdLoad>(p: &Product<B>) {
    // SAFETY: the caller's promise.
    unsafe { product::<Avx512, B>(p) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn walk_avx512<B: SimdLoad>(w: &Walk<B>, scratch: &mut Scratch) {
    // SAFETY: the caller's promise.
    unsafe { walk::<Avx512, B>(w, scratch) }
}

impl Tiles for Avx2 {
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; 16]) {
        // SAFETY: the features are there by the caller's promise.
        unsafe {
            let mut x = [square[0].0; 8];
            for i in 0..8 {
                x[i] = square[i].0;
            }
            for i in (0..8).step_by(2) {
                (x[i], x[i + 1]) = (
                    _mm256_unpacklo_ps(x[i], x[i + 1]),
                    _mm256_unpackhi_ps(x[i], x[i + 1]),
                );
            }
            for i in [0, 4] {
                let [a, b, c, d] = [x[i], x[i + 1], x[i + 2], x[i + 3]];
                x[i] = _mm256_shuffle_ps::<0x44>(a, c);
                x[i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
                x[i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                x[i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
            }
            for i in 0..4 {
                square[i].0 = _mm256_permute2f128_ps::<0x20>(x[i], x[i + 4]);
                square[i + 4].0 = _mm256_permute2f128_ps::<0x31>(x[i], x[i + 4]);
            }
        }
    }

    #[inline(always)]
    unsafe fn product<B: SimdLoad>(p: &Product<B>) {
        // SAFETY: the caller's promise.
        unsafe { product_avx2(p) }
    }

    #[inline(always)]
    unsafe fn walk<B: SimdLoad>(w: &Walk<B>, scratch: &mut Scratch) {
        // SAFETY: the caller's promise.
        unsafe { walk_avx2(w, scratch) }
    }
}

impl Tiles for Avx512 {
    #[inline(always)]
    unsafe fn transpose(square: &mut [Self; 16]) {
        // SAFETY: the features are there by the caller's promise.
        unsafe {
            let mut x = [square[0].0; 16];
            for i in 0..16 {
                x[i] = square[i].0;
            }
            for i in (0..16).step_by(2) {
                (x[i], x[i + 1]) = (
                    _mm512_unpacklo_ps(x[i], x[i + 1]),
                    _mm512_unpackhi_ps(x[i], x[i + 1]),
                );
            }
            for i in [0, 4, 8, 12] {
                let [a, b, c, d] = [x[i], x[i + 1], x[i + 2], x[i + 3]];
                x[i] = _mm512_shuffle_ps::<0x44>(a, c);
                x[i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
                x[i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
                x[i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
            }
            // Now vector 4 g + i holds column i of rows 4 g .. 4 g + 4 in each quarter: transpose the quarters.
            for i in 0..4 {
                let [a, b, c, d] = [x[i], x[i + 4], x[i + 8], x[i + 12]];
                let low = _mm512_shuffle_f32x4::<0x44>(a, b);
                let high = _mm512_shuffle_f32x4::<0xee>(a, b);
                let low2 = _mm512_shuffle_f32x4::<0x44>(c, d);
                let high2 = _mm512_shuffle_f32x4::<0xee>(c, d);
                square[i].0 = _mm512_shuffle_f32x4::<0x88>(low, low2);
                square[i + 4].0 = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                square[i + 8].0 = _mm512_shuffle_f32x4::<0x88>(high, high2);
                square[i + 12].0 = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
        }
    }

    #[inline(always)]
    unsafe fn product<B: SimdLoad>(p: &Product<B>) {
        // SAFETY: the caller's promise.
        unsafe { product_avx512(p) }
    }

    #[inline(always)]
    unsafe fn walk<B: SimdLoad>(w: &Walk<B>, scratch: &mut Scratch) {
        // SAFETY: the caller's promise.
        unsafe { walk_avx512(w, scratch) }
    }
}
