//! Blocks of a packed matrix as plain elements, for products that must not round their other operand.
//!
//! One body, compiled for each level; every operation in it is exact or rounded once, in the order of
//! [`RowUnit::weight`](super::RowUnit::weight), so all levels give that function's bits.

use super::layout::{Codes, Layout, Min, Scale, Unit};
use super::matrix::PackedMatrix;
use super::unit::{exponent, place};
use super::{PANEL, STEP, UNIT};
use crate::Element;
use crate::cast::narrow_chunk;
use crate::dispatch::Level;
use crate::pool::{Pool, SharedMut};
use half::f16;
use std::ops::Range;

/// Numbers of a unit of a panel, a row of 256 after another: room that [`Unpack::block`] asks for.
pub(crate) const ROOM: usize = PANEL * UNIT;

/// Reads blocks of a matrix.
pub(crate) struct Unpack<'a, E> {
    matrix: &'a PackedMatrix,
    numbers: Numbers,
    narrow: unsafe fn(&[f32], &mut [E]),
}

impl<'a, E: Element> Unpack<'a, E> {
    /// Of `matrix`, with what `level` has.
    ///
    /// # Safety
    /// The machine has `level`.
    pub(crate) unsafe fn new(matrix: &'a PackedMatrix, level: Level) -> Self {
        Unpack {
            matrix,
            numbers: numbers(level),
            narrow: narrow_chunk::<E>(level),
        }
    }

    /// Writes rows `rows` of columns `cols` to `out`, rows after each other, by way of `room` ([`ROOM`] numbers).
    ///
    /// # Panics
    /// When the block is not within the matrix, or `room` or `out` is too short.
    pub(crate) fn block(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        room: &mut [f32],
        out: &mut [E],
    ) {
        let matrix = self.matrix;
        for panel in rows.start / PANEL..rows.end.div_ceil(PANEL) {
            let top = panel * PANEL;
            let lanes = rows.start.saturating_sub(top)..(rows.end - top).min(PANEL);
            for index in cols.start / UNIT..cols.end.div_ceil(UNIT) {
                let (unit, start) = matrix.units().at(index);
                let bytes = &matrix.panel(panel)[start..][..unit.bytes];
                let from = cols.start.saturating_sub(index * UNIT);
                let to = (cols.end - index * UNIT).min(UNIT);
                let steps = from / STEP..to.div_ceil(STEP);
                // SAFETY: the level is supported.
                unsafe {
                    (self.numbers)(matrix.layout(), &unit, bytes, steps, lanes.clone(), room)
                };
                for lane in lanes.clone() {
                    let at =
                        (top + lane - rows.start) * cols.len() + index * UNIT + from - cols.start;
                    // SAFETY: the level is supported.
                    unsafe {
                        (self.narrow)(&room[lane * UNIT..][from..to], &mut out[at..][..to - from])
                    };
                }
            }
        }
    }
}

impl PackedMatrix {
    /// Writes some rows as plain elements.
    ///
    /// # Panics
    /// When they are not within the matrix, or `out` does not hold exactly them.
    #[track_caller]
    pub fn unpack_rows<E: Element>(&self, pool: &Pool, rows: Range<usize>, out: &mut [E]) {
        let cols = self.cols();
        assert!(rows.end <= self.rows(), "rows {rows:?} of {self:?}");
        assert_eq!(
            out.len(),
            rows.len() * cols,
            "elements of {} rows of {cols}",
            rows.len()
        );
        if out.is_empty() {
            return;
        }
        // SAFETY: the pool's level is supported.
        let unpack = unsafe { Unpack::new(self, pool.level()) };
        let out = SharedMut::new(out);
        let first = rows.start / PANEL;
        pool.run(rows.end.div_ceil(PANEL) - first, |task, worker| {
            let top = (first + task) * PANEL;
            let part = top.max(rows.start)..(top + PANEL).min(rows.end);
            // SAFETY: a task has its own rows.
            let out = unsafe { out.slice((part.start - rows.start) * cols, part.len() * cols) };
            unpack.block(part, 0..cols, worker.scratch(ROOM), out);
        });
    }
}

/// Of `(layout, unit, its bytes, steps, lanes, values)`.
type Numbers = unsafe fn(&Layout, &Unit, &[u8], Range<usize>, Range<usize>, &mut [f32]);

fn numbers(level: Level) -> Numbers {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2(
            l: &Layout,
            u: &Unit,
            b: &[u8],
            steps: Range<usize>,
            lanes: Range<usize>,
            values: &mut [f32],
        ) {
            by_codes(l, u, b, steps, lanes, values);
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
        unsafe fn avx512(
            l: &Layout,
            u: &Unit,
            b: &[u8],
            steps: Range<usize>,
            lanes: Range<usize>,
            values: &mut [f32],
        ) {
            by_codes(l, u, b, steps, lanes, values);
        }
        match level {
            Level::Scalar => by_codes,
            Level::Avx2 => avx2,
            Level::Avx512 | Level::Amx => avx512,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        by_codes
    }
}

#[inline(always)]
fn by_codes(
    layout: &Layout,
    unit: &Unit,
    bytes: &[u8],
    steps: Range<usize>,
    lanes: Range<usize>,
    values: &mut [f32],
) {
    let work = Work {
        layout,
        unit,
        bytes,
    };
    match layout.codes {
        Codes::U2 => work.run::<2, 0, false>(steps, lanes, values),
        Codes::U3 => work.run::<2, 1, false>(steps, lanes, values),
        Codes::U4 => work.run::<4, 0, false>(steps, lanes, values),
        Codes::U5 => work.run::<4, 1, false>(steps, lanes, values),
        Codes::U6 => work.run::<4, 2, false>(steps, lanes, values),
        Codes::U8 => work.run::<8, 0, false>(steps, lanes, values),
        Codes::Table(_) => work.run::<4, 0, true>(steps, lanes, values),
    }
}

/// A unit of a panel.
struct Work<'a> {
    layout: &'a Layout,
    unit: &'a Unit,
    bytes: &'a [u8],
}

/// What the numbers of half a step are made with, for each row: `scale * (value - zero) + plus`.
struct Scales {
    scale: [f32; PANEL],
    zero: [f32; PANEL],
    plus: [f32; PANEL],
}

impl Work<'_> {
    #[inline(always)]
    fn run<const LOW: usize, const HIGH: usize, const TABLE: bool>(
        &self,
        steps: Range<usize>,
        lanes: Range<usize>,
        values: &mut [f32],
    ) {
        let offset = f32::from(self.layout.offset);
        let table = match self.layout.codes {
            Codes::Table(table) => table.map(f32::from),
            _ => [0.0; 16],
        };
        for step in steps {
            let plane = &self.bytes[self.unit.planes + step * (LOW + HIGH) * 64..];
            let plane = &plane.as_chunks::<64>().0[..LOW + HIGH];
            let scales = [self.scales(step, 0), self.scales(step, 1)];
            for lane in lanes.clone() {
                let codes = row_codes::<LOW, HIGH>(plane, lane);
                let row = &mut values[lane * UNIT + step * STEP..][..STEP];
                let halves = row.as_chunks_mut::<16>().0.iter_mut();
                for ((out, codes), s) in halves.zip(codes.as_chunks::<16>().0).zip(&scales) {
                    let (scale, zero, plus) = (s.scale[lane], s.zero[lane], s.plus[lane]);
                    for (out, &code) in out.iter_mut().zip(codes) {
                        let value = match TABLE {
                            true => table[usize::from(code & 15)],
                            false => f32::from(code) - offset,
                        };
                        *out = scale * (value - zero) + plus;
                    }
                }
            }
        }
    }

    /// For half `half` of step `step`.
    #[inline(always)]
    fn scales(&self, step: usize, half: usize) -> Scales {
        let (unit, layout) = (self.unit, self.layout);
        let head = step >> unit.group_shift;
        let bytes = |at: usize| -> &[u8; PANEL] {
            self.bytes[at..].first_chunk().expect("a byte of each row")
        };
        let halves = |at: usize| -> [f32; PANEL] {
            let pairs = &self.bytes[at + 2 * head * PANEL..][..2 * PANEL];
            std::array::from_fn(|r| {
                f16::from_bits(u16::from_le_bytes([pairs[2 * r], pairs[2 * r + 1]])).to_f32()
            })
        };
        let sub = match layout.scale {
            Scale::Super { sub: 16 } => 2 * step + half,
            _ => step,
        };
        let scale = match layout.scale {
            Scale::Half { .. } => halves(0),
            Scale::Exponent => bytes(head * PANEL).map(exponent),
            Scale::Super { .. } => {
                let (scales, subs) = (halves(0), bytes(unit.sub_scales + sub * PANEL));
                std::array::from_fn(|r| scales[r] * f32::from(subs[r] as i8))
            }
        };
        // Adding -0 changes no number, not even zero's sign.
        let (mut zero, mut plus) = ([0.0; PANEL], [-0.0; PANEL]);
        match layout.min {
            Min::Without => {}
            Min::Half => plus = halves(unit.mins),
            Min::Zero => zero = bytes(unit.mins + head * PANEL).map(f32::from),
            Min::Super => {
                let (mins, subs) = (halves(unit.mins), bytes(unit.sub_mins + sub * PANEL));
                plus = std::array::from_fn(|r| -(mins[r] * f32::from(subs[r])));
            }
        }
        Scales { scale, zero, plus }
    }
}

/// The codes of a step of the row in lane `lane`.
#[inline(always)]
fn row_codes<const LOW: usize, const HIGH: usize>(plane: &[[u8; 64]], lane: usize) -> [u8; STEP] {
    let word = |bits: usize, from: usize, j: usize| {
        let (row, shift) = place(bits, j);
        let four = plane[from + row][4 * lane..].first_chunk::<4>();
        let mask = 0x0101_0101 * ((1u32 << bits) - 1);
        u32::from_le_bytes(*four.expect("a word of each row")) >> shift & mask
    };
    let mut codes = [0; STEP];
    for (j, four) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut word4 = word(LOW, 0, j);
        if HIGH > 0 {
            word4 |= word(HIGH, LOW, j) << LOW;
        }
        *four = word4.to_le_bytes();
    }
    codes
}
