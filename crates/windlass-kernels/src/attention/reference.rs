//! Attention row by row, in straight loops: the specification. Safe, serial, any element type.

use super::{AttentionShape, KvView};
use crate::{Element, Float};
use std::ops::Range;

fn dot<E: Element>(a: &[E], b: &[E]) -> E::Acc {
    let mut sum = E::Acc::ZERO;
    for (x, y) in a.iter().zip(b) {
        sum += x.load() * y.load();
    }
    sum
}

/// Scaled and soft-capped score of a query and a key, and the derivative of the cap.
fn score<E: Element>(shape: &AttentionShape, q: &[E], k: &[E]) -> (E::Acc, E::Acc) {
    let scaled = dot(q, k) * E::Acc::of(f64::from(shape.scale));
    match shape.softcap {
        None => (scaled, E::Acc::ONE),
        Some(cap) => {
            let cap = E::Acc::of(f64::from(cap));
            let t = (scaled / cap).tanh();
            (cap * t, E::Acc::ONE - t * t)
        }
    }
}

/// One query `q` of one head against the keys and values of rows `keys`; returns the row's log-sum-exp.
///
/// # Shapes
/// `q`, `out`: `[head_dim]`; `scratch`: `[keys.len() + head_dim]`.
pub fn attention_row<E: Element>(
    shape: &AttentionShape,
    kv: &KvView<E>,
    kv_head: usize,
    keys: Range<usize>,
    q: &[E],
    scratch: &mut [E::Acc],
    out: &mut [E],
) -> E::Acc {
    let (p, sums) = scratch.split_at_mut(keys.len());
    let mut max = E::Acc::NEG_INFINITY;
    for (p, row) in p.iter_mut().zip(keys.clone()) {
        *p = score(shape, q, kv.key(row, kv_head, shape.head_dim)).0;
        max = max.maximum(*p);
    }
    sums.fill(E::Acc::ZERO);
    let mut total = E::Acc::ZERO;
    for (p, row) in p.iter().zip(keys) {
        let p = (*p - max).exp();
        total += p;
        for (sum, v) in sums.iter_mut().zip(kv.value(row, kv_head, shape.head_dim)) {
            *sum += p * v.load();
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = E::store(*sum / total);
    }
    max + total.ln()
}

/// Gradients of [`attention_row`]: writes `dq`, adds to the visible rows of `dk` and `dv`.
///
/// # Shapes
/// `q`, `out`, `dout`, `dq`: `[head_dim]`; `dk`, `dv`: `[keys.len(), head_dim]`; `scratch`: `[head_dim]`.
pub fn attention_backward_row<E: Element>(
    shape: &AttentionShape,
    kv: &KvView<E>,
    kv_head: usize,
    keys: Range<usize>,
    (q, out, lse, dout): (&[E], &[E], E::Acc, &[E]),
    scratch: &mut [E::Acc],
    dq: &mut [E],
    dk: &mut [E::Acc],
    dv: &mut [E::Acc],
) {
    let width = shape.head_dim;
    let scale = E::Acc::of(f64::from(shape.scale));
    let delta = dot(dout, out);
    scratch.fill(E::Acc::ZERO);
    for ((row, dk), dv) in keys
        .zip(dk.chunks_exact_mut(width))
        .zip(dv.chunks_exact_mut(width))
    {
        let k = kv.key(row, kv_head, width);
        let (s, slope) = score(shape, q, k);
        let p = (s - lse).exp();
        let ds = p * (dot(dout, kv.value(row, kv_head, width)) - delta) * slope * scale;
        for c in 0..width {
            dv[c] += p * dout[c].load();
            dk[c] += ds * q[c].load();
            scratch[c] += ds * k[c].load();
        }
    }
    for (dq, sum) in dq.iter_mut().zip(scratch) {
        *dq = E::store(*sum);
    }
}
