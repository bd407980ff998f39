//! The engine: `forward`, `backward`, `step` over a model and a store.

use crate::background::Pending;
use crate::error::{Error, Result};
use crate::loss_scale::{LossScale, LossScaler};
use crate::optimizer::{Optimizer, Step};
use crate::pass::{How, Pass};
use crate::schedule::Rate;
use std::collections::BTreeMap;
use std::path::PathBuf;
use windlass_model::Model;
use windlass_store::{StateSpec, Store, Tier};
use windlass_tensor::kernels::optim::Storage;
use windlass_tensor::{Category, Cpu, DType, Grads, ParamId, Tape, Tensor};

/// How an engine trains.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EngineOptions {
    /// The update rule.
    pub optimizer: Optimizer,
    /// Upper bound of the global gradient norm; none when `None`.
    pub gradient_clipping: Option<f64>,
    /// Whether only the input of each layer is kept for the backward pass, and the layer is run again there.
    pub activation_checkpointing: bool,
    /// Backward passes of a step, on each rank.
    pub gradient_accumulation_steps: usize,
    /// What the losses of a step's batches, on all ranks, make together.
    pub losses: Losses,
    /// Whether gradients are those of that loss times the number of ranks (`"gradient_allreduce_op": "sum"`).
    pub sum_over_ranks: bool,
    /// How the optimizer's moments are stored.
    pub moments: Storage,
    /// Parameters of fewer elements keep `f32` moments where `moments` is in 8 bits.
    pub min_8bit_size: usize,
    /// The learning rate of each step.
    pub rate: Rate,
    /// Decides what is left to chance: which elements adapters drop.
    pub noise: u64,
    /// How losses are scaled so that small gradients survive in `f16`.
    pub loss_scale: Option<LossScale>,
    /// Whether checkpoints are copied into memory and written from there while training goes on. A rank then takes as
    /// much more memory as it writes: its part of the weights and of the optimizer's state.
    pub async_checkpoints: bool,
}

/// What the losses of a step's batches make together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Losses {
    /// Their mean: each is a mean over its own batch.
    #[default]
    Mean,
    /// Their sum: each is already divided by the tokens of the whole step, so batches of different lengths weigh as
    /// they should.
    Sum,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            optimizer: Optimizer::ADAMW,
            gradient_clipping: Some(1.0),
            activation_checkpointing: false,
            gradient_accumulation_steps: 1,
            losses: Losses::Mean,
            sum_over_ranks: false,
            moments: Storage::F32,
            min_8bit_size: 4096,
            rate: Rate::Constant(1e-3),
            noise: 0,
            loss_scale: None,
            async_checkpoints: false,
        }
    }
}

/// Trains a model whose parameters a store keeps.
pub struct Engine<B> {
    model: Model<B>,
    store: Store,
    options: EngineOptions,
    steps: u64,
    /// Backward passes since the last step.
    pub(crate) micro_steps: usize,
    /// Whether gradients of this rank wait to be reduced.
    pub(crate) unreduced: bool,
    scaler: Option<LossScaler>,
    skipped: u64,
    last_norm: Option<f64>,
    pub(crate) pending: Option<Pending>,
    pub(crate) last_checkpoint: Option<PathBuf>,
}

/// A loss, with all that its backward pass needs.
pub struct Loss<B> {
    value: f64,
    batch: B,
    /// Whether its gradients stay on this rank for now.
    deferred: bool,
    /// What is left to chance.
    noise: u64,
    passes: Vec<Pass>,
    /// Gradient of the last layer's input, which is known already.
    dx: Option<Tensor>,
    /// Gradients of units that a layer further back will use again.
    held: BTreeMap<usize, Grads>,
}

impl<B> Loss<B> {
    /// The loss.
    pub fn value(&self) -> f64 {
        self.value
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Whether a gradient overflowed and nothing was updated.
    pub skipped: bool,
}

/// Where an engine stands, beside its parameters and optimizer state.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EngineState {
    /// Optimizer steps taken.
    #[serde(rename = "step")]
    pub steps: u64,
    /// Steps skipped.
    #[serde(default)]
    pub skipped: u64,
    /// The loss scale.
    #[serde(default)]
    pub scaler: Option<LossScaler>,
}

impl<B> Engine<B> {
    /// An engine over a model and the store of its parameters; all dense parameters are trained that are declared so.
    ///
    /// # Errors
    /// A disk without space for the optimizer's state, where that is its place; moments in 8 bits for an optimizer
    /// that has none.
    pub fn initialize(model: Model<B>, mut store: Store, options: EngineOptions) -> Result<Self> {
        let state = StateSpec {
            moments: options.optimizer.moments(),
            storage: options.moments,
            min_8bit_size: options.min_8bit_size,
        };
        if options.moments == Storage::Q8 && !options.optimizer.has_8bit() {
            return Err(Error::Setting {
                setting: "the storage of moments",
                value: "8 bits".into(),
                range: "f32 or bf16 for this optimizer: only AdamW has moments in 8 bits",
            });
        }
        let placement = store.placement();
        if options.async_checkpoints
            && [placement.parameters, placement.optimizer].contains(&Tier::Nvme)
        {
            return Err(Error::Setting {
                setting: "writing checkpoints in the background",
                value: "on".into(),
                range: "off where parameters or the optimizer rest on a disk: the copy would bring them back into memory",
            });
        }
        store.train(state, |param| param.trained)?;
        let engine = Engine {
            model,
            store,
            options,
            steps: 0,
            micro_steps: 0,
            unreduced: false,
            scaler: options.loss_scale.map(LossScaler::new),
            skipped: 0,
            last_norm: None,
            pending: None,
            last_checkpoint: None,
        };
        engine.prepare_checkpoints();
        Ok(engine)
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// How it trains.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// The parameters.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The parameters, to be changed.
    pub fn store_mut(&mut self) -> &mut Store {
        &mut self.store
    }

    /// Optimizer steps taken.
    pub fn global_steps(&self) -> u64 {
        self.steps
    }

    /// Forgets how often it has been stepped, what it has skipped and the gradients of a step that was begun, and
    /// continues as a saved engine would.
    ///
    /// # Errors
    /// [`Error::Changed`] when the saved engine scaled its losses by another rule.
    pub fn resume(&mut self, state: &EngineState) -> Result<()> {
        let rule = |scaler: &Option<LossScaler>| scaler.as_ref().map(LossScaler::rule);
        if rule(&self.scaler) != rule(&state.scaler) {
            return Err(Error::Changed {
                what: "the loss scale",
                saved: format!("{:?}", rule(&state.scaler)),
                now: format!("{:?}", rule(&self.scaler)),
            });
        }
        self.steps = state.steps;
        self.skipped = state.skipped;
        self.scaler.clone_from(&state.scaler);
        self.store.clear_grads();
        (self.micro_steps, self.unreduced) = (0, false);
        Ok(())
    }

    /// What [`Engine::resume`] needs.
    pub fn state(&self) -> EngineState {
        EngineState {
            steps: self.steps,
            skipped: self.skipped,
            scaler: self.scaler.clone(),
        }
    }

    /// Bounds the global gradient norm from the next step on; `None` does not.
    pub fn set_gradient_clipping(&mut self, clip: Option<f64>) {
        self.options.gradient_clipping = clip;
    }

    /// The learning rate of the next step.
    pub fn lr(&self) -> f64 {
        self.options.rate.lr(self.steps)
    }

    /// What losses are multiplied by; 1 without a loss scale.
    pub fn loss_scale(&self) -> f64 {
        self.scaler.as_ref().map_or(1.0, LossScaler::scale)
    }

    /// Steps that were skipped because a gradient overflowed.
    pub fn skipped_steps(&self) -> u64 {
        self.skipped
    }

    /// The gradient norm of the last step, before clipping; `None` before the first one.
    pub fn last_grad_norm(&self) -> Option<f64> {
        self.last_norm
    }

    /// Whether the next backward pass is the last one before a step.
    pub fn is_gradient_accumulation_boundary(&self) -> bool {
        (self.micro_steps + 1).is_multiple_of(self.options.gradient_accumulation_steps.max(1))
    }

    /// Runs the model on a batch for training.
    ///
    /// The last layer's backward pass is run at once: its gradient depends on nothing that comes later, and the loss can
    /// be computed together with its gradient from the same logits.
    ///
    /// # Errors
    /// What hinders the store from gathering weights or reducing gradients: a lost rank, a failing disk.
    pub fn forward(&mut self, batch: B) -> Result<Loss<B>> {
        let once = self.store.placement().reduce_once;
        self.pass(batch, once && !self.is_gradient_accumulation_boundary())
    }

    /// As [`Engine::forward`]; `deferred` leaves the gradients on this rank.
    pub(crate) fn pass(&mut self, batch: B, deferred: bool) -> Result<Loss<B>> {
        self.store.defer_reduction(deferred);
        self.unreduced |= deferred;
        let (cpu, scale) = (self.store.cpu().clone(), self.loss_scale());
        let mut loss = Loss {
            value: 0.0,
            batch,
            deferred,
            noise: self.noise(),
            passes: Vec::new(),
            dx: None,
            held: BTreeMap::new(),
        };
        let order: Vec<usize> = self.model.layers().map(|(unit, _)| unit).collect();
        let count = order.len();
        let first = self.first_trained(&order);
        let mut x = start(&cpu);
        for (index, (unit, layer)) in self.model.layers().enumerate() {
            if index + 1 == count {
                let grads = self.store.grads(unit);
                let weights = self.store.gather(unit)?;
                let tape = Tape::training_eager(&cpu, grads, scale);
                let mut tape = tape.with_noise(loss.noise ^ index as u64);
                let input = tape.input(std::mem::replace(&mut x, start(&cpu)));
                let y = layer.forward(&weights, input, &loss.batch, &mut tape);
                let (recorded, grads) = tape.finish(&y);
                let mut grads = grads.expect("an eager tape returns its gradients");
                loss.value = y.tensor.item();
                let seed = y.tensor.cast(&cpu, y.tensor.dtype(), Category::Activations);
                loss.dx = recorded.backward(&weights, filled(&cpu, seed, scale), &mut grads);
                drop(weights);
                finish_unit(&order, &mut self.store, &mut loss.held, index, grads)?;
                break;
            }
            let weights = self.store.gather(unit)?;
            self.store.prefetch(order[index + 1]);
            let how = How {
                checkpointing: self.options.activation_checkpointing && index > 0,
                next: index + 2 == count,
                frozen: index < first,
                ends: index <= first,
                noise: loss.noise ^ index as u64,
            };
            let layer = (layer, &*weights);
            let (y, pass) = Pass::run(&self.store, layer, x, &loss.batch, how)?;
            loss.passes.push(pass);
            x = y;
        }
        Ok(loss)
    }

    /// Adds the gradients of a loss to those of the parameters.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn backward(&mut self, loss: Loss<B>) -> Result<()> {
        let Loss {
            batch,
            deferred,
            noise,
            mut passes,
            mut dx,
            mut held,
            ..
        } = loss;
        self.store.defer_reduction(deferred);
        let layers: Vec<_> = self.model.layers().map(|(unit, _)| unit).collect();
        while let Some(pass) = passes.pop() {
            if pass.is_frozen() {
                break;
            }
            let Some(dy) = dx.take() else { break };
            let index = passes.len();
            let unit = layers[index];
            let mut grads = held.remove(&unit).unwrap_or_else(|| self.store.grads(unit));
            let weights = self.store.gather(unit)?;
            if let Some(before) = index.checked_sub(1) {
                self.store.prefetch(layers[before]);
                passes[before].recall(&self.store)?;
            }
            let layer = self.model.layers().nth(index).expect("a layer").1;
            let noise = noise ^ index as u64;
            let recorded = pass.recorded(&self.store, (layer, &*weights), &batch, noise)?;
            dx = recorded.backward(&weights, dy, &mut grads);
            drop(weights);
            finish_unit(&layers, &mut self.store, &mut held, index, grads)?;
        }
        for (unit, grads) in held {
            self.store.reduce(unit, grads)?;
        }
        self.micro_steps += 1;
        // A pass that reduces takes along what was left on this rank before it.
        self.unreduced = deferred;
        Ok(())
    }

    /// Updates the parameters from the gradients, clipped by their global norm, at the learning rate of the options, and
    /// clears the gradients.
    ///
    /// # Errors
    /// As [`Engine::step_at`].
    pub fn step(&mut self) -> Result<StepReport> {
        self.step_at(self.lr())
    }

    /// As [`Engine::step`], at a learning rate of the caller's.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a gradient is not finite: nothing is updated then. With a loss scale that is an
    /// overflow: the step is skipped and the scale falls, and it is an error only when the scale cannot fall further.
    /// What hindered a checkpoint in the background: then nothing was done yet, and the step may be taken again.
    /// As [`Engine::forward`].
    pub fn step_at(&mut self, lr: f64) -> Result<StepReport> {
        self.look_after_checkpoint(false)?;
        let grad_norm = self.global_grad_norm()?;
        self.last_norm = Some(grad_norm);
        let number = self.steps + 1;
        let overflow = !grad_norm.is_finite();
        let grad_scale = self.mean();
        let skipped = match &mut self.scaler {
            Some(scaler) => scaler.update(overflow) && !scaler.exhausted(),
            None => false,
        };
        if overflow && !skipped {
            return Err(Error::NonFinite {
                step: number,
                what: "gradient norm",
                value: grad_norm,
                checkpoint: None,
            });
        }
        if !skipped {
            // As torch.nn.utils.clip_grad_norm_: the coefficient never exceeds 1.
            let clip = self
                .options
                .gradient_clipping
                .map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
            let step = Step {
                lr,
                number,
                grad_scale: clip * grad_scale,
                betas: self.options.rate.betas(self.steps),
            };
            let ends = [self.model.layers().next(), self.model.layers().next_back()];
            let ends = ends.map(|layer| layer.map(|(unit, _)| unit));
            let hidden = |id: ParamId| !ends.contains(&Some(id.unit));
            self.options
                .optimizer
                .update(&mut self.store, &step, hidden)?;
            self.steps = number;
        }
        self.skipped += u64::from(skipped);
        self.store.clear_grads();
        self.micro_steps = 0;
        Ok(StepReport {
            step: number,
            grad_norm,
            lr,
            skipped,
        })
    }

    /// The norm of all gradients together, before clipping. Gradients left on the ranks are reduced first. Collective.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn global_grad_norm(&mut self) -> Result<f64> {
        self.reduce_rest()?;
        Ok(self.store.grad_squares()?.sqrt() * self.mean())
    }

    /// What turns the sum of gradients that the store keeps into the gradient of a step's loss.
    fn mean(&self) -> f64 {
        let (ranks, micro) = (self.store.group().size(), self.micro_steps.max(1));
        let count = match self.options.losses {
            Losses::Sum => 1,
            Losses::Mean => ranks * micro,
        };
        let times = [1, ranks][usize::from(self.options.sum_over_ranks)];
        times as f64 / (count as f64 * self.loss_scale())
    }
}

/// Hands a layer's gradients to the store, or keeps them for a layer further back that shares the unit.
fn finish_unit(
    order: &[usize],
    store: &mut Store,
    held: &mut BTreeMap<usize, Grads>,
    index: usize,
    grads: Grads,
) -> Result<()> {
    let unit = order[index];
    if order[..index].contains(&unit) {
        held.insert(unit, grads);
        Ok(())
    } else {
        Ok(store.reduce(unit, grads)?)
    }
}

/// The empty value that the first layer receives.
pub(crate) fn start(cpu: &Cpu) -> Tensor {
    Tensor::empty(cpu, [0], DType::F32, Category::Activations)
}

pub(crate) fn filled(cpu: &Cpu, mut like: Tensor, value: f64) -> Tensor {
    use windlass_tensor::kernels::elementwise::fill;
    match like.dtype() {
        DType::F64 => fill(&cpu.pool, value, like.as_mut_slice::<f64>()),
        _ => fill(&cpu.pool, value as f32, like.as_mut_slice::<f32>()),
    }
    like
}
