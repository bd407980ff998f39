//! Conversion between storage types.

use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

/// `y = x` in another type, rounded to nearest even.
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn cast<X: Element, Y: Element>(pool: &Pool, x: &[X], y: &mut [Y]) {
    assert_len("y", y.len(), x.len());
    let chunk = reference::cast::<X, Y>;
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(x.len());
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        // SAFETY: the pool's level is supported, tasks are disjoint.
        unsafe { chunk(&x[at.clone()], y.part(at)) }
    });
}
