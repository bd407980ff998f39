//! The tape: what a forward pass leaves for its backward pass.
//!
//! A tape belongs to one unit and one pass. It keeps the tensors that backward passes ask for and the slots of the
//! weights, never the weights. Values nobody saved are freed as soon as the forward code drops its [`Var`].

use crate::ops::Overlays;
use crate::{Cpu, DType, Grads, Shape, Tensor, Weights, each_dtype};
use std::sync::Arc;
use windlass_kernels::elementwise;
use windlass_kernels::memory::Category;

/// A value of a forward pass: a tensor and, when a gradient can flow to it, its place on the tape.
#[derive(Clone, Debug)]
pub struct Var {
    /// The value.
    pub tensor: Tensor,
    node: Option<usize>,
    recipe: Option<Arc<dyn Recipe>>,
}

/// A value that is cheaper to compute again in the backward pass than to keep.
pub trait Recipe: Send + Sync + std::fmt::Debug {
    /// The value, computed again.
    fn value(&self, cpu: &Cpu, weights: &Weights) -> Tensor;
}

/// What an op keeps of one of its inputs: the value or its recipe, and its place on the tape.
pub struct Kept {
    node: Option<usize>,
    shape: Shape,
    value: Value,
}

enum Value {
    Tensor(Tensor),
    Recipe(Arc<dyn Recipe>),
}

impl Kept {
    /// The value's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Place on the tape; `None` for a constant.
    pub fn node(&self) -> Option<usize> {
        self.node
    }
}

impl Var {
    /// The value's shape.
    pub fn shape(&self) -> &Shape {
        self.tensor.shape()
    }

    /// Place on the tape; `None` for a constant.
    pub fn node(&self) -> Option<usize> {
        self.node
    }

    /// What the backward pass needs to have this value: itself, or its recipe where it has one.
    pub fn keep(&self) -> Kept {
        let value = match &self.recipe {
            Some(recipe) => Value::Recipe(recipe.clone()),
            None => Value::Tensor(self.tensor.clone()),
        };
        Kept {
            node: self.node,
            shape: *self.tensor.shape(),
            value,
        }
    }
}

/// The backward pass of one recorded op.
pub trait Backward: Send {
    /// Given the gradient of the op's output, adds to the gradients of its inputs and weights.
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor);
}

enum Mode {
    Inference,
    /// As training, and nothing is kept.
    Rehearsal,
    Training,
}

/// Told the slot of a matrix and the rows that it is about to be multiplied with.
pub type Watch = Arc<dyn Fn(usize, &Tensor) + Send + Sync>;

/// Records the ops of one unit's forward pass.
pub struct Tape {
    cpu: Cpu,
    mode: Mode,
    nodes: Vec<Option<Box<dyn Backward>>>,
    pub(crate) eager: Option<Eager>,
    pub(crate) watch: Option<Watch>,
    /// Whether adapters are applied.
    adapters: bool,
    /// Adapters of rows.
    pub(crate) overlays: Overlays,
    /// Where what is left to chance comes from.
    noise: Option<u64>,
    /// Whether the unit's output is known: only the way back is wanted.
    repeats: bool,
}

/// Gradients that a loss op may add to while it runs forward, and the gradient of the loss it may assume.
pub(crate) struct Eager {
    pub(crate) grads: Grads,
    pub(crate) seed: f64,
}

impl Tape {
    /// A tape that records for a backward pass.
    pub fn training(cpu: &Cpu) -> Self {
        Self::new(cpu, Mode::Training)
    }

    fn new(cpu: &Cpu, mode: Mode) -> Self {
        Tape {
            cpu: cpu.clone(),
            mode,
            nodes: Vec::new(),
            eager: None,
            watch: None,
            adapters: true,
            overlays: Vec::new(),
            noise: None,
            repeats: false,
        }
    }

    /// As [`Tape::training`], for a pass whose output is known from a [`Tape::rehearsal`]: what only the output needs
    /// ([`Tape::linear_out`]) is not computed again.
    pub fn repeating(cpu: &Cpu) -> Self {
        Tape {
            repeats: true,
            ..Self::training(cpu)
        }
    }

    /// A tape for the unit that ends in the loss: its backward pass will start from `seed`, into `grads`, so a loss op may
    /// compute its gradient in the forward pass. [`Tape::finish`] hands the gradients back.
    pub fn training_eager(cpu: &Cpu, grads: Grads, seed: f64) -> Self {
        Tape {
            eager: Some(Eager { grads, seed }),
            ..Self::training(cpu)
        }
    }

    /// A tape that keeps nothing and computes as fast as it can: products with packed weights round their input.
    pub fn inference(cpu: &Cpu) -> Self {
        Self::new(cpu, Mode::Inference)
    }

    /// As [`Tape::inference`], telling `watch` the input of every [`Tape::linear`] and [`Tape::linears`].
    pub fn watched(cpu: &Cpu, watch: Watch) -> Self {
        Tape {
            watch: Some(watch),
            ..Self::inference(cpu)
        }
    }

    /// A tape that keeps nothing and computes the bits of a recording one: the first pass under activation checkpointing,
    /// layers in front of the first trained one, and what is compared with a training pass.
    pub fn rehearsal(cpu: &Cpu) -> Self {
        Self::new(cpu, Mode::Rehearsal)
    }

    /// Leaves adapters out: the model as it was before it got them.
    #[must_use]
    pub fn without_adapters(mut self) -> Self {
        self.adapters = false;
        self
    }

    /// Lets ops that leave something to chance (dropout) do so; `seed` decides what happens.
    #[must_use]
    pub fn with_noise(mut self, seed: u64) -> Self {
        self.noise = Some(seed);
        self
    }

    /// Whether adapters are applied.
    pub(crate) fn has_adapters(&self) -> bool {
        self.adapters
    }

    /// The seed of an op, on a tape with noise.
    pub(crate) fn noise(&self, slot: usize) -> Option<u64> {
        let mut seed = self.noise? ^ (slot as u64) << 32;
        Some(crate::rng::splitmix64(&mut seed))
    }

    /// Whether the numbers of the unit's output are left out.
    pub(crate) fn repeats(&self) -> bool {
        self.repeats
    }

    /// Whether packed products stand for themselves: no gradient is asked for, so their inputs may be rounded.
    pub(crate) fn rounds(&self) -> bool {
        matches!(self.mode, Mode::Inference)
    }

    /// Whether products with packed weights round inputs of a storage type to 8 bits: without a gradient, and where the type
    /// has rounded them to about as many already. What is trained in `f32` meets the numbers that the weights stand for.
    pub(crate) fn rounds_from(&self, dtype: DType) -> bool {
        self.rounds() || rounds_in_training(dtype)
    }

    /// The machine on which ops run.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Whether ops are recorded.
    pub fn is_recording(&self) -> bool {
        matches!(self.mode, Mode::Training)
    }

    /// The gradient from which the backward pass will start, where the tape was told; 1 elsewhere.
    pub fn seed(&self) -> f64 {
        self.eager.as_ref().map_or(1.0, |eager| eager.seed)
    }

    /// A value that gradients flow to: the input of the unit.
    pub fn input(&mut self, tensor: Tensor) -> Var {
        let node = self.is_recording().then(|| {
            self.nodes.push(None);
            self.nodes.len() - 1
        });
        Var {
            tensor,
            node,
            recipe: None,
        }
    }

    /// A value that no gradient flows to.
    pub fn constant(&self, tensor: Tensor) -> Var {
        Var {
            tensor,
            node: None,
            recipe: None,
        }
    }

    /// Makes the output of an op; `saved` is asked for the backward pass only when one will happen.
    ///
    /// `flows` says whether any input or weight takes a gradient.
    pub fn record<B: Backward + 'static>(
        &mut self,
        output: Tensor,
        flows: bool,
        saved: impl FnOnce() -> B,
    ) -> Var {
        let node = (self.is_recording() && flows).then(|| {
            self.nodes.push(Some(Box::new(saved())));
            self.nodes.len() - 1
        });
        Var {
            tensor: output,
            node,
            recipe: None,
        }
    }

    /// Tells how to compute a value again, so that ops which need it in their backward pass do not keep it.
    pub fn with_recipe<R: Recipe + 'static>(
        &self,
        mut value: Var,
        recipe: impl FnOnce() -> R,
    ) -> Var {
        if self.is_recording() {
            value.recipe = Some(Arc::new(recipe()));
        }
        value
    }

    /// Makes the output of an op that has no backward pass.
    ///
    /// # Panics
    /// When it would be recorded on the way of a gradient: gradients must not stop silently.
    #[track_caller]
    pub fn record_opaque(&mut self, op: &str, output: Tensor, inputs: &[&Var]) -> Var {
        assert!(
            !self.is_recording() || inputs.iter().all(|v| v.node.is_none()),
            "{op} has no backward pass and was recorded on the way of a gradient"
        );
        Var {
            tensor: output,
            node: None,
            recipe: None,
        }
    }

    /// Ends the forward pass: what remains is the way back from `output`, and the gradients of an eager tape.
    pub fn finish(self, output: &Var) -> (Recorded, Option<Grads>) {
        let recorded = Recorded {
            cpu: self.cpu,
            nodes: self.nodes,
            output: output.node,
        };
        (recorded, self.eager.map(|eager| eager.grads))
    }
}

/// [`Tape::rounds_from`], on a tape that is not for inference.
pub(crate) fn rounds_in_training(dtype: DType) -> bool {
    matches!(dtype, DType::Bf16 | DType::F16)
}

/// The way back through one unit.
pub struct Recorded {
    cpu: Cpu,
    nodes: Vec<Option<Box<dyn Backward>>>,
    output: Option<usize>,
}

impl Recorded {
    /// Runs the backward pass from the gradient `dy` of the output.
    ///
    /// `weights` are the ones of the forward pass, gathered again. Weight gradients are added to `grads`. Returns the
    /// gradient of the first [`Tape::input`], or `None` when nothing flowed there.
    pub fn backward(self, weights: &Weights, dy: Tensor, grads: &mut Grads) -> Option<Tensor> {
        let output = self.output?;
        let mut cx = Backprop {
            cpu: self.cpu,
            weights,
            grads,
            flowing: Vec::new(),
            again: None,
        };
        cx.flowing.resize_with(self.nodes.len(), || None);
        cx.flowing[output] = Some(dy);
        for (node, op) in self.nodes.into_iter().enumerate().rev() {
            if let Some(op) = op
                && let Some(dy) = cx.flowing[node].take()
            {
                // Whoever needs this node's value has had it.
                cx.again.take_if(|again| again.node == Some(node));
                op.backward(&mut cx, dy);
            }
        }
        cx.flowing.into_iter().next().flatten()
    }
}

/// The state of a running backward pass.
pub struct Backprop<'a> {
    cpu: Cpu,
    /// The unit's weights.
    pub weights: &'a Weights,
    /// The unit's gradients.
    pub grads: &'a mut Grads,
    flowing: Vec<Option<Tensor>>,
    /// The value computed again last: neighbors on the tape often share one.
    again: Option<Again>,
}

/// A value that was computed again.
struct Again {
    node: Option<usize>,
    recipe: Arc<dyn Recipe>,
    tensor: Tensor,
}

impl Backprop<'_> {
    /// The machine (a clone shares it).
    pub fn cpu(&self) -> Cpu {
        self.cpu.clone()
    }

    /// The value of an input that an op kept.
    pub fn value(&mut self, kept: &Kept) -> Tensor {
        let recipe = match &kept.value {
            Value::Tensor(tensor) => return tensor.clone(),
            Value::Recipe(recipe) => recipe,
        };
        match &self.again {
            Some(last) if Arc::ptr_eq(&last.recipe, recipe) => last.tensor.clone(),
            _ => {
                self.again = None;
                let tensor = recipe.value(&self.cpu, self.weights);
                self.again = Some(Again {
                    node: kept.node,
                    recipe: recipe.clone(),
                    tensor: tensor.clone(),
                });
                tensor
            }
        }
    }

    /// The buffer in which to put the gradient of the value at `node`, and whether it already holds a part of it to
    /// which the op must add. `None` when no gradient flows there. Give it back with [`Backprop::put`].
    pub fn take(
        &mut self,
        node: Option<usize>,
        shape: &Shape,
        dtype: DType,
    ) -> Option<(Tensor, bool)> {
        let node = node?;
        Some(match self.flowing[node].take() {
            Some(sum) if sum.is_unique() => (sum, true),
            Some(sum) => (sum.deep_clone(&self.cpu, Category::Activations), true),
            None => (
                Tensor::empty(&self.cpu, *shape, dtype, Category::Activations),
                false,
            ),
        })
    }

    /// Returns a buffer from [`Backprop::take`].
    pub fn put(&mut self, node: Option<usize>, dx: Tensor) {
        if let Some(node) = node {
            self.flowing[node] = Some(dx);
        }
    }

    /// Adds a whole gradient tensor to the value at `node`.
    pub fn add(&mut self, node: Option<usize>, dx: Tensor) {
        let Some(index) = node else { return };
        let sum = match self.flowing[index].take() {
            None => dx,
            Some(mut sum) => {
                if !sum.is_unique() {
                    sum = sum.deep_clone(&self.cpu, Category::Activations);
                }
                each_dtype!(sum.dtype(), E =>
                    elementwise::axpy(&self.cpu.pool, 1.0, dx.as_slice::<E>(), sum.as_mut_slice::<E>()));
                sum
            }
        };
        self.flowing[index] = Some(sum);
    }
}
