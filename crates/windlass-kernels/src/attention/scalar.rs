//! The scalar tasks: the reference's rows, written where they belong.

use super::pages::{PAGE, PagedKv};
use super::reference::{attention_backward_row, attention_row};
use super::view::{KvView, Rows};
use super::{AttentionShape, Backward, Block, Forward, Segment, Source};
use crate::pool::Worker;
use crate::{Element, Float};
use std::ops::Range;

/// Attention of one block, row by row.
pub(super) fn forward_scalar<E: Element>(
    call: &Forward<'_, E>,
    block: &Block,
    worker: &mut Worker,
) {
    let AttentionShape {
        heads, head_dim, ..
    } = *call.shape;
    let group = call.shape.group();
    let segment = &block.segment;
    for head in block.kv_head * group..(block.kv_head + 1) * group {
        for i in block.queries.clone() {
            let (row, keys) = (segment.q_start + i, segment.visible(call.shape, i));
            let keys = segment.kv_start + keys.start..segment.kv_start + keys.end;
            // SAFETY: a query row of one head belongs to one block.
            let out = unsafe { call.out.slice((row * heads + head) * head_dim, head_dim) };
            let scratch = worker.scratch(keys.len() + head_dim);
            let q = call.q.head(row, head, head_dim);
            let lse = match &call.kv {
                Source::Rows(kv) => {
                    attention_row(call.shape, kv, block.kv_head, keys, q, scratch, out)
                }
                Source::Pages(kv, table) => {
                    paged_row(call.shape, kv, table, block.kv_head, keys, q, scratch, out)
                }
            };
            // SAFETY: as above.
            unsafe { call.lse.slice(head * call.tokens + row, 1)[0] = lse };
        }
    }
}

/// [`attention_row`] on the numbers that pages stand for.
fn paged_row<E: Element>(
    shape: &AttentionShape,
    kv: &PagedKv,
    table: &[u32],
    kv_head: usize,
    keys: Range<usize>,
    q: &[E],
    scratch: &mut [E::Acc],
    out: &mut [E],
) -> E::Acc {
    let d = shape.head_dim;
    let gather = |value| {
        let mut rows = vec![E::Acc::ZERO; keys.len() * d];
        for (j, row) in keys.clone().zip(rows.chunks_exact_mut(d)) {
            let slot = table[j / PAGE] as usize * PAGE + j % PAGE;
            kv.read(slot, kv_head, value, row);
        }
        rows
    };
    let (k, v) = (gather(false), gather(true));
    let view = KvView {
        keys: Rows::new(&k, d),
        values: Rows::new(&v, d),
    };
    let q: Vec<E::Acc> = q.iter().map(|x| x.load()).collect();
    let mut sums = vec![E::Acc::ZERO; d];
    let lse = attention_row(shape, &view, 0, 0..keys.len(), &q, scratch, &mut sums);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = E::store(sum);
    }
    lse
}

/// Gradients of one segment and kv head, row by row.
pub(super) fn backward_scalar<E: Element>(
    call: &Backward<'_, E>,
    segment: &Segment,
    kv_head: usize,
    worker: &mut Worker,
) {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = *call.shape;
    let group = call.shape.group();
    let scratch = worker.scratch::<E::Acc>((2 * segment.kv_len + 1) * head_dim);
    scratch.fill(E::Acc::ZERO);
    let (dk, scratch) = scratch.split_at_mut(segment.kv_len * head_dim);
    let (dv, scratch) = scratch.split_at_mut(segment.kv_len * head_dim);
    for head in kv_head * group..(kv_head + 1) * group {
        for i in 0..segment.q_len {
            let (row, seen) = (segment.q_start + i, segment.visible(call.shape, i));
            let part = (row * heads + head) * head_dim..(row * heads + head + 1) * head_dim;
            let q = call.q.head(row, head, head_dim);
            let lse = call.lse[head * call.tokens + row];
            let saved = (q, &call.out[part.clone()], lse, &call.dout[part.clone()]);
            // SAFETY: a query row of one head belongs to one segment and kv head.
            let dq = unsafe { call.dq.slice(part.start, head_dim) };
            let own = seen.start * head_dim..seen.end * head_dim;
            let (dk, dv) = (&mut dk[own.clone()], &mut dv[own]);
            let keys = segment.kv_start + seen.start..segment.kv_start + seen.end;
            attention_backward_row(
                call.shape, &call.kv, kv_head, keys, saved, scratch, dq, dk, dv,
            );
        }
    }
    for (sums, grads) in [(dk, call.dk), (dv, call.dv)] {
        for (j, sums) in sums.chunks_exact(head_dim).enumerate() {
            let start = ((segment.kv_start + j) * kv_heads + kv_head) * head_dim;
            // SAFETY: a key row of one head belongs to one segment and kv head.
            let grads = unsafe { grads.slice(start, head_dim) };
            for (grad, sum) in grads.iter_mut().zip(sums) {
                *grad = E::store(*sum);
            }
        }
    }
}
