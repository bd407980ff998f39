//! Blocks of 256 whose sub-blocks have integer scales: first real scales for each, then integers for all together.

use half::f16;

use super::codes::{Codes, Levels};
use super::search::{
    Range, UNEVEN_LEVELS, Weighted, Window, affine, code, error, inverse, nearest, symmetric,
    table_sums, tabled,
};

/// The types with minimums: `Q2_K`, `Q4_K`, `Q5_K`.
pub(super) struct WithMin {
    /// Largest code.
    pub top: f32,
    /// Largest integer scale and minimum.
    pub scale_top: f32,
    /// Scales to try.
    pub window: Window,
}

/// Nearest `f16`, as `f32`.
#[inline(always)]
fn stored(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

impl WithMin {
    /// Fills the block.
    #[inline(always)]
    pub fn quantize(&self, data: Weighted, codes: &mut Codes) {
        let sub = codes.sub_len;
        let count = codes.len / sub;
        let range = Range {
            low: 0.0,
            high: self.top,
        };
        let (mut scales, mut mins) = ([0f32; 16], [0f32; 16]);
        for j in 0..count {
            let (scale, min) = affine(part(data, j, sub), self.top, self.window, false);
            // A constant sub-block above zero, or codes in reverse, have no place here.
            (scales[j], mins[j]) = if scale > 0.0 {
                (scale, min)
            } else {
                (0.0, min.max(0.0))
            };
        }
        let largest = |v: &[f32; 16]| v.iter().fold(0.0, |m: f32, &v| m.max(v));
        let mut best = f32::INFINITY;
        let mut d = stored(largest(&scales) / self.scale_top);
        let mut dmin = stored(largest(&mins) / self.scale_top);
        // What is beyond the type's range stays visible: an infinite scale.
        (codes.d, codes.dmin) = (d, dmin);
        for _ in 0..3 {
            let trial = self.integers(data, sub, count, (d, dmin), &scales, &mins);
            if trial.error < best {
                best = trial.error;
                (codes.d, codes.dmin) = (d, dmin);
                codes.scales[..count].copy_from_slice(&trial.scales[..count]);
                codes.mins[..count].copy_from_slice(&trial.mins[..count]);
            } else {
                break;
            }
            let (next_d, next_dmin) = fit(data, sub, range, codes);
            if (next_d, next_dmin) == (d, dmin) {
                break;
            }
            (d, dmin) = (next_d, next_dmin);
        }
        for j in 0..count {
            let scale = codes.d * codes.scales[j] as f32;
            let min = codes.dmin * f32::from(codes.mins[j]);
            let by = inverse(scale);
            for i in j * sub..(j + 1) * sub {
                codes.q[i] = code((data.x[i] + min) * by, range) as u8;
            }
        }
    }

    /// The best integers near the real scales and minimums, for given block scales.
    #[inline(always)]
    fn integers(
        &self,
        data: Weighted,
        sub: usize,
        count: usize,
        (d, dmin): (f32, f32),
        scales: &[f32; 16],
        mins: &[f32; 16],
    ) -> Trial {
        let range = Range {
            low: 0.0,
            high: self.top,
        };
        let mut trial = Trial::default();
        for j in 0..count {
            let data = part(data, j, sub);
            let near = |v: f32, d: f32| nearest((v * inverse(d)).clamp(0.0, self.scale_top));
            let (scale, min) = (near(scales[j], d), near(mins[j], dmin));
            let mut best = f32::INFINITY;
            for scale in around(scale, self.scale_top) {
                for min in around(min, self.scale_top) {
                    let error = error(data, range, d * scale, dmin * min);
                    if error < best {
                        best = error;
                        (trial.scales[j], trial.mins[j]) = (scale as i32, min as u8);
                    }
                }
            }
            trial.error += best;
        }
        trial
    }
}

#[derive(Default)]
struct Trial {
    error: f32,
    scales: [i32; 16],
    mins: [u8; 16],
}

/// An integer and its neighbors up to `top`, itself first.
fn around(v: f32, top: f32) -> impl Iterator<Item = f32> {
    [v, v - 1.0, v + 1.0]
        .into_iter()
        .filter(move |v| *v >= 0.0 && *v <= top)
}

#[inline(always)]
fn part<'a>(data: Weighted<'a>, j: usize, sub: usize) -> Weighted<'a> {
    let range = j * sub..(j + 1) * sub;
    Weighted {
        x: &data.x[range.clone()],
        w: &data.w[range],
    }
}

/// The block's scales that are best for its integers and the codes that follow from them: two linear equations.
#[inline(always)]
fn fit(data: Weighted, sub: usize, range: Range, codes: &Codes) -> (f32, f32) {
    let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0f64, 0f64, 0f64, 0f64, 0f64);
    for (i, (&x, &w)) in data.x.iter().zip(data.w).enumerate() {
        let (scale, min) = (codes.scales[i / sub] as f32, f32::from(codes.mins[i / sub]));
        let by = inverse(codes.d * scale);
        let q = code((x + codes.dmin * min) * by, range);
        let (a, b, x, w) = (
            f64::from(scale * q),
            f64::from(-min),
            f64::from(x),
            f64::from(w),
        );
        aa += w * a * a;
        ab += w * a * b;
        bb += w * b * b;
        ax += w * a * x;
        bx += w * b * x;
    }
    let det = aa * bb - ab * ab;
    let (d, dmin) = if det > 1e-9 * aa * bb {
        ((ax * bb - bx * ab) / det, (bx * aa - ax * ab) / det)
    } else if aa > 0.0 {
        (ax / aa, 0.0)
    } else {
        (0.0, f64::from(codes.dmin))
    };
    (stored(d.max(0.0) as f32), stored(dmin.max(0.0) as f32))
}

/// The types without minimums: `Q3_K`, `Q6_K`, and `IQ4_XS`, the one with a table.
pub(super) struct WithoutMin {
    /// Smallest and largest integer scale.
    pub scales: (f32, f32),
}

impl WithoutMin {
    /// Fills the block.
    #[inline(always)]
    pub fn quantize(&self, data: Weighted, codes: &mut Codes) {
        let sub = codes.sub_len;
        let count = codes.len / sub;
        let levels = codes.levels;
        let mut scales = [0f32; 16];
        for (j, scale) in scales[..count].iter_mut().enumerate() {
            let data = part(data, j, sub);
            *scale = match levels {
                Levels::Less(_) => symmetric(data, range_of(levels)),
                Levels::Table(_) => tabled(data, &UNEVEN_LEVELS),
            };
        }
        let extreme = super::search::extreme(&scales[..count]);
        let mut best = f32::INFINITY;
        let mut d = stored(extreme / self.scales.0);
        // What is beyond the type's range stays visible: an infinite scale.
        codes.d = d;
        for _ in 0..3 {
            let (error, integers) = self.integers(data, codes, d, &scales);
            if error >= best {
                break;
            }
            best = error;
            codes.d = d;
            codes.scales[..count].copy_from_slice(&integers[..count]);
            let next = fit_scale(data, codes);
            if next == d {
                break;
            }
            d = next;
        }
        for j in 0..count {
            let by = inverse(codes.d * codes.scales[j] as f32);
            for i in j * sub..(j + 1) * sub {
                codes.q[i] = code_of(levels, data.x[i] * by);
            }
        }
    }

    #[inline(always)]
    fn integers(
        &self,
        data: Weighted,
        codes: &Codes,
        d: f32,
        real: &[f32; 16],
    ) -> (f32, [i32; 16]) {
        let sub = codes.sub_len;
        let (low, high) = self.scales;
        let (mut total, mut integers) = (0.0, [0; 16]);
        for j in 0..codes.len / sub {
            let data = part(data, j, sub);
            let middle = nearest((real[j] * inverse(d)).clamp(low, high));
            let mut best = f32::INFINITY;
            for integer in [middle, middle - 1.0, middle + 1.0] {
                if integer < low || integer > high {
                    continue;
                }
                let error = match codes.levels {
                    Levels::Less(_) => error(data, range_of(codes.levels), d * integer, 0.0),
                    Levels::Table(_) => table_sums(data, &UNEVEN_LEVELS, d * integer)[2],
                };
                if error < best {
                    (best, integers[j]) = (error, integer as i32);
                }
            }
            total += best;
        }
        (total, integers)
    }
}

/// The levels of codes that are even: from minus the zero to one less than it.
#[inline(always)]
fn range_of(levels: Levels) -> Range {
    let Levels::Less(zero) = levels else {
        unreachable!("a table has no range")
    };
    let zero = f32::from(zero);
    Range {
        low: -zero,
        high: zero - 1.0,
    }
}

/// The code of a scaled number.
#[inline(always)]
fn code_of(levels: Levels, v: f32) -> u8 {
    match levels {
        Levels::Less(zero) => (code(v, range_of(levels)) as i16 + i16::from(zero)) as u8,
        Levels::Table(_) => UNEVEN_LEVELS.code(v),
    }
}

/// The block's scale that is best for its integers and the codes that follow from them.
#[inline(always)]
fn fit_scale(data: Weighted, codes: &Codes) -> f32 {
    let (mut aa, mut ax) = (0f64, 0f64);
    for (i, (&x, &w)) in data.x.iter().zip(data.w).enumerate() {
        let scale = codes.scales[i / codes.sub_len] as f32;
        let q = code_of(codes.levels, x * inverse(codes.d * scale));
        let a = f64::from(scale * codes.levels.of(q));
        aa += f64::from(w) * a * a;
        ax += f64::from(w) * a * f64::from(x);
    }
    if aa > 0.0 {
        stored((ax / aa) as f32)
    } else {
        codes.d
    }
}
