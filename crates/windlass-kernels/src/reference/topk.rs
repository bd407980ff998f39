//! The largest elements of rows.

use crate::{Element, Float};

/// For each row of `cols`, the `k` largest elements and their columns, descending; ties go to the lower column.
pub fn top_k<E: Element>(x: &[E], cols: usize, k: usize, values: &mut [E], indices: &mut [u32]) {
    for ((x, values), indices) in x
        .chunks_exact(cols)
        .zip(values.chunks_exact_mut(k))
        .zip(indices.chunks_exact_mut(k))
    {
        // Insertion into a short sorted list: k is a handful of experts.
        let mut filled = 0;
        for (c, &v) in x.iter().enumerate() {
            // NaN ranks as -∞, so that it never displaces a number.
            let rank = |e: E| {
                if e.load().f64().is_nan() {
                    E::Acc::NEG_INFINITY
                } else {
                    e.load()
                }
            };
            let at = values[..filled]
                .iter()
                .position(|&held| rank(v) > rank(held))
                .unwrap_or(filled);
            if at == k {
                continue;
            }
            filled = (filled + 1).min(k);
            values[at..filled].rotate_right(1);
            indices[at..filled].rotate_right(1);
            (values[at], indices[at]) = (v, c as u32);
        }
    }
}
