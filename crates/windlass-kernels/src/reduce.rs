//! Sums over whole buffers, in `f64`, in blocks of a fixed size that are added in order.

use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

/// Elements of a block; its sum does not depend on the number of threads, nor does the order of the blocks.
const BLOCK: usize = 64 * 1024;

/// Computes one number a block and returns their sum in order; 0 on a dry pool.
fn sum_of_blocks(
    pool: &Pool,
    len: usize,
    block: impl Fn(std::ops::Range<usize>) -> f64 + Sync,
) -> f64 {
    let tasks = Tasks::blocks(len, BLOCK);
    let mut sums = vec![0.0; tasks.count()];
    let view = SharedMut::new(&mut sums);
    // SAFETY: one element a task.
    pool.run(tasks.count(), |task, _| unsafe {
        view.slice(task, 1)[0] = block(tasks.part(task))
    });
    sums.iter().sum()
}

/// `Σ x²`; 0 on a dry pool.
pub fn sum_squares<E: Element>(pool: &Pool, x: &[E]) -> f64 {
    let chunk = reference::sum_squares::<E>;
    sum_of_blocks(pool, x.len(), |at| chunk(&x[at]))
}

/// `Σ x y`; 0 on a dry pool.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn dot<E: Element>(pool: &Pool, x: &[E], y: &[E]) -> f64 {
    assert_len("y", y.len(), x.len());
    let chunk = reference::dot::<E>;
    sum_of_blocks(pool, x.len(), |at| chunk(&x[at.clone()], &y[at]))
}

/// How many elements are infinite or NaN; 0 on a dry pool.
pub fn count_nonfinite<E: Element>(pool: &Pool, x: &[E]) -> usize {
    let chunk = reference::count_nonfinite::<E>;
    // A block's count is small enough for `f64`, and so is any sum of them.
    sum_of_blocks(pool, x.len(), |at| chunk(&x[at]) as f64) as usize
}
