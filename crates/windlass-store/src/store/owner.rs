//! The owner's side: optimizer state, the update, and state on its way to and from checkpoints.

use super::slot::{Residence, Slot};
use super::{Stage, Store, Unit};
use crate::error::Result;
use half::bf16;
use std::ops::Range;
use windlass_tensor::kernels::memory::{Buffer, Category};
use windlass_tensor::kernels::split;
use windlass_tensor::{Cpu, DType, Grads, ParamId, ParamSpec, Weight, each_dtype};

/// What an array of optimizer state holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArrayKind {
    /// Low halves of `f32` masters whose high halves are the `bf16` weights, as 16-bit integers.
    Low,
    /// A moment in `f32`.
    Moment,
}

impl ArrayKind {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            ArrayKind::Low => 2,
            ArrayKind::Moment => 4,
        }
    }
}

/// An array of optimizer state, an element for each value that a rank updates.
pub struct Array {
    kind: ArrayKind,
    buffer: Buffer,
}

impl Array {
    fn zeros(cpu: &Cpu, kind: ArrayKind, len: usize) -> Self {
        let mut buffer = cpu.memory.alloc(kind.size() * len, Category::Optimizer);
        if !buffer.is_fresh() && !cpu.pool.is_dry() {
            buffer.as_i16_mut().fill(0);
        }
        Array { kind, buffer }
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
    pub fn master(&self, range: Range<usize>) -> Vec<f32> {
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

/// What the owner of some elements of a parameter sees at update time.
pub struct Shard<'a> {
    /// Which parameter.
    pub id: ParamId,
    /// Its declaration.
    pub spec: &'a ParamSpec,
    /// Which of its elements.
    pub range: Range<usize>,
    /// Their values.
    pub values: Values<'a>,
    /// The gradient, summed over all ranks; `None` when nothing was reduced since the last clearing.
    pub grad: Option<&'a [f32]>,
    /// The optimizer's moments, each as long as the values.
    pub moments: Vec<&'a mut [f32]>,
}

/// An array of a rank's optimizer state, as checkpoints know it.
#[derive(Clone, Debug, PartialEq)]
pub struct StateEntry {
    /// Which parameter.
    pub id: ParamId,
    /// Which of its arrays.
    pub array: usize,
    /// Name among all arrays of all parameters.
    pub name: String,
    /// What it holds.
    pub kind: ArrayKind,
    /// The elements of the parameter that this rank answers for.
    pub range: Range<usize>,
}

impl Store {
    /// Freezes the parameters that `trained` refuses, and gives the others `moments` zero moments and, in `bf16`, the
    /// low halves of their masters (zero: the masters start as the weights are).
    pub fn train(&mut self, moments: usize, trained: impl Fn(&ParamSpec) -> bool) {
        let whole = self.placement.stage == Stage::Replicated;
        for unit in &mut self.units {
            for (param, slot) in unit.spec.params.iter().zip(&mut unit.slots) {
                slot.state.clear();
                slot.trained = trained(param) && slot.dtype().is_some();
                if !slot.trained {
                    continue;
                }
                slot.owned = if whole {
                    0..param.shape.len()
                } else {
                    slot.shard().clone()
                };
                let low = slot.dtype() == Some(DType::Bf16);
                let kinds = std::iter::repeat_n(ArrayKind::Moment, moments)
                    .chain(low.then_some(ArrayKind::Low));
                slot.state = kinds
                    .map(|kind| Array::zeros(&self.cpu, kind, slot.owned.len()))
                    .collect();
            }
            unit.local = Some(Grads::new(unit.slots.iter().map(|slot| slot.trained)));
        }
    }

    /// Updates what this rank owns: `each` sees every trained parameter's shard, in a fixed order. Afterwards all ranks
    /// have the new weights where they keep them whole. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn update(&mut self, each: &mut dyn FnMut(Shard<'_>)) -> Result<()> {
        let ranks = self.group.size();
        if ranks > 1 && self.placement.stage == Stage::Replicated {
            self.share_all(true)?;
        }
        self.visit(each);
        if ranks > 1 && self.placement.stage != Stage::Replicated {
            self.share_all(false)?;
        }
        Ok(())
    }

    /// Shows what this rank owns, as [`Store::update`] does, without telling other ranks.
    pub fn visit(&mut self, each: &mut dyn FnMut(Shard<'_>)) {
        for (unit, state) in self.units.iter_mut().enumerate() {
            let Unit { spec, slots, local } = state;
            for (index, (param, slot)) in spec.params.iter().zip(slots).enumerate() {
                if slot.trained && !slot.owned.is_empty() {
                    let id = ParamId { unit, slot: index };
                    each(shard(id, param, slot, local.as_ref()));
                }
            }
        }
    }

    /// Gives all ranks the owners' gradients, or the owners' weights where they are kept whole.
    fn share_all(&mut self, gradients: bool) -> Result<()> {
        for unit in 0..self.units.len() {
            for index in 0..self.units[unit].slots.len() {
                let slot = &mut self.units[unit].slots[index];
                if !slot.trained {
                    continue;
                }
                // Taken out for the time of the collective, which reads the slot's parts.
                let taken = match (gradients, &mut slot.residence) {
                    (true, _) => slot.grad.take(),
                    (false, Residence::Whole(Weight::Dense(tensor))) => Some(std::mem::replace(
                        tensor,
                        windlass_tensor::Tensor::empty(
                            &self.cpu,
                            [0],
                            tensor.dtype(),
                            Category::Workspace,
                        ),
                    )),
                    _ => None,
                };
                let Some(mut tensor) = taken else { continue };
                let name = &self.units[unit].spec.params[index].name;
                let what = if gradients { "gradient of" } else { "update" };
                let tag = format!("{what} {name}");
                let shared = each_dtype!(tensor.dtype(), E =>
                    self.share(&tag, &self.units[unit].slots[index], tensor.as_mut_slice::<E>()));
                let slot = &mut self.units[unit].slots[index];
                match &mut slot.residence {
                    _ if gradients => slot.grad = Some(tensor),
                    Residence::Whole(weight) => *weight = Weight::Dense(tensor),
                    Residence::Part(_) => unreachable!("parts are not shared"),
                }
                shared?;
            }
        }
        Ok(())
    }

    /// The arrays of optimizer state of this rank; over all ranks each element is answered for once.
    pub fn state(&self) -> Vec<StateEntry> {
        let mut entries = Vec::new();
        for (unit, held) in self.units.iter().enumerate() {
            for (index, (param, slot)) in held.spec.params.iter().zip(&held.slots).enumerate() {
                for (array, state) in slot.state.iter().enumerate() {
                    let suffix = match state.kind {
                        ArrayKind::Low => "low".to_string(),
                        ArrayKind::Moment => format!("moment.{array}"),
                    };
                    entries.push(StateEntry {
                        id: ParamId { unit, slot: index },
                        array,
                        name: format!("{}.{suffix}", param.name),
                        kind: state.kind,
                        range: slot.shard().clone(),
                    });
                }
            }
        }
        entries
    }

    /// The little-endian bytes of an entry's elements, in pieces.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn read_state(
        &self,
        entry: &StateEntry,
        out: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let slot = &self.units[entry.id.unit].slots[entry.id.slot];
        let state = &slot.state[entry.array];
        let range = entry.range.start - slot.owned.start..entry.range.end - slot.owned.start;
        const PIECE: usize = 1 << 15;
        match state.kind {
            ArrayKind::Low => state.buffer.as_i16()[range]
                .chunks(PIECE)
                .try_for_each(|piece| out(&bytes_of(piece, |v| v.to_le_bytes()))),
            ArrayKind::Moment => state.buffer.as_slice::<f32>()[range]
                .chunks(PIECE)
                .try_for_each(|piece| out(&bytes_of(piece, |v| v.to_le_bytes()))),
        }
    }

    /// Sets elements of an entry's array: `bytes` are those of the parameter's elements from `start` on, of which this
    /// rank takes what it owns.
    pub fn write_state(&mut self, entry: &StateEntry, start: usize, bytes: &[u8]) {
        let slot = &mut self.units[entry.id.unit].slots[entry.id.slot];
        let state = &mut slot.state[entry.array];
        let size = state.kind.size();
        let end = start + bytes.len() / size;
        let (from, to) = (slot.owned.start.max(start), slot.owned.end.min(end));
        if from >= to {
            return;
        }
        let bytes = &bytes[(from - start) * size..(to - start) * size];
        let at = from - slot.owned.start..to - slot.owned.start;
        match state.kind {
            ArrayKind::Low => {
                let out = &mut state.buffer.as_i16_mut()[at];
                for (v, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *v = i16::from_le_bytes([b[0], b[1]]);
                }
            }
            ArrayKind::Moment => {
                let out = &mut state.buffer.as_mut_slice::<f32>()[at];
                for (v, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
    }

    /// The elements of a parameter that this rank updates; empty when it is frozen.
    pub fn owned(&self, id: ParamId) -> Range<usize> {
        let slot = &self.units[id.unit].slots[id.slot];
        if slot.trained {
            slot.owned.clone()
        } else {
            0..0
        }
    }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| bytes(v)).collect()
}

/// The owner's view of a slot.
fn shard<'a>(
    id: ParamId,
    spec: &'a ParamSpec,
    slot: &'a mut Slot,
    local: Option<&'a Grads>,
) -> Shard<'a> {
    let (range, alone) = (slot.owned.clone(), slot.ranks() == 1);
    let (tensor, at) = match &mut slot.residence {
        Residence::Whole(Weight::Dense(tensor)) => (tensor, range.clone()),
        Residence::Part(tensor) => (tensor, 0..range.len()),
        Residence::Whole(Weight::Packed(_)) => unreachable!("packed weights are not trained"),
    };
    let (mut low, mut moments) = (None, Vec::new());
    for array in &mut slot.state {
        match array.kind {
            ArrayKind::Low => low = Some(array.buffer.as_i16_mut()),
            ArrayKind::Moment => moments.push(array.buffer.as_mut_slice::<f32>()),
        }
    }
    let values = match low {
        Some(low) => Values::Split {
            high: &mut tensor.as_mut_slice()[at],
            low,
        },
        None => Values::F32(&mut tensor.as_mut_slice()[at]),
    };
    let grad = if alone {
        local.and_then(|grads| grads.get(id.slot))
    } else {
        slot.grad.as_ref()
    };
    Shard {
        id,
        spec,
        range,
        values,
        grad: grad.map(|g| g.as_slice::<f32>()),
        moments,
    }
}
