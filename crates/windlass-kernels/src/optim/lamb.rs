//! LAMB: Adam's update, scaled for each tensor by the ratio of its norm to the update's.
//!
//! The norms are of whole tensors, so a step has two halves: [`lamb_moments`] on the parts of a tensor gives sums of
//! squares, which the caller adds up over parts, and [`lamb_apply`] updates the parts by the whole's [`Lamb::trust`].

use super::rule::{Factors, correction};
use super::run;
use super::state::{Grad, Moment, Storage, Values};
use crate::Float;
use crate::pool::Pool;

/// LAMB.
///
/// With `g' = grad_scale g`: `m ← β₁ m + (1 - β₁) g'`, `v ← β₂ v + (1 - β₂) g'²`,
/// `u = m / (1 - β₁^t) / (sqrt(v / (1 - β₂^t)) + eps) + λ p`, `p ← p - lr clamp(‖p‖ / ‖u‖) u`; the ratio is 1 where a
/// norm is 0, and `1 - β^t` is 1 without bias correction.
///
/// # Source
/// You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2; the clamp as DeepSpeed's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lamb {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// λ, times the weights, added to the update.
    pub weight_decay: f64,
    /// Divides the moments by `1 - β^t`.
    pub bias_correction: bool,
    /// The smallest ratio (DeepSpeed: 0.01).
    pub min_coeff: f64,
    /// The largest ratio (DeepSpeed: 10).
    pub max_coeff: f64,
    /// t: 1 at the first step.
    pub step: u64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Lamb`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LambFactors<A> {
    pub grad_scale: A,
    pub one_minus_beta1: A,
    pub beta2: A,
    pub one_minus_beta2: A,
    /// `1 / (1 - β₁^t)`.
    pub correction1: A,
    /// `1 / sqrt(1 - β₂^t)`.
    pub correction2: A,
    pub eps: A,
    pub weight_decay: A,
    /// `lr trust`; unused by the first half.
    pub step_size: A,
}

/// Sums of squares over a tensor or a part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LambSums {
    /// Of the values.
    pub values: f64,
    /// Of the update, before moments are rounded to their storage.
    pub update: f64,
}

impl std::ops::Add for LambSums {
    type Output = LambSums;
    fn add(self, other: LambSums) -> LambSums {
        LambSums {
            values: self.values + other.values,
            update: self.update + other.update,
        }
    }
}

impl Lamb {
    /// Whether the moments can be stored this way.
    ///
    /// # Errors
    /// A message that says what is possible.
    pub fn supports(storage: Storage) -> Result<(), String> {
        match storage {
            Storage::Q8 => {
                Err("LAMB has no 8-bit moments: only AdamW has; use f32 or bf16 moments".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// The factor of the learning rate for a tensor with these sums.
    pub fn trust(&self, sums: LambSums) -> f64 {
        if sums.values == 0.0 || sums.update == 0.0 {
            return 1.0;
        }
        let ratio = (sums.values / sums.update).sqrt();
        // Not `clamp`: NaN stays NaN, whatever the limits.
        if ratio < self.min_coeff {
            self.min_coeff
        } else if ratio > self.max_coeff {
            self.max_coeff
        } else {
            ratio
        }
    }

    #[track_caller]
    fn factors<A: Float>(&self, trust: f64) -> LambFactors<A> {
        let correction = |beta| correction(beta, self.step, self.bias_correction);
        LambFactors {
            grad_scale: A::of(self.grad_scale),
            one_minus_beta1: A::of(1.0 - self.beta1),
            beta2: A::of(self.beta2),
            one_minus_beta2: A::of(1.0 - self.beta2),
            correction1: A::of(1.0 / correction(self.beta1)),
            correction2: A::of(1.0 / correction(self.beta2).sqrt()),
            eps: A::of(self.eps),
            weight_decay: A::of(self.weight_decay),
            step_size: A::of(self.lr * trust),
        }
    }
}

/// The first half of a step: updates the moments `m` and `v` and returns the sums of squares that the second half needs.
/// The values are only read. Zero sums on a dry pool.
///
/// # Panics
/// When the lengths differ, a moment's storage is not supported, or `step` is 0.
#[track_caller]
pub fn lamb_moments(
    pool: &Pool,
    rule: &Lamb,
    values: Values<'_>,
    grad: Grad<'_>,
    moments: &mut [Moment<'_>],
) -> LambSums {
    check(moments);
    let factors = (
        Factors::LambMoments(rule.factors(1.0)),
        Factors::LambMoments(rule.factors(1.0)),
    );
    let [values, update] = run(pool, factors, values, Some(grad), moments);
    LambSums { values, update }
}

/// The second half of a step: updates the values by the moments, which stay as they are, and by the tensor's
/// [`Lamb::trust`].
///
/// # Panics
/// As [`lamb_moments`].
#[track_caller]
pub fn lamb_apply(
    pool: &Pool,
    rule: &Lamb,
    values: Values<'_>,
    moments: &mut [Moment<'_>],
    trust: f64,
) {
    check(moments);
    let factors = (
        Factors::LambApply(rule.factors(trust)),
        Factors::LambApply(rule.factors(trust)),
    );
    run(pool, factors, values, None, moments);
}

#[track_caller]
fn check(moments: &[Moment<'_>]) {
    assert!(
        moments.len() == 2,
        "LAMB keeps 2 moments, got {}",
        moments.len()
    );
    for moment in moments {
        if let Err(message) = Lamb::supports(moment.storage()) {
            panic!("{message}");
        }
    }
}
