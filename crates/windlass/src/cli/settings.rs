//! How a run trains: from flags, or from a `ds_config.json` with flags in place of some of its values.

use super::config::table;
use super::recipe::{Recipe, Tuning};
use super::usage;
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use windlass::comm::Group;
use windlass::model::DecoderConfig;
use windlass::progress::say;
use windlass::store::{Home, Placement, Stage};
use windlass::tensor::DType;
use windlass::train::config::{Config, Context, Observe, Origin, Row, Status};
use windlass::train::schedule::Rate;
use windlass::train::{EngineOptions, Error, Outline, Plan, StepShape, plan_rank};

/// The key that a run of unknown length leaves open.
const LENGTH: &str = "scheduler.params.total_num_steps";

/// Flags that both ways share.
#[derive(clap::Args)]
pub struct Args {
    /// Sequences of one forward pass, on each rank [default: 8]
    #[arg(long)]
    batch: Option<usize>,
    /// Forward passes of one step, on each rank [default: 1]
    #[arg(long)]
    accumulate: Option<usize>,
    /// A ds_config.json: batch, optimizer, schedule, precision, ZeRO; flags fill its "auto" values and replace others
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    recipe: Recipe,
    /// What ranks share out among them: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters [default: 0]
    #[arg(long, value_name = "STAGE")]
    zero_stage: Option<u8>,
    /// Add up the gradients of --accumulate passes on each rank and reduce them once a step, in stages 0 and 1: sends less and
    /// rounds in another order; as "sync_each_batch": false of a --config
    #[arg(long)]
    reduce_once: bool,
    /// Copy checkpoints into memory and write them while training goes on; as "checkpoint": {"writer": {"decoupled": true}} of
    /// a --config. Takes as much more memory as a checkpoint is long, on each rank its part
    #[arg(long)]
    async_checkpoints: bool,
}

/// How a run trains.
pub struct Settings {
    /// Storage type of weights and activations.
    pub dtype: DType,
    /// Optimizer, clipping, precision.
    pub engine: EngineOptions,
    /// Sequences of a step on each rank.
    pub shape: StepShape,
    /// What is partitioned, and where it rests.
    pub placement: Placement,
    /// The file, where there is one.
    pub config: Option<Config>,
    rate: Option<Rate>,
}

impl Settings {
    /// Says what the user should know before the run.
    pub fn announce(&self) {
        for note in self.notes() {
            say(&format!("note: {note}"));
        }
        let dumped = self.config.as_ref().filter(|c| c.observe.dump_state);
        if let Some(config) = dumped {
            let told = |row: &&Row| row.origin != Origin::Default || row.status == Status::Honoured;
            let rows: Vec<&Row> = config.report().iter().filter(told).collect();
            table(&rows).iter().for_each(|line| say(line));
        }
    }

    /// What a --config asks to be said about the run.
    pub fn observe(&self) -> Observe {
        let config = self.config.as_ref();
        config.map_or_else(Observe::default, |config| config.observe.clone())
    }

    fn notes(&self) -> Vec<String> {
        let config = self.config.as_ref();
        let mut notes: Vec<String> = config.map_or(Vec::new(), Config::notes);
        if let Some(activations) = config.and_then(|c| c.activation_checkpointing.as_ref()) {
            let again = "activation_checkpointing: every layer is run again in the backward pass";
            notes.push(match &activations.nvme_path {
                Some(folder) => format!("{again}; inputs rest in {}", folder.display()),
                None => again.into(),
            });
        }
        if config.is_some_and(|c| c.offloads_to_cpu()) {
            notes.push(
                "offloading to the cpu: ranks are on the CPU, so it is where everything is".into(),
            );
        }
        notes
    }

    /// The run as far as its memory depends on it.
    pub fn outline(&self, ranks: usize) -> Outline {
        Outline {
            dtype: self.dtype,
            options: self.engine,
            shape: self.shape,
            placement: self.placement,
            ranks,
        }
    }

    /// What one rank needs.
    pub fn plan(&self, config: &DecoderConfig, ranks: usize) -> Plan {
        plan_rank(
            config,
            self.dtype,
            self.engine,
            self.shape,
            self.placement,
            ranks,
        )
    }

    /// The place of a rank's store.
    ///
    /// # Errors
    /// A folder that cannot hold swap files.
    pub fn home(&self, group: Group) -> Result<Home> {
        match &self.config {
            Some(config) => Ok(config.home(group)?),
            None => Ok(Home::on(group, self.placement)),
        }
    }
}

impl Args {
    /// Puts the defaults of fine-tuning in place of what was not asked for; a --config says all of it itself.
    pub fn tune(&mut self, tuning: Tuning) {
        if self.config.is_none() {
            self.recipe.tune(tuning);
        }
    }

    /// The storage type, where flags or a --config with `bf16` or `fp16` ask for one.
    ///
    /// # Errors
    /// As [`Args::settings`].
    pub fn dtype(&self, ranks: usize) -> Result<Option<DType>> {
        if self.config.is_none() {
            return Ok(self.recipe.given_dtype());
        }
        // Neither the number of steps nor the sizes of the model decide it.
        let dtype = self.settings(ranks, 1, 1, 1)?.dtype;
        Ok(Some(dtype)
            .filter(|dtype| *dtype != DType::F32)
            .or(self.recipe.given_dtype()))
    }

    /// The settings of a run on `ranks` ranks, of `steps` steps, of a model of a width.
    ///
    /// # Errors
    /// Flags and files that cannot be used, or contradict each other.
    pub fn settings(
        &self,
        ranks: usize,
        steps: u64,
        hidden_size: usize,
        seq_len: usize,
    ) -> Result<Settings> {
        if self.batch == Some(0) || self.accumulate == Some(0) {
            return Err(usage(
                "--batch or --accumulate is 0",
                "they must be positive",
            ));
        }
        match &self.config {
            Some(_) => self.with_file(ranks, steps, hidden_size, seq_len),
            None => self.with_flags(seq_len),
        }
    }

    fn with_flags(&self, seq_len: usize) -> Result<Settings> {
        let number = self.zero_stage.unwrap_or(0);
        let stage = Stage::from_number(number).ok_or_else(|| {
            usage(
                format!("--zero-stage {number}"),
                "the stages are 0, 1, 2 and 3",
            )
        })?;
        if self.reduce_once && stage >= Stage::Gradients {
            return Err(usage(
                format!("--reduce-once with --zero-stage {number}"),
                "it needs stage 0 or 1: in the others each rank keeps only a part of the gradients",
            ));
        }
        Ok(Settings {
            dtype: self.recipe.dtype(),
            engine: EngineOptions {
                async_checkpoints: self.async_checkpoints,
                ..self.recipe.engine()?
            },
            shape: StepShape {
                micro_batch: self.batch.unwrap_or(8),
                seq_len,
                gradient_accumulation_steps: self.accumulate.unwrap_or(1),
            },
            placement: Placement {
                stage,
                reduce_once: self.reduce_once,
                ..Placement::default()
            },
            config: None,
            rate: None,
        })
    }

    fn with_file(
        &self,
        ranks: usize,
        steps: u64,
        hidden_size: usize,
        seq_len: usize,
    ) -> Result<Settings> {
        let path = self.config.as_deref().expect("called with a file");
        let mut context = Context::ranks(ranks as u64);
        context.auto = self.recipe.auto(steps);
        context.auto.train_micro_batch_size_per_gpu = self.batch.map(|n| n as u64);
        context.auto.gradient_accumulation_steps = self.accumulate.map(|n| n as u64);
        context.auto.hidden_size = Some(hidden_size as u64);
        context.overrides = self.recipe.overrides()?;
        if let Some(stage) = self.zero_stage {
            let key = "zero_optimization.stage".to_string();
            context.overrides.push((key, json!(stage)));
        }
        if self.reduce_once {
            let key = "sync_each_batch".to_string();
            context.overrides.push((key, json!(false)));
        }
        if self.async_checkpoints {
            let key = "checkpoint.writer.decoupled".to_string();
            context.overrides.push((key, json!(true)));
        }
        // A file that gives the number of steps means it; one that leaves it open learns it from the run.
        let config = match Config::load(path, &context) {
            Err(Error::Config(invalid)) if invalid.problems.iter().any(|p| p.key == LENGTH) => {
                context.auto.total_num_steps = Some(steps);
                Config::load(path, &context)?
            }
            config => config?,
        };
        if config.scheduler.is_none() && self.recipe.warms_up() {
            return Err(usage(
                format!("--warmup with a {} that has no scheduler", path.display()),
                "add a \"scheduler\" to the file",
            ));
        }
        let engine = config.engine_options()?;
        Ok(Settings {
            dtype: config.dtype(),
            engine,
            shape: StepShape {
                micro_batch: config.batch.train_micro_batch_size_per_gpu as usize,
                seq_len,
                gradient_accumulation_steps: config.batch.gradient_accumulation_steps as usize,
            },
            placement: config.placement(),
            rate: Some(engine.rate),
            config: Some(config),
        })
    }

    /// The learning rate of each of `steps` steps.
    ///
    /// # Errors
    /// A rate or a warm-up out of range.
    pub fn rate(&self, settings: &Settings, steps: u64) -> Result<Rate> {
        match settings.rate {
            Some(rate) => Ok(rate),
            None => self.recipe.schedule(steps),
        }
    }
}
