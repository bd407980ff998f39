//! Which floating types a run stores, accumulates and sends.

use serde::{Deserialize, Serialize};

use super::values::Values;
use crate::loss_scale::LossScale;

/// A floating type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatType {
    /// IEEE single precision.
    Fp32,
    /// IEEE half precision.
    Fp16,
    /// The upper half of an `fp32`.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Fp32 => 4,
            Self::Fp16 | Self::Bf16 => 2,
        }
    }

    pub(super) fn read(values: &Values, key: &str) -> Option<Self> {
        match values.text(key)? {
            "fp32" => Some(Self::Fp32),
            "fp16" => Some(Self::Fp16),
            "bf16" => Some(Self::Bf16),
            other => unreachable!("a floating type is {other}"),
        }
    }
}

/// The precision of weights and activations; masters are `fp32`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// `fp32` throughout.
    Fp32,
    /// `bf16`.
    Bf16 {
        /// Whether gradients that are not finite end the run.
        check_grad_overflow: bool,
        /// Whether the moments of the optimizer are `bf16`.
        bf16_optimizer_states: bool,
    },
    /// `fp16` with a loss scale; steps whose gradients are not finite are skipped.
    Fp16 {
        /// How the loss is scaled.
        loss_scale: LossScale,
    },
}

impl Precision {
    /// The type of weights and activations.
    pub fn float_type(&self) -> FloatType {
        match self {
            Self::Fp32 => FloatType::Fp32,
            Self::Bf16 { .. } => FloatType::Bf16,
            Self::Fp16 { .. } => FloatType::Fp16,
        }
    }

    pub(super) fn read(values: &mut Values) -> Self {
        let (bf16, fp16) = (values.bool("bf16.enabled"), values.bool("fp16.enabled"));
        if bf16 && fp16 {
            let message = "bfloat16 and fp16 modes cannot be simultaneously enabled";
            values.wrong("fp16.enabled", message, "switch one of them off");
        }
        if bf16 {
            return Self::Bf16 {
                check_grad_overflow: values.bool("bf16.check_grad_overflow"),
                bf16_optimizer_states: values.bool("bf16.bf16_optimizer_states"),
            };
        }
        if !fp16 {
            return Self::Fp32;
        }
        let fixed = values.number("fp16.loss_scale");
        if fixed != 0.0 {
            return Self::Fp16 {
                loss_scale: LossScale::Static(fixed),
            };
        }
        let power = values.int("fp16.initial_scale_power");
        if power > 126 {
            let message = format!("{power} is more than 126, the largest power of two in fp32");
            values.wrong("fp16.initial_scale_power", message, "16 is usual");
        }
        let loss_scale = LossScale::Dynamic {
            initial_scale_power: power.min(126) as u32,
            loss_scale_window: values.int("fp16.loss_scale_window"),
            hysteresis: values.int("fp16.hysteresis"),
            consecutive_hysteresis: values.bool("fp16.consecutive_hysteresis"),
            min_loss_scale: values.number("fp16.min_loss_scale"),
        };
        Self::Fp16 { loss_scale }
    }
}

/// How the gradients of ranks become one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reduction {
    /// Mean or sum over ranks.
    pub op: ReduceOp,
    /// Whether gradients are divided before the sum over ranks rather than after it.
    pub prescale_gradients: bool,
    /// With `prescale_gradients`, divide by this before and by `world_size / this` after.
    pub gradient_predivide_factor: f64,
    /// The type that is sent; `None` is that of the weights.
    pub communication_data_type: Option<FloatType>,
    /// Whether the gradients of each micro-batch are reduced at once; otherwise they are added up on each rank and reduced
    /// once a step.
    pub sync_each_batch: bool,
    /// The type gradients are accumulated in; `None` is the default of the precision.
    pub grad_accum_dtype: Option<FloatType>,
}

/// What is computed over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReduceOp {
    /// The sum divided by the number of ranks.
    Mean,
    /// The sum.
    Sum,
}

impl Reduction {
    pub(super) fn read(values: &mut Values) -> Self {
        let sum = values.text("gradient_allreduce_op") == Some("sum");
        if sum && values.value("zero_optimization.stage") == 3 {
            let message = "sum is not defined for stage 3";
            values.wrong("gradient_allreduce_op", message, "use \"mean\"");
        }
        let (sync_each_batch, stage) = (
            values.bool("sync_each_batch"),
            values.int("zero_optimization.stage"),
        );
        if !sync_each_batch && stage >= 2 {
            let message = format!(
                "at stage {stage} each rank keeps only a part of the gradients, so every batch reduces them"
            );
            let hint = "set it to true, or zero_optimization.stage to 0 or 1";
            values.wrong("sync_each_batch", message, hint);
        }
        let sent = FloatType::read(values, "communication_data_type");
        if sent == Some(FloatType::Fp16) {
            let message = "gradients in fp16 overflow on their way";
            values.wrong(
                "communication_data_type",
                message,
                "use \"bf16\" or \"fp32\"",
            );
        }
        let accumulated = FloatType::read(values, "data_types.grad_accum_dtype");
        if accumulated.is_some_and(|dtype| dtype != FloatType::Fp32) {
            const KEY: &str = "data_types.grad_accum_dtype";
            let nvme = values.text("zero_optimization.offload_optimizer.device") == Some("nvme");
            if accumulated == Some(FloatType::Fp16) && !values.bool("fp16.enabled") {
                let message = "gradients in fp16 overflow without the loss scale of fp16";
                values.wrong(
                    KEY,
                    message,
                    "use \"bf16\" or \"fp32\", or set fp16.enabled to true",
                );
            } else if nvme {
                let message = "gradients that rest on a disk are fp32";
                values.wrong(
                    KEY,
                    message,
                    "use \"fp32\", or keep the optimizer in memory",
                );
            } else if !sync_each_batch {
                let message = "gradients that are added up on each rank until the step are fp32";
                values.wrong(KEY, message, "use \"fp32\", or set sync_each_batch to true");
            }
        }
        Self {
            op: if sum { ReduceOp::Sum } else { ReduceOp::Mean },
            prescale_gradients: values.bool("prescale_gradients"),
            gradient_predivide_factor: values.number("gradient_predivide_factor"),
            communication_data_type: sent,
            sync_each_batch,
            grad_accum_dtype: accumulated,
        }
    }
}
