//! Element by element operations, row sums and transposition.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

pub(crate) mod vector;

kernels! {
    fn add_chunk<E>(a: &[E], b: &[E], y: &mut [E]) -> () { scalar: reference::add, simd: vector::add }
    fn mul_chunk<E>(a: &[E], b: &[E], y: &mut [E]) -> () { scalar: reference::mul, simd: vector::mul }
    fn scale_chunk<E>(a: f32, x: &[E], y: &mut [E]) -> () { scalar: reference::scale, simd: vector::scale }
    fn scale_in_place_chunk<E>(a: f32, x: &mut [E]) -> () { scalar: reference::scale_in_place, simd: vector::scale_in_place }
    fn axpy_chunk<E>(a: f32, x: &[E], y: &mut [E]) -> () { scalar: reference::axpy, simd: vector::axpy }
    fn sum_rows_chunk<E>(x: &[E], cols: usize, start: usize, sums: &mut [<E as Element>::Acc]) -> () { scalar: reference::sum_rows, simd: vector::sum_rows }
}

/// `y = a + b`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn add<E: Element>(pool: &Pool, a: &[E], b: &[E], y: &mut [E]) {
    binary(pool, add_chunk::<E>(pool.level()), a, b, y);
}

/// `y = a b`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn mul<E: Element>(pool: &Pool, a: &[E], b: &[E], y: &mut [E]) {
    binary(pool, mul_chunk::<E>(pool.level()), a, b, y);
}

#[track_caller]
fn binary<E: Element>(
    pool: &Pool,
    chunk: unsafe fn(&[E], &[E], &mut [E]),
    a: &[E],
    b: &[E],
    y: &mut [E],
) {
    assert_len("b", b.len(), a.len());
    assert_len("y", y.len(), a.len());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(a.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the chunk is of the pool's level, tasks are disjoint.
        unsafe { chunk(&a[at.clone()], &b[at.clone()], y.part(at)) }
    });
}

/// `y = a x`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn scale<E: Element>(pool: &Pool, a: f32, x: &[E], y: &mut [E]) {
    assert_len("y", y.len(), x.len());
    let chunk = scale_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(x.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(a, &x[at.clone()], y.part(at)) }
    });
}

/// `x = a x`.
pub fn scale_in_place<E: Element>(pool: &Pool, a: f32, x: &mut [E]) {
    let chunk = scale_in_place_chunk::<E>(pool.level());
    let tasks = Tasks::elements(x.len());
    let x = SharedMut::new(x);
    // SAFETY: the pool's level is supported, tasks are disjoint.
    pool.run(tasks.count(), |task, _| unsafe {
        chunk(a, x.part(tasks.part(task)))
    });
}

/// `y += a x`.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn axpy<E: Element>(pool: &Pool, a: f32, x: &[E], y: &mut [E]) {
    assert_len("y", y.len(), x.len());
    let chunk = axpy_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(x.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(a, &x[at.clone()], y.part(at)) }
    });
}

/// `y = value`.
pub fn fill<E: Element>(pool: &Pool, value: E, y: &mut [E]) {
    let tasks = Tasks::elements(y.len());
    let y = SharedMut::new(y);
    // SAFETY: tasks are disjoint.
    pool.run(tasks.count(), |task, _| {
        reference::fill(value, unsafe { y.part(tasks.part(task)) })
    });
}

/// `sums[c] += Σ_r x[r, c]`, rows in order, tasks being stripes of columns: the gradient of a bias.
///
/// # Shapes
/// `x`: `[rows, cols]`; `sums`: `[cols]`.
///
/// # Panics
/// When `x` is no multiple of `sums`.
#[track_caller]
pub fn sum_rows<E: Element>(pool: &Pool, x: &[E], sums: &mut [E::Acc]) {
    let cols = sums.len();
    if cols == 0 {
        return assert_len("x", x.len(), 0);
    }
    assert!(
        x.len().is_multiple_of(cols),
        "{} elements are not rows of {cols}",
        x.len()
    );
    let chunk = sum_rows_chunk::<E>(pool.level());
    let sums = SharedMut::new(sums);
    let tasks = Tasks::stripes(cols);
    pool.run(tasks.count(), |task, _| {
        let stripe = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks have disjoint columns.
        unsafe { chunk(x, cols, stripe.start, sums.part(stripe)) }
    });
}

/// `y[c, r] = x[r, c]`.
///
/// # Shapes
/// `x`: `[rows, cols]`; `y`: `[cols, rows]`.
///
/// # Panics
/// When a length does not fit the shape.
#[track_caller]
pub fn transpose<E: Element>(pool: &Pool, x: &[E], rows: usize, cols: usize, y: &mut [E]) {
    /// Side of a tile: a cache line or more of each row of either side.
    const TILE: usize = 32;
    assert_len("x", x.len(), rows * cols);
    assert_len("y", y.len(), rows * cols);
    let y = SharedMut::new(y);
    // A task writes some whole rows of `y`, tile by tile. A tile goes through a copy, so that both sides are touched
    // in whole lines: with strides of a power of two the lines of a column fall onto each other in the cache.
    let tasks = Tasks::blocks(cols, TILE);
    pool.run(tasks.count(), |task, _| {
        let part = tasks.part(task);
        // SAFETY: tasks have disjoint rows of `y`.
        let y = unsafe { y.slice(part.start * rows, part.len() * rows) };
        let mut tile = [[E::default(); TILE]; TILE];
        for top in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - top);
            for (r, tile) in tile[..height].iter_mut().enumerate() {
                tile[..part.len()].copy_from_slice(&x[(top + r) * cols..][part.clone()]);
            }
            for (c, y) in y.chunks_exact_mut(rows).enumerate() {
                for (y, tile) in y[top..top + height].iter_mut().zip(&tile) {
                    *y = tile[c];
                }
            }
        }
    });
}
