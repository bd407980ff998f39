//! Sixteen lanes: AVX-512 F, BW, VL and DQ.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::Simd;

/// Sixteen `f32` lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(pub(crate) __m512);

/// The mask of the first `n` lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    if n >= 16 { u16::MAX } else { (1u16 << n) - 1 }
}

/// The `bf16` bits of each lane, rounded to nearest even, as 32-bit integers.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn rounded_bf16(x: __m512) -> __m256i {
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let bits = _mm512_mask_blend_epi32(nan, rounded, quiet);
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits))
    }
}

/// The `f16` bits of each lane, rounded to nearest even.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn rounded_f16(x: __m512) -> __m256i {
    unsafe { _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
}

/// Widens `bf16` bits.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn widened(bits: __m256i) -> __m512 {
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    type Mask = __mmask16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx512(_mm512_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx512(_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, n: usize) -> Self {
        unsafe { Avx512(_mm512_maskz_loadu_ps(first(n), from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { _mm512_stream_ps(to, self.0) }
    }
    #[inline(always)]
    fn fence() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first(n), self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        unsafe { Avx512(widened(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(from: *const bf16, n: usize) -> Self {
        unsafe { Avx512(widened(_mm256_maskz_loadu_epi16(first(n), from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        unsafe { _mm256_storeu_si256(to.cast(), rounded_bf16(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_partial(self, to: *mut bf16, n: usize) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), first(n), rounded_bf16(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f16_partial(from: *const f16, n: usize) -> Self {
        unsafe {
            Avx512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(
                first(n),
                from.cast(),
            )))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16) {
        unsafe { _mm256_storeu_si256(to.cast(), rounded_f16(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_f16_partial(self, to: *mut f16, n: usize) {
        unsafe { _mm256_mask_storeu_epi16(to.cast(), first(n), rounded_f16(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Avx512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            Avx512(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0));
            _mm_storeu_si128(to.cast(), bytes)
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(self.0));
            _mm_storeu_si128(to.cast(), bytes)
        }
    }
    #[inline(always)]
    unsafe fn load_split(hi: *const bf16, lo: *const i16) -> Self {
        unsafe {
            let hi = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(hi.cast())));
            let lo = _mm512_cvtepi16_epi32(_mm256_loadu_si256(lo.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_add_epi32(hi, lo)))
        }
    }
    #[inline(always)]
    unsafe fn store_split(self, hi: *mut bf16, lo: *mut i16) {
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
            _mm256_storeu_si256(
                hi.cast(),
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(up)),
            );
            // The low halves of `bits` are the remainders: the high part has none.
            _mm256_storeu_si256(lo.cast(), _mm512_cvtepi32_epi16(bits));
        }
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        unsafe { Avx512(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    fn fnma(self, b: Self, c: Self) -> Self {
        unsafe { Avx512(_mm512_fnmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_max_ps(self.0, other.0)) }
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_min_ps(self.0, other.0)) }
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        unsafe { Avx512(_mm512_sqrt_ps(self.0)) }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        unsafe { Avx512(_mm512_abs_ps(self.0)) }
    }
    #[inline(always)]
    fn with_sign_of(self, sign: Self) -> Self {
        unsafe {
            Avx512(_mm512_or_ps(
                self.0,
                _mm512_and_ps(sign.0, _mm512_set1_ps(-0.0)),
            ))
        }
    }
    #[inline(always)]
    fn round(self) -> Self {
        unsafe {
            Avx512(_mm512_roundscale_ps::<
                { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
            >(self.0))
        }
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, n: Self) -> Self {
        unsafe { Avx512(_mm512_scalef_ps(self.0, n.0)) }
    }
    #[inline(always)]
    fn exponent(self) -> Self {
        unsafe { Avx512(_mm512_getexp_ps(self.0)) }
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16]) -> Self {
        unsafe {
            let table = _mm512_loadu_ps(table.as_ptr());
            Avx512(_mm512_permutexvar_ps(_mm512_cvtps_epi32(self.0), table))
        }
    }
    #[inline(always)]
    fn lookup32(self, table: &[f32; 32]) -> Self {
        unsafe {
            let index = _mm512_cvtps_epi32(self.0);
            let low = _mm512_loadu_ps(table.as_ptr());
            let high = _mm512_loadu_ps(table.as_ptr().add(16));
            Avx512(_mm512_permutex2var_ps(low, index, high))
        }
    }
    #[inline(always)]
    fn lt(self, other: Self) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) }
    }
    #[inline(always)]
    unsafe fn first_lanes(n: usize) -> __mmask16 {
        first(n)
    }
    #[inline(always)]
    fn select(mask: __mmask16, yes: Self, no: Self) -> Self {
        unsafe { Avx512(_mm512_mask_blend_ps(mask, no.0, yes.0)) }
    }
    #[inline(always)]
    fn all_finite(self) -> bool {
        unsafe {
            let size = _mm512_abs_ps(self.0);
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(size, _mm512_set1_ps(f32::INFINITY)) == u16::MAX
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let x = _mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn hmax(self) -> f32 {
        unsafe {
            let x = _mm256_max_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
}

impl Add for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
    }
}

impl Sub for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_sub_ps(self.0, other.0)) }
    }
}

impl Mul for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
    }
}

impl Div for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { Avx512(_mm512_div_ps(self.0, other.0)) }
    }
}

impl Neg for Avx512 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        unsafe { Avx512(_mm512_xor_ps(self.0, _mm512_set1_ps(-0.0))) }
    }
}
