//! Optimizers: which rule, and its one application to a parameter.

use windlass_store::{Shard, Values};
use windlass_tensor::kernels::optim::{self, Adam, Grad, Lion, Moment, Rule, Sgd};
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
        let rule = self.rule(lr, step, grad_scale, shard.spec.decay);
        let values = match shard.values {
            Values::F32(p) => optim::Values::F32(p),
            Values::Split { high, low } => optim::Values::Split { high, low },
        };
        let mut moments: Vec<_> = shard.moments.into_iter().map(Moment::F32).collect();
        optim::step(pool, &rule, values, Grad::F32(grad), &mut moments);
    }

    /// The kernel's rule of one step.
    fn rule(&self, lr: f64, step: u64, grad_scale: f64, decay: bool) -> Rule {
        let decays = |weight_decay: f64| if decay { weight_decay } else { 0.0 };
        match *self {
            Optimizer::AdamW {
                beta1,
                beta2,
                eps,
                weight_decay,
            } => Rule::Adam(Adam {
                lr,
                beta1,
                beta2,
                eps,
                weight_decay: decays(weight_decay),
                decoupled: true,
                bias_correction: true,
                step,
                grad_scale,
            }),
            Optimizer::Sgd {
                momentum,
                nesterov,
                weight_decay,
            } => Rule::Sgd(Sgd {
                lr,
                momentum,
                dampening: 0.0,
                nesterov,
                weight_decay: decays(weight_decay),
                step,
                grad_scale,
            }),
            Optimizer::Lion {
                beta1,
                beta2,
                weight_decay,
            } => Rule::Lion(Lion {
                lr,
                beta1,
                beta2,
                weight_decay: decays(weight_decay),
                grad_scale,
            }),
        }
    }
}
