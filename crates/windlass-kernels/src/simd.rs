//! One vector of `f32` lanes, so that a kernel body is written once and compiled for every instruction set.
//!
//! A body is an `#[inline(always)] unsafe fn body<S: Simd, E: SimdElement>(…)`, instantiated in small wrappers marked
//! `#[target_feature(enable = "avx2,fma,f16c")]` and `#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]`.
//! Closures do not inherit the forced inlining and are avoided in hot loops.
//!
//! The contract is carried by values: the functions that make a vector from something else are `unsafe` (the CPU must
//! have the features, pointers must be valid); whoever holds a vector has the features, so arithmetic is safe.
//!
//! This module holds no kernels and knows nothing of dispatch.

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::{bf16, f16};

use crate::element::Element;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;

/// One vector of [`Simd::LANES`] `f32` lanes.
///
/// # Safety
/// Every `unsafe` function requires that the CPU has the features of the implementation (AVX2, FMA and F16C, or AVX-512 F,
/// BW, VL and DQ). Pointers must be valid for `LANES` elements, or for the first `n` in the `_partial` forms; they need no
/// alignment. `n` larger than `LANES` counts as `LANES`.
#[expect(
    clippy::missing_safety_doc,
    reason = "one contract, stated on the trait"
)]
pub trait Simd:
    Copy
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// Lanes of one vector.
    const LANES: usize;
    /// The result of a comparison, for [`Simd::select`].
    type Mask: Copy;

    /// The same number in every lane.
    unsafe fn splat(value: f32) -> Self;
    /// Reads `LANES` numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads the first `n` numbers; the other lanes are zero.
    unsafe fn load_partial(from: *const f32, n: usize) -> Self;
    /// Writes `LANES` numbers.
    unsafe fn store(self, to: *mut f32);
    /// Writes the first `n` lanes.
    unsafe fn store_partial(self, to: *mut f32, n: usize);
    /// Writes `LANES` numbers past the caches, to an address that is a multiple of their size. Other threads may read them
    /// after a [`Simd::fence`].
    unsafe fn stream(self, to: *mut f32);
    /// What was streamed is seen before what is written from here on.
    fn fence();
    /// Reads `LANES` `bf16` numbers, widened exactly.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Reads the first `n` `bf16` numbers; the other lanes are zero.
    unsafe fn load_bf16_partial(from: *const bf16, n: usize) -> Self;
    /// Writes `LANES` numbers as `bf16`, rounded to nearest even; NaN stays NaN.
    unsafe fn store_bf16(self, to: *mut bf16);
    /// Writes the first `n` lanes as `bf16`.
    unsafe fn store_bf16_partial(self, to: *mut bf16, n: usize);
    /// Reads `LANES` `f16` numbers, widened exactly.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Reads the first `n` `f16` numbers; the other lanes are zero.
    unsafe fn load_f16_partial(from: *const f16, n: usize) -> Self;
    /// Writes `LANES` numbers as `f16`, rounded to nearest even; NaN stays NaN, too large numbers become infinite.
    unsafe fn store_f16(self, to: *mut f16);
    /// Writes the first `n` lanes as `f16`.
    unsafe fn store_f16_partial(self, to: *mut f16, n: usize);
    /// Reads `LANES` bytes as the numbers -128 to 127.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Reads `LANES` bytes as the numbers 0 to 255.
    unsafe fn load_u8(from: *const u8) -> Self;
    /// Writes whole numbers of 0 to 255 as bytes.
    unsafe fn store_u8(self, to: *mut u8);
    /// Writes whole numbers of -128 to 127 as bytes.
    unsafe fn store_i8(self, to: *mut i8);
    /// Reads `LANES` numbers kept as `bf16` and an exact remainder (see [`crate::split::join`]).
    unsafe fn load_split(hi: *const bf16, lo: *const i16) -> Self;
    /// Writes `LANES` numbers as `bf16` and an exact remainder (see [`crate::split::split`]).
    unsafe fn store_split(self, hi: *mut bf16, lo: *mut i16);

    /// `self * b + c`, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn fnma(self, b: Self, c: Self) -> Self;
    /// The larger number of each lane; `other`'s lane where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller number of each lane; `other`'s lane where either is NaN.
    fn min(self, other: Self) -> Self;
    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The magnitude of `self` (assumed non-negative) with the sign of `sign`, zeros included.
    fn with_sign_of(self, sign: Self) -> Self;
    /// The nearest whole number, ties to even.
    fn round(self) -> Self;
    /// `self * 2^n` for whole `n` in `-252..=254`, rounded once.
    fn scale_by_power_of_two(self, n: Self) -> Self;
    /// The exponent of the first bit: `floor(log2 |self|)` of a normal number.
    fn exponent(self) -> Self;
    /// The table's entry at each lane, a whole number of 0 to 15.
    fn lookup(self, table: &[f32; 16]) -> Self;
    /// The table's entry at each lane, a whole number of 0 to 31.
    fn lookup32(self, table: &[f32; 32]) -> Self;
    /// Lanes where `self < other` (false on NaN).
    fn lt(self, other: Self) -> Self::Mask;
    /// The first `n` lanes.
    unsafe fn first_lanes(n: usize) -> Self::Mask;
    /// `yes` where the mask is set, `no` elsewhere.
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
    /// `true` where every lane is finite.
    fn all_finite(self) -> bool;
    /// The sum of the lanes, in a fixed tree: halves are added until one lane is left.
    fn sum(self) -> f32;
    /// The largest lane; unspecified where a lane is NaN.
    fn hmax(self) -> f32;

    /// `e^self`, within 1 ulp; 0 and ∞ where out of range, NaN stays NaN.
    ///
    /// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`, a degree 6 minimax polynomial in `r`, and an exact scaling by `2^n`.
    #[inline(always)]
    fn exp(self) -> Self {
        let (n, r) = reduce_by_ln2(self, -104.0, 89.0);
        // SAFETY: `self` exists, so the CPU has the features.
        let one = unsafe { Self::splat(1.0) };
        (exp_m1_poly(r) + one).scale_by_power_of_two(n)
    }

    /// [`Simd::exp`], 0 where it would be less than a normal number.
    ///
    /// Processors need some hundred cycles for each vector with a denormal result, and masked scores are -∞.
    #[inline(always)]
    fn exp_or_zero(self) -> Self {
        // SAFETY: `self` exists, so the CPU has the features.
        self.exp_above(unsafe { Self::splat(-87.0) })
    }

    /// [`Simd::exp`], 0 below `floor`, which is at least -87.
    #[inline(always)]
    fn exp_above(self, floor: Self) -> Self {
        // SAFETY: `self` exists, so the CPU has the features.
        let zero = unsafe { Self::splat(0.0) };
        Self::select(self.lt(floor), zero, floor.max(self).exp())
    }

    /// `e^self - 1`, within 2 ulp, also near zero; saturates at -1 and ∞, NaN stays NaN.
    #[inline(always)]
    fn exp_m1(self) -> Self {
        let (n, r) = reduce_by_ln2(self, -30.0, 89.0);
        // SAFETY: `self` exists, so the CPU has the features.
        let (two, half) = unsafe { (Self::splat(2.0), Self::splat(0.5)) };
        // Half of 2^n, so that n = 128 (the last binade) does not overflow before the end.
        let scale = half.scale_by_power_of_two(n);
        exp_m1_poly(r).fma(scale, scale - half) * two
    }

    /// Hyperbolic tangent, within 3 ulp; NaN stays NaN.
    #[inline(always)]
    fn tanh(self) -> Self {
        // SAFETY: `self` exists, so the CPU has the features.
        let (two, limit) = unsafe { (Self::splat(2.0), Self::splat(20.0)) };
        let e = limit.min(self.abs() * two).exp_m1();
        (e / (e + two)).with_sign_of(self)
    }

    /// `1 / (1 + e^-self)`, within 3 ulp (0 below about -88); NaN stays NaN.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        // SAFETY: `self` exists, so the CPU has the features.
        let one = unsafe { Self::splat(1.0) };
        one / (one + (-self).exp_or_zero())
    }

    /// The error function, within 3 ulp; NaN stays NaN.
    ///
    /// An odd minimax polynomial below 1, `1 - e^-q(x)` with a minimax `q` above.
    #[inline(always)]
    fn erf(self) -> Self {
        // SAFETY: `self` exists, so the CPU has the features.
        let (one, limit) = unsafe { (Self::splat(1.0), Self::splat(4.0)) };
        let a = limit.min(self.abs());
        let small = a * polynomial(a * a, &ERF_SMALL);
        let large = one - polynomial(a, &ERFC_LN).exp();
        Self::select(a.lt(one), small, large).with_sign_of(self)
    }
}

/// `erf(x) / x` in powers of `x²`, for `|x| < 1` (minimax by Remez exchange, relative error 1.2e-9).
const ERF_SMALL: [f32; 7] = [
    std::f32::consts::FRAC_2_SQRT_PI,
    -0.376_126_26,
    0.112_835_85,
    -0.026_853_812,
    0.005_188_328,
    -0.000_801_019_7,
    0.000_078_538_71,
];

/// `ln(1 - erf(x))` in powers of `x`, for `1 ≤ x ≤ 4` (minimax by Remez exchange, 1.1e-9 of the result).
const ERFC_LN: [f32; 7] = [
    -0.000_341_526,
    -1.127_089_2,
    -0.638_144_85,
    -0.103_106_74,
    0.021_838_056,
    -0.002_947_656_4,
    0.000_186_379,
];

/// `(e^r - 1 - r) / r²` in powers of `r`, for `|r| ≤ ln 2 / 2` (minimax by Remez exchange, relative error 3.1e-9 of `e^r`).
const EXP: [f32; 5] = [
    0.499_999_93,
    0.166_665_21,
    0.041_668_39,
    0.008_368_717,
    0.001_381_459_8,
];

/// Horner's scheme; coefficients from the constant term up.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(x: S, coefficients: &[f32; N]) -> S {
    // SAFETY: `x` exists, so the CPU has the features.
    unsafe {
        let mut y = S::splat(coefficients[N - 1]);
        let mut i = N - 1;
        while i > 0 {
            i -= 1;
            y = y.fma(x, S::splat(coefficients[i]));
        }
        y
    }
}

/// `e^r - 1` for `|r| ≤ ln 2 / 2`.
#[inline(always)]
fn exp_m1_poly<S: Simd>(r: S) -> S {
    polynomial(r, &EXP).fma(r * r, r)
}

/// Clamps `x` and writes it as `n ln 2 + r`, `|r| ≤ ln 2 / 2`, with `n` whole.
#[inline(always)]
fn reduce_by_ln2<S: Simd>(x: S, low: f32, high: f32) -> (S, S) {
    // ln 2 in two parts; the first has 12 trailing zero bits, so that its product with n is exact.
    const LN2_HI: f32 = 0.693_115_23;
    const LN2_LO: f32 = 3.194_618_4e-5;
    // SAFETY: `x` exists, so the CPU has the features.
    unsafe {
        // NaN is the second operand and passes through both.
        let x = S::splat(high).min(S::splat(low).max(x));
        let n = (x * S::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fnma(S::splat(LN2_HI), x);
        (n, n.fnma(S::splat(LN2_LO), r))
    }
}

/// Numbers that vectors read, widened exactly: those of [`SimdElement`], and `i8`.
///
/// # Safety
/// As for [`Simd`].
#[expect(
    clippy::missing_safety_doc,
    reason = "one contract, stated on the trait"
)]
pub trait SimdLoad: Copy {
    /// Reads `LANES` elements.
    unsafe fn load_vector<S: Simd>(from: *const Self) -> S;
    /// Reads the first `n` elements; the other lanes are zero.
    unsafe fn load_vector_partial<S: Simd>(from: *const Self, n: usize) -> S;
}

/// A storage type that vectors read and write: `f32`, `bf16` or `f16`.
///
/// # Safety
/// As for [`Simd`].
#[expect(
    clippy::missing_safety_doc,
    reason = "one contract, stated on the trait"
)]
pub trait SimdElement: SimdLoad + Element<Acc = f32> {
    /// Writes `LANES` elements, rounded to nearest even.
    unsafe fn store_vector<S: Simd>(to: *mut Self, value: S);
    /// Writes the first `n` lanes, rounded to nearest even.
    unsafe fn store_vector_partial<S: Simd>(to: *mut Self, value: S, n: usize);
}

macro_rules! simd_element {
    ($t:ty, $load:ident, $load_partial:ident, $store:ident, $store_partial:ident) => {
        impl SimdLoad for $t {
            #[inline(always)]
            unsafe fn load_vector<S: Simd>(from: *const Self) -> S {
                // SAFETY: the caller's contract is the same.
                unsafe { S::$load(from) }
            }
            #[inline(always)]
            unsafe fn load_vector_partial<S: Simd>(from: *const Self, n: usize) -> S {
                // SAFETY: the caller's contract is the same.
                unsafe { S::$load_partial(from, n) }
            }
        }
        impl SimdElement for $t {
            #[inline(always)]
            unsafe fn store_vector<S: Simd>(to: *mut Self, value: S) {
                // SAFETY: the caller's contract is the same.
                unsafe { value.$store(to) }
            }
            #[inline(always)]
            unsafe fn store_vector_partial<S: Simd>(to: *mut Self, value: S, n: usize) {
                // SAFETY: the caller's contract is the same.
                unsafe { value.$store_partial(to, n) }
            }
        }
    };
}
simd_element!(f32, load, load_partial, store, store_partial);
simd_element!(
    bf16,
    load_bf16,
    load_bf16_partial,
    store_bf16,
    store_bf16_partial
);
simd_element!(
    f16,
    load_f16,
    load_f16_partial,
    store_f16,
    store_f16_partial
);

impl SimdLoad for i8 {
    #[inline(always)]
    unsafe fn load_vector<S: Simd>(from: *const Self) -> S {
        // SAFETY: the caller's contract is the same.
        unsafe { S::load_i8(from) }
    }
    #[inline(always)]
    unsafe fn load_vector_partial<S: Simd>(from: *const Self, n: usize) -> S {
        let mut bytes = [0; 16];
        for (i, byte) in bytes.iter_mut().enumerate().take(n.min(S::LANES)) {
            // SAFETY: the first `n` elements are valid.
            *byte = unsafe { *from.add(i) };
        }
        // SAFETY: no vector has more than 16 lanes.
        unsafe { S::load_i8(bytes.as_ptr()) }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Distance in representable numbers; NaN equals NaN.
    fn ulps(got: f32, want: f64) -> f64 {
        let want32 = want as f32;
        if got.is_nan() && want.is_nan() || got == want32 {
            return 0.0;
        }
        if !got.is_finite() || !want32.is_finite() {
            return f64::INFINITY;
        }
        let ulp = (f32::from_bits(want32.abs().to_bits() + 1) - want32.abs()) as f64;
        (got as f64 - want).abs() / ulp.max(1e-45)
    }

    fn inputs() -> Vec<f32> {
        let mut xs = vec![
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::MIN_POSITIVE,
            1e-45,
            f32::MAX,
        ];
        xs.extend([
            f32::MIN,
            88.72283,
            88.72284,
            88.8,
            -87.4,
            -100.0,
            -103.97,
            -104.0,
            -1e4,
            1e4,
            0.9999999,
            1.0,
        ]);
        // Every exponent, and a dense sweep of the interesting range.
        xs.extend(
            (1..255u32).flat_map(|e| {
                [0u32, 1 << 31].map(|s| f32::from_bits(s | (e << 23) | (e * 31_337)))
            }),
        );
        xs.extend((-60_000..60_000).map(|i| i as f32 * 0.0017));
        xs.extend((-40_000..40_000).map(|i| i as f32 * 0.000_11));
        while xs.len() % 16 != 0 {
            xs.push(0.5);
        }
        xs
    }

    /// erf in double precision: its Taylor series below 3, the continued fraction of erfc above.
    fn erf64(x: f64) -> f64 {
        let a = x.abs();
        if x.is_nan() {
            return x;
        }
        let r = if a < 3.0 {
            let (mut term, mut sum) = (a, a);
            for n in 1..80 {
                term *= -a * a / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            sum * std::f64::consts::FRAC_2_SQRT_PI
        } else if a > 7.0 {
            1.0
        } else {
            let f = (1..80).rev().fold(a, |f, k| a + k as f64 / 2.0 / f);
            1.0 - (-a * a).exp() / (f * std::f64::consts::PI.sqrt())
        };
        r.copysign(x)
    }

    type Function<S> = fn(S) -> S;

    /// Name, vector function, exact function, largest error in ulp.
    type Case<S> = (&'static str, Function<S>, fn(f64) -> f64, f64);

    #[inline(always)]
    unsafe fn map<S: Simd>(xs: &[f32], f: Function<S>) -> Vec<f32> {
        let mut ys = vec![0.0; xs.len()];
        for i in (0..xs.len()).step_by(S::LANES) {
            unsafe { f(S::load(xs.as_ptr().add(i))).store(ys.as_mut_ptr().add(i)) };
        }
        ys
    }

    #[inline(always)]
    unsafe fn check<S: Simd>() {
        let xs = inputs();
        let cases: [Case<S>; 7] = [
            ("exp", S::exp, f64::exp, 1.0),
            ("exp_m1", S::exp_m1, f64::exp_m1, 2.0),
            ("tanh", S::tanh, f64::tanh, 3.0),
            (
                "sigmoid",
                S::sigmoid,
                |x| {
                    if x < -88.0 {
                        0.0
                    } else {
                        1.0 / (1.0 + (-x).exp())
                    }
                },
                3.0,
            ),
            ("erf", S::erf, erf64, 3.0),
            ("sqrt", S::sqrt, f64::sqrt, 0.51),
            ("round", S::round, f64::round_ties_even, 0.0),
        ];
        for (name, f, exact, limit) in cases {
            let ys = unsafe { map::<S>(&xs, f) };
            let mut worst = (0.0, 0.0, 0.0);
            for (&x, &y) in xs.iter().zip(&ys) {
                let error = ulps(y, exact(x as f64));
                // Near the underflow threshold of sigmoid only the absolute error is promised.
                if error > worst.0 && !(name == "sigmoid" && x < -87.0 && y < 2e-38) {
                    worst = (error, x, y);
                }
            }
            println!(
                "{name} ({} lanes): {:.2} ulp at {} -> {}",
                S::LANES,
                worst.0,
                worst.1,
                worst.2
            );
            assert!(
                worst.0 <= limit,
                "{name}({}) = {}: {} ulp, limit {limit}",
                worst.1,
                worst.2,
                worst.0
            );
        }
        unsafe { check_memory::<S>(&xs) };
    }

    /// Partial forms touch nothing past `n`, bf16 rounds as the scalar code does, reductions agree with a loop.
    #[inline(always)]
    unsafe fn check_memory<S: Simd>(xs: &[f32]) {
        for n in 0..=S::LANES {
            let v = unsafe { S::load_partial(xs.as_ptr().add(100), n) };
            let (mut y, mut z) = ([7.0f32; 16], [bf16::ONE; 16]);
            unsafe { v.store(y.as_mut_ptr()) };
            assert!((0..S::LANES).all(|i| y[i] == if i < n { xs[100 + i] } else { 0.0 }));
            y = [7.0; 16];
            unsafe { v.store_partial(y.as_mut_ptr(), n) };
            assert!((0..16).all(|i| y[i] == if i < n { xs[100 + i] } else { 7.0 }));
            unsafe { v.store_bf16_partial(z.as_mut_ptr(), n) };
            assert!((0..16).all(|i| z[i]
                == if i < n {
                    bf16::store(xs[100 + i])
                } else {
                    bf16::ONE
                }));
            unsafe { S::load_bf16_partial(z.as_ptr(), n).store(y.as_mut_ptr()) };
            assert!((0..S::LANES).all(|i| y[i] == if i < n { z[i].load() } else { 0.0 }));
            let mut h = [f16::ONE; 16];
            unsafe { v.store_f16_partial(h.as_mut_ptr(), n) };
            let stored = |i: usize| {
                if i < n {
                    f16::store(xs[100 + i])
                } else {
                    f16::ONE
                }
            };
            assert!((0..16).all(|i| h[i] == stored(i)));
            unsafe { S::load_f16_partial(h.as_ptr(), n).store(y.as_mut_ptr()) };
            assert!((0..S::LANES).all(|i| y[i] == if i < n { h[i].load() } else { 0.0 }));
        }
        for i in (0..xs.len()).step_by(S::LANES) {
            let (mut z, mut back) = ([bf16::ONE; 16], [0.0; 16]);
            let v = unsafe { S::load(xs.as_ptr().add(i)) };
            unsafe { v.store_bf16(z.as_mut_ptr()) };
            unsafe { S::load_bf16(z.as_ptr()).store(back.as_mut_ptr()) };
            for l in 0..S::LANES {
                let want = bf16::store(xs[i + l]);
                assert_eq!(z[l].to_bits(), want.to_bits(), "bf16 of {}", xs[i + l]);
                assert_eq!(back[l].to_bits(), want.load().to_bits());
            }
            let mut h = [f16::ONE; 16];
            unsafe { v.store_f16(h.as_mut_ptr()) };
            unsafe { S::load_f16(h.as_ptr()).store(back.as_mut_ptr()) };
            for l in 0..S::LANES {
                let want = f16::store(xs[i + l]);
                let same = h[l] == want && back[l] == want.load();
                let nan = h[l].is_nan() && want.is_nan() && back[l].is_nan();
                assert!(same || nan, "f16 of {}", xs[i + l]);
            }
            let lanes = &xs[i..i + S::LANES];
            assert_eq!(v.all_finite(), lanes.iter().all(|x| x.is_finite()));
            if lanes.iter().all(|x| x.abs() < 1e30) {
                assert_eq!(
                    v.hmax(),
                    lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
                );
                let exact: f64 = lanes.iter().map(|&x| x as f64).sum();
                let size: f64 = lanes.iter().map(|&x| x.abs() as f64).sum();
                assert!((v.sum() as f64 - exact).abs() <= size * 3e-7 + 1e-45);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn check_avx2() {
        unsafe { check::<Avx2>() }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn check_avx512() {
        unsafe { check::<Avx512>() }
    }

    #[test]
    fn functions_are_accurate() {
        if crate::dispatch::Level::Avx2.is_supported() {
            unsafe { check_avx2() };
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            unsafe { check_avx512() };
        }
    }
}
