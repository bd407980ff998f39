//! The rounding of groups with vectors: while a scale is searched for, a lane for each that is tried, so that sums over the
//! columns need no other lane; else a lane for each column.
//!
//! SAFETY (all functions): the CPU has the features of `S`; groups are multiples of 32 columns, and there are as many codes.

use std::mem::MaybeUninit;

use half::f16;

use super::{
    ASYMMETRIC, EIGHT, FOUR, Grid, LANES, LARGEST_8, REACHES, ROOM, Rounded, SHARES, SYMMETRIC,
    WHOLE, largest,
};
use crate::simd::Simd;

/// Half of the sums of the specification: columns that are so far apart are summed together, with those 16 further on.
const HALF: usize = LANES / 2;
/// Columns that are summed together.
const PAIRS: usize = 2 * LANES;

/// As the scalar function of the name.
#[inline(always)]
pub(super) unsafe fn symmetric_8<S: Simd>(x: &[f32], codes: &mut [u8]) -> Rounded {
    unsafe {
        let [low, high] = extremes::<S>(x);
        let largest = S::splat(high.max(-low));
        let scale = halved(largest / S::splat(LARGEST_8));
        fill::<S>(EIGHT, x, scale, codes);
        (first_half(scale), 0)
    }
}

/// As the scalar function of the name.
#[inline(always)]
pub(super) unsafe fn symmetric_4<S: Simd>(x: &[f32], codes: &mut [u8]) -> Rounded {
    unsafe {
        let [low, high] = extremes::<S>(x);
        let largest = S::splat(match high == -low {
            true => largest(x),
            false if high > -low => high,
            false => low,
        });
        let start = Symmetric { largest };
        let best = match S::LANES {
            LANES => search::<S, 2>(x, start, SYMMETRIC),
            _ => search::<S, 3>(x, start, SYMMETRIC),
        };
        let scale = S::splat(best.scale);
        fill(FOUR, x, scale, codes);
        (first_half(scale), 0)
    }
}

/// As the scalar function of the name.
#[inline(always)]
pub(super) unsafe fn asymmetric_4<S: Simd>(x: &[f32], codes: &mut [u8]) -> Rounded {
    unsafe {
        let [low, high] = extremes::<S>(x);
        let start = Asymmetric {
            range: S::splat(high - low),
            below: S::splat(-low),
        };
        let best = match S::LANES {
            LANES => search::<S, 2>(x, start, ASYMMETRIC),
            _ => search::<S, 3>(x, start, ASYMMETRIC),
        };
        let (scale, zero) = (S::splat(best.scale), best.zero);
        fill(Grid { zero, ..FOUR }, x, scale, codes);
        (first_half(scale), zero as u16)
    }
}

/// Where a search starts.
trait Start<S>: Copy {
    /// The scales and zeros that the places from `at` on try.
    unsafe fn at(self, at: usize) -> (S, S);
}

#[derive(Clone, Copy)]
struct Symmetric<S> {
    largest: S,
}

impl<S: Simd> Start<S> for Symmetric<S> {
    #[inline(always)]
    unsafe fn at(self, at: usize) -> (S, S) {
        unsafe {
            let scale = halved(self.largest / S::load(REACHES.as_ptr().add(at)));
            (scale, S::splat(FOUR.zero))
        }
    }
}

#[derive(Clone, Copy)]
struct Asymmetric<S> {
    range: S,
    below: S,
}

impl<S: Simd> Start<S> for Asymmetric<S> {
    #[inline(always)]
    unsafe fn at(self, at: usize) -> (S, S) {
        unsafe {
            let (one, none, most) = (S::splat(1.0), S::splat(0.0), S::splat(FOUR.most));
            let scale = halved(self.range * S::load(SHARES.as_ptr().add(at)) / most);
            let zero = (self.below * inverse(scale)).max(none).min(most);
            let near = zero.round();
            let floor = near - S::select(zero.lt(near), one, none);
            let ceil = near + S::select(near.lt(zero), one, none);
            let up = S::splat(0.5).lt(S::load(TURNS.as_ptr().add(at)));
            (scale, S::select(up, ceil, floor))
        }
    }
}

/// 0 where a zero is rounded down, 1 where it is rounded up.
const TURNS: [f32; ROOM] = {
    let mut turns = [0.0; ROOM];
    let mut i = 1;
    while i < ROOM {
        turns[i] = 1.0;
        i += 2;
    }
    turns
};

/// The places' numbers.
const PLACES: [f32; ROOM] = {
    let mut places = [0.0; ROOM];
    let mut i = 0;
    while i < ROOM {
        places[i] = i as f32;
        i += 1;
    }
    places
};

/// What fits best.
#[derive(Clone, Copy)]
struct Best {
    error: f32,
    scale: f32,
    zero: f32,
}

/// Tries `W` vectors of scales at once: sums of one go on while the last additions of another wait for each other. A scale or
/// two that are left over after them are cheaper one by one than as a vector.
#[inline(always)]
unsafe fn search<S: Simd, const W: usize>(x: &[f32], start: impl Start<S>, count: usize) -> Best {
    unsafe {
        let none = S::splat(0.0);
        let (mut scale, mut zero) = ([none; W], [none; W]);
        for v in 0..W {
            (scale[v], zero[v]) = start.at(v * S::LANES);
        }
        let scale = fit(x, scale, zero);
        let mut best = least(errors(x, scale, zero), scale, zero);
        let done = W * S::LANES;
        if done < count {
            let (scale, zero) = start.at(done);
            let (scale, zero) = (lanes(scale), lanes(zero));
            for i in 0..count - done {
                let next = single::<S>(x, scale[i], zero[i]);
                if next.error < best.error {
                    best = next;
                }
            }
        }
        best
    }
}

/// The first place of the least error; zeros where no error is a number.
#[inline(always)]
unsafe fn least<S: Simd, const W: usize>(error: [S; W], scale: [S; W], zero: [S; W]) -> Best {
    unsafe {
        let (mut scales, mut zeros) = ([0f32; ROOM], [0f32; ROOM]);
        let (mut least, mut place) = (S::splat(f32::INFINITY), S::splat(0.0));
        for v in 0..W {
            let at = v * S::LANES;
            let better = error[v].lt(least);
            least = S::select(better, error[v], least);
            place = S::select(better, S::load(PLACES.as_ptr().add(at)), place);
            scale[v].store(scales.as_mut_ptr().add(at));
            zero[v].store(zeros.as_mut_ptr().add(at));
        }
        let error = -(-least).hmax();
        let worse = S::splat(error).lt(least);
        let place = S::select(worse, S::splat(ROOM as f32), place);
        let place = -(-place).hmax() as usize;
        match error < f32::INFINITY {
            true => Best {
                error,
                scale: scales[place],
                zero: zeros[place],
            },
            false => Best {
                error,
                scale: 0.0,
                zero: 0.0,
            },
        }
    }
}

/// The least and the largest number, or 0.
#[inline(always)]
unsafe fn extremes<S: Simd>(x: &[f32]) -> [f32; 2] {
    unsafe {
        let (mut low, mut high) = (S::splat(0.0), S::splat(0.0));
        let mut at = 0;
        while at < x.len() {
            let x = S::load(x.as_ptr().add(at));
            (low, high) = (x.min(low), x.max(high));
            at += S::LANES;
        }
        [-(-low).hmax(), high.hmax()]
    }
}

/// Rounded to what an `f16` holds.
#[inline(always)]
unsafe fn halved<S: Simd>(x: S) -> S {
    let mut halves = [f16::ZERO; LANES];
    unsafe {
        x.store_f16(halves.as_mut_ptr());
        S::load_f16(halves.as_ptr())
    }
}

#[inline(always)]
unsafe fn lanes<S: Simd>(x: S) -> [f32; LANES] {
    let mut lanes = [0f32; LANES];
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes
}

/// The first lane as an `f16`, which it is already.
#[inline(always)]
unsafe fn first_half<S: Simd>(x: S) -> f16 {
    let mut halves = [f16::ZERO; LANES];
    unsafe { x.store_f16(halves.as_mut_ptr()) };
    halves[0]
}

/// The inverse of what an `f16` holds, or 0 for 0.
#[inline(always)]
unsafe fn inverse<S: Simd>(scale: S) -> S {
    unsafe {
        let none = scale.abs().lt(S::splat(f32::MIN_POSITIVE));
        S::select(none, S::splat(0.0), S::splat(1.0) / scale)
    }
}

/// What codes stand for, in units of the scale.
#[derive(Clone, Copy)]
struct Levels<S> {
    low: S,
    high: S,
    /// Units of a weight.
    per: S,
}

impl<S: Simd> Levels<S> {
    #[inline(always)]
    unsafe fn of_grid(scale: S, zero: S, most: f32) -> Self {
        unsafe {
            Levels {
                low: -zero,
                high: S::splat(most) - zero,
                per: inverse(scale),
            }
        }
    }

    /// Of codes of 4 bits.
    #[inline(always)]
    unsafe fn new(scale: S, zero: S) -> Self {
        unsafe { Levels::of_grid(scale, zero, FOUR.most) }
    }

    #[inline(always)]
    unsafe fn all<const W: usize>(scale: [S; W], zero: [S; W]) -> [Self; W] {
        unsafe {
            let mut levels = [Levels::new(scale[0], zero[0]); W];
            for v in 1..W {
                levels[v] = Levels::new(scale[v], zero[v]);
            }
            levels
        }
    }

    /// The nearest ones to weights.
    #[inline(always)]
    unsafe fn of(self, x: S) -> S {
        unsafe {
            // What is not a number is the second operand and passes through both.
            let level = self.high.min(self.low.max(x * self.per));
            (level + S::splat(WHOLE)) - S::splat(WHOLE)
        }
    }
}

/// The scales that fit best to the codes that the scales `start` give.
#[inline(always)]
unsafe fn fit<S: Simd, const W: usize>(x: &[f32], start: [S; W], zero: [S; W]) -> [S; W] {
    unsafe {
        let none = S::splat(0.0);
        let levels = Levels::all(start, zero);
        let (mut sums, mut squares) = ([[MaybeUninit::uninit(); HALF]; W], [[none; 2]; W]);
        for i in 0..HALF {
            let mut sum = [[none; 2]; W];
            for x in x.as_chunks::<PAIRS>().0 {
                for h in 0..2 {
                    let a = S::splat(x[h * HALF + i]);
                    let b = S::splat(x[h * HALF + i + LANES]);
                    for v in 0..W {
                        let (c, d) = (levels[v].of(a), levels[v].of(b));
                        sum[v][h] = sum[v][h] + a * c + b * d;
                        // Small whole numbers: no order of theirs rounds.
                        squares[v][h] = d.fma(d, c.fma(c, squares[v][h]));
                    }
                }
            }
            for v in 0..W {
                sums[v][i].write(sum[v][0] + sum[v][1]);
            }
        }
        let mut scale = start;
        for v in 0..W {
            let square = squares[v][0] + squares[v][1];
            let fit = halved(total(&sums[v]) / square);
            scale[v] = S::select(none.lt(square), fit, start[v]);
        }
        scale
    }
}

/// The squared errors with the best codes.
#[inline(always)]
unsafe fn errors<S: Simd, const W: usize>(x: &[f32], scale: [S; W], zero: [S; W]) -> [S; W] {
    unsafe {
        let none = S::splat(0.0);
        let levels = Levels::all(scale, zero);
        let mut sums = [[MaybeUninit::uninit(); HALF]; W];
        for i in 0..HALF {
            let mut sum = [[none; 2]; W];
            for x in x.as_chunks::<PAIRS>().0 {
                for h in 0..2 {
                    let a = S::splat(x[h * HALF + i]);
                    let b = S::splat(x[h * HALF + i + LANES]);
                    for v in 0..W {
                        // A product has no more bits than the scale and a code together: it needs no rounding of its own.
                        let c = levels[v].of(a).fnma(scale[v], a);
                        let d = levels[v].of(b).fnma(scale[v], b);
                        sum[v][h] = sum[v][h] + c * c + d * d;
                    }
                }
            }
            for v in 0..W {
                sums[v][i].write(sum[v][0] + sum[v][1]);
            }
        }
        let mut error = [none; W];
        for v in 0..W {
            error[v] = total(&sums[v]);
        }
        error
    }
}

/// The sum of all, by halves.
#[inline(always)]
unsafe fn total<S: Simd>(sums: &[MaybeUninit<S>; HALF]) -> S {
    unsafe {
        let mut four = [S::splat(0.0); 4];
        for i in 0..4 {
            // All were written.
            four[i] = sums[i].assume_init() + sums[i + 4].assume_init();
        }
        (four[0] + four[2]) + (four[1] + four[3])
    }
}

/// [`fit`] and [`errors`] of one scale, with a lane for each column: two vectors of eight.
#[inline(always)]
unsafe fn single<S: Simd>(x: &[f32], start: f32, zero: f32) -> Best {
    unsafe {
        let none = S::splat(0.0);
        let start = S::splat(start);
        let levels = Levels::new(start, S::splat(zero));
        let (mut sums, mut squares) = ([none; 2], [none; 2]);
        for x in x.as_chunks::<LANES>().0 {
            for h in 0..2 {
                let x = S::load(x.as_ptr().add(h * HALF));
                let level = levels.of(x);
                sums[h] = sums[h] + x * level;
                squares[h] = level.fma(level, squares[h]);
            }
        }
        let square = S::splat((squares[0] + squares[1]).sum());
        let fit = halved(S::splat((sums[0] + sums[1]).sum()) / square);
        let scale = S::select(none.lt(square), fit, start);
        let levels = Levels::new(scale, S::splat(zero));
        let mut sums = [none; 2];
        for x in x.as_chunks::<LANES>().0 {
            for (h, sum) in sums.iter_mut().enumerate() {
                let x = S::load(x.as_ptr().add(h * HALF));
                let difference = levels.of(x).fnma(scale, x);
                *sum = *sum + difference * difference;
            }
        }
        Best {
            error: (sums[0] + sums[1]).sum(),
            scale: lanes(scale)[0],
            zero,
        }
    }
}

/// Writes the codes.
#[inline(always)]
unsafe fn fill<S: Simd>(grid: Grid, x: &[f32], scale: S, codes: &mut [u8]) {
    unsafe {
        let zero = S::splat(grid.zero);
        let levels = Levels::of_grid(scale, zero, grid.most);
        let mut at = 0;
        while at < x.len() {
            let level = levels.of(S::load(x.as_ptr().add(at)));
            (level + zero).store_u8(codes.as_mut_ptr().add(at));
            at += S::LANES;
        }
    }
}
