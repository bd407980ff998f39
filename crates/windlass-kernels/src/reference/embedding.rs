//! Table look-up and its gradient.

use crate::{Element, Float};

/// `y[t] = table[ids[t]] * scale`, rows of `cols`.
pub fn gather<E: Element>(table: &[E], cols: usize, ids: &[u32], scale: f32, y: &mut [E]) {
    let scale = E::Acc::of(scale as f64);
    for (&id, y) in ids.iter().zip(y.chunks_exact_mut(cols)) {
        for (y, x) in y.iter_mut().zip(&table[id as usize * cols..]) {
            *y = E::store(x.load() * scale);
        }
    }
}

/// `dtable[ids[t]] += dy[t] * scale`, tokens in order.
pub fn scatter_add<E: Element>(
    dy: &[E],
    cols: usize,
    ids: &[u32],
    scale: f32,
    dtable: &mut [E::Acc],
) {
    let scale = E::Acc::of(scale as f64);
    for (&id, dy) in ids.iter().zip(dy.chunks_exact(cols)) {
        for (d, dy) in dtable[id as usize * cols..].iter_mut().zip(dy) {
            *d += dy.load() * scale;
        }
    }
}
