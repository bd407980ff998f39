//! One parameter as a rank keeps it, and its collectives.

use super::deal::Cut;
use super::disk::{Coming, Disk, Spot};
use super::owner::Array;
use super::{Store, Wire};
use crate::error::Result;
use std::ops::Range;
use windlass_tensor::kernels::Element;
use windlass_tensor::kernels::elementwise::axpy;
use windlass_tensor::kernels::memory::Category;
use windlass_tensor::kernels::reduce::sum_squares;
use windlass_tensor::{Cpu, DType, ParamId, ParamSpec, Tensor, Weight, bf16, each_dtype};

/// Where a parameter's elements are.
pub(super) enum Residence {
    /// All of them, here.
    Whole(Weight),
    /// This rank's shard, as a vector.
    Part(Tensor),
    /// This rank's shard, on the disk.
    Disk(Spot, DType),
    /// This rank's part of the bytes of a packed matrix.
    Packed(Cut),
}

/// One parameter.
pub(super) struct Slot {
    /// The part of each rank.
    pub(super) shards: Vec<Range<usize>>,
    rank: usize,
    /// The elements that this rank updates: its shard, or all in stage 0.
    pub(super) owned: Range<usize>,
    pub(super) residence: Residence,
    pub(super) trained: bool,
    /// The sum over ranks of the gradients of `owned`, with more than one rank.
    pub(super) grad: Option<Tensor>,
    /// Where that sum rests, if on the disk, and, while there is one, the sum of its squares.
    pub(super) grad_spot: Option<(Spot, Option<f64>)>,
    /// Master values and moments of `owned`.
    pub(super) state: Vec<Array>,
}

impl Slot {
    pub(super) fn new(shards: Vec<Range<usize>>, rank: usize, residence: Residence) -> Self {
        let trained = matches!(
            residence,
            Residence::Part(_) | Residence::Disk(..) | Residence::Whole(Weight::Dense(_))
        );
        Slot {
            owned: shards[rank].clone(),
            shards,
            rank,
            residence,
            trained,
            grad: None,
            grad_spot: None,
            state: Vec::new(),
        }
    }

    pub(super) fn ranks(&self) -> usize {
        self.shards.len()
    }

    /// The elements whose gradient this rank sums up.
    pub(super) fn shard(&self) -> &Range<usize> {
        &self.shards[self.rank]
    }

    /// Whether this rank's part is on the disk.
    pub(super) fn rests(&self) -> bool {
        match &self.residence {
            Residence::Disk(..) => true,
            Residence::Packed(cut) => cut.rests(),
            Residence::Whole(_) | Residence::Part(_) => false,
        }
    }

    /// The storage type of a dense parameter.
    pub(super) fn dtype(&self) -> Option<DType> {
        match &self.residence {
            Residence::Whole(Weight::Dense(tensor)) | Residence::Part(tensor) => {
                Some(tensor.dtype())
            }
            Residence::Disk(_, dtype) => Some(*dtype),
            Residence::Whole(Weight::Packed(_)) | Residence::Packed(_) => None,
        }
    }
}

/// The gradient that rests on the disk.
pub(super) fn fetch_grad(cpu: &Cpu, disk: &Disk, slot: &Slot) -> Result<Tensor> {
    let (spot, _) = slot.grad_spot.as_ref().expect("a gradient on the disk");
    let bytes = slot.owned.len() * 4;
    let buffer = cpu.memory.alloc(bytes, Category::Gradients);
    let buffer = disk.read(spot, 0, buffer).wait()?;
    Ok(Tensor::from_buffer(buffer, [slot.owned.len()], DType::F32))
}

/// Cuts the parts of all ranks into runs of at most `bucket` elements: for each run its start and the part of each rank
/// in it, counted from that start.
pub(super) fn buckets(
    shards: &[Range<usize>],
    bucket: usize,
) -> impl Iterator<Item = (Range<usize>, Vec<Range<usize>>)> {
    let len = shards.last().map_or(0, |s| s.end);
    let bucket = bucket.max(1);
    (0..len.div_ceil(bucket)).map(move |index| {
        let run = index * bucket..len.min((index + 1) * bucket);
        let cut = |at: usize| at.clamp(run.start, run.end) - run.start;
        let parts = shards.iter().map(|s| cut(s.start)..cut(s.end)).collect();
        (run, parts)
    })
}

impl Store {
    /// The whole parameter, from the parts of all ranks.
    pub(super) fn gather_param(
        &self,
        param: &ParamSpec,
        slot: &Slot,
        part: &Tensor,
    ) -> Result<Tensor> {
        let dtype = part.dtype();
        let mut whole = Tensor::empty(&self.cpu, param.shape, dtype, Category::Workspace);
        let tag = format!("gather {}", param.name);
        each_dtype!(dtype, E => {
            let out = whole.as_mut_slice::<E>();
            if !self.cpu.pool.is_dry() {
                out[slot.shard().clone()].copy_from_slice(part.as_slice::<E>());
            }
            self.share::<E>(&tag, slot, out)?;
        });
        Ok(whole)
    }

    /// Gives all ranks all shards of a parameter's elements, in place.
    pub(super) fn share<E: windlass_comm::Datum>(
        &self,
        tag: &str,
        slot: &Slot,
        data: &mut [E],
    ) -> Result<()> {
        for (run, parts) in buckets(&slot.shards, self.placement.bucket) {
            self.group.all_gather(tag, &parts, &mut data[run])?;
        }
        Ok(())
    }

    /// Adds the ranks' gradients of a parameter to what this rank keeps of their sum.
    pub(super) fn reduce_param(&mut self, id: ParamId, sum: Option<Tensor>) -> Result<()> {
        let unit = &mut self.units[id.unit];
        let (param, slot) = (&unit.spec.params[id.slot], &mut unit.slots[id.slot]);
        let dtype = slot.dtype().expect("a trained slot").accumulator();
        let zeros = |len: usize| Tensor::zeros(&self.cpu, [len], dtype, Category::Gradients);
        let sum = sum.unwrap_or_else(|| zeros(param.shape.len()));
        if slot.grad.is_none() && matches!(slot.grad_spot, Some((_, Some(_)))) {
            slot.grad = Some(fetch_grad(&self.cpu, &self.disk, slot)?);
        }
        let accumulate = slot.grad.is_some();
        let mut kept = match slot.grad.take() {
            Some(kept) if kept.dtype() != dtype => kept.cast(&self.cpu, dtype, Category::Workspace),
            Some(kept) => kept,
            None => zeros(slot.owned.len()),
        };
        let start = slot.shard().start - slot.owned.start;
        let mine = start..start + slot.shard().len();
        let tag = format!("reduce {}", param.name);
        if self.wire() == Wire::Bf16 && dtype == DType::F32 {
            let sent = sum.cast(&self.cpu, DType::Bf16, Category::Workspace);
            let out = &mut kept.as_mut_slice::<f32>()[mine];
            self.sum_shards(&tag, id, sent.as_slice::<bf16>(), out, accumulate)?;
        } else {
            each_dtype!(dtype, E => {
                type Acc = <E as Element>::Acc;
                let out = &mut kept.as_mut_slice::<Acc>()[mine];
                self.sum_shards(&tag, id, sum.as_slice::<Acc>(), out, accumulate)?;
            });
        }
        self.units[id.unit].slots[id.slot].grad = Some(self.kept(kept));
        self.rest_grad(id)
    }

    /// Whether sums of gradients are not kept as they are computed.
    pub(super) fn keeps_another_type(&self) -> bool {
        self.placement.grad_accum != DType::F32 && self.dtype() != DType::F64
    }

    /// A sum of gradients in the type in which it is kept.
    fn kept(&self, sum: Tensor) -> Tensor {
        match (sum.dtype(), self.placement.grad_accum) {
            (DType::F32, kept @ (DType::Bf16 | DType::F16)) => {
                sum.cast(&self.cpu, kept, Category::Gradients)
            }
            _ => sum,
        }
    }

    /// Adds a gradient of one rank to what is kept in a type of its own.
    pub(super) fn keep_local(&mut self, id: ParamId, mut sum: Tensor) {
        let slot = &mut self.units[id.unit].slots[id.slot];
        if let Some(before) = slot.grad.take() {
            let before = before.cast(&self.cpu, sum.dtype(), Category::Workspace);
            let out = sum.as_mut_slice::<f32>();
            axpy(&self.cpu.pool, 1.0, before.as_slice::<f32>(), out);
        }
        let kept = self.kept(sum);
        self.units[id.unit].slots[id.slot].grad = Some(kept);
    }

    /// Adds a gradient of one rank to what rests on the disk.
    pub(super) fn rest_local(&mut self, id: ParamId, sum: Tensor) -> Result<()> {
        let slot = &mut self.units[id.unit].slots[id.slot];
        let mut sum = sum.reshape([slot.owned.len()]);
        if matches!(slot.grad_spot, Some((_, Some(_)))) {
            let before = fetch_grad(&self.cpu, &self.disk, slot)?;
            let out = sum.as_mut_slice::<f32>();
            axpy(&self.cpu.pool, 1.0, before.as_slice::<f32>(), out);
        }
        slot.grad = Some(sum);
        self.rest_grad(id)
    }

    /// Moves a reduced gradient to the disk, if that is its place.
    fn rest_grad(&mut self, id: ParamId) -> Result<()> {
        let slot = &mut self.units[id.unit].slots[id.slot];
        let start = slot.shard().start - slot.owned.start;
        let mine = start..start + slot.shard().len();
        let Some((spot, squares)) = &mut slot.grad_spot else {
            return Ok(());
        };
        let grad = slot.grad.take().expect("a reduced gradient");
        *squares = Some(sum_squares(&self.cpu.pool, &grad.as_slice::<f32>()[mine]));
        let buffer = grad.into_buffer().expect("a gradient that nobody shares");
        self.disk.send(spot, buffer);
        Ok(())
    }

    /// This rank's shard of a parameter that rests on the disk.
    pub(super) fn fetch(&self, id: ParamId) -> Result<Tensor> {
        let slot = &self.units[id.unit].slots[id.slot];
        let Residence::Disk(_, dtype) = &slot.residence else {
            unreachable!("only what rests on the disk is fetched");
        };
        let coming = self.ahead().remove(&(id.unit, id.slot));
        let coming = coming.unwrap_or_else(|| self.start_fetch(slot));
        Ok(Tensor::from_buffer(
            coming.wait()?,
            [slot.shard().len()],
            *dtype,
        ))
    }

    /// Starts to read this rank's shard of a parameter that rests on the disk.
    pub(super) fn start_fetch(&self, slot: &Slot) -> Coming {
        let (spot, bytes) = match &slot.residence {
            Residence::Disk(spot, dtype) => (spot, slot.shard().len() * dtype.size()),
            Residence::Packed(cut) => cut.spot(slot.rank),
            Residence::Whole(_) | Residence::Part(_) => {
                unreachable!("only what rests on the disk is fetched")
            }
        };
        let buffer = self.cpu.memory.alloc(bytes, Category::Workspace);
        self.disk.read(spot, 0, buffer)
    }

    fn wire(&self) -> Wire {
        self.placement.wire
    }

    fn sum_shards<T: windlass_comm::Real>(
        &self,
        tag: &str,
        id: ParamId,
        data: &[T],
        out: &mut [T::Sum],
        accumulate: bool,
    ) -> Result<()> {
        let slot = &self.units[id.unit].slots[id.slot];
        let mut done = 0;
        for (run, parts) in buckets(&slot.shards, self.placement.bucket) {
            let mine = parts[self.group.rank()].len();
            let out = &mut out[done..done + mine];
            self.group
                .reduce_scatter(tag, &parts, &data[run], out, accumulate)?;
            done += mine;
        }
        Ok(())
    }
}
