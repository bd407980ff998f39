//! `zero_optimization` and `aio`: what is partitioned, where it lives, and how it moves.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::values::Values;

/// What is divided over ranks.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(into = "u8", try_from = "u8")]
pub enum Stage {
    /// Nothing.
    #[default]
    Disabled = 0,
    /// States of the optimizer.
    OptimizerStates = 1,
    /// These and gradients.
    Gradients = 2,
    /// These and parameters.
    Parameters = 3,
}

impl From<Stage> for u8 {
    fn from(stage: Stage) -> u8 {
        stage as u8
    }
}

impl TryFrom<u8> for Stage {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::Disabled),
            1 => Ok(Self::OptimizerStates),
            2 => Ok(Self::Gradients),
            3 => Ok(Self::Parameters),
            other => Err(format!("{other} is no stage: they are 0, 1, 2 and 3")),
        }
    }
}

/// Where something lives that is not in use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// With the computation.
    #[default]
    None,
    /// In the memory of the machine; on a CPU rank that is where it is anyway.
    Cpu,
    /// In files of this folder.
    Nvme(PathBuf),
}

/// `offload_param`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadParam {
    /// Where parameters live.
    pub device: Tier,
    /// Buffers of `buffer_size` for parameters that move.
    pub buffer_count: usize,
    /// Elements of a buffer.
    pub buffer_size: usize,
    /// Elements that stay in memory when the device is NVMe.
    pub max_in_cpu: usize,
}

/// `offload_optimizer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadOptimizer {
    /// Where states live.
    pub device: Tier,
    /// Buffers for states that move.
    pub buffer_count: usize,
    /// Whether the next part is read during the update of one.
    pub pipeline_read: bool,
    /// Whether the last part is written during the update of one.
    pub pipeline_write: bool,
}

/// `zero_optimization`. Sizes are elements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Zero {
    /// What is divided over ranks.
    pub stage: Stage,
    /// Gradients reduced at a time.
    pub reduce_bucket_size: usize,
    /// Parameters gathered at a time after a step.
    pub allgather_bucket_size: usize,
    /// Parameters updated at a time.
    pub sub_group_size: usize,
    /// Parameters gathered ahead of their use.
    pub stage3_prefetch_bucket_size: usize,
    /// Parameters smaller than this are not divided.
    pub stage3_param_persistence_threshold: usize,
    /// The most parameters that are not divided because they are small.
    pub stage3_model_persistence_threshold: usize,
    /// The most gathered parameters.
    pub stage3_max_live_parameters: usize,
    /// Parameters used again within this many are kept.
    pub stage3_max_reuse_distance: usize,
    /// Whether a model in 16 bits is saved whole.
    pub stage3_gather_16bit_weights_on_model_save: bool,
    /// Where parameters live.
    pub offload_param: OffloadParam,
    /// Where states of the optimizer live.
    pub offload_optimizer: OffloadOptimizer,
}

impl Zero {
    /// The folder for swap files, where something is offloaded there.
    pub fn nvme_path(&self) -> Option<&Path> {
        let devices = [&self.offload_optimizer.device, &self.offload_param.device];
        devices.into_iter().find_map(|device| match device {
            Tier::Nvme(folder) => Some(folder.as_path()),
            Tier::None | Tier::Cpu => None,
        })
    }
}

const PARAM: &str = "zero_optimization.offload_param";
const OPTIMIZER: &str = "zero_optimization.offload_optimizer";

impl Zero {
    /// Whether checkpoints are written in the background, from a copy in memory: not of what rests on a disk.
    pub(super) fn reads_decoupled(&self, values: &mut Values) -> bool {
        const KEY: &str = "checkpoint.writer.decoupled";
        let on_disk = |tier: &Tier| matches!(tier, Tier::Nvme(_));
        let decoupled = values.bool(KEY);
        if decoupled
            && (on_disk(&self.offload_param.device) || on_disk(&self.offload_optimizer.device))
        {
            let message = "the copy in memory that is written in the background would bring back what is offloaded to nvme";
            values.wrong(KEY, message, "set it to false, or offload to \"none\"");
        }
        decoupled
    }

    pub(super) fn read(values: &mut Values) -> Self {
        let number = values.int("zero_optimization.stage");
        let stage = u8::try_from(number).ok().map(Stage::try_from);
        let stage = stage.and_then(Result::ok).unwrap_or_else(|| {
            let message = format!("{number} is no stage");
            values.wrong("zero_optimization.stage", message, "they are 0, 1, 2 and 3");
            Stage::Disabled
        });
        let param = tier(values, PARAM);
        let optimizer = tier(values, OPTIMIZER);
        if param != Tier::None && stage != Stage::Parameters {
            let key = format!("{PARAM}.device");
            let message =
                format!("parameters are offloaded at stage 3 only, and this is stage {number}");
            values.wrong(
                &key,
                message,
                "set zero_optimization.stage to 3, or the device to \"none\"",
            );
        }
        if optimizer != Tier::None && stage == Stage::Disabled {
            let key = format!("{OPTIMIZER}.device");
            let message = "states are offloaded at stages 1, 2 and 3, and this is stage 0";
            values.wrong(
                &key,
                message,
                "set zero_optimization.stage to 1, 2 or 3, or the device to \"none\"",
            );
        }
        if let (Tier::Nvme(one), Tier::Nvme(other)) = (&param, &optimizer)
            && one != other
        {
            let message =
                "a rank has one swap file, and this is another folder than offload_optimizer's";
            values.wrong(
                &format!("{PARAM}.nvme_path"),
                message,
                "give both the same folder",
            );
        }
        let size = |key: &str| values.int(&format!("zero_optimization.{key}")) as usize;
        Self {
            stage,
            reduce_bucket_size: size("reduce_bucket_size"),
            allgather_bucket_size: size("allgather_bucket_size"),
            sub_group_size: size("sub_group_size"),
            stage3_prefetch_bucket_size: size("stage3_prefetch_bucket_size"),
            stage3_param_persistence_threshold: size("stage3_param_persistence_threshold"),
            stage3_model_persistence_threshold: size("stage3_model_persistence_threshold"),
            stage3_max_live_parameters: size("stage3_max_live_parameters"),
            stage3_max_reuse_distance: size("stage3_max_reuse_distance"),
            stage3_gather_16bit_weights_on_model_save: values
                .bool("zero_optimization.stage3_gather_16bit_weights_on_model_save"),
            offload_param: OffloadParam {
                device: param,
                buffer_count: size("offload_param.buffer_count"),
                buffer_size: size("offload_param.buffer_size"),
                max_in_cpu: size("offload_param.max_in_cpu"),
            },
            offload_optimizer: OffloadOptimizer {
                device: optimizer,
                buffer_count: size("offload_optimizer.buffer_count"),
                pipeline_read: values.bool("zero_optimization.offload_optimizer.pipeline_read"),
                pipeline_write: values.bool("zero_optimization.offload_optimizer.pipeline_write"),
            },
        }
    }
}

fn tier(values: &mut Values, section: &str) -> Tier {
    let path_key = format!("{section}.nvme_path");
    let path = values.text(&path_key).map(PathBuf::from);
    match (values.text(&format!("{section}.device")), path) {
        (Some("cpu"), _) => Tier::Cpu,
        (Some("nvme"), Some(path)) => Tier::Nvme(path),
        (Some("nvme"), None) => {
            let message = "it is missing, and the device is nvme";
            values.wrong(&path_key, message, "give a folder on a fast disk");
            Tier::None
        }
        _ => Tier::None,
    }
}

/// `aio`: how files are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aio {
    /// Bytes of one request.
    pub block_size: usize,
    /// Requests under way.
    pub queue_depth: usize,
    /// Threads that one operation is divided over.
    pub intra_op_parallelism: usize,
    /// Whether requests are submitted one by one.
    pub single_submit: bool,
    /// Whether completions are taken while requests are submitted.
    pub overlap_events: bool,
}

impl Aio {
    pub(super) fn read(values: &Values) -> Self {
        Self {
            block_size: values.int("aio.block_size") as usize,
            queue_depth: values.int("aio.queue_depth") as usize,
            intra_op_parallelism: values.int("aio.intra_op_parallelism") as usize,
            single_submit: values.bool("aio.single_submit"),
            overlap_events: values.bool("aio.overlap_events"),
        }
    }
}
