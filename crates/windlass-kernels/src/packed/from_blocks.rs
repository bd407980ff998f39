//! Packed matrices from the blocks of a file: the same codes and scales, in other places.

use super::layout::{Codes, Layout, Min, Scale, Units};
use super::matrix::PackedMatrix;
use super::unit::{RowUnit, UnitMut};
use super::{PANEL, STEP, UNIT, UNIT_STEPS};
use crate::blocks::{self, BlockType, Levels};
use crate::memory::Memory;
use crate::pool::Pool;
use half::f16;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    /// # Errors
    /// The first block of `bytes` with a scale that is infinite or no number, of those rows, as
    /// [`blocks::first_bad_block`] has it.
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
    ) -> Result<PackedMatrix, usize> {
        let Some(layout) = Layout::of(block_type) else {
            panic!("{block_type} has no packed form");
        };
        let elements = block_type.elements();
        assert!(
            cols.is_multiple_of(elements),
            "rows of {cols} elements in blocks of {elements}"
        );
        let blocks = cols / elements;
        let row_bytes = blocks * block_type.bytes();
        let nothing = vec![0; row_bytes];
        let fill = fill(block_type);
        let first_bad = AtomicUsize::new(usize::MAX);
        let packed = Self::pack_panels(pool, memory, layout, [rows, cols], |panel, units, out| {
            let rows: [&[u8]; PANEL] = std::array::from_fn(|lane| {
                let n = panel * PANEL + lane;
                if n >= rows {
                    return &nothing[..];
                }
                let n = row(n);
                let bytes = &bytes[n * row_bytes..][..row_bytes];
                // Here, where they are in the caches when they are packed next.
                if let Some(bad) = blocks::first_bad_block(block_type, bytes) {
                    first_bad.fetch_min(n * blocks + bad, Ordering::Relaxed);
                }
                bytes
            });
            fill(block_type, &layout, units, &rows, out);
        });
        match first_bad.into_inner() {
            usize::MAX => Ok(packed),
            bad => Err(bad),
        }
    }
}

/// Writes a panel of the blocks of its rows.
type Fill = fn(BlockType, &Layout, &Units, &[&[u8]; PANEL], &mut [u8]);

fn fill(block_type: BlockType) -> Fill {
    use BlockType::*;
    match block_type {
        // The file has the codes as a plane has them.
        Q4_0 | IQ4_NL => copied::<18, 4>,
        Q4_1 => copied::<20, 4>,
        MXFP4 => copied::<17, 4>,
        Q8_0 => copied::<34, 8>,
        _ => decoded,
    }
}

/// [`Fill`] for blocks of a step: `SIZE` bytes, a head and `WORDS` words of four columns.
fn copied<const SIZE: usize, const WORDS: usize>(
    _: BlockType,
    layout: &Layout,
    units: &Units,
    rows: &[&[u8]; PANEL],
    out: &mut [u8],
) {
    let head = SIZE - 4 * WORDS;
    let rows = rows.map(|row| row.as_chunks::<SIZE>().0);
    // Signed bytes in a file are unsigned in a plane.
    let flipped = match layout.codes {
        Codes::U8 => 0x8080_8080,
        _ => 0,
    };
    for index in 0..units.len() {
        let (unit, start) = units.at(index);
        let out = &mut out[start..][..unit.bytes];
        let rows = rows.map(|row| &row[index * UNIT_STEPS..][..unit.steps]);
        let (words, _) = out[unit.planes..].as_chunks_mut::<4>();
        let (planes, _) = words.as_chunks_mut::<PANEL>();
        for (step, planes) in planes.as_chunks_mut::<WORDS>().0.iter_mut().enumerate() {
            for (lane, row) in rows.iter().enumerate() {
                let (words, _) = row[step][head..].as_chunks::<4>();
                for (plane, word) in planes.iter_mut().zip(words) {
                    plane[lane] = (u32::from_le_bytes(*word) ^ flipped).to_le_bytes();
                }
            }
        }
        for (lane, row) in rows.iter().enumerate() {
            let mut out = UnitMut::new(layout, unit, out, lane);
            for (step, block) in row.iter().enumerate() {
                let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
                match head {
                    1 => out.head(step, u16::from(block[0]), 0),
                    2 => out.head(step, half(0), 0),
                    _ => out.head(step, half(0), half(2)),
                }
            }
        }
    }
}

/// [`Fill`] for all others.
fn decoded(
    block_type: BlockType,
    layout: &Layout,
    units: &Units,
    rows: &[&[u8]; PANEL],
    out: &mut [u8],
) {
    let (elements, size) = (block_type.elements(), block_type.bytes());
    let mut block = blocks::Codes::new(block_type);
    for index in 0..units.len() {
        let (unit, start) = units.at(index);
        for (lane, row) in rows.iter().enumerate() {
            let from = index * UNIT / elements * size;
            let row = &row[from..row.len().min(from + UNIT / elements * size)];
            let mut codes = RowUnit::ZERO;
            for (b, bytes) in row.chunks_exact(size).enumerate() {
                block.decode(block_type, bytes);
                unit_part(block_type, layout, &block, b * elements, &mut codes);
            }
            UnitMut::new(layout, unit, &mut out[start..][..unit.bytes], lane).write(&codes);
        }
    }
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
