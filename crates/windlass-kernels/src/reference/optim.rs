//! Optimizer updates: formulas as in [`crate::optim`].

use half::bf16;

use crate::optim::{AdamW, AdamWFactors, Lion, LionFactors, Sgd, SgdFactors};
use crate::split::{join, split};
use crate::{Element, Float};

/// New parameter, first and second moment.
fn adamw_step<A: Float>(f: &AdamWFactors<A>, p: A, g: A, m: A, v: A) -> (A, A, A) {
    let g = g * f.grad_scale;
    let m = m + (g - m) * f.one_minus_beta1;
    let v = v * f.beta2 + g * g * f.one_minus_beta2;
    let denominator = v.sqrt() * f.correction + f.eps;
    (p * f.decay - f.step_size * (m / denominator), m, v)
}

/// One step of AdamW.
pub fn adamw<E: Element>(p: &mut [E], g: &[E], m: &mut [E], v: &mut [E], rule: &AdamW) {
    let f = rule.factors::<E::Acc>();
    for i in 0..p.len() {
        let (np, nm, nv) = adamw_step(&f, p[i].load(), g[i].load(), m[i].load(), v[i].load());
        (p[i], m[i], v[i]) = (E::store(np), E::store(nm), E::store(nv));
    }
}

/// One step of AdamW on a split master.
pub fn adamw_split<G: Element>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    v: &mut [f32],
    rule: &AdamW,
) {
    let f = rule.factors::<f32>();
    for i in 0..hi.len() {
        let (p, nm, nv) = adamw_step(&f, join(hi[i], lo[i]), f32::of(g[i].to_f64()), m[i], v[i]);
        ((hi[i], lo[i]), m[i], v[i]) = (split(p), nm, nv);
    }
}

/// New parameter and momentum buffer.
fn sgd_step<A: Float>(f: &SgdFactors<A>, p: A, g: A, buffer: A) -> (A, A) {
    let g = g * f.grad_scale + p * f.weight_decay;
    let buffer = if f.first {
        g
    } else {
        buffer * f.momentum + g * f.one_minus_dampening
    };
    let direction = if f.nesterov {
        g + buffer * f.momentum
    } else {
        buffer
    };
    (p - f.lr * direction, buffer)
}

/// One step of SGD; `buffer` is empty where there is no momentum.
pub fn sgd<E: Element>(p: &mut [E], g: &[E], buffer: &mut [E], rule: &Sgd) {
    let f = rule.factors::<E::Acc>();
    for i in 0..p.len() {
        let held = buffer.get(i).map_or(E::Acc::ZERO, |b| b.load());
        let (np, nb) = sgd_step(&f, p[i].load(), g[i].load(), held);
        p[i] = E::store(np);
        if let Some(b) = buffer.get_mut(i) {
            *b = E::store(nb);
        }
    }
}

/// One step of SGD on a split master.
pub fn sgd_split<G: Element>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    buffer: &mut [f32],
    rule: &Sgd,
) {
    let f = rule.factors::<f32>();
    for i in 0..hi.len() {
        let held = buffer.get(i).map_or(0.0, |b| *b);
        let (p, nb) = sgd_step(&f, join(hi[i], lo[i]), f32::of(g[i].to_f64()), held);
        (hi[i], lo[i]) = split(p);
        if let Some(b) = buffer.get_mut(i) {
            *b = nb;
        }
    }
}

/// New parameter and momentum.
fn lion_step<A: Float>(f: &LionFactors<A>, p: A, g: A, m: A) -> (A, A) {
    let g = g * f.grad_scale;
    let c = m + (g - m) * f.one_minus_beta1;
    let sign = if c > A::ZERO {
        A::ONE
    } else if c < A::ZERO {
        -A::ONE
    } else {
        c // zero, or NaN, which must not be hidden
    };
    (p * f.decay - f.lr * sign, m + (g - m) * f.one_minus_beta2)
}

/// One step of Lion.
pub fn lion<E: Element>(p: &mut [E], g: &[E], m: &mut [E], rule: &Lion) {
    let f = rule.factors::<E::Acc>();
    for i in 0..p.len() {
        let (np, nm) = lion_step(&f, p[i].load(), g[i].load(), m[i].load());
        (p[i], m[i]) = (E::store(np), E::store(nm));
    }
}

/// One step of Lion on a split master.
pub fn lion_split<G: Element>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    rule: &Lion,
) {
    let f = rule.factors::<f32>();
    for i in 0..hi.len() {
        let (p, nm) = lion_step(&f, join(hi[i], lo[i]), f32::of(g[i].to_f64()), m[i]);
        ((hi[i], lo[i]), m[i]) = (split(p), nm);
    }
}
