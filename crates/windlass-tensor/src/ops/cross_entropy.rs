//! Cross-entropy fused with the head projection: the logits of all tokens never exist at once.

use super::linear::{for_panels, input_gradient, mat, weight_gradient};
use crate::tape::{Backprop, Backward, rounds_in_training};
use crate::{Cpu, Grads, Packed, Param, Shape, Tape, Tensor, Var, Weight, each_dtype};
use std::sync::Arc;
use windlass_kernels::Element;
use windlass_kernels::cross_entropy::cross_entropy_rows;
use windlass_kernels::elementwise::scale_in_place;
use windlass_kernels::gemm::{Epilogue, Layout, gemm};
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Product, multiply};

/// The target of a position that has no loss.
pub const IGNORED: i64 = -100;

/// Upper bound of the bytes of a chunk of logits.
const CHUNK_BYTES: usize = 64 << 20;

/// A value, and its derivatives by what it was computed from.
pub type Sloped = (f64, Vec<f64>);

/// What the head computes: `softcap(h Wᵀ)` against `targets`.
struct Head<'a> {
    h: &'a Tensor,
    weight: Matrix<'a>,
    targets: &'a [i64],
    softcap: Option<f32>,
}

impl Tape {
    /// Mean cross-entropy `1/denominator Σ_t -log softmax(softcap(W h_t))[targets[t]]` over the targets that are not
    /// [`IGNORED`].
    ///
    /// Logits exist for a chunk of rows at a time. On a tape made by [`Tape::training_eager`] the gradient is computed
    /// in the same pass, from the same logits; otherwise the backward pass computes the logits again.
    ///
    /// # Shapes
    /// `h [T, D]`, `w [V, D]`, `targets [T]`; the result is a scalar in the accumulator type.
    ///
    /// # Panics
    /// When a target is neither ignored nor below `V`.
    #[track_caller]
    pub fn cross_entropy(
        &mut self,
        h: &Var,
        w: Param<'_>,
        targets: &Arc<[i64]>,
        softcap: Option<f32>,
        denominator: f64,
    ) -> Var {
        let cpu = self.cpu().clone();
        let head = Head::new(
            &h.tensor,
            Matrix::new(w.weight, self.rounds_from(h.tensor.dtype())),
            targets,
            softcap,
        );
        let mut dh = None;
        let losses = match &mut self.eager {
            Some(eager) => {
                let (losses, gradient) = head.gradient(
                    &cpu,
                    (eager.seed / denominator, None),
                    w.slot,
                    &mut eager.grads,
                );
                dh = Some((gradient, eager.seed));
                losses
            }
            None => head.losses(&cpu),
        };
        let mut loss = Tensor::empty(&cpu, [1], losses.dtype(), Category::Activations);
        each_dtype!(losses.dtype(), A => {
            let sum: f64 = losses.as_slice::<A>().iter().map(|v| v.to_f64()).sum();
            loss.as_mut_slice::<A>()[0] = A::from_f64(sum / denominator);
        });
        let targets = targets.clone();
        self.record(loss, true, || match dh {
            Some((dh, seed)) => Saved::Done {
                h: h.node(),
                dh,
                seed,
            },
            None => Saved::Again {
                h: h.clone(),
                w: w.slot,
                targets,
                softcap,
                denominator,
            },
        })
    }

    /// A loss that depends on the cross-entropies of all rows together: `objective` is given them, 0 where the target is
    /// [`IGNORED`], and returns its value and its derivative by each.
    ///
    /// # Shapes
    /// As [`Tape::cross_entropy`].
    ///
    /// # Panics
    /// As [`Tape::cross_entropy`]; when it is recorded on a tape that is not eager.
    #[track_caller]
    pub fn objective(
        &mut self,
        h: &Var,
        w: Param<'_>,
        targets: &[i64],
        softcap: Option<f32>,
        objective: &dyn Fn(&[f64]) -> Sloped,
    ) -> Var {
        let cpu = self.cpu().clone();
        let head = Head::new(
            &h.tensor,
            Matrix::new(w.weight, self.rounds_from(h.tensor.dtype())),
            targets,
            softcap,
        );
        let losses = head.losses(&cpu);
        let (value, slopes) = objective(&losses.to_f64());
        assert_eq!(slopes.len(), losses.len(), "derivatives against rows");
        let mut loss = Tensor::empty(&cpu, [1], losses.dtype(), Category::Activations);
        each_dtype!(losses.dtype(), A => loss.as_mut_slice::<A>()[0] = A::from_f64(value));
        let Some(eager) = &mut self.eager else {
            return self.record_opaque("objective", loss, &[h]);
        };
        let (seed, slopes) = (eager.seed, Some(slopes.as_slice()));
        let (_, dh) = head.gradient(&cpu, (seed, slopes), w.slot, &mut eager.grads);
        self.record(loss, true, || Saved::Done {
            h: h.node(),
            dh,
            seed,
        })
    }

    /// The loss of each row, without a gradient: 0 where the target is [`IGNORED`].
    ///
    /// # Shapes
    /// As [`Tape::cross_entropy`]; the result is `[T]` in the accumulator type.
    #[track_caller]
    pub fn token_losses(
        &mut self,
        h: &Var,
        w: Param<'_>,
        targets: &[i64],
        softcap: Option<f32>,
    ) -> Var {
        let cpu = self.cpu().clone();
        let weight = Matrix::new(w.weight, self.rounds_from(h.tensor.dtype()));
        let losses = Head::new(&h.tensor, weight, targets, softcap).losses(&cpu);
        self.record_opaque("token_losses", losses, &[h])
    }

    /// `softcap(h Wᵀ)` for all rows, without a gradient.
    ///
    /// # Shapes
    /// `h [T, D]`, `w [V, D]`; the result is `[T, V]` in the accumulator type.
    #[track_caller]
    pub fn logits(&mut self, h: &Var, w: Param<'_>, softcap: Option<f32>) -> Var {
        let cpu = self.cpu().clone();
        let weight = Matrix::new(w.weight, self.rounds_from(h.tensor.dtype()));
        let targets = vec![IGNORED; h.tensor.rows()];
        let head = Head::new(&h.tensor, weight, &targets, softcap);
        let mut logits = head.chunk(&cpu, 0..h.tensor.rows(), Category::Activations);
        if let Some(cap) = softcap {
            let cap = cap as f64;
            each_dtype!(logits.dtype(), A => for v in logits.as_mut_slice::<A>() {
                *v = A::from_f64(cap * (v.to_f64() / cap).tanh());
            });
        }
        self.record_opaque("logits", logits, &[h])
    }
}

/// A head's matrix, as its products read it.
#[derive(Clone, Copy)]
enum Matrix<'a> {
    /// By its numbers, which are unpacked where it is packed.
    Plain(&'a Weight),
    /// As integers; gradients are those of its numbers.
    Integers(&'a Weight, &'a Packed),
}

impl<'a> Matrix<'a> {
    fn new(weight: &'a Weight, rounds: bool) -> Self {
        match weight {
            Weight::Packed(packed) if rounds => Matrix::Integers(weight, packed),
            weight => Matrix::Plain(weight),
        }
    }

    fn shape(&self) -> &'a Shape {
        match self {
            Matrix::Plain(weight) | Matrix::Integers(weight, _) => weight.shape(),
        }
    }

    fn rows(&self) -> usize {
        self.shape()[0]
    }

    fn cols(&self) -> usize {
        self.shape()[1]
    }
}

impl<'a> Head<'a> {
    #[track_caller]
    fn new(h: &'a Tensor, weight: Matrix<'a>, targets: &'a [i64], softcap: Option<f32>) -> Self {
        assert_eq!(
            h.cols(),
            weight.cols(),
            "columns of {} against a head {}",
            h.shape(),
            weight.shape()
        );
        assert_eq!(
            h.rows(),
            targets.len(),
            "rows of {} against the targets",
            h.shape()
        );
        let v = weight.rows() as i64;
        if let Some(t) = targets
            .iter()
            .find(|&&t| t != IGNORED && !(0..v).contains(&t))
        {
            panic!("target {t} against a vocabulary of {v}");
        }
        Head {
            h,
            weight,
            targets,
            softcap,
        }
    }

    /// Rows of a chunk: a fixed function of the shape, so that sums do not depend on the machine.
    fn chunk_rows(&self) -> usize {
        // Who packs a head wants to save memory, and no gradient is summed over rows.
        let most = match self.weight {
            Matrix::Plain(Weight::Packed(_)) | Matrix::Integers(..) => 128,
            _ => 512,
        };
        (CHUNK_BYTES / (self.weight.rows() * 4)).clamp(64, most)
    }

    fn chunks(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let (total, step) = (self.h.rows(), self.chunk_rows());
        (0..total)
            .step_by(step)
            .map(move |start| start..(start + step).min(total))
    }

    /// Logits of some rows, before the soft-cap, in the accumulator type.
    fn chunk(&self, cpu: &Cpu, rows: std::ops::Range<usize>, category: Category) -> Tensor {
        let (v, d) = (self.weight.rows(), self.weight.cols());
        let dtype = self.h.dtype();
        let mut logits = Tensor::empty(cpu, [rows.len(), v], dtype.accumulator(), category);
        each_dtype!(dtype, E => {
            let h = &self.h.as_slice::<E>()[rows.start * d..rows.end * d];
            let out = logits.as_mut_slice::<<E as Element>::Acc>();
            match self.weight {
                Matrix::Plain(weight) => for_panels::<E>(cpu, weight, |part, panel| {
                    let out = &mut out[part.start.min(rows.len() * v)..];
                    let (a, b) = (mat(h, d), mat(panel, d));
                    gemm(&cpu.pool, Layout::Nt, rows.len(), part.len(), d, a, b, out, v, Epilogue::default());
                }),
                Matrix::Integers(_, packed) => {
                    let h = packed.activations(cpu, h);
                    multiply(&cpu.pool, &h, &mut [Product::of(packed.matrix(), out)]);
                }
            }
        });
        logits
    }

    fn losses(&self, cpu: &Cpu) -> Tensor {
        let dtype = self.h.dtype();
        let v = self.weight.rows();
        let mut losses = Tensor::empty(
            cpu,
            [self.h.rows()],
            dtype.accumulator(),
            Category::Workspace,
        );
        for rows in self.chunks() {
            let mut logits = self.chunk(cpu, rows.clone(), Category::Workspace);
            each_dtype!(dtype, E => cross_entropy_rows::<E>(
                &cpu.pool,
                logits.as_mut_slice::<<E as Element>::Acc>(),
                v,
                self.softcap,
                &self.targets[rows.clone()],
                &mut losses.as_mut_slice::<<E as Element>::Acc>()[rows],
                None,
            ));
        }
        losses
    }

    /// Losses and the gradient of their sum times `scale`, each times its slope where there are any: `dh`, and `dW` added to
    /// `grads`.
    fn gradient(
        &self,
        cpu: &Cpu,
        (scale, slopes): (f64, Option<&[f64]>),
        slot: usize,
        grads: &mut Grads,
    ) -> (Tensor, Tensor) {
        let dtype = self.h.dtype();
        let (v, d) = (self.weight.rows(), self.weight.cols());
        let mut losses = Tensor::empty(
            cpu,
            [self.h.rows()],
            dtype.accumulator(),
            Category::Workspace,
        );
        let mut dh = Tensor::empty(cpu, *self.h.shape(), dtype, Category::Activations);
        for rows in self.chunks() {
            let mut logits = self.chunk(cpu, rows.clone(), Category::Workspace);
            let mut dlogits = Tensor::empty(cpu, [rows.len(), v], dtype, Category::Workspace);
            each_dtype!(dtype, E => {
                type A = <E as Element>::Acc;
                cross_entropy_rows::<E>(
                    &cpu.pool,
                    logits.as_mut_slice::<A>(),
                    v,
                    self.softcap,
                    &self.targets[rows.clone()],
                    &mut losses.as_mut_slice::<A>()[rows.clone()],
                    Some((dlogits.as_mut_slice::<E>(), scale as f32)),
                );
                // Their memory serves the columns of the head.
                drop(logits);
                for (row, &slope) in slopes.into_iter().flat_map(|slopes| &slopes[rows.clone()]).enumerate() {
                    let row = &mut dlogits.as_mut_slice::<E>()[row * v..(row + 1) * v];
                    scale_in_place(&cpu.pool, slope as f32, row);
                }
                let (Matrix::Plain(weight) | Matrix::Integers(weight, _)) = self.weight;
                let out = &mut dh.as_mut_slice::<E>()[rows.start * d..rows.end * d];
                input_gradient::<E>(cpu, weight, dlogits.as_slice(), out, false);
                if grads.wants(slot) {
                    let dw = grads.sum::<A>(cpu, slot, self.weight.shape());
                    weight_gradient::<E>(cpu, &dlogits, &self.h.slice_rows(rows), dw);
                }
            });
        }
        (losses, dh)
    }
}

enum Saved {
    Done {
        h: Option<usize>,
        dh: Tensor,
        seed: f64,
    },
    Again {
        h: Var,
        w: usize,
        targets: Arc<[i64]>,
        softcap: Option<f32>,
        denominator: f64,
    },
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        match *self {
            Saved::Done { h, dh, seed } => {
                let dy = dy.item();
                assert!(
                    dy == seed || cpu.pool.is_dry(),
                    "gradient {dy} of the loss against the announced {seed}"
                );
                cx.add(h, dh);
            }
            Saved::Again {
                h,
                w,
                targets,
                softcap,
                denominator,
            } => {
                let rounds = rounds_in_training(h.tensor.dtype());
                let weight = Matrix::new(cx.weights.at(w).weight, rounds);
                let head = Head::new(&h.tensor, weight, &targets, softcap);
                let scale = (dy.item() / denominator, None);
                let (_, dh) = head.gradient(&cpu, scale, w, cx.grads);
                cx.add(h.node(), dh);
            }
        }
    }
}
