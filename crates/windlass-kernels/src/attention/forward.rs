//! The forward pass of one block of queries: tiles of keys from left to right, softmax kept as running maximum and sum.

use super::tile::{
    Bounds, KEYS, Part, Product, ROWS, Start, Tiles, load_columns, load_rows, padded, store_row,
    take,
};
use super::{AttentionShape, Block, Forward, KvView, Segment};
use crate::pool::Worker;
use crate::simd::{Simd, SimdElement};
use std::ops::Range;

/// The part of a tile that a row sees when it sees all of a whole tile.
const WHOLE: Part = (0, KEYS as u8);

/// 0, 1, 2 and so on, to compare vectors of indices.
const INDICES: [f32; KEYS] = {
    let mut indices = [0.0; KEYS];
    let mut i = 0;
    while i < KEYS {
        indices[i] = i as f32;
        i += 1;
    }
    indices
};

/// The part of a tile that each of some rows sees, and whether any row sees less than all or anything at all.
pub(super) struct Edges {
    pub seen: [Part; ROWS],
    pub all: bool,
    pub none: bool,
}

impl Edges {
    /// Of the tile `keys`, for rows whose queries are given by `query`.
    #[inline(always)]
    pub fn new(
        shape: &AttentionShape,
        segment: &Segment,
        keys: &Range<usize>,
        rows: Range<usize>,
        queries: &Range<usize>,
    ) -> Edges {
        let mut edges = Edges {
            seen: [(0, 0); ROWS],
            all: true,
            none: true,
        };
        let mut i = rows.start % queries.len();
        for seen in &mut edges.seen[..rows.len()] {
            let visible = segment.visible(shape, queries.start + i);
            let start = visible.start.clamp(keys.start, keys.end) - keys.start;
            let end = visible.end.clamp(keys.start, keys.end) - keys.start;
            *seen = (start as u8, end as u8);
            edges.all &= start == 0 && end == keys.len();
            edges.none &= start >= end;
            i = if i + 1 == queries.len() { 0 } else { i + 1 };
        }
        edges
    }

    /// Bounds of a product whose columns are keys.
    #[inline(always)]
    pub fn columns(&self, rows: usize) -> Bounds<'_> {
        if self.all {
            Bounds::All
        } else {
            Bounds::Columns(&self.seen[..rows])
        }
    }

    /// Bounds of a product that sums over keys.
    #[inline(always)]
    pub fn inner(&self, rows: usize) -> Bounds<'_> {
        if self.all {
            Bounds::All
        } else {
            Bounds::Inner(&self.seen[..rows])
        }
    }
}

/// The addresses of a tile's rows of keys and values.
#[derive(Clone, Copy)]
pub(super) struct TileRows<E> {
    keys: [*const E; KEYS],
    values: [*const E; KEYS],
    len: usize,
}

impl<E: SimdElement> TileRows<E> {
    /// Of the keys `keys` of a segment, at most [`KEYS`]. The only place of the vector kernels that asks where rows lie.
    #[inline(always)]
    pub fn new(
        shape: &AttentionShape,
        kv: &KvView<'_, E>,
        segment: &Segment,
        kv_head: usize,
        keys: Range<usize>,
    ) -> TileRows<E> {
        let none = [std::ptr::null(); KEYS];
        let mut rows = TileRows {
            keys: none,
            values: none,
            len: keys.len(),
        };
        for (i, j) in keys.enumerate() {
            let row = segment.kv_start + j;
            rows.keys[i] = kv.key(row, kv_head, shape.head_dim).as_ptr();
            rows.values[i] = kv.value(row, kv_head, shape.head_dim).as_ptr();
        }
        rows
    }

    pub fn keys(&self) -> &[*const E] {
        &self.keys[..self.len]
    }

    pub fn values(&self) -> &[*const E] {
        &self.values[..self.len]
    }
}

/// Scratch of a block. Rows are ordered by head, then query.
struct Scratch<'a> {
    /// `[head_dim, KEYS]`
    keys: &'a mut [f32],
    /// `[KEYS, padded]`
    values: &'a mut [f32],
    /// `[ROWS, KEYS]`
    scores: &'a mut [f32],
    /// `[rows, padded]`, times the scale
    q: &'a mut [f32],
    /// `[rows, padded]`, not yet divided by `sum`
    out: &'a mut [f32],
    /// `[rows]` each
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(worker: &'a mut Worker, head_dim: usize, rows: usize) -> Scratch<'a> {
        let width = padded(head_dim);
        let lines = rows.next_multiple_of(16);
        let rest = &mut worker
            .scratch::<f32>(2 * KEYS * width + ROWS * KEYS + 2 * rows * width + 2 * lines);
        let scratch = Scratch {
            keys: take(rest, KEYS * width),
            values: take(rest, KEYS * width),
            scores: take(rest, ROWS * KEYS),
            q: take(rest, rows * width),
            out: take(rest, rows * width),
            max: take(rest, rows),
            sum: take(rest, rows),
        };
        scratch.out.fill(0.0);
        // Finite, so that a row that has seen no key yet has a difference of maxima.
        scratch.max.fill(f32::MIN);
        scratch.sum.fill(0.0);
        scratch
    }
}

/// Attention of one block.
///
/// # Safety
/// The level of `S` is supported, and no other task writes the block's rows.
#[inline(always)]
pub(super) unsafe fn forward_simd<S: Tiles, E: SimdElement>(
    call: &Forward<'_, E>,
    block: &Block,
    worker: &mut Worker,
) {
    let Block {
        segment,
        kv_head,
        queries,
    } = block;
    let AttentionShape {
        head_dim, scale, ..
    } = *call.shape;
    let (group, count) = (call.shape.group(), queries.len());
    let rows = group * count;
    let scratch = &mut Scratch::new(worker, head_dim, rows);
    let place = |row: usize| {
        (
            segment.q_start + queries.start + row % count,
            kv_head * group + row / count,
        )
    };
    for row in 0..rows {
        let (token, head) = place(row);
        let to = &mut scratch.q[row * padded(head_dim)..];
        // SAFETY: a row of one head.
        unsafe {
            load_rows::<S, E>(
                &[call.q.head(token, head, head_dim).as_ptr()],
                &[],
                head_dim,
                scale,
                to,
            )
        };
    }
    let end = segment.visible(call.shape, queries.end - 1).end;
    let first = segment.visible(call.shape, queries.start).start / KEYS * KEYS;
    let rows_of = |keys| TileRows::new(call.shape, &call.kv, segment, *kv_head, keys);
    let mut ahead = rows_of(first..end.min(first + KEYS));
    for start in (first..end).step_by(KEYS) {
        let keys = start..end.min(start + KEYS);
        let tile_rows = ahead;
        ahead = rows_of(keys.end..end.min(keys.end + KEYS));
        // SAFETY: rows of one head.
        unsafe {
            load_columns::<S, E>(tile_rows.keys(), ahead.keys(), head_dim, scratch.keys);
            load_rows::<S, E>(
                tile_rows.values(),
                ahead.values(),
                head_dim,
                1.0,
                scratch.values,
            );
        }
        for start in (0..rows).step_by(ROWS) {
            let part = start..rows.min(start + ROWS);
            let edges = Edges::new(call.shape, segment, &keys, part.clone(), queries);
            if !edges.none {
                // SAFETY: the level is supported.
                unsafe { tile::<S>(call.shape, scratch, part, keys.len(), &edges) };
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_queries::<S, E>(call, rows, &place, scratch) };
}

/// Divides each row by its sum of exponentials and writes it; `place` is its token and head.
#[inline(always)]
unsafe fn store_queries<S: Tiles, E: SimdElement>(
    call: &Forward<'_, E>,
    rows: usize,
    place: &impl Fn(usize) -> (usize, usize),
    scratch: &Scratch,
) {
    let AttentionShape {
        heads, head_dim, ..
    } = *call.shape;
    for row in 0..rows {
        let (token, head) = place(row);
        let sums = &scratch.out[row * padded(head_dim)..];
        // SAFETY: the caller's promise.
        unsafe {
            let out = call.out.slice((token * heads + head) * head_dim, head_dim);
            store_row::<S, E>(sums.as_ptr(), head_dim, 1.0 / scratch.sum[row], out);
            call.lse.slice(head * call.tokens + token, 1)[0] =
                scratch.max[row] + scratch.sum[row].ln();
        }
    }
}

/// One tile: at most [`ROWS`] rows of scratch against the tile's first `keys` keys.
#[inline(always)]
unsafe fn tile<S: Tiles>(
    shape: &AttentionShape,
    scratch: &mut Scratch,
    rows: Range<usize>,
    keys: usize,
    edges: &Edges,
) {
    let width = padded(shape.head_dim);
    let q = &scratch.q[rows.start * width..rows.end * width];
    let out = &mut scratch.out[rows.start * width..rows.end * width];
    let (m, d) = (rows.len(), shape.head_dim);
    let mut factors = [0.0; ROWS];
    // SAFETY: the sizes of scratch.
    unsafe {
        let product = Product::scores(m, keys.next_multiple_of(S::LANES), d);
        let scores = scratch.scores.as_mut_ptr();
        let product = product.of(q.as_ptr(), scratch.keys.as_ptr(), scores);
        S::product(&product.from(Start::Zero, edges.columns(m)));

        let max = &mut scratch.max[rows.clone()];
        let sum = &mut scratch.sum[rows];
        let scores = &mut *scratch.scores;
        softmax::<S>(shape.softcap, scores, keys, edges, max, sum, &mut factors);

        let product = Product::rows(m, keys, d);
        let scores = scratch.scores.as_ptr();
        let product = product.of(scores, scratch.values.as_ptr(), out.as_mut_ptr());
        let start = Start::Scaled(factors.as_ptr());
        S::product(&product.from(start, edges.inner(m)));
    }
}

/// Turns scores into exponentials relative to the new running maximum, and says by which `factors` older sums shrink.
///
/// A key that a row does not see has an exponential of exactly 0, and a tile of which a row sees nothing has a factor
/// of exactly 1: such tiles leave the row as it is.
#[inline(always)]
unsafe fn softmax<S: Tiles>(
    softcap: Option<f32>,
    scores: &mut [f32],
    keys: usize,
    edges: &Edges,
    max: &mut [f32],
    sum: &mut [f32],
    factors: &mut [f32; ROWS],
) {
    let used = keys.next_multiple_of(S::LANES);
    let mut newest = [0.0f32; ROWS];
    // SAFETY: `used` scores of each row are in bounds, and the features are there by the caller's promise.
    unsafe {
        for (row, line) in scores.chunks_exact_mut(KEYS).enumerate().take(max.len()) {
            if let Some(cap) = softcap {
                cap_scores::<S>(cap, &mut line[..used]);
            }
            newest[row] = match edges.seen[row] {
                WHOLE => maximum::<S>(max[row], line),
                seen => masked_maximum::<S>(max[row], line, seen),
            };
        }
        for row in (0..max.len()).step_by(S::LANES) {
            let n = max.len() - row;
            let old = S::load_partial(max.as_ptr().add(row), n);
            let new = S::load(newest.as_ptr().add(row));
            (old - new)
                .exp_or_zero()
                .store(factors.as_mut_ptr().add(row));
            new.store_partial(max.as_mut_ptr().add(row), n);
        }
        for (row, line) in scores.chunks_exact_mut(KEYS).enumerate().take(max.len()) {
            let total = match edges.seen[row] {
                WHOLE => exponentials::<S>(max[row], line),
                seen => masked_exponentials::<S>(max[row], &mut line[..used], seen),
            };
            sum[row] = sum[row] * factors[row] + total;
        }
    }
}

/// The largest of a row's scores and `max`.
#[inline(always)]
unsafe fn maximum<S: Simd>(max: f32, line: &[f32]) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let mut most = S::splat(max);
        for at in (0..KEYS).step_by(S::LANES) {
            most = S::load(line[at..at + S::LANES].as_ptr()).max(most);
        }
        most.hmax()
    }
}

/// The largest of the scores in `seen` and `max`; other scores of the same vectors become -∞.
#[inline(always)]
unsafe fn masked_maximum<S: Simd>(max: f32, line: &mut [f32], (start, end): Part) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let hidden = S::splat(f32::NEG_INFINITY);
        let (first, last) = (S::splat(f32::from(start)), S::splat(f32::from(end)));
        let mut most = S::splat(max);
        for at in (start as usize / S::LANES * S::LANES..end as usize).step_by(S::LANES) {
            let index = S::load(INDICES[at..at + S::LANES].as_ptr());
            let at = line[at..at + S::LANES].as_mut_ptr();
            let score = S::select(index.lt(first), hidden, S::load(at));
            let score = S::select(index.lt(last), score, hidden);
            score.store(at);
            most = score.max(most);
        }
        most.hmax()
    }
}

/// Replaces a row's scores by their exponentials relative to `max`; returns their sum.
#[inline(always)]
unsafe fn exponentials<S: Simd>(max: f32, line: &mut [f32]) -> f32 {
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let max = S::splat(max);
        let mut total = S::splat(0.0);
        for at in (0..KEYS).step_by(S::LANES) {
            let at = line[at..at + S::LANES].as_mut_ptr();
            let p = (S::load(at) - max).exp_or_zero();
            p.store(at);
            total = total + p;
        }
        total.sum()
    }
}

/// As [`exponentials`] after [`masked_maximum`]; vectors without a visible key become 0.
#[inline(always)]
unsafe fn masked_exponentials<S: Simd>(max: f32, line: &mut [f32], (start, end): Part) -> f32 {
    let (start, end) = (
        start as usize / S::LANES * S::LANES,
        (end as usize).next_multiple_of(S::LANES),
    );
    // SAFETY: vectors of `line`; the features are there by the caller's promise.
    unsafe {
        let max = S::splat(max);
        let mut total = S::splat(0.0);
        for at in (0..line.len()).step_by(S::LANES) {
            let p = match (start..end).contains(&at) {
                true => (S::load(line[at..at + S::LANES].as_ptr()) - max).exp_or_zero(),
                false => S::splat(0.0),
            };
            p.store(line[at..at + S::LANES].as_mut_ptr());
            total = total + p;
        }
        total.sum()
    }
}

/// `cap * tanh(score / cap)`.
#[inline(always)]
unsafe fn cap_scores<S: Tiles>(cap: f32, line: &mut [f32]) {
    // SAFETY: `line` is whole vectors.
    unsafe {
        let (cap, inverse) = (S::splat(cap), S::splat(1.0 / cap));
        for at in (0..line.len()).step_by(S::LANES) {
            let at = line.as_mut_ptr().add(at);
            (cap * (S::load(at) * inverse).tanh()).store(at);
        }
    }
}
