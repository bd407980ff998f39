//! A packed matrix in memory: filled a panel at a time, read back a row at a time.

use super::layout::{Codes, Layout, Min, Scale, Unit, Units};
use super::{PANEL, STEP, UNIT, UNIT_STEPS};
use crate::memory::{Buffer, Category, Memory};
use crate::pool::{Pool, SharedMut};
use half::f16;
use std::sync::Arc;

/// A unit of one row taken apart: what a file's block says, and what a packed unit stores.
///
/// Which fields count depends on the [`Layout`]; the others are zero.
#[derive(Clone, Debug)]
pub struct RowUnit {
    /// A code for each column.
    pub codes: [u8; UNIT],
    /// Scale of each group: bits of an `f16`, or an exponent.
    pub scales: [u16; UNIT_STEPS],
    /// Minimum of each group: bits of an `f16`, or the code of zero.
    pub mins: [u16; UNIT_STEPS],
    /// Byte of each sub-block.
    pub sub_scales: [i8; 2 * UNIT_STEPS],
    /// Minimum of each sub-block.
    pub sub_mins: [u8; 2 * UNIT_STEPS],
}

impl RowUnit {
    /// All zeros.
    pub const ZERO: RowUnit = RowUnit {
        codes: [0; UNIT],
        scales: [0; UNIT_STEPS],
        mins: [0; UNIT_STEPS],
        sub_scales: [0; 2 * UNIT_STEPS],
        sub_mins: [0; 2 * UNIT_STEPS],
    };

    /// The weight at column `k` of the unit.
    pub fn weight(&self, layout: &Layout, k: usize) -> f32 {
        let code = self.codes[k];
        let value = match layout.codes {
            Codes::Table(table) => f32::from(table[usize::from(code)]),
            _ => f32::from(code) - f32::from(layout.offset),
        };
        let half = |bits| f16::from_bits(bits).to_f32();
        let head = k / layout.block();
        let sub = k / layout.sub();
        let scale = match layout.scale {
            Scale::Half { .. } => half(self.scales[head]),
            Scale::Exponent => exponent(self.scales[head] as u8),
            Scale::Super { .. } => half(self.scales[head]) * f32::from(self.sub_scales[sub]),
        };
        match layout.min {
            Min::Without => scale * value,
            Min::Half => scale * value + half(self.mins[head]),
            Min::Zero => scale * (value - f32::from(self.mins[head] as u8)),
            Min::Super => scale * value - half(self.mins[head]) * f32::from(self.sub_mins[sub]),
        }
    }
}

/// `2^(e - 128)`, zero below the normal numbers.
pub(super) fn exponent(e: u8) -> f32 {
    f32::from_bits(u32::from(e).saturating_sub(1) << 23)
}

/// A matrix `[rows, cols]` of codes and scales.
pub struct PackedMatrix {
    layout: Layout,
    rows: usize,
    cols: usize,
    units: Units,
    data: Data,
}

/// Where the bytes of a matrix live.
enum Data {
    Owned(Buffer),
    /// Somebody else's memory: a mapped file.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "PackedMatrix [{}, {}] {:?}",
            self.rows, self.cols, self.layout
        )
    }
}

impl PackedMatrix {
    /// Packs a matrix unit by unit: `read(row, unit, out)` fills the unit of 256 columns (fewer at the end of a row) of a
    /// row, in any order and on all threads.
    ///
    /// # Panics
    /// On a layout with an impossible group.
    #[track_caller]
    pub fn pack(
        pool: &Pool,
        memory: &Memory,
        layout: Layout,
        [rows, cols]: [usize; 2],
        read: impl Fn(usize, usize, &mut RowUnit) + Sync,
    ) -> PackedMatrix {
        let units = Units::new(&layout, cols);
        let panels = rows.div_ceil(PANEL);
        let mut data = memory.alloc(panels * units.bytes(), Category::Weights);
        let view = SharedMut::new(&mut data.block_mut()[..panels * units.bytes()]);
        pool.run(panels, |panel, _| {
            // SAFETY: a task has its own panel.
            let bytes = unsafe { view.slice(panel * units.bytes(), units.bytes()) };
            let mut unit_rows = vec![RowUnit::ZERO; PANEL];
            for index in 0..units.len() {
                let (unit, start) = units.at(index);
                for (r, out) in unit_rows.iter_mut().enumerate() {
                    match panel * PANEL + r {
                        row if row < rows => read(row, index, out),
                        _ => *out = RowUnit::ZERO,
                    }
                }
                write_unit(
                    &layout,
                    &unit,
                    &unit_rows,
                    &mut bytes[start..][..unit.bytes],
                );
            }
        });
        PackedMatrix {
            layout,
            rows,
            cols,
            units,
            data: Data::Owned(data),
        }
    }

    /// A matrix over bytes that were packed before, as [`PackedMatrix::bytes`] gave them.
    ///
    /// # Panics
    /// When the number of bytes is not that of the shape; see [`PackedMatrix::packed_bytes`].
    #[track_caller]
    pub fn from_bytes(
        layout: Layout,
        [rows, cols]: [usize; 2],
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    ) -> PackedMatrix {
        let expected = Self::packed_bytes(&layout, [rows, cols]);
        assert_eq!(
            (*bytes).as_ref().len(),
            expected,
            "bytes of a packed matrix [{rows}, {cols}]"
        );
        PackedMatrix {
            layout,
            rows,
            cols,
            units: Units::new(&layout, cols),
            data: Data::Shared(bytes),
        }
    }

    /// Bytes of a packed matrix of a shape.
    pub fn packed_bytes(layout: &Layout, [rows, cols]: [usize; 2]) -> usize {
        rows.div_ceil(PANEL) * Units::new(layout, cols).bytes()
    }

    /// How it is stored.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Rows, `N`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Steps of a row, the padding of its last group included.
    pub(super) fn steps(&self) -> usize {
        self.units.steps()
    }

    pub(super) fn units(&self) -> &Units {
        &self.units
    }

    /// All panels.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Owned(buffer) => &buffer.block()[..buffer.bytes()],
            Data::Shared(bytes) => (**bytes).as_ref(),
        }
    }

    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.bytes()[panel * self.units.bytes()..][..self.units.bytes()]
    }

    /// Takes unit `index` of a row apart again.
    pub fn row_unit(&self, row: usize, index: usize, out: &mut RowUnit) {
        let (unit, start) = self.units.at(index);
        let bytes = &self.panel(row / PANEL)[start..][..unit.bytes];
        read_unit(&self.layout, &unit, bytes, row % PANEL, out);
    }

    /// Writes row `row` as plain numbers.
    ///
    /// # Panics
    /// When `out` does not hold exactly a row.
    #[track_caller]
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "elements of a row");
        let mut unit = RowUnit::ZERO;
        for (index, out) in out.chunks_mut(UNIT).enumerate() {
            self.row_unit(row, index, &mut unit);
            for (k, out) in out.iter_mut().enumerate() {
                *out = unit.weight(&self.layout, k);
            }
        }
    }

    /// Writes some rows as plain elements.
    ///
    /// # Panics
    /// When `out` does not hold exactly these rows.
    #[track_caller]
    pub fn unpack_rows<E: crate::Element>(
        &self,
        pool: &Pool,
        rows: std::ops::Range<usize>,
        out: &mut [E],
    ) {
        let cols = self.cols;
        assert_eq!(
            out.len(),
            rows.len() * cols,
            "elements of {} rows of {cols}",
            rows.len()
        );
        let out = SharedMut::new(out);
        pool.run(rows.len(), |task, _| {
            let mut row = vec![0f32; cols];
            self.unpack_row(rows.start + task, &mut row);
            // SAFETY: each task writes its own row alone.
            let out = unsafe { out.slice(task * cols, cols) };
            for (out, value) in out.iter_mut().zip(&row) {
                *out = E::from_f64(f64::from(*value));
            }
        });
    }
}

/// The byte of a plane's word that holds column `4 j + b` of a step: the plane keeps vectors `j` with the same
/// `j % (8 bits a byte)` in one 64-byte row, the first in the lowest bits.
fn place(bits: usize, j: usize) -> (usize, usize) {
    let rows = bits;
    (j % rows, j / rows * bits)
}

fn write_unit(layout: &Layout, unit: &Unit, rows: &[RowUnit], bytes: &mut [u8]) {
    let (scale_bytes, min_bytes) = (
        match layout.scale {
            Scale::Exponent => 1,
            _ => 2,
        },
        match layout.min {
            Min::Without => 0,
            Min::Zero => 1,
            _ => 2,
        },
    );
    let mut put = |at: usize, width: usize, r: usize, value: u16| match width {
        0 => {}
        1 => bytes[at + r] = value as u8,
        _ => bytes[at + 2 * r..][..2].copy_from_slice(&value.to_le_bytes()),
    };
    let heads = unit.heads();
    for (r, row) in rows.iter().enumerate() {
        for head in 0..heads {
            let (scales, mins) = (head * PANEL * scale_bytes, head * PANEL * min_bytes);
            put(scales, scale_bytes, r, row.scales[head]);
            put(unit.mins + mins, min_bytes, r, row.mins[head]);
        }
        if let Scale::Super { sub } = layout.scale {
            for s in 0..unit.steps * STEP / sub {
                put(
                    unit.sub_scales + s * PANEL,
                    1,
                    r,
                    row.sub_scales[s] as u8 as u16,
                );
                if layout.min == Min::Super {
                    put(unit.sub_mins + s * PANEL, 1, r, u16::from(row.sub_mins[s]));
                }
            }
        }
    }
    let (low, high) = (layout.codes.low_bits(), layout.codes.bits());
    for step in 0..unit.steps {
        let plane = &mut bytes[unit.planes + step * high * 64..][..high * 64];
        plane.fill(0);
        for (r, row) in rows.iter().enumerate() {
            let codes: &[u8; STEP] = row.codes[step * STEP..][..STEP].try_into().expect("a step");
            write_codes(codes, low, high, r, plane);
        }
    }
}

/// Adds one row's codes of a step to its planes, four columns at a time.
#[inline]
fn write_codes(codes: &[u8; STEP], low: usize, bits: usize, r: usize, plane: &mut [u8]) {
    let mask = 0x0101_0101 * ((1u32 << low) - 1);
    for (j, four) in codes.as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(*four);
        let mut or = |at: usize, value: u32| {
            let at: &mut [u8; 4] = (&mut plane[at..][..4]).try_into().expect("a word");
            *at = (u32::from_le_bytes(*at) | value).to_le_bytes();
        };
        let (row, shift) = place(low, j);
        or(row * 64 + 4 * r, (word & mask) << shift);
        if bits > low {
            let (row, shift) = place(bits - low, j);
            let high = ((word & !mask) >> low) & (0x0101_0101 * ((1 << (bits - low)) - 1));
            or((low + row) * 64 + 4 * r, high << shift);
        }
    }
}

fn read_unit(layout: &Layout, unit: &Unit, bytes: &[u8], r: usize, out: &mut RowUnit) {
    let get = |at: usize, width: usize| match width {
        1 => u16::from(bytes[at + r]),
        _ => u16::from_le_bytes([bytes[at + 2 * r], bytes[at + 2 * r + 1]]),
    };
    for head in 0..unit.heads() {
        out.scales[head] = match layout.scale {
            Scale::Exponent => get(head * PANEL, 1),
            _ => get(head * PANEL * 2, 2),
        };
        out.mins[head] = match layout.min {
            Min::Without => 0,
            Min::Zero => get(unit.mins + head * PANEL, 1),
            _ => get(unit.mins + head * PANEL * 2, 2),
        };
    }
    if let Scale::Super { sub } = layout.scale {
        for s in 0..unit.steps * STEP / sub {
            out.sub_scales[s] = get(unit.sub_scales + s * PANEL, 1) as u8 as i8;
            if layout.min == Min::Super {
                out.sub_mins[s] = get(unit.sub_mins + s * PANEL, 1) as u8;
            }
        }
    }
    let (low, bits) = (layout.codes.low_bits(), layout.codes.bits());
    for step in 0..unit.steps {
        let plane = &bytes[unit.planes + step * bits * 64..][..bits * 64];
        for k in 0..STEP {
            let (j, b) = (k / 4, k % 4);
            let pick = |bits: usize, from: usize| {
                let (row, shift) = place(bits, j);
                plane[(from + row) * 64 + 4 * r + b] >> shift & ((1u16 << bits) - 1) as u8
            };
            let mut code = pick(low, 0);
            if bits > low {
                code |= pick(bits - low, low) << low;
            }
            out.codes[step * STEP + k] = code;
        }
    }
}
