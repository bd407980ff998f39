//! Cross entropy of rows of logits against one class a row, loss and gradient together.
//!
//! It works on a chunk of rows, so that a caller need not hold the logits of all tokens at once.

use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

/// The target of a row that has no loss and no gradient.
pub const IGNORED: i64 = -100;

/// `loss = ln Σ e^z - z[target]` for each row, with `z = softcap tanh(logits / softcap)`, or the logits themselves; and
/// the gradient with respect to the logits, `(softmax(z) - onehot(target)) (1 - tanh²) scale`, rounded to `E`.
///
/// Rows whose target is [`IGNORED`] get loss and gradient 0. The largest `z` of a row is subtracted first: nothing
/// overflows, and logits of -∞ have probability 0.
///
/// # Shapes
/// `logits`: `[rows, cols]`, holding `z` afterwards; `targets`, `loss`: `[rows]`; `dlogits`: `[rows, cols]` and the
/// scale.
///
/// # Panics
/// When a length does not fit the shape, or a target is neither a column nor [`IGNORED`].
#[track_caller]
pub fn cross_entropy_rows<E: Element>(
    pool: &Pool,
    logits: &mut [E::Acc],
    cols: usize,
    softcap: Option<f32>,
    targets: &[i64],
    loss: &mut [E::Acc],
    dlogits: Option<(&mut [E], f32)>,
) {
    let rows = targets.len();
    assert_len("logits", logits.len(), rows * cols);
    assert_len("loss", loss.len(), rows);
    assert_len(
        "dlogits",
        dlogits.as_ref().map_or(rows * cols, |(d, _)| d.len()),
        rows * cols,
    );
    if !pool.is_dry() {
        let wrong = targets
            .iter()
            .find(|&&t| t != IGNORED && !(0..cols as i64).contains(&t));
        assert!(
            wrong.is_none(),
            "target {} is not one of {cols} classes",
            wrong.unwrap_or(&0)
        );
    }
    let chunk = reference::cross_entropy_rows::<E>;
    let (logits, loss) = (SharedMut::new(logits), SharedMut::new(loss));
    let dlogits = dlogits.map(|(d, scale)| (SharedMut::new(d), scale));
    let tasks = Tasks::rows(rows, cols);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let at = cells(&rows, cols);
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe {
            let dlogits = dlogits
                .as_ref()
                .map(|(d, scale)| (d.part(at.clone()), *scale));
            chunk(
                logits.part(at),
                cols,
                softcap,
                &targets[rows.clone()],
                loss.part(rows),
                dlogits,
            )
        }
    });
}
