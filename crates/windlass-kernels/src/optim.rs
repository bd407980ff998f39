//! Optimizer updates: each reads parameters, gradients and states once and writes them once.
//!
//! Parameters are `f32` (or `f64`), or the exact split master of [`crate::split`] in the `_split` forms. States are in
//! the arithmetic type. Hyperparameters are `f64`, as users write them; factors derived from them are computed in `f64`
//! and rounded once. Schedules, clipping and parameter groups belong to the caller.

use half::bf16;

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, Float, reference};

mod vector;

kernels! {
    fn adamw_chunk<E>(p: &mut [E], g: &[E], m: &mut [E], v: &mut [E], rule: &AdamW) -> () { scalar: reference::adamw, simd: vector::adamw }
    fn adamw_split_chunk<E>(hi: &mut [bf16], lo: &mut [i16], g: &[E], m: &mut [f32], v: &mut [f32], rule: &AdamW) -> () { scalar: reference::adamw_split, simd: vector::adamw_split }
    fn sgd_chunk<E>(p: &mut [E], g: &[E], buffer: &mut [E], rule: &Sgd) -> () { scalar: reference::sgd, simd: vector::sgd }
    fn sgd_split_chunk<E>(hi: &mut [bf16], lo: &mut [i16], g: &[E], buffer: &mut [f32], rule: &Sgd) -> () { scalar: reference::sgd_split, simd: vector::sgd_split }
    fn lion_chunk<E>(p: &mut [E], g: &[E], m: &mut [E], rule: &Lion) -> () { scalar: reference::lion, simd: vector::lion }
    fn lion_split_chunk<E>(hi: &mut [bf16], lo: &mut [i16], g: &[E], m: &mut [f32], rule: &Lion) -> () { scalar: reference::lion_split, simd: vector::lion_split }
}

/// AdamW: Adam with decoupled weight decay.
///
/// With `g' = grad_scale g`: `m ← β₁ m + (1 - β₁) g'`, `v ← β₂ v + (1 - β₂) g'²`,
/// `p ← (1 - lr λ) p - lr / (1 - β₁^t) * m / (sqrt(v / (1 - β₂^t)) + eps)`.
///
/// # Source
/// Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2; the decay is multiplied by the
/// learning rate, as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// λ, times the learning rate.
    pub weight_decay: f64,
    /// t: 1 at the first step.
    pub step: u64,
    /// Multiplies gradients first (clipping, loss scale, mean over micro-batches).
    pub grad_scale: f64,
}

/// [`AdamW`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWFactors<A> {
    pub grad_scale: A,
    pub one_minus_beta1: A,
    pub beta2: A,
    pub one_minus_beta2: A,
    /// `1 / sqrt(1 - β₂^t)`.
    pub correction: A,
    pub eps: A,
    /// `lr / (1 - β₁^t)`.
    pub step_size: A,
    /// `1 - lr λ`.
    pub decay: A,
}

impl AdamW {
    pub(crate) fn factors<A: Float>(&self) -> AdamWFactors<A> {
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        AdamWFactors {
            grad_scale: A::of(self.grad_scale),
            one_minus_beta1: A::of(1.0 - self.beta1),
            beta2: A::of(self.beta2),
            one_minus_beta2: A::of(1.0 - self.beta2),
            correction: A::of(1.0 / correction(self.beta2).sqrt()),
            eps: A::of(self.eps),
            step_size: A::of(self.lr / correction(self.beta1)),
            decay: A::of(1.0 - self.lr * self.weight_decay),
        }
    }
}

/// Stochastic gradient descent with momentum.
///
/// With `g' = grad_scale g + λ p`: `b ← g'` at the first step, then `b ← μ b + (1 - dampening) g'`;
/// `p ← p - lr b`, or `p ← p - lr (g' + μ b)` (Nesterov). Without momentum `p ← p - lr g'`.
///
/// # Source
/// Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in PyTorch's form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f64,
    /// μ; 0 needs no buffer.
    pub momentum: f64,
    /// Part of the gradient kept out of the buffer.
    pub dampening: f64,
    /// Look ahead along the buffer.
    pub nesterov: bool,
    /// λ, added to the gradient.
    pub weight_decay: f64,
    /// 1 at the first step, which fills the buffer.
    pub step: u64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Sgd`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdFactors<A> {
    pub grad_scale: A,
    pub weight_decay: A,
    pub momentum: A,
    pub one_minus_dampening: A,
    pub lr: A,
    /// The buffer's old contents are not used.
    pub first: bool,
    pub nesterov: bool,
}

impl Sgd {
    pub(crate) fn factors<A: Float>(&self) -> SgdFactors<A> {
        SgdFactors {
            grad_scale: A::of(self.grad_scale),
            weight_decay: A::of(self.weight_decay),
            momentum: A::of(self.momentum),
            one_minus_dampening: A::of(1.0 - self.dampening),
            lr: A::of(self.lr),
            first: self.step <= 1 || self.momentum == 0.0,
            nesterov: self.nesterov && self.momentum != 0.0,
        }
    }
}

/// Lion: the sign of an interpolated momentum.
///
/// With `g' = grad_scale g`: `c = β₁ m + (1 - β₁) g'`, `p ← (1 - lr λ) p - lr sign(c)`, `m ← β₂ m + (1 - β₂) g'`.
///
/// # Source
/// Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f64,
    /// Interpolation of the update.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// λ, times the learning rate.
    pub weight_decay: f64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Lion`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LionFactors<A> {
    pub grad_scale: A,
    pub one_minus_beta1: A,
    pub one_minus_beta2: A,
    pub lr: A,
    /// `1 - lr λ`.
    pub decay: A,
}

impl Lion {
    pub(crate) fn factors<A: Float>(&self) -> LionFactors<A> {
        LionFactors {
            grad_scale: A::of(self.grad_scale),
            one_minus_beta1: A::of(1.0 - self.beta1),
            one_minus_beta2: A::of(1.0 - self.beta2),
            lr: A::of(self.lr),
            decay: A::of(1.0 - self.lr * self.weight_decay),
        }
    }
}

/// One step of [`AdamW`] on parameters `p` with gradients `g` and moments `m`, `v` (zeros before the first step).
///
/// # Panics
/// When the lengths differ, or `step` is 0.
#[track_caller]
pub fn adamw<F: Float>(pool: &Pool, p: &mut [F], g: &[F], m: &mut [F], v: &mut [F], rule: &AdamW) {
    assert!(rule.step > 0, "step counts from 1, got {}", rule.step);
    assert_len("g", g.len(), p.len());
    assert_len("m", m.len(), p.len());
    assert_len("v", v.len(), p.len());
    let chunk = adamw_chunk::<F>(pool.level());
    let tasks = Tasks::elements(p.len());
    let (p, m, v) = (SharedMut::new(p), SharedMut::new(m), SharedMut::new(v));
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe {
            chunk(
                p.part(at.clone()),
                &g[at.clone()],
                m.part(at.clone()),
                v.part(at),
                rule,
            )
        }
    });
}

/// As [`adamw`], on parameters `hi` that keep the rest of their `f32` master in `lo`.
///
/// # Panics
/// When the lengths differ, or `step` is 0.
#[track_caller]
pub fn adamw_split<G: Element>(
    pool: &Pool,
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    v: &mut [f32],
    rule: &AdamW,
) {
    assert!(rule.step > 0, "step counts from 1, got {}", rule.step);
    assert_len("lo", lo.len(), hi.len());
    assert_len("g", g.len(), hi.len());
    assert_len("m", m.len(), hi.len());
    assert_len("v", v.len(), hi.len());
    let chunk = adamw_split_chunk::<G>(pool.level());
    let tasks = Tasks::elements(hi.len());
    let (hi, lo, m, v) = (
        SharedMut::new(hi),
        SharedMut::new(lo),
        SharedMut::new(m),
        SharedMut::new(v),
    );
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe {
            let (hi, lo) = (hi.part(at.clone()), lo.part(at.clone()));
            chunk(hi, lo, &g[at.clone()], m.part(at.clone()), v.part(at), rule)
        }
    });
}

/// Checks the momentum buffer of [`sgd`]; returns whether it is used.
#[track_caller]
fn buffered(rule: &Sgd, buffer: usize, len: usize) -> bool {
    assert!(rule.step > 0, "step counts from 1, got {}", rule.step);
    let used = rule.momentum != 0.0;
    assert!(
        if used {
            buffer == len
        } else {
            buffer == 0 || buffer == len
        },
        "the buffer has {buffer} elements of {len}"
    );
    used
}

/// One step of [`Sgd`] on parameters `p` with gradients `g` and the momentum `buffer`, which may be empty where
/// `momentum` is 0 and is not touched then.
///
/// # Panics
/// When the lengths differ, or `step` is 0.
#[track_caller]
pub fn sgd<F: Float>(pool: &Pool, p: &mut [F], g: &[F], buffer: &mut [F], rule: &Sgd) {
    assert_len("g", g.len(), p.len());
    let used = buffered(rule, buffer.len(), p.len());
    let chunk = sgd_chunk::<F>(pool.level());
    let tasks = Tasks::elements(p.len());
    let (p, buffer) = (SharedMut::new(p), SharedMut::new(buffer));
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe {
            chunk(
                p.part(at.clone()),
                &g[at.clone()],
                buffer.part(if used { at } else { 0..0 }),
                rule,
            )
        }
    });
}

/// As [`sgd`], on parameters `hi` that keep the rest of their `f32` master in `lo`.
///
/// # Panics
/// When the lengths differ, or `step` is 0.
#[track_caller]
pub fn sgd_split<G: Element>(
    pool: &Pool,
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    buffer: &mut [f32],
    rule: &Sgd,
) {
    assert_len("lo", lo.len(), hi.len());
    assert_len("g", g.len(), hi.len());
    let used = buffered(rule, buffer.len(), hi.len());
    let chunk = sgd_split_chunk::<G>(pool.level());
    let tasks = Tasks::elements(hi.len());
    let (hi, lo, buffer) = (
        SharedMut::new(hi),
        SharedMut::new(lo),
        SharedMut::new(buffer),
    );
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe {
            let (hi, lo) = (hi.part(at.clone()), lo.part(at.clone()));
            chunk(
                hi,
                lo,
                &g[at.clone()],
                buffer.part(if used { at } else { 0..0 }),
                rule,
            )
        }
    });
}

/// One step of [`Lion`] on parameters `p` with gradients `g` and momentum `m` (zeros before the first step).
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn lion<F: Float>(pool: &Pool, p: &mut [F], g: &[F], m: &mut [F], rule: &Lion) {
    assert_len("g", g.len(), p.len());
    assert_len("m", m.len(), p.len());
    let chunk = lion_chunk::<F>(pool.level());
    let tasks = Tasks::elements(p.len());
    let (p, m) = (SharedMut::new(p), SharedMut::new(m));
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(p.part(at.clone()), &g[at.clone()], m.part(at), rule) }
    });
}

/// As [`lion`], on parameters `hi` that keep the rest of their `f32` master in `lo`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn lion_split<G: Element>(
    pool: &Pool,
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    rule: &Lion,
) {
    assert_len("lo", lo.len(), hi.len());
    assert_len("g", g.len(), hi.len());
    assert_len("m", m.len(), hi.len());
    let chunk = lion_split_chunk::<G>(pool.level());
    let tasks = Tasks::elements(hi.len());
    let (hi, lo, m) = (SharedMut::new(hi), SharedMut::new(lo), SharedMut::new(m));
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe {
            chunk(
                hi.part(at.clone()),
                lo.part(at.clone()),
                &g[at.clone()],
                m.part(at),
                rule,
            )
        }
    });
}
