//! The engine in the words of Hugging Face Accelerate.

use crate::comm::Group;
use crate::model::Model;
use crate::tensor::{Cpu, DType};
use crate::train::loss_scale::LossScale;
use crate::train::schedule::Rate;
use crate::train::{Engine, EngineOptions, Error, Loss, Optimizer, Result};
use serde_json::json;
use std::path::Path;
use windlass_store::{Home, Placement, Stage, Store};

/// How an [`Accelerator`] runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AcceleratorOptions {
    /// Storage type of weights and activations (`mixed_precision`); `f16` brings a dynamic loss scale.
    pub mixed_precision: DType,
    /// Batches whose gradients make one step.
    pub gradient_accumulation_steps: usize,
    /// Whether [`Prepared::accumulate`] reduces the gradients of every batch, as stages 2 and 3 always do; otherwise, in
    /// stages 0 and 1, it reduces their sum once a step.
    pub sync_each_batch: bool,
    /// What ranks share out among them.
    pub placement: Placement,
    /// Seed of new weights.
    pub seed: u64,
    /// Whether [`Prepared::save_state`] returns when everything is copied into memory and leaves the writing to the
    /// background.
    pub async_checkpoints: bool,
}

impl Default for AcceleratorOptions {
    fn default() -> Self {
        AcceleratorOptions {
            mixed_precision: DType::F32,
            gradient_accumulation_steps: 1,
            sync_each_batch: false,
            placement: Placement::default(),
            seed: 42,
            async_checkpoints: false,
        }
    }
}

/// One process of a training run, before and around its engine.
pub struct Accelerator {
    cpu: Cpu,
    group: Option<Group>,
    rank: usize,
    ranks: usize,
    options: AcceleratorOptions,
}

/// A model under training: what [`Accelerator::prepare`] makes of it.
pub struct Prepared<B> {
    engine: Engine<B>,
    sync_each_batch: bool,
}

impl Accelerator {
    /// This machine alone, all its cores.
    pub fn new(options: AcceleratorOptions) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self::on(Cpu::new(threads), Group::solo(), options)
    }

    /// One rank of several.
    pub fn on(cpu: Cpu, group: Group, options: AcceleratorOptions) -> Self {
        Accelerator {
            cpu,
            rank: group.rank(),
            ranks: group.size(),
            group: Some(group),
            options,
        }
    }

    /// The machine.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Whether this is the first rank.
    pub fn is_main_process(&self) -> bool {
        self.rank == 0
    }

    /// This rank, from 0.
    pub fn process_index(&self) -> usize {
        self.rank
    }

    /// Ranks.
    pub fn num_processes(&self) -> usize {
        self.ranks
    }

    /// Prints a line, once for all ranks.
    pub fn print(&self, line: &str) {
        if self.is_main_process() {
            println!("{line}");
        }
    }

    /// Fills a model's weights and puts it under training. Collective.
    ///
    /// # Errors
    /// A disk without space, where something rests there.
    ///
    /// # Panics
    /// When called twice: a rank trains one model.
    #[track_caller]
    pub fn prepare<B>(
        &mut self,
        model: Model<B>,
        optimizer: Optimizer,
        rate: Rate,
    ) -> Result<Prepared<B>> {
        let group = self.group.take().expect("a rank trains one model");
        let (cpu, options) = (&self.cpu, self.options);
        let home = Home::on(group, options.placement);
        let store = Store::build(cpu, home, model.units(), |_, param, range| {
            Ok(param.fill_range(cpu, options.seed, options.mixed_precision, range))
        })?;
        let engine = EngineOptions {
            optimizer,
            rate,
            gradient_clipping: None,
            loss_scale: (options.mixed_precision == DType::F16).then(LossScale::default),
            gradient_accumulation_steps: options.gradient_accumulation_steps,
            async_checkpoints: options.async_checkpoints,
            ..EngineOptions::default()
        };
        let engine = Engine::initialize(model, store, engine)?;
        Ok(Prepared {
            engine,
            sync_each_batch: options.sync_each_batch || options.placement.stage >= Stage::Gradients,
        })
    }
}

impl<B> Prepared<B> {
    /// Runs the model on a batch.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn forward(&mut self, batch: B) -> Result<Loss<B>> {
        self.engine.forward(batch)
    }

    /// Adds the gradients of a loss.
    ///
    /// # Errors
    /// As [`Engine::backward`].
    pub fn backward(&mut self, loss: Loss<B>) -> Result<()> {
        self.engine.backward(loss)
    }

    /// Forward and backward on a batch, and a step when it is the last one to be accumulated. Before that, nothing is
    /// sent where [`Engine::no_sync`] is possible and the options do not say otherwise. Returns the loss.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn accumulate(&mut self, batch: B) -> Result<f64> {
        let last = self.engine.is_gradient_accumulation_boundary();
        if !last && !self.sync_each_batch {
            let mut quiet = self.engine.no_sync()?;
            let loss = quiet.forward(batch)?;
            let value = loss.value();
            quiet.backward(loss)?;
            return Ok(value);
        }
        let loss = self.engine.forward(batch)?;
        let value = loss.value();
        self.engine.backward(loss)?;
        if last {
            self.engine.step()?;
        }
        Ok(value)
    }

    /// Updates the weights.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step(&mut self) -> Result<()> {
        self.engine.step().map(|_| ())
    }

    /// Bounds the global norm of gradients in every step from now on, and returns the norm of those at hand. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn clip_grad_norm(&mut self, max_norm: f64) -> Result<f64> {
        self.engine.set_gradient_clipping(Some(max_norm));
        self.engine.global_grad_norm()
    }

    /// The numbers of all ranks, in rank order; as many from each. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn gather_for_metrics(&self, values: &[f64]) -> Result<Vec<f64>> {
        let gathered = self.engine.store().group().collect("metrics", values);
        gathered.map_err(|e| Error::Store(e.into()))
    }

    /// Writes a checkpoint; in the background, if the options say so, and then [`Engine::finish_checkpoint`] waits for the
    /// last one. Collective.
    ///
    /// # Errors
    /// As [`Engine::save_checkpoint`].
    pub fn save_state(&mut self, dir: &Path) -> Result<()> {
        self.engine
            .save_checkpoint(dir, None, &json!({}))
            .map(|_| ())
    }

    /// Continues from the latest checkpoint; whether there was one. Collective.
    ///
    /// # Errors
    /// As [`Engine::load_checkpoint`].
    pub fn load_state(&mut self, dir: &Path) -> Result<bool> {
        Ok(self.engine.load_checkpoint(dir, None)?.is_some())
    }

    /// The model.
    pub fn unwrap_model(&self) -> &Model<B> {
        self.engine.model()
    }

    /// The engine.
    pub fn engine(&mut self) -> &mut Engine<B> {
        &mut self.engine
    }
}
