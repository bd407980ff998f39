//! Rounds plain weights to the packed formats of our own.

use super::UNIT;
use super::layout::{Codes, Layout, Min, Scale};
use super::matrix::PackedMatrix;
use crate::Element;
use crate::dispatch::Level;
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
        let round = rounder(pool.level(), &layout);
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

/// How a layout's groups are rounded; the same code compiled for each level, whose sums have lanes of their own: the bits are
/// the same on all.
fn rounder(level: Level, layout: &Layout) -> Round {
    macro_rules! at {
        ($round:ident) => {{
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                unsafe fn avx2(x: &[f32], codes: &mut [u8]) -> Rounded {
                    $round(x, codes)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                unsafe fn avx512(x: &[f32], codes: &mut [u8]) -> Rounded {
                    $round(x, codes)
                }
                match level {
                    Level::Scalar => $round,
                    Level::Avx2 => avx2,
                    Level::Avx512 | Level::Amx => avx512,
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                $round
            }
        }};
    }
    match (layout.codes, layout.min) {
        (Codes::U8, Min::Without) => at!(symmetric_8),
        (Codes::U4, Min::Without) => at!(symmetric_4),
        (Codes::U4, Min::Zero) => at!(asymmetric_4),
        _ => panic!("weights are not rounded to {layout:?}"),
    }
}

/// Numbers that are rounded side by side; a group is a multiple of it.
const LANES: usize = 16;

/// Codes from 0 to `most`, `zero` of which stands for 0.
#[derive(Clone, Copy)]
struct Grid {
    zero: f32,
    most: f32,
}

impl Grid {
    /// Numbers in units of a scale, whose inverse is given, rounded to what codes stand for.
    #[inline(always)]
    fn levels(self, x: &[f32; LANES], inverse: f32) -> [f32; LANES] {
        // Adding it leaves no bit for a fraction: sums are rounded to nearest, ties to even.
        const WHOLE: f32 = 12_582_912.0;
        // Loops, here and below: `map` is a function of its own, without the level's instructions.
        let mut levels = [0f32; LANES];
        for i in 0..LANES {
            let level = (x[i] * inverse).clamp(-self.zero, self.most - self.zero);
            levels[i] = (level + WHOLE) - WHOLE;
        }
        levels
    }

    /// The scale that fits best to the codes that `scale` gives, and the squared error with its own codes.
    #[inline(always)]
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
    #[inline(always)]
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

#[inline(always)]
fn inverse(scale: f16) -> f32 {
    match scale.to_f32() {
        0.0 => 0.0,
        scale => 1.0 / scale,
    }
}

/// The sum of all lanes, by halves.
#[inline(always)]
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

#[inline(always)]
fn symmetric_8(x: &[f32], codes: &mut [u8]) -> Rounded {
    let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
    let scale = f16::from_f32(largest / 127.0);
    let book = Grid {
        zero: 128.0,
        most: 255.0,
    };
    book.fill(x, scale, codes);
    (scale, 0)
}

/// How finely the searches step, and how far.
const TRIES: i32 = 12;

#[inline(always)]
fn symmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    let book = Grid {
        zero: 8.0,
        most: 15.0,
    };
    // The largest weight, with its sign, gets the code that stands alone at its end: -8.
    let largest = x
        .iter()
        .fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let mut best = (f32::INFINITY, f16::ZERO);
    for step in -TRIES..=TRIES {
        let start = f16::from_f32(largest / -(8.0 + 0.1 * step as f32));
        let (scale, error) = book.refine(x, start);
        if error < best.0 {
            best = (error, scale);
        }
    }
    book.fill(x, best.1, codes);
    (best.1, 0)
}

#[inline(always)]
fn asymmetric_4(x: &[f32], codes: &mut [u8]) -> Rounded {
    let book = |zero| Grid { zero, most: 15.0 };
    let low = x.iter().fold(0f32, |m, &x| m.min(x));
    let high = x.iter().fold(0f32, |m, &x| m.max(x));
    let mut best = (f32::INFINITY, f16::ZERO, 0f32);
    for step in 0..=TRIES {
        let range = (high - low) * (1.0 - 0.03 * step as f32);
        let scale = f16::from_f32(range / 15.0);
        let zero = -low * inverse(scale);
        for zero in [zero.floor(), zero.ceil()].map(|zero| zero.clamp(0.0, 15.0)) {
            let (scale, error) = book(zero).refine(x, scale);
            if error < best.0 {
                best = (error, scale, zero);
            }
        }
    }
    book(best.2).fill(x, best.1, codes);
    (best.1, best.2 as u16)
}
