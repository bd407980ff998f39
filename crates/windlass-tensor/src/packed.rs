//! Packed weights: small integers with scales.

use crate::{Cpu, DType, Shape, Tensor, each_dtype};
use std::sync::Arc;
use windlass_kernels::Element;
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Activations, Layout, PackedMatrix};

/// A matrix of small integers with scales; see [`windlass_kernels::packed`].
///
/// Read by look-ups, by matrix products (without a gradient: as integers; with one: a panel of rows unpacked at a time);
/// never trained.
#[derive(Clone, Debug)]
pub struct Packed {
    shape: Shape,
    matrix: Arc<PackedMatrix>,
    /// The weight's column at each column of the matrix, where they are not in order.
    order: Option<Arc<[u32]>>,
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

    /// The matrix itself; its columns are in [`Packed::order`].
    pub fn matrix(&self) -> &PackedMatrix {
        &self.matrix
    }

    /// The same matrix as one whose columns were put in another order to be packed: column `j` of the matrix is column
    /// `order[j]` of the weight.
    ///
    /// # Panics
    /// When `order` does not name every column once.
    #[track_caller]
    #[must_use]
    pub fn with_order(self, order: Arc<[u32]>) -> Self {
        let mut seen = vec![false; self.shape[1]];
        for &column in &*order {
            let column = column as usize;
            assert!(
                column < seen.len() && !std::mem::replace(&mut seen[column], true),
                "column {column} is named twice, or is none of a weight {}",
                self.shape
            );
        }
        assert_eq!(order.len(), seen.len(), "an order of columns");
        Packed {
            order: Some(order),
            ..self
        }
    }

    /// The weight's column at each column of the matrix; `None` where they are the same.
    pub fn order(&self) -> Option<&Arc<[u32]>> {
        self.order.as_ref()
    }

    /// Rows that the matrix is to be multiplied with, their columns in its order, as integers.
    ///
    /// # Panics
    /// When `x` is not made of whole rows.
    #[track_caller]
    pub fn activations<E: Element>(&self, cpu: &Cpu, x: &[E]) -> Activations {
        let order = self.order.as_deref();
        Activations::quantize_ordered(&cpu.pool, &cpu.memory, x, self.shape[1], order)
    }

    /// Rows `range` as plain elements.
    pub fn unpack_rows(&self, cpu: &Cpu, range: std::ops::Range<usize>, dtype: DType) -> Tensor {
        let mut out = Tensor::empty(
            cpu,
            [range.len(), self.shape[1]],
            dtype,
            Category::Workspace,
        );
        each_dtype!(dtype, E => self.unpack(cpu, range, out.as_mut_slice::<E>()));
        out
    }

    /// Unpacks row `row` into `out`.
    pub fn unpack_row<E: Element>(&self, cpu: &Cpu, row: usize, out: &mut [E]) {
        self.unpack(cpu, row..row + 1, out);
    }

    fn unpack<E: Element>(&self, cpu: &Cpu, rows: std::ops::Range<usize>, out: &mut [E]) {
        self.matrix.unpack_rows(&cpu.pool, rows, out);
        let Some(order) = &self.order else { return };
        for row in out.chunks_mut(self.shape[1]) {
            let ordered = row.to_vec();
            for (&column, value) in order.iter().zip(ordered) {
                row[column as usize] = value;
            }
        }
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
            order: None,
        }
    }
}
