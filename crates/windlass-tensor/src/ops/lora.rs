//! Low-rank adapters of a linear op: `y + s (x Aᵀ) Bᵀ`, and the magnitudes of DoRA.
//!
//! The product with the adapted weight itself is the linear op's business; here its output is added to in place.

use super::linear::{for_panels, mat, weight_gradient};
use crate::tape::{Backprop, Backward, Kept};
use crate::{Cpu, DType, Param, Shape, Tape, Tensor, Var, Weight, Weights, each_dtype};
use std::borrow::Cow;
use windlass_kernels::Element;
use windlass_kernels::elementwise::{axpy, scale_in_place, sum_rows};
use windlass_kernels::gemm::{Epilogue, Layout, gemm};
use windlass_kernels::memory::Category;
use windlass_kernels::reduce::sum_squares;

/// Where the parameters of a weight's low-rank adapter stand in its unit, and how it is applied.
///
/// # Source
/// Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA", for the magnitude.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// Slot of `A [r, in]`.
    pub a: usize,
    /// Slot of `B [out, r]`.
    pub b: usize,
    /// Slot of DoRA's magnitudes `[out]`.
    pub magnitude: Option<usize>,
    /// What the product of both is multiplied with.
    pub scale: f64,
    /// Part of the input's elements that are dropped before `A` in training.
    pub dropout: f64,
}

impl Lora {
    /// `A` and `B` in the storage type of the values they are multiplied with.
    pub(super) fn factors<'w>(
        &self,
        cpu: &Cpu,
        weights: &'w Weights,
        dtype: DType,
    ) -> (Cow<'w, Tensor>, Cow<'w, Tensor>) {
        let take = |slot: usize| {
            let tensor = weights.at(slot).weight.dense();
            match tensor.dtype() == dtype {
                true => Cow::Borrowed(tensor),
                false => Cow::Owned(tensor.cast(cpu, dtype, Category::Workspace)),
            }
        };
        (take(self.a), take(self.b))
    }
}

impl Tape {
    /// `y + s (x Aᵀ) Bᵀ`, in place of `y`.
    ///
    /// # Panics
    /// When the shapes do not fit.
    #[track_caller]
    pub(super) fn low_rank(&mut self, x: &Var, y: Var, lora: &Lora, weights: &Weights) -> Var {
        self.low_rank_of(x, y, lora, weights, true)
    }

    /// [`Tape::low_rank`]; with `adds` not set, `y` stays as it is and only the way back is recorded.
    #[track_caller]
    pub(super) fn low_rank_of(
        &mut self,
        x: &Var,
        y: Var,
        lora: &Lora,
        weights: &Weights,
        adds: bool,
    ) -> Var {
        let cpu = self.cpu().clone();
        let (a, b) = lora.factors(&cpu, weights, x.tensor.dtype());
        assert_fits(&x.tensor, &a, &b, y.tensor.cols());
        let drop = self.drop(lora);
        let input = Drop::apply(drop, &cpu, &x.tensor);
        let node = y.node();
        let mut out = y.tensor;
        let (scale, category) = (lora.scale, Category::Activations);
        let z = each_dtype!(input.dtype(), E => {
            let x = input.as_slice::<E>();
            match adds {
                true => add_product(&cpu, x, (&a, &b), scale, out.as_mut_slice::<E>(), category),
                false => reduced(&cpu, x, &a, scale, category),
            }
        });
        let lora = *lora;
        self.record(out, true, || SavedLora {
            x: x.keep(),
            y: node,
            z,
            lora,
            drop,
        })
    }

    /// What an adapter drops of its input; nothing but in training.
    fn drop(&self, lora: &Lora) -> Option<Drop> {
        let seed = self.noise(lora.a).filter(|_| lora.dropout > 0.0)?;
        Some(Drop {
            seed,
            part: lora.dropout,
        })
    }

    /// What an adapter keeps of its input, made larger in proportion, and what is missing from it to the whole; `None` where
    /// nothing is dropped.
    pub(super) fn dropped(&mut self, x: &Var, lora: &Lora) -> Option<(Var, Var)> {
        let drop = self.drop(lora)?;
        let cpu = self.cpu().clone();
        let mut part = |rest: bool| {
            let value = drop.part_of(&cpu, &x.tensor, rest);
            let node = x.node();
            self.record(value, node.is_some(), || SavedDrop {
                x: node,
                drop,
                rest,
            })
        };
        Some((part(false), part(true)))
    }

    /// `t * m / ‖W + s B A‖ (+ bias) (+ residual)`, the norm taken of each row of the weight and held constant in the
    /// backward pass, as DoRA's authors propose. `t` is the product with the adapted weight.
    #[track_caller]
    pub(super) fn magnitude(
        &mut self,
        t: &Var,
        (w, lora, slot): (Param<'_>, &Lora, usize),
        weights: &Weights,
        bias: Option<Param<'_>>,
        residual: Option<&Var>,
    ) -> Var {
        let cpu = self.cpu().clone();
        let dtype = t.tensor.dtype();
        let n = t.tensor.cols();
        let norms = row_norms(&cpu, w.weight, Some((lora, weights)), dtype);
        let magnitudes = weights.at(slot).weight.dense().to_f64();
        assert_eq!(magnitudes.len(), n, "magnitudes against rows of a weight");
        let mut y = Tensor::empty(&cpu, *t.shape(), dtype, Category::Activations);
        each_dtype!(dtype, E => if !cpu.pool.is_dry() {
            let bias = bias.map(|b| b.weight.dense().as_slice::<E>());
            let residual = residual.map(|r| r.tensor.as_slice::<E>());
            let t = t.tensor.as_slice::<E>();
            rescale(t, (&magnitudes, &norms), bias, residual, y.as_mut_slice::<E>());
        });
        let (bias, residual) = (bias.map(|b| b.slot), residual.and_then(Var::node));
        self.record(y, true, || SavedMagnitude {
            t: t.clone(),
            slot,
            magnitudes,
            norms,
            bias,
            residual,
        })
    }
}

/// Checks the shapes of an adapter's factors.
#[track_caller]
pub(super) fn assert_fits(x: &Tensor, a: &Tensor, b: &Tensor, n: usize) {
    assert!(
        a.cols() == x.cols() && n == b.rows() && a.rows() == b.cols(),
        "an adapter {} and {} of a product of {} to {n} columns",
        a.shape(),
        b.shape(),
        x.shape(),
    );
}

/// `y += s (x Aᵀ) Bᵀ`; returns `s x Aᵀ`.
pub(super) fn add_product<E: Element>(
    cpu: &Cpu,
    x: &[E],
    (a, b): (&Tensor, &Tensor),
    scale: f64,
    y: &mut [E],
    category: Category,
) -> Tensor {
    let z = reduced(cpu, x, a, scale, category);
    let (m, n, r) = (z.rows(), b.rows(), z.cols());
    let accumulate = Epilogue {
        accumulate: true,
        ..Default::default()
    };
    let (z_rows, b) = (mat(z.as_slice::<E>(), r), mat(b.as_slice::<E>(), r));
    gemm(&cpu.pool, Layout::Nt, m, n, r, z_rows, b, y, n, accumulate);
    z
}

/// `s x Aᵀ`.
fn reduced<E: Element>(cpu: &Cpu, x: &[E], a: &Tensor, scale: f64, category: Category) -> Tensor {
    let (r, k) = (a.rows(), a.cols());
    let m = x.len() / k;
    let mut z = Tensor::empty(cpu, [m, r], E::DTYPE, category);
    let (x, a, out) = (mat(x, k), mat(a.as_slice::<E>(), k), z.as_mut_slice::<E>());
    let plain = Epilogue::default();
    gemm(&cpu.pool, Layout::Nt, m, r, k, x, a, out, r, plain);
    scale_in_place(&cpu.pool, scale as f32, out);
    z
}

/// `y = t * m / norm (+ bias) (+ residual)`, column by column.
pub(super) fn rescale<E: Element>(
    t: &[E],
    (magnitudes, norms): (&[f64], &[f64]),
    bias: Option<&[E]>,
    residual: Option<&[E]>,
    y: &mut [E],
) {
    let n = magnitudes.len();
    for (row, (y, t)) in y.chunks_mut(n).zip(t.chunks(n)).enumerate() {
        for column in 0..n {
            let mut value = t[column].to_f64() * magnitudes[column] / norms[column];
            value += bias.map_or(0.0, |b| b[column].to_f64());
            value += residual.map_or(0.0, |r| r[row * n + column].to_f64());
            y[column] = E::from_f64(value);
        }
    }
}

/// The norm of each row of a weight, with what its adapter adds to it.
///
/// `‖w + s b A‖² = ‖w‖² + 2 s b · (A w) + s² b (A Aᵀ) bᵀ`: the sum is never made.
pub fn row_norms(
    cpu: &Cpu,
    weight: &Weight,
    adapter: Option<(&Lora, &Weights)>,
    dtype: DType,
) -> Vec<f64> {
    let (n, k) = (weight.shape()[0], weight.shape()[1]);
    let mut squares = vec![0.0; n];
    each_dtype!(dtype, E => for_panels::<E>(cpu, weight, |rows, panel| {
        for (square, row) in squares[rows].iter_mut().zip(panel.chunks(k)) {
            *square = sum_squares(&cpu.pool, row);
        }
    }));
    if let Some((lora, weights)) = adapter {
        let (a, b) = lora.factors(cpu, weights, dtype);
        let (r, s) = (a.rows(), lora.scale);
        let mut products = vec![0.0; n * r];
        let mut gram = vec![0.0; r * r];
        each_dtype!(dtype, E => {
            type A = <E as Element>::Acc;
            let factor = mat(a.as_slice::<E>(), k);
            let mut out = Tensor::empty(cpu, [r, r], <A as Element>::DTYPE, Category::Workspace);
            gemm(&cpu.pool, Layout::Nt, r, r, k, factor, factor, out.as_mut_slice::<A>(), r, Epilogue::default());
            gram.copy_from_slice(&out.to_f64());
            for_panels::<E>(cpu, weight, |rows, panel| {
                let shape = [rows.len(), r];
                let mut out = Tensor::empty(cpu, shape, <A as Element>::DTYPE, Category::Workspace);
                gemm(&cpu.pool, Layout::Nt, rows.len(), r, k, mat(panel, k), factor, out.as_mut_slice::<A>(), r, Epilogue::default());
                products[rows.start * r..rows.end * r].copy_from_slice(&out.to_f64());
            });
        });
        let b = b.to_f64();
        for (row, square) in squares.iter_mut().enumerate() {
            let (b, p) = (&b[row * r..][..r], &products[row * r..][..r]);
            let linear: f64 = b.iter().zip(p).map(|(b, p)| b * p).sum();
            let gram = (0..r).map(|i| (0..r).map(|j| b[i] * gram[i * r + j] * b[j]).sum::<f64>());
            *square += 2.0 * s * linear + s * s * gram.sum::<f64>();
        }
    }
    squares
        .iter()
        .map(|square| square.max(0.0).sqrt())
        .collect()
}

/// Which elements of a value are dropped: a function of a seed and their places, so that a pass that is run again drops
/// the same ones.
#[derive(Clone, Copy)]
struct Drop {
    seed: u64,
    part: f64,
}

impl Drop {
    /// The value without what is dropped, what is left made larger in proportion.
    fn apply<'t>(drop: Option<Drop>, cpu: &Cpu, x: &'t Tensor) -> Cow<'t, Tensor> {
        let Some(drop) = drop else {
            return Cow::Borrowed(x);
        };
        let mut kept = x.deep_clone(cpu, Category::Workspace);
        drop.mask(cpu, &mut kept);
        Cow::Owned(kept)
    }

    fn mask(self, cpu: &Cpu, x: &mut Tensor) {
        if cpu.pool.is_dry() {
            return;
        }
        let limit = (self.part * 2f64.powi(64)) as u64;
        let gain = 1.0 / (1.0 - self.part);
        each_dtype!(x.dtype(), E => for (index, value) in x.as_mut_slice::<E>().iter_mut().enumerate() {
            let mut place = self.seed.wrapping_add(index as u64);
            *value = match crate::rng::splitmix64(&mut place) < limit {
                true => E::from_f64(0.0),
                false => E::from_f64(value.to_f64() * gain),
            };
        });
    }
}

impl Drop {
    /// What is kept of a value, or with `rest` what is missing from that to the whole.
    fn part_of(self, cpu: &Cpu, x: &Tensor, rest: bool) -> Tensor {
        let mut kept = x.deep_clone(cpu, Category::Activations);
        self.mask(cpu, &mut kept);
        if !rest {
            return kept;
        }
        let mut missing = x.deep_clone(cpu, Category::Activations);
        each_dtype!(x.dtype(), E =>
            axpy(&cpu.pool, -1.0, kept.as_slice::<E>(), missing.as_mut_slice::<E>()));
        missing
    }
}

/// A part of a value: its gradient is the same part of the gradient.
struct SavedDrop {
    x: Option<usize>,
    drop: Drop,
    rest: bool,
}

impl Backward for SavedDrop {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let part = self.drop.part_of(&cx.cpu(), &dy, self.rest);
        cx.add(self.x, part);
    }
}

struct SavedLora {
    x: Kept,
    y: Option<usize>,
    /// `s x Aᵀ`.
    z: Tensor,
    lora: Lora,
    drop: Option<Drop>,
}

impl Backward for SavedLora {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let (cpu, dtype) = (cx.cpu(), dy.dtype());
        let (lora, weights) = (self.lora, cx.weights);
        let (a, b) = lora.factors(&cpu, weights, dtype);
        let (m, n, k, r) = (dy.rows(), dy.cols(), a.cols(), a.rows());
        let mut dz = Tensor::empty(&cpu, [m, r], dtype, Category::Workspace);
        each_dtype!(dtype, E => {
            let (dy, b) = (mat(dy.as_slice::<E>(), n), mat(b.as_slice::<E>(), r));
            gemm(&cpu.pool, Layout::Nn, m, r, n, dy, b, dz.as_mut_slice::<E>(), r, Epilogue::default());
            scale_in_place(&cpu.pool, lora.scale as f32, dz.as_mut_slice::<E>());
        });
        if cx.grads.wants(lora.b) {
            each_dtype!(dtype, E => {
                let db = cx.grads.sum::<<E as Element>::Acc>(&cpu, lora.b, b.shape());
                weight_gradient::<E>(&cpu, &dy, &self.z, db);
            });
        }
        if cx.grads.wants(lora.a) {
            let x = cx.value(&self.x);
            let x = Drop::apply(self.drop, &cpu, &x);
            each_dtype!(dtype, E => {
                let da = cx.grads.sum::<<E as Element>::Acc>(&cpu, lora.a, a.shape());
                weight_gradient::<E>(&cpu, &dz, &x, da);
            });
        }
        if let Some((mut dx, accumulate)) = cx.take(self.x.node(), self.x.shape(), dtype) {
            each_dtype!(dtype, E => {
                let (dz, a) = (mat(dz.as_slice::<E>(), r), mat(a.as_slice::<E>(), k));
                match self.drop {
                    None => {
                        let epilogue = Epilogue { accumulate, ..Default::default() };
                        gemm(&cpu.pool, Layout::Nn, m, k, r, dz, a, dx.as_mut_slice::<E>(), k, epilogue);
                    }
                    Some(drop) => {
                        let shape: Shape = *self.x.shape();
                        let mut part = Tensor::empty(&cpu, shape, dtype, Category::Workspace);
                        gemm(&cpu.pool, Layout::Nn, m, k, r, dz, a, part.as_mut_slice::<E>(), k, Epilogue::default());
                        drop.mask(&cpu, &mut part);
                        match accumulate {
                            true => axpy(&cpu.pool, 1.0, part.as_slice::<E>(), dx.as_mut_slice::<E>()),
                            false => dx = part,
                        }
                    }
                }
            });
            cx.put(self.x.node(), dx);
        }
        cx.add(self.y, dy);
    }
}

struct SavedMagnitude {
    t: Var,
    slot: usize,
    magnitudes: Vec<f64>,
    norms: Vec<f64>,
    bias: Option<usize>,
    residual: Option<usize>,
}

impl Backward for SavedMagnitude {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let (cpu, dtype) = (cx.cpu(), dy.dtype());
        let (n, dry) = (dy.cols(), cpu.pool.is_dry());
        let mut dt = Tensor::empty(&cpu, *self.t.shape(), dtype, Category::Activations);
        let mut dm = vec![0.0; n];
        each_dtype!(dtype, E => if !dry {
            let rows = dt.as_mut_slice::<E>().chunks_mut(n).zip(dy.as_slice::<E>().chunks(n));
            for ((dt, dy), t) in rows.zip(self.t.tensor.as_slice::<E>().chunks(n)) {
                for column in 0..n {
                    let (dy, norm) = (dy[column].to_f64(), self.norms[column]);
                    dm[column] += dy * t[column].to_f64() / norm;
                    dt[column] = E::from_f64(dy * self.magnitudes[column] / norm);
                }
            }
        });
        if cx.grads.wants(self.slot) {
            each_dtype!(dtype, E => {
                let sum = cx.grads.sum::<<E as Element>::Acc>(&cpu, self.slot, &[n].into());
                for (sum, dm) in sum.iter_mut().zip(&dm) {
                    *sum = Element::from_f64(sum.to_f64() + dm);
                }
            });
        }
        if let Some(slot) = self.bias.filter(|&slot| cx.grads.wants(slot)) {
            each_dtype!(dtype, E => {
                let db = cx.grads.sum::<<E as Element>::Acc>(&cpu, slot, &[n].into());
                sum_rows(&cpu.pool, dy.as_slice::<E>(), db);
            });
        }
        cx.add(self.t.node(), dt);
        cx.add(self.residual, dy);
    }
}
