//! A unit of one row: written into its lane of a panel, and taken apart again.

use super::layout::{Codes, Layout, Min, Scale, Unit};
use super::{PANEL, STEP, UNIT, UNIT_STEPS};
use half::f16;

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
#[inline(always)]
pub(super) fn exponent(e: u8) -> f32 {
    f32::from_bits(u32::from(e).saturating_sub(1) << 23)
}

/// The place of one row's unit in a panel, to be written once.
pub struct UnitMut<'a> {
    layout: &'a Layout,
    unit: Unit,
    bytes: &'a mut [u8],
    lane: usize,
}

impl<'a> UnitMut<'a> {
    pub(super) fn new(layout: &'a Layout, unit: Unit, bytes: &'a mut [u8], lane: usize) -> Self {
        UnitMut {
            layout,
            unit,
            bytes,
            lane,
        }
    }

    /// Steps of the unit.
    pub fn steps(&self) -> usize {
        self.unit.steps
    }

    #[inline]
    fn put8(&mut self, at: usize, value: u8) {
        self.bytes[at + self.lane] = value;
    }

    #[inline]
    fn put16(&mut self, at: usize, value: u16) {
        self.bytes[at + 2 * self.lane..][..2].copy_from_slice(&value.to_le_bytes());
    }

    /// Scale and minimum of group `head`, as in [`RowUnit`].
    #[inline]
    pub fn head(&mut self, head: usize, scale: u16, min: u16) {
        match self.layout.scale {
            Scale::Exponent => self.put8(head * PANEL, scale as u8),
            _ => self.put16(2 * head * PANEL, scale),
        }
        let mins = self.unit.mins;
        match self.layout.min {
            Min::Without => {}
            Min::Zero => self.put8(mins + head * PANEL, min as u8),
            _ => self.put16(mins + 2 * head * PANEL, min),
        }
    }

    /// Scale and minimum of sub-block `sub`, where the layout has them.
    #[inline]
    pub fn sub(&mut self, sub: usize, scale: i8, min: u8) {
        if let Scale::Super { .. } = self.layout.scale {
            self.put8(self.unit.sub_scales + sub * PANEL, scale as u8);
            if self.layout.min == Min::Super {
                self.put8(self.unit.sub_mins + sub * PANEL, min);
            }
        }
    }

    /// Writes the rows of a step's planes: one word for each of the layout's bits.
    #[inline(always)]
    fn step<const BITS: usize>(&mut self, step: usize, words: &[u32]) {
        let lane = self.lane % PANEL;
        let planes = &mut self.bytes[self.unit.planes + step * BITS * 64..][..BITS * 64];
        let (rows, _) = planes.as_chunks_mut::<64>();
        for (row, word) in rows.iter_mut().zip(&words[..BITS]) {
            row.as_chunks_mut::<4>().0[lane] = word.to_le_bytes();
        }
    }

    /// The codes of a step.
    #[inline]
    pub fn codes(&mut self, step: usize, codes: &[u8; STEP]) {
        match self.layout.codes {
            Codes::U2 => self.step::<2>(step, &planes::<2, 0>(codes)),
            Codes::U3 => self.step::<3>(step, &planes::<2, 1>(codes)),
            Codes::U4 | Codes::Table(_) => self.step::<4>(step, &planes::<4, 0>(codes)),
            Codes::U5 => self.step::<5>(step, &planes::<4, 1>(codes)),
            Codes::U6 => self.step::<6>(step, &planes::<4, 2>(codes)),
            Codes::U8 => self.step::<8>(step, &planes::<8, 0>(codes)),
        }
    }

    /// All of the unit.
    pub fn write(&mut self, unit: &RowUnit) {
        for head in 0..self.unit.heads() {
            self.head(head, unit.scales[head], unit.mins[head]);
        }
        if let Scale::Super { sub } = self.layout.scale {
            for s in 0..self.unit.steps * STEP / sub {
                self.sub(s, unit.sub_scales[s], unit.sub_mins[s]);
            }
        }
        for (step, codes) in unit.codes.as_chunks::<STEP>().0[..self.unit.steps]
            .iter()
            .enumerate()
        {
            self.codes(step, codes);
        }
    }
}

/// The words of a step's codes: a plane of `LOW` bits, then one of `HIGH`.
#[inline(always)]
fn planes<const LOW: usize, const HIGH: usize>(codes: &[u8; STEP]) -> [u32; 8] {
    let mut planes = [0u32; 8];
    let low_bits = 0x0101_0101 * ((1u32 << LOW) - 1);
    let high_bits = 0x0101_0101 * ((1u32 << HIGH) - 1);
    for (j, four) in codes.as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(*four);
        let (row, shift) = place(LOW, j);
        planes[row] |= (word & low_bits) << shift;
        if HIGH > 0 {
            let (row, shift) = place(HIGH, j);
            planes[LOW + row] |= (word >> LOW & high_bits) << shift;
        }
    }
    planes
}

/// Where a plane of some bits keeps the codes of columns `4 j..4 j + 4`: row of 64 bytes, and lowest bit. Vectors `j` with
/// the same remainder share a row.
#[inline(always)]
pub(super) fn place(bits: usize, j: usize) -> (usize, usize) {
    (j % bits, j / bits * bits)
}

/// Takes the unit of lane `r` apart again.
pub(super) fn read_unit(layout: &Layout, unit: &Unit, bytes: &[u8], r: usize, out: &mut RowUnit) {
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
