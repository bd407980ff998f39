//! Optimizer state on its way to and from checkpoints.

use super::Store;
use super::disk::Spot;
use super::owner::{ArrayKind, Place};
use crate::error::Result;
use std::ops::Range;
use windlass_tensor::ParamId;
use windlass_tensor::kernels::memory::{Buffer, Category};

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
    /// The arrays of optimizer state of this rank; over all ranks each element is answered for once.
    pub fn state(&self) -> Vec<StateEntry> {
        let mut entries = Vec::new();
        for (unit, held) in self.units.iter().enumerate() {
            for (index, (param, slot)) in held.spec.params.iter().zip(&held.slots).enumerate() {
                let mut moment = 0;
                for (array, state) in slot.state.iter().enumerate() {
                    let suffix = match state.kind {
                        ArrayKind::Low => "low".to_string(),
                        ArrayKind::Master => "master".to_string(),
                        ArrayKind::Moment | ArrayKind::MomentBf16 => format!("moment.{moment}"),
                        ArrayKind::Codes => format!("moment.{moment}.codes"),
                        ArrayKind::Scales => format!("moment.{moment}.scales"),
                    };
                    moment += usize::from(!matches!(
                        state.kind,
                        ArrayKind::Low | ArrayKind::Master | ArrayKind::Codes
                    ));
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

    /// The little-endian bytes of an entry's elements.
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
        let fetched;
        let buffer = match &state.place {
            Place::Memory(buffer) => buffer,
            Place::Disk(spot) => {
                fetched = self.fetch_array(state.kind, spot, slot.owned.len())?;
                &fetched
            }
        };
        out(&buffer.block()[state.kind.place(range)])
    }

    fn fetch_array(&self, kind: ArrayKind, spot: &Spot, len: usize) -> Result<Buffer> {
        let buffer = self.cpu.memory.alloc(kind.bytes(len), Category::Workspace);
        self.disk.read(spot, 0, buffer).wait()
    }

    /// Sets elements of an entry's array: `bytes` are those of the elements `span` of the parameter, which begin at a
    /// block; this rank takes what it owns of them.
    ///
    /// # Errors
    /// A failing disk.
    pub fn write_state(
        &mut self,
        entry: &StateEntry,
        span: Range<usize>,
        bytes: &[u8],
    ) -> Result<()> {
        let slot = &mut self.units[entry.id.unit].slots[entry.id.slot];
        let (kind, owned) = (slot.state[entry.array].kind, slot.owned.clone());
        let (from, to) = (owned.start.max(span.start), owned.end.min(span.end));
        if from >= to {
            return Ok(());
        }
        let bytes = &bytes[kind.place(from - span.start..to - span.start)];
        let at = kind.place(from - owned.start..to - owned.start);
        match &mut slot.state[entry.array].place {
            Place::Memory(buffer) => buffer.block_mut()[at].copy_from_slice(bytes),
            Place::Disk(spot) => {
                let spot = spot.clone();
                let mut buffer = self.fetch_array(kind, &spot, owned.len())?;
                buffer.block_mut()[at].copy_from_slice(bytes);
                self.disk.write(&spot, 0, buffer)?;
            }
        }
        Ok(())
    }
}

// Arrays are written as they lie in memory; files are little-endian.
const _: () = assert!(cfg!(target_endian = "little"));
