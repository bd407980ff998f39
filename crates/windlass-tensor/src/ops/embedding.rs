//! Rows of a table by token id.

use crate::tape::{Backprop, Backward};
use crate::{Param, Shape, Tape, Tensor, Var, Weight, each_dtype};
use windlass_kernels::memory::Category;
use windlass_kernels::{DType, Element, embedding};

impl Tape {
    /// `y[t] = scale * table[ids[t]]`.
    ///
    /// # Shapes
    /// `table [V, D]`, `y [ids.len(), D]`. A packed table is unpacked row by row into `dtype`.
    ///
    /// # Panics
    /// When an id is not below `V`.
    #[track_caller]
    pub fn embedding(&mut self, table: Param<'_>, ids: &[u32], scale: f32, dtype: DType) -> Var {
        let cpu = self.cpu().clone();
        let (v, d) = (table.weight.shape()[0], table.weight.shape()[1]);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
            panic!("token id {id} against an embedding of {v} rows");
        }
        let mut y = Tensor::empty(&cpu, [ids.len(), d], dtype, Category::Activations);
        each_dtype!(dtype, E => match table.weight {
            Weight::Dense(table) => embedding::gather(&cpu.pool, table.as_slice::<E>(), ids, scale, y.as_mut_slice::<E>()),
            Weight::Packed(packed) => {
                let y = y.as_mut_slice::<E>();
                for (row, &id) in y.chunks_mut(d).zip(ids) {
                    packed.unpack_row(&cpu, id as usize, row);
                }
                windlass_kernels::elementwise::scale_in_place(&cpu.pool, scale, y);
            }
        });
        let shape = *table.weight.shape();
        self.record(y, true, || Saved {
            ids: ids.to_vec(),
            scale,
            slot: table.slot,
            shape,
        })
    }

    /// `y[i] = x[rows[i]]`: some rows of a value.
    #[track_caller]
    pub fn gather_rows(&mut self, x: &Var, rows: &[u32]) -> Var {
        let cpu = self.cpu().clone();
        let mut y = Tensor::empty(
            &cpu,
            [rows.len(), x.tensor.cols()],
            x.tensor.dtype(),
            Category::Activations,
        );
        each_dtype!(x.tensor.dtype(), E =>
            embedding::gather(&cpu.pool, x.tensor.as_slice::<E>(), rows, 1.0, y.as_mut_slice::<E>()));
        let shape = *x.shape();
        self.record(y, x.node().is_some(), || SavedRows {
            rows: rows.to_vec(),
            x: x.node(),
            shape,
        })
    }
}

struct Saved {
    ids: Vec<u32>,
    scale: f32,
    slot: usize,
    shape: Shape,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        if !cx.grads.wants(self.slot) {
            return;
        }
        let cpu = cx.cpu();
        each_dtype!(dy.dtype(), E => {
            let sum = cx.grads.sum::<<E as Element>::Acc>(&cpu, self.slot, &self.shape);
            embedding::scatter_add(&cpu.pool, dy.as_slice::<E>(), &self.ids, self.scale, sum);
        });
    }
}

struct SavedRows {
    rows: Vec<u32>,
    x: Option<usize>,
    shape: Shape,
}

impl Backward for SavedRows {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let mut sum = Tensor::zeros(
            &cpu,
            self.shape,
            dy.dtype().accumulator(),
            Category::Workspace,
        );
        each_dtype!(dy.dtype(), E => embedding::scatter_add(
            &cpu.pool, dy.as_slice::<E>(), &self.rows, 1.0, sum.as_mut_slice::<<E as Element>::Acc>()));
        cx.add(self.x, sum.cast(&cpu, dy.dtype(), Category::Activations));
    }
}
