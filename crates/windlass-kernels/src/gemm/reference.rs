//! The specification: straight loops.

use crate::{Element, Float};

use super::{Epilogue, Layout, Mat};

/// `C[m, n] = op(A) op(B)` with the epilogue of [`super::gemm`]. Sums run over the inner dimension in order.
///
/// # Panics
/// When an operand is too short.
#[track_caller]
pub fn gemm<E: Element, C: Element<Acc = E::Acc>>(
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    a: Mat<E>,
    b: Mat<E>,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    // Columns are taken in strips, so that all layouts stream B; the order of each sum stays that of the inner dimension.
    const STRIP: usize = 64;
    for row in 0..m {
        for first in (0..n).step_by(STRIP) {
            let columns = first..n.min(first + STRIP);
            let mut sums = [E::Acc::ZERO; STRIP];
            for i in 0..k {
                let x = match layout {
                    Layout::Nt | Layout::Nn => a.data[row * a.stride + i],
                    Layout::Tn => a.data[i * a.stride + row],
                };
                for (sum, column) in sums.iter_mut().zip(columns.clone()) {
                    let y = match layout {
                        Layout::Nt => b.data[column * b.stride + i],
                        Layout::Nn | Layout::Tn => b.data[i * b.stride + column],
                    };
                    *sum += x.load() * y.load();
                }
            }
            for (sum, column) in sums.into_iter().zip(columns) {
                let c = &mut c[row * c_stride + column];
                let mut value = sum;
                if epilogue.accumulate {
                    value += c.load();
                }
                if let Some(bias) = epilogue.bias {
                    value += bias[column].load();
                }
                if let Some(residual) = epilogue.residual {
                    value += residual.data[row * residual.stride + column].load();
                }
                *c = C::store(value);
            }
        }
    }
}
