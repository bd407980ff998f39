//! The small ops: arithmetic, shapes, reductions.

use crate::tape::{Backprop, Backward};
use crate::{Cpu, DType, Shape, Tape, Tensor, Var, each_dtype};
use windlass_kernels::memory::Category;
use windlass_kernels::{Element, Float, elementwise, softmax};

fn like(cpu: &Cpu, x: &Tensor) -> Tensor {
    Tensor::empty(cpu, *x.shape(), x.dtype(), Category::Activations)
}

fn scaled(cpu: &Cpu, s: f64, x: &Tensor) -> Tensor {
    let mut y = like(cpu, x);
    each_dtype!(x.dtype(), E => elementwise::scale(&cpu.pool, s as f32, x.as_slice::<E>(), y.as_mut_slice::<E>()));
    y
}

fn product(cpu: &Cpu, a: &Tensor, b: &Tensor) -> Tensor {
    let mut y = like(cpu, a);
    each_dtype!(a.dtype(), E => elementwise::mul(&cpu.pool, a.as_slice::<E>(), b.as_slice::<E>(), y.as_mut_slice::<E>()));
    y
}

/// A backward pass given by a closure over what it saved.
struct Glue<F>(F);

impl<F: FnOnce(&mut Backprop<'_>, Tensor) + Send> Backward for Glue<F> {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        (self.0)(cx, dy)
    }
}

impl Tape {
    /// `y = a + b`.
    #[track_caller]
    pub fn add(&mut self, a: &Var, b: &Var) -> Var {
        assert_eq!(a.shape(), b.shape(), "sum of two shapes");
        let cpu = self.cpu().clone();
        let mut y = like(&cpu, &a.tensor);
        each_dtype!(y.dtype(), E => elementwise::add(
            &cpu.pool, a.tensor.as_slice::<E>(), b.tensor.as_slice::<E>(), y.as_mut_slice::<E>()));
        let (a, b) = (a.node(), b.node());
        self.record(y, a.is_some() || b.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                cx.add(a, dy.clone());
                cx.add(b, dy);
            })
        })
    }

    /// `y = a * b`, element by element.
    #[track_caller]
    pub fn mul(&mut self, a: &Var, b: &Var) -> Var {
        assert_eq!(a.shape(), b.shape(), "product of two shapes");
        let cpu = self.cpu().clone();
        let y = product(&cpu, &a.tensor, &b.tensor);
        let flows = a.node().is_some() || b.node().is_some();
        self.record(y, flows, || {
            let (a, b) = (a.clone(), b.clone());
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                if a.node().is_some() {
                    cx.add(a.node(), product(&cpu, &dy, &b.tensor));
                }
                if b.node().is_some() {
                    cx.add(b.node(), product(&cpu, &dy, &a.tensor));
                }
            })
        })
    }

    /// `y = s * x`.
    pub fn scale(&mut self, s: f64, x: &Var) -> Var {
        let y = scaled(self.cpu(), s, &x.tensor);
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                cx.add(x, scaled(&cpu, s, &dy));
            })
        })
    }

    /// `y = x + c`.
    pub fn shift(&mut self, c: f64, x: &Var) -> Var {
        let mut y = x.tensor.deep_clone(self.cpu(), Category::Activations);
        each_dtype!(y.dtype(), E => y.as_mut_slice::<E>().iter_mut().for_each(|v| *v = E::from_f64(v.to_f64() + c)));
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| cx.add(x, dy))
        })
    }

    /// `x` in another storage type; the gradient is rounded back.
    pub fn cast(&mut self, x: &Var, dtype: DType) -> Var {
        let from = x.tensor.dtype();
        let y = x.tensor.cast(self.cpu(), dtype, Category::Activations);
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                cx.add(x, dy.cast(&cpu, from, Category::Activations));
            })
        })
    }

    /// The same elements in another shape; shares the bytes.
    #[track_caller]
    pub fn reshape(&mut self, x: &Var, shape: impl Into<Shape>) -> Var {
        let from = *x.shape();
        let y = x.tensor.clone().reshape(shape);
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| cx.add(x, dy.reshape(from)))
        })
    }

    /// `y = xᵀ`.
    ///
    /// # Shapes
    /// `x [M, N]`, `y [N, M]`.
    #[track_caller]
    pub fn transpose(&mut self, x: &Var) -> Var {
        let y = transposed(self.cpu(), &x.tensor);
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                cx.add(x, transposed(&cpu, &dy));
            })
        })
    }

    /// Values side by side along the last axis.
    ///
    /// # Shapes
    /// `parts[i] [T, N_i]`, `y [T, Σ N_i]`.
    #[track_caller]
    pub fn concat(&mut self, parts: &[&Var]) -> Var {
        let cpu = self.cpu().clone();
        let (t, dtype) = (parts[0].tensor.rows(), parts[0].tensor.dtype());
        let widths: Vec<usize> = parts.iter().map(|p| p.tensor.cols()).collect();
        let total: usize = widths.iter().sum();
        let mut y = Tensor::empty(&cpu, [t, total], dtype, Category::Activations);
        each_dtype!(dtype, E => {
            let out = y.as_mut_slice::<E>();
            let mut start = 0;
            for (part, &width) in parts.iter().zip(&widths) {
                assert_eq!(part.tensor.rows(), t, "rows of values side by side");
                for (out, row) in out.chunks_mut(total).zip(part.tensor.as_slice::<E>().chunks(width)) {
                    out[start..start + width].copy_from_slice(row);
                }
                start += width;
            }
        });
        let nodes: Vec<Option<usize>> = parts.iter().map(|p| p.node()).collect();
        let flows = nodes.iter().any(Option::is_some);
        self.record(y, flows, || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                let mut start = 0;
                for (node, width) in nodes.into_iter().zip(widths) {
                    cx.add(node, columns(&cpu, &dy, start..start + width));
                    start += width;
                }
            })
        })
    }

    /// Columns `range` of a value: one part of a split.
    ///
    /// # Shapes
    /// `x [T, N]`, `y [T, range.len()]`.
    #[track_caller]
    pub fn split(&mut self, x: &Var, range: std::ops::Range<usize>) -> Var {
        let y = columns(self.cpu(), &x.tensor, range.clone());
        let (x, shape) = (x.node(), *x.shape());
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                let mut dx = Tensor::zeros(&cpu, shape, dy.dtype(), Category::Activations);
                let total = dx.cols();
                each_dtype!(dy.dtype(), E => {
                    for (out, row) in dx.as_mut_slice::<E>().chunks_mut(total).zip(dy.as_slice::<E>().chunks(range.len())) {
                        out[range.clone()].copy_from_slice(row);
                    }
                });
                cx.add(x, dx);
            })
        })
    }

    /// Sum of all elements, in the accumulator type.
    pub fn sum(&mut self, x: &Var) -> Var {
        let cpu = self.cpu().clone();
        let (shape, dtype) = (*x.shape(), x.tensor.dtype());
        let y = each_dtype!(dtype, E => {
            let total: f64 = x.tensor.as_slice::<E>().iter().map(|v| v.to_f64()).sum();
            Tensor::from_slice(&cpu, &[<E as Element>::Acc::of(total)], [1], Category::Activations)
        });
        let x = x.node();
        self.record(y, x.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                let mut dx = Tensor::empty(&cpu, shape, dtype, Category::Activations);
                each_dtype!(dtype, E => elementwise::fill(&cpu.pool, E::from_f64(dy.item()), dx.as_mut_slice::<E>()));
                cx.add(x, dx);
            })
        })
    }

    /// `softmax` over the last axis.
    pub fn softmax(&mut self, x: &Var) -> Var {
        let cpu = self.cpu().clone();
        let cols = x.tensor.cols();
        let mut y = like(&cpu, &x.tensor);
        each_dtype!(y.dtype(), E =>
            softmax::softmax(&cpu.pool, x.tensor.as_slice::<E>(), cols, y.as_mut_slice::<E>()));
        let (saved, node) = (y.clone(), x.node());
        self.record(y, node.is_some(), || {
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                let mut dx = like(&cpu, &dy);
                each_dtype!(dy.dtype(), E => softmax::softmax_backward(
                    &cpu.pool, saved.as_slice::<E>(), dy.as_slice::<E>(), cols, dx.as_mut_slice::<E>()));
                cx.add(node, dx);
            })
        })
    }

    /// Natural logarithm, element by element.
    pub fn log(&mut self, x: &Var) -> Var {
        let cpu = self.cpu().clone();
        let mut y = like(&cpu, &x.tensor);
        each_dtype!(y.dtype(), E => {
            let pairs = y.as_mut_slice::<E>().iter_mut().zip(x.tensor.as_slice::<E>());
            pairs.for_each(|(y, x)| *y = E::store(Float::ln(x.load())));
        });
        self.record(y, x.node().is_some(), || {
            let x = x.clone();
            Glue(move |cx: &mut Backprop<'_>, dy: Tensor| {
                let cpu = cx.cpu();
                let mut dx = like(&cpu, &dy);
                each_dtype!(dy.dtype(), E => {
                    let pairs = dx.as_mut_slice::<E>().iter_mut().zip(x.tensor.as_slice::<E>()).zip(dy.as_slice::<E>());
                    pairs.for_each(|((dx, x), dy)| *dx = E::store(dy.load() / x.load()));
                });
                cx.add(x.node(), dx);
            })
        })
    }
}

fn transposed(cpu: &Cpu, x: &Tensor) -> Tensor {
    let (m, n) = (x.rows(), x.cols());
    let mut y = Tensor::empty(cpu, [n, m], x.dtype(), Category::Activations);
    each_dtype!(x.dtype(), E => elementwise::transpose(&cpu.pool, x.as_slice::<E>(), m, n, y.as_mut_slice::<E>()));
    y
}

fn columns(cpu: &Cpu, x: &Tensor, range: std::ops::Range<usize>) -> Tensor {
    let total = x.cols();
    assert!(range.end <= total, "columns {range:?} of {}", x.shape());
    let mut y = Tensor::empty(
        cpu,
        [x.rows(), range.len()],
        x.dtype(),
        Category::Activations,
    );
    each_dtype!(x.dtype(), E => {
        for (out, row) in y.as_mut_slice::<E>().chunks_mut(range.len().max(1)).zip(x.as_slice::<E>().chunks(total)) {
            out.copy_from_slice(&row[range.clone()]);
        }
    });
    y
}
