//! Cross entropy of rows of logits against one class a row, loss and gradient together.
//!
//! It works on a chunk of rows, so that a caller need not hold the logits of all tokens at once.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::simd::{Simd, SimdElement};
use crate::softmax::vector::{Max, SumExp, normal_from};
use crate::stream::{Fold, Step, Width, fold, stream};
use crate::tasks::{Tasks, assert_len, cells};
use crate::{Element, reference};

kernels! {
    fn cross_entropy_rows_chunk<E>(logits: &mut [<E as Element>::Acc], cols: usize, softcap: Option<f32>, targets: &[i64], loss: &mut [<E as Element>::Acc], dlogits: Option<(&mut [E], f32)>) -> () { scalar: reference::cross_entropy_rows, simd: cross_entropy_vector }
}

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
    let chunk = cross_entropy_rows_chunk::<E>(pool.level());
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

/// `z = cap tanh(z / cap)` in place, and the largest.
struct Cap(*mut f32, f32);

impl Fold<1> for Cap {
    const START: f32 = f32::NEG_INFINITY;
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [held]: [S; 1]) -> [S; 1] {
        // SAFETY: the caller's promise.
        unsafe {
            let cap = S::splat(self.1);
            let z = (width.load::<S, f32>(self.0.add(i)) / cap).tanh() * cap;
            width.store(self.0.add(i), z);
            [z.max(held)]
        }
    }
    #[inline(always)]
    fn join<S: Simd>(a: S, b: S) -> S {
        a.max(b)
    }
}

/// `d = e^(z - max) * factor`, times `1 - (z / cap)²`.
struct Gradient<E> {
    z: *const f32,
    d: *mut E,
    max: f32,
    factor: f32,
    floor: f32,
    cap: Option<f32>,
}

impl<E: SimdElement> Step for Gradient<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        // SAFETY: the caller's promise.
        unsafe {
            let z: S = width.load(self.z.add(i));
            let e = (z - S::splat(self.max)).exp_above(S::splat(self.floor));
            let mut d = e * S::splat(self.factor);
            if let Some(cap) = self.cap {
                let t = z / S::splat(cap);
                d = d * t.fnma(t, S::splat(1.0));
            }
            width.store(self.d.add(i), d);
        }
    }
}

/// # Safety
/// The CPU has the features of `S`; lengths and targets were checked by [`cross_entropy_rows`].
#[inline(always)]
unsafe fn cross_entropy_vector<S: Simd, E: SimdElement>(
    logits: &mut [f32],
    cols: usize,
    cap: Option<f32>,
    targets: &[i64],
    loss: &mut [f32],
    mut dlogits: Option<(&mut [E], f32)>,
) {
    for (r, (&target, loss)) in targets.iter().zip(loss).enumerate() {
        let d = dlogits
            .as_mut()
            .map(|(d, scale)| (&mut d[r * cols..][..cols], *scale));
        if target == IGNORED {
            *loss = 0.0;
            if let Some((d, _)) = d {
                d.fill(E::default());
            }
            continue;
        }
        let z = &mut logits[r * cols..][..cols];
        // SAFETY: the row has `cols` elements.
        unsafe {
            let [max] = match cap {
                Some(cap) => fold::<S, 1, _>(cols, Cap(z.as_mut_ptr(), cap)),
                None => fold::<S, 1, _>(cols, Max(z.as_ptr())),
            };
            let max = max.hmax();
            let [sum] = fold::<S, 1, _>(cols, SumExp(z.as_ptr(), max));
            let sum = sum.sum();
            let hit = z[target as usize];
            *loss = sum.ln() - (hit - max);
            if let Some((d, scale)) = d {
                let factor = scale / sum;
                stream::<S>(
                    cols,
                    Gradient {
                        z: z.as_ptr(),
                        d: d.as_mut_ptr(),
                        max,
                        factor,
                        floor: normal_from(factor),
                        cap,
                    },
                );
                let slope = cap.map_or(1.0, |cap| 1.0 - (hit / cap) * (hit / cap));
                d[target as usize] = E::store(((hit - max).exp() / sum - 1.0) * slope * scale);
            }
        }
    }
}
