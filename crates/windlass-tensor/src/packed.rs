//! Packed weights: small integers with scales.

use crate::{Cpu, DType, Shape, Tensor, each_dtype};
use std::sync::Arc;
use windlass_kernels::Element;
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Layout, PackedMatrix};

/// A matrix of small integers with scales; see [`windlass_kernels::packed`].
///
/// Read by look-ups, by matrix products (without a gradient: as integers; with one: a panel of rows unpacked at a time);
/// never trained.
#[derive(Clone, Debug)]
pub struct Packed {
    shape: Shape,
    matrix: Arc<PackedMatrix>,
}

impl Packed {
    /// Rounds a matrix to a layout; see [`PackedMatrix::quantize`].
    ///
    /// # Panics
    /// When the tensor is not a matrix.
    #[track_caller]
    pub fn quantize(cpu: &Cpu, layout: Layout, tensor: &Tensor) -> Self {
        assert_eq!(tensor.shape().len(), tensor.rows() * tensor.cols());
        let shape = [tensor.rows(), tensor.cols()];
        each_dtype!(tensor.dtype(), E => {
            PackedMatrix::quantize(&cpu.pool, &cpu.memory, layout, shape, tensor.as_slice::<E>())
        })
        .into()
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The matrix itself.
    pub fn matrix(&self) -> &PackedMatrix {
        &self.matrix
    }

    /// Rows `range` as plain elements.
    pub fn unpack_rows(&self, cpu: &Cpu, range: std::ops::Range<usize>, dtype: DType) -> Tensor {
        let mut out = Tensor::empty(
            cpu,
            [range.len(), self.shape[1]],
            dtype,
            Category::Workspace,
        );
        each_dtype!(dtype, E => self.matrix.unpack_rows(&cpu.pool, range, out.as_mut_slice::<E>()));
        out
    }

    /// Unpacks row `row` into `out`.
    pub fn unpack_row<E: Element>(&self, cpu: &Cpu, row: usize, out: &mut [E]) {
        self.matrix.unpack_rows(&cpu.pool, row..row + 1, out);
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.matrix.bytes().len()
    }
}

impl From<PackedMatrix> for Packed {
    fn from(matrix: PackedMatrix) -> Self {
        Packed {
            shape: [matrix.rows(), matrix.cols()].into(),
            matrix: Arc::new(matrix),
        }
    }
}
