//! Packed weights: blocks of small integers with scales.

use crate::{Cpu, DType, Shape, Tensor, each_dtype};
use std::sync::Arc;
use windlass_kernels::memory::Category;
use windlass_kernels::{Element, quant};

/// A matrix in 8-bit integers with one `f32` scale per group of 32 along a row: `w = scale * q`, symmetric.
///
/// Read by look-ups and matrix products, which unpack a panel of rows at a time; never trained.
#[derive(Clone, Debug)]
pub struct Packed {
    shape: Shape,
    blocks: Arc<quant::Q8Blocks>,
}

impl Packed {
    /// Quantizes a matrix, rounding to nearest; each group's largest magnitude becomes 127.
    ///
    /// # Panics
    /// When the tensor is not a matrix.
    #[track_caller]
    pub fn quantize(cpu: &Cpu, matrix: &Tensor) -> Self {
        assert_eq!(matrix.shape().len(), matrix.rows() * matrix.cols());
        let blocks = each_dtype!(matrix.dtype(), E => quant::Q8Blocks::quantize(&cpu.pool, matrix.as_slice::<E>(), matrix.cols()));
        Packed {
            shape: *matrix.shape(),
            blocks: Arc::new(blocks),
        }
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Rows `range` as plain elements.
    pub fn unpack_rows(&self, cpu: &Cpu, range: std::ops::Range<usize>, dtype: DType) -> Tensor {
        let mut out = Tensor::empty(
            cpu,
            [range.len(), self.shape[1]],
            dtype,
            Category::Workspace,
        );
        each_dtype!(dtype, E => self.blocks.unpack_rows(&cpu.pool, range, out.as_mut_slice::<E>()));
        out
    }

    /// Unpacks row `row` into `out`.
    pub fn unpack_row<E: Element>(&self, cpu: &Cpu, row: usize, out: &mut [E]) {
        self.blocks.unpack_rows(&cpu.pool, row..row + 1, out);
    }

    /// Bytes of the quants and scales.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes()
    }
}
