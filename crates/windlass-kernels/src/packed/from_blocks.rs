//! Packed matrices from the blocks of a file: the same codes and scales, in other places.

use super::layout::{Codes, Layout, Min, Scale};
use super::matrix::PackedMatrix;
use super::unit::{RowUnit, UnitMut};
use super::{STEP, UNIT};
use crate::blocks::{self, BlockType, Levels};
use crate::memory::Memory;
use crate::pool::Pool;
use half::f16;

impl Layout {
    /// The layout that holds a type's blocks without a change of a number; `None` for plain numbers, codebooks, and scales
    /// that no layout has.
    pub fn of(block_type: BlockType) -> Option<Layout> {
        use BlockType::*;
        let (sub, levels, has_min) = block_type.scheme()?;
        let (codes, offset) = match (block_type, levels) {
            // A sign bit is twice itself less 1.
            (Q1_0, _) => (Codes::U2, 1),
            (_, Levels::Table(table)) => (Codes::Table(table), 0),
            (Q2_K | TQ1_0 | TQ2_0 | Q2_0, Levels::Less(zero)) => (Codes::U2, zero),
            (Q3_K, Levels::Less(zero)) => (Codes::U3, zero),
            (Q4_0 | Q4_1 | Q4_K, Levels::Less(zero)) => (Codes::U4, zero),
            (Q5_0 | Q5_1 | Q5_K, Levels::Less(zero)) => (Codes::U5, zero),
            (Q6_K, Levels::Less(zero)) => (Codes::U6, zero),
            (Q8_0, Levels::Less(zero)) => (Codes::U8, zero),
            _ => return None,
        };
        let scale = match block_type {
            MXFP4 => Scale::Exponent,
            // Its scales are 8-bit floats.
            NVFP4 => return None,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ4_XS => Scale::Super { sub },
            _ => Scale::Half { group: sub },
        };
        let min = match (has_min, scale) {
            (false, _) => Min::Without,
            (true, Scale::Super { .. }) => Min::Super,
            (true, _) => Min::Half,
        };
        Some(Layout {
            codes,
            offset,
            scale,
            min,
        })
    }
}

impl PackedMatrix {
    /// Packs a matrix of blocks: row `n` of the result is row `row(n)` of `bytes`.
    ///
    /// # Panics
    /// When [`Layout::of`] knows no layout, or the blocks do not fill rows of `cols` elements.
    #[track_caller]
    pub fn from_blocks(
        pool: &Pool,
        memory: &Memory,
        block_type: BlockType,
        [rows, cols]: [usize; 2],
        bytes: &[u8],
        row: impl Fn(usize) -> usize + Sync,
    ) -> PackedMatrix {
        let Some(layout) = Layout::of(block_type) else {
            panic!("{block_type} has no packed form");
        };
        let (elements, size) = (block_type.elements(), block_type.bytes());
        assert!(
            cols.is_multiple_of(elements),
            "rows of {cols} elements in blocks of {elements}"
        );
        let row_bytes = cols / elements * size;
        let per_unit = UNIT / elements;
        PackedMatrix::pack(pool, memory, layout, [rows, cols], |n, unit, out| {
            let bytes = &bytes[row(n) * row_bytes..][..row_bytes];
            let from = unit * per_unit * size;
            let bytes = &bytes[from..row_bytes.min(from + per_unit * size)];
            match block_type {
                // The file has the codes as a plane has them.
                BlockType::Q4_0 | BlockType::Q4_1 | BlockType::IQ4_NL | BlockType::MXFP4 => {
                    bytes
                        .chunks_exact(size)
                        .enumerate()
                        .for_each(|(b, block)| nibbles(b, block, out));
                }
                BlockType::Q8_0 => {
                    bytes
                        .chunks_exact(size)
                        .enumerate()
                        .for_each(|(b, block)| bytes_8(b, block, out));
                }
                _ => {
                    let mut unit = RowUnit::ZERO;
                    let mut block = blocks::Codes::new(block_type);
                    for (index, bytes) in bytes.chunks_exact(size).enumerate() {
                        block.decode(block_type, bytes);
                        unit_part(block_type, &layout, &block, index * elements, &mut unit);
                    }
                    out.write(&unit);
                }
            }
        })
    }
}

fn half_bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// A block of 32 codes of 4 bits behind its scale (and minimum).
#[inline(always)]
fn nibbles(index: usize, block: &[u8], out: &mut UnitMut<'_>) {
    let (head, codes) = block.split_at(block.len() - STEP / 2);
    match head.len() {
        1 => out.head(index, u16::from(head[0]), 0),
        2 => out.head(index, half_bits(head, 0), 0),
        _ => out.head(index, half_bits(head, 0), half_bits(head, 2)),
    }
    let word = |i: usize| u32::from_le_bytes(codes[4 * i..][..4].try_into().expect("a word"));
    out.words(index, [word(0), word(1), word(2), word(3)]);
}

/// A block of 32 signed bytes behind its scale.
#[inline(always)]
fn bytes_8(index: usize, block: &[u8], out: &mut UnitMut<'_>) {
    out.head(index, half_bits(block, 0), 0);
    let word = |i: usize| {
        let word = u32::from_le_bytes(block[2 + 4 * i..][..4].try_into().expect("a word"));
        word ^ 0x8080_8080
    };
    out.words(index, std::array::from_fn::<u32, 8, _>(word));
}

/// Puts a block at column `at` of a unit.
fn unit_part(
    block_type: BlockType,
    layout: &Layout,
    block: &blocks::Codes,
    at: usize,
    out: &mut RowUnit,
) {
    let codes = &mut out.codes[at..at + block.len];
    codes.copy_from_slice(&block.q[..block.len]);
    if block_type == BlockType::Q1_0 {
        codes.iter_mut().for_each(|code| *code *= 2);
    }
    let bits = |value: f32| f16::from_f32(value).to_bits();
    let head = at / layout.block();
    match layout.scale {
        Scale::Half { .. } => {
            out.scales[head] = bits(block.d);
            // The block's minimum is subtracted.
            out.mins[head] = bits(-block.dmin);
        }
        // The exponent field of 2^(e - 128) is e - 1.
        Scale::Exponent => out.scales[at / STEP] = (block.d.to_bits() >> 23) as u16 + 1,
        Scale::Super { .. } => {
            (out.scales[0], out.mins[0]) = (bits(block.d), bits(block.dmin));
            for (to, from) in out.sub_scales.iter_mut().zip(block.scales) {
                *to = i8::try_from(from).expect("a scale of 8 bits");
            }
            out.sub_mins.copy_from_slice(&block.mins);
        }
    }
}
