//! A quantized matrix in its file: codes where they lie, scales and zeros by group, and the way into a packed matrix.

use std::sync::Arc;
use windlass_tensor::kernels::packed::{Codes, Layout, Min, PackedMatrix, Scale, UNIT};
use windlass_tensor::{Cpu, Packed, f16};

/// Where the code of an output and an input lies.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// 32-bit words `[inputs * bits / 32, outputs]`: a stream of bits down each column.
    Down { outputs: usize },
    /// 32-bit words `[inputs, outputs / 8]`: eight outputs of an input, in an order of their own.
    Across { outputs: usize },
    /// 32-bit words `[outputs, words]`: a stream of bits along each row.
    Along { words: usize },
    /// Signed bytes `[outputs, inputs]`.
    Bytes { inputs: usize },
}

/// Nibble of a word that holds output `8 c + j`.
const ACROSS: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Word `index` of little-endian words.
fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * index..][..4].try_into().expect("four bytes"))
}

impl Place {
    /// The code of an output and an input; signed bytes count from -128.
    #[inline]
    pub fn code(self, bytes: &[u8], bits: usize, output: usize, input: usize) -> u8 {
        let mask = (1u32 << bits) - 1;
        let code = match self {
            Place::Down { outputs } => {
                let (at, shift) = (input * bits / 32, input * bits % 32);
                let mut code = word(bytes, at * outputs + output) >> shift;
                if shift + bits > 32 {
                    code |= word(bytes, (at + 1) * outputs + output) << (32 - shift);
                }
                code
            }
            Place::Across { outputs } => {
                let word = word(bytes, input * (outputs / 8) + output / 8);
                word >> (4 * ACROSS[output % 8])
            }
            Place::Along { words } => {
                let (at, shift) = (output * words + input * bits / 32, input * bits % 32);
                let mut code = word(bytes, at) >> shift;
                if shift + bits > 32 {
                    code |= word(bytes, at + 1) << (32 - shift);
                }
                code
            }
            Place::Bytes { inputs } => u32::from(bytes[output * inputs + input] ^ 0x80),
        };
        (code & mask) as u8
    }
}

/// A matrix `[outputs, inputs]` of codes with a scale, and maybe a zero, for each group of an output.
pub(super) struct Stored<'a> {
    pub bits: usize,
    pub inputs: usize,
    pub place: Place,
    pub bytes: &'a [u8],
    /// The group of each input.
    pub groups: Vec<u32>,
    /// `[groups, outputs]` or `[outputs, groups]`, by `scale_steps`.
    pub scales: Vec<f16>,
    /// The codes of zero, where not all are the middle one; laid out as the scales.
    pub zeros: Option<Vec<u8>>,
    /// Places between the scales of two groups, and of two outputs.
    pub scale_steps: [usize; 2],
}

/// Inputs in the order of their groups, and how many share a scale in the packed matrix.
pub(super) struct Arranged {
    /// `None` when they are in order already.
    pub order: Option<Arc<[u32]>>,
    group: usize,
}

impl Stored<'_> {
    /// Arranges the inputs so that whole blocks of 32 to 256 share a scale; `None` when no order does that.
    pub fn arrange(&self) -> Option<Arranged> {
        let mut order: Vec<u32> = (0..self.inputs as u32).collect();
        let sorted = self.groups.is_sorted();
        if !sorted {
            order.sort_by_key(|&input| self.groups[input as usize]);
        }
        let shared = |size: usize| {
            let group = |&input: &u32| self.groups[input as usize];
            let mut blocks = order.chunks(size);
            blocks.all(|block| block.iter().all(|input| group(input) == group(&block[0])))
        };
        // The largest block that needs no more padding than the smallest.
        let padded = self.inputs.next_multiple_of(32);
        let group = [256, 128, 64, 32]
            .into_iter()
            .find(|&size| self.inputs.next_multiple_of(size) == padded && shared(size))?;
        Some(Arranged {
            order: (!sorted).then(|| order.into()),
            group,
        })
    }

    /// How the packed matrix stores its numbers.
    fn layout(&self, group: usize) -> Layout {
        let codes = match self.bits {
            2 => Codes::U2,
            3 => Codes::U3,
            4 => Codes::U4,
            _ => Codes::U8,
        };
        let (offset, min) = match self.zeros {
            None => (1 << (self.bits - 1), Min::Without),
            Some(_) => (0, Min::Zero),
        };
        Layout {
            codes,
            offset,
            scale: Scale::Half { group },
            min,
        }
    }

    /// Packs some outputs: row `n` of the matrix is output `outputs[n]`.
    pub fn pack(&self, cpu: &Cpu, arranged: &Arranged, outputs: &[u32]) -> Packed {
        let (layout, order) = (self.layout(arranged.group), arranged.order.as_deref());
        let shape = [outputs.len(), self.inputs];
        let matrix = PackedMatrix::pack(&cpu.pool, &cpu.memory, layout, shape, |row, unit, out| {
            let output = outputs[row] as usize;
            let columns = unit * UNIT..((unit + 1) * UNIT).min(self.inputs);
            let input = |column: usize| order.map_or(column, |order| order[column] as usize);
            let mut codes = [0u8; UNIT];
            for (code, column) in codes.iter_mut().zip(columns.clone()) {
                *code = self
                    .place
                    .code(self.bytes, self.bits, output, input(column));
            }
            for (head, first) in columns.step_by(arranged.group).enumerate() {
                let group = self.groups[input(first)] as usize;
                let at = group * self.scale_steps[0] + output * self.scale_steps[1];
                let zero = self.zeros.as_ref().map_or(0, |zeros| zeros[at]);
                out.head(head, self.scales[at].to_bits(), u16::from(zero));
            }
            for step in 0..out.steps() {
                out.codes(step, &codes.as_chunks().0[step]);
            }
        });
        let packed = Packed::from(matrix);
        match &arranged.order {
            Some(order) => packed.with_order(order.clone()),
            None => packed,
        }
    }
}
