//! Activation functions, alone and gating another tensor, and their gradients.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

mod vector;

pub(crate) use vector::activated;

kernels! {
    fn activation_chunk<E>(kind: Activation, x: &[E], y: &mut [E]) -> () { scalar: reference::activation, simd: vector::activation }
    fn activation_backward_chunk<E>(kind: Activation, x: &[E], dy: &[E], dx: &mut [E]) -> () { scalar: reference::activation_backward, simd: vector::activation_backward }
    fn gated_chunk<E>(kind: Activation, gate: &[E], up: &[E], y: &mut [E]) -> () { scalar: reference::gated, simd: vector::gated }
    fn gated_backward_chunk<E>(kind: Activation, gate: &[E], up: &[E], dy: &[E], dgate: &mut [E], dup: &mut [E]) -> () { scalar: reference::gated_backward, simd: vector::gated_backward }
}

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)` (SiLU, swish).
    Silu,
    /// `x Φ(x) = x (1 + erf(x / √2)) / 2`.
    Gelu,
    /// `x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2`.
    GeluTanh,
    /// `max(x, 0)`; its derivative at 0 is 0.
    Relu,
}

/// `y = act(x)`.
///
/// # Panics
/// When the lengths differ.
///
/// # Source
/// Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", for all but ReLU.
#[track_caller]
pub fn activation<E: Element>(pool: &Pool, kind: Activation, x: &[E], y: &mut [E]) {
    assert_len("y", y.len(), x.len());
    let chunk = activation_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(x.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(kind, &x[at.clone()], y.part(at)) }
    });
}

/// `dx = act'(x) dy`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn activation_backward<E: Element>(
    pool: &Pool,
    kind: Activation,
    x: &[E],
    dy: &[E],
    dx: &mut [E],
) {
    assert_len("dy", dy.len(), x.len());
    assert_len("dx", dx.len(), x.len());
    let chunk = activation_backward_chunk::<E>(pool.level());
    let dx = SharedMut::new(dx);
    let tasks = Tasks::elements(x.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(kind, &x[at.clone()], &dy[at.clone()], dx.part(at)) }
    });
}

/// `y = act(gate) up`.
///
/// # Panics
/// When the lengths differ.
///
/// # Source
/// Shazeer 2020, "GLU Variants Improve Transformer", equation 5.
#[track_caller]
pub fn gated<E: Element>(pool: &Pool, kind: Activation, gate: &[E], up: &[E], y: &mut [E]) {
    assert_len("up", up.len(), gate.len());
    assert_len("y", y.len(), gate.len());
    let chunk = gated_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(gate.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(kind, &gate[at.clone()], &up[at.clone()], y.part(at)) }
    });
}

/// `dgate = act'(gate) up dy`, `dup = act(gate) dy`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn gated_backward<E: Element>(
    pool: &Pool,
    kind: Activation,
    gate: &[E],
    up: &[E],
    dy: &[E],
    dgate: &mut [E],
    dup: &mut [E],
) {
    assert_len("up", up.len(), gate.len());
    assert_len("dy", dy.len(), gate.len());
    assert_len("dgate", dgate.len(), gate.len());
    assert_len("dup", dup.len(), gate.len());
    let chunk = gated_backward_chunk::<E>(pool.level());
    let (dgate, dup) = (SharedMut::new(dgate), SharedMut::new(dup));
    let tasks = Tasks::elements(gate.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        let (gate, up, dy) = (&gate[at.clone()], &up[at.clone()], &dy[at.clone()]);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(kind, gate, up, dy, dgate.part(at.clone()), dup.part(at)) }
    });
}
