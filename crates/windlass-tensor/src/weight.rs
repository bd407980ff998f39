//! Weights by representation, borrowed by slot; gradients by slot.

use crate::ops::Lora;
use crate::packed::Packed;
use crate::{Cpu, Shape, Tensor, each_dtype};
use std::ops::Range;
use std::sync::Arc;
use windlass_kernels::memory::Category;
use windlass_kernels::{DType, Element};

/// What the bytes of a parameter are. Where they live is not known here.
#[derive(Clone, Debug)]
pub enum Weight {
    /// Plain elements.
    Dense(Tensor),
    /// Blocks of integers with scales: read by matrix products and look-ups, never trained.
    Packed(Packed),
}

impl Weight {
    /// The shape.
    pub fn shape(&self) -> &Shape {
        match self {
            Weight::Dense(tensor) => tensor.shape(),
            Weight::Packed(packed) => packed.shape(),
        }
    }

    /// The plain elements.
    ///
    /// # Panics
    /// On a packed weight: the op has no packed form.
    #[track_caller]
    pub fn dense(&self) -> &Tensor {
        match self {
            Weight::Dense(tensor) => tensor,
            Weight::Packed(packed) => panic!(
                "this op needs plain elements and got a packed weight {}",
                packed.shape()
            ),
        }
    }
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Weight::Dense(tensor)
    }
}

/// The weights of one unit, in the order in which the unit declares its parameters.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    weights: Vec<Weight>,
    /// Adapters, each with the slot of the weight that it adapts.
    adapters: Arc<[(usize, Lora)]>,
}

/// One weight of a unit: its slot, which the tape records, and its bytes, which the tape does not keep.
#[derive(Clone, Copy)]
pub struct Param<'w> {
    /// Position among the parameters of the unit.
    pub slot: usize,
    /// The weight itself.
    pub weight: &'w Weight,
    /// Its adapter, and the weights of the unit, among which are the adapter's.
    pub lora: Option<(&'w Lora, &'w Weights)>,
}

impl Weights {
    /// Weights in declaration order.
    pub fn new(weights: Vec<Weight>) -> Self {
        Weights {
            weights,
            adapters: Arc::default(),
        }
    }

    /// Gives weights adapters, each with the slot of the weight that it adapts.
    #[must_use]
    pub fn with_adapters(self, adapters: &Arc<[(usize, Lora)]>) -> Self {
        Weights {
            adapters: adapters.clone(),
            ..self
        }
    }

    /// The weight in `slot`.
    #[track_caller]
    pub fn at(&self, slot: usize) -> Param<'_> {
        assert!(
            slot < self.weights.len(),
            "slot {slot} against {} parameters of the unit",
            self.weights.len()
        );
        let adapter = self.adapters.iter().find(|(adapted, _)| *adapted == slot);
        Param {
            slot,
            weight: &self.weights[slot],
            lora: adapter.map(|(_, lora)| (lora, self)),
        }
    }

    /// The weights.
    pub fn iter(&self) -> std::slice::Iter<'_, Weight> {
        self.weights.iter()
    }

    /// The weights, to be written.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, Weight> {
        self.weights.iter_mut()
    }

    /// The weights themselves.
    pub fn into_vec(self) -> Vec<Weight> {
        self.weights
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Whether there are no weights.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty()
    }
}

/// The gradients of one unit's parameters, summed in the accumulator type; absent until something is added.
#[derive(Debug, Default)]
pub struct Grads(Vec<Grad>);

#[derive(Debug)]
enum Grad {
    Frozen,
    Zero,
    Sum(Tensor),
}

impl Grads {
    /// Zero gradients; `trained[slot]` says whether the slot takes any.
    pub fn new(trained: impl IntoIterator<Item = bool>) -> Self {
        Grads(
            trained
                .into_iter()
                .map(|t| if t { Grad::Zero } else { Grad::Frozen })
                .collect(),
        )
    }

    /// Whether the slot takes a gradient.
    pub fn wants(&self, slot: usize) -> bool {
        !matches!(self.0[slot], Grad::Frozen)
    }

    /// The running sum of a slot, made of zeros on first use.
    ///
    /// # Panics
    /// When the slot is frozen.
    #[track_caller]
    pub fn sum<A: Element>(&mut self, cpu: &Cpu, slot: usize, shape: &Shape) -> &mut [A] {
        let grad = &mut self.0[slot];
        if matches!(grad, Grad::Zero) {
            *grad = Grad::Sum(Tensor::zeros(cpu, *shape, A::DTYPE, Category::Gradients));
        }
        match grad {
            Grad::Sum(tensor) => tensor.as_mut_slice::<A>(),
            _ => panic!("slot {slot} takes no gradient"),
        }
    }

    /// The gradient of a slot, if anything was added.
    pub fn get(&self, slot: usize) -> Option<&Tensor> {
        match self.0.get(slot) {
            Some(Grad::Sum(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// Takes the gradient of a slot out, if anything was added; the slot is zero again.
    pub fn take(&mut self, slot: usize) -> Option<Tensor> {
        match std::mem::replace(self.0.get_mut(slot)?, Grad::Zero) {
            Grad::Sum(tensor) => Some(tensor),
            other => {
                self.0[slot] = other;
                None
            }
        }
    }

    /// Sets every trained gradient to zero, giving its memory back.
    pub fn clear(&mut self) {
        for grad in &mut self.0 {
            if matches!(grad, Grad::Sum(_)) {
                *grad = Grad::Zero;
            }
        }
    }

    /// Number of slots.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no slots.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// How a parameter is filled before training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
    /// Normal around zero with the given standard deviation.
    Normal(f32),
    /// Even between the negative of a bound and the bound.
    Uniform(f32),
}

/// A parameter as a unit declares it: nothing is allocated.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name within the whole model.
    pub name: String,
    /// Shape.
    pub shape: Shape,
    /// Filling before training.
    pub init: Init,
    /// Whether decoupled weight decay applies (not to biases and norm weights).
    pub decay: bool,
    /// Whether it is trained.
    pub trained: bool,
}

impl ParamSpec {
    /// A matrix or vector with normal filling and weight decay.
    pub fn normal(name: impl Into<String>, shape: impl Into<Shape>, std: f32) -> Self {
        ParamSpec {
            name: name.into(),
            shape: shape.into(),
            init: Init::Normal(std),
            decay: true,
            trained: true,
        }
    }

    /// A bias or norm weight: filled with a constant, not decayed.
    pub fn constant(name: impl Into<String>, shape: impl Into<Shape>, init: Init) -> Self {
        ParamSpec {
            name: name.into(),
            shape: shape.into(),
            init,
            decay: false,
            trained: true,
        }
    }

    /// A tensor filled as declared, from a stream of its own: the name and `seed` decide the values, nothing else does.
    pub fn fill(&self, cpu: &Cpu, seed: u64, dtype: DType) -> Tensor {
        self.fill_range(cpu, seed, dtype, 0..self.shape.len())
            .reshape(self.shape)
    }

    /// The elements `range` of [`ParamSpec::fill`], as a vector, without making the others.
    ///
    /// # Panics
    /// When the range is not within the parameter.
    #[track_caller]
    pub fn fill_range(&self, cpu: &Cpu, seed: u64, dtype: DType, range: Range<usize>) -> Tensor {
        assert!(
            range.end <= self.shape.len(),
            "elements {range:?} of {} {}",
            self.name,
            self.shape
        );
        let mut tensor = Tensor::empty(cpu, [range.len()], dtype, Category::Weights);
        each_dtype!(dtype, E => {
            let out = tensor.as_mut_slice::<E>();
            match self.init {
                Init::Zeros => windlass_kernels::elementwise::fill(&cpu.pool, E::from_f64(0.0), out),
                Init::Ones => windlass_kernels::elementwise::fill(&cpu.pool, E::from_f64(1.0), out),
                Init::Normal(_) | Init::Uniform(_) if cpu.pool.is_dry() => {}
                Init::Normal(std) => {
                    let draw = |rng: &mut crate::Rng| rng.normal() * f64::from(std);
                    fill_random(cpu.pool.threads(), seed ^ fnv1a(&self.name), draw, range.start, out)
                }
                Init::Uniform(bound) => {
                    let draw = |rng: &mut crate::Rng| (2.0 * rng.uniform_f64() - 1.0) * f64::from(bound);
                    fill_random(cpu.pool.threads(), seed ^ fnv1a(&self.name), draw, range.start, out)
                }
            }
        });
        tensor
    }
}

/// Random values from element `start` on, a stream for each block of fixed size, so that the values depend neither on
/// the number of threads nor on which part is made.
fn fill_random<E: Element>(
    threads: usize,
    seed: u64,
    draw: impl Fn(&mut crate::Rng) -> f64 + Copy + Send,
    start: usize,
    out: &mut [E],
) {
    const BLOCK: usize = 1 << 14;
    let fill = move |first: usize, mut values: &mut [E]| {
        let mut at = first;
        while !values.is_empty() {
            let (block, skip) = (at / BLOCK, at % BLOCK);
            let count = (BLOCK - skip).min(values.len());
            let mut rng = crate::Rng::stream(seed, block as u64);
            (0..skip).for_each(|_| _ = draw(&mut rng));
            let (part, rest) = values.split_at_mut(count);
            part.iter_mut()
                .for_each(|v| *v = E::from_f64(draw(&mut rng)));
            values = rest;
            at += count;
        }
    };
    let share = out.len().div_ceil(threads.max(1)).next_multiple_of(BLOCK);
    if out.len() <= BLOCK {
        return fill(start, out);
    }
    std::thread::scope(|scope| {
        for (part, values) in out.chunks_mut(share).enumerate() {
            scope.spawn(move || fill(start + part * share, values));
        }
    });
}

/// The 64-bit FNV-1a hash, which gives each name its own random stream.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
