//! Vector bodies of softmax, shared with the cross entropy.
//!
//! SAFETY (all functions): the callers check the lengths; the CPU has the features of `S`.

use crate::simd::{Simd, SimdElement};
use crate::stream::{Fold, Step, Width, fold, stream};

/// The largest element.
pub(crate) struct Max<E>(pub *const E);

impl<E: SimdElement> Fold<1> for Max<E> {
    const START: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [held]: [S; 1]) -> [S; 1] {
        // `held` last, so that NaN is passed over.
        [unsafe { width.load::<S, E>(self.0.add(i)) }.max(held)]
    }
    #[inline(always)]
    fn join<S: Simd>(a: S, b: S) -> S {
        a.max(b)
    }
}

/// `Σ e^(x - max)`.
pub(crate) struct SumExp<E>(pub *const E, pub f32);

impl<E: SimdElement> Fold<1> for SumExp<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        unsafe { [sum + (width.load::<S, E>(self.0.add(i)) - S::splat(self.1)).exp_or_zero()] }
    }
}

/// The largest element of a row and `Σ e^(x - max)`.
#[inline(always)]
unsafe fn max_and_sum<S: Simd, E: SimdElement>(x: *const E, cols: usize) -> (f32, f32) {
    unsafe {
        let [max] = fold::<S, 1, _>(cols, Max(x));
        let max = max.hmax();
        let [sum] = fold::<S, 1, _>(cols, SumExp(x, max));
        (max, sum.sum())
    }
}

/// From where on `e^x` times `factor` is a normal number.
pub(crate) fn normal_from(factor: f32) -> f32 {
    -87.0 - factor.abs().min(1.0).ln()
}

/// `y = e^(x - max) * factor`.
struct ScaledExp<E> {
    x: *const E,
    y: *mut E,
    max: f32,
    factor: f32,
    floor: f32,
}

impl<E: SimdElement> Step for ScaledExp<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let x = width.load::<S, E>(self.x.add(i)) - S::splat(self.max);
            let e = x.exp_above(S::splat(self.floor));
            width.store(self.y.add(i), e * S::splat(self.factor));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn softmax<S: Simd, E: SimdElement>(x: &[E], cols: usize, y: &mut [E]) {
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        unsafe {
            let (max, sum) = max_and_sum::<S, E>(x.as_ptr(), cols);
            stream::<S>(
                cols,
                ScaledExp {
                    x: x.as_ptr(),
                    y: y.as_mut_ptr(),
                    max,
                    factor: 1.0 / sum,
                    floor: normal_from(1.0 / sum),
                },
            );
        }
    }
}

/// `y = (x - max) - ln_sum`.
struct Shift<E> {
    x: *const E,
    y: *mut E,
    max: f32,
    ln_sum: f32,
}

impl<E: SimdElement> Step for Shift<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let x: S = width.load(self.x.add(i));
            width.store(
                self.y.add(i),
                (x - S::splat(self.max)) - S::splat(self.ln_sum),
            );
        }
    }
}

#[inline(always)]
pub(super) unsafe fn log_softmax<S: Simd, E: SimdElement>(x: &[E], cols: usize, y: &mut [E]) {
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        unsafe {
            let (max, sum) = max_and_sum::<S, E>(x.as_ptr(), cols);
            stream::<S>(
                cols,
                Shift {
                    x: x.as_ptr(),
                    y: y.as_mut_ptr(),
                    max,
                    ln_sum: sum.ln(),
                },
            );
        }
    }
}

/// `Σ y dy`, or `Σ dy` if `LOG`.
struct Dot<E, const LOG: bool>(*const E, *const E);

impl<E: SimdElement, const LOG: bool> Fold<1> for Dot<E, LOG> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        unsafe {
            let dy: S = width.load(self.1.add(i));
            [if LOG {
                sum + dy
            } else {
                dy.fma(width.load(self.0.add(i)), sum)
            }]
        }
    }
}

/// `dx = y (dy - sum)`, or `dx = dy - e^y sum` if `LOG`.
struct Dx<E, const LOG: bool> {
    y: *const E,
    dy: *const E,
    dx: *mut E,
    sum: f32,
}

impl<E: SimdElement, const LOG: bool> Step for Dx<E, LOG> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (y, dy): (S, S) = (width.load(self.y.add(i)), width.load(self.dy.add(i)));
            let sum = S::splat(self.sum);
            width.store(
                self.dx.add(i),
                if LOG {
                    y.exp_or_zero().fnma(sum, dy)
                } else {
                    y * (dy - sum)
                },
            );
        }
    }
}

#[inline(always)]
unsafe fn backward<S: Simd, E: SimdElement, const LOG: bool>(
    y: &[E],
    dy: &[E],
    cols: usize,
    dx: &mut [E],
) {
    for ((y, dy), dx) in y
        .chunks_exact(cols)
        .zip(dy.chunks_exact(cols))
        .zip(dx.chunks_exact_mut(cols))
    {
        unsafe {
            let (y, dy) = (y.as_ptr(), dy.as_ptr());
            let [sum] = fold::<S, 1, _>(cols, Dot::<E, LOG>(y, dy));
            stream::<S>(
                cols,
                Dx::<E, LOG> {
                    y,
                    dy,
                    dx: dx.as_mut_ptr(),
                    sum: sum.sum(),
                },
            );
        }
    }
}

#[inline(always)]
pub(super) unsafe fn softmax_backward<S: Simd, E: SimdElement>(
    y: &[E],
    dy: &[E],
    cols: usize,
    dx: &mut [E],
) {
    unsafe { backward::<S, E, false>(y, dy, cols, dx) }
}

#[inline(always)]
pub(super) unsafe fn log_softmax_backward<S: Simd, E: SimdElement>(
    y: &[E],
    dy: &[E],
    cols: usize,
    dx: &mut [E],
) {
    unsafe { backward::<S, E, true>(y, dy, cols, dx) }
}
