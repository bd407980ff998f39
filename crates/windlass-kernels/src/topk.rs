//! The largest elements of rows, for expert routing.

use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

/// For each row of `cols`, the `k` largest elements and their columns, in descending order; ties go to the lower
/// column, NaN ranks with -∞.
///
/// Rows are short (experts, not vocabularies) and `k` is a handful: every level runs the scalar code.
///
/// # Shapes
/// `x`: `[rows, cols]`; `values`, `indices`: `[rows, k]`.
///
/// # Panics
/// When a length does not fit the shape or `k` is not in `1..=cols`.
#[track_caller]
pub fn top_k<E: Element>(
    pool: &Pool,
    x: &[E],
    cols: usize,
    k: usize,
    values: &mut [E],
    indices: &mut [u32],
) {
    assert!(
        (1..=cols).contains(&k),
        "cannot take the {k} largest of {cols}"
    );
    assert!(
        x.len().is_multiple_of(cols),
        "{} elements are not rows of {cols}",
        x.len()
    );
    let rows = x.len() / cols;
    assert_len("values", values.len(), rows * k);
    assert_len("indices", indices.len(), rows * k);
    let (values, indices) = (SharedMut::new(values), SharedMut::new(indices));
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let (to, x) = (cells(&rows, k), &x[cells(&rows, cols)]);
        // SAFETY: tasks have disjoint rows.
        let (values, indices) = unsafe { (values.part(to.clone()), indices.part(to)) };
        reference::top_k(x, cols, k, values, indices);
    });
}
