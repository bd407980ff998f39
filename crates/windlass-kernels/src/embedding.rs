//! Table look-up and its gradient.

use crate::dispatch::kernels;
use crate::elementwise::vector;
use crate::pool::{Pool, SharedMut};
use crate::simd::{Simd, SimdElement};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

kernels! {
    fn gather_chunk<E>(table: &[E], cols: usize, ids: &[u32], scale: f32, y: &mut [E]) -> () { scalar: reference::gather, simd: gather_vector }
    fn accumulate_chunk<E>(a: f32, x: &[E], y: &mut [<E as Element>::Acc]) -> () { scalar: accumulate, simd: vector::accumulate }
}

/// Checks the shapes both ways and returns the number of columns; 0 where there is nothing to do.
#[track_caller]
fn columns(pool: &Pool, table: usize, ids: &[u32], rows: usize) -> usize {
    if ids.is_empty() || rows == 0 {
        assert_len("the side of the tokens", rows, 0);
        return 0;
    }
    assert!(
        rows.is_multiple_of(ids.len()),
        "{rows} elements are not {} rows",
        ids.len()
    );
    let cols = rows / ids.len();
    assert!(
        table.is_multiple_of(cols),
        "a table of {table} elements has no rows of {cols}"
    );
    if !pool.is_dry() {
        let last = *ids.iter().max().expect("there are tokens") as usize;
        assert!(
            last < table / cols,
            "id {last} lies beyond the {} rows of the table",
            table / cols
        );
    }
    cols
}

/// `y[t] = table[ids[t]] * scale`.
///
/// # Shapes
/// `table`: `[V, d]`; `ids`: `[T]`; `y`: `[T, d]`, which gives `d`.
///
/// # Panics
/// When a length does not fit the shape or an id is not below `V`.
#[track_caller]
pub fn gather<E: Element>(pool: &Pool, table: &[E], ids: &[u32], scale: f32, y: &mut [E]) {
    let cols = columns(pool, table.len(), ids, y.len());
    if cols == 0 {
        return;
    }
    let chunk = gather_chunk::<E>(pool.level());
    let y = SharedMut::new(y);
    let tasks = Tasks::rows(ids.len(), cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe {
            chunk(
                table,
                cols,
                &ids[rows.clone()],
                scale,
                y.part(cells(&rows, cols)),
            )
        }
    });
}

/// The gradient of [`gather`]: `dtable[ids[t]] += dy[t] * scale`, tokens in order, tasks being stripes of columns.
///
/// # Shapes
/// `dy`: `[T, d]`; `ids`: `[T]`; `dtable`: `[V, d]`.
///
/// # Panics
/// When a length does not fit the shape or an id is not below `V`.
#[track_caller]
pub fn scatter_add<E: Element>(
    pool: &Pool,
    dy: &[E],
    ids: &[u32],
    scale: f32,
    dtable: &mut [E::Acc],
) {
    let cols = columns(pool, dtable.len(), ids, dy.len());
    if cols == 0 {
        return;
    }
    let add = accumulate_chunk::<E>(pool.level());
    let dtable = SharedMut::new(dtable);
    let tasks = Tasks::stripes(cols);
    pool.run(tasks.count(), |task, _| {
        let stripe = tasks.part(task);
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(cols)) {
            // SAFETY: the pool's level is supported, tasks have disjoint columns.
            unsafe {
                add(
                    scale,
                    &dy[stripe.clone()],
                    dtable.slice(id as usize * cols + stripe.start, stripe.len()),
                )
            }
        }
    });
}

/// One row of [`reference::scatter_add`].
fn accumulate<E: Element>(a: f32, x: &[E], y: &mut [E::Acc]) {
    reference::scatter_add(x, x.len(), &[0], a, y);
}

/// # Safety
/// The CPU has the features of `S`; lengths and ids were checked by [`gather`].
#[inline(always)]
unsafe fn gather_vector<S: Simd, E: SimdElement>(
    table: &[E],
    cols: usize,
    ids: &[u32],
    scale: f32,
    y: &mut [E],
) {
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(cols)) {
        let x = &table[id as usize * cols..][..cols];
        if scale == 1.0 {
            y.copy_from_slice(x);
        } else {
            // SAFETY: the features are the caller's promise, the lengths agree.
            unsafe { vector::scale::<S, E>(scale, x, y) }
        }
    }
}
