//! RMS norm and layer norm over the last axis.

use crate::tape::{Backprop, Backward, Recipe};
use crate::{Cpu, Param, Tape, Tensor, Var, Weights, each_dtype};
use windlass_kernels::memory::Category;
use windlass_kernels::{Element, norm};

impl Tape {
    /// `y = x / sqrt(mean(x²) + eps) * (offset + w)` over the last `w.len()` elements of each row.
    ///
    /// # Shapes
    /// `x [.., n * D]` with `w [D]`: rows wider than `w` are several norms side by side (a norm per head).
    ///
    /// # Source
    /// Zhang and Sennrich 2019; `offset` is 1 in Gemma, whose weights are stored around zero.
    #[track_caller]
    pub fn rms_norm(&mut self, x: &Var, w: Param<'_>, eps: f32, offset: f32) -> Var {
        let cpu = self.cpu().clone();
        let weight = w.weight.dense();
        assert_eq!(
            x.tensor.cols() % weight.len(),
            0,
            "columns of {} against a norm of {}",
            x.shape(),
            weight.len()
        );
        let recipe = Rms {
            x: x.tensor.clone(),
            w: w.slot,
            eps,
            offset,
        };
        let (y, inv_rms) = recipe.compute(&cpu, weight);
        let y = self.record(y, true, || SavedRms {
            x: x.clone(),
            inv_rms,
            w: w.slot,
            offset,
        });
        self.with_recipe(y, || recipe)
    }

    /// `y = (x - mean) / sqrt(var + eps) * w + b` over the last `w.len()` elements of each row.
    ///
    /// # Shapes
    /// As [`Tape::rms_norm`]; `b [D]`.
    ///
    /// # Source
    /// Ba, Kiros and Hinton 2016; the variance is the biased one.
    #[track_caller]
    pub fn layer_norm(&mut self, x: &Var, w: Param<'_>, b: Option<Param<'_>>, eps: f32) -> Var {
        let cpu = self.cpu().clone();
        let weight = w.weight.dense();
        assert_eq!(
            x.tensor.cols() % weight.len(),
            0,
            "columns of {} against a norm of {}",
            x.shape(),
            weight.len()
        );
        let recipe = LayerNorm {
            x: x.tensor.clone(),
            w: w.slot,
            b: b.map(|b| b.slot),
            eps,
        };
        let bias = b.map(|b| b.weight.dense());
        let (y, mean, inv_std) = recipe.compute(&cpu, weight, bias);
        let b = recipe.b;
        let y = self.record(y, true, || SavedLayer {
            x: x.clone(),
            mean,
            inv_std,
            w: w.slot,
            b,
        });
        self.with_recipe(y, || recipe)
    }
}

#[derive(Debug)]
struct Rms {
    x: Tensor,
    w: usize,
    eps: f32,
    offset: f32,
}

impl Rms {
    /// The normed rows and their inverse root mean squares.
    fn compute(&self, cpu: &Cpu, weight: &Tensor) -> (Tensor, Tensor) {
        let (x, dtype) = (&self.x, self.x.dtype());
        let rows = x.len() / weight.len();
        let mut y = Tensor::empty(cpu, *x.shape(), dtype, Category::Activations);
        let mut inv_rms = Tensor::empty(cpu, [rows], dtype.accumulator(), Category::Activations);
        each_dtype!(dtype, E => norm::rms_norm(
            &cpu.pool,
            x.as_slice::<E>(),
            weight.as_slice::<E>(),
            self.offset,
            self.eps,
            y.as_mut_slice::<E>(),
            inv_rms.as_mut_slice::<<E as Element>::Acc>(),
        ));
        (y, inv_rms)
    }
}

impl Recipe for Rms {
    fn value(&self, cpu: &Cpu, weights: &Weights) -> Tensor {
        self.compute(cpu, weights.at(self.w).weight.dense()).0
    }
}

#[derive(Debug)]
struct LayerNorm {
    x: Tensor,
    w: usize,
    b: Option<usize>,
    eps: f32,
}

impl LayerNorm {
    /// The normed rows, their means and their inverse standard deviations.
    fn compute(
        &self,
        cpu: &Cpu,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> (Tensor, Tensor, Tensor) {
        let (x, dtype) = (&self.x, self.x.dtype());
        let rows = x.len() / weight.len();
        let mut y = Tensor::empty(cpu, *x.shape(), dtype, Category::Activations);
        let mut mean = Tensor::empty(cpu, [rows], dtype.accumulator(), Category::Activations);
        let mut inv_std = Tensor::empty(cpu, [rows], dtype.accumulator(), Category::Activations);
        each_dtype!(dtype, E => norm::layer_norm(
            &cpu.pool,
            x.as_slice::<E>(),
            weight.as_slice::<E>(),
            bias.map(|b| b.as_slice::<E>()),
            self.eps,
            y.as_mut_slice::<E>(),
            mean.as_mut_slice::<<E as Element>::Acc>(),
            inv_std.as_mut_slice::<<E as Element>::Acc>(),
        ));
        (y, mean, inv_std)
    }
}

impl Recipe for LayerNorm {
    fn value(&self, cpu: &Cpu, weights: &Weights) -> Tensor {
        let bias = self.b.map(|b| weights.at(b).weight.dense());
        self.compute(cpu, weights.at(self.w).weight.dense(), bias).0
    }
}

/// The buffer for the gradient of `x`, a throw-away one when no gradient flows there.
fn taken(cx: &mut Backprop<'_>, x: &Var) -> (Tensor, bool) {
    let dtype = x.tensor.dtype();
    let taken = cx.take(x.node(), x.shape(), dtype);
    taken.unwrap_or_else(|| {
        (
            Tensor::empty(&cx.cpu(), *x.shape(), dtype, Category::Workspace),
            false,
        )
    })
}

/// A throw-away buffer for the gradient of a frozen weight.
fn unwanted(cx: &Backprop<'_>, slot: usize, weight: &Tensor, cpu: &Cpu) -> Option<Tensor> {
    let buffer = || {
        Tensor::zeros(
            cpu,
            *weight.shape(),
            weight.dtype().accumulator(),
            Category::Workspace,
        )
    };
    (!cx.grads.wants(slot)).then(buffer)
}

struct SavedRms {
    x: Var,
    inv_rms: Tensor,
    w: usize,
    offset: f32,
}

impl Backward for SavedRms {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let weight = cx.weights.at(self.w).weight.dense();
        each_dtype!(dy.dtype(), E => {
            type A = <E as Element>::Acc;
            let (mut dx, accumulate) = taken(cx, &self.x);
            let mut unwanted = unwanted(cx, self.w, weight, &cpu);
            norm::rms_norm_backward(
                &cpu.pool,
                self.x.tensor.as_slice::<E>(),
                weight.as_slice::<E>(),
                self.offset,
                self.inv_rms.as_slice::<<E as Element>::Acc>(),
                dy.as_slice::<E>(),
                dx.as_mut_slice::<E>(),
                accumulate,
                match &mut unwanted {
                    Some(unwanted) => unwanted.as_mut_slice::<A>(),
                    None => cx.grads.sum::<A>(&cpu, self.w, weight.shape()),
                },
            );
            cx.put(self.x.node(), dx);
        });
    }
}

struct SavedLayer {
    x: Var,
    mean: Tensor,
    inv_std: Tensor,
    w: usize,
    b: Option<usize>,
}

impl Backward for SavedLayer {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let weight = cx.weights.at(self.w).weight.dense();
        each_dtype!(dy.dtype(), E => {
            type A = <E as Element>::Acc;
            let (mut dx, accumulate) = taken(cx, &self.x);
            if let Some(slot) = self.b.filter(|&slot| cx.grads.wants(slot)) {
                let db = cx.grads.sum::<A>(&cpu, slot, weight.shape());
                windlass_kernels::elementwise::sum_rows(&cpu.pool, dy.as_slice::<E>(), db);
            }
            let mut unwanted = unwanted(cx, self.w, weight, &cpu);
            norm::layer_norm_backward(
                &cpu.pool,
                self.x.tensor.as_slice::<E>(),
                weight.as_slice::<E>(),
                self.mean.as_slice::<A>(),
                self.inv_std.as_slice::<A>(),
                dy.as_slice::<E>(),
                dx.as_mut_slice::<E>(),
                accumulate,
                match &mut unwanted {
                    Some(unwanted) => unwanted.as_mut_slice::<A>(),
                    None => cx.grads.sum::<A>(&cpu, self.w, weight.shape()),
                },
                None,
            );
            cx.put(self.x.node(), dx);
        });
    }
}
