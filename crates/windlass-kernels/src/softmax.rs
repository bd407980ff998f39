//! Softmax and its logarithm over rows, and their gradients.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

pub(crate) mod vector;

kernels! {
    fn softmax_chunk<E>(x: &[E], cols: usize, y: &mut [E]) -> () { scalar: reference::softmax, simd: vector::softmax }
    fn softmax_backward_chunk<E>(y: &[E], dy: &[E], cols: usize, dx: &mut [E]) -> () { scalar: reference::softmax_backward, simd: vector::softmax_backward }
    fn log_softmax_chunk<E>(x: &[E], cols: usize, y: &mut [E]) -> () { scalar: reference::log_softmax, simd: vector::log_softmax }
    fn log_softmax_backward_chunk<E>(y: &[E], dy: &[E], cols: usize, dx: &mut [E]) -> () { scalar: reference::log_softmax_backward, simd: vector::log_softmax_backward }
}

/// Splits `[rows, cols]` over tasks for the four kernels below.
#[track_caller]
fn row_tasks(len: usize, cols: usize) -> Tasks {
    assert!(
        cols > 0 && len.is_multiple_of(cols),
        "{len} elements are not rows of {cols}"
    );
    Tasks::rows(len / cols, cols)
}

/// `y = e^(x - max) / Σ e^(x - max)` over each row; NaN in a row of nothing but -∞.
///
/// # Shapes
/// `x`, `y`: `[rows, cols]`.
///
/// # Panics
/// When the lengths differ or are no multiple of `cols`.
#[track_caller]
pub fn softmax<E: Element>(pool: &Pool, x: &[E], cols: usize, y: &mut [E]) {
    assert_len("y", y.len(), x.len());
    let tasks = row_tasks(x.len(), cols);
    let chunk = softmax_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    pool.run(tasks.count(), |task, _| {
        let at = cells(&tasks.part(task), cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(&x[at.clone()], cols, y.part(at)) }
    });
}

/// The gradient of [`softmax`] from its result: `dx = y (dy - Σ y dy)`.
///
/// # Shapes
/// `y`, `dy`, `dx`: `[rows, cols]`.
///
/// # Panics
/// When the lengths differ or are no multiple of `cols`.
#[track_caller]
pub fn softmax_backward<E: Element>(pool: &Pool, y: &[E], dy: &[E], cols: usize, dx: &mut [E]) {
    assert_len("dy", dy.len(), y.len());
    assert_len("dx", dx.len(), y.len());
    let tasks = row_tasks(y.len(), cols);
    let chunk = softmax_backward_chunk::<E>(pool.level());
    let dx = SharedMut::new(dx);
    pool.run(tasks.count(), |task, _| {
        let at = cells(&tasks.part(task), cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(&y[at.clone()], &dy[at.clone()], cols, dx.part(at)) }
    });
}

/// `y = x - max - ln Σ e^(x - max)` over each row; NaN in a row of nothing but -∞.
///
/// # Shapes
/// `x`, `y`: `[rows, cols]`.
///
/// # Panics
/// When the lengths differ or are no multiple of `cols`.
#[track_caller]
pub fn log_softmax<E: Element>(pool: &Pool, x: &[E], cols: usize, y: &mut [E]) {
    assert_len("y", y.len(), x.len());
    let tasks = row_tasks(x.len(), cols);
    let chunk = log_softmax_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    pool.run(tasks.count(), |task, _| {
        let at = cells(&tasks.part(task), cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(&x[at.clone()], cols, y.part(at)) }
    });
}

/// The gradient of [`log_softmax`] from its result: `dx = dy - e^y Σ dy`.
///
/// # Shapes
/// `y`, `dy`, `dx`: `[rows, cols]`.
///
/// # Panics
/// When the lengths differ or are no multiple of `cols`.
#[track_caller]
pub fn log_softmax_backward<E: Element>(pool: &Pool, y: &[E], dy: &[E], cols: usize, dx: &mut [E]) {
    assert_len("dy", dy.len(), y.len());
    assert_len("dx", dx.len(), y.len());
    let tasks = row_tasks(y.len(), cols);
    let chunk = log_softmax_backward_chunk::<E>(pool.level());
    let dx = SharedMut::new(dx);
    pool.run(tasks.count(), |task, _| {
        let at = cells(&tasks.part(task), cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(&y[at.clone()], &dy[at.clone()], cols, dx.part(at)) }
    });
}
