//! Where parameters live while a program runs, behind four verbs.
//!
//! `prefetch` and `gather` serve the forward and backward passes, `reduce` takes gradients, `update` hands the owner its
//! shards. What is partitioned over the ranks of a group is a [`Placement`]; nothing outside this module knows. The
//! borrow checker sees to it that nobody updates what is being computed with: a [`Gathered`] borrows the store, `reduce`
//! and `update` need it alone.
//!
//! Sums over ranks are taken in rank order and a parameter is cut into the same parts in every stage, so the bits of a
//! run do not depend on the placement.

mod deal;
mod disk;
mod owner;
mod placement;
mod shelf;
mod slot;
mod state;
mod whole;

pub use deal::Deal;
pub use owner::{ArrayKind, Shard, StateSpec};
pub use placement::{Placement, Stage, Tier, Wire, partition};
pub use shelf::Shelved;

pub use state::StateEntry;

use crate::error::Result;
use crate::swap::{IoStats, SwapFile};
use disk::{Coming, Disk};
use shelf::Shelf;
use slot::{Residence, Slot};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use windlass_comm::Group;
use windlass_tensor::{Cpu, DType, Grads, ParamId, ParamSpec, Tensor, UnitSpec, Weight, Weights};

/// The parameters of a model with, for training, their gradients and optimizer state.
pub struct Store {
    cpu: Cpu,
    group: Group,
    placement: Placement,
    units: Vec<Unit>,
    /// Whether gradients stay on this rank for now.
    deferred: bool,
    disk: Disk,
    /// Shards on their way from the disk, by unit and slot.
    ahead: Mutex<BTreeMap<(usize, usize), Coming>>,
    /// Values that rest on the disk between passes.
    shelf: Arc<Shelf>,
}

/// Where a store lives: its rank, what is partitioned, and the disk for what rests there.
pub struct Home {
    /// The rank.
    pub group: Group,
    /// What is partitioned, and where it rests.
    pub placement: Placement,
    /// The disk; needed where a [`Tier`] is [`Tier::Nvme`], except on a machine that computes nothing.
    pub swap: Option<SwapFile>,
}

impl Home {
    /// One rank that keeps everything in memory.
    pub fn alone() -> Self {
        Self::on(Group::solo(), Placement::default())
    }

    /// A rank without a disk.
    pub fn on(group: Group, placement: Placement) -> Self {
        Home {
            group,
            placement,
            swap: None,
        }
    }
}

struct Unit {
    spec: UnitSpec,
    slots: Vec<Slot>,
    /// This rank's gradient sums; `None` while lent to a backward pass.
    local: Option<Grads>,
}

/// A unit's full weights; they stay as they are until the guard drops.
pub struct Gathered<'a> {
    weights: Weights,
    /// The store is not updated meanwhile.
    _store: PhantomData<&'a Store>,
}

impl std::ops::Deref for Gathered<'_> {
    type Target = Weights;
    fn deref(&self) -> &Weights {
        &self.weights
    }
}

impl Store {
    /// A store of the given weights, whole and on one rank, without optimizer state.
    ///
    /// # Panics
    /// When weights and units do not match in number or shape.
    #[track_caller]
    pub fn new(cpu: &Cpu, units: &[UnitSpec], weights: Vec<Weights>) -> Self {
        assert_eq!(units.len(), weights.len(), "units against lists of weights");
        let mut store = Self::bare(cpu, Home::alone());
        for (spec, weights) in units.iter().zip(weights) {
            let given = weights.len();
            assert_eq!(spec.params.len(), given, "parameters of unit {}", spec.name);
            let params = spec.params.iter().zip(weights.iter());
            let slots = params.map(|(param, weight)| {
                assert_eq!(&param.shape, weight.shape(), "shape of {}", param.name);
                let shards = partition(param.shape.len(), 1);
                Slot::new(shards, 0, Residence::Whole(weight.clone()))
            });
            store.units.push(Unit::new(spec, slots.collect()));
        }
        store
    }

    /// A store on one rank. `fill` gives the elements of a range of a parameter as a vector: it is asked for
    /// the whole of what this rank will keep whole, and for no more than its part of what is partitioned.
    ///
    /// # Errors
    /// Those of `fill`; a disk that is full.
    ///
    /// # Panics
    /// When a [`Tier`] needs a disk and there is none, or the placement contradicts itself.
    #[track_caller]
    pub fn build(
        cpu: &Cpu,
        home: Home,
        units: &[UnitSpec],
        mut fill: impl FnMut(ParamId, &ParamSpec, Range<usize>) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut store = Self::bare(cpu, home);
        let (rank, ranks) = (store.group.rank(), store.group.size());
        for (unit, spec) in units.iter().enumerate() {
            let mut slots = Vec::with_capacity(spec.params.len());
            for (slot, param) in spec.params.iter().enumerate() {
                let (id, len) = (ParamId { unit, slot }, param.shape.len());
                let shards = partition(len, ranks);
                let residence = match store.keep(&shards) {
                    Keep::Whole => {
                        Residence::Whole(fill(id, param, 0..len)?.reshape(param.shape).into())
                    }
                    Keep::Part => Residence::Part(fill(id, param, shards[rank].clone())?),
                    Keep::Disk => rest(&store.disk, fill(id, param, shards[rank].clone())?)?,
                };
                slots.push(Slot::new(shards, rank, residence));
            }
            store.units.push(Unit::new(spec, slots));
        }
        store.disk.flush()?;
        Ok(store)
    }

    /// A store without units.
    ///
    /// # Panics
    /// When a [`Tier`] needs a disk and there is none, or the placement contradicts itself.
    #[track_caller]
    fn bare(cpu: &Cpu, home: Home) -> Self {
        let Home {
            group,
            placement,
            swap,
        } = home;
        placement.check();
        assert!(
            !placement.needs_disk() || swap.is_some() || cpu.pool.is_dry(),
            "a disk for {placement:?}"
        );
        Store {
            cpu: cpu.clone(),
            group,
            placement,
            units: Vec::new(),
            deferred: false,
            disk: Disk::new(swap, 2 * placement.buffers),
            ahead: Mutex::default(),
            shelf: Arc::default(),
        }
    }

    /// How this rank keeps a parameter whose elements are cut into `shards`.
    fn keep(&self, shards: &[Range<usize>]) -> Keep {
        let placement = &self.placement;
        let len = shards.last().map_or(0, |shard| shard.end);
        let swaps = placement.parameters == Tier::Nvme && shards[0].len() >= placement.swap_from;
        if placement.stage < Stage::Parameters || len <= placement.persistence_threshold {
            return Keep::Whole;
        }
        match (swaps, shards.len()) {
            (true, _) => Keep::Disk,
            (false, 1) => Keep::Whole,
            (false, _) => Keep::Part,
        }
    }

    /// A store of freshly filled weights, rounded to `dtype`, whole and on one rank.
    pub fn init(cpu: &Cpu, units: &[UnitSpec], dtype: DType, seed: u64) -> Self {
        let fill = |_, param: &ParamSpec, range| Ok(param.fill_range(cpu, seed, dtype, range));
        let store = Self::build(cpu, Home::alone(), units, fill);
        store.expect("nothing can fail in memory")
    }

    /// The units.
    pub fn units(&self) -> impl ExactSizeIterator<Item = &UnitSpec> {
        self.units.iter().map(|unit| &unit.spec)
    }

    /// The machine.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// The ranks that share the store.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// What is partitioned over them.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The storage type of the dense weights.
    pub fn dtype(&self) -> DType {
        let dense = |slot: &Slot| slot.dtype();
        let mut slots = self.units.iter().flat_map(|unit| &unit.slots);
        slots.find_map(dense).unwrap_or(DType::F32)
    }

    /// What the disk has moved, where there is one.
    pub fn io_stats(&self) -> Option<IoStats> {
        self.disk.file().map(SwapFile::stats)
    }

    fn ahead(&self) -> MutexGuard<'_, BTreeMap<(usize, usize), Coming>> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hint: the unit's weights will be gathered soon. Never blocks.
    pub fn prefetch(&self, unit: usize) {
        let mut ahead = self.ahead();
        for (index, slot) in self.units[unit].slots.iter().enumerate() {
            if slot.rests() {
                ahead
                    .entry((unit, index))
                    .or_insert_with(|| self.start_fetch(slot));
            }
        }
    }

    /// The unit's full weights, until the guard drops. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn gather(&self, unit: usize) -> Result<Gathered<'_>> {
        let Unit { spec, slots, .. } = &self.units[unit];
        let gather = |(index, (param, slot)): (usize, (&ParamSpec, &Slot))| {
            let id = ParamId { unit, slot: index };
            match &slot.residence {
                Residence::Whole(weight) => Ok(weight.clone()),
                Residence::Part(part) => self.gather_param(param, slot, part).map(Weight::from),
                Residence::Packed(cut) => self.gather_packed(id, cut),
                Residence::Disk(..) if slot.ranks() == 1 => {
                    Ok(self.fetch(id)?.reshape(param.shape).into())
                }
                Residence::Disk(..) => {
                    let part = self.fetch(id)?;
                    self.gather_param(param, slot, &part).map(Weight::from)
                }
            }
        };
        // All reads of the unit are started before the first one is waited for.
        self.prefetch(unit);
        let params = spec.params.iter().zip(slots).enumerate();
        let weights: Result<Vec<Weight>> = params.map(gather).collect();
        Ok(Gathered {
            weights: Weights::new(weights?).with_adapters(&spec.adapters),
            _store: PhantomData,
        })
    }

    /// Says whether [`Store::reduce`] leaves gradients on this rank from now on, to be added up there and reduced
    /// together by a later call. All ranks must say the same.
    ///
    /// # Panics
    /// When a stage is to defer that keeps only a part of the gradients on each rank.
    #[track_caller]
    pub fn defer_reduction(&mut self, deferred: bool) {
        let stage = self.placement.stage;
        assert!(
            !deferred || stage < Stage::Gradients,
            "gradients left on each rank in stage {}: that needs stage 0 or 1",
            stage.number()
        );
        self.deferred = deferred;
    }

    /// Lends the unit's gradient sums to a backward pass; [`Store::reduce`] takes them back.
    ///
    /// # Panics
    /// When they are lent already.
    #[track_caller]
    pub fn grads(&mut self, unit: usize) -> Grads {
        self.units[unit]
            .local
            .take()
            .expect("gradients of a unit are lent once at a time")
    }

    /// Takes a unit's gradient sums, adds those of all ranks and keeps what this rank owns of them; or keeps all of them
    /// for later ([`Store::defer_reduction`]). Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn reduce(&mut self, unit: usize, mut grads: Grads) -> Result<()> {
        // The gradients of one unit are on their way to the disk while the next one computes, and no more: the bound is
        // the same on a fast disk and a slow one, and a plan knows it.
        self.disk.flush()?;
        if self.group.size() > 1 && !self.deferred {
            for slot in 0..grads.len() {
                if grads.wants(slot) {
                    let sum = grads.take(slot);
                    self.reduce_param(ParamId { unit, slot }, sum)?;
                }
            }
        } else if self.group.size() == 1 && self.keeps_another_type() {
            for slot in 0..grads.len() {
                if let Some(sum) = grads.take(slot) {
                    self.keep_local(ParamId { unit, slot }, sum);
                }
            }
        } else if self.group.size() == 1 {
            for slot in 0..grads.len() {
                if self.units[unit].slots[slot].grad_spot.is_some()
                    && let Some(sum) = grads.take(slot)
                {
                    self.rest_local(ParamId { unit, slot }, sum)?;
                }
            }
        }
        self.units[unit].local = Some(grads);
        Ok(())
    }

    /// Sets all gradients to zero, giving their memory back.
    pub fn clear_grads(&mut self) {
        for unit in &mut self.units {
            for slot in &mut unit.slots {
                slot.grad = None;
                if let Some((_, squares)) = &mut slot.grad_spot {
                    *squares = None;
                }
            }
            if let Some(grads) = &mut unit.local {
                grads.clear();
            }
        }
    }

    /// The sum of the squares of the reduced gradients over all ranks: each rank adds up what it reduces, in fixed
    /// blocks, and the sums are added in rank order. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn grad_squares(&self) -> Result<f64> {
        use windlass_tensor::each_dtype;
        use windlass_tensor::kernels::reduce::sum_squares;
        let mut own = 0.0;
        for unit in &self.units {
            for (index, slot) in unit.slots.iter().enumerate() {
                if let Some((_, squares)) = &slot.grad_spot {
                    own += squares.unwrap_or(0.0);
                    continue;
                }
                let Some((grad, range)) = unit.reduced(index, slot) else {
                    continue;
                };
                own += each_dtype!(grad.dtype(), E =>
                    sum_squares(&self.cpu.pool, &grad.as_slice::<E>()[range]));
            }
        }
        let all = self.group.collect("gradient norm", &[own])?;
        Ok(all.iter().sum())
    }
}

/// How a rank keeps a parameter.
enum Keep {
    /// All of it, in memory.
    Whole,
    /// Its part, in memory.
    Part,
    /// Its part, on the disk.
    Disk,
}

/// Moves the elements of a parameter to the disk.
fn rest(disk: &Disk, part: Tensor) -> Result<Residence> {
    let dtype = part.dtype();
    let spot = disk.reserve(part.len() * dtype.size())?;
    let buffer = part.into_buffer().expect("a part that nobody shares");
    disk.write(&spot, 0, buffer)?;
    Ok(Residence::Disk(spot, dtype))
}

impl Unit {
    fn new(spec: &UnitSpec, slots: Vec<Slot>) -> Self {
        let local = Some(Grads::new(slots.iter().map(|slot| slot.trained)));
        Unit {
            spec: spec.clone(),
            slots,
            local,
        }
    }

    /// The reduced gradient of a slot with the range of it that this rank reduces.
    fn reduced<'a>(&'a self, index: usize, slot: &'a Slot) -> Option<(&'a Tensor, Range<usize>)> {
        if slot.ranks() == 1 && slot.grad.is_none() {
            let grad = self.local.as_ref()?.get(index)?;
            return Some((grad, 0..grad.len()));
        }
        let start = slot.shard().start - slot.owned.start;
        Some((slot.grad.as_ref()?, start..start + slot.shard().len()))
    }
}
