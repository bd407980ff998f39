//! Rounds plain weights to the packed formats of our own.
//!
//! In 4 bits a group tries [`SYMMETRIC`] or [`ASYMMETRIC`] scales: each is replaced by the one that fits best to the codes
//! that it gives, and the one whose own codes have the least squared error is kept, the first of several.
//!
//! The scalar functions are the specification. Vectors try many scales side by side, with every sum in the same order, so
//! the bits are the same at all levels.

use super::UNIT;
use super::layout::{Codes, Layout, Min, Scale};
use super::matrix::PackedMatrix;
use crate::Element;
use crate::cast::widen_chunk;
use crate::dispatch::{Level, vector_kernels};
use crate::memory::Memory;
use crate::pool::Pool;
use half::f16;

mod vector;

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
        let round = rounder(pool.level(), &layout);
        let widen = widen_chunk::<E>(pool.level());
        PackedMatrix::pack(pool, memory, layout, [rows, cols], |row, unit, out| {
            let row = &matrix[row * cols..][..cols];
            let row = &row[unit * UNIT..cols.min((unit + 1) * UNIT)];
            let mut values = [0f32; UNIT];
            // SAFETY: the pool's level is supported.
            unsafe { widen(row, &mut values[..row.len()]) };
            let mut codes = [0u8; UNIT];
            for g in 0..row.len().div_ceil(group) {
                let span = g * group..(g + 1) * group;
                // SAFETY: the pool's level is supported.
                let (scale, zero) = unsafe { round(&values[span.clone()], &mut codes[span]) };
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

/// Of `(group, codes)`.
type Round = unsafe fn(&[f32], &mut [u8]) -> Rounded;

/// How a layout's groups are rounded.
fn rounder(level: Level, layout: &Layout) -> Round {
    let (vectors, scalar): (_, Round) = match (layout.codes, layout.min) {
        (Codes::U8, Min::Without) => (vector_8(level), symmetric_8),
        (Codes::U4, Min::Without) => (vector_4(level), symmetric_4),
        (Codes::U4, Min::Zero) => (vector_asymmetric_4(level), asymmetric_4),
        _ => panic!("weights are not rounded to {layout:?}"),
    };
    vectors.unwrap_or(scalar)
}

vector_kernels! {
    fn vector_8(x: &[f32], codes: &mut [u8]) -> Rounded { vector::symmetric_8 }
    fn vector_4(x: &[f32], codes: &mut [u8]) -> Rounded { vector::symmetric_4 }
    fn vector_asymmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded { vector::asymmetric_4 }
}

/// Scales that are tried for a group without a zero: how many would reach from 0 to its largest weight, negated.
const SYMMETRIC: usize = 25;
const REACHES: [f32; ROOM] = {
    let mut reaches = [0.0; ROOM];
    let mut i = 0;
    while i < ROOM {
        let step = if i < SYMMETRIC { i } else { SYMMETRIC - 1 };
        reaches[i] = -(8.0 + 0.1 * (step as f32 - 12.0));
        i += 1;
    }
    reaches
};

/// Scales with a zero that are tried for a group: the share of its range that the codes cover, twice for a zero that is
/// rounded down and one that is rounded up.
const ASYMMETRIC: usize = 26;
const SHARES: [f32; ROOM] = {
    let mut shares = [0.0; ROOM];
    let mut i = 0;
    while i < ROOM {
        let step = if i < ASYMMETRIC {
            i / 2
        } else {
            ASYMMETRIC / 2 - 1
        };
        shares[i] = 1.0 - 0.03 * step as f32;
        i += 1;
    }
    shares
};

/// Places for the scales that are tried, in whole vectors; those left over repeat the last one, and so are never kept.
const ROOM: usize = 32;

/// Adding it leaves no bit for a fraction: sums are rounded to nearest, ties to even.
const WHOLE: f32 = 12_582_912.0;

/// Numbers that are rounded side by side; a group is a multiple of it.
const LANES: usize = 16;

/// Codes from 0 to `most`, `zero` of which stands for 0.
#[derive(Clone, Copy)]
struct Grid {
    zero: f32,
    most: f32,
}

/// Codes of 4 bits.
const FOUR: Grid = Grid {
    zero: 8.0,
    most: 15.0,
};
/// Codes of 8 bits.
const EIGHT: Grid = Grid {
    zero: 128.0,
    most: 255.0,
};
/// What the largest weight is rounded to in 8 bits.
const LARGEST_8: f32 = 127.0;

impl Grid {
    /// Numbers in units of a scale, whose inverse is given, rounded to what codes stand for.
    fn levels(self, x: &[f32; LANES], inverse: f32) -> [f32; LANES] {
        let mut levels = [0f32; LANES];
        for i in 0..LANES {
            let level = (x[i] * inverse).clamp(-self.zero, self.most - self.zero);
            levels[i] = (level + WHOLE) - WHOLE;
        }
        levels
    }

    /// The scale that fits best to the codes that `scale` gives, and the squared error with its own codes.
    fn refine(self, x: &[f32], scale: f16) -> (f16, f32) {
        let (mut along, mut square) = ([0f32; LANES], [0f32; LANES]);
        let per = inverse(scale);
        for x in x.as_chunks().0 {
            let levels = self.levels(x, per);
            for i in 0..LANES {
                along[i] += x[i] * levels[i];
                square[i] += levels[i] * levels[i];
            }
        }
        let (along, square) = (sum(along), sum(square));
        let refined = match square > 0.0 {
            true => f16::from_f32(along / square),
            false => scale,
        };
        let mut error = [0f32; LANES];
        let (one, per) = (refined.to_f32(), inverse(refined));
        for x in x.as_chunks().0 {
            let levels = self.levels(x, per);
            for i in 0..LANES {
                let difference = one * levels[i] - x[i];
                error[i] += difference * difference;
            }
        }
        (refined, sum(error))
    }

    /// Writes the codes.
    fn fill(self, x: &[f32], scale: f16, codes: &mut [u8]) {
        let (codes, per) = (codes.as_chunks_mut::<LANES>().0, inverse(scale));
        for (x, codes) in x.as_chunks().0.iter().zip(codes) {
            let levels = self.levels(x, per);
            for i in 0..LANES {
                codes[i] = (levels[i] + self.zero) as u8;
            }
        }
    }
}

fn inverse(scale: f16) -> f32 {
    match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    }
}

/// The sum of all lanes, by halves.
fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

fn symmetric_8(x: &[f32], codes: &mut [u8]) -> Rounded {
    let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(largest / LARGEST_8);
    EIGHT.fill(x, scale, codes);
    (scale, 0)
}

/// The weight of largest magnitude, with its sign; the first of several.
fn largest(x: &[f32]) -> f32 {
    x.iter()
        .fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m })
}

fn symmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    // The largest weight, with its sign, gets the code that stands alone at its end: -8.
    let largest = largest(x);
    let mut best = (f32::INFINITY, f16::ZERO);
    for reach in &REACHES[..SYMMETRIC] {
        let (scale, error) = FOUR.refine(x, f16::from_f32(largest / reach));
        if error < best.0 {
            best = (error, scale);
        }
    }
    FOUR.fill(x, best.1, codes);
    (best.1, 0)
}

fn asymmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    let grid = |zero| Grid { zero, ..FOUR };
    let low = x.iter().fold(0f32, |m, &x| m.min(x));
    let high = x.iter().fold(0f32, |m, &x| m.max(x));
    let mut best = (f32::INFINITY, f16::ZERO, 0f32);
    for (i, share) in SHARES[..ASYMMETRIC].iter().enumerate() {
        let scale = f16::from_f32((high - low) * share / FOUR.most);
        // With an infinite weight it is not a number, nor is any error: the group becomes zeros.
        let zero = match -low * inverse(scale) {
            zero if zero > 0.0 => zero,
            _ => 0.0,
        };
        let zero = match i % 2 {
            0 => zero.floor(),
            _ => zero.ceil(),
        };
        let zero = zero.min(FOUR.most);
        let (scale, error) = grid(zero).refine(x, scale);
        if error < best.0 {
            best = (error, scale, zero);
        }
    }
    grid(best.2).fill(x, best.1, codes);
    (best.1, best.2 as u16)
}
