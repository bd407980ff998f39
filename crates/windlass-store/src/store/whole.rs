//! Whole parameters, gradients and optimizer state, from the parts of all ranks: for reports, tests and edits.

use super::slot::{Residence, Slot, fetch_grad};
use super::{Shard, Stage, Store};
use crate::error::Result;
use half::f16;
use std::ops::Range;
use windlass_tensor::kernels::memory::Category;
use windlass_tensor::kernels::split;
use windlass_tensor::{DType, ParamId, ParamSpec, Tensor, Weight, Weights, bf16, each_dtype};

impl Store {
    /// The parameter of a name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.units.iter().enumerate().find_map(|(unit, held)| {
            let slot = held.spec.params.iter().position(|p| p.name == name)?;
            Some(ParamId { unit, slot })
        })
    }

    /// The weights of all units, of a store on one rank that keeps them in memory.
    ///
    /// # Panics
    /// When they are partitioned or rest on a disk.
    #[track_caller]
    pub fn into_weights(self) -> Vec<Weights> {
        let whole = |slot: Slot| match slot.residence {
            Residence::Whole(weight) => weight,
            _ => panic!("weights of a store that keeps them in parts"),
        };
        let units = self.units.into_iter();
        units
            .map(|unit| Weights::new(unit.slots.into_iter().map(whole).collect()))
            .collect()
    }

    /// The storage type of a dense parameter.
    pub fn dtype_of(&self, id: ParamId) -> Option<DType> {
        self.units[id.unit].slots[id.slot].dtype()
    }

    /// The parameters in order, each with its declaration.
    pub fn params(&self) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
        self.units.iter().enumerate().flat_map(|(unit, held)| {
            let params = held.spec.params.iter().enumerate();
            params.map(move |(slot, spec)| (ParamId { unit, slot }, spec))
        })
    }

    /// The gradient of a parameter, summed over the batches and ranks so far; `None` where nothing was added.
    /// Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn gradient(&self, id: ParamId) -> Result<Option<Tensor>> {
        let unit = &self.units[id.unit];
        let (param, slot) = (&unit.spec.params[id.slot], &unit.slots[id.slot]);
        if slot.ranks() == 1 && slot.grad_spot.is_none() && slot.grad.is_none() {
            let grad = unit.local.as_ref().and_then(|grads| grads.get(id.slot));
            return Ok(grad.cloned());
        }
        let fetched;
        let kept = match (&slot.grad, &slot.grad_spot) {
            (Some(kept), _) => kept,
            (None, Some((_, Some(_)))) => {
                fetched = fetch_grad(&self.cpu, &self.disk, slot)?;
                &fetched
            }
            _ => return Ok(None),
        };
        let mut whole = Tensor::empty(&self.cpu, param.shape, kept.dtype(), Category::Workspace);
        let tag = format!("gradient of {}", param.name);
        let start = slot.shard().start - slot.owned.start;
        each_dtype!(kept.dtype(), E => {
            let out = whole.as_mut_slice::<E>();
            let own = &kept.as_slice::<E>()[start..start + slot.shard().len()];
            out[slot.shard().clone()].copy_from_slice(own);
            self.share::<E>(&tag, slot, out)?;
        });
        Ok(Some(whole))
    }

    /// The values of a parameter at full precision: the `f32` masters where there are some. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn master(&mut self, id: ParamId) -> Result<Vec<f32>> {
        self.whole(id, "master of", |shard, at| shard.values.master(at))
    }

    /// Moment `n` of a trained parameter. Collective.
    ///
    /// # Errors
    /// A lost rank.
    ///
    /// # Panics
    /// When the optimizer keeps no such moment.
    #[track_caller]
    pub fn moment(&mut self, id: ParamId, n: usize) -> Result<Vec<f32>> {
        self.whole(id, "moment of", |shard, at| shard.moments[n].read(n, at))
    }

    /// Sets a trained parameter to `values` on all ranks, which must give the same ones. Collective.
    ///
    /// # Errors
    /// A lost rank.
    ///
    /// # Panics
    /// When the number of values differs from the parameter's.
    #[track_caller]
    pub fn set_master(&mut self, id: ParamId, values: &[f32]) -> Result<()> {
        let len = self.units[id.unit].spec.params[id.slot].shape.len();
        assert_eq!(values.len(), len, "values against elements");
        self.sweep(Some(id), true, &mut |mut shard| {
            shard.values.set_master(0, &values[shard.range.clone()]);
        })?;
        // Where weights are whole but state is partitioned, this rank's copy of the others' part is set as well.
        let slot = &mut self.units[id.unit].slots[id.slot];
        if let Residence::Whole(Weight::Dense(tensor)) = &mut slot.residence {
            match tensor.dtype() {
                DType::Bf16 => {
                    let out = tensor.as_mut_slice::<bf16>();
                    let rounded = values.iter().map(|&v| split::split(v).0);
                    out.iter_mut().zip(rounded).for_each(|(o, v)| *o = v);
                }
                DType::F32 => tensor.as_mut_slice::<f32>().copy_from_slice(values),
                DType::F16 => {
                    let out = tensor.as_mut_slice::<f16>();
                    let rounded = values.iter().map(|&v| f16::from_f32(v));
                    out.iter_mut().zip(rounded).for_each(|(o, v)| *o = v);
                }
                other => panic!("parameters in {other} are not trained"),
            }
        }
        self.group.barrier("set a parameter")?;
        Ok(())
    }

    /// Replaces all dense weights by what `fill` gives, which is asked as in [`Store::build`].
    ///
    /// # Errors
    /// Those of `fill`; a failing disk.
    pub fn refill(
        &mut self,
        mut fill: impl FnMut(ParamId, &ParamSpec, Range<usize>) -> Result<Tensor>,
    ) -> Result<()> {
        self.ahead().clear();
        for (unit, held) in self.units.iter_mut().enumerate() {
            for (slot, (param, place)) in held.spec.params.iter().zip(&mut held.slots).enumerate() {
                let id = ParamId { unit, slot };
                let shard = place.shard().clone();
                match &mut place.residence {
                    Residence::Whole(Weight::Dense(tensor)) => {
                        *tensor = fill(id, param, 0..param.shape.len())?.reshape(param.shape);
                    }
                    Residence::Part(part) => *part = fill(id, param, shard)?,
                    Residence::Disk(spot, _) => {
                        let part = fill(id, param, shard)?;
                        let buffer = part.into_buffer().expect("a part that nobody shares");
                        self.disk.write(spot, 0, buffer)?;
                    }
                    Residence::Whole(Weight::Packed(_)) | Residence::Packed(_) => {}
                }
            }
        }
        self.disk.flush()
    }

    /// Completes a vector as long as a parameter, of which each rank has computed its part, on all ranks; in stage 0 all
    /// have computed it all. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn share_values(&self, what: &str, id: ParamId, values: &mut [f32]) -> Result<()> {
        if self.placement.stage == Stage::Replicated {
            return Ok(());
        }
        let unit = &self.units[id.unit];
        let tag = format!("{what} {}", unit.spec.params[id.slot].name);
        self.share(&tag, &unit.slots[id.slot], values)
    }

    /// Adds up numbers of which each rank has computed its own and left the others 0; in stage 0 all have computed them
    /// all. Collective.
    ///
    /// # Errors
    /// A lost rank.
    pub fn exchange(&self, what: &str, values: &[f64]) -> Result<Vec<f64>> {
        if self.placement.stage == Stage::Replicated {
            return Ok(values.to_vec());
        }
        let all = self.group.collect(what, values)?;
        let len = values.len().max(1);
        Ok((0..values.len())
            .map(|i| all.iter().skip(i).step_by(len).sum())
            .collect())
    }

    fn whole(
        &mut self,
        id: ParamId,
        what: &str,
        part: impl Fn(&Shard<'_>, Range<usize>) -> Vec<f32>,
    ) -> Result<Vec<f32>> {
        let unit = &self.units[id.unit];
        let mut all = vec![0.0; unit.spec.params[id.slot].shape.len()];
        let tag = format!("{what} {}", unit.spec.params[id.slot].name);
        self.sweep(Some(id), false, &mut |shard| {
            let here = shard.range.clone();
            all[here].copy_from_slice(&part(&shard, 0..shard.range.len()));
        })?;
        self.share(&tag, &self.units[id.unit].slots[id.slot], &mut all)?;
        Ok(all)
    }
}
