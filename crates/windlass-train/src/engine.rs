//! The engine: `forward`, `backward`, `step` over a model and a store.

use crate::optimizer::Optimizer;
use std::collections::BTreeMap;
use windlass_model::Model;
use windlass_store::Store;
use windlass_tensor::kernels::reduce::sum_squares;
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
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            optimizer: Optimizer::ADAMW,
            gradient_clipping: Some(1.0),
            activation_checkpointing: false,
        }
    }
}

/// Trains a model whose parameters a store keeps.
pub struct Engine<B> {
    model: Model<B>,
    store: Store,
    options: EngineOptions,
    steps: u64,
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

/// The gradients are not finite; nothing was updated.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the gradient norm of step {step} is {grad_norm}")]
pub struct NonFinite {
    /// The step that was refused.
    pub step: u64,
    /// The norm.
    pub grad_norm: f64,
}

impl<B> Engine<B> {
    /// An engine over a model and the store of its parameters; all dense parameters are trained.
    pub fn initialize(model: Model<B>, mut store: Store, options: EngineOptions) -> Self {
        store.train(options.optimizer.moments(), |_| true);
        Engine {
            model,
            store,
            options,
            steps: 0,
        }
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

    /// Runs the model on a batch for training.
    ///
    /// The last layer's backward pass is run at once: its gradient depends on nothing that comes later, and the loss can
    /// be computed together with its gradient from the same logits.
    pub fn forward(&mut self, batch: B) -> Loss<B> {
        let cpu = self.store.cpu().clone();
        let mut loss = Loss {
            value: 0.0,
            batch,
            passes: Vec::new(),
            dx: None,
            held: BTreeMap::new(),
        };
        let count = self.model.layers().len();
        let mut x = start(&cpu);
        for (index, (unit, layer)) in self.model.layers().enumerate() {
            if index + 1 == count {
                let grads = self.store.grads(unit);
                let weights = self.store.gather(unit);
                let mut tape = Tape::training_eager(&cpu, grads, 1.0);
                let input = tape.input(std::mem::replace(&mut x, start(&cpu)));
                let y = layer.forward(&weights, input, &loss.batch, &mut tape);
                let (recorded, grads) = tape.finish(&y);
                let mut grads = grads.expect("an eager tape returns its gradients");
                loss.value = y.tensor.item();
                let seed = y.tensor.cast(&cpu, y.tensor.dtype(), Category::Activations);
                loss.dx = recorded.backward(&weights, ones(&cpu, seed), &mut grads);
                finish_unit(&self.model, &mut self.store, &mut loss.held, index, grads);
                break;
            }
            self.store.prefetch(unit);
            let weights = self.store.gather(unit);
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
        loss
    }

    /// Adds the gradients of a loss to those of the parameters.
    pub fn backward(&mut self, loss: Loss<B>) {
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
            let weights = self.store.gather(unit);
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
            finish_unit(&self.model, &mut self.store, &mut held, index, grads);
        }
        for (unit, grads) in held {
            self.store.reduce(unit, grads);
        }
    }

    /// Updates the parameters from the gradients, clipped by their global norm, and clears the gradients.
    ///
    /// # Errors
    /// When a gradient is not finite: nothing is updated then.
    pub fn step(&mut self, lr: f64) -> Result<StepReport, NonFinite> {
        let pool = self.store.cpu().pool.clone();
        let grad_norm = self.global_grad_norm();
        let step = self.steps + 1;
        if !grad_norm.is_finite() {
            return Err(NonFinite { step, grad_norm });
        }
        // As torch.nn.utils.clip_grad_norm_: the coefficient never exceeds 1.
        let scale = self
            .options
            .gradient_clipping
            .map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        for shard in self.store.update() {
            self.options.optimizer.apply(&pool, shard, lr, step, scale);
        }
        self.store.clear_grads();
        self.steps = step;
        Ok(StepReport { step, grad_norm })
    }

    /// The norm of all gradients together, summed in `f64` in a fixed order.
    pub fn global_grad_norm(&self) -> f64 {
        let pool = &self.store.cpu().pool;
        let squares = self.store.gradients().map(|(_, g)| match g.dtype() {
            DType::F64 => sum_squares(pool, g.as_slice::<f64>()),
            _ => sum_squares(pool, g.as_slice::<f32>()),
        });
        squares.sum::<f64>().sqrt()
    }

    /// Runs the model without recording: what the last layer returns.
    pub fn evaluate(&self, batch: &B) -> Tensor {
        run(&self.model, &self.store, batch)
    }
}

/// Hands a layer's gradients to the store, or keeps them for a layer further back that shares the unit.
fn finish_unit<B>(
    model: &Model<B>,
    store: &mut Store,
    held: &mut BTreeMap<usize, Grads>,
    index: usize,
    grads: Grads,
) {
    let unit = model.layers().nth(index).expect("a layer").0;
    if model.layers().take(index).any(|(other, _)| other == unit) {
        held.insert(unit, grads);
    } else {
        store.reduce(unit, grads);
    }
}

/// Runs a model without recording: what the last layer returns.
pub fn run<B>(model: &Model<B>, store: &Store, batch: &B) -> Tensor {
    let cpu = store.cpu();
    let mut x = start(cpu);
    for (unit, layer) in model.layers() {
        store.prefetch(unit);
        let weights = store.gather(unit);
        let mut tape = Tape::inference(cpu);
        let value = tape.input(x);
        x = layer.forward(&weights, value, batch, &mut tape).tensor;
    }
    x
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
