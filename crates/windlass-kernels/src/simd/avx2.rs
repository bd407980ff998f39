//! Eight lanes: AVX2, FMA and F16C.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use super::Simd;

/// Eight `f32` lanes.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(pub(crate) __m256);

/// The mask of the first `n` lanes.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn first(n: usize) -> __m256i {
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), lanes)
    }
}

/// The low 16 bits of each 32-bit lane.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn low_halves(x: __m256i) -> __m128i {
    unsafe {
        let x = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
        _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x))
    }
}

/// The `bf16` bits of each lane, rounded to nearest even.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn rounded_bf16(x: __m256) -> __m128i {
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        low_halves(_mm256_srli_epi32::<16>(_mm256_blendv_epi8(
            rounded, quiet, nan,
        )))
    }
}

/// Widens `bf16` bits.
///
/// # Safety
/// The CPU must have the features.
#[inline(always)]
unsafe fn widened(bits: __m128i) -> __m256 {
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
}

/// The entry of a table of 16 at each lane; anything where a lane is out of range.
///
/// # Safety
/// The CPU must have the features, the table 16 entries.
#[inline(always)]
unsafe fn lookup16(lanes: __m256, table: *const f32) -> Avx2 {
    unsafe {
        let index = _mm256_cvtps_epi32(lanes);
        let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
        let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table.add(8)), index);
        let upper = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(7));
        Avx2(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper)))
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type Mask = __m256;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Avx2(_mm256_set1_ps(value)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Avx2(_mm256_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn load_partial(from: *const f32, n: usize) -> Self {
        unsafe { Avx2(_mm256_maskload_ps(from, first(n))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32) {
        unsafe { _mm256_stream_ps(to, self.0) }
    }
    #[inline(always)]
    fn fence() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, n: usize) {
        unsafe { _mm256_maskstore_ps(to, first(n), self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        unsafe { Avx2(widened(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(from: *const bf16, n: usize) -> Self {
        // AVX2 has no masked load of 16-bit elements.
        let mut lanes = [0u16; 8];
        unsafe {
            std::ptr::copy_nonoverlapping(from.cast(), lanes.as_mut_ptr(), n.min(8));
            Avx2(widened(_mm_loadu_si128(lanes.as_ptr().cast())))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16) {
        unsafe { _mm_storeu_si128(to.cast(), rounded_bf16(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_partial(self, to: *mut bf16, n: usize) {
        let mut lanes = [0u16; 8];
        unsafe {
            _mm_storeu_si128(lanes.as_mut_ptr().cast(), rounded_bf16(self.0));
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to.cast(), n.min(8));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        unsafe { Avx2(_mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f16_partial(from: *const f16, n: usize) -> Self {
        let mut lanes = [f16::ZERO; 8];
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n.min(8));
            Self::load_f16(lanes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16) {
        unsafe {
            let bits = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(to.cast(), bits)
        }
    }
    #[inline(always)]
    unsafe fn store_f16_partial(self, to: *mut f16, n: usize) {
        let mut lanes = [f16::ZERO; 8];
        unsafe {
            self.store_f16(lanes.as_mut_ptr());
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n.min(8));
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe {
            let bytes = _mm_loadl_epi64(from.cast());
            Avx2(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        unsafe {
            let bytes = _mm_loadl_epi64(from.cast());
            Avx2(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        unsafe {
            let halves = low_halves(_mm256_cvtps_epi32(self.0));
            _mm_storel_epi64(to.cast(), _mm_packus_epi16(halves, halves))
        }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8) {
        unsafe {
            let halves = low_halves(_mm256_cvtps_epi32(self.0));
            _mm_storel_epi64(to.cast(), _mm_packs_epi16(halves, halves))
        }
    }
    #[inline(always)]
    unsafe fn load_split(hi: *const bf16, lo: *const i16) -> Self {
        unsafe {
            let hi = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(hi.cast())));
            let lo = _mm256_cvtepi16_epi32(_mm_loadu_si128(lo.cast()));
            Avx2(_mm256_castsi256_ps(_mm256_add_epi32(hi, lo)))
        }
    }
    #[inline(always)]
    unsafe fn store_split(self, hi: *mut bf16, lo: *mut i16) {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let up = _mm256_add_epi32(bits, _mm256_set1_epi32(0x8000));
            _mm_storeu_si128(hi.cast(), low_halves(_mm256_srli_epi32::<16>(up)));
            // The low halves of `bits` are the remainders: the high part has none.
            _mm_storeu_si128(lo.cast(), low_halves(bits));
        }
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    fn fnma(self, b: Self, c: Self) -> Self {
        unsafe { Avx2(_mm256_fnmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_max_ps(self.0, other.0)) }
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_min_ps(self.0, other.0)) }
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        unsafe { Avx2(_mm256_sqrt_ps(self.0)) }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        unsafe { Avx2(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)) }
    }
    #[inline(always)]
    fn with_sign_of(self, sign: Self) -> Self {
        unsafe {
            Avx2(_mm256_or_ps(
                self.0,
                _mm256_and_ps(sign.0, _mm256_set1_ps(-0.0)),
            ))
        }
    }
    #[inline(always)]
    fn round(self) -> Self {
        unsafe {
            Avx2(_mm256_round_ps::<
                { _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC },
            >(self.0))
        }
    }
    #[inline(always)]
    fn scale_by_power_of_two(self, n: Self) -> Self {
        unsafe {
            // Two factors, each a normal number; only the second product can round.
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
            Avx2(_mm256_mul_ps(
                _mm256_mul_ps(self.0, _mm256_castsi256_ps(a)),
                _mm256_castsi256_ps(b),
            ))
        }
    }
    #[inline(always)]
    fn exponent(self) -> Self {
        unsafe {
            let bits = _mm256_castps_si256(self.abs().0);
            let biased = _mm256_srli_epi32::<23>(bits);
            Avx2(_mm256_cvtepi32_ps(_mm256_sub_epi32(
                biased,
                _mm256_set1_epi32(127),
            )))
        }
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16]) -> Self {
        unsafe { lookup16(self.0, table.as_ptr()) }
    }
    #[inline(always)]
    fn lookup32(self, table: &[f32; 32]) -> Self {
        unsafe {
            let (low, high) = (
                lookup16(self.0, table.as_ptr()),
                lookup16((self - Self::splat(16.0)).0, table.as_ptr().add(16)),
            );
            Self::select(self.lt(Self::splat(16.0)), low, high)
        }
    }
    #[inline(always)]
    fn lt(self, other: Self) -> __m256 {
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0) }
    }
    #[inline(always)]
    unsafe fn first_lanes(n: usize) -> __m256 {
        unsafe { _mm256_castsi256_ps(first(n)) }
    }
    #[inline(always)]
    fn select(mask: __m256, yes: Self, no: Self) -> Self {
        unsafe { Avx2(_mm256_blendv_ps(no.0, yes.0, mask)) }
    }
    #[inline(always)]
    fn all_finite(self) -> bool {
        unsafe { _mm256_movemask_ps(self.abs().lt(Self::splat(f32::INFINITY))) == 0xff }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let x = _mm_add_ps(
                _mm256_castps256_ps128(self.0),
                _mm256_extractf128_ps::<1>(self.0),
            );
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn hmax(self) -> f32 {
        unsafe {
            let x = _mm_max_ps(
                _mm256_castps256_ps128(self.0),
                _mm256_extractf128_ps::<1>(self.0),
            );
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
}

impl Add for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_add_ps(self.0, other.0)) }
    }
}

impl Sub for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_sub_ps(self.0, other.0)) }
    }
}

impl Mul for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_mul_ps(self.0, other.0)) }
    }
}

impl Div for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { Avx2(_mm256_div_ps(self.0, other.0)) }
    }
}

impl Neg for Avx2 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        unsafe { Avx2(_mm256_xor_ps(self.0, _mm256_set1_ps(-0.0))) }
    }
}
