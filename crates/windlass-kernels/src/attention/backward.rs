//! The backward pass of one segment and kv head: blocks of queries from first to last, tiles of keys from left to
//! right. The task owns its rows of all three gradients, so their sums have one order.

use super::forward::{Edges, TileRows};
use super::tile::{
    Bounds, KEYS, Part, Product, ROWS, Start, Tiles, load_columns, load_rows, padded, store_row,
    take,
};
use super::{AttentionShape, Backward, Segment};
use crate::pool::Worker;
use crate::simd::{Simd, SimdElement};
use std::ops::Range;

/// Scratch of a task. Rows of a block are ordered by head, then query.
struct Scratch<'a> {
    /// `[kv_len, padded]`: sums of the whole task
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// `[KEYS, padded]`
    keys: &'a mut [f32],
    /// `[head_dim, KEYS]`
    key_columns: &'a mut [f32],
    value_columns: &'a mut [f32],
    /// `[ROWS, KEYS]`: scores, then probabilities
    p: &'a mut [f32],
    /// `[ROWS, KEYS]`: gradients of probabilities, then of scores
    ds: &'a mut [f32],
    /// `[rows, padded]`, times the scale
    q: &'a mut [f32],
    /// `[rows, padded]`
    dout: &'a mut [f32],
    dq: &'a mut [f32],
    /// `[rows]`
    lse: &'a mut [f32],
    /// `[rows]`: sums of `dout * out`
    delta: &'a mut [f32],
}

impl<'a> Scratch<'a> {
    fn new(worker: &'a mut Worker, head_dim: usize, kv_len: usize, rows: usize) -> Scratch<'a> {
        let width = padded(head_dim);
        let lines = rows.next_multiple_of(16);
        let len = (2 * kv_len + 3 * KEYS + 3 * rows) * width + 2 * ROWS * KEYS + 2 * lines;
        let rest = &mut worker.scratch::<f32>(len);
        let scratch = Scratch {
            dk: take(rest, kv_len * width),
            dv: take(rest, kv_len * width),
            keys: take(rest, KEYS * width),
            key_columns: take(rest, KEYS * width),
            value_columns: take(rest, KEYS * width),
            p: take(rest, ROWS * KEYS),
            ds: take(rest, ROWS * KEYS),
            q: take(rest, rows * width),
            dout: take(rest, rows * width),
            dq: take(rest, rows * width),
            lse: take(rest, rows),
            delta: take(rest, rows),
        };
        scratch.dk.fill(0.0);
        scratch.dv.fill(0.0);
        scratch
    }
}

/// Gradients of one segment and kv head.
///
/// # Safety
/// The level of `S` is supported, and no other task writes the segment's rows of these heads.
#[inline(always)]
pub(super) unsafe fn backward_simd<S: Tiles, E: SimdElement>(
    call: &Backward<'_, E>,
    segment: &Segment,
    kv_head: usize,
    worker: &mut Worker,
) {
    let AttentionShape {
        kv_heads, head_dim, ..
    } = *call.shape;
    let count = super::block_len(call.shape).min(segment.q_len).max(1);
    let rows = call.shape.group() * count;
    let scratch = &mut Scratch::new(worker, head_dim, segment.kv_len, rows);
    for start in (0..segment.q_len).step_by(count) {
        let queries = start..segment.q_len.min(start + count);
        // SAFETY: the caller's promise.
        unsafe { block::<S, E>(call, segment, kv_head, queries, scratch) };
    }
    for (sums, grads) in [(&scratch.dk, call.dk), (&scratch.dv, call.dv)] {
        for j in 0..segment.kv_len {
            let sums = &sums[j * padded(head_dim)..];
            // SAFETY: the caller's promise.
            unsafe {
                let to = grads.slice(
                    ((segment.kv_start + j) * kv_heads + kv_head) * head_dim,
                    head_dim,
                );
                store_row::<S, E>(sums.as_ptr(), head_dim, 1.0, to);
            }
        }
    }
}

/// All tiles of one block of queries.
#[inline(always)]
unsafe fn block<S: Tiles, E: SimdElement>(
    call: &Backward<'_, E>,
    segment: &Segment,
    kv_head: usize,
    queries: Range<usize>,
    scratch: &mut Scratch,
) {
    let AttentionShape {
        heads,
        head_dim,
        scale,
        ..
    } = *call.shape;
    let (group, count, width) = (call.shape.group(), queries.len(), padded(head_dim));
    let rows = group * count;
    let place = |row: usize| {
        (
            segment.q_start + queries.start + row % count,
            kv_head * group + row / count,
        )
    };
    // SAFETY: the level is supported.
    unsafe { load_queries::<S, E>(call, rows, &place, scratch) };
    scratch.dq[..rows * width].fill(0.0);
    let end = segment.visible(call.shape, queries.end - 1).end;
    let first = segment.visible(call.shape, queries.start).start / KEYS * KEYS;
    let rows_of = |keys| TileRows::new(call.shape, &call.kv, segment, kv_head, keys);
    let mut ahead = rows_of(first..end.min(first + KEYS));
    for start in (first..end).step_by(KEYS) {
        let keys = start..end.min(start + KEYS);
        let tile_rows = ahead;
        ahead = rows_of(keys.end..end.min(keys.end + KEYS));
        // SAFETY: rows of one head.
        unsafe {
            load_rows::<S, E>(tile_rows.keys(), ahead.keys(), head_dim, 1.0, scratch.keys);
            load_columns::<S, E>(tile_rows.keys(), &[], head_dim, scratch.key_columns);
            let columns = &mut *scratch.value_columns;
            load_columns::<S, E>(tile_rows.values(), ahead.values(), head_dim, columns);
        }
        for start in (0..rows).step_by(ROWS) {
            let part = start..rows.min(start + ROWS);
            let edges = Edges::new(call.shape, segment, &keys, part.clone(), &queries);
            if !edges.none {
                // SAFETY: the level is supported.
                unsafe { tile::<S>(call.shape, scratch, part, keys.clone(), &edges) };
            }
        }
    }
    for row in 0..rows {
        let (token, head) = place(row);
        let sums = &scratch.dq[row * width..];
        // SAFETY: the caller's promise.
        unsafe {
            let dq = call.dq.slice((token * heads + head) * head_dim, head_dim);
            store_row::<S, E>(sums.as_ptr(), head_dim, scale, dq);
        }
    }
}

/// Loads what a block keeps of its rows; `place` is the token and head of each.
#[inline(always)]
unsafe fn load_queries<S: Tiles, E: SimdElement>(
    call: &Backward<'_, E>,
    rows: usize,
    place: &impl Fn(usize) -> (usize, usize),
    scratch: &mut Scratch,
) {
    let AttentionShape {
        heads,
        head_dim,
        scale,
        ..
    } = *call.shape;
    let width = padded(head_dim);
    for row in 0..rows {
        let (token, head) = place(row);
        let at = (token * heads + head) * head_dim;
        let (out, dout) = (&call.out[at..at + head_dim], &call.dout[at..at + head_dim]);
        scratch.lse[row] = call.lse[head * call.tokens + token];
        // SAFETY: rows of one head.
        unsafe {
            let q = call.q.head(token, head, head_dim).as_ptr();
            load_rows::<S, E>(&[q], &[], head_dim, scale, &mut scratch.q[row * width..]);
            load_rows::<S, E>(
                &[dout.as_ptr()],
                &[],
                head_dim,
                1.0,
                &mut scratch.dout[row * width..],
            );
            scratch.delta[row] = dot::<S, E>(out, dout);
        }
    }
}

/// Sum of products of two rows.
#[inline(always)]
unsafe fn dot<S: Simd, E: SimdElement>(a: &[E], b: &[E]) -> f32 {
    // SAFETY: reads stay within the rows; the features are there by the caller's promise.
    unsafe {
        let mut sum = S::splat(0.0);
        for at in (0..a.len()).step_by(S::LANES) {
            let x = E::load_vector_partial::<S>(a.as_ptr().add(at), a.len() - at);
            sum = x.fma(
                E::load_vector_partial::<S>(b.as_ptr().add(at), a.len() - at),
                sum,
            );
        }
        sum.sum()
    }
}

/// One tile: at most [`ROWS`] rows of the block against the tile `keys`.
#[inline(always)]
unsafe fn tile<S: Tiles>(
    shape: &AttentionShape,
    scratch: &mut Scratch,
    rows: Range<usize>,
    keys: Range<usize>,
    edges: &Edges,
) {
    let width = padded(shape.head_dim);
    let own = rows.start * width..rows.end * width;
    let (m, n, d) = (rows.len(), keys.len(), shape.head_dim);
    let seeing = seeing(edges, m);
    let onto_keys = if edges.all {
        Bounds::All
    } else {
        Bounds::Inner(&seeing[..n])
    };
    let scores = Product::scores(m, n.next_multiple_of(S::LANES), d);
    let scores = scores.from(Start::Zero, edges.columns(m));
    let onto_keys = Product::transposed(n, m, d).from(Start::Sum, onto_keys);
    let onto_queries = Product::rows(m, n, d).from(Start::Sum, edges.inner(m));
    let summed = keys.start * width..keys.end * width;
    let (dk, dv) = (&mut scratch.dk[summed.clone()], &mut scratch.dv[summed]);
    let (q, dout) = (
        scratch.q[own.clone()].as_ptr(),
        scratch.dout[own.clone()].as_ptr(),
    );
    let dq = &mut scratch.dq[own];
    // SAFETY: the sizes of scratch.
    unsafe {
        S::product(&scores.of(q, scratch.key_columns.as_ptr(), scratch.p.as_mut_ptr()));
        S::product(&scores.of(
            dout,
            scratch.value_columns.as_ptr(),
            scratch.ds.as_mut_ptr(),
        ));
        let (lse, delta) = (&scratch.lse[rows.clone()], &scratch.delta[rows]);
        softmax_backward::<S>(shape.softcap, (scratch.p, scratch.ds), n, edges, lse, delta);
        S::product(&onto_keys.of(scratch.p.as_ptr(), dout, dv.as_mut_ptr()));
        S::product(&onto_keys.of(scratch.ds.as_ptr(), q, dk.as_mut_ptr()));
        S::product(&onto_queries.of(scratch.ds.as_ptr(), scratch.keys.as_ptr(), dq.as_mut_ptr()));
    }
}

/// The rows that see each key, from the first to the last of them; nothing of use where `edges.all`.
fn seeing(edges: &Edges, rows: usize) -> [Part; KEYS] {
    let mut seeing = [(u8::MAX, 0); KEYS];
    if edges.all {
        return seeing;
    }
    for (row, &(start, end)) in edges.seen[..rows].iter().enumerate() {
        if start < end {
            for part in &mut seeing[start as usize..end as usize] {
                *part = (part.0.min(row as u8), row as u8 + 1);
            }
        }
    }
    seeing
}

/// Turns scores `p` into probabilities, and gradients `ds` of probabilities into gradients of scores.
#[inline(always)]
unsafe fn softmax_backward<S: Simd>(
    softcap: Option<f32>,
    (p, ds): (&mut [f32], &mut [f32]),
    keys: usize,
    edges: &Edges,
    lse: &[f32],
    delta: &[f32],
) {
    let used = keys.next_multiple_of(S::LANES);
    for (row, (p, ds)) in p
        .chunks_exact_mut(KEYS)
        .zip(ds.chunks_exact_mut(KEYS))
        .enumerate()
        .take(lse.len())
    {
        // SAFETY: `used` elements of each row are in bounds; the features are there by the caller's promise.
        unsafe {
            let (lse, delta, one) = (S::splat(lse[row]), S::splat(delta[row]), S::splat(1.0));
            for at in (0..used).step_by(S::LANES) {
                let (p, ds) = (p.as_mut_ptr().add(at), ds.as_mut_ptr().add(at));
                let mut score = S::load(p);
                let mut gradient = S::load(ds) - delta;
                if let Some(cap) = softcap {
                    let t = (score * S::splat(1.0 / cap)).tanh();
                    score = S::splat(cap) * t;
                    gradient = gradient * t.fnma(t, one);
                }
                let probability = (score - lse).exp_or_zero();
                probability.store(p);
                (probability * gradient).store(ds);
            }
        }
        if !edges.all {
            let (start, end) = (edges.seen[row].0 as usize, edges.seen[row].1 as usize);
            for line in [p, ds] {
                line[..start].fill(0.0);
                line[end..used].fill(0.0);
            }
        }
    }
}
