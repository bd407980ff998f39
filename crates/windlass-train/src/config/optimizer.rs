//! `optimizer`: the update rule with its constants.

use serde::{Deserialize, Serialize};

use super::values::Values;

/// The constants of Adam.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Adam {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of weights.
    pub weight_decay: f64,
    /// Whether moments are divided by `1 - beta^step`.
    pub bias_correction: bool,
}

/// How Muon makes its momentum orthogonal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NewtonSchulz {
    /// On the Gram matrix.
    Gram,
    /// On the matrix itself.
    Standard,
}

/// The update rule with its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerConfig {
    /// Adam: the decay is added to the gradient (`"adam_w_mode": false`).
    Adam(Adam),
    /// Adam with decoupled decay: also `"Adam"` by default.
    AdamW(Adam),
    /// AdamW with moments in blocks of 8 bits.
    AdamW8bit {
        /// The constants.
        adam: Adam,
        /// Parameters of fewer elements have moments in 32 bits.
        min_8bit_size: usize,
    },
    /// Adagrad.
    Adagrad {
        /// Learning rate.
        lr: f64,
        /// Added to the root of the sum of squares.
        eps: f64,
        /// Decay, added to the gradient.
        weight_decay: f64,
    },
    /// The sign of an interpolated momentum.
    Lion {
        /// Learning rate.
        lr: f64,
        /// Interpolation of the update, and decay of the momentum.
        betas: (f64, f64),
        /// Decay of weights, times the learning rate.
        weight_decay: f64,
    },
    /// Adam with a rate for each layer.
    Lamb {
        /// The constants.
        adam: Adam,
        /// The largest ratio of norms.
        max_coeff: f64,
        /// The least ratio of norms.
        min_coeff: f64,
    },
    /// Stochastic gradient descent.
    Sgd {
        /// Learning rate.
        lr: f64,
        /// Decay of the running sum of gradients; 0 keeps none.
        momentum: f64,
        /// How much of the gradient does not enter the running sum.
        dampening: f64,
        /// Decay, added to the gradient.
        weight_decay: f64,
        /// Nesterov's form of momentum.
        nesterov: bool,
    },
    /// Orthogonal momentum for hidden matrices, AdamW for the rest.
    Muon {
        /// Learning rate of matrices.
        lr: f64,
        /// Decay of the momentum.
        momentum: f64,
        /// Decay of matrices, times the learning rate.
        weight_decay: f64,
        /// How the momentum is made orthogonal.
        ns_method: NewtonSchulz,
        /// The constants for the rest.
        adam: Adam,
    },
}

impl OptimizerConfig {
    /// The learning rate that a schedule starts from: of matrices for Muon.
    pub fn lr(&self) -> f64 {
        match self {
            Self::Adam(adam) | Self::AdamW(adam) => adam.lr,
            Self::AdamW8bit { adam, .. } | Self::Lamb { adam, .. } => adam.lr,
            Self::Adagrad { lr, .. }
            | Self::Lion { lr, .. }
            | Self::Sgd { lr, .. }
            | Self::Muon { lr, .. } => *lr,
        }
    }

    /// Whether a schedule that cycles momentum has betas to cycle.
    pub fn has_betas(&self) -> bool {
        !matches!(self, Self::Adagrad { .. } | Self::Sgd { .. })
    }

    pub(super) fn read(values: &mut Values) -> Option<Self> {
        let name = values.text("optimizer.type")?.to_lowercase();
        if !values.has("optimizer.params.lr") {
            return None;
        }
        let number = |key: &str| values.number(&param(key));
        let (lr, weight_decay) = (number("lr"), number("weight_decay"));
        Some(match name.as_str() {
            "adam" if !values.bool(&param("adam_w_mode")) => Self::Adam(adam(values)),
            "adam" | "adamw" => Self::AdamW(adam(values)),
            "adamw8bit" => Self::AdamW8bit {
                adam: adam(values),
                min_8bit_size: values.int(&param("min_8bit_size")) as usize,
            },
            "adagrad" => Self::Adagrad {
                lr,
                eps: number("eps"),
                weight_decay,
            },
            "lion" => Self::Lion {
                lr,
                betas: betas(values),
                weight_decay,
            },
            "lamb" => Self::Lamb {
                adam: adam(values),
                max_coeff: number("max_coeff"),
                min_coeff: number("min_coeff"),
            },
            "sgd" => Self::Sgd {
                lr,
                momentum: number("momentum"),
                dampening: number("dampening"),
                weight_decay,
                nesterov: values.bool(&param("nesterov")),
            },
            "muon" => muon(values),
            other => unreachable!("{other} is in the table of optimizers"),
        })
    }
}

fn param(key: &str) -> String {
    format!("optimizer.params.{key}")
}

fn betas(values: &Values) -> (f64, f64) {
    let beta = |at: usize| values.value("optimizer.params.betas")[at].as_f64();
    (beta(0).expect("two numbers"), beta(1).expect("two numbers"))
}

fn adam(values: &Values) -> Adam {
    let correction = param("bias_correction");
    Adam {
        lr: values.number("optimizer.params.lr"),
        betas: betas(values),
        eps: values.number("optimizer.params.eps"),
        weight_decay: values.number("optimizer.params.weight_decay"),
        bias_correction: !values.has(&correction) || values.bool(&correction),
    }
}

/// `muon_lr` and `adam_lr` stand before `lr`; the rest of the parameters share the decay.
fn muon(values: &mut Values) -> OptimizerConfig {
    let lr = values.number("optimizer.params.lr");
    let mut rate = |key: &str| {
        let key = param(key);
        let rate = values.value(&key).as_f64().unwrap_or(lr);
        values.set(&key, rate.into());
        rate
    };
    let (muon_lr, adam_lr) = (rate("muon_lr"), rate("adam_lr"));
    OptimizerConfig::Muon {
        lr: muon_lr,
        momentum: values.number("optimizer.params.momentum"),
        weight_decay: values.number("optimizer.params.weight_decay"),
        ns_method: match values.text("optimizer.params.ns_method") {
            Some("standard") => NewtonSchulz::Standard,
            _ => NewtonSchulz::Gram,
        },
        adam: Adam {
            lr: adam_lr,
            ..adam(values)
        },
    }
}
