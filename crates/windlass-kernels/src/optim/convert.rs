//! Vector bodies of the conversions between storage and `f32`: split masters and 8-bit codes.
//!
//! SAFETY (all functions): the callers in `optim` check the lengths; the CPU has the features of `S`.

use half::bf16;

use super::code::{Code, inverse};
use super::vector::{AHEAD, Halves};
use crate::simd::Simd;
use crate::stream::{First, Fold, Step, Whole, Width, fold, prefetch, stream};

struct Join(Halves, *mut f32);

impl Step for Join {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        prefetch(self.0.0.wrapping_add(i + 2 * AHEAD).cast());
        prefetch(self.0.1.wrapping_add(i + 2 * AHEAD).cast());
        unsafe {
            let value: S = width.load_split(self.0.0.add(i), self.0.1.add(i));
            width.store(self.1.add(i), value);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn join<S: Simd>(high: &[bf16], low: &[i16], to: &mut [f32]) {
    let halves = Halves(high.as_ptr().cast_mut(), low.as_ptr().cast_mut());
    unsafe { stream::<S>(to.len(), Join(halves, to.as_mut_ptr())) }
}

struct Split(*const f32, Halves);

impl Step for Split {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let value: S = width.load(self.0.add(i));
            width.store_split(self.1.0.add(i), self.1.1.add(i), value);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn split<S: Simd>(from: &[f32], high: &mut [bf16], low: &mut [i16]) {
    let halves = Halves(high.as_mut_ptr(), low.as_mut_ptr());
    unsafe { stream::<S>(from.len(), Split(from.as_ptr(), halves)) }
}

/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

/// The values of a vector of codes.
#[inline(always)]
unsafe fn decoded<S: Simd>(code: Code, codes: *const u8) -> S {
    let t = code.tables();
    unsafe {
        let number = S::load_u8(codes);
        match code {
            Code::Signed => {
                let offset = number - S::splat(127.0);
                let x = offset.abs().fma(S::splat(2.0), S::splat(1.0));
                let e = x.exponent();
                x.fma(e.lookup(&t.slope), e.lookup(&t.base))
                    .with_sign_of(offset)
            }
            Code::Unsigned => {
                let x = number + S::splat(1.5);
                let e = x.exponent();
                x.fma(e.lookup(&t.slope), e.lookup(&t.base))
            }
        }
    }
}

#[inline(always)]
unsafe fn decode<S: Simd>(code: Code, codes: &[u8], scale: f32, to: &mut [f32]) {
    let mut i = 0;
    unsafe {
        let scale = S::splat(scale);
        while i + S::LANES <= codes.len() {
            let value: S = decoded(code, codes.as_ptr().add(i));
            (value * scale).store(to.as_mut_ptr().add(i));
            i += S::LANES;
        }
        let mut last = [0; MAX_LANES];
        let rest = &codes[i..];
        last[..rest.len()].copy_from_slice(rest);
        let value: S = decoded(code, last.as_ptr());
        (value * scale).store_partial(to.as_mut_ptr().add(i), rest.len());
    }
}

/// The codes of a vector of values of -1 to 1, as numbers.
#[inline(always)]
unsafe fn encoded<S: Simd>(code: Code, value: S) -> S {
    let t = code.tables();
    unsafe {
        let size = value.abs();
        let power = (size.exponent() + S::splat(31.0)).max(S::splat(0.0));
        let decade = power.lookup32(&t.decade);
        let below = size.lt(power.lookup32(&t.next));
        let e = S::select(below, decade, decade + S::splat(1.0));
        let first = e.lookup(&t.first);
        let part = size.fma(e.lookup(&t.steep), S::splat(8.0 / 9.0));
        let number = part.fma(first, S::splat(-0.5)).round();
        let last = first.fma(S::splat(2.0), S::splat(-1.0));
        let number = number.min(last).max(first);
        match code {
            Code::Signed => (S::splat(127.0) + number.with_sign_of(value)).max(S::splat(0.0)),
            Code::Unsigned => number - S::splat(1.0),
        }
    }
}

/// The largest magnitude of a block.
struct Largest(*const f32);

impl Fold<1> for Largest {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [held]: [S; 1]) -> [S; 1] {
        unsafe { [width.load::<S, f32>(self.0.add(i)).abs().max(held)] }
    }
    #[inline(always)]
    fn join<S: Simd>(a: S, b: S) -> S {
        a.max(b)
    }
}

/// NaN where a number is not finite, else zero: the sum of `0 x`.
struct Nonfinite(*const f32);

impl Fold<1> for Nonfinite {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [held]: [S; 1]) -> [S; 1] {
        unsafe {
            let x: S = width.load(self.0.add(i));
            [x.fma(S::splat(0.0), held)]
        }
    }
}

/// As [`super::code::encode_block`].
#[inline(always)]
unsafe fn encode<S: Simd>(code: Code, from: &[f32], codes: &mut [u8]) -> f32 {
    unsafe {
        let [sum] = fold::<S, 1, _>(from.len(), Nonfinite(from.as_ptr()));
        if sum.sum() != 0.0 {
            codes.fill(0);
            return f32::NAN;
        }
        let [largest] = fold::<S, 1, _>(from.len(), Largest(from.as_ptr()));
        let scale = largest.hmax();
        let inverse = S::splat(inverse(scale));
        let mut i = 0;
        while i + S::LANES <= from.len() {
            let value: S = Whole.load(from.as_ptr().add(i));
            encoded(code, value * inverse).store_u8(codes.as_mut_ptr().add(i));
            i += S::LANES;
        }
        let rest = from.len() - i;
        let mut last = [0; MAX_LANES];
        let value: S = First(rest).load(from.as_ptr().add(i));
        encoded(code, value * inverse).store_u8(last.as_mut_ptr());
        codes[i..].copy_from_slice(&last[..rest]);
        scale
    }
}

#[inline(always)]
pub(super) unsafe fn decode_signed<S: Simd>(codes: &[u8], scale: f32, to: &mut [f32]) {
    unsafe { decode::<S>(Code::Signed, codes, scale, to) }
}

#[inline(always)]
pub(super) unsafe fn decode_unsigned<S: Simd>(codes: &[u8], scale: f32, to: &mut [f32]) {
    unsafe { decode::<S>(Code::Unsigned, codes, scale, to) }
}

#[inline(always)]
pub(super) unsafe fn encode_signed<S: Simd>(from: &[f32], codes: &mut [u8]) -> f32 {
    unsafe { encode::<S>(Code::Signed, from, codes) }
}

#[inline(always)]
pub(super) unsafe fn encode_unsigned<S: Simd>(from: &[f32], codes: &mut [u8]) -> f32 {
    unsafe { encode::<S>(Code::Unsigned, from, codes) }
}
