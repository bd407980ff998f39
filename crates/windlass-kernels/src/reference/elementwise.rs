//! Element by element operations, row sums and transposition.

use crate::{Element, Float};

/// `y = a + b`.
pub fn add<E: Element>(a: &[E], b: &[E], y: &mut [E]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = E::store(a.load() + b.load());
    }
}

/// `y = a b`.
pub fn mul<E: Element>(a: &[E], b: &[E], y: &mut [E]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = E::store(a.load() * b.load());
    }
}

/// `y = a x`.
pub fn scale<E: Element>(a: f32, x: &[E], y: &mut [E]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = E::store(E::Acc::of(a as f64) * x.load());
    }
}

/// `x = a x`.
pub fn scale_in_place<E: Element>(a: f32, x: &mut [E]) {
    for x in x {
        *x = E::store(E::Acc::of(a as f64) * x.load());
    }
}

/// `y += a x`.
pub fn axpy<E: Element>(a: f32, x: &[E], y: &mut [E]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = E::store(y.load() + E::Acc::of(a as f64) * x.load());
    }
}

/// `y = value`.
pub fn fill<E: Element>(value: E, y: &mut [E]) {
    y.fill(value);
}

/// `y = x` in another type, rounded to nearest even.
pub fn cast<X: Element, Y: Element>(x: &[X], y: &mut [Y]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = Y::from_f64(x.to_f64());
    }
}

/// `sums[c] += Σ_r x[r, start + c]`, rows in order.
pub fn sum_rows<E: Element>(x: &[E], cols: usize, start: usize, sums: &mut [E::Acc]) {
    for x in x.chunks_exact(cols) {
        for (sum, x) in sums.iter_mut().zip(&x[start..]) {
            *sum += x.load();
        }
    }
}

/// `y[c, r] = x[r, c]` for `x` of `rows` by `cols`.
pub fn transpose<E: Element>(x: &[E], rows: usize, cols: usize, y: &mut [E]) {
    for r in 0..rows {
        for c in 0..cols {
            y[c * rows + r] = x[r * cols + c];
        }
    }
}
