//! Activation functions: formulas as in [`crate::activation::Activation`].

use crate::activation::Activation;
use crate::{Element, Float};

const SQRT_2_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const CUBIC: f64 = 0.044715;

/// `0.5 (1 + erf(x / √2))`, the normal distribution function.
fn normal_cdf<A: Float>(x: A) -> A {
    A::of(0.5) * (A::ONE + A::of(libm::erf(x.f64() * std::f64::consts::FRAC_1_SQRT_2)))
}

/// `tanh(√(2/π) (x + 0.044715 x³))`; saturated beyond ±10, so the cube does not overflow.
fn gelu_tanh<A: Float>(x: A) -> (A, A) {
    let x = if x > A::of(10.0) {
        A::of(10.0)
    } else if x < A::of(-10.0) {
        A::of(-10.0)
    } else {
        x
    };
    let t = (A::of(SQRT_2_OVER_PI) * (x + A::of(CUBIC) * x * x * x)).tanh();
    let slope = A::of(SQRT_2_OVER_PI) * (A::ONE + A::of(3.0 * CUBIC) * x * x);
    (t, (A::ONE - t * t) * slope * x)
}

/// `act(x)`.
fn value<A: Float>(kind: Activation, x: A) -> A {
    match kind {
        Activation::Silu => x / (A::ONE + (-x).exp()),
        Activation::Gelu => x * normal_cdf(x),
        Activation::GeluTanh => A::of(0.5) * x * (A::ONE + gelu_tanh(x).0),
        Activation::Relu if x < A::ZERO => A::ZERO,
        Activation::Relu => x,
    }
}

/// `act'(x)`; 0 at the kink of ReLU.
fn derivative<A: Float>(kind: Activation, x: A) -> A {
    match kind {
        Activation::Silu => {
            let s = A::ONE / (A::ONE + (-x).exp());
            s * (A::ONE + x * (A::ONE - s))
        }
        Activation::Gelu => {
            let density = A::of(SQRT_2_OVER_PI * 0.5) * (A::of(-0.5) * x * x).exp();
            normal_cdf(x) + x * density
        }
        Activation::GeluTanh => {
            let (t, bump) = gelu_tanh(x);
            A::of(0.5) * (A::ONE + t + bump)
        }
        Activation::Relu if x > A::ZERO => A::ONE,
        Activation::Relu => A::ZERO,
    }
}

/// `y = act(x)`.
pub fn activation<E: Element>(kind: Activation, x: &[E], y: &mut [E]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = E::store(value(kind, x.load()));
    }
}

/// `dx = act'(x) dy`.
pub fn activation_backward<E: Element>(kind: Activation, x: &[E], dy: &[E], dx: &mut [E]) {
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        *dx = E::store(derivative(kind, x.load()) * dy.load());
    }
}

/// `y = act(gate) up`.
pub fn gated<E: Element>(kind: Activation, gate: &[E], up: &[E], y: &mut [E]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = E::store(value(kind, gate.load()) * up.load());
    }
}

/// `dgate = act'(gate) up dy`, `dup = act(gate) dy`.
pub fn gated_backward<E: Element>(
    kind: Activation,
    gate: &[E],
    up: &[E],
    dy: &[E],
    dgate: &mut [E],
    dup: &mut [E],
) {
    for i in 0..dy.len() {
        let (gate, dy) = (gate[i].load(), dy[i].load());
        dgate[i] = E::store(derivative(kind, gate) * up[i].load() * dy);
        dup[i] = E::store(value(kind, gate) * dy);
    }
}
