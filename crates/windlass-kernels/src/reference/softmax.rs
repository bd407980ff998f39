//! Softmax over rows: formulas as in [`crate::softmax`].

use crate::{Element, Float};

/// The largest element and `Σ e^(x - max)` of a row.
pub(super) fn max_and_sum<E: Element>(x: &[E]) -> (E::Acc, E::Acc) {
    let max = x
        .iter()
        .fold(E::Acc::NEG_INFINITY, |m, x| m.maximum(x.load()));
    (max, x.iter().map(|x| (x.load() - max).exp()).sum())
}

/// `y = e^(x - max) / Σ e^(x - max)`.
pub fn softmax<E: Element>(x: &[E], cols: usize, y: &mut [E]) {
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        let (max, sum) = max_and_sum(x);
        for (y, x) in y.iter_mut().zip(x) {
            *y = E::store((x.load() - max).exp() / sum);
        }
    }
}

/// `dx = y (dy - Σ y dy)`.
pub fn softmax_backward<E: Element>(y: &[E], dy: &[E], cols: usize, dx: &mut [E]) {
    for ((y, dy), dx) in y
        .chunks_exact(cols)
        .zip(dy.chunks_exact(cols))
        .zip(dx.chunks_exact_mut(cols))
    {
        let dot: E::Acc = y.iter().zip(dy).map(|(y, dy)| y.load() * dy.load()).sum();
        for c in 0..cols {
            dx[c] = E::store(y[c].load() * (dy[c].load() - dot));
        }
    }
}

/// `y = x - max - ln Σ e^(x - max)`.
pub fn log_softmax<E: Element>(x: &[E], cols: usize, y: &mut [E]) {
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        let (max, sum) = max_and_sum(x);
        for (y, x) in y.iter_mut().zip(x) {
            *y = E::store((x.load() - max) - sum.ln());
        }
    }
}

/// `dx = dy - e^y Σ dy`.
pub fn log_softmax_backward<E: Element>(y: &[E], dy: &[E], cols: usize, dx: &mut [E]) {
    for ((y, dy), dx) in y
        .chunks_exact(cols)
        .zip(dy.chunks_exact(cols))
        .zip(dx.chunks_exact_mut(cols))
    {
        let sum: E::Acc = dy.iter().map(|dy| dy.load()).sum();
        for c in 0..cols {
            dx[c] = E::store(dy[c].load() - y[c].load().exp() * sum);
        }
    }
}
