//! Vector bodies of the activation functions.
//!
//! SAFETY (all functions): the callers in `activation` check the lengths; the CPU has the features of `S`.

use super::Activation;
use crate::simd::{Simd, SimdElement};
use crate::stream::{Step, Width, stream};

const SQRT_2_OVER_PI: f32 = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
const CUBIC: f32 = 0.044715;

/// An activation function as a type, so that the choice is made outside the loop.
trait Curve {
    /// `act(x)` and `act'(x)`; what is not used is not computed.
    fn of<S: Simd>(x: S) -> (S, S);
}

struct Silu;
struct Gelu;
struct GeluTanh;
struct Relu;

impl Curve for Silu {
    #[inline(always)]
    fn of<S: Simd>(x: S) -> (S, S) {
        // SAFETY (here and below): `x` exists, so the CPU has the features.
        let one = unsafe { S::splat(1.0) };
        let denominator = one + (-x).exp_or_zero();
        let s = one / denominator;
        (x / denominator, s * (one - s).fma(x, one))
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn of<S: Simd>(x: S) -> (S, S) {
        unsafe {
            let half = S::splat(0.5);
            let cdf =
                half * (S::splat(1.0) + (x * S::splat(std::f32::consts::FRAC_1_SQRT_2)).erf());
            let density = S::splat(SQRT_2_OVER_PI * 0.5) * (S::splat(-0.5) * x * x).exp_or_zero();
            (x * cdf, x.fma(density, cdf))
        }
    }
}

impl Curve for GeluTanh {
    #[inline(always)]
    fn of<S: Simd>(x: S) -> (S, S) {
        unsafe {
            let (half, one, root) = (S::splat(0.5), S::splat(1.0), S::splat(SQRT_2_OVER_PI));
            // Saturated beyond ±10, so the cube does not overflow; NaN passes.
            let z = S::splat(10.0).min(S::splat(-10.0).max(x));
            let square = z * z;
            let t = (root * z * square.fma(S::splat(CUBIC), one)).tanh();
            let slope = root * square.fma(S::splat(3.0 * CUBIC), one);
            (
                half * x * (one + t),
                half * (t.fnma(t, one) * slope).fma(z, one + t),
            )
        }
    }
}

impl Curve for Relu {
    #[inline(always)]
    fn of<S: Simd>(x: S) -> (S, S) {
        unsafe {
            let zero = S::splat(0.0);
            // `x` last, so that NaN stays NaN.
            (zero.max(x), S::select(zero.lt(x), S::splat(1.0), zero))
        }
    }
}

/// Calls a generic function with the type of an activation.
macro_rules! with_curve {
    ($kind:expr, $S:ident, $function:ident($($arg:expr),*)) => {
        match $kind {
            Activation::Silu => $function::<$S, Silu, _>($($arg),*),
            Activation::Gelu => $function::<$S, Gelu, _>($($arg),*),
            Activation::GeluTanh => $function::<$S, GeluTanh, _>($($arg),*),
            Activation::Relu => $function::<$S, Relu, _>($($arg),*),
        }
    };
}

/// `act(x)`.
#[inline(always)]
pub(crate) fn activated<S: Simd>(kind: Activation, x: S) -> S {
    match kind {
        Activation::Silu => Silu::of(x).0,
        Activation::Gelu => Gelu::of(x).0,
        Activation::GeluTanh => GeluTanh::of(x).0,
        Activation::Relu => Relu::of(x).0,
    }
}

/// `y = act(x)`, `y = act(x) up`, or `y = act'(x) up`.
struct Apply<E, C, const DERIVATIVE: bool> {
    x: *const E,
    up: Option<*const E>,
    y: *mut E,
    curve: std::marker::PhantomData<C>,
}

impl<E: SimdElement, C: Curve, const DERIVATIVE: bool> Step for Apply<E, C, DERIVATIVE> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (value, slope) = C::of::<S>(width.load(self.x.add(i)));
            let mut y = if DERIVATIVE { slope } else { value };
            if let Some(up) = self.up {
                y = y * width.load(up.add(i));
            }
            width.store(self.y.add(i), y);
        }
    }
}

#[inline(always)]
unsafe fn apply<S: Simd, C: Curve, E: SimdElement>(x: &[E], up: Option<&[E]>, y: &mut [E]) {
    let op = Apply::<E, C, false> {
        x: x.as_ptr(),
        up: up.map(<[E]>::as_ptr),
        y: y.as_mut_ptr(),
        curve: std::marker::PhantomData,
    };
    unsafe { stream::<S>(x.len(), op) }
}

#[inline(always)]
unsafe fn apply_backward<S: Simd, C: Curve, E: SimdElement>(x: &[E], dy: &[E], dx: &mut [E]) {
    let op = Apply::<E, C, true> {
        x: x.as_ptr(),
        up: Some(dy.as_ptr()),
        y: dx.as_mut_ptr(),
        curve: std::marker::PhantomData,
    };
    unsafe { stream::<S>(x.len(), op) }
}

/// `dgate = act'(gate) up dy`, `dup = act(gate) dy`.
struct Gate<E, C> {
    gate: *const E,
    up: *const E,
    dy: *const E,
    dgate: *mut E,
    dup: *mut E,
    curve: std::marker::PhantomData<C>,
}

impl<E: SimdElement, C: Curve> Step for Gate<E, C> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (value, slope) = C::of::<S>(width.load(self.gate.add(i)));
            let (up, dy): (S, S) = (width.load(self.up.add(i)), width.load(self.dy.add(i)));
            width.store(self.dgate.add(i), slope * up * dy);
            width.store(self.dup.add(i), value * dy);
        }
    }
}

#[inline(always)]
unsafe fn gate_backward<S: Simd, C: Curve, E: SimdElement>(
    gate: &[E],
    up: &[E],
    dy: &[E],
    dgate: &mut [E],
    dup: &mut [E],
) {
    let op = Gate::<E, C> {
        gate: gate.as_ptr(),
        up: up.as_ptr(),
        dy: dy.as_ptr(),
        dgate: dgate.as_mut_ptr(),
        dup: dup.as_mut_ptr(),
        curve: std::marker::PhantomData,
    };
    unsafe { stream::<S>(gate.len(), op) }
}

#[inline(always)]
pub(super) unsafe fn activation<S: Simd, E: SimdElement>(kind: Activation, x: &[E], y: &mut [E]) {
    unsafe { with_curve!(kind, S, apply(x, None, y)) }
}

#[inline(always)]
pub(super) unsafe fn activation_backward<S: Simd, E: SimdElement>(
    kind: Activation,
    x: &[E],
    dy: &[E],
    dx: &mut [E],
) {
    unsafe { with_curve!(kind, S, apply_backward(x, dy, dx)) }
}

#[inline(always)]
pub(super) unsafe fn gated<S: Simd, E: SimdElement>(
    kind: Activation,
    gate: &[E],
    up: &[E],
    y: &mut [E],
) {
    unsafe { with_curve!(kind, S, apply(gate, Some(up), y)) }
}

#[inline(always)]
pub(super) unsafe fn gated_backward<S: Simd, E: SimdElement>(
    kind: Activation,
    gate: &[E],
    up: &[E],
    dy: &[E],
    dgate: &mut [E],
    dup: &mut [E],
) {
    unsafe { with_curve!(kind, S, gate_backward(gate, up, dy, dgate, dup)) }
}
