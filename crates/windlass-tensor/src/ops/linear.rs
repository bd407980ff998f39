//! `y = x Wᵀ + b + r`: the one place that looks at a weight's representation.

use super::{Lora, Projection};
use crate::tape::{Backprop, Backward, Kept};
use crate::{Activation, Cpu, Packed, Param, Tape, Tensor, Var, Weight, each_dtype};
use std::ops::Range;
use windlass_kernels::elementwise::sum_rows;
use windlass_kernels::gemm::{Epilogue, Layout, Mat, gemm, gemm_packed};
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Product, multiply};
use windlass_kernels::{DType, Element};

/// Elements of a packed weight that are unpacked at a time: a panel is written and read in the caches, and shared by so
/// many columns of the result that the product is as fast as a plain one.
const PANEL: usize = 4 << 20;

impl Tape {
    /// `y = x Wᵀ (+ bias) (+ residual)`, sums in the accumulator type, rounded once; where the weight has an adapter
    /// ([`Lora`]), `W` is the adapted weight.
    ///
    /// # Shapes
    /// `x [.., K]`, `W [N, K]`, `bias [N]`, `residual` and `y [.., N]`.
    ///
    /// # Panics
    /// When shapes or storage types do not fit.
    #[track_caller]
    pub fn linear(
        &mut self,
        x: &Var,
        w: Param<'_>,
        bias: Option<Param<'_>>,
        residual: Option<&Var>,
    ) -> Var {
        assert_eq!(
            x.tensor.cols(),
            w.weight.shape()[1],
            "columns of x {} against a weight {}",
            x.shape(),
            w.weight.shape()
        );
        if let Some(watch) = &self.watch {
            watch(w.slot, &x.tensor);
        }
        let y = match w.lora.filter(|_| self.has_adapters()) {
            None => self.product(x, w, bias, residual),
            Some((lora, weights)) => match lora.magnitude {
                None => {
                    let y = self.product(x, w, bias, residual);
                    self.low_rank(x, y, lora, weights)
                }
                Some(slot) => match self.dropped(x, lora) {
                    None => {
                        let y = self.product(x, w, None, None);
                        let t = self.low_rank(x, y, lora, weights);
                        self.magnitude(&t, (w, lora, slot), weights, bias, residual)
                    }
                    // What is dropped is dropped from what the magnitudes change, and what they leave alone has all of it.
                    Some((kept, rest)) => {
                        let base = self.product(&rest, w, bias, residual);
                        let y = self.product(&kept, w, None, None);
                        let whole = Lora {
                            dropout: 0.0,
                            ..*lora
                        };
                        let t = self.low_rank(&kept, y, &whole, weights);
                        self.magnitude(&t, (w, lora, slot), weights, None, Some(&base))
                    }
                },
            },
        };
        self.overlay(x, y, w, bias, residual)
    }

    /// [`Tape::linear`] that ends a unit: on a tape that repeats a pass ([`Tape::repeating`]) its output is unspecified, for
    /// nobody reads it, and its way back is the same.
    ///
    /// # Panics
    /// As [`Tape::linear`].
    #[track_caller]
    pub fn linear_out(
        &mut self,
        x: &Var,
        w: Param<'_>,
        bias: Option<Param<'_>>,
        residual: &Var,
    ) -> Var {
        let lora = w.lora.filter(|_| self.has_adapters());
        if !self.repeats() || lora.is_some_and(|(lora, _)| lora.magnitude.is_some()) {
            return self.linear(x, w, bias, Some(residual));
        }
        let y = self.recorded(residual.tensor.clone(), x, w.slot, bias, Some(residual));
        match lora {
            None => y,
            Some((lora, weights)) => self.low_rank_of(x, y, lora, weights, false),
        }
    }

    /// [`Tape::linear`] of the weight without its adapter.
    pub(super) fn product(
        &mut self,
        x: &Var,
        w: Param<'_>,
        bias: Option<Param<'_>>,
        residual: Option<&Var>,
    ) -> Var {
        let (n, k) = (w.weight.shape()[0], w.weight.shape()[1]);
        if let (Weight::Packed(packed), true) = (w.weight, self.rounds_from(x.tensor.dtype())) {
            return self
                .packed(x, &[(packed, w.slot, bias)], residual)
                .remove(0);
        }
        let shape = with_cols(x.shape(), n);
        let cpu = self.cpu().clone();
        let mut y = Tensor::empty(&cpu, shape, x.tensor.dtype(), Category::Activations);
        if let Some(r) = residual {
            assert_eq!(
                r.shape(),
                y.shape(),
                "residual against the output of a linear op"
            );
        }
        each_dtype!(x.tensor.dtype(), E => {
            let m = x.tensor.rows();
            let bias = bias.map(|b| b.weight.dense().as_slice::<E>());
            let residual = residual.map(|r| r.tensor.as_slice::<E>());
            for_panels::<E>(&cpu, w.weight, |rows, panel| {
                let epilogue = Epilogue {
                    accumulate: false,
                    bias: bias.map(|b| &b[rows.clone()]),
                    residual: residual.map(|r| mat(&r[rows.start.min(r.len())..], n)),
                };
                let (a, b) = (mat(x.tensor.as_slice::<E>(), k), mat(panel, k));
                let start = rows.start.min(y.len());
                gemm(&cpu.pool, Layout::Nt, m, rows.len(), k, a, b, &mut y.as_mut_slice::<E>()[start..], n, epilogue);
            });
        });
        self.recorded(y, x, w.slot, bias, residual)
    }

    /// The output of a product, with its way back.
    fn recorded(
        &mut self,
        y: Tensor,
        x: &Var,
        w: usize,
        bias: Option<Param<'_>>,
        residual: Option<&Var>,
    ) -> Var {
        let (bias, residual) = (bias.map(|b| b.slot), residual.and_then(Var::node));
        self.record(y, true, || Saved {
            x: x.keep(),
            w,
            bias,
            residual,
        })
    }
}

impl Tape {
    /// [`Tape::linear`] of several weights on the same input, each with its bias. Packed weights that round their input
    /// share that and one run of the threads, where their columns are in the same order.
    ///
    /// # Panics
    /// When shapes or storage types do not fit.
    #[track_caller]
    pub fn linears(&mut self, x: &Var, weights: &[(Param<'_>, Option<Param<'_>>)]) -> Vec<Var> {
        let adapters = self.has_adapters();
        let packed = weights.iter().map(|(weight, bias)| match weight.weight {
            Weight::Packed(packed) => Some((packed, weight.slot, *bias)),
            Weight::Dense(_) => None,
        });
        let has_magnitude = |w: &Param<'_>| w.lora.is_some_and(|(l, _)| l.magnitude.is_some());
        let scaled = adapters && weights.iter().any(|(w, _)| has_magnitude(w));
        match packed.collect::<Option<Vec<_>>>() {
            Some(packed)
                if self.rounds_from(x.tensor.dtype()) && !scaled && self.watch.is_none() =>
            {
                let outputs = self.packed(x, &packed, None).into_iter().zip(weights);
                let adapted = outputs.map(|(y, &(w, bias))| {
                    let y = match w.lora.filter(|_| adapters) {
                        Some((lora, weights)) => self.low_rank(x, y, lora, weights),
                        None => y,
                    };
                    self.overlay(x, y, w, bias, None)
                });
                adapted.collect()
            }
            _ => weights
                .iter()
                .map(|&(weight, bias)| self.linear(x, weight, bias, None))
                .collect(),
        }
    }

    /// `act(gate(x)) * up(x)`: [`Tape::gated`] of two [`Tape::linears`], with the same bits; in one run of the threads where
    /// both weights are packed alike and no gradient is asked for.
    ///
    /// # Shapes
    /// `x [.., K]`, weights `[N, K]`, `y [.., N]`.
    ///
    /// # Panics
    /// When shapes or storage types do not fit.
    #[track_caller]
    pub fn gated_linears(
        &mut self,
        kind: Activation,
        x: &Var,
        gate: Projection<'_>,
        up: Projection<'_>,
    ) -> Var {
        if let (Some(g), Some(u)) = (self.packed_weight(gate), self.packed_weight(up))
            && g.goes_beside(&u)
            && x.tensor.rows() > 0
        {
            let cpu = self.cpu().clone();
            let shape = with_cols(x.shape(), u.packed.shape()[0]);
            let mut y = Tensor::empty(&cpu, shape, x.tensor.dtype(), Category::Activations);
            each_dtype!(x.tensor.dtype(), E => {
                let x = u.packed.activations(&cpu, x.tensor.as_slice::<E>());
                let product = Product {
                    gate: Some(g.gate(kind)),
                    ..u.product(y.as_mut_slice::<E>())
                };
                multiply(&cpu.pool, &x, &mut [product]);
            });
            return self.record_opaque("a packed product", y, &[]);
        }
        let both = self.linears(x, &[gate, up]);
        self.gated(kind, &both[0], &both[1])
    }

    /// Products of packed weights, as integers.
    #[track_caller]
    fn packed(
        &mut self,
        x: &Var,
        weights: &[(&Packed, usize, Option<Param<'_>>)],
        residual: Option<&Var>,
    ) -> Vec<Var> {
        let cpu = self.cpu().clone();
        let mut outputs: Vec<Tensor> = weights
            .iter()
            .map(|(packed, ..)| {
                let shape = with_cols(x.shape(), packed.shape()[0]);
                Tensor::empty(&cpu, shape, x.tensor.dtype(), Category::Activations)
            })
            .collect();
        if x.tensor.rows() > 0 {
            each_dtype!(x.tensor.dtype(), E => {
                let mut rest: Vec<_> = weights.iter().zip(&mut outputs).collect();
                while let Some(first) = rest.first().map(|(weight, _)| weight.0) {
                    let x = first.activations(&cpu, x.tensor.as_slice::<E>());
                    let mut products: Vec<Product<'_, E>> = rest
                        .extract_if(.., |(weight, _)| weight.0.order() == first.order())
                        .map(|((packed, _, bias), out)| Product {
                            bias: bias.map(|bias| bias.weight.dense().as_slice::<E>()),
                            residual: residual.map(|r| r.tensor.as_slice::<E>()),
                            ..Product::of(packed.matrix(), out.as_mut_slice::<E>())
                        })
                        .collect();
                    multiply(&cpu.pool, &x, &mut products);
                }
            });
        }
        let outputs = outputs.into_iter().zip(weights);
        outputs
            .map(|(y, &(_, slot, bias))| self.recorded(y, x, slot, bias, residual))
            .collect()
    }
}

/// The shape with its last axis replaced.
fn with_cols(shape: &crate::Shape, cols: usize) -> crate::Shape {
    let mut axes = shape.to_vec();
    *axes.last_mut().expect("a shape with at least one axis") = cols;
    crate::Shape::new(&axes)
}

/// How many of `n` lines of `len` elements of a packed weight are unpacked at a time.
fn panel_of(n: usize, len: usize) -> usize {
    let panels = (n * len).div_ceil(PANEL).max(1);
    n.div_ceil(panels).next_multiple_of(128)
}

/// Calls `body` with the rows of a weight as plain elements: all at once when dense, in panels when packed.
pub(super) fn for_panels<E: Element>(
    cpu: &Cpu,
    weight: &Weight,
    mut body: impl FnMut(Range<usize>, &[E]),
) {
    let (n, k) = (weight.shape()[0], weight.shape()[1]);
    match weight {
        Weight::Dense(tensor) => body(0..n, tensor.as_slice::<E>()),
        Weight::Packed(packed) => {
            let panel = panel_of(n, k);
            for start in (0..n).step_by(panel) {
                let rows = start..(start + panel).min(n);
                let panel = packed.unpack_rows(cpu, rows.clone(), E::DTYPE);
                body(rows, panel.as_slice::<E>());
            }
        }
    }
}

/// `dx [M, K] = dy [M, N] W [N, K]`, or `dx += dy W`: every element has the bits that a dense weight of the same numbers gives.
pub(super) fn input_gradient<E: Element>(
    cpu: &Cpu,
    weight: &Weight,
    dy: &[E],
    dx: &mut [E],
    accumulate: bool,
) {
    let (n, k) = (weight.shape()[0], weight.shape()[1]);
    let (m, a) = (dx.len() / k, mat(dy, n));
    let epilogue = Epilogue {
        accumulate,
        ..Default::default()
    };
    let mut plain = |b: &[E]| {
        gemm(
            &cpu.pool,
            Layout::Nn,
            m,
            k,
            n,
            a,
            mat(b, k),
            dx,
            k,
            epilogue,
        )
    };
    match weight {
        Weight::Dense(tensor) => plain(tensor.as_slice::<E>()),
        Weight::Packed(packed) => match packed.order() {
            None => gemm_packed(&cpu.pool, m, a, packed.matrix(), dx, k, epilogue),
            Some(_) => plain(packed.unpack_rows(cpu, 0..n, E::DTYPE).as_slice::<E>()),
        },
    }
}

struct Saved {
    x: Kept,
    w: usize,
    bias: Option<usize>,
    residual: Option<usize>,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let weights = cx.weights;
        let weight = weights.at(self.w).weight;
        let n = weight.shape()[0];
        if let Some((mut dx, accumulate)) = cx.take(self.x.node(), self.x.shape(), dy.dtype()) {
            each_dtype!(dy.dtype(), E => {
                input_gradient::<E>(&cpu, weight, dy.as_slice(), dx.as_mut_slice(), accumulate);
            });
            cx.put(self.x.node(), dx);
        }
        if cx.grads.wants(self.w) {
            let x = cx.value(&self.x);
            each_dtype!(dy.dtype(), E => {
                let dw = cx.grads.sum::<<E as Element>::Acc>(&cpu, self.w, weight.shape());
                weight_gradient::<E>(&cpu, &dy, &x, dw);
            });
        }
        if let Some(slot) = self.bias.filter(|&slot| cx.grads.wants(slot)) {
            each_dtype!(dy.dtype(), E => {
                let db = cx.grads.sum::<<E as Element>::Acc>(&cpu, slot, &[n].into());
                sum_rows(&cpu.pool, dy.as_slice::<E>(), db);
            });
        }
        cx.add(self.residual, dy);
    }
}

/// `dW += dyᵀ x`.
pub(super) fn weight_gradient<E: Element>(cpu: &Cpu, dy: &Tensor, x: &Tensor, dw: &mut [E::Acc]) {
    let (m, n, k) = (dy.rows(), dy.cols(), x.cols());
    debug_assert_eq!(DType::accumulator(E::DTYPE), <E::Acc as Element>::DTYPE);
    let (a, b) = (mat(dy.as_slice::<E>(), n), mat(x.as_slice::<E>(), k));
    let epilogue = Epilogue {
        accumulate: true,
        ..Default::default()
    };
    gemm(&cpu.pool, Layout::Tn, n, k, m, a, b, dw, k, epilogue);
}

/// A matrix of rows that begin `stride` elements apart.
pub(super) fn mat<E>(data: &[E], stride: usize) -> Mat<'_, E> {
    Mat { data, stride }
}
