//! Optimizers: which rule, and its one application to a parameter.

use windlass_store::{Shard, Values};
use windlass_tensor::kernels::optim;
use windlass_tensor::kernels::pool::Pool;

/// An update rule with its constants; the learning rate comes with each step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov and Hutter 2019), as `torch.optim.AdamW`.
    AdamW {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of squared gradients.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Decay of the weights, times the learning rate.
        weight_decay: f64,
    },
    /// Stochastic gradient descent, as `torch.optim.SGD`.
    Sgd {
        /// Decay of the running sum of gradients; 0 keeps none.
        momentum: f64,
        /// Nesterov's form of momentum.
        nesterov: bool,
        /// Decay, added to the gradient.
        weight_decay: f64,
    },
    /// The sign of an interpolated momentum (Chen et al. 2023).
    Lion {
        /// Interpolation between momentum and gradient in the update.
        beta1: f64,
        /// Decay of the momentum.
        beta2: f64,
        /// Decay of the weights, times the learning rate.
        weight_decay: f64,
    },
}

impl Optimizer {
    /// AdamW with betas 0.9 and 0.95, epsilon 1e-8 and decay 0.1.
    pub const ADAMW: Optimizer = Optimizer::AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
    };

    /// Tensors of state for each parameter.
    pub fn moments(&self) -> usize {
        match self {
            Optimizer::AdamW { .. } => 2,
            Optimizer::Sgd { momentum, .. } if *momentum == 0.0 => 0,
            Optimizer::Sgd { .. } | Optimizer::Lion { .. } => 1,
        }
    }

    /// Updates one parameter from its gradient times `grad_scale`; `step` counts from 1. Biases and norm weights are
    /// not decayed.
    ///
    /// # Panics
    /// When the shard has another number of moments than [`Optimizer::moments`].
    pub fn apply(&self, pool: &Pool, shard: Shard<'_>, lr: f64, step: u64, grad_scale: f64) {
        let Some(grad) = shard.grad else { return };
        let decays = |weight_decay: f64| if shard.spec.decay { weight_decay } else { 0.0 };
        let mut moments = shard.moments.into_iter();
        let mut moment = || moments.next().expect("a moment that the rule keeps");
        match *self {
            Optimizer::AdamW {
                beta1,
                beta2,
                eps,
                weight_decay,
            } => {
                let rule = optim::AdamW {
                    lr,
                    beta1,
                    beta2,
                    eps,
                    weight_decay: decays(weight_decay),
                    step,
                    grad_scale,
                };
                let (m, v) = (moment(), moment());
                apply_adamw(pool, shard.values, grad, m, v, &rule);
            }
            Optimizer::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => {
                let rule = optim::Sgd {
                    lr,
                    momentum,
                    dampening: 0.0,
                    nesterov,
                    weight_decay: decays(weight_decay),
                    step,
                    grad_scale,
                };
                let buffer = moments.next().unwrap_or_default();
                apply_sgd(pool, shard.values, grad, buffer, &rule);
            }
            Optimizer::Lion {
                beta1,
                beta2,
                weight_decay,
            } => {
                let rule = optim::Lion {
                    lr,
                    beta1,
                    beta2,
                    weight_decay: decays(weight_decay),
                    grad_scale,
                };
                apply_lion(pool, shard.values, grad, moment(), &rule);
            }
        }
    }
}

fn apply_adamw(
    pool: &Pool,
    values: Values<'_>,
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    rule: &optim::AdamW,
) {
    match values {
        Values::F32(p) => optim::adamw(pool, p, grad, m, v, rule),
        Values::Split { high, low } => optim::adamw_split(pool, high, low, grad, m, v, rule),
    }
}

fn apply_sgd(pool: &Pool, values: Values<'_>, grad: &[f32], buffer: &mut [f32], rule: &optim::Sgd) {
    match values {
        Values::F32(p) => optim::sgd(pool, p, grad, buffer, rule),
        Values::Split { high, low } => optim::sgd_split(pool, high, low, grad, buffer, rule),
    }
}

fn apply_lion(pool: &Pool, values: Values<'_>, grad: &[f32], m: &mut [f32], rule: &optim::Lion) {
    match values {
        Values::F32(p) => optim::lion(pool, p, grad, m, rule),
        Values::Split { high, low } => optim::lion_split(pool, high, low, grad, m, rule),
    }
}
