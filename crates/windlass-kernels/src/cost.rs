//! What row kernels cost at least: the yardstick of their benchmarks.
//!
//! Bytes count every input read once and every output written once, outputs that are added to counting twice: what a
//! kernel moves whose tensors do not fit a cache. Operations count additions, multiplications, divisions, roots and
//! exponentials alike; they only tell a memory-bound kernel from another.

use crate::Element;

/// The least work of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    bytes: usize,
    flops: usize,
}

impl Cost {
    const fn new(bytes: usize, flops: usize) -> Cost {
        Cost { bytes, flops }
    }

    /// Bytes read and written.
    pub const fn bytes(self) -> usize {
        self.bytes
    }

    /// Arithmetic operations.
    pub const fn flops(self) -> usize {
        self.flops
    }
}

/// Bytes of an element.
const fn of<E: Element>() -> usize {
    E::DTYPE.size()
}

/// [`crate::norm::rms_norm`].
pub const fn rms_norm<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(
        (2 * rows + 1) * cols * of::<E>() + rows * of::<E::Acc>(),
        5 * rows * cols,
    )
}

/// [`crate::norm::rms_norm_backward`] with `dx` overwritten; the weight's gradient reads `x` and `dy` again.
pub const fn rms_norm_backward<E: Element>(rows: usize, cols: usize) -> Cost {
    let moved = (5 * rows + 1) * cols * of::<E>() + (2 * rows + 2 * cols) * of::<E::Acc>();
    Cost::new(moved, 11 * rows * cols)
}

/// [`crate::norm::layer_norm`].
pub const fn layer_norm<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(
        (2 * rows + 2) * cols * of::<E>() + 2 * rows * of::<E::Acc>(),
        8 * rows * cols,
    )
}

/// [`crate::norm::layer_norm_backward`] with `dx` overwritten; the weight's gradient reads `x` and `dy` again.
pub const fn layer_norm_backward<E: Element>(rows: usize, cols: usize) -> Cost {
    let moved = (5 * rows + 1) * cols * of::<E>() + 4 * (rows + cols) * of::<E::Acc>();
    Cost::new(moved, 18 * rows * cols)
}

/// [`crate::rope::rope`] of `width` rotated elements a row, the tables being cached.
pub const fn rope<E: Element>(rows: usize, width: usize) -> Cost {
    Cost::new(2 * rows * width * of::<E>(), 3 * rows * width)
}

/// [`crate::activation::activation`].
pub const fn activation<E: Element>(len: usize) -> Cost {
    Cost::new(2 * len * of::<E>(), 4 * len)
}

/// [`crate::activation::activation_backward`].
pub const fn activation_backward<E: Element>(len: usize) -> Cost {
    Cost::new(3 * len * of::<E>(), 9 * len)
}

/// [`crate::activation::gated`].
pub const fn gated<E: Element>(len: usize) -> Cost {
    Cost::new(3 * len * of::<E>(), 5 * len)
}

/// [`crate::activation::gated_backward`].
pub const fn gated_backward<E: Element>(len: usize) -> Cost {
    Cost::new(5 * len * of::<E>(), 12 * len)
}

/// [`crate::softmax::softmax`].
pub const fn softmax<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(2 * rows * cols * of::<E>(), 5 * rows * cols)
}

/// [`crate::softmax::softmax_backward`].
pub const fn softmax_backward<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(3 * rows * cols * of::<E>(), 4 * rows * cols)
}

/// [`crate::cross_entropy::cross_entropy_rows`] with the gradient and without a soft-cap.
pub const fn cross_entropy_rows<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(
        rows * cols * (of::<E::Acc>() + of::<E>()) + rows * (8 + of::<E::Acc>()),
        7 * rows * cols,
    )
}

/// [`crate::embedding::gather`].
pub const fn gather<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(rows * (2 * cols * of::<E>() + 4), rows * cols)
}

/// [`crate::embedding::scatter_add`].
pub const fn scatter_add<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(
        rows * (cols * (of::<E>() + 2 * of::<E::Acc>()) + 4),
        2 * rows * cols,
    )
}

/// [`crate::elementwise::add`] and [`crate::elementwise::mul`].
pub const fn binary<E: Element>(len: usize) -> Cost {
    Cost::new(3 * len * of::<E>(), len)
}

/// [`crate::elementwise::scale`] and [`crate::elementwise::scale_in_place`].
pub const fn scale<E: Element>(len: usize) -> Cost {
    Cost::new(2 * len * of::<E>(), len)
}

/// [`crate::elementwise::axpy`].
pub const fn axpy<E: Element>(len: usize) -> Cost {
    Cost::new(3 * len * of::<E>(), 2 * len)
}

/// [`crate::elementwise::fill`].
pub const fn fill<E: Element>(len: usize) -> Cost {
    Cost::new(len * of::<E>(), 0)
}

/// [`crate::cast::cast`].
pub const fn cast<X: Element, Y: Element>(len: usize) -> Cost {
    Cost::new(len * (of::<X>() + of::<Y>()), 0)
}

/// [`crate::elementwise::sum_rows`].
pub const fn sum_rows<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(
        rows * cols * of::<E>() + 2 * cols * of::<E::Acc>(),
        rows * cols,
    )
}

/// [`crate::elementwise::transpose`].
pub const fn transpose<E: Element>(rows: usize, cols: usize) -> Cost {
    Cost::new(2 * rows * cols * of::<E>(), 0)
}

/// [`crate::reduce::sum_squares`].
pub const fn sum_squares<E: Element>(len: usize) -> Cost {
    Cost::new(len * of::<E>(), 2 * len)
}

/// [`crate::reduce::dot`].
pub const fn dot<E: Element>(len: usize) -> Cost {
    Cost::new(2 * len * of::<E>(), 2 * len)
}

/// [`crate::reduce::count_nonfinite`].
pub const fn count_nonfinite<E: Element>(len: usize) -> Cost {
    Cost::new(len * of::<E>(), 0)
}

/// [`crate::topk::top_k`].
pub const fn top_k<E: Element>(rows: usize, cols: usize, k: usize) -> Cost {
    Cost::new(rows * (cols * of::<E>() + k * (of::<E>() + 4)), 0)
}

/// [`crate::optim::step`]: `values`, `grad` and each of `moments` in bytes an element.
/// Values and moments are read and written, the gradient is read.
pub const fn optimizer(len: usize, values: usize, grad: usize, moments: &[usize]) -> Cost {
    let (mut bytes, mut i) = (2 * values + grad, 0);
    while i < moments.len() {
        bytes += 2 * moments[i];
        i += 1;
    }
    Cost::new(len * bytes, len * (3 + 6 * moments.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn bytes_are_counted_once_a_stream() {
        assert_eq!(optimizer(10, 4, 4, &[4, 4]).bytes(), 280);
        assert_eq!(
            rms_norm::<bf16>(2, 8).bytes(),
            2 * 2 * 8 * 2 + 8 * 2 + 2 * 4
        );
    }
}
