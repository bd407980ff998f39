//! The training loop: data through the engine, schedule, evaluation, checkpoints, metrics.

mod compare;
mod event;
mod feed;
mod measure;
mod tuning;

pub use event::{End, Event, StepEvent, StepTimes};
pub use tuning::{Lessons, Subject};

use crate::data::{Batch, Packing, Sampler, View};
use crate::engine::{Engine, EngineOptions, Losses};
use crate::error::{Error, Result};
use crate::monitor::{MonitorOptions, Monitors};
use crate::plan::StepShape;
use crate::preference::{Preference, Rewards};
use crate::profile::{self, LayerProfile};
use crate::save::{self, Place, Progress, WeightFiles};
use crate::schedule::Rate;
use event::timed;
use feed::Feed;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
pub(crate) use tuning::Best;
use windlass_comm::Group;
use windlass_model::{Adapter, DecoderConfig, Goal, Tokenizer, Tokens, decoder};
use windlass_store::Store;
use windlass_store::checkpoint::{CheckpointDir, Checkpoints};
use windlass_tensor::{Cpu, DType, RouterStats};

/// How a run trains, measures and saves.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// Storage type of weights and activations.
    pub dtype: DType,
    /// Optimizer, clipping, activation checkpointing.
    pub engine: EngineOptions,
    /// Sequences of a step.
    pub shape: StepShape,
    /// Learning rate of every step.
    pub schedule: Rate,
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// How documents share a sequence.
    pub packing: Packing,
    /// Seed of the data order.
    pub seed: u64,
    /// Steps between evaluations; at the end only when `None`.
    pub eval_every: Option<u64>,
    /// Sequences of an evaluation; all held-out ones when `None`.
    pub eval_sequences: Option<u64>,
    /// Steps between checkpoints.
    pub save_every: Option<u64>,
    /// Time between checkpoints.
    pub save_after: Option<Duration>,
    /// Checkpoints kept; all when `None`.
    pub keep: Option<NonZeroUsize>,
    /// Folder of checkpoints and metrics.
    pub out: PathBuf,
    /// What is measured and written beside them.
    pub monitor: MonitorOptions,
}

/// A training run.
pub struct Trainer {
    engine: Engine<Tokens>,
    config: DecoderConfig,
    tokenizer: Tokenizer,
    adapter: Option<Adapter>,
    feed: Feed,
    options: TrainOptions,
    checkpoints: Checkpoints,
    /// On the first rank.
    monitors: Option<Monitors>,
    tokens_seen: u64,
    last_checkpoint: Option<PathBuf>,
    /// Whether the best weights are kept.
    keeps_best: bool,
    patience: Option<u64>,
    preference: Option<Preference>,
    best: Best,
}

/// A batch as the model reads it; `denominator` is the number of scored tokens of the step, which consists of
/// `micro_batches` batches.
pub(crate) fn to_tokens(
    batch: Batch,
    config: &DecoderConfig,
    dtype: DType,
    denominator: f64,
    micro_batches: usize,
) -> Tokens {
    let goal = Goal::Loss {
        targets: batch.targets.into(),
        denominator,
    };
    let mut tokens = Tokens::new(batch.ids, &batch.segments, goal, dtype);
    let coefficient = config
        .experts
        .as_ref()
        .map_or(0.0, |e| e.router_aux_loss_coef);
    if coefficient > 0.0 {
        tokens.router = Some((
            Arc::new(RouterStats::default()),
            coefficient / micro_batches as f64,
        ));
    }
    tokens
}

impl Trainer {
    /// A run over `train`, measured on `held_out`, from the weights in `store`, together with the other ranks of its
    /// group. With `resume`, step, data order and optimizer state are those of the checkpoint (the weights in `store`
    /// must be its weights), which any number of ranks may have saved.
    ///
    /// # Errors
    /// Data shorter than a sequence, a sequence longer than the model's context, unwritable folders, a checkpoint of
    /// another run.
    pub fn new(
        config: DecoderConfig,
        tokenizer: Tokenizer,
        store: Store,
        train: View,
        held_out: Option<View>,
        options: TrainOptions,
        resume: Option<&CheckpointDir>,
    ) -> Result<Self> {
        if options.shape.seq_len > config.max_position_embeddings {
            return Err(Error::ContextTooShort {
                asked: options.shape.seq_len,
                context: config.max_position_embeddings,
            });
        }
        let (rank, ranks) = (store.group().rank(), store.group().size());
        let (seq_len, packing) = (options.shape.seq_len, options.packing);
        let sampler = Sampler::new(train, seq_len, packing, options.seed)?.shard(rank, ranks);
        let feed = Feed::Stream {
            sampler,
            held_out,
            seq_len,
            packing,
        };
        let subject = Subject {
            model: decoder(&config),
            config,
            tokenizer,
            store,
            adapter: None,
        };
        Self::build(subject, feed, options, resume)
    }

    fn build(
        subject: Subject,
        mut feed: Feed,
        options: TrainOptions,
        resume: Option<&CheckpointDir>,
    ) -> Result<Self> {
        let Subject {
            config,
            tokenizer,
            model,
            store,
            adapter,
        } = subject;
        tokenizer.check_vocabulary(config.vocab_size)?;
        let (rank, ranks) = (store.group().rank(), store.group().size());
        let engine_options = EngineOptions {
            gradient_accumulation_steps: options.shape.gradient_accumulation_steps,
            losses: Losses::Sum,
            rate: options.schedule,
            ..options.engine
        };
        let mut engine = Engine::initialize(model, store, engine_options)?;
        let (mut tokens_seen, mut best) = (0, Best::default());
        if let Some(checkpoint) = resume {
            let progress: Progress = checkpoint.json(save::STATE_FILE)?;
            progress.check(&options, ranks)?;
            save::load_optimizer(checkpoint, progress.ranks, engine.store_mut())?;
            feed.resume(&progress.sampler)?;
            best = progress.best;
            engine.resume(&progress.engine)?;
            tokens_seen = progress.tokens_seen;
        }
        std::fs::create_dir_all(&options.out).map_err(|e| Error::io("create", &options.out, e))?;
        let last_step = resume.map(|c| c.step());
        let sequences = options.shape.micro_batch * options.shape.gradient_accumulation_steps;
        let batch = (sequences * ranks) as u64;
        let (out, monitor) = (&options.out, &options.monitor);
        let monitors = match rank {
            0 => Some(Monitors::open(out, monitor, wall_time(), last_step, batch)?),
            _ => None,
        };
        Ok(Trainer {
            engine,
            config,
            tokenizer,
            adapter,
            feed,
            checkpoints: Checkpoints::open(&options.out),
            options,
            monitors,
            tokens_seen,
            last_checkpoint: resume.map(|c| c.path().to_owned()),
            keeps_best: false,
            patience: None,
            preference: None,
            best,
        })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine<Tokens> {
        &self.engine
    }

    /// The machine.
    pub fn cpu(&self) -> &Cpu {
        self.engine.store().cpu()
    }

    /// Tokens trained on so far.
    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// Trains to the end, or until `stop` is raised: then a checkpoint is saved first.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and whatever hinders saving.
    pub fn run(&mut self, stop: &AtomicBool, tell: &mut dyn FnMut(Event)) -> Result<End> {
        self.run_watched(stop, tell, &mut |_| ())
    }

    /// As [`Trainer::run`]; `look` sees the trainer after every evaluation, and before the first step.
    ///
    /// # Errors
    /// As [`Trainer::run`].
    pub fn run_watched(
        &mut self,
        stop: &AtomicBool,
        tell: &mut dyn FnMut(Event),
        look: &mut dyn FnMut(&Trainer),
    ) -> Result<End> {
        let mut saved_at = (self.engine.global_steps(), Instant::now());
        let mut end = End::Finished;
        look(self);
        while self.engine.global_steps() < self.options.steps {
            let next = self.engine.global_steps() + 1;
            let profiled = &mut self.options.monitor.profile_step;
            if profiled.take_if(|step| *step == next).is_some() {
                tell(Event::Profiled(self.profile()?));
            }
            let event = self.step()?;
            tell(Event::Step(Box::new(event)));
            self.tell_saved(tell);
            // A step that overflowed is tried again on the next data: the run stands where it stood.
            let step = self.engine.global_steps();
            let taken = step == event.step;
            let done = taken && step == self.options.steps;
            let due = |every: Option<u64>| taken && every.is_some_and(|n| step.is_multiple_of(n));
            let mut stopped = None;
            if self.feed.has_held_out() && (due(self.options.eval_every) || done) {
                let loss = self.evaluate()?;
                let perplexity = self.preference.is_none().then(|| loss.exp());
                let mut values = vec![("eval_loss", loss)];
                values.extend(perplexity.map(|value| ("eval_perplexity", value)));
                self.write(step, &values)?;
                tell(Event::Evaluated {
                    step,
                    loss,
                    perplexity,
                });
                stopped = self.judge(step, loss, tell)?;
                look(self);
            }
            let timed = self
                .options
                .save_after
                .is_some_and(|after| saved_at.1.elapsed() >= after);
            let (interrupted, timed) = self.agree(stop.load(Ordering::Relaxed), timed)?;
            let ends = done || interrupted || stopped.is_some();
            if (ends || timed || due(self.options.save_every)) && saved_at.0 != step {
                self.save()?;
                saved_at = (step, Instant::now());
                self.tell_saved(tell);
            }
            if let Some(early) = stopped.filter(|_| !done) {
                end = early;
                break;
            }
            if interrupted && !done {
                end = End::Interrupted;
                break;
            }
        }
        self.engine.finish_checkpoint()?;
        self.tell_saved(tell);
        Ok(end)
    }

    /// Says when a checkpoint is complete that was not before.
    fn tell_saved(&mut self, tell: &mut dyn FnMut(Event)) {
        if let Some(path) = self.engine.last_checkpoint()
            && self.last_checkpoint.as_deref() != Some(path)
        {
            self.last_checkpoint = Some(path.to_owned());
            tell(Event::Saved(path.to_owned()));
        }
    }

    /// The ranks of the run.
    fn group(&self) -> &Group {
        self.engine.store().group()
    }

    /// The values of all ranks, in rank order.
    fn all(&self, tag: &str, own: &[f64]) -> Result<Vec<f64>> {
        let all = self.group().collect(tag, own);
        all.map_err(|e| Error::Store(e.into()))
    }

    /// What is done when any rank was told to stop, or the first one's clock says so.
    fn agree(&self, interrupted: bool, timed: bool) -> Result<(bool, bool)> {
        let flags = self.all("stop", &[f64::from(interrupted), f64::from(timed)])?;
        let interrupted = flags.iter().step_by(2).any(|&flag| flag > 0.0);
        Ok((interrupted, flags[1] > 0.0))
    }

    /// Profiles the layers on the first micro-batch of the next step.
    fn profile(&self) -> Result<Vec<LayerProfile>> {
        let batch = self.feed.peek(self.options.shape.micro_batch);
        let model = self.engine.model();
        let flops = profile::flops(&self.config, model.units(), &batch);
        let batch = to_tokens(batch, &self.config, self.options.dtype, 1.0, 1);
        let checkpointing = self.options.engine.activation_checkpointing;
        let (store, scale) = (self.engine.store(), self.engine.loss_scale());
        profile::profile(model, store, &batch, &flops, scale, checkpointing)
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<StepEvent> {
        let start = Instant::now();
        let (before, mut times) = (self.group().traffic(), StepTimes::default());
        let shape = self.options.shape;
        let count = shape.gradient_accumulation_steps;
        let batches: Vec<Batch> = (0..count)
            .map(|_| self.feed.next_batch(shape.micro_batch))
            .collect();
        let mut own = [0.0; 3];
        for batch in &batches {
            let (weight, chosen) = self.weight(batch);
            own = [
                own[0] + weight,
                own[1] + batch.ids.len() as f64,
                own[2] + chosen,
            ];
        }
        let all = self.all("tokens of a step", &own)?;
        let sum = |which: usize| all.iter().skip(which).step_by(3).sum::<f64>();
        let (denominator, tokens, chosen) = (sum(0).max(1.0), sum(1) as usize, sum(2));
        let count = count * self.group().size();
        let step = self.engine.global_steps() + 1;
        let (mut mean, mut rewards) = (0.0, None);
        for batch in batches {
            let (batch, comparison) = self.prepared(batch, (denominator, chosen), count)?;
            let loss = timed(&mut times.forward, || self.engine.forward(batch))?;
            mean += loss.value();
            if let Some(comparison) = comparison {
                let sum = rewards.get_or_insert_with(Rewards::default);
                sum.add(&comparison.rewards());
            }
            timed(&mut times.backward, || self.engine.backward(loss))?;
        }
        let mean: f64 = self.all("loss", &[mean])?.iter().sum();
        let rewards = self.all_rewards(rewards)?;
        // With a loss scale, what overflows in the forward pass is skipped like an overflowing gradient.
        if !mean.is_finite() && self.options.engine.loss_scale.is_none() {
            return Err(self.non_finite(step, "loss", mean));
        }
        let report = timed(&mut times.step, || self.engine.step());
        let report = report.map_err(|e| match e {
            Error::NonFinite { value, what, .. } => self.non_finite(step, what, value),
            other => other,
        })?;
        self.tokens_seen += tokens as u64;
        let event = StepEvent {
            step,
            loss: mean,
            lr: report.lr,
            grad_norm: report.grad_norm,
            tokens,
            seconds: start.elapsed().as_secs_f64(),
            skipped: self.engine.skipped_steps(),
            times,
            traffic: self.group().traffic().since(&before),
            rewards,
        };
        self.record(&event)?;
        Ok(event)
    }

    /// Writes down a step.
    fn record(&mut self, event: &StepEvent) -> Result<()> {
        let mut values = vec![
            ("loss", event.loss),
            ("lr", event.lr),
            ("grad_norm", event.grad_norm),
            ("tokens", self.tokens_seen as f64),
            ("tokens_per_second", event.tokens as f64 / event.seconds),
        ];
        if let Some(rewards) = &event.rewards {
            values.extend(rewards.means());
        }
        if self.options.engine.loss_scale.is_some() {
            values.push(("loss_scale", self.engine.loss_scale()));
        }
        if self.options.monitor.wall_clock_breakdown {
            values.extend(event.milliseconds());
        }
        self.write(event.step, &values)
    }

    fn non_finite(&mut self, step: u64, what: &'static str, value: f64) -> Error {
        // What stops the run is the number; a checkpoint that cannot be written now leaves the one before it.
        let _ = self.engine.finish_checkpoint();
        let saved = self.engine.last_checkpoint().map(Path::to_owned);
        Error::NonFinite {
            step,
            what,
            value,
            checkpoint: saved.or_else(|| self.last_checkpoint.clone()),
        }
    }

    fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        match &mut self.monitors {
            Some(monitors) => monitors.write(step, wall_time(), values),
            None => Ok(()),
        }
    }

    /// Writes the model alone as a Hugging Face folder, from the first rank. Collective.
    ///
    /// # Errors
    /// Whatever hinders writing.
    pub fn save_model(&self, folder: &Path) -> Result<()> {
        save::save_model(folder, &self.engine, &self.config, &self.tokenizer)
    }

    /// Writes a checkpoint: a Hugging Face folder with what a resumed run needs beside it. In the background, where the
    /// engine's options say so.
    fn save(&mut self) -> Result<()> {
        let progress = Progress {
            engine: self.engine.state(),
            tokens_seen: self.tokens_seen,
            sampler: self.feed.state(),
            best: self.best,
            preference: self.preference,
            dtype: self.options.dtype.name().into(),
            optimizer: self.options.engine.optimizer,
            shape: self.options.shape,
            ranks: self.group().size(),
            packing: self.options.packing,
        };
        let (config, tokenizer) = (&self.config, &self.tokenizer);
        let adapter = self.adapter.as_ref();
        let files = match adapter {
            Some(adapter) => WeightFiles::adapter(adapter),
            None => config.naming.file_tensors(self.engine.model()).into(),
        };
        let (keep, dtype) = (self.options.keep, self.engine.store().dtype());
        let place = Place {
            checkpoints: &self.checkpoints,
            name: None,
        };
        self.engine.save_with(place, files, keep, &mut |writer| {
            save::write_head(writer, (config, adapter), tokenizer, &progress, dtype)
        })?;
        Ok(())
    }
}

/// Seconds since 1970, for TensorBoard.
fn wall_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}
