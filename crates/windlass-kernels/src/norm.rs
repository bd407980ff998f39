//! Normalization over the last dimension, and its gradients.
//!
//! Statistics are kept in the arithmetic type, one number a row, for the backward pass. Weight gradients are summed in
//! stripes of columns, rows in order, onto what is there: their bits depend neither on the number of threads nor on how
//! a batch was cut into micro-batches.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

mod vector;

kernels! {
    fn rms_norm_chunk<E>(x: &[E], w: &[E], offset: f32, eps: f32, y: &mut [E], inv_rms: &mut [<E as Element>::Acc]) -> () { scalar: reference::rms_norm, simd: vector::rms_norm }
    fn rms_norm_dx_chunk<E>(x: &[E], w: &[E], offset: f32, inv_rms: &[<E as Element>::Acc], dy: &[E], dx: &mut [E], accumulate: bool) -> () { scalar: reference::rms_norm_dx, simd: vector::rms_norm_dx }
    fn rms_norm_dw_chunk<E>(x: &[E], cols: usize, start: usize, inv_rms: &[<E as Element>::Acc], dy: &[E], dw: &mut [<E as Element>::Acc]) -> () { scalar: reference::rms_norm_dw, simd: vector::rms_norm_dw }
    fn layer_norm_chunk<E>(x: &[E], w: &[E], b: Option<&[E]>, eps: f32, y: &mut [E], mean: &mut [<E as Element>::Acc], inv_std: &mut [<E as Element>::Acc]) -> () { scalar: reference::layer_norm, simd: vector::layer_norm }
    fn layer_norm_dx_chunk<E>(x: &[E], w: &[E], mean: &[<E as Element>::Acc], inv_std: &[<E as Element>::Acc], dy: &[E], dx: &mut [E], accumulate: bool) -> () { scalar: reference::layer_norm_dx, simd: vector::layer_norm_dx }
    fn layer_norm_dw_chunk<E>(x: &[E], cols: usize, start: usize, mean: &[<E as Element>::Acc], inv_std: &[<E as Element>::Acc], dy: &[E], dw: &mut [<E as Element>::Acc], db: Option<&mut [<E as Element>::Acc]>) -> () { scalar: reference::layer_norm_dw, simd: vector::layer_norm_dw }
}

/// Root mean square normalization: `y = x * inv_rms * (offset + w)`, `inv_rms = 1 / sqrt(mean(x²) + eps)`.
///
/// `offset` is 0 for most models and 1 where the weight is stored as a difference from one.
///
/// # Shapes
/// `x`, `y`: `[rows, cols]`; `w`: `[cols]`; `inv_rms`: `[rows]`, kept for [`rms_norm_backward`].
///
/// # Panics
/// When a length does not fit the shape.
///
/// # Source
/// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
#[track_caller]
pub fn rms_norm<E: Element>(
    pool: &Pool,
    x: &[E],
    w: &[E],
    offset: f32,
    eps: f32,
    y: &mut [E],
    inv_rms: &mut [E::Acc],
) {
    let (rows, cols) = (inv_rms.len(), w.len());
    assert_len("x", x.len(), rows * cols);
    assert_len("y", y.len(), rows * cols);
    let chunk = rms_norm_chunk::<E>(pool.level());
    let (y, inv_rms) = (SharedMut::new(y), SharedMut::new(inv_rms));
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let at = cells(&rows, cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe {
            chunk(
                &x[at.clone()],
                w,
                offset,
                eps,
                y.part(at),
                inv_rms.part(rows),
            )
        }
    });
}

/// Gradients of [`rms_norm`]: `dx` overwritten, or added to if `accumulate_dx`; `dw` always added to.
///
/// With `g = dy * (offset + w)`: `dx = inv_rms * (g - x * inv_rms² * mean(g x))`, `dw = Σ_rows dy * x * inv_rms`.
///
/// # Shapes
/// `x`, `dy`, `dx`: `[rows, cols]`; `w`, `dw`: `[cols]`; `inv_rms`: `[rows]`.
///
/// # Panics
/// When a length does not fit the shape.
#[track_caller]
pub fn rms_norm_backward<E: Element>(
    pool: &Pool,
    x: &[E],
    w: &[E],
    offset: f32,
    inv_rms: &[E::Acc],
    dy: &[E],
    dx: &mut [E],
    accumulate_dx: bool,
    dw: &mut [E::Acc],
) {
    let (rows, cols) = (inv_rms.len(), w.len());
    assert_len("x", x.len(), rows * cols);
    assert_len("dy", dy.len(), rows * cols);
    assert_len("dx", dx.len(), rows * cols);
    assert_len("dw", dw.len(), cols);
    let chunk = rms_norm_dx_chunk::<E>(pool.level());
    let dx = SharedMut::new(dx);
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let at = cells(&rows, cols);
        let (x, dy) = (&x[at.clone()], &dy[at.clone()]);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(x, w, offset, &inv_rms[rows], dy, dx.part(at), accumulate_dx) }
    });
    let chunk = rms_norm_dw_chunk::<E>(pool.level());
    let dw = SharedMut::new(dw);
    let tasks = Tasks::stripes(cols);
    pool.run(tasks.count(), |task, _| {
        let stripe = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks have disjoint columns.
        unsafe { chunk(x, cols, stripe.start, inv_rms, dy, dw.part(stripe)) }
    });
}

/// Layer normalization: `y = (x - mean) * inv_std * w + b`, `inv_std = 1 / sqrt(mean((x - mean)²) + eps)`.
///
/// # Shapes
/// `x`, `y`: `[rows, cols]`; `w`, `b`: `[cols]`; `mean`, `inv_std`: `[rows]`, kept for [`layer_norm_backward`].
///
/// # Panics
/// When a length does not fit the shape.
///
/// # Source
/// Ba, Kiros and Hinton 2016, "Layer Normalization", equation 4.
#[track_caller]
pub fn layer_norm<E: Element>(
    pool: &Pool,
    x: &[E],
    w: &[E],
    b: Option<&[E]>,
    eps: f32,
    y: &mut [E],
    mean: &mut [E::Acc],
    inv_std: &mut [E::Acc],
) {
    let (rows, cols) = (mean.len(), w.len());
    assert_len("x", x.len(), rows * cols);
    assert_len("y", y.len(), rows * cols);
    assert_len("b", b.map_or(cols, <[E]>::len), cols);
    assert_len("inv_std", inv_std.len(), rows);
    let chunk = layer_norm_chunk::<E>(pool.level());
    let (y, mean, inv_std) = (
        SharedMut::new(y),
        SharedMut::new(mean),
        SharedMut::new(inv_std),
    );
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let at = cells(&rows, cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe {
            chunk(
                &x[at.clone()],
                w,
                b,
                eps,
                y.part(at),
                mean.part(rows.clone()),
                inv_std.part(rows),
            )
        }
    });
}

/// Gradients of [`layer_norm`]: `dx` overwritten, or added to if `accumulate_dx`; `dw` and `db` always added to.
///
/// With `g = dy * w` and `h = (x - mean) * inv_std`: `dx = inv_std * (g - mean(g) - h * mean(g h))`,
/// `dw = Σ_rows dy * h`, `db = Σ_rows dy`.
///
/// # Shapes
/// `x`, `dy`, `dx`: `[rows, cols]`; `w`, `dw`, `db`: `[cols]`; `mean`, `inv_std`: `[rows]`.
///
/// # Panics
/// When a length does not fit the shape.
#[track_caller]
pub fn layer_norm_backward<E: Element>(
    pool: &Pool,
    x: &[E],
    w: &[E],
    mean: &[E::Acc],
    inv_std: &[E::Acc],
    dy: &[E],
    dx: &mut [E],
    accumulate_dx: bool,
    dw: &mut [E::Acc],
    db: Option<&mut [E::Acc]>,
) {
    let (rows, cols) = (mean.len(), w.len());
    assert_len("x", x.len(), rows * cols);
    assert_len("inv_std", inv_std.len(), rows);
    assert_len("dy", dy.len(), rows * cols);
    assert_len("dx", dx.len(), rows * cols);
    assert_len("dw", dw.len(), cols);
    assert_len("db", db.as_ref().map_or(cols, |db| db.len()), cols);
    let chunk = layer_norm_dx_chunk::<E>(pool.level());
    let dx = SharedMut::new(dx);
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let at = cells(&rows, cols);
        let (x, dy, mean, inv_std) = (
            &x[at.clone()],
            &dy[at.clone()],
            &mean[rows.clone()],
            &inv_std[rows],
        );
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe { chunk(x, w, mean, inv_std, dy, dx.part(at), accumulate_dx) }
    });
    let chunk = layer_norm_dw_chunk::<E>(pool.level());
    let (dw, db) = (SharedMut::new(dw), db.map(SharedMut::new));
    let tasks = Tasks::stripes(cols);
    pool.run(tasks.count(), |task, _| {
        let stripe = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks have disjoint columns.
        unsafe {
            let db = db.as_ref().map(|db| db.part(stripe.clone()));
            chunk(
                x,
                cols,
                stripe.start,
                mean,
                inv_std,
                dy,
                dw.part(stripe),
                db,
            )
        }
    });
}
