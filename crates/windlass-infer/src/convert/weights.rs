//! The weights of a folder, parameter by parameter, whether plain or quantized.

use crate::InferError;
use crate::quantized::{Checkpoint, Quantization};
use std::collections::BTreeSet;
use windlass_model::Naming;
use windlass_store::Loader;
use windlass_store::gguf::TensorInfo;
use windlass_store::safetensors::Tensors;
use windlass_tensor::kernels::blocks::{BlockType, first_bad_block, quantize_all};
use windlass_tensor::kernels::packed::{Codes, Min, RowUnit, Scale};
use windlass_tensor::{Cpu, DType, FileTensor, Packed, ParamId, UnitSpec};

/// Columns of a block of the types that hold a quantized matrix to the bit.
const BLOCK: usize = 32;

/// Reads parameters, best in the order of their units: the quantized matrices of a unit are read together.
pub(super) struct Weights<'a> {
    cpu: &'a Cpu,
    loader: Loader<'a>,
    checkpoint: Option<Checkpoint<'a>>,
    units: &'a [UnitSpec],
    map: &'a [FileTensor],
    /// The unit that was read last, and its quantized matrices by slot.
    last: Option<(usize, Vec<(usize, Packed)>)>,
}

impl<'a> Weights<'a> {
    pub fn new(
        cpu: &'a Cpu,
        tensors: &'a Tensors,
        units: &'a [UnitSpec],
        map: &'a [FileTensor],
        naming: Naming,
        quantization: Option<&Quantization>,
    ) -> Self {
        Weights {
            cpu,
            loader: Loader::new(cpu, tensors, units, map, |name| naming.bare_name(name)),
            checkpoint: quantization.map(|q| Checkpoint::new(tensors, q.clone(), naming)),
            units,
            map,
            last: None,
        }
    }

    /// Checks that all weights are there; returns the tensors of the folder that are not needed.
    ///
    /// # Errors
    /// Missing or misshapen weights.
    pub fn check(&mut self) -> Result<BTreeSet<String>, InferError> {
        let quantized = |file: &FileTensor| {
            let checkpoint = self.checkpoint.as_ref();
            checkpoint.is_some_and(|checkpoint| checkpoint.has(file))
        };
        let plain: Vec<ParamId> = self
            .map
            .iter()
            .filter(|file| !quantized(file))
            .map(|file| file.parts[0])
            .collect();
        for id in plain {
            self.loader.read(id, 0..0, DType::F32)?;
        }
        let mut unused: BTreeSet<String> = self.loader.unused().into_iter().collect();
        if let Some(checkpoint) = &self.checkpoint {
            let used = checkpoint.tensors_of(self.map)?;
            unused.retain(|name| !used.contains(name));
        }
        Ok(unused)
    }

    /// The packed matrix of a parameter that is quantized.
    ///
    /// # Errors
    /// Damaged tensors.
    pub fn packed(&mut self, id: ParamId) -> Result<Option<Packed>, InferError> {
        let Some(checkpoint) = &self.checkpoint else {
            return Ok(None);
        };
        if self.last.as_ref().is_none_or(|(unit, _)| *unit != id.unit) {
            let map = of_unit(self.map, id.unit);
            let read = checkpoint.read(self.cpu, &self.units[id.unit], &map)?;
            self.last = Some((id.unit, read));
        }
        let last = self.last.as_ref().map(|(_, packed)| packed);
        let found = last.and_then(|packed| packed.iter().find(|(slot, _)| *slot == id.slot));
        Ok(found.map(|(_, packed)| packed.clone()))
    }

    /// The elements of a parameter, of a quantized one the numbers that it stands for.
    ///
    /// # Errors
    /// Missing, misshapen or damaged tensors.
    pub fn values(&mut self, id: ParamId) -> Result<Vec<f32>, InferError> {
        if let Some(packed) = self.packed(id)? {
            let rows = 0..packed.shape()[0];
            return Ok(packed.unpack_rows(self.cpu, rows, DType::F32).to_f32());
        }
        let len = self.units[id.unit].params[id.slot].shape.len();
        Ok(self.loader.read(id, 0..len, DType::F32)?.to_f32())
    }
}

/// The tensors of one unit, as a map of that unit alone.
///
/// # Panics
/// When a tensor holds parameters of several units.
pub(crate) fn of_unit(map: &[FileTensor], unit: usize) -> Vec<FileTensor> {
    let mine = map.iter().filter(|file| file.parts[0].unit == unit);
    let mut mine: Vec<FileTensor> = mine.cloned().collect();
    for part in mine.iter_mut().flat_map(|file| &mut file.parts) {
        assert_eq!(part.unit, unit, "a file's tensor belongs to one unit");
        part.unit = 0;
    }
    mine
}

/// The smallest type whose blocks hold a packed matrix to the bit.
pub(super) fn exact_type(packed: &Packed) -> Option<BlockType> {
    let layout = packed.matrix().layout();
    let even = packed.order().is_none()
        && layout.min == Min::Without
        && matches!(layout.scale, Scale::Half { .. })
        && packed.shape()[1].is_multiple_of(BLOCK);
    match layout.codes {
        _ if !even => None,
        Codes::U2 | Codes::U3 | Codes::U4 => Some(BlockType::Q4_0),
        Codes::U8 => Some(BlockType::Q8_0),
        _ => None,
    }
}

/// Whether blocks of a type hold a packed matrix to the bit: of its [`exact_type`], or of the larger one.
pub(super) fn holds(kind: BlockType, packed: &Packed) -> bool {
    let exact = exact_type(packed);
    exact.is_some() && (kind == BlockType::Q8_0 || exact == Some(kind))
}

/// The blocks of a matrix that the type [`holds`]: row `n` of the matrix is row `place(n)` of the result.
pub(super) fn exact_blocks(
    packed: &Packed,
    kind: BlockType,
    place: impl Fn(usize) -> usize,
) -> Vec<u8> {
    let matrix = packed.matrix();
    let (layout, cols) = (matrix.layout(), matrix.cols());
    let row_bytes = cols / BLOCK * kind.bytes();
    let mut out = vec![0; matrix.rows() * row_bytes];
    let mut unit = RowUnit::ZERO;
    for row in 0..matrix.rows() {
        let blocks = out[place(row) * row_bytes..][..row_bytes].chunks_exact_mut(kind.bytes());
        for (index, block) in blocks.enumerate() {
            let at = index * BLOCK % RowUnit::ZERO.codes.len();
            if at == 0 {
                matrix.row_unit(row, index * BLOCK / RowUnit::ZERO.codes.len(), &mut unit);
            }
            let (scale, codes) = block.split_at_mut(2);
            scale.copy_from_slice(&unit.scales[at / layout.block()].to_le_bytes());
            let level = |j: usize| unit.codes[at + j].wrapping_sub(layout.offset);
            for (j, byte) in codes.iter_mut().enumerate() {
                *byte = match kind {
                    BlockType::Q8_0 => level(j),
                    // Levels count from -8, the second half of the block in the upper bits.
                    _ => {
                        (level(j).wrapping_add(8) & 15) | level(j + BLOCK / 2).wrapping_add(8) << 4
                    }
                };
            }
        }
    }
    out
}

/// The bytes of some rows of a tensor, rounded with a weight for each column's error where there are some.
pub(crate) fn encode(
    cpu: &Cpu,
    info: &TensorInfo,
    values: &[f32],
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, InferError> {
    let unfit = |problem: String| InferError::Unfit {
        tensor: info.name.clone(),
        problem,
    };
    if let Some(value) = values.iter().find(|value| !value.is_finite()) {
        return Err(unfit(format!("a weight is {value}")));
    }
    let size = info.block_type.size_of(values.len());
    let mut bytes = vec![0; size.expect("rows of whole blocks")];
    // A part of a vector is less than a row.
    let row = info.row_len().min(values.len());
    let (pool, kind) = (&cpu.pool, info.block_type);
    quantize_all(pool, kind, values, row, importance, &mut bytes);
    match first_bad_block(info.block_type, &bytes) {
        Some(_) => Err(unfit(format!("weights are beyond {}", info.block_type))),
        None => Ok(bytes),
    }
}
