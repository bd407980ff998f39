//! Rounds plain weights to the packed formats of our own.

use super::UNIT;
use super::layout::{Codes, Layout, Min, Scale};
use super::matrix::PackedMatrix;
use crate::Element;
use crate::memory::Memory;
use crate::pool::Pool;
use half::f16;

impl PackedMatrix {
    /// Rounds a matrix `[rows, cols]` to a layout with a scale for each group and no minimum but maybe a zero:
    /// [`Layout::q4`], [`Layout::q4_asymmetric`], [`Layout::q8`]. In 4 bits, scales (and zeros) are searched for that make
    /// the squared error of the group least.
    ///
    /// # Panics
    /// When the layout is another, or `matrix` is not of the shape.
    #[track_caller]
    pub fn quantize<E: Element>(
        pool: &Pool,
        memory: &Memory,
        layout: Layout,
        [rows, cols]: [usize; 2],
        matrix: &[E],
    ) -> PackedMatrix {
        assert_eq!(
            matrix.len(),
            rows * cols,
            "elements of a matrix [{rows}, {cols}]"
        );
        let Scale::Half { group } = layout.scale else {
            panic!("weights are rounded to one scale a group, not to {layout:?}");
        };
        let round = match (layout.codes, layout.min) {
            (Codes::U8, Min::Without) => symmetric_8,
            (Codes::U4, Min::Without) => symmetric_4,
            (Codes::U4, Min::Zero) => asymmetric_4,
            _ => panic!("weights are not rounded to {layout:?}"),
        };
        PackedMatrix::pack(pool, memory, layout, [rows, cols], |row, unit, out| {
            let row = &matrix[row * cols..][..cols];
            let row = &row[unit * UNIT..cols.min((unit + 1) * UNIT)];
            let mut values = [0f32; UNIT];
            for (value, weight) in values.iter_mut().zip(row) {
                *value = weight.to_f64() as f32;
            }
            let mut codes = [0u8; UNIT];
            for g in 0..row.len().div_ceil(group) {
                let span = g * group..(g + 1) * group;
                let (scale, zero) = round(&values[span.clone()], &mut codes[span]);
                out.head(g, scale.to_bits(), zero);
            }
            for step in 0..out.steps() {
                out.codes(step, &codes.as_chunks().0[step]);
            }
        })
    }
}

/// Scale of a group, and its code of zero where it has one.
type Rounded = (f16, u16);

fn symmetric_8(x: &[f32], codes: &mut [u8]) -> Rounded {
    let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(largest / 127.0);
    fill(x, scale, 128.0, 255.0, codes);
    (scale, 0)
}

/// Codes for a scale; returns the squared error.
fn fill(x: &[f32], scale: f16, zero: f32, most: f32, codes: &mut [u8]) -> f32 {
    let scale = scale.to_f32();
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut error = 0.0;
    for (x, code) in x.iter().zip(codes) {
        let rounded = ((x * inverse).round_ties_even() + zero).clamp(0.0, most);
        let difference = scale * (rounded - zero) - x;
        error += difference * difference;
        *code = rounded as u8;
    }
    error
}

/// How finely the searches step, and how far.
const TRIES: i32 = 12;

fn symmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    // The largest weight, with its sign, gets the code that stands alone at its end: -8.
    let largest = x
        .iter()
        .fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let mut best = (f32::INFINITY, f16::ZERO);
    let mut trial = [0u8; UNIT];
    for step in -TRIES..=TRIES {
        let start = largest / -(8.0 + 0.1 * step as f32);
        let scale = f16::from_f32(start);
        fill(x, scale, 8.0, 15.0, &mut trial[..x.len()]);
        // The best scale for these codes.
        let (mut along, mut square) = (0f32, 0f32);
        for (x, &code) in x.iter().zip(&trial) {
            let level = f32::from(code) - 8.0;
            along += x * level;
            square += level * level;
        }
        let scale = f16::from_f32(if square > 0.0 { along / square } else { start });
        let error = fill(x, scale, 8.0, 15.0, &mut trial[..x.len()]);
        if error < best.0 {
            best = (error, scale);
        }
    }
    fill(x, best.1, 8.0, 15.0, codes);
    (best.1, 0)
}

fn asymmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    let low = x.iter().fold(0f32, |m, &x| m.min(x));
    let high = x.iter().fold(0f32, |m, &x| m.max(x));
    let mut best = (f32::INFINITY, f16::ZERO, 0f32);
    let mut trial = [0u8; UNIT];
    for step in 0..=TRIES {
        let range = (high - low) * (1.0 - 0.03 * step as f32);
        let scale = f16::from_f32(range / 15.0);
        let zero = if scale == f16::ZERO {
            0.0
        } else {
            -low / scale.to_f32()
        };
        for zero in [zero.floor(), zero.ceil()].map(|zero| zero.clamp(0.0, 15.0)) {
            fill(x, scale, zero, 15.0, &mut trial[..x.len()]);
            let (mut along, mut square) = (0f32, 0f32);
            for (x, &code) in x.iter().zip(&trial) {
                let level = f32::from(code) - zero;
                along += x * level;
                square += level * level;
            }
            let refined = if square > 0.0 {
                f16::from_f32(along / square)
            } else {
                scale
            };
            let error = fill(x, refined, zero, 15.0, &mut trial[..x.len()]);
            if error < best.0 {
                best = (error, refined, zero);
            }
        }
    }
    fill(x, best.1, best.2, 15.0, codes);
    (best.1, best.2 as u16)
}
