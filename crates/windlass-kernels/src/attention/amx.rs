//! Tiles of scores and sums on AMX: queries, keys, exponentials and values as `bf16`, their products summed in `f32`.
//!
//! Every element of a product is one chain of tile products in the order of the inner index, whatever rows are beside it, and
//! vectors give few rows the same bits.

#![expect(
    clippy::needless_range_loop,
    reason = "indices of register arrays address memory too"
)]

mod pairs;
mod product;

use std::arch::x86_64::*;

use super::forward::{Scratch, TileData};
use super::paged::Walk;
use super::softmax::{cap_scores, multiply_columns};
use super::tile::KEYS;
use crate::simd::{Avx512, Simd};
use crate::tiles::{Config, leave};
use pairs::{Stored, pack, seen, store};
use product::{Product, chains};
use std::ops::Range;

/// Rows of a tile register.
pub(super) const HEIGHT: usize = 16;
/// Elements of a row of A that one step of a product takes.
const STEP: usize = 32;
/// Columns of a product: four tile registers.
const COLUMNS: usize = 64;
/// Groups of rows whose scores wait at the same time.
const FLOW: usize = 4;
const LANES: usize = Avx512::LANES;

/// Rows up to which vectors multiply, from where numbers rest: packing for tiles takes longer.
const FEW: usize = 2;
/// Exponents from which on an exponential is not zero: the logarithm of [`SMALL`](pairs::SMALL).
const LEAST: f32 = -34.0;

/// Whole tiles.
static WHOLE: Config = Config::new([(16, 64); 8]);
/// Half as many rows of A and of sums, for which products take half the time.
static HALF: Config = {
    let (half, whole) = ((8, 64), (16, 64));
    Config::new([half, half, half, half, half, whole, whole, whole])
};

/// Whether heads are whole tiles.
pub(super) fn fits(head_dim: usize) -> bool {
    head_dim.is_multiple_of(COLUMNS)
}

/// All tiles of a block from left to right; queries are rounded where they lie.
///
/// # Safety
/// AMX can be used, [`fits`] holds, and pages and scratch are as large as the shape says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn walk<B: Stored>(w: &Walk<'_, B>, scratch: &mut Scratch) {
    let (shape, d) = (w.shape, w.shape.head_dim);
    let rows = shape.group() * w.queries.len();
    let end = w.segment.visible(shape, w.queries.end - 1).end;
    let first = w.segment.visible(shape, w.queries.start).start / KEYS * KEYS;
    let mut flow = [const { Group::NONE }; FLOW];
    // SAFETY: the caller's promise.
    unsafe {
        let tiles = rows > FEW;
        for row in scratch.q[..rows * d].chunks_exact_mut(d) {
            let row = row.as_mut_ptr();
            for column in (0..d).step_by(STEP) {
                let at = row.add(column);
                let to = row.add(if tiles { column / 2 } else { column });
                store(
                    [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(LANES))],
                    to,
                    tiles,
                );
            }
        }
        if tiles {
            let config = if rows <= HEIGHT / 2 { &HALF } else { &WHOLE };
            config.enter();
        }
        for start in (first..end).step_by(KEYS) {
            let keys = start..end.min(start + KEYS);
            let data = w.tile(start);
            let next = w.tile(if keys.end < end { keys.end } else { start });
            if !tiles {
                let mut group = Group::new(w, &keys, 0, 0);
                group.scores_of_few([&data, &next], keys.len(), d, scratch);
                group.exponentials(w, &data, scratch, tiles);
                group.values_of_few([&data, &next], keys.len(), d, scratch);
                continue;
            }
            let to = scratch.keys.as_mut_ptr();
            pack([data.keys, next.keys], KEYS, [d, d], keys.len(), to);
            for first in (0..rows).step_by(flow.len() * HEIGHT) {
                let flow = &mut flow[..(rows - first).div_ceil(HEIGHT).min(FLOW)];
                for (slot, group) in flow.iter_mut().enumerate() {
                    *group = Group::new(w, &keys, first + slot * HEIGHT, slot);
                    group.scores(d, scratch);
                }
                for group in flow.iter_mut() {
                    group.exponentials(w, &data, scratch, tiles);
                }
                if first == 0 {
                    let rows = [KEYS, keys.len()];
                    let to = scratch.values.as_mut_ptr();
                    pack([data.values, next.values], d, rows, d, to);
                }
                for group in flow.iter() {
                    group.values(d, scratch);
                }
            }
        }
        if tiles {
            leave();
        }
    }
}

/// The rows of a tile register against a tile of keys.
struct Group {
    /// The first row.
    first: usize,
    /// How many there are.
    rows: usize,
    /// Where their scores are in scratch.
    at: usize,
    /// The keys that each row sees, a bit each, where it is not all of them; `None` also where no row sees any.
    masks: Option<[u64; HEIGHT]>,
    any: bool,
    /// What older sums shrink by.
    factors: [f32; HEIGHT],
}

impl Group {
    const NONE: Group = Group {
        first: 0,
        rows: 0,
        at: 0,
        masks: None,
        any: false,
        factors: [1.0; HEIGHT],
    };

    /// The rows from `first` on, with the scores of slot `slot`.
    #[inline(always)]
    fn new<B: Stored>(w: &Walk<'_, B>, keys: &Range<usize>, first: usize, slot: usize) -> Group {
        let count = w.queries.len();
        let rows = w.shape.group() * count;
        let visible = |query: usize| w.segment.visible(w.shape, w.queries.start + query);
        let group = Group {
            first,
            rows: (rows - first).min(HEIGHT),
            at: slot * HEIGHT * KEYS,
            any: true,
            ..Group::NONE
        };
        let whole = keys.len() == KEYS && visible(0).end >= keys.end;
        if whole && visible(count - 1).start <= keys.start {
            return group;
        }
        let mut masks = [0; HEIGHT];
        let mut query = first % count;
        for mask in masks.iter_mut().take(group.rows) {
            let seen = visible(query);
            let [start, end] =
                [seen.start, seen.end].map(|at| at.clamp(keys.start, keys.end) - keys.start);
            let below = |n: usize| if n == 64 { !0 } else { (1u64 << n) - 1 };
            *mask = below(end) & !below(start);
            query = if query + 1 == count { 0 } else { query + 1 };
        }
        Group {
            any: masks.iter().any(|&mask| mask != 0),
            masks: Some(masks),
            ..group
        }
    }

    /// Scores of the packed keys.
    #[inline(always)]
    unsafe fn scores(&self, d: usize, scratch: &mut Scratch) {
        if !self.any {
            return;
        }
        // SAFETY: the sizes of scratch, whose rows are whole tiles.
        unsafe {
            let product = Product {
                a: scratch.q.as_ptr().add(self.first * d),
                a_row: d,
                b: scratch.keys.as_ptr(),
                b_row: KEYS,
                c: scratch.scores.as_mut_ptr().add(self.at),
                c_row: KEYS,
            };
            product.run(d / STEP, false);
        }
    }

    /// Scores become exponentials relative to the new running maximum, rounded; unseen keys have 0.
    #[inline(always)]
    unsafe fn exponentials<B: Stored>(
        &mut self,
        w: &Walk<'_, B>,
        data: &TileData<'_, B>,
        scratch: &mut Scratch,
        tiles: bool,
    ) {
        if !self.any {
            return;
        }
        let scores = &mut scratch.scores[self.at..][..HEIGHT * KEYS];
        let (max, sum) = (
            &mut scratch.max[self.first..][..HEIGHT],
            &mut scratch.sum[self.first..][..HEIGHT],
        );
        // SAFETY: vectors of `scores`, `max` and `sum`; the features are there by the caller's promise.
        unsafe {
            if let Some([scales, _]) = data.scales {
                multiply_columns::<Avx512>(scores, scales);
            }
            if let Some(cap) = w.shape.softcap {
                cap_scores::<Avx512>(cap, scores);
            }
            let scores = scores.as_mut_ptr();
            let mut most = [_mm512_setzero_ps(); HEIGHT];
            for row in 0..self.rows {
                let [a, b, c, d] = self.line(row, scores);
                most[PLACE[row]] = _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
            }
            let old = _mm512_loadu_ps(max.as_ptr());
            let newest = _mm512_max_ps(across::<true>(most), old);
            let factors = Avx512(_mm512_sub_ps(old, newest)).exp_above(Avx512::splat(LEAST));
            _mm512_storeu_ps(max.as_mut_ptr(), newest);
            factors.store(self.factors.as_mut_ptr());
            let mut totals = [_mm512_setzero_ps(); HEIGHT];
            for row in 0..self.rows {
                let line = self.line(row, scores);
                let most = _mm512_set1_ps(max[row]);
                let mut p = [_mm512_setzero_ps(); 4];
                for i in 0..4 {
                    p[i] = Avx512(_mm512_sub_ps(line[i], most))
                        .exp_above(Avx512::splat(LEAST))
                        .0;
                }
                totals[PLACE[row]] =
                    _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
                if let Some([_, scales]) = data.scales {
                    for i in 0..4 {
                        // Behind the last key a scale may be anything, and 0 must stay 0.
                        let some = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(p[i], _mm512_setzero_ps());
                        let scale = _mm512_loadu_ps(scales.as_ptr().add(i * LANES));
                        p[i] = _mm512_maskz_mul_ps(some, p[i], scale);
                    }
                }
                let to = scores.add(row * KEYS);
                let [a, b, c, d] = p;
                store([a, b], to, tiles);
                let behind = if tiles { LANES } else { STEP };
                store([c, d], to.add(behind), tiles);
            }
            let total = across::<false>(totals);
            let old = _mm512_loadu_ps(sum.as_ptr());
            _mm512_storeu_ps(sum.as_mut_ptr(), _mm512_fmadd_ps(old, factors.0, total));
        }
    }

    /// The scores of a row, -∞ where it does not see the key.
    #[inline(always)]
    unsafe fn line(&self, row: usize, scores: *const f32) -> [__m512; 4] {
        // SAFETY: a row has four vectors; the features are there by the caller's promise.
        unsafe {
            let mut line = [_mm512_setzero_ps(); 4];
            for (i, x) in line.iter_mut().enumerate() {
                *x = _mm512_loadu_ps(scores.add(row * KEYS + i * LANES));
                if let Some(masks) = &self.masks {
                    let hidden = !(masks[row] >> (i * LANES)) as u16;
                    *x = _mm512_mask_mov_ps(*x, hidden, _mm512_set1_ps(f32::NEG_INFINITY));
                }
            }
            line
        }
    }

    /// Older sums shrink.
    #[inline(always)]
    unsafe fn shrink(&self, d: usize, scratch: &mut Scratch) {
        let rows = scratch.out[self.first * d..].chunks_exact_mut(d);
        for (row, factor) in rows.zip(&self.factors[..self.rows]) {
            if *factor != 1.0 {
                for at in row.chunks_exact_mut(LANES) {
                    // SAFETY: a whole vector; the features are there by the caller's promise.
                    unsafe {
                        let sum = _mm512_loadu_ps(at.as_ptr());
                        let sum = _mm512_mul_ps(sum, _mm512_set1_ps(*factor));
                        let (sum, seen) = (_mm512_castps_si512(sum), seen(sum));
                        let at = at.as_mut_ptr().cast();
                        _mm512_storeu_si512(at, _mm512_maskz_mov_epi32(seen, sum));
                    }
                }
            }
        }
    }

    /// Exponentials times the packed values are added to older sums.
    #[inline(always)]
    unsafe fn values(&self, d: usize, scratch: &mut Scratch) {
        if !self.any {
            return;
        }
        // SAFETY: the sizes of scratch, whose rows are whole tiles.
        unsafe {
            self.shrink(d, scratch);
            for column in (0..d).step_by(COLUMNS) {
                let product = Product {
                    a: scratch.scores.as_ptr().add(self.at),
                    a_row: KEYS,
                    b: scratch.values.as_ptr().add(column),
                    b_row: d,
                    c: scratch.out.as_mut_ptr().add(self.first * d + column),
                    c_row: d,
                };
                product.run(KEYS / STEP, true);
            }
        }
    }

    /// [`Group::scores`] of keys at rest.
    #[inline(always)]
    unsafe fn scores_of_few<B: Stored>(
        &self,
        [data, next]: [&TileData<'_, B>; 2],
        keys: usize,
        d: usize,
        scratch: &mut Scratch,
    ) {
        for row in 0..self.rows {
            let a = &scratch.q[row * d..][..d];
            let c = &mut scratch.scores[row * KEYS..][..keys.next_multiple_of(STEP)];
            c.fill(0.0);
            // SAFETY: `d` rows of `KEYS` keys.
            unsafe { chains(a, [data.keys, next.keys], KEYS, d, c) };
        }
    }

    /// [`Group::values`] of values at rest.
    #[inline(always)]
    unsafe fn values_of_few<B: Stored>(
        &self,
        [data, next]: [&TileData<'_, B>; 2],
        keys: usize,
        d: usize,
        scratch: &mut Scratch,
    ) {
        // SAFETY: `keys` rows of `d` values.
        unsafe {
            self.shrink(d, scratch);
            for row in 0..self.rows {
                let a = &scratch.scores[row * KEYS..][..KEYS];
                chains(
                    a,
                    [data.values, next.values],
                    d,
                    keys,
                    &mut scratch.out[row * d..][..d],
                );
            }
        }
    }
}

/// Where [`across`] takes the vector of each lane from.
const PLACE: [usize; 16] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];

/// The largest lane, or the sum of all, of 16 vectors: that of vector `PLACE[i]` in lane `i`.
#[inline(always)]
unsafe fn across<const LARGEST: bool>(x: [__m512; 16]) -> __m512 {
    // SAFETY: the features are there by the caller's promise.
    unsafe {
        let both = |a, b| {
            if LARGEST {
                _mm512_max_ps(a, b)
            } else {
                _mm512_add_ps(a, b)
            }
        };
        let mut eight = [x[0]; 8];
        for i in 0..8 {
            let (a, b) = (x[i], x[i + 8]);
            eight[i] = both(
                _mm512_shuffle_f32x4::<0x44>(a, b),
                _mm512_shuffle_f32x4::<0xee>(a, b),
            );
        }
        let mut four = [x[0]; 4];
        for i in 0..4 {
            let (a, b) = (eight[i], eight[i + 4]);
            four[i] = both(
                _mm512_shuffle_f32x4::<0x88>(a, b),
                _mm512_shuffle_f32x4::<0xdd>(a, b),
            );
        }
        let mut two = [x[0]; 2];
        for i in 0..2 {
            let (a, b) = (four[i], four[i + 2]);
            two[i] = both(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        let [a, b] = two.map(|x| _mm512_castps_pd(x));
        let [low, high] = [_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b)];
        both(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
    }
}
