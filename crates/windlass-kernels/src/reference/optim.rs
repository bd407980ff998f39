//! Optimizer updates: formulas as in [`crate::optim`].

use half::{bf16, f16};

use crate::optim::{
    AdagradFactors, AdamFactors, Factors, Grad, LambFactors, LionFactors, Moment, MuonFactors,
    Rule, SgdFactors, Values,
};
use crate::{Element, Float};

/// New parameter, first and second moment.
fn adam<A: Float>(f: &AdamFactors<A>, p: A, g: A, m: A, v: A) -> (A, A, A) {
    let g = g * f.grad_scale + p * f.l2;
    let m = m + (g - m) * f.one_minus_beta1;
    let v = v * f.beta2 + g * g * f.one_minus_beta2;
    let denominator = v.sqrt() * f.correction + f.eps;
    (p * f.decay - f.step_size * (m / denominator), m, v)
}

/// New parameter and sum of squares.
fn adagrad<A: Float>(f: &AdagradFactors<A>, p: A, g: A, s: A) -> (A, A) {
    let g = g * f.grad_scale + p * f.l2;
    let s = s + g * g;
    (p - f.lr * (g / (s.sqrt() + f.eps)), s)
}

/// New parameter and momentum buffer.
fn sgd<A: Float>(f: &SgdFactors<A>, p: A, g: A, buffer: A) -> (A, A) {
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

/// New parameter and momentum.
fn lion<A: Float>(f: &LionFactors<A>, p: A, g: A, m: A) -> (A, A) {
    let g = g * f.grad_scale;
    let c = m + (g - m) * f.one_minus_beta1;
    let sign = if c > A::ZERO {
        A::ONE
    } else if c < A::ZERO {
        -A::ONE
    } else {
        c // zero, or NaN, which must not be hidden
    };
    let m = m + (g - m) * f.one_minus_beta2;
    (p * f.decay - f.lr * sign, m)
}

/// New moments of LAMB.
fn lamb_moments<A: Float>(f: &LambFactors<A>, g: A, m: A, v: A) -> (A, A) {
    let g = g * f.grad_scale;
    let m = m + (g - m) * f.one_minus_beta1;
    (m, v * f.beta2 + g * g * f.one_minus_beta2)
}

/// LAMB's update before the trust ratio.
fn lamb_update<A: Float>(f: &LambFactors<A>, p: A, m: A, v: A) -> A {
    m * f.correction1 / (v.sqrt() * f.correction2 + f.eps) + p * f.weight_decay
}

/// Direction and momentum of Muon.
fn muon<A: Float>(f: &MuonFactors<A>, g: A, m: A) -> (A, A) {
    let g = g * f.grad_scale;
    let m = m + (g - m) * f.one_minus_momentum;
    (g + (m - g) * f.ahead, m)
}

/// One step on elements in the arithmetic type; moments that the rule does not keep are empty. The sums of squares of
/// LAMB's norms, else zeros.
pub(crate) fn update<A: Float>(
    factors: &Factors<A>,
    p: &mut [A],
    g: &[A],
    m: &mut [A],
    v: &mut [A],
) -> [f64; 2] {
    let mut sums = [0.0; 2];
    for i in 0..p.len() {
        match factors {
            Factors::Adam(f) => (p[i], m[i], v[i]) = adam(f, p[i], g[i], m[i], v[i]),
            Factors::Adagrad(f) => (p[i], m[i]) = adagrad(f, p[i], g[i], m[i]),
            Factors::Lion(f) => (p[i], m[i]) = lion(f, p[i], g[i], m[i]),
            Factors::Sgd(f) if m.is_empty() => p[i] = sgd(f, p[i], g[i], A::ZERO).0,
            Factors::Sgd(f) => (p[i], m[i]) = sgd(f, p[i], g[i], m[i]),
            Factors::LambMoments(f) => {
                (m[i], v[i]) = lamb_moments(f, g[i], m[i], v[i]);
                sums[0] += p[i].f64() * p[i].f64();
                sums[1] += lamb_update(f, p[i], m[i], v[i]).f64().powi(2);
            }
            Factors::LambApply(f) => {
                p[i] = p[i] - f.step_size * lamb_update(f, p[i], m[i], v[i]);
            }
            Factors::Muon(f) => (p[i], m[i]) = muon(f, g[i], m[i]),
        }
    }
    sums
}

/// As [`update`], on values, gradients and moments as they are stored.
pub(crate) fn update_stored(
    factors: &Factors<f32>,
    values: &mut Values<'_>,
    grad: Option<&mut Grad<'_>>,
    moments: &mut [Moment<'_>],
) -> [f64; 2] {
    let n = values.len();
    let mut p = values.master(0..n);
    let g = match &grad {
        None => Vec::new(),
        Some(Grad::F32(g)) => g.to_vec(),
        Some(Grad::TakeF32(g)) => g.to_vec(),
        Some(Grad::Bf16(g)) => g.iter().map(|g| g.load()).collect(),
        Some(Grad::TakeBf16(g)) => g.iter().map(|g| g.load()).collect(),
        Some(Grad::F16(g)) => g.iter().map(|g| g.load()).collect(),
        Some(Grad::TakeF16(g)) => g.iter().map(|g| g.load()).collect(),
        Some(Grad::F64(_)) => unreachable!("refused for single precision"),
    };
    let read = |i: usize| moments.get(i).map_or(Vec::new(), |m| m.read(i, 0..n));
    let mut states = [read(0), read(1)];
    let [m, v] = &mut states;
    let sums = update(factors, &mut p, &g, m, v);
    if factors.writes_values() {
        values.set_master(0, &p);
    }
    if factors.writes_moments() {
        for (i, (moment, state)) in moments.iter_mut().zip(&states).enumerate() {
            moment.write(i, 0, state);
        }
    }
    match grad {
        Some(Grad::TakeF32(g)) => g.fill(0.0),
        Some(Grad::TakeBf16(g)) => g.fill(bf16::ZERO),
        Some(Grad::TakeF16(g)) => g.fill(f16::ZERO),
        _ => {}
    }
    sums
}

/// One step of a rule, as [`crate::optim::step`].
pub fn optimizer_step(
    rule: &Rule,
    mut values: Values<'_>,
    mut grad: Grad<'_>,
    moments: &mut [Moment<'_>],
) {
    if let (Values::F64(p), Grad::F64(g)) = (&mut values, &grad) {
        let [m, v] = doubles(moments);
        update(&rule.factors(), p, g, m, v);
    } else {
        update_stored(&rule.factors(), &mut values, Some(&mut grad), moments);
    }
}

/// The moments of [`Values::F64`]; empty where there are fewer than two.
pub(crate) fn doubles<'a>(moments: &'a mut [Moment<'_>]) -> [&'a mut [f64]; 2] {
    let mut states: [&mut [f64]; 2] = Default::default();
    for (state, moment) in states.iter_mut().zip(moments) {
        match moment {
            Moment::F64(m) => *state = m,
            other => panic!("{:?} moments of f64 values", other.storage()),
        }
    }
    states
}
