//! Optimizers: which rule, and its application to what a rank owns.

use crate::error::Result;
use std::collections::BTreeMap;
use windlass_store::{Shard, Store};
use windlass_tensor::ParamId;
use windlass_tensor::kernels::optim::{self, Adagrad, Adam, Lamb, LambSums, Lion, Muon, Rule, Sgd};
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
    /// Adam in its other forms.
    Adam {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of squared gradients.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Decay of the weights.
        weight_decay: f64,
        /// Whether the decay acts on the weights; else it is added to the gradient.
        decoupled: bool,
        /// Whether moments are divided by `1 - beta^step`.
        bias_correction: bool,
    },
    /// Adagrad (Duchi et al. 2011).
    Adagrad {
        /// Added to the root of the sum of squares.
        eps: f64,
        /// Decay, added to the gradient.
        weight_decay: f64,
    },
    /// Adam with a rate for each parameter (You et al. 2020).
    Lamb {
        /// Decay of the mean of gradients.
        beta1: f64,
        /// Decay of the mean of squared gradients.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Decay of the weights, added to the update.
        weight_decay: f64,
        /// Whether moments are divided by `1 - beta^step`.
        bias_correction: bool,
        /// The least ratio of norms.
        min_coeff: f64,
        /// The largest ratio of norms.
        max_coeff: f64,
    },
    /// Orthogonal momentum for the matrices between the first and the last layer, AdamW for everything else (Jordan et
    /// al. 2024).
    Muon {
        /// Decay of the momentum, in Nesterov's form.
        momentum: f64,
        /// Decay of the weights, times the learning rate.
        weight_decay: f64,
        /// AdamW's decay of the mean of gradients.
        beta1: f64,
        /// AdamW's decay of the mean of squared gradients.
        beta2: f64,
        /// AdamW's epsilon.
        eps: f64,
        /// AdamW's learning rate, as a part of the learning rate.
        adam_lr_ratio: f64,
    },
    /// Stochastic gradient descent, as `torch.optim.SGD`.
    Sgd {
        /// Decay of the running sum of gradients; 0 keeps none.
        momentum: f64,
        /// How much of the gradient does not enter the running sum.
        dampening: f64,
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
            Optimizer::AdamW { .. }
            | Optimizer::Adam { .. }
            | Optimizer::Lamb { .. }
            | Optimizer::Muon { .. } => 2,
            Optimizer::Sgd { momentum, .. } if *momentum == 0.0 => 0,
            Optimizer::Sgd { .. } | Optimizer::Lion { .. } | Optimizer::Adagrad { .. } => 1,
        }
    }

    /// Whether moments can be stored in 8 bits.
    pub fn has_8bit(&self) -> bool {
        match self {
            Optimizer::AdamW { .. } => true,
            Optimizer::Adam { decoupled, .. } => *decoupled,
            _ => false,
        }
    }

    /// Updates what this rank owns from its gradients. `hidden` says which parameters lie between the first and the
    /// last layer. Collective.
    ///
    /// # Errors
    /// A lost rank, a failing disk.
    pub(crate) fn update(
        &self,
        store: &mut Store,
        step: &Step,
        hidden: impl Fn(ParamId) -> bool,
    ) -> Result<()> {
        let pool = store.cpu().pool.clone();
        store.finish_gradients()?;
        match *self {
            Optimizer::Lamb { .. } => self.update_lamb(store, &pool, step),
            Optimizer::Muon { .. } => self.update_muon(store, &pool, step, hidden),
            _ => {
                let rule = |decay| self.rule(step, decay).expect("a rule for each element");
                let (decayed, plain) = (rule(true), rule(false));
                store.update(&mut |shard| {
                    let rule = if shard.spec.decay { &decayed } else { &plain };
                    apply(&pool, rule, shard);
                })?;
                Ok(())
            }
        }
    }

    /// The kernel's rule of one step, for rules that treat every element alike, and for Muon's other parameters. Biases
    /// and norm weights are not decayed.
    fn rule(&self, step: &Step, decay: bool) -> Option<Rule> {
        let decays = |weight_decay: f64| if decay { weight_decay } else { 0.0 };
        let &Step { lr, grad_scale, .. } = step;
        Some(match *self {
            Optimizer::AdamW { .. } | Optimizer::Adam { .. } | Optimizer::Muon { .. } => {
                Rule::Adam(self.adam(step, decay)?)
            }
            Optimizer::Adagrad { eps, weight_decay } => Rule::Adagrad(Adagrad {
                lr,
                eps,
                weight_decay: decays(weight_decay),
                grad_scale,
            }),
            Optimizer::Sgd {
                momentum,
                dampening,
                nesterov,
                weight_decay,
            } => Rule::Sgd(Sgd {
                lr,
                momentum,
                dampening,
                nesterov,
                weight_decay: decays(weight_decay),
                step: step.number,
                grad_scale,
            }),
            Optimizer::Lion {
                beta1,
                beta2,
                weight_decay,
            } => {
                let (beta1, beta2) = step.betas.unwrap_or((beta1, beta2));
                Rule::Lion(Lion {
                    lr,
                    beta1,
                    beta2,
                    weight_decay: decays(weight_decay),
                    grad_scale,
                })
            }
            Optimizer::Lamb { .. } => return None,
        })
    }

    /// Adam's rule of one step, of the optimizers that have one.
    fn adam(&self, step: &Step, decay: bool) -> Option<Adam> {
        let (betas, eps, weight_decay) = match *self {
            Optimizer::AdamW {
                beta1,
                beta2,
                eps,
                weight_decay,
            }
            | Optimizer::Adam {
                beta1,
                beta2,
                eps,
                weight_decay,
                ..
            }
            | Optimizer::Muon {
                beta1,
                beta2,
                eps,
                weight_decay,
                ..
            } => ((beta1, beta2), eps, weight_decay),
            _ => return None,
        };
        let (decoupled, bias_correction) = match *self {
            Optimizer::Adam {
                decoupled,
                bias_correction,
                ..
            } => (decoupled, bias_correction),
            _ => (true, true),
        };
        let ratio = match *self {
            Optimizer::Muon { adam_lr_ratio, .. } => adam_lr_ratio,
            _ => 1.0,
        };
        let (beta1, beta2) = step.betas.unwrap_or(betas);
        Some(Adam {
            lr: step.lr * ratio,
            beta1,
            beta2,
            eps,
            weight_decay: if decay { weight_decay } else { 0.0 },
            decoupled,
            bias_correction,
            step: step.number,
            grad_scale: step.grad_scale,
        })
    }

    fn lamb(&self, step: &Step, decay: bool) -> Option<Lamb> {
        let &Optimizer::Lamb {
            beta1,
            beta2,
            eps,
            weight_decay,
            bias_correction,
            min_coeff,
            max_coeff,
        } = self
        else {
            return None;
        };
        let (beta1, beta2) = step.betas.unwrap_or((beta1, beta2));
        Some(Lamb {
            lr: step.lr,
            beta1,
            beta2,
            eps,
            weight_decay: if decay { weight_decay } else { 0.0 },
            bias_correction,
            min_coeff,
            max_coeff,
            step: step.number,
            grad_scale: step.grad_scale,
        })
    }

    /// The ratio of norms is one of whole parameters: moments and sums in a first pass, values in a second.
    fn update_lamb(&self, store: &mut Store, pool: &Pool, step: &Step) -> Result<()> {
        let rule = |decay| self.lamb(step, decay).expect("called for LAMB");
        // Sums of the parts that each rank reduces, so that a stage where a rank updates them all adds them up alike.
        let ids: Vec<ParamId> = store.params().map(|(id, _)| id).collect();
        let place: BTreeMap<ParamId, usize> =
            ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let ranks = store.group().size();
        let mut sums = vec![[LambSums::default(); 1].repeat(ranks); ids.len()];
        store.visit(&mut |mut shard| {
            let Some(grad) = &shard.grad else { return };
            for (rank, part) in shard.shards.iter().enumerate() {
                let from = part.start.max(shard.range.start);
                let to = part.end.min(shard.range.end);
                if from >= to {
                    continue;
                }
                let at = from - shard.range.start..to - shard.range.start;
                let mut moments: Vec<_> = shard
                    .moments
                    .iter_mut()
                    .map(|m| m.part(at.clone()))
                    .collect();
                let values = shard.values.part(at.clone());
                let rule = rule(shard.spec.decay);
                let grad = grad.part(at);
                let add = optim::lamb_moments(pool, &rule, values, grad, &mut moments);
                let sum = &mut sums[place[&shard.id]][rank];
                *sum = *sum + add;
            }
        })?;
        let own: Vec<f64> = sums
            .iter()
            .flatten()
            .flat_map(|sum| [sum.values, sum.update])
            .collect();
        let all = store.exchange("norms of LAMB", &own)?;
        let whole = |id: ParamId| {
            let parts = &all[place[&id] * ranks * 2..(place[&id] + 1) * ranks * 2];
            let sum = |parts: &[f64]| LambSums {
                values: parts[0],
                update: parts[1],
            };
            parts
                .chunks(2)
                .map(sum)
                .fold(LambSums::default(), |a, b| a + b)
        };
        store.update(&mut |mut shard| {
            if shard.grad.is_none() {
                return;
            }
            let rule = rule(shard.spec.decay);
            let trust = rule.trust(whole(shard.id));
            optim::lamb_apply(pool, &rule, shard.values, &mut shard.moments, trust);
        })?;
        Ok(())
    }

    /// Momentum in a first pass; then each hidden matrix's direction is made whole and orthogonal; values in a second.
    fn update_muon(
        &self,
        store: &mut Store,
        pool: &Pool,
        step: &Step,
        hidden: impl Fn(ParamId) -> bool,
    ) -> Result<()> {
        let &Optimizer::Muon {
            momentum,
            weight_decay,
            ..
        } = self
        else {
            unreachable!("called for Muon");
        };
        let muon = Muon {
            lr: step.lr,
            momentum,
            nesterov: true,
            weight_decay,
            grad_scale: step.grad_scale,
        };
        let shapes: BTreeMap<ParamId, (usize, usize)> = store
            .params()
            .filter(|(id, spec)| spec.shape.iter().len() == 2 && hidden(*id))
            .map(|(id, spec)| (id, (spec.shape[0], spec.shape[1])))
            .collect();
        let mut directions: BTreeMap<ParamId, Vec<f32>> = BTreeMap::new();
        store.visit(&mut |mut shard| {
            let (Some(&(rows, cols)), Some(grad)) = (shapes.get(&shard.id), shard.grad) else {
                return;
            };
            let whole = directions
                .entry(shard.id)
                .or_insert_with(|| vec![0.0; rows * cols]);
            let out = &mut whole[shard.range.clone()];
            optim::muon_direction(pool, &muon, grad, &mut shard.moments[0], out);
        })?;
        for (&id, &shape) in &shapes {
            let whole = directions
                .entry(id)
                .or_insert_with(|| vec![0.0; shape.0 * shape.1]);
            store.share_values("direction of", id, whole)?;
            let mut workspace = vec![0.0; optim::orthogonalize_workspace(shape.0, shape.1)];
            optim::orthogonalize(pool, shape, whole, &mut workspace);
        }
        let rule = |decay| self.rule(step, decay).expect("AdamW for the others");
        let (decayed, plain) = (rule(true), rule(false));
        store.update(&mut |shard| match shapes.get(&shard.id) {
            Some(&shape) if shard.grad.is_some() => {
                let direction = &directions[&shard.id][shard.range.clone()];
                optim::muon_apply(pool, &muon, shape, shard.values, direction);
            }
            Some(_) => {}
            None => {
                let rule = if shard.spec.decay { &decayed } else { &plain };
                apply(pool, rule, shard);
            }
        })?;
        Ok(())
    }
}

/// What a step adds to a rule's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Step {
    /// Learning rate.
    pub(crate) lr: f64,
    /// Number of the step, from 1.
    pub(crate) number: u64,
    /// Multiplies gradients: clipping, mean, loss scale.
    pub(crate) grad_scale: f64,
    /// Betas in place of the rule's, where a schedule moves them.
    pub(crate) betas: Option<(f64, f64)>,
}

fn apply(pool: &Pool, rule: &Rule, mut shard: Shard<'_>) {
    if let Some(grad) = shard.grad {
        optim::step(pool, rule, shard.values, grad, &mut shard.moments);
    }
}
