//! Flags that say how weights move: storage type, update rule, learning rate.

use super::{Precision, usage};
use anyhow::Result;
use clap::ValueEnum;
use windlass::train::schedule::{Decay, Rate, Schedule, Warmup};
use windlass::train::{EngineOptions, Optimizer};

/// How weights move.
#[derive(clap::Args)]
pub struct Recipe {
    /// Storage type of weights and activations
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    pub dtype: Precision,
    /// Update rule
    #[arg(long, value_enum, default_value_t = Rule::Adamw)]
    optimizer: Rule,
    /// Highest learning rate
    #[arg(long, default_value_t = 6e-4)]
    lr: f64,
    /// Lowest learning rate, as a part of the highest
    #[arg(long, default_value_t = 0.1)]
    min_lr_ratio: f64,
    /// Warm-up: steps, or a fraction of all steps when below 1
    #[arg(long, default_value_t = 0.03)]
    warmup: f64,
    /// How the learning rate falls after the warm-up
    #[arg(long, value_enum, default_value_t = Fall::Cosine)]
    schedule: Fall,
    /// Decay of weights (not of biases and norms)
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Decay of the mean gradient (momentum of sgd)
    #[arg(long, default_value_t = 0.9)]
    beta1: f64,
    /// Decay of the mean squared gradient
    #[arg(long, default_value_t = 0.95)]
    beta2: f64,
    /// Largest global gradient norm; 0 does not clip
    #[arg(long, default_value_t = 1.0)]
    clip: f64,
    /// Keep only the input of each layer for the backward pass and run the layer again there
    #[arg(long)]
    checkpoint_activations: bool,
}

#[derive(ValueEnum, Clone, Copy)]
enum Rule {
    Adamw,
    Sgd,
    Lion,
}

#[derive(ValueEnum, Clone, Copy)]
enum Fall {
    Cosine,
    Linear,
    Constant,
}

impl Recipe {
    /// The engine's options.
    pub fn engine(&self) -> Result<EngineOptions> {
        for (flag, value) in [("--beta1", self.beta1), ("--beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(usage(
                    format!("{flag} {value}"),
                    "it must be at least 0 and below 1",
                ));
            }
        }
        for (flag, value) in [("--weight-decay", self.weight_decay), ("--clip", self.clip)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(usage(
                    format!("{flag} {value}"),
                    "it must be 0 or a positive number",
                ));
            }
        }
        let (beta1, beta2, weight_decay) = (self.beta1, self.beta2, self.weight_decay);
        Ok(EngineOptions {
            optimizer: match self.optimizer {
                Rule::Adamw => Optimizer::AdamW {
                    beta1,
                    beta2,
                    eps: 1e-8,
                    weight_decay,
                },
                Rule::Sgd => Optimizer::Sgd {
                    momentum: beta1,
                    dampening: 0.0,
                    nesterov: false,
                    weight_decay,
                },
                Rule::Lion => Optimizer::Lion {
                    beta1,
                    beta2,
                    weight_decay,
                },
            },
            gradient_clipping: (self.clip > 0.0).then_some(self.clip),
            activation_checkpointing: self.checkpoint_activations,
            ..EngineOptions::default()
        })
    }

    /// The learning rate of each of `steps` steps.
    pub fn schedule(&self, steps: u64) -> Result<Rate> {
        let warmup = match self.warmup {
            w if w < 1.0 => Warmup::Fraction(w),
            w => Warmup::Steps(w as u64),
        };
        let decay = match self.schedule {
            Fall::Cosine => Decay::Cosine,
            Fall::Linear => Decay::Linear,
            Fall::Constant => Decay::Constant,
        };
        Ok(Schedule::new(self.lr, self.min_lr_ratio, warmup, steps, decay)?.into())
    }
}
