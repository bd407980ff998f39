//! Optimizer updates: values, gradients and moments are read once and written once, in one pass.
//!
//! [`step`] applies a [`Rule`]: the gradient's scale (clipping, loss scale, mean), moments, values, their low-precision
//! copy and the clearing of the gradient together. [`Values`], [`Grad`] and [`Moment`] say how each is stored; what is
//! not `f32` is widened in tiles that stay in the first cache, so every storage gives the bits that `f32` would, but for
//! the rounding when it is written. LAMB and Muon look at whole tensors and come in halves.
//!
//! Schedules, the clipping factor and parameter groups belong to the caller.

use crate::pool::{Pool, SharedMut};
use crate::reference;
use crate::tasks::Tasks;

mod code;
mod convert;
mod lamb;
mod muon;
mod rule;
mod state;
mod tile;
mod vector;

pub(crate) use lamb::LambFactors;
pub use lamb::{Lamb, LambSums, lamb_apply, lamb_moments};
pub(crate) use muon::MuonFactors;
pub use muon::{
    Muon, NEWTON_SCHULZ_STEPS, muon, muon_apply, muon_direction, orthogonalize,
    orthogonalize_workspace,
};
pub use rule::{Adagrad, Adam, Lion, Rule, Sgd};
pub(crate) use rule::{AdagradFactors, AdamFactors, Factors, LionFactors, SgdFactors};
pub use state::{BLOCK, Grad, Moment, Storage, Values};
use state::{SharedGrad, SharedMoment, SharedValues};
use tile::Kernels;

/// One step of a rule: updates values and moments (zeros before the first step) by a gradient.
///
/// # Panics
/// When the lengths or the number of moments do not match, [`Rule::supports`] refuses the storage of a moment, `f64` is
/// mixed with other types, or the rule's `step` is 0.
#[track_caller]
pub fn step(
    pool: &Pool,
    rule: &Rule,
    values: Values<'_>,
    grad: Grad<'_>,
    moments: &mut [Moment<'_>],
) {
    let (name, count) = (rule.name(), rule.moments());
    assert!(
        moments.len() == count,
        "{name} keeps {count} moments, got {}",
        moments.len()
    );
    for moment in moments.iter() {
        if let Err(message) = rule.supports(moment.storage()) {
            panic!("{message}");
        }
    }
    let factors = (rule.factors(), rule.factors());
    run(pool, factors, values, Some(grad), moments);
}

/// Runs an update over all elements, given its factors in both precisions; the sum of the tasks' results, in order.
#[track_caller]
fn run(
    pool: &Pool,
    factors: (Factors<f32>, Factors<f64>),
    values: Values<'_>,
    grad: Option<Grad<'_>>,
    moments: &mut [Moment<'_>],
) -> [f64; 2] {
    let len = values.len();
    values.check();
    let grads = grad.as_ref().map_or(len, Grad::len);
    assert!(grads == len, "the gradient has {grads} elements of {len}");
    let double = matches!(values, Values::F64(_));
    let same = match &grad {
        None => true,
        Some(grad) => matches!(grad, Grad::F64(_)) == double,
    };
    assert!(same, "f64 values and gradients only go together");
    for (index, moment) in moments.iter().enumerate() {
        moment.check(index, len);
        assert!(
            (moment.storage() == Storage::F64) == double,
            "{:?} moments where f64 values are {double}",
            moment.storage()
        );
    }
    let kernels = Kernels::choose(pool.level(), &factors.0);
    let tasks = Tasks::elements(len);
    let mut sums = vec![[0.0; 2]; tasks.count()];
    {
        let sums = SharedMut::new(&mut sums);
        let (values, grad) = (SharedValues::new(values), grad.map(SharedGrad::new));
        let count = moments.len();
        let moments: Vec<_> = moments.iter_mut().map(SharedMoment::new).collect();
        let (first, second) = (moments.first(), moments.get(1));
        pool.run(tasks.count(), |task, _| {
            let at = tasks.part(task);
            // SAFETY: tasks are disjoint, and whole blocks but for the last.
            let mut parts = [first, second].map(|moment| match moment {
                Some(moment) => unsafe { moment.part(at.clone()) },
                None => Moment::F32(&mut []),
            });
            let parts = &mut parts[..count];
            // SAFETY (all): tasks are disjoint; `choose` saw that the pool's level is supported.
            let mut values = unsafe { values.part(at.clone()) };
            let mut grad = grad.as_ref().map(|grad| unsafe { grad.part(at.clone()) });
            let result = match (&mut values, &grad, &kernels) {
                (Values::F64(p), grad, _) => {
                    let g: &[f64] = match grad {
                        Some(Grad::F64(g)) => g,
                        _ => &[],
                    };
                    let [m, v] = reference::doubles(parts);
                    reference::update(&factors.1, p, g, m, v)
                }
                (values, _, None) => {
                    reference::update_stored(&factors.0, values, grad.as_mut(), parts)
                }
                (values, _, Some(kernels)) => unsafe {
                    kernels.run(&factors.0, values, grad.as_mut(), parts)
                },
            };
            // SAFETY: one element a task.
            unsafe { sums.slice(task, 1)[0] = result };
        });
    }
    sums.iter()
        .fold([0.0; 2], |a, b| [a[0] + b[0], a[1] + b[1]])
}
