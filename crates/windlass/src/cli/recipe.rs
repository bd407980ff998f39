//! Flags that say how weights move: storage type, update rule, learning rate.

use super::{Precision, usage};
use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use windlass::tensor::DType;
use windlass::train::config::Auto;
use windlass::train::loss_scale::LossScale;
use windlass::train::schedule::{Decay, Rate, Schedule, Warmup};
use windlass::train::{EngineOptions, Optimizer};

/// How weights move.
#[derive(clap::Args)]
pub struct Recipe {
    /// Storage type of weights and activations [default: bf16; of finetune the model's]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Update rule [default: adamw]
    #[arg(long, value_enum)]
    optimizer: Option<Rule>,
    /// Highest learning rate [default: 6e-4; of finetune 2e-4, and 2e-5 for all weights]
    #[arg(long)]
    lr: Option<f64>,
    /// Lowest learning rate, as a part of the highest [default: 0.1; of finetune 0]
    #[arg(long)]
    min_lr_ratio: Option<f64>,
    /// Warm-up: steps, or a fraction of all steps when below 1 [default: 0.03]
    #[arg(long)]
    warmup: Option<f64>,
    /// How the learning rate falls after the warm-up [default: cosine]
    #[arg(long, value_enum)]
    schedule: Option<Fall>,
    /// Decay of weights (not of biases and norms) [default: 0.1; of finetune 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Decay of the mean gradient (momentum of sgd) [default: 0.9]
    #[arg(long)]
    beta1: Option<f64>,
    /// Decay of the mean squared gradient [default: 0.95; of finetune 0.999]
    #[arg(long)]
    beta2: Option<f64>,
    /// Largest global gradient norm; 0 does not clip [default: 1]
    #[arg(long)]
    clip: Option<f64>,
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

const LR: f64 = 6e-4;
const WEIGHT_DECAY: f64 = 0.1;
const BETAS: (f64, f64) = (0.9, 0.95);

/// What fine-tuning trains, which has defaults of its own.
#[derive(Clone, Copy)]
pub enum Tuning {
    /// Adapters.
    Adapter,
    /// All weights.
    Full,
}

impl Recipe {
    /// Puts the defaults of fine-tuning in place of what was not asked for.
    pub fn tune(&mut self, tuning: Tuning) {
        self.lr.get_or_insert(match tuning {
            Tuning::Adapter => 2e-4,
            Tuning::Full => 2e-5,
        });
        self.min_lr_ratio.get_or_insert(0.0);
        self.weight_decay.get_or_insert(0.0);
        self.beta2.get_or_insert(0.999);
    }

    /// The storage type, where one was asked for.
    pub fn given_dtype(&self) -> Option<DType> {
        self.dtype.map(Precision::dtype)
    }

    /// The storage type.
    pub fn dtype(&self) -> DType {
        self.dtype.unwrap_or(Precision::Bf16).dtype()
    }

    /// The engine's options.
    pub fn engine(&self) -> Result<EngineOptions> {
        let (beta1, beta2) = (self.beta1.unwrap_or(BETAS.0), self.beta2.unwrap_or(BETAS.1));
        for (flag, value) in [("--beta1", beta1), ("--beta2", beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(usage(
                    format!("{flag} {value}"),
                    "it must be at least 0 and below 1",
                ));
            }
        }
        let weight_decay = self.weight_decay.unwrap_or(WEIGHT_DECAY);
        let clip = self.clip.unwrap_or(1.0);
        for (flag, value) in [("--weight-decay", weight_decay), ("--clip", clip)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(usage(
                    format!("{flag} {value}"),
                    "it must be 0 or a positive number",
                ));
            }
        }
        Ok(EngineOptions {
            optimizer: match self.optimizer.unwrap_or(Rule::Adamw) {
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
            gradient_clipping: (clip > 0.0).then_some(clip),
            activation_checkpointing: self.checkpoint_activations,
            loss_scale: (self.dtype() == DType::F16).then(LossScale::default),
            ..EngineOptions::default()
        })
    }

    /// Whether a warm-up was asked for.
    pub fn warms_up(&self) -> bool {
        self.warmup.is_some()
    }

    /// The learning rate of each of `steps` steps.
    pub fn schedule(&self, steps: u64) -> Result<Rate> {
        let warmup = match self.warmup.unwrap_or(0.03) {
            w if w < 1.0 => Warmup::Fraction(w),
            w => Warmup::Steps(w as u64),
        };
        let decay = match self.schedule.unwrap_or(Fall::Cosine) {
            Fall::Cosine => Decay::Cosine,
            Fall::Linear => Decay::Linear,
            Fall::Constant => Decay::Constant,
        };
        let (lr, ratio) = (self.lr.unwrap_or(LR), self.min_lr_ratio.unwrap_or(0.1));
        Ok(Schedule::new(lr, ratio, warmup, steps, decay)?.into())
    }

    /// What fills the `"auto"` values of a configuration file, of a run of `steps` steps: what was asked for and nothing
    /// else, since a file that says something different is refused.
    pub fn auto(&self, steps: u64) -> Auto {
        let dtype = self.dtype.map(Precision::dtype);
        Auto {
            gradient_clipping: self.clip,
            lr: self.lr,
            weight_decay: self.weight_decay,
            warmup_num_steps: self.warmup.map(|w| match w < 1.0 {
                true => (w * steps as f64).round() as u64,
                false => w as u64,
            }),
            fp16: dtype.map(|dtype| dtype == DType::F16),
            bf16: dtype.map(|dtype| dtype == DType::Bf16),
            ..Auto::default()
        }
    }

    /// The keys of a configuration file that flags set.
    ///
    /// # Errors
    /// A flag that says what the file says in another way.
    pub fn overrides(&self) -> Result<Vec<(String, Value)>> {
        let clashes = [
            ("--optimizer", self.optimizer.is_some(), "optimizer.type"),
            ("--schedule", self.schedule.is_some(), "scheduler.type"),
            (
                "--min-lr-ratio",
                self.min_lr_ratio.is_some(),
                "scheduler.params",
            ),
            ("--beta1", self.beta1.is_some(), "optimizer.params.betas"),
            ("--beta2", self.beta2.is_some(), "optimizer.params.betas"),
        ];
        if let Some((flag, _, key)) = clashes.into_iter().find(|(_, given, _)| *given) {
            return Err(usage(
                format!("{flag} together with --config"),
                format!("set \"{key}\" in the file"),
            ));
        }
        let mut overrides = Vec::new();
        if self.checkpoint_activations {
            overrides.push(("activation_checkpointing".into(), json!({})));
        }
        Ok(overrides)
    }
}
