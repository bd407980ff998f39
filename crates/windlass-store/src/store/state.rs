//! Optimizer state on its way to and from checkpoints.

use super::Store;
use super::disk::Spot;
use super::owner::{ArrayKind, PIECE, Place};
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
        let fetched;
        let buffer = match &state.place {
            Place::Memory(buffer) => buffer,
            Place::Disk(spot) => {
                fetched = self.fetch_array(state.kind, spot, slot.owned.len())?;
                &fetched
            }
        };
        match state.kind {
            ArrayKind::Low => buffer.as_i16()[range]
                .chunks(PIECE)
                .try_for_each(|piece| out(&bytes_of(piece, |v| v.to_le_bytes()))),
            ArrayKind::Moment => buffer.as_slice::<f32>()[range]
                .chunks(PIECE)
                .try_for_each(|piece| out(&bytes_of(piece, |v| v.to_le_bytes()))),
        }
    }

    fn fetch_array(&self, kind: ArrayKind, spot: &Spot, len: usize) -> Result<Buffer> {
        let buffer = self
            .cpu
            .memory
            .alloc(kind.size() * len, Category::Workspace);
        self.disk.read(spot, 0, buffer).wait()
    }

    /// Sets elements of an entry's array: `bytes` are those of the parameter's elements from `start` on, of which this
    /// rank takes what it owns.
    ///
    /// # Errors
    /// A failing disk.
    pub fn write_state(&mut self, entry: &StateEntry, start: usize, bytes: &[u8]) -> Result<()> {
        let slot = &self.units[entry.id.unit].slots[entry.id.slot];
        let (kind, owned) = (slot.state[entry.array].kind, slot.owned.clone());
        let end = start + bytes.len() / kind.size();
        let (from, to) = (owned.start.max(start), owned.end.min(end));
        if from >= to {
            return Ok(());
        }
        let bytes = &bytes[(from - start) * kind.size()..(to - start) * kind.size()];
        let at = from - owned.start..to - owned.start;
        if let Place::Disk(spot) = &slot.state[entry.array].place {
            let mut buffer = self.fetch_array(kind, spot, owned.len())?;
            set_bytes(kind, &mut buffer, at, bytes);
            return self.disk.write(spot, 0, buffer);
        }
        let slot = &mut self.units[entry.id.unit].slots[entry.id.slot];
        if let Place::Memory(buffer) = &mut slot.state[entry.array].place {
            set_bytes(kind, buffer, at, bytes);
        }
        Ok(())
    }
}

fn bytes_of<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| bytes(v)).collect()
}

fn set_bytes(kind: ArrayKind, buffer: &mut Buffer, at: Range<usize>, bytes: &[u8]) {
    match kind {
        ArrayKind::Low => {
            let out = &mut buffer.as_i16_mut()[at];
            for (v, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *v = i16::from_le_bytes([b[0], b[1]]);
            }
        }
        ArrayKind::Moment => {
            let out = &mut buffer.as_mut_slice::<f32>()[at];
            for (v, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
}
