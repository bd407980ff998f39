//! The forward pass of one block of queries: tiles of keys from left to right, softmax kept as running maximum and sum.

use super::paged::Walk;
use super::pages::{KvType, Stored};
use super::softmax::{multiply_columns, softmax};
use super::tile::{
    Bounds, KEYS, Part, Product, ROWS, Start, Tiles, load_columns, load_rows, padded, store_row,
    take,
};
use super::{AttentionShape, Block, Forward, KvView, Segment, Source, amx};
use crate::DType;
use crate::pool::Worker;
use crate::simd::{SimdElement, SimdLoad};
use half::{bf16, f16};
use std::ops::Range;

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

/// Scratch of a block. Rows are ordered by head, then query; there are so many that tile registers are whole.
pub(super) struct Scratch<'a> {
    /// `[head_dim, KEYS]`
    pub keys: &'a mut [f32],
    /// `[KEYS, padded]`
    pub values: &'a mut [f32],
    /// `[ROWS, KEYS]`
    pub scores: &'a mut [f32],
    /// `[rows, padded]`, times the scale
    pub q: &'a mut [f32],
    /// `[rows, padded]`, not yet divided by `sum`
    pub out: &'a mut [f32],
    /// `[rows]` each
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(worker: &'a mut Worker, head_dim: usize, rows: usize) -> Scratch<'a> {
        let width = padded(head_dim);
        let rows = rows.next_multiple_of(amx::HEIGHT);
        let rest = &mut worker
            .scratch::<f32>(2 * KEYS * width + ROWS * KEYS + 2 * rows * width + 2 * rows);
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
    // SAFETY: the caller's promise.
    unsafe {
        match call.kv {
            Source::Rows(kv) => walk_rows::<S, E>(call.shape, &kv, block, scratch),
            Source::Pages(kv, table) => match kv.kind() {
                KvType::Plain(DType::Bf16) if call.tiles => {
                    amx::walk::<bf16>(&pages(call, kv.plain(), table, block), scratch)
                }
                KvType::Int8 if call.tiles => {
                    amx::walk::<i8>(&pages(call, kv.int8(), table, block), scratch)
                }
                KvType::Plain(DType::F32) => {
                    S::walk::<f32>(&pages(call, kv.plain(), table, block), scratch)
                }
                KvType::Plain(DType::Bf16) => {
                    S::walk::<bf16>(&pages(call, kv.plain(), table, block), scratch)
                }
                KvType::Plain(DType::F16) => {
                    S::walk::<f16>(&pages(call, kv.plain(), table, block), scratch)
                }
                KvType::Plain(DType::F64) => unreachable!("f64 has no vectors"),
                KvType::Int8 => S::walk::<i8>(&pages(call, kv.int8(), table, block), scratch),
            },
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store_queries::<S, E>(call, rows, &place, scratch) };
}

/// All tiles of a block, where keys and values are rows.
#[inline(always)]
unsafe fn walk_rows<S: Tiles, E: SimdElement>(
    shape: &AttentionShape,
    kv: &KvView<'_, E>,
    block: &Block,
    scratch: &mut Scratch,
) {
    let Block {
        segment,
        kv_head,
        queries,
    } = block;
    let (head_dim, rows) = (shape.head_dim, shape.group() * queries.len());
    let end = segment.visible(shape, queries.end - 1).end;
    let first = segment.visible(shape, queries.start).start / KEYS * KEYS;
    let rows_of = |keys| TileRows::new(shape, kv, segment, *kv_head, keys);
    let mut ahead = rows_of(first..end.min(first + KEYS));
    for start in (first..end).step_by(KEYS) {
        let keys = start..end.min(start + KEYS);
        let tile_rows = ahead;
        ahead = rows_of(keys.end..end.min(keys.end + KEYS));
        // SAFETY: rows of one head.
        unsafe {
            load_columns::<S, E>(tile_rows.keys(), ahead.keys(), head_dim, scratch.keys);
            let values = &mut *scratch.values;
            load_rows::<S, E>(tile_rows.values(), ahead.values(), head_dim, 1.0, values);
        }
        let data = TileData {
            keys: scratch.keys.as_ptr(),
            values: scratch.values.as_ptr(),
            stride: padded(head_dim),
            scales: None,
        };
        for start in (0..rows).step_by(ROWS) {
            let part = start..rows.min(start + ROWS);
            let edges = Edges::new(shape, segment, &keys, part.clone(), queries);
            if !edges.none {
                // SAFETY: the level is supported.
                unsafe { tile::<S, f32>(shape, scratch, &data, part, keys.len(), &edges) };
            }
        }
    }
}

/// A block's walk over pages.
fn pages<'a, B>(
    call: &Forward<'a, impl SimdElement>,
    stored: Stored<'a, B>,
    table: &'a [u32],
    block: &'a Block,
) -> Walk<'a, B> {
    Walk {
        shape: call.shape,
        stored,
        table,
        segment: &block.segment,
        kv_head: block.kv_head,
        queries: &block.queries,
    }
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

/// Keys and values of a tile of [`KEYS`] tokens.
pub(super) struct TileData<'a, B> {
    /// `[head_dim, KEYS]`
    pub keys: *const B,
    /// `[KEYS, stride]`
    pub values: *const B,
    pub stride: usize,
    /// Factors `[KEYS]` of keys and of values, where numbers are stored without them.
    pub scales: Option<[&'a [f32]; 2]>,
}

/// One tile: at most [`ROWS`] rows of scratch against the tile's first `keys` keys.
#[inline(always)]
pub(super) unsafe fn tile<S: Tiles, B: SimdLoad>(
    shape: &AttentionShape,
    scratch: &mut Scratch,
    data: &TileData<'_, B>,
    rows: Range<usize>,
    keys: usize,
    edges: &Edges,
) {
    let width = padded(shape.head_dim);
    let q = &scratch.q[rows.start * width..rows.end * width];
    let out = &mut scratch.out[rows.start * width..rows.end * width];
    let (m, d) = (rows.len(), shape.head_dim);
    let used = keys.next_multiple_of(S::LANES);
    let mut factors = [0.0; ROWS];
    // SAFETY: the sizes of scratch.
    unsafe {
        let product = Product::scores(m, used, d);
        let product = product.of(q.as_ptr(), data.keys, scratch.scores.as_mut_ptr());
        S::product(&product.from(Start::Zero, edges.columns(m)));
        let scores = &mut *scratch.scores;
        if let Some([scales, _]) = data.scales {
            multiply_columns::<S>(&mut scores[..m * KEYS], &scales[..used]);
        }

        let max = &mut scratch.max[rows.clone()];
        let sum = &mut scratch.sum[rows];
        softmax::<S>(shape.softcap, scores, keys, edges, max, sum, &mut factors);
        if let Some([_, scales]) = data.scales {
            multiply_columns::<S>(&mut scores[..m * KEYS], &scales[..used]);
        }

        let product = Product {
            b_stride: data.stride,
            ..Product::rows(m, keys, d)
        };
        let product = product.of(scores.as_ptr(), data.values, out.as_mut_ptr());
        let start = Start::Scaled(factors.as_ptr());
        S::product(&product.from(start, edges.inner(m)));
    }
}
