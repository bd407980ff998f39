//! Scales and minimums for a few numbers: weighted least squares over candidate scales.
//!
//! For given codes the best scale is the solution of a linear equation; which codes are best depends on the scale. So
//! some scales around the one that maps the extreme value to the last code are tried, each is replaced by the best for
//! its codes, and the winner is refined until its codes stay.
//!
//! Sums are taken in eight lanes, in an order of their own, so that results are the same on every machine.

use super::codes::{FLOAT4, UNEVEN};

/// Lanes of a sum.
const LANES: usize = 8;
/// Steps of refinement after the best candidate.
const REFINEMENTS: usize = 4;

/// Numbers to be quantized and how much the error of each counts. Equally long, a multiple of 8.
#[derive(Clone, Copy)]
pub(super) struct Weighted<'a> {
    pub x: &'a [f32],
    pub w: &'a [f32],
}

/// Which codes there are.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub low: f32,
    pub high: f32,
}

/// Rounds to the nearest integer, ties to even; for magnitudes below 2^22.
#[inline(always)]
pub(super) fn nearest(v: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (v + SHIFT) - SHIFT
}

/// The code of `v`, as a number.
#[inline(always)]
pub(super) fn code(v: f32, range: Range) -> f32 {
    let v = if v > range.low { v } else { range.low };
    let v = if v < range.high { v } else { range.high };
    nearest(v)
}

/// Sums over all elements of `N` terms of each.
#[inline(always)]
fn sums<const N: usize>(data: Weighted, term: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0f32; LANES]; N];
    let chunks = data.x.chunks_exact(LANES);
    for (x, w) in chunks.zip(data.w.chunks_exact(LANES)) {
        for lane in 0..LANES {
            let terms = term(x[lane], w[lane]);
            for (sum, term) in lanes.iter_mut().zip(terms) {
                sum[lane] += term;
            }
        }
    }
    lanes.map(total)
}

#[inline(always)]
fn total(l: [f32; LANES]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// The inverse, or 0 for 0.
#[inline(always)]
pub(super) fn inverse(v: f32) -> f32 {
    if v == 0.0 { 0.0 } else { 1.0 / v }
}

/// The number of largest magnitude, with its sign; the first of several.
#[inline(always)]
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter()
        .fold(0.0, |m: f32, &v| if v.abs() > m.abs() { v } else { m })
}

/// The squared error of `scale * q - min` with the best codes.
#[inline(always)]
pub(super) fn error(data: Weighted, range: Range, scale: f32, min: f32) -> f32 {
    let inverse = inverse(scale);
    let [error] = sums(data, |x, w| {
        let q = code((x + min) * inverse, range);
        let e = x - (scale * q - min);
        [w * e * e]
    });
    error
}

/// The scale, of either sign, with the least error of `scale * q`.
#[inline(always)]
pub(super) fn symmetric(data: Weighted, range: Range) -> f32 {
    let extreme = extreme(data.x);
    // Beyond, scales are no f32 any more.
    if extreme.abs() < 1e-30 {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, 0.0);
    let mut attempt = |inverse: f32| {
        let [xq, qq] = sums(data, |x, w| {
            let q = code(x * inverse, range);
            [w * x * q, w * q * q]
        });
        // The error with the best scale is the sum of squares less this.
        if qq > 0.0 && xq * xq > best * qq {
            best = xq * xq / qq;
            scale = xq / qq;
            return true;
        }
        false
    };
    let reach = range.low.abs().max(range.high);
    for sign in [-1.0, 1.0] {
        // One code more on the negative side matters where there are few.
        if sign > 0.0 && reach > 8.0 {
            continue;
        }
        for step in -9..=9 {
            attempt(sign * (reach + 0.1 * step as f32) / extreme);
        }
    }
    refine(&mut scale, &mut best, data, range);
    scale
}

#[inline(always)]
fn refine(scale: &mut f32, best: &mut f32, data: Weighted, range: Range) {
    for _ in 0..REFINEMENTS {
        let by = inverse(*scale);
        let [xq, qq] = sums(data, |x, w| {
            let q = code(x * by, range);
            [w * x * q, w * q * q]
        });
        if qq <= 0.0 || xq * xq <= *best * qq * (1.0 + 1e-6) {
            break;
        }
        (*best, *scale) = (xq * xq / qq, xq / qq);
    }
}

/// Candidates of [`affine`]: scales that map the span of the numbers to `codes + first`, `+ first + step`, …
#[derive(Clone, Copy)]
pub(super) struct Window {
    pub first: f32,
    pub step: f32,
    pub count: usize,
}

/// The scale and minimum with the least error of `scale * q - min`, with codes from 0 to `top`. The minimum is not
/// negative unless `any_sign`.
#[inline(always)]
pub(super) fn affine(data: Weighted, top: f32, window: Window, any_sign: bool) -> (f32, f32) {
    let range = Range {
        low: 0.0,
        high: top,
    };
    let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
    for &x in data.x {
        (low, high) = (low.min(x), high.max(x));
    }
    if !any_sign {
        low = low.min(0.0);
    }
    let span = high - low;
    if span.is_nan() || span < 1e-30 {
        return (0.0, -low);
    }
    let [sum_w, sum_x, sum_xx] = sums(data, |x, w| [w, w * x, w * x * x]);
    let solve = |inverse: f32, min: f32| {
        let [q, qq, xq] = sums(data, |x, w| {
            let q = code((x + min) * inverse, range);
            [w * q, w * q * q, w * x * q]
        });
        let det = sum_w * qq - q * q;
        if det <= 0.0 {
            return None;
        }
        let scale = (sum_w * xq - sum_x * q) / det;
        let offset = (qq * sum_x - q * xq) / det;
        if offset > 0.0 && !any_sign {
            let scale = xq / qq;
            return Some((sum_xx - scale * xq, scale, 0.0));
        }
        Some((sum_xx - scale * xq - offset * sum_x, scale, -offset))
    };
    let mut best = (f32::INFINITY, span / top, -low);
    for step in 0..window.count {
        let codes = top + window.first + window.step * step as f32;
        if let Some(found) = solve(codes / span, -low)
            && found.0 < best.0
        {
            best = found;
        }
    }
    for _ in 0..REFINEMENTS {
        match solve(inverse(best.1), best.2) {
            Some(found) if found.0 < best.0 * (1.0 - 1e-6) => best = found,
            _ => break,
        }
    }
    (best.1, best.2)
}

/// The levels of a table in ascending order, to find the nearest one without branches.
pub(super) struct Table {
    /// Ascending.
    levels: [f32; 16],
    /// Halfway from a level to the next.
    middles: [f32; 15],
    /// The levels' places in the table.
    codes: [u8; 16],
}

/// [`UNEVEN`], in order.
pub(super) static UNEVEN_LEVELS: Table = Table::new(&UNEVEN);
/// [`FLOAT4`], in order.
pub(super) static FLOAT4_LEVELS: Table = Table::new(&FLOAT4);

impl Table {
    /// Sorts the levels; of equal ones the first is used.
    const fn new(table: &[i8; 16]) -> Self {
        let mut codes = [0u8; 16];
        let mut count = 0;
        while count < 16 {
            let mut at = count;
            while at > 0 && table[codes[at - 1] as usize] > table[count] {
                codes[at] = codes[at - 1];
                at -= 1;
            }
            let twin = at > 0 && table[codes[at - 1] as usize] == table[count];
            codes[at] = if twin { codes[at - 1] } else { count as u8 };
            count += 1;
        }
        let (mut levels, mut middles) = ([0f32; 16], [0f32; 15]);
        let mut i = 0;
        while i < 16 {
            levels[i] = table[codes[i] as usize] as f32;
            if i > 0 {
                middles[i - 1] = (levels[i - 1] + levels[i]) / 2.0;
            }
            i += 1;
        }
        Table {
            levels,
            middles,
            codes,
        }
    }

    /// The code of the nearest level.
    #[inline(always)]
    pub fn code(&self, v: f32) -> u8 {
        let below = self.middles.iter().map(|m| usize::from(v > *m));
        self.codes[below.sum::<usize>()]
    }

    /// The nearest levels of some numbers.
    #[inline(always)]
    fn nearest(&self, v: [f32; LANES]) -> [f32; LANES] {
        let mut levels = [self.levels[0]; LANES];
        for (i, &middle) in self.middles.iter().enumerate() {
            let step = self.levels[i + 1] - self.levels[i];
            for (level, v) in levels.iter_mut().zip(v) {
                *level += if v > middle { step } else { 0.0 };
            }
        }
        levels
    }
}

/// With the best codes for `scale * level`: the sums that give the best scale, and the squared error.
#[inline(always)]
pub(super) fn table_sums(data: Weighted, table: &Table, scale: f32) -> [f32; 3] {
    let inverse = inverse(scale);
    let mut lanes = [[0f32; LANES]; 3];
    let chunks = data.x.chunks_exact(LANES);
    for (x, w) in chunks.zip(data.w.chunks_exact(LANES)) {
        let mut v = [0f32; LANES];
        for (v, x) in v.iter_mut().zip(x) {
            *v = x * inverse;
        }
        let levels = table.nearest(v);
        for lane in 0..LANES {
            let (x, w, level) = (x[lane], w[lane], levels[lane]);
            let e = x - scale * level;
            lanes[0][lane] += w * x * level;
            lanes[1][lane] += w * level * level;
            lanes[2][lane] += w * e * e;
        }
    }
    lanes.map(total)
}

/// As [`symmetric`], with codes into a table.
#[inline(always)]
pub(super) fn tabled(data: Weighted, table: &Table) -> f32 {
    let extreme = extreme(data.x);
    if extreme.abs() < 1e-30 {
        return 0.0;
    }
    let end = table.levels[15].max(-table.levels[0]);
    let (mut best, mut scale) = (0.0, 0.0);
    for step in -7..=7 {
        let mut trial = -extreme / (end + step as f32);
        for _ in 0..2 {
            let [xq, qq, _] = table_sums(data, table, trial);
            if qq <= 0.0 {
                break;
            }
            trial = xq / qq;
            if xq * xq > best * qq {
                (best, scale) = (xq * xq / qq, trial);
            }
        }
    }
    scale
}
