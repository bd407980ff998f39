//! Where parameters live while a program runs, behind four verbs.
//!
//! `prefetch` and `gather` serve the forward and backward passes, `reduce` takes gradients, `update` hands the owner its
//! shards. This store keeps everything whole in memory; the borrow checker sees to it that nobody updates what is being
//! computed with: a [`Gathered`] borrows the store, `reduce` and `update` need it alone.

use half::bf16;
use windlass_tensor::kernels::memory::{Buffer, Category};
use windlass_tensor::kernels::split;
use windlass_tensor::{Cpu, DType, Grads, ParamId, ParamSpec, Tensor, UnitSpec, Weight, Weights};

/// The parameters of a model with, for training, their gradients and optimizer state.
pub struct Store {
    cpu: Cpu,
    units: Vec<Unit>,
}

struct Unit {
    spec: UnitSpec,
    weights: Weights,
    trained: Vec<bool>,
    /// `None` while lent to a backward pass.
    grads: Option<Grads>,
    state: Vec<State>,
}

/// The optimizer's part of one parameter.
#[derive(Default)]
struct State {
    /// Low halves of `f32` masters whose high halves are the `bf16` weights.
    low: Option<Buffer>,
    moments: Vec<Tensor>,
}

/// A unit's full weights; they stay as they are until the guard drops.
pub struct Gathered<'a>(&'a Weights);

impl std::ops::Deref for Gathered<'_> {
    type Target = Weights;
    fn deref(&self) -> &Weights {
        self.0
    }
}

/// The values that an optimizer updates.
pub enum Values<'a> {
    /// Parameters in `f32`: the weights themselves.
    F32(&'a mut [f32]),
    /// Parameters in `bf16` with `f32` masters: `high` is the master rounded (half up), `low` what is missing, so
    /// that both together are the master to the bit, in four bytes instead of six.
    Split {
        /// The weights that forward passes read.
        high: &'a mut [bf16],
        /// `master bits = (high bits << 16) + low`.
        low: &'a mut [i16],
    },
}

impl Values<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Split { high, .. } => high.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies the master values of `range` out, exactly.
    pub fn master(&self, range: std::ops::Range<usize>) -> Vec<f32> {
        match self {
            Values::F32(values) => values[range].to_vec(),
            Values::Split { high, low } => high[range.clone()]
                .iter()
                .zip(&low[range])
                .map(|(&h, &l)| split::join(h, l))
                .collect(),
        }
    }

    /// Sets the values from `start` on from masters.
    pub fn set_master(&mut self, start: usize, masters: &[f32]) {
        match self {
            Values::F32(values) => values[start..start + masters.len()].copy_from_slice(masters),
            Values::Split { high, low } => {
                for (i, &master) in masters.iter().enumerate() {
                    (high[start + i], low[start + i]) = split::split(master);
                }
            }
        }
    }
}

/// What the owner of a parameter sees at update time.
pub struct Shard<'a> {
    /// Which parameter.
    pub id: ParamId,
    /// Its declaration.
    pub spec: &'a ParamSpec,
    /// Its values.
    pub values: Values<'a>,
    /// The mean gradient, `None` when nothing was reduced since the last clearing.
    pub grad: Option<&'a [f32]>,
    /// The optimizer's moments, each as long as the values.
    pub moments: Vec<&'a mut [f32]>,
}

impl Store {
    /// A store of the given weights, without optimizer state.
    ///
    /// # Panics
    /// When weights and units do not match in number or shape.
    #[track_caller]
    pub fn new(cpu: &Cpu, units: &[UnitSpec], weights: Vec<Weights>) -> Self {
        assert_eq!(units.len(), weights.len(), "units against lists of weights");
        let units = units.iter().zip(weights).map(|(spec, weights)| {
            assert_eq!(
                spec.params.len(),
                weights.len(),
                "parameters of unit {}",
                spec.name
            );
            for (param, weight) in spec.params.iter().zip(weights.iter()) {
                assert_eq!(&param.shape, weight.shape(), "shape of {}", param.name);
            }
            let trained: Vec<bool> = weights
                .iter()
                .map(|w| matches!(w, Weight::Dense(_)))
                .collect();
            let grads = Some(Grads::new(trained.iter().copied()));
            Unit {
                spec: spec.clone(),
                weights,
                trained,
                grads,
                state: Vec::new(),
            }
        });
        Store {
            cpu: cpu.clone(),
            units: units.collect(),
        }
    }

    /// A store of freshly filled weights, rounded to `dtype`.
    pub fn init(cpu: &Cpu, units: &[UnitSpec], dtype: DType, seed: u64) -> Self {
        let fill = |unit: &UnitSpec| {
            unit.params
                .iter()
                .map(|p| p.fill(cpu, seed, dtype).into())
                .collect()
        };
        Self::new(
            cpu,
            units,
            units.iter().map(|u| Weights::new(fill(u))).collect(),
        )
    }

    /// Freezes the parameters that `trained` refuses, and gives the others `moments` zero moments and, in `bf16`, the low
    /// halves of their masters (zero: the masters start as the weights are).
    pub fn train(&mut self, moments: usize, trained: impl Fn(&ParamSpec) -> bool) {
        let cpu = self.cpu.clone();
        for unit in &mut self.units {
            unit.state.clear();
            for (slot, (param, weight)) in
                unit.spec.params.iter().zip(unit.weights.iter()).enumerate()
            {
                unit.trained[slot] = trained(param) && matches!(weight, Weight::Dense(_));
                let mut state = State::default();
                if let Weight::Dense(tensor) = weight
                    && unit.trained[slot]
                {
                    let zeros =
                        || Tensor::zeros(&cpu, param.shape, DType::F32, Category::Optimizer);
                    state.moments = (0..moments).map(|_| zeros()).collect();
                    if tensor.dtype() == DType::Bf16 {
                        state.low = Some(zero_halves(&cpu, tensor.len()));
                    }
                }
                unit.state.push(state);
            }
            unit.grads = Some(Grads::new(unit.trained.iter().copied()));
        }
    }

    /// The units.
    pub fn units(&self) -> impl ExactSizeIterator<Item = &UnitSpec> {
        self.units.iter().map(|unit| &unit.spec)
    }

    /// The machine.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Hint: the unit's weights will be gathered soon. Never blocks. Everything is in memory here: nothing to do.
    pub fn prefetch(&self, _unit: usize) {}

    /// The unit's full weights, until the guard drops.
    pub fn gather(&self, unit: usize) -> Gathered<'_> {
        Gathered(&self.units[unit].weights)
    }

    /// Lends the unit's gradient sums to a backward pass; [`Store::reduce`] takes them back.
    ///
    /// # Panics
    /// When they are lent already.
    #[track_caller]
    pub fn grads(&mut self, unit: usize) -> Grads {
        self.units[unit]
            .grads
            .take()
            .expect("gradients of a unit are lent once at a time")
    }

    /// Takes a unit's gradient sums: keeps what this rank owns of their mean (everything, here).
    pub fn reduce(&mut self, unit: usize, grads: Grads) {
        self.units[unit].grads = Some(grads);
    }

    /// The owner's view of every trained parameter, for the optimizer, checkpoints and norms.
    pub fn update(&mut self) -> impl Iterator<Item = Shard<'_>> {
        self.units
            .iter_mut()
            .enumerate()
            .flat_map(|(unit, state)| state.shards(unit))
    }

    /// Sets all gradients to zero, giving their memory back.
    pub fn clear_grads(&mut self) {
        for unit in &mut self.units {
            if let Some(grads) = &mut unit.grads {
                grads.clear();
            }
        }
    }

    /// The gradient sums of every trained parameter that received any.
    pub fn gradients(&self) -> impl Iterator<Item = (ParamId, &Tensor)> {
        self.units.iter().enumerate().flat_map(|(unit, u)| {
            let grads = u.grads.as_ref();
            (0..u.spec.params.len()).filter_map(move |slot| {
                grads?
                    .get(slot)
                    .map(|tensor| (ParamId { unit, slot }, tensor))
            })
        })
    }
}

impl Unit {
    fn shards(&mut self, unit: usize) -> impl Iterator<Item = Shard<'_>> {
        let Unit {
            spec,
            weights,
            trained,
            grads,
            state,
        } = self;
        let grads = grads.as_ref();
        let parts = spec
            .params
            .iter()
            .zip(weights.iter_mut())
            .zip(state.iter_mut())
            .enumerate();
        parts.filter(|(slot, _)| trained[*slot]).filter_map(
            move |(slot, ((spec, weight), state))| {
                let Weight::Dense(tensor) = weight else {
                    return None;
                };
                let values = match &mut state.low {
                    Some(low) => Values::Split {
                        high: tensor.as_mut_slice(),
                        low: low.as_i16_mut(),
                    },
                    None => Values::F32(tensor.as_mut_slice()),
                };
                let grad = grads.and_then(|g| g.get(slot)).map(|g| g.as_slice::<f32>());
                let moments = state
                    .moments
                    .iter_mut()
                    .map(|m| m.as_mut_slice::<f32>())
                    .collect();
                Some(Shard {
                    id: ParamId { unit, slot },
                    spec,
                    values,
                    grad,
                    moments,
                })
            },
        )
    }
}

fn zero_halves(cpu: &Cpu, len: usize) -> Buffer {
    let mut low = cpu.memory.alloc(2 * len, Category::Optimizer);
    if !cpu.pool.is_dry() {
        low.as_i16_mut().fill(0);
    }
    low
}
