//! Update rules and the factors that their arithmetic needs.

use super::lamb::LambFactors;
use super::muon::MuonFactors;
use super::state::Storage;
use crate::Float;

/// An update that treats every element alike; [`super::Lamb`] and [`super::Muon`] look at whole tensors and stand apart.
///
/// Hyperparameters are `f64`, as users write them; factors derived from them are computed in `f64` and rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Adam and AdamW: two moments.
    Adam(Adam),
    /// Adagrad: one moment.
    Adagrad(Adagrad),
    /// Lion: one moment.
    Lion(Lion),
    /// Stochastic gradient descent: one moment, or none without momentum.
    Sgd(Sgd),
}

impl Rule {
    /// Moments that [`super::step`] asks for, in the order of the formulas.
    pub fn moments(&self) -> usize {
        match self {
            Rule::Adam(_) => 2,
            Rule::Adagrad(_) | Rule::Lion(_) => 1,
            Rule::Sgd(sgd) => (sgd.momentum != 0.0) as usize,
        }
    }

    /// The rule's name in messages.
    pub const fn name(&self) -> &'static str {
        match self {
            Rule::Adam(Adam {
                decoupled: true, ..
            }) => "AdamW",
            Rule::Adam(_) => "Adam",
            Rule::Adagrad(_) => "Adagrad",
            Rule::Lion(_) => "Lion",
            Rule::Sgd(_) => "SGD",
        }
    }

    /// Whether the rule's moments can be stored this way.
    ///
    /// # Errors
    /// A message that names the rule, the storage and what is possible.
    pub fn supports(&self, storage: Storage) -> Result<(), String> {
        match (self, storage) {
            (
                Rule::Adam(Adam {
                    decoupled: true, ..
                }),
                Storage::Q8,
            ) => Ok(()),
            (rule, Storage::Q8) => Err(format!(
                "{} has no 8-bit moments: only AdamW has; use f32 or bf16 moments",
                rule.name()
            )),
            _ => Ok(()),
        }
    }

    #[track_caller]
    pub(crate) fn factors<A: Float>(&self) -> Factors<A> {
        match self {
            Rule::Adam(rule) => Factors::Adam(rule.factors()),
            Rule::Adagrad(rule) => Factors::Adagrad(rule.factors()),
            Rule::Lion(rule) => Factors::Lion(rule.factors()),
            Rule::Sgd(rule) => Factors::Sgd(rule.factors()),
        }
    }
}

/// A [`Rule`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Factors<A> {
    Adam(AdamFactors<A>),
    Adagrad(AdagradFactors<A>),
    Lion(LionFactors<A>),
    Sgd(SgdFactors<A>),
    /// Moments and sums of squares.
    LambMoments(LambFactors<A>),
    /// Values, from moments that are up to date.
    LambApply(LambFactors<A>),
    /// The values are written with the direction and not read.
    Muon(MuonFactors<A>),
}

impl<A> Factors<A> {
    pub fn writes_values(&self) -> bool {
        !matches!(self, Factors::LambMoments(_))
    }

    pub fn writes_moments(&self) -> bool {
        !matches!(self, Factors::LambApply(_))
    }
}

/// Adam, and AdamW where the decay is `decoupled`.
///
/// With `g' = grad_scale g` (`+ λ p` where the decay is not decoupled): `m ← β₁ m + (1 - β₁) g'`,
/// `v ← β₂ v + (1 - β₂) g'²`, `p ← (1 - lr λ) p - lr / (1 - β₁^t) * m / (sqrt(v / (1 - β₂^t)) + eps)`, where
/// `(1 - lr λ)` is 1 if the decay is not decoupled, and `1 - β^t` is 1 without bias correction.
///
/// # Source
/// Kingma and Ba 2015, "Adam", algorithm 1; Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization",
/// algorithm 2, the decay multiplied by the learning rate, as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// λ.
    pub weight_decay: f64,
    /// AdamW: λ times the learning rate shrinks the weights. Otherwise λ times the weights is added to the gradient.
    pub decoupled: bool,
    /// Divides the moments by `1 - β^t`.
    pub bias_correction: bool,
    /// t: 1 at the first step.
    pub step: u64,
    /// Multiplies gradients first (clipping, loss scale, mean over micro-batches).
    pub grad_scale: f64,
}

/// [`Adam`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamFactors<A> {
    pub grad_scale: A,
    /// λ where it is added to the gradient.
    pub l2: A,
    pub one_minus_beta1: A,
    pub beta2: A,
    pub one_minus_beta2: A,
    /// `1 / sqrt(1 - β₂^t)`.
    pub correction: A,
    pub eps: A,
    /// `lr / (1 - β₁^t)`.
    pub step_size: A,
    /// `1 - lr λ` where it shrinks the weights.
    pub decay: A,
}

/// `1 - β^t`, or 1.
#[track_caller]
pub(super) fn correction(beta: f64, step: u64, wanted: bool) -> f64 {
    assert!(step > 0, "step counts from 1, got {step}");
    if wanted {
        1.0 - beta.powf(step as f64)
    } else {
        1.0
    }
}

impl Adam {
    #[track_caller]
    fn factors<A: Float>(&self) -> AdamFactors<A> {
        let correction = |beta| correction(beta, self.step, self.bias_correction);
        let (l2, decay) = if self.decoupled {
            (0.0, 1.0 - self.lr * self.weight_decay)
        } else {
            (self.weight_decay, 1.0)
        };
        AdamFactors {
            grad_scale: A::of(self.grad_scale),
            l2: A::of(l2),
            one_minus_beta1: A::of(1.0 - self.beta1),
            beta2: A::of(self.beta2),
            one_minus_beta2: A::of(1.0 - self.beta2),
            correction: A::of(1.0 / correction(self.beta2).sqrt()),
            eps: A::of(self.eps),
            step_size: A::of(self.lr / correction(self.beta1)),
            decay: A::of(decay),
        }
    }
}

/// Adagrad.
///
/// With `g' = grad_scale g + λ p`: `s ← s + g'²`, `p ← p - lr g' / (sqrt(s) + eps)`.
///
/// # Source
/// Duchi et al. 2011, "Adaptive Subgradient Methods", figure 1, in PyTorch's form (no decay of the learning rate:
/// schedules belong to the caller).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// Learning rate of this step.
    pub lr: f64,
    /// Added to the root of the sum of squares.
    pub eps: f64,
    /// λ, added to the gradient.
    pub weight_decay: f64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Adagrad`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdagradFactors<A> {
    pub grad_scale: A,
    pub l2: A,
    pub eps: A,
    pub lr: A,
}

impl Adagrad {
    fn factors<A: Float>(&self) -> AdagradFactors<A> {
        AdagradFactors {
            grad_scale: A::of(self.grad_scale),
            l2: A::of(self.weight_decay),
            eps: A::of(self.eps),
            lr: A::of(self.lr),
        }
    }
}

/// Stochastic gradient descent with momentum.
///
/// With `g' = grad_scale g + λ p`: `b ← g'` at the first step, then `b ← μ b + (1 - dampening) g'`;
/// `p ← p - lr b`, or `p ← p - lr (g' + μ b)` (Nesterov). Without momentum `p ← p - lr g'`.
///
/// # Source
/// Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", in PyTorch's form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f64,
    /// μ; 0 needs no buffer.
    pub momentum: f64,
    /// Part of the gradient kept out of the buffer.
    pub dampening: f64,
    /// Look ahead along the buffer.
    pub nesterov: bool,
    /// λ, added to the gradient.
    pub weight_decay: f64,
    /// 1 at the first step, which fills the buffer.
    pub step: u64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Sgd`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdFactors<A> {
    pub grad_scale: A,
    pub weight_decay: A,
    pub momentum: A,
    pub one_minus_dampening: A,
    pub lr: A,
    /// The buffer's old contents are not used.
    pub first: bool,
    pub nesterov: bool,
}

impl Sgd {
    #[track_caller]
    fn factors<A: Float>(&self) -> SgdFactors<A> {
        assert!(self.step > 0, "step counts from 1, got {}", self.step);
        SgdFactors {
            grad_scale: A::of(self.grad_scale),
            weight_decay: A::of(self.weight_decay),
            momentum: A::of(self.momentum),
            one_minus_dampening: A::of(1.0 - self.dampening),
            lr: A::of(self.lr),
            first: self.step == 1 || self.momentum == 0.0,
            nesterov: self.nesterov && self.momentum != 0.0,
        }
    }
}

/// Lion: the sign of an interpolated momentum.
///
/// With `g' = grad_scale g`: `c = β₁ m + (1 - β₁) g'`, `p ← (1 - lr λ) p - lr sign(c)`, `m ← β₂ m + (1 - β₂) g'`.
///
/// # Source
/// Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f64,
    /// Interpolation of the update.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// λ, times the learning rate.
    pub weight_decay: f64,
    /// Multiplies gradients first.
    pub grad_scale: f64,
}

/// [`Lion`] as the arithmetic needs it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LionFactors<A> {
    pub grad_scale: A,
    pub one_minus_beta1: A,
    pub one_minus_beta2: A,
    pub lr: A,
    /// `1 - lr λ`.
    pub decay: A,
}

impl Lion {
    fn factors<A: Float>(&self) -> LionFactors<A> {
        LionFactors {
            grad_scale: A::of(self.grad_scale),
            one_minus_beta1: A::of(1.0 - self.beta1),
            one_minus_beta2: A::of(1.0 - self.beta2),
            lr: A::of(self.lr),
            decay: A::of(1.0 - self.lr * self.weight_decay),
        }
    }
}
