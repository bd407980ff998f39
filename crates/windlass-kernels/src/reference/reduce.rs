//! Sums over whole buffers.

use crate::{Element, Float};

/// `Σ x²`, in `f64`.
pub fn sum_squares<E: Element>(x: &[E]) -> f64 {
    x.iter().map(|x| x.to_f64() * x.to_f64()).sum()
}

/// `Σ x y`, in `f64`.
pub fn dot<E: Element>(x: &[E], y: &[E]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum()
}

/// How many elements are infinite or NaN.
pub fn count_nonfinite<E: Element>(x: &[E]) -> usize {
    x.iter().filter(|x| !x.load().f64().is_finite()).count()
}
