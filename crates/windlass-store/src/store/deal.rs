//! Weights that one process has read, dealt out to its ranks: frozen ones are shared or cut, trained ones become a rank's own.

use super::disk::{Disk, Spot};
use super::slot::{Residence, Slot, buckets};
use super::{Home, Keep, Store, Unit, partition, rest};
use crate::error::Result;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use windlass_tensor::kernels::memory::{Buffer, Category};
use windlass_tensor::kernels::packed::{Layout, PackedMatrix};
use windlass_tensor::{
    Cpu, Packed, ParamId, ParamSpec, Tensor, UnitSpec, Weight, Weights, each_dtype,
};

/// Weights that the ranks of a process take, a unit at a time, each once; the last one leaves nothing behind.
pub struct Deal {
    units: Vec<Mutex<Share>>,
}

struct Share {
    weights: Weights,
    /// Ranks that have not taken them.
    left: usize,
}

impl Deal {
    /// The weights of all units, for so many ranks of this process.
    pub fn new(units: Vec<Weights>, ranks: usize) -> Self {
        let share = |weights| {
            Mutex::new(Share {
                weights,
                left: ranks,
            })
        };
        Deal {
            units: units.into_iter().map(share).collect(),
        }
    }

    /// A rank's copy of a unit's weights, which shares their bytes with the others'.
    ///
    /// # Panics
    /// When all ranks have theirs.
    #[track_caller]
    pub fn take(&self, unit: usize) -> Weights {
        let mut share = self.units[unit]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            share.left > 0,
            "every rank takes the weights of a unit once"
        );
        share.left -= 1;
        match share.left {
            0 => std::mem::take(&mut share.weights),
            _ => share.weights.clone(),
        }
    }
}

impl Store {
    /// A rank's store of weights that are there already. What is trained becomes this rank's own, and is cut, where the
    /// placement partitions parameters, as in [`Store::build`]. What is frozen is shared with the other ranks of the
    /// process, or cut likewise, packed matrices by their bytes.
    ///
    /// # Errors
    /// A disk that is full.
    ///
    /// # Panics
    /// As [`Store::build`], and when weights and units do not match.
    #[track_caller]
    pub fn of(cpu: &Cpu, home: Home, units: &[UnitSpec], deal: &Deal) -> Result<Self> {
        assert_eq!(
            units.len(),
            deal.units.len(),
            "units against lists of weights"
        );
        let mut store = Self::bare(cpu, home);
        for (unit, spec) in units.iter().enumerate() {
            let weights = deal.take(unit).into_vec();
            let (given, params) = (weights.len(), spec.params.len());
            assert_eq!(params, given, "parameters of unit {}", spec.name);
            let mut slots = Vec::with_capacity(params);
            for (param, weight) in spec.params.iter().zip(weights) {
                slots.push(store.slot(param, weight)?);
            }
            store.units.push(Unit::new(spec, slots));
        }
        store.disk.flush()?;
        Ok(store)
    }

    #[track_caller]
    fn slot(&self, param: &ParamSpec, weight: Weight) -> Result<Slot> {
        assert_eq!(&param.shape, weight.shape(), "shape of {}", param.name);
        let (rank, ranks) = (self.group.rank(), self.group.size());
        let shards = partition(param.shape.len(), ranks);
        let residence = match (self.keep(&shards), weight) {
            (Keep::Whole, Weight::Dense(tensor)) if param.trained => {
                let own = match tensor.is_unique() {
                    true => tensor,
                    false => tensor.deep_clone(&self.cpu, Category::Weights),
                };
                Residence::Whole(own.into())
            }
            (Keep::Whole, weight) => Residence::Whole(weight),
            (Keep::Part, Weight::Dense(tensor)) => {
                Residence::Part(part(&self.cpu, &tensor, &shards[rank]))
            }
            (Keep::Disk, Weight::Dense(tensor)) => {
                rest(&self.disk, part(&self.cpu, &tensor, &shards[rank]))?
            }
            (Keep::Part, Weight::Packed(packed)) => {
                Residence::Packed(Cut::new(&self.cpu, &packed, (rank, ranks), None)?)
            }
            (Keep::Disk, Weight::Packed(packed)) => {
                let disk = Some(&self.disk);
                Residence::Packed(Cut::new(&self.cpu, &packed, (rank, ranks), disk)?)
            }
        };
        Ok(Slot::new(shards, rank, residence))
    }

    /// A packed matrix of which the ranks have the parts of `cut`.
    pub(super) fn gather_packed(&self, id: ParamId, cut: &Cut) -> Result<Weight> {
        let held = &self.units[id.unit];
        let (param, slot) = (&held.spec.params[id.slot], &held.slots[id.slot]);
        let fetched;
        let part = match &cut.place {
            Place::Memory(part) => part,
            Place::Disk(_) => {
                let coming = self.ahead().remove(&(id.unit, id.slot));
                fetched = coming.unwrap_or_else(|| self.start_fetch(slot)).wait()?;
                if cut.shards.len() == 1 {
                    return Ok(cut.matrix(param, fetched));
                }
                &fetched
            }
        };
        let bytes = cut.shards.last().map_or(0, |shard| shard.end);
        let mut whole = self.cpu.memory.alloc(bytes, Category::Workspace);
        let own = cut.shards[self.group.rank()].clone();
        if !self.cpu.pool.is_dry() {
            let part = &part.block()[..own.len()];
            whole.block_mut()[own].copy_from_slice(part);
        }
        let tag = format!("gather {}", param.name);
        let data = &mut whole.block_mut()[..bytes];
        for (run, parts) in buckets(&cut.shards, self.placement.bucket) {
            self.group.all_gather(&tag, &parts, &mut data[run])?;
        }
        Ok(cut.matrix(param, whole))
    }
}

/// Some elements of a tensor as a vector of their own.
fn part(cpu: &Cpu, tensor: &Tensor, range: &Range<usize>) -> Tensor {
    let mut out = Tensor::empty(cpu, [range.len()], tensor.dtype(), Category::Weights);
    if !cpu.pool.is_dry() {
        each_dtype!(tensor.dtype(), E =>
            out.as_mut_slice::<E>().copy_from_slice(&tensor.as_slice::<E>()[range.clone()]));
    }
    out
}

/// A packed matrix of which each rank has a part of the bytes.
pub(super) struct Cut {
    layout: Layout,
    order: Option<Arc<[u32]>>,
    /// The bytes of each rank.
    shards: Vec<Range<usize>>,
    place: Place,
}

/// Where this rank's bytes are.
enum Place {
    Memory(Buffer),
    Disk(Spot),
}

/// The bytes of a matrix.
struct Panels(Buffer);

impl AsRef<[u8]> for Panels {
    fn as_ref(&self) -> &[u8] {
        &self.0.block()[..self.0.bytes()]
    }
}

impl Cut {
    fn new(
        cpu: &Cpu,
        packed: &Packed,
        (rank, ranks): (usize, usize),
        disk: Option<&Disk>,
    ) -> Result<Self> {
        let bytes = packed.matrix().bytes();
        let shards = partition(bytes.len(), ranks);
        let own = shards[rank].clone();
        let mut part = cpu.memory.alloc(own.len(), Category::Weights);
        if !cpu.pool.is_dry() {
            part.block_mut()[..own.len()].copy_from_slice(&bytes[own.clone()]);
        }
        let place = match disk {
            None => Place::Memory(part),
            Some(disk) => {
                let spot = disk.reserve(own.len())?;
                disk.write(&spot, 0, part)?;
                Place::Disk(spot)
            }
        };
        Ok(Cut {
            layout: *packed.matrix().layout(),
            order: packed.order().cloned(),
            shards,
            place,
        })
    }

    /// Whether this rank's bytes are on the disk.
    pub(super) fn rests(&self) -> bool {
        matches!(self.place, Place::Disk(_))
    }

    /// Where on the disk a rank's bytes are, and how many.
    ///
    /// # Panics
    /// When they are in memory.
    #[track_caller]
    pub(super) fn spot(&self, rank: usize) -> (&Spot, usize) {
        match &self.place {
            Place::Disk(spot) => (spot, self.shards[rank].len()),
            Place::Memory(_) => panic!("a part that is in memory is not fetched"),
        }
    }

    /// The matrix of all bytes.
    fn matrix(&self, param: &ParamSpec, bytes: Buffer) -> Weight {
        let shape = [param.shape[0], param.shape[1]];
        let matrix = PackedMatrix::from_bytes(self.layout, shape, Arc::new(Panels(bytes)));
        let packed = Packed::from(matrix);
        Weight::Packed(match &self.order {
            Some(order) => packed.with_order(order.clone()),
            None => packed,
        })
    }
}
