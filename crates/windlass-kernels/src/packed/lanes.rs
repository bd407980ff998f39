//! Eight or sixteen rows of a panel at once: the instructions that the packed kernel needs, for AVX2 and AVX-512 VNNI.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

/// Lanes of 32 bits, a row of the matrix each.
///
/// # Safety
/// Every function requires the CPU features of the implementation, and pointers valid for what it reads or writes.
pub(super) trait Lanes: Copy {
    /// Rows.
    const N: usize;
    /// Whether [`Lanes::dot`] of full bytes takes them as signed itself, so that no offset is subtracted.
    const SIGNED: bool;
    /// Integers.
    type I: Copy;
    /// Numbers.
    type F: Copy;

    /// Reads `4 N` bytes.
    unsafe fn bytes(from: *const u8) -> Self::I;
    /// `N` times the same integer.
    unsafe fn splat(value: i32) -> Self::I;
    /// Bits of all bytes shifted right by `BY` and masked.
    unsafe fn right<const BY: u32>(v: Self::I, mask: u8) -> Self::I;
    /// Bits of all bytes shifted left by `BY` and masked.
    unsafe fn left<const BY: u32>(v: Self::I, mask: u8) -> Self::I;
    /// Bitwise or.
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// A table of 16 bytes.
    unsafe fn table(from: &[i8; 16]) -> Self::I;
    /// The table's entry for each byte below 16, plus 128.
    unsafe fn lookup(table: Self::I, codes: Self::I) -> Self::I;
    /// Adds the products of four unsigned bytes with four signed ones (the same for all lanes). Of bytes from 128 on, the
    /// other form is needed.
    unsafe fn dot(sum: Self::I, codes: Self::I, activations: *const i8) -> Self::I;
    /// [`Lanes::dot`] for any bytes: less 128 each where [`Lanes::SIGNED`].
    unsafe fn dot_wide(sum: Self::I, codes: Self::I, activations: *const i8) -> Self::I;
    /// Adds `a b`, the lower halves of which are integers of 16 bits; the upper ones of `b` are zero.
    unsafe fn add_product(sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// Adds `a b`.
    unsafe fn add_wide_product(sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// Integers as numbers.
    unsafe fn number(v: Self::I) -> Self::F;
    /// The lower 16 bits of the nearest integers.
    unsafe fn nearest(v: Self::F) -> Self::I;
    /// The larger one of a magnitude and that of a number, where not a number is the largest.
    unsafe fn larger(magnitude: Self::F, v: Self::F) -> Self::F;
    /// The power of two, and its inverse, that [`align`](super::reference::align) finds for the largest scale.
    unsafe fn powers(largest: Self::F) -> (Self::F, Self::F);
    /// Zeros.
    unsafe fn zero() -> Self::F;
    /// The same number in all lanes.
    unsafe fn broadcast(from: *const f32) -> Self::F;
    /// Reads `N` numbers.
    unsafe fn load(from: *const f32) -> Self::F;
    /// Reads `N` numbers in 16 bits.
    unsafe fn halves(from: *const u8) -> Self::F;
    /// Reads `N` signed bytes.
    unsafe fn signed(from: *const u8) -> Self::I;
    /// Reads `N` unsigned bytes as numbers.
    unsafe fn unsigned(from: *const u8) -> Self::F;
    /// Reads `N` exponents: `2^(e - 128)`, zero below the normal numbers.
    unsafe fn exponents(from: *const u8) -> Self::F;
    /// `a b`.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `c - a b`, rounded once.
    unsafe fn fnma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Writes `N` numbers.
    unsafe fn store(v: Self::F, to: *mut f32);
}

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY (both implementations): the contract is the trait's.
impl Lanes for Avx2 {
    const N: usize = 8;
    const SIGNED: bool = true;
    type I = __m256i;
    type F = __m256;

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(value: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn right<const BY: u32>(v: __m256i, mask: u8) -> __m256i {
        unsafe {
            let by = _mm_cvtsi32_si128(BY as i32);
            _mm256_and_si256(_mm256_srl_epi16(v, by), _mm256_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    unsafe fn left<const BY: u32>(v: __m256i, mask: u8) -> __m256i {
        unsafe {
            let by = _mm_cvtsi32_si128(BY as i32);
            _mm256_and_si256(_mm256_sll_epi16(v, by), _mm256_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn table(from: &[i8; 16]) -> __m256i {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(from.as_ptr().cast()));
            _mm256_xor_si256(table, _mm256_set1_epi8(-128))
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: __m256i, codes: __m256i) -> __m256i {
        unsafe { _mm256_shuffle_epi8(table, codes) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m256i, codes: __m256i, activations: *const i8) -> __m256i {
        // Pairs stay below 2^15: codes are below 128, activations at most 127 in magnitude.
        unsafe {
            let a = _mm256_set1_epi32(activations.cast::<i32>().read_unaligned());
            let pairs = _mm256_maddubs_epi16(codes, a);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: __m256i, codes: __m256i, activations: *const i8) -> __m256i {
        unsafe {
            let a = _mm256_set1_epi32(activations.cast::<i32>().read_unaligned());
            let weights = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            let (weights, a) = (_mm256_abs_epi8(weights), _mm256_sign_epi8(a, weights));
            let pairs = _mm256_maddubs_epi16(weights, a);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
    #[inline(always)]
    unsafe fn add_product(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    unsafe fn add_wide_product(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_mullo_epi32(a, b)) }
    }
    #[inline(always)]
    unsafe fn nearest(v: __m256) -> __m256i {
        unsafe { _mm256_and_si256(_mm256_cvtps_epi32(v), _mm256_set1_epi32(0xffff)) }
    }
    #[inline(always)]
    unsafe fn larger(magnitude: __m256, v: __m256) -> __m256 {
        unsafe {
            let v = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(i32::MAX));
            _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(magnitude), v))
        }
    }
    #[inline(always)]
    unsafe fn powers(largest: __m256) -> (__m256, __m256) {
        unsafe {
            let exponent =
                _mm256_and_si256(_mm256_castps_si256(largest), _mm256_set1_epi32(0xff << 23));
            let exponent = _mm256_max_epi32(exponent, _mm256_set1_epi32((127 - 24) << 23));
            let power = _mm256_sub_epi32(exponent, _mm256_set1_epi32(11 << 23));
            let inverse = _mm256_sub_epi32(_mm256_set1_epi32(254 << 23), power);
            let (power, inverse) = (_mm256_castsi256_ps(power), _mm256_castsi256_ps(inverse));
            (
                _mm256_fmadd_ps(largest, _mm256_setzero_ps(), power),
                inverse,
            )
        }
    }
    #[inline(always)]
    unsafe fn number(v: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> __m256 {
        unsafe { _mm256_set1_ps(*from) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m256i {
        unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())) }
    }
    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn exponents(from: *const u8) -> __m256 {
        unsafe {
            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let e = _mm256_sub_epi32(
                _mm256_max_epi32(e, _mm256_set1_epi32(1)),
                _mm256_set1_epi32(1),
            );
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fnma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn store(v: __m256, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
}

/// AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub(super) struct Vnni;

impl Lanes for Vnni {
    const N: usize = 16;
    const SIGNED: bool = false;
    type I = __m512i;
    type F = __m512;

    #[inline(always)]
    unsafe fn bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn right<const BY: u32>(v: __m512i, mask: u8) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<BY>(v), _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    unsafe fn left<const BY: u32>(v: __m512i, mask: u8) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_slli_epi16::<BY>(v), _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn table(from: &[i8; 16]) -> __m512i {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(from.as_ptr().cast()));
            _mm512_xor_si512(table, _mm512_set1_epi8(-128))
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: __m512i, codes: __m512i) -> __m512i {
        unsafe { _mm512_shuffle_epi8(table, codes) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m512i, codes: __m512i, activations: *const i8) -> __m512i {
        unsafe {
            let a = _mm512_set1_epi32(activations.cast::<i32>().read_unaligned());
            _mm512_dpbusd_epi32(sum, codes, a)
        }
    }
    #[inline(always)]
    unsafe fn dot_wide(sum: __m512i, codes: __m512i, activations: *const i8) -> __m512i {
        unsafe { Self::dot(sum, codes, activations) }
    }
    #[inline(always)]
    unsafe fn add_product(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(sum, a, b) }
    }
    #[inline(always)]
    unsafe fn add_wide_product(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(sum, _mm512_mullo_epi32(a, b)) }
    }
    #[inline(always)]
    unsafe fn nearest(v: __m512) -> __m512i {
        unsafe { _mm512_and_si512(_mm512_cvtps_epi32(v), _mm512_set1_epi32(0xffff)) }
    }
    #[inline(always)]
    unsafe fn larger(magnitude: __m512, v: __m512) -> __m512 {
        unsafe {
            let v = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(magnitude), v))
        }
    }
    #[inline(always)]
    unsafe fn powers(largest: __m512) -> (__m512, __m512) {
        unsafe {
            let exponent =
                _mm512_and_si512(_mm512_castps_si512(largest), _mm512_set1_epi32(0xff << 23));
            let exponent = _mm512_max_epi32(exponent, _mm512_set1_epi32((127 - 24) << 23));
            let power = _mm512_sub_epi32(exponent, _mm512_set1_epi32(11 << 23));
            let inverse = _mm512_sub_epi32(_mm512_set1_epi32(254 << 23), power);
            let (power, inverse) = (_mm512_castsi512_ps(power), _mm512_castsi512_ps(inverse));
            (
                _mm512_fmadd_ps(largest, _mm512_setzero_ps(), power),
                inverse,
            )
        }
    }
    #[inline(always)]
    unsafe fn number(v: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn broadcast(from: *const f32) -> __m512 {
        unsafe { _mm512_set1_ps(*from) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn halves(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn signed(from: *const u8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn unsigned(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn exponents(from: *const u8) -> __m512 {
        unsafe {
            let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            let e = _mm512_sub_epi32(
                _mm512_max_epi32(e, _mm512_set1_epi32(1)),
                _mm512_set1_epi32(1),
            );
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(e))
        }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn fnma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn store(v: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, v) }
    }
}
