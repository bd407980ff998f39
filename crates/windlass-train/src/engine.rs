//! The engine: `forward`, `backward`, `step` over a model and a store.

use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use std::collections::BTreeMap;
use windlass_model::Model;
use windlass_store::Store;
use windlass_tensor::{Category, Cpu, DType, Grads, Recorded, Tape, Tensor};

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
    micro_steps: usize,
}

/// A loss, with all that its backward pass needs.
pub struct Loss<B> {
    value: f64,
    batch: B,
    passes: Vec<Pass>,
    /// Gradient of the last layer's input, which is known already.
    dx: Option<Tensor>,
    /// Gradients of units that a layer further back will use again.
    held: BTreeMap<usize, Grads>,
}

/// What one layer left behind.
enum Pass {
    Recorded(Recorded),
    /// Activation checkpointing: the layer's input.
    Input(Tensor),
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
}

impl<B> Engine<B> {
    /// An engine over a model and the store of its parameters; all dense parameters are trained.
    ///
    /// # Errors
    /// A disk without space for the optimizer's state, where that is its place.
    pub fn initialize(model: Model<B>, mut store: Store, options: EngineOptions) -> Result<Self> {
        store.train(options.optimizer.moments(), |_| true)?;
        Ok(Engine {
            model,
            store,
            options,
            steps: 0,
            micro_steps: 0,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
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

    /// Continues counting from `steps`: a resumed run.
    pub fn set_global_steps(&mut self, steps: u64) {
        self.steps = steps;
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
        self.store
            .set_boundary(self.is_gradient_accumulation_boundary());
        let cpu = self.store.cpu().clone();
        let mut loss = Loss {
            value: 0.0,
            batch,
            passes: Vec::new(),
            dx: None,
            held: BTreeMap::new(),
        };
        let order: Vec<usize> = self.model.layers().map(|(unit, _)| unit).collect();
        let count = order.len();
        let mut x = start(&cpu);
        for (index, (unit, layer)) in self.model.layers().enumerate() {
            if index + 1 == count {
                let grads = self.store.grads(unit);
                let weights = self.store.gather(unit)?;
                let mut tape = Tape::training_eager(&cpu, grads, 1.0);
                let input = tape.input(std::mem::replace(&mut x, start(&cpu)));
                let y = layer.forward(&weights, input, &loss.batch, &mut tape);
                let (recorded, grads) = tape.finish(&y);
                let mut grads = grads.expect("an eager tape returns its gradients");
                loss.value = y.tensor.item();
                let seed = y.tensor.cast(&cpu, y.tensor.dtype(), Category::Activations);
                loss.dx = recorded.backward(&weights, ones(&cpu, seed), &mut grads);
                drop(weights);
                finish_unit(&order, &mut self.store, &mut loss.held, index, grads)?;
                break;
            }
            let weights = self.store.gather(unit)?;
            self.store.prefetch(order[index + 1]);
            let input = x.clone();
            let checkpointing = self.options.activation_checkpointing && index > 0;
            let mut tape = if checkpointing {
                Tape::inference(&cpu)
            } else {
                Tape::training(&cpu)
            };
            let value = tape.input(x);
            let y = layer.forward(&weights, value, &loss.batch, &mut tape);
            loss.passes.push(match checkpointing {
                true => Pass::Input(input),
                false => Pass::Recorded(tape.finish(&y).0),
            });
            x = y.tensor;
        }
        Ok(loss)
    }

    /// Adds the gradients of a loss to those of the parameters.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn backward(&mut self, loss: Loss<B>) -> Result<()> {
        let cpu = self.store.cpu().clone();
        let Loss {
            batch,
            passes,
            mut dx,
            mut held,
            ..
        } = loss;
        let layers: Vec<_> = self.model.layers().map(|(unit, _)| unit).collect();
        for (index, pass) in passes.into_iter().enumerate().rev() {
            let Some(dy) = dx.take() else { break };
            let unit = layers[index];
            let mut grads = held.remove(&unit).unwrap_or_else(|| self.store.grads(unit));
            let weights = self.store.gather(unit)?;
            if let Some(before) = index.checked_sub(1) {
                self.store.prefetch(layers[before]);
            }
            let recorded = match pass {
                Pass::Recorded(recorded) => recorded,
                Pass::Input(input) => {
                    let layer = self.model.layers().nth(index).expect("a layer").1;
                    let mut tape = Tape::training(&cpu);
                    let value = tape.input(input);
                    let y = layer.forward(&weights, value, &batch, &mut tape);
                    tape.finish(&y).0
                }
            };
            dx = recorded.backward(&weights, dy, &mut grads);
            drop(weights);
            finish_unit(&layers, &mut self.store, &mut held, index, grads)?;
        }
        for (unit, grads) in held {
            self.store.reduce(unit, grads)?;
        }
        self.micro_steps += 1;
        Ok(())
    }

    /// Updates the parameters from the gradients, clipped by their global norm, and clears the gradients.
    ///
    /// # Errors
    /// [`Error::NonFinite`] when a gradient is not finite: nothing is updated then. As [`Engine::forward`].
    pub fn step(&mut self, lr: f64) -> Result<StepReport> {
        let pool = self.store.cpu().pool.clone();
        let grad_norm = self.global_grad_norm()?;
        let step = self.steps + 1;
        if !grad_norm.is_finite() {
            return Err(Error::NonFinite {
                step,
                what: "gradient norm",
                value: grad_norm,
                checkpoint: None,
            });
        }
        // As torch.nn.utils.clip_grad_norm_: the coefficient never exceeds 1.
        let clip = self
            .options
            .gradient_clipping
            .map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        let (optimizer, scale) = (self.options.optimizer, clip * self.mean());
        self.store
            .update(&mut |shard| optimizer.apply(&pool, shard, lr, step, scale))?;
        self.store.clear_grads();
        self.steps = step;
        self.micro_steps = 0;
        Ok(StepReport { step, grad_norm })
    }

    /// The norm of all gradients together, before clipping.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn global_grad_norm(&self) -> Result<f64> {
        Ok(self.store.grad_squares()?.sqrt() * self.mean())
    }

    /// What turns the sum of gradients that the store keeps into the gradient of a step's loss.
    fn mean(&self) -> f64 {
        match self.options.losses {
            Losses::Sum => 1.0,
            Losses::Mean => 1.0 / (self.store.group().size() * self.micro_steps.max(1)) as f64,
        }
    }

    /// Runs the model without recording: what the last layer returns.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn evaluate(&self, batch: &B) -> Result<Tensor> {
        run(&self.model, &self.store, batch)
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

/// Runs a model without recording: what the last layer returns.
///
/// # Errors
/// What hinders the store from gathering weights: a lost rank, a failing disk.
pub fn run<B>(model: &Model<B>, store: &Store, batch: &B) -> Result<Tensor> {
    let cpu = store.cpu();
    let mut x = start(cpu);
    let mut next = model.layers().skip(1).map(|(unit, _)| unit);
    for (unit, layer) in model.layers() {
        let weights = store.gather(unit)?;
        if let Some(next) = next.next() {
            store.prefetch(next);
        }
        let mut tape = Tape::inference(cpu);
        let value = tape.input(x);
        x = layer.forward(&weights, value, batch, &mut tape).tensor;
    }
    Ok(x)
}

/// Takes part in the gathering of a pass that other ranks make and this one has no batch for.
///
/// # Errors
/// As [`run`].
pub fn idle<B>(model: &Model<B>, store: &Store) -> Result<()> {
    for (unit, _) in model.layers() {
        store.gather(unit)?;
    }
    Ok(())
}

/// The empty value that the first layer receives.
fn start(cpu: &Cpu) -> Tensor {
    Tensor::empty(cpu, [0], DType::F32, Category::Activations)
}

fn ones(cpu: &Cpu, mut like: Tensor) -> Tensor {
    use windlass_tensor::kernels::elementwise::fill;
    match like.dtype() {
        DType::F64 => fill(&cpu.pool, 1.0, like.as_mut_slice::<f64>()),
        _ => fill(&cpu.pool, 1.0, like.as_mut_slice::<f32>()),
    }
    like
}
