//! The owner's side: optimizer state, the update, and state on its way to and from checkpoints.

use super::disk::{Coming, Spot};
use super::slot::{Residence, Slot};
use super::{Stage, Store, Tier};
use crate::error::Result;
use half::bf16;
use std::collections::VecDeque;
use std::ops::Range;
use windlass_tensor::kernels::memory::{Buffer, Category};
use windlass_tensor::kernels::optim::{BLOCK, Grad, Moment, Storage, Values};
use windlass_tensor::{Cpu, DType, Grads, ParamId, ParamSpec, Tensor, Weight, each_dtype};

/// Elements of the smallest piece that is moved or converted: whole blocks of a disk in every type.
const PIECE: usize = 1 << 12;

/// What an array of optimizer state holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArrayKind {
    /// Low halves of `f32` masters whose high halves are the `bf16` weights, as 16-bit integers.
    Low,
    /// `f32` masters of `f16` weights.
    Master,
    /// A moment in `f32`.
    Moment,
    /// A moment in `bf16`.
    MomentBf16,
    /// A moment in blocks of 8-bit codes.
    Codes,
    /// The scale of each block of codes, in `f32`.
    Scales,
}

impl ArrayKind {
    /// Bytes of one element of the array.
    pub fn size(self) -> usize {
        match self {
            ArrayKind::Codes => 1,
            ArrayKind::Low | ArrayKind::MomentBf16 => 2,
            ArrayKind::Master | ArrayKind::Moment | ArrayKind::Scales => 4,
        }
    }

    /// The elements of the array for some elements of the parameter, which begin at a block.
    pub fn at(self, range: Range<usize>) -> Range<usize> {
        match self {
            ArrayKind::Scales => range.start / BLOCK..range.end.div_ceil(BLOCK),
            _ => range,
        }
    }

    /// The bytes of the array for some elements of the parameter, which begin at a block.
    pub(super) fn place(self, range: Range<usize>) -> Range<usize> {
        let at = self.at(range);
        at.start * self.size()..at.end * self.size()
    }

    /// Bytes of the array for `len` elements of the parameter.
    pub fn bytes(self, len: usize) -> usize {
        self.size() * self.at(0..len).len()
    }
}

/// What an optimizer keeps of each parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSpec {
    /// Moments.
    pub moments: usize,
    /// How they are stored.
    pub storage: Storage,
    /// Parameters of fewer elements keep `f32` moments where `storage` is in 8 bits.
    pub min_8bit_size: usize,
}

impl StateSpec {
    /// Moments in `f32`.
    pub fn f32(moments: usize) -> Self {
        StateSpec {
            moments,
            storage: Storage::F32,
            min_8bit_size: 0,
        }
    }

    /// The arrays of a parameter.
    fn arrays(&self, len: usize, dtype: Option<DType>) -> Vec<ArrayKind> {
        let moment: &[ArrayKind] = match self.storage {
            Storage::Q8 if len >= self.min_8bit_size => &[ArrayKind::Codes, ArrayKind::Scales],
            Storage::Bf16 => &[ArrayKind::MomentBf16],
            _ => &[ArrayKind::Moment],
        };
        let mut arrays = moment.repeat(self.moments);
        match dtype {
            Some(DType::Bf16) => arrays.push(ArrayKind::Low),
            Some(DType::F16) => arrays.push(ArrayKind::Master),
            _ => {}
        }
        arrays
    }
}

/// An array of optimizer state, an element for each value that a rank updates.
pub(super) struct Array {
    pub(super) kind: ArrayKind,
    pub(super) place: Place,
}

pub(super) enum Place {
    Memory(Buffer),
    Disk(Spot),
}

impl Array {
    fn zeros(cpu: &Cpu, kind: ArrayKind, len: usize) -> Self {
        let mut buffer = cpu.memory.alloc(kind.bytes(len), Category::Optimizer);
        if !buffer.is_fresh() && !cpu.pool.is_dry() {
            buffer.block_mut().fill(0);
        }
        let place = Place::Memory(buffer);
        Array { kind, place }
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
    pub grad: Option<Grad<'a>>,
    /// The optimizer's moments, each as long as the values.
    pub moments: Vec<Moment<'a>>,
    /// The parts of the parameter that each rank sums gradients of.
    pub shards: &'a [Range<usize>],
}

impl Store {
    /// Freezes the parameters that `trained` refuses, and gives the others zero moments and what their `f32` masters need
    /// beside `bf16` and `f16` weights; the masters start as the weights are. Where some are frozen, the pool of memory is
    /// [tight](windlass_tensor::kernels::memory::Memory::tighten) from then on.
    ///
    /// # Errors
    /// A disk that is full.
    pub fn train(&mut self, spec: StateSpec, trained: impl Fn(&ParamSpec) -> bool) -> Result<()> {
        let whole = self.placement.stage == Stage::Replicated;
        let swapped = self.placement.optimizer == Tier::Nvme;
        for unit in &mut self.units {
            for (param, slot) in unit.spec.params.iter().zip(&mut unit.slots) {
                slot.state.clear();
                slot.trained = trained(param) && slot.dtype().is_some();
                if !slot.trained {
                    // What adapters train has small gradients, which fit into no block that activations leave.
                    self.cpu.memory.tighten();
                    continue;
                }
                slot.owned = if whole {
                    0..param.shape.len()
                } else {
                    slot.shard().clone()
                };
                let len = slot.owned.len();
                let kinds = spec.arrays(param.shape.len(), slot.dtype());
                let rests = swapped && len >= self.placement.swap_from;
                for kind in kinds {
                    // Scales are few, and a part of them would not begin at a block of the disk.
                    let array = if rests && kind != ArrayKind::Scales {
                        let place = Place::Disk(self.disk.reserve(kind.bytes(len))?);
                        Array { kind, place }
                    } else {
                        Array::zeros(&self.cpu, kind, len)
                    };
                    slot.state.push(array);
                }
                if !rests {
                    continue;
                }
                slot.grad_spot = Some((self.disk.reserve(4 * len)?, None));
            }
            unit.local = Some(Grads::new(unit.slots.iter().map(|slot| slot.trained)));
        }
        if self.dtype() == DType::F16 && !self.cpu.pool.is_dry() {
            self.visit(&mut |shard| {
                if let Values::Half { low, master } = shard.values {
                    master
                        .iter_mut()
                        .zip(low)
                        .for_each(|(m, l)| *m = l.to_f32());
                }
            })?;
        }
        Ok(())
    }

    /// Updates what this rank owns: `each` sees every trained parameter's shard, in a fixed order and, of what rests on
    /// the disk, in pieces. Afterwards all ranks have the new weights where they keep them whole. Collective.
    ///
    /// # Errors
    /// A lost rank, a failing disk.
    pub fn update(&mut self, each: &mut dyn FnMut(Shard<'_>)) -> Result<()> {
        self.visit(each)?;
        if self.group.size() > 1 && self.placement.stage != Stage::Replicated {
            self.share_all(false)?;
        }
        Ok(())
    }

    /// Ends the reduction of a step's gradients: in stage 0 every rank gets the owners' sums. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn finish_gradients(&mut self) -> Result<()> {
        if self.group.size() > 1 && self.placement.stage == Stage::Replicated {
            self.share_all(true)?;
        }
        Ok(())
    }

    /// Shows what this rank owns, to be read or changed, as [`Store::update`] does, without telling other ranks.
    ///
    /// # Errors
    /// A failing disk.
    pub fn visit(&mut self, each: &mut dyn FnMut(Shard<'_>)) -> Result<()> {
        self.sweep(None, true, each)
    }

    /// As [`Store::visit`], of one parameter or all; changes to what rests on the disk last only if `write`.
    pub(super) fn sweep(
        &mut self,
        only: Option<ParamId>,
        write: bool,
        each: &mut dyn FnMut(Shard<'_>),
    ) -> Result<()> {
        self.ahead().clear();
        let mut lots = self.lots(only).into_iter();
        let mut coming: VecDeque<Lot> = VecDeque::new();
        loop {
            while coming.len() < self.placement.buffers.max(1)
                && let Some((id, range)) = lots.next()
            {
                coming.push_back(self.start_lot(id, range));
            }
            match coming.pop_front() {
                Some(lot) => self.finish_lot(lot, write, each)?,
                None => return self.disk.flush(),
            }
        }
    }

    /// What an optimizer sees at a time: parameters, or pieces of what rests on the disk. Ranges count from the first
    /// owned element.
    fn lots(&self, only: Option<ParamId>) -> Vec<(ParamId, Range<usize>)> {
        let mut lots = Vec::new();
        for (unit, held) in self.units.iter().enumerate() {
            for (index, slot) in held.slots.iter().enumerate() {
                let id = ParamId { unit, slot: index };
                let len = slot.owned.len();
                if !slot.trained || len == 0 || only.is_some_and(|only| only != id) {
                    continue;
                }
                let rests =
                    slot.grad_spot.is_some() || matches!(slot.residence, Residence::Disk(..));
                // Pieces of equal size, at multiples of what a disk moves at least.
                let most = if rests {
                    self.placement.sub_group.max(1)
                } else {
                    len
                };
                let step = len.div_ceil(len.div_ceil(most)).next_multiple_of(PIECE);
                lots.extend(
                    (0..len)
                        .step_by(step)
                        .map(|at| (id, at..len.min(at + step))),
                );
            }
        }
        lots
    }

    fn start_lot(&self, id: ParamId, range: Range<usize>) -> Lot {
        let slot = &self.units[id.unit].slots[id.slot];
        let read = |spot: &Spot, size: usize, category| {
            let buffer = self.cpu.memory.alloc(range.len() * size, category);
            self.disk.read(spot, range.start * size, buffer)
        };
        let array = |array: &Array| match &array.place {
            Place::Memory(_) => None,
            Place::Disk(spot) => Some(read(spot, array.kind.size(), Category::Workspace)),
        };
        Lot {
            arrays: slot.state.iter().map(array).collect(),
            weight: match &slot.residence {
                Residence::Disk(spot, dtype) => Some(read(spot, dtype.size(), Category::Workspace)),
                _ => None,
            },
            grad: match &slot.grad_spot {
                Some((spot, Some(_))) => Some(read(spot, 4, Category::Workspace)),
                _ => None,
            },
            id,
            range,
        }
    }

    /// Waits for a lot's buffers, shows it, and writes back what came from the disk.
    fn finish_lot(&mut self, lot: Lot, write: bool, each: &mut dyn FnMut(Shard<'_>)) -> Result<()> {
        let wait = |coming: Option<Coming>| coming.map(Coming::wait).transpose();
        let mut arrays = lot
            .arrays
            .into_iter()
            .map(wait)
            .collect::<Result<Vec<_>>>()?;
        let (mut weight, grad) = (wait(lot.weight)?, wait(lot.grad)?);
        let unit = &mut self.units[lot.id.unit];
        let slot = &mut unit.slots[lot.id.slot];
        let spec = &unit.spec.params[lot.id.slot];
        let dtype = slot.dtype().expect("a trained slot");
        let local = unit.local.as_ref();
        each(shard(
            (lot.id, spec, lot.range.clone()),
            slot,
            local,
            &mut arrays,
            weight.as_mut(),
            grad.as_ref(),
        ));
        if !write {
            return Ok(());
        }
        for (array, buffer) in slot.state.iter().zip(arrays) {
            if let (Place::Disk(spot), Some(buffer)) = (&array.place, buffer) {
                let at = lot.range.start * array.kind.size();
                self.disk.write(spot, at, buffer)?;
            }
        }
        if let (Residence::Disk(spot, _), Some(buffer)) = (&slot.residence, weight) {
            self.disk
                .write(spot, lot.range.start * dtype.size(), buffer)?;
        }
        Ok(())
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
                        Tensor::empty(&self.cpu, [0], tensor.dtype(), Category::Workspace),
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
                    _ => unreachable!("parts are not shared"),
                }
                shared?;
            }
        }
        Ok(())
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

/// A piece of a parameter on its way to the optimizer, with what comes from the disk.
struct Lot {
    id: ParamId,
    /// Counted from the first owned element.
    range: Range<usize>,
    arrays: Vec<Option<Coming>>,
    weight: Option<Coming>,
    grad: Option<Coming>,
}

/// The owner's view of a piece of a slot: from memory, or from the buffers that came from the disk.
fn shard<'a>(
    (id, spec, piece): (ParamId, &'a ParamSpec, Range<usize>),
    slot: &'a mut Slot,
    local: Option<&'a Grads>,
    arrays: &'a mut [Option<Buffer>],
    weight: Option<&'a mut Buffer>,
    grad: Option<&'a Buffer>,
) -> Shard<'a> {
    let (owned, alone) = (slot.owned.clone(), slot.ranks() == 1);
    let (mut rest, mut codes, mut moments) = (Rest::None, None, Vec::new());
    for (array, come) in slot.state.iter_mut().zip(arrays) {
        let (buffer, at) = match (&mut array.place, come) {
            (Place::Memory(buffer), _) => (buffer, piece.clone()),
            (Place::Disk(_), Some(buffer)) => (buffer, 0..piece.len()),
            (Place::Disk(_), None) => unreachable!("arrays on the disk are fetched"),
        };
        let at = array.kind.at(at);
        match array.kind {
            ArrayKind::Low => rest = Rest::Low(&mut buffer.as_i16_mut()[at]),
            ArrayKind::Master => rest = Rest::Master(&mut buffer.as_mut_slice::<f32>()[at]),
            ArrayKind::Moment => moments.push(Moment::F32(&mut buffer.as_mut_slice::<f32>()[at])),
            ArrayKind::MomentBf16 => {
                moments.push(Moment::Bf16(&mut buffer.as_mut_slice::<bf16>()[at]));
            }
            ArrayKind::Codes => codes = Some(&mut buffer.block_mut()[at]),
            ArrayKind::Scales => moments.push(Moment::Q8 {
                codes: codes.take().expect("codes before their scales"),
                scales: &mut buffer.as_mut_slice::<f32>()[at],
            }),
        }
    }
    let whole = owned.start + piece.start..owned.start + piece.end;
    let values = match (&mut slot.residence, weight) {
        (Residence::Whole(Weight::Dense(tensor)), _) => values_of(tensor, whole.clone(), rest),
        (Residence::Part(tensor), _) => values_of(tensor, piece.clone(), rest),
        (Residence::Disk(..), Some(buffer)) => match rest {
            Rest::Low(low) => Values::Split {
                high: buffer.as_mut_slice(),
                low,
            },
            Rest::Master(master) => Values::Half {
                low: buffer.as_mut_slice(),
                master,
            },
            Rest::None => Values::F32(buffer.as_mut_slice()),
        },
        _ => unreachable!("packed weights are not trained, weights on the disk are fetched"),
    };
    let summed = local.filter(|_| alone).and_then(|grads| grads.get(id.slot));
    let grad = match grad {
        Some(buffer) => Some(Grad::F32(buffer.as_slice())),
        None => kept(slot.grad.as_ref().or(summed), piece),
    };
    Shard {
        id,
        spec,
        range: whole,
        values,
        grad,
        moments,
        shards: &slot.shards,
    }
}

/// A piece of a sum of gradients, in the type in which it is kept.
fn kept(sum: Option<&Tensor>, piece: Range<usize>) -> Option<Grad<'_>> {
    sum.map(|sum| match sum.dtype() {
        DType::Bf16 => Grad::Bf16(&sum.as_slice()[piece]),
        DType::F16 => Grad::F16(&sum.as_slice()[piece]),
        _ => Grad::F32(&sum.as_slice()[piece]),
    })
}

/// What completes a weight to its master.
enum Rest<'a> {
    None,
    Low(&'a mut [i16]),
    Master(&'a mut [f32]),
}

fn values_of<'a>(tensor: &'a mut Tensor, at: Range<usize>, rest: Rest<'a>) -> Values<'a> {
    match rest {
        Rest::Low(low) => Values::Split {
            high: &mut tensor.as_mut_slice()[at],
            low,
        },
        Rest::Master(master) => Values::Half {
            low: &mut tensor.as_mut_slice()[at],
            master,
        },
        Rest::None => Values::F32(&mut tensor.as_mut_slice()[at]),
    }
}
