//! From a `ds_config.json` to an engine: which settings become what.

use crate::config::{self, Config, FloatType, OptimizerConfig, Precision, ReduceOp};
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::monitor::MonitorOptions;
use crate::optimizer::Optimizer;
use crate::schedule::Rate;
use std::path::{Path, PathBuf};
use windlass_comm::Group;
use windlass_model::Model;
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Home, Placement, Stage, Store, Tier, Wire};
use windlass_tensor::kernels::optim::Storage;
use windlass_tensor::{Cpu, DType};

/// An engine for a model on this machine alone, with freshly filled weights, trained as a configuration says.
///
/// An engine prints, times and writes nothing: the keys that ask for it (`steps_per_print`, `wall_clock_breakdown`,
/// `dump_state`, `comms_logger`, `flops_profiler`, `tensorboard`, `csv_monitor`) are acted on by `windlass train`. A program
/// that keeps its own loop finds them in [`Config::observe`], and the numbers here:
///
/// - what `steps_per_print` shows: the [`StepReport`](crate::StepReport) of a step, [`Engine::skipped_steps`],
///   [`Engine::lr`];
/// - of `wall_clock_breakdown`: a clock around `forward`, `backward` and `step`, as the [`Trainer`](crate::Trainer) has it
///   in [`StepTimes`](crate::StepTimes);
/// - of `comms_logger`: `engine.store().group().traffic()`, and the theory in [`Plan::collectives`](crate::Plan);
/// - of `dump_state`: [`Config::report`].
///
/// # Errors
/// As [`initialize_on`].
pub fn initialize<B>(model: Model<B>, config: &Config) -> Result<Engine<B>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    initialize_on(&Cpu::new(threads), Group::solo(), model, config, 42)
}

/// An engine on one rank of several; the weights are filled from `seed`, of what is partitioned only this rank's part.
/// Collective.
///
/// # Errors
/// A configuration without an optimizer, ranks that were given different ones, a folder for swap files that cannot be
/// used.
pub fn initialize_on<B>(
    cpu: &Cpu,
    group: Group,
    model: Model<B>,
    config: &Config,
    seed: u64,
) -> Result<Engine<B>> {
    let options = config.engine_options()?;
    let dtype = config.dtype();
    group
        .agree("the configuration", hash(&config.fingerprint()))
        .map_err(|e| Error::Store(e.into()))?;
    let home = config.home(group)?;
    let store = Store::build(cpu, home, model.units(), |_, param, range| {
        Ok(param.fill_range(cpu, seed, dtype, range))
    })?;
    Engine::initialize(model, store, options)
}

/// The first eight bytes of a fingerprint.
fn hash(fingerprint: &[u8; 32]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| fingerprint[i]))
}

impl Config {
    /// The storage type of weights and activations.
    pub fn dtype(&self) -> DType {
        match self.precision.float_type() {
            FloatType::Fp32 => DType::F32,
            FloatType::Bf16 => DType::Bf16,
            FloatType::Fp16 => DType::F16,
        }
    }

    /// What is partitioned, and where it rests.
    pub fn placement(&self) -> Placement {
        let zero = &self.zero;
        let tier = |tier: &config::Tier| match tier {
            config::Tier::Nvme(_) => Tier::Nvme,
            config::Tier::None | config::Tier::Cpu => Tier::Memory,
        };
        let whole = Placement::default();
        Placement {
            stage: Stage::from_number(zero.stage.into()).expect("one of four stages"),
            persistence_threshold: zero.stage3_param_persistence_threshold,
            bucket: zero
                .reduce_bucket_size
                .min(zero.allgather_bucket_size)
                .max(1),
            wire: match self.reduction.communication_data_type {
                Some(FloatType::Bf16) => Wire::Bf16,
                _ => Wire::Exact,
            },
            grad_accum: match self.reduction.grad_accum_dtype {
                Some(FloatType::Bf16) => DType::Bf16,
                Some(FloatType::Fp16) => DType::F16,
                Some(FloatType::Fp32) | None => DType::F32,
            },
            reduce_once: !self.reduction.sync_each_batch,
            parameters: tier(&zero.offload_param.device),
            optimizer: tier(&zero.offload_optimizer.device),
            activations: match self.activations_path() {
                Some(_) => Tier::Nvme,
                None => Tier::Memory,
            },
            buffers: zero.offload_optimizer.buffer_count.max(1),
            sub_group: zero.sub_group_size.clamp(1, whole.sub_group),
            ..whole
        }
    }

    /// Whether something is offloaded to the memory of the CPU, where ranks have everything anyway.
    pub fn offloads_to_cpu(&self) -> bool {
        let zero = &self.zero;
        let activations = self.activation_checkpointing.as_ref();
        [&zero.offload_optimizer.device, &zero.offload_param.device]
            .into_iter()
            .any(|device| matches!(device, config::Tier::Cpu))
            || activations.is_some_and(|a| a.cpu_checkpointing && a.nvme_path.is_none())
    }

    /// The folder for swap files in which inputs of layers rest.
    fn activations_path(&self) -> Option<&Path> {
        self.activation_checkpointing.as_ref()?.nvme_path.as_deref()
    }

    /// The folder for swap files and how its disk is kept busy, where something rests there.
    pub fn swap(&self) -> Option<(PathBuf, AioOptions)> {
        let folder = self.zero.nvme_path().or(self.activations_path())?;
        let options = AioOptions {
            block_size: self.aio.block_size,
            queue_depth: self.aio.queue_depth,
            threads: self.aio.intra_op_parallelism,
            single_submit: self.aio.single_submit,
            overlap_events: self.aio.overlap_events,
        };
        Some((folder.to_owned(), options))
    }

    /// The place of a rank's store; opens its swap file, if it needs one.
    ///
    /// # Errors
    /// A folder that cannot be used.
    pub fn home(&self, group: Group) -> Result<Home> {
        let swap = self.swap().map(|(folder, options)| {
            let name = format!("windlass-rank-{}.swap", group.rank());
            SwapFile::create(&folder, &name, options, None)
        });
        Ok(Home {
            placement: self.placement(),
            swap: swap.transpose()?,
            group,
        })
    }

    /// What a run in a folder writes about itself.
    pub fn monitor(&self, out: &Path) -> MonitorOptions {
        let folder = |file: &config::MonitorFile| match file.output_path.as_os_str().is_empty() {
            true => out.join(&file.job_name),
            false => file.output_path.join(&file.job_name),
        };
        MonitorOptions {
            tensorboard: self.observe.tensorboard.as_ref().map(folder),
            csv: self.observe.csv_monitor.as_ref().map(folder),
            wall_clock_breakdown: self.observe.wall_clock_breakdown,
            profile_step: self.observe.flops_profiler.as_ref().map(|p| p.profile_step),
        }
    }

    /// What the engine does.
    ///
    /// # Errors
    /// A configuration without an optimizer.
    pub fn engine_options(&self) -> Result<EngineOptions> {
        let Some(optimizer) = &self.optimizer else {
            return Err(Error::Setting {
                setting: "\"optimizer\" of the configuration",
                value: "missing".into(),
                range: "there: {\"type\": \"AdamW\", \"params\": {\"lr\": 1e-4}}",
            });
        };
        let (rule, lr) = rule(optimizer);
        let mut options = EngineOptions {
            optimizer: rule,
            gradient_clipping: self.gradient_clipping,
            activation_checkpointing: self.activation_checkpointing.is_some(),
            gradient_accumulation_steps: self.batch.gradient_accumulation_steps as usize,
            sum_over_ranks: self.reduction.op == ReduceOp::Sum,
            rate: match self.scheduler {
                Some(scheduler) => Rate::DeepSpeed(scheduler),
                None => Rate::Constant(lr),
            },
            async_checkpoints: self.async_checkpoints,
            ..EngineOptions::default()
        };
        match self.precision {
            Precision::Bf16 {
                bf16_optimizer_states: true,
                ..
            } => options.moments = Storage::Bf16,
            Precision::Fp16 { loss_scale } => options.loss_scale = Some(loss_scale),
            _ => {}
        }
        if let OptimizerConfig::AdamW8bit { min_8bit_size, .. } = *optimizer {
            (options.moments, options.min_8bit_size) = (Storage::Q8, min_8bit_size);
        }
        Ok(options)
    }
}

/// The update rule and its learning rate.
fn rule(optimizer: &OptimizerConfig) -> (Optimizer, f64) {
    let adam = |adam: &config::Adam, decoupled| Optimizer::Adam {
        beta1: adam.betas.0,
        beta2: adam.betas.1,
        eps: adam.eps,
        weight_decay: adam.weight_decay,
        decoupled,
        bias_correction: adam.bias_correction,
    };
    let rule = match optimizer {
        OptimizerConfig::Adam(constants) => adam(constants, false),
        OptimizerConfig::AdamW(constants) => adam(constants, true),
        OptimizerConfig::AdamW8bit {
            adam: constants, ..
        } => adam(constants, true),
        &OptimizerConfig::Adagrad {
            eps, weight_decay, ..
        } => Optimizer::Adagrad { eps, weight_decay },
        &OptimizerConfig::Lion {
            betas,
            weight_decay,
            ..
        } => Optimizer::Lion {
            beta1: betas.0,
            beta2: betas.1,
            weight_decay,
        },
        &OptimizerConfig::Lamb {
            adam,
            max_coeff,
            min_coeff,
        } => Optimizer::Lamb {
            beta1: adam.betas.0,
            beta2: adam.betas.1,
            eps: adam.eps,
            weight_decay: adam.weight_decay,
            bias_correction: adam.bias_correction,
            min_coeff,
            max_coeff,
        },
        &OptimizerConfig::Sgd {
            momentum,
            dampening,
            weight_decay,
            nesterov,
            ..
        } => Optimizer::Sgd {
            momentum,
            dampening,
            nesterov,
            weight_decay,
        },
        &OptimizerConfig::Muon {
            lr,
            momentum,
            weight_decay,
            adam,
            ..
        } => Optimizer::Muon {
            momentum,
            weight_decay,
            beta1: adam.betas.0,
            beta2: adam.betas.1,
            eps: adam.eps,
            adam_lr_ratio: if lr == 0.0 { 1.0 } else { adam.lr / lr },
        },
    };
    (rule, optimizer.lr())
}
