//! Mixture-of-experts routing: the choice of experts, the weighted sum of their outputs, the balance of their load.

use crate::tape::{Backprop, Backward};
use crate::{Cpu, Shape, Tape, Tensor, Var, each_dtype};
use std::sync::{Arc, Mutex};
use windlass_kernels::memory::Category;
use windlass_kernels::{Element, softmax, topk};

/// How often each expert was chosen and how probable it was, over all layers of one forward pass.
///
/// The load-balancing loss `coefficient * E * Σ_e f_e P_e` couples all layers (`f_e`: choices of expert `e` per row,
/// `P_e`: its mean probability, rows of all layers together), so its gradient is known when the last layer has run:
/// call [`RouterStats::close`] then, before the backward pass.
///
/// # Source
/// Fedus et al. 2021 (Switch Transformer, eq. 4 to 6), in the form that the Hugging Face models use.
#[derive(Debug, Default)]
pub struct RouterStats(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    counts: Vec<f64>,
    probabilities: Vec<f64>,
    rows: f64,
    /// `Some(gradient of the loss value)` once closed.
    seed: Option<f64>,
}

impl RouterStats {
    /// Ends the counting and returns the loss `E Σ f_e P_e`; its gradient flows back multiplied by `seed`.
    pub fn close(&self, seed: f64) -> f64 {
        let mut state = self.0.lock().expect("router statistics");
        state.seed = Some(seed);
        let rows = state.rows.max(1.0);
        let products = state
            .counts
            .iter()
            .zip(&state.probabilities)
            .map(|(f, p)| (f / rows) * (p / rows));
        state.counts.len() as f64 * products.sum::<f64>()
    }

    fn add(&self, experts: usize, probabilities: &[f64], chosen: &[u32], rows: usize) {
        let mut state = self.0.lock().expect("router statistics");
        if state.seed.is_some() {
            return; // a recomputed layer was counted in the first pass
        }
        state.counts.resize(experts, 0.0);
        state.probabilities.resize(experts, 0.0);
        chosen.iter().for_each(|&e| state.counts[e as usize] += 1.0);
        for row in probabilities.chunks(experts) {
            state
                .probabilities
                .iter_mut()
                .zip(row)
                .for_each(|(sum, p)| *sum += p);
        }
        state.rows += rows as f64;
    }

    /// Gradient of the loss with respect to each row's probability of each expert.
    fn gradient(&self) -> Vec<f64> {
        let state = self.0.lock().expect("router statistics");
        let seed = state
            .seed
            .expect("router statistics are closed before the backward pass");
        let factor = seed * state.counts.len() as f64 / state.rows.max(1.0).powi(2);
        state.counts.iter().map(|f| factor * f).collect()
    }
}

/// The experts of each row.
pub struct Routing {
    /// `[T * k]`: the chosen experts of each row, most probable first.
    pub chosen: Arc<[u32]>,
    /// `[T, k]`: their weights.
    pub weights: Var,
    /// Rows of each expert, ascending, and where `(row, place among k)` the expert stands.
    pub rows: Vec<Vec<(u32, u32)>>,
}

impl Routing {
    /// Adds the experts' rows, weighted, in the order of the experts: `outputs` are the first one's, then the next one's.
    pub(super) fn sum<'a, E: Element>(&self, outputs: impl Iterator<Item = &'a [E]>, y: &mut [E]) {
        let weights = self.weights.tensor.as_slice::<E>();
        let (k, d) = (
            self.weights.tensor.cols(),
            y.len() / self.weights.tensor.rows().max(1),
        );
        let mut sums = vec![<E as Element>::Acc::default(); y.len()];
        for (&(row, j), out) in self.rows.iter().flatten().zip(outputs) {
            let w = weights[row as usize * k + j as usize].load();
            let sum = &mut sums[row as usize * d..(row as usize + 1) * d];
            sum.iter_mut()
                .zip(out)
                .for_each(|(s, o)| *s += w * o.load());
        }
        y.iter_mut().zip(&sums).for_each(|(y, s)| *y = E::store(*s));
    }
}

impl Tape {
    /// Chooses the `k` most probable experts of each row: `softmax(logits)`, the `k` largest, divided by their sum when
    /// `normalize`.
    ///
    /// # Shapes
    /// `logits [T, E]`.
    #[track_caller]
    pub fn routing(
        &mut self,
        logits: &Var,
        k: usize,
        normalize: bool,
        stats: Option<&Arc<RouterStats>>,
    ) -> Routing {
        let cpu = self.cpu().clone();
        let (t, experts) = (logits.tensor.rows(), logits.tensor.cols());
        assert!(
            k <= experts,
            "{k} experts a token against {experts} experts"
        );
        let acc = logits.tensor.dtype().accumulator();
        let mut p = logits.tensor.cast(&cpu, acc, Category::Activations);
        let mut chosen = vec![0u32; t * k];
        let mut weights = Tensor::empty(&cpu, [t, k], logits.tensor.dtype(), Category::Activations);
        each_dtype!(acc, A => {
            let logits = p.clone();
            let mut out = Tensor::empty(&cpu, [t, experts], acc, Category::Activations);
            softmax::softmax(&cpu.pool, logits.as_slice::<A>(), experts, out.as_mut_slice::<A>());
            p = out;
            let mut largest = vec![A::default(); t * k];
            topk::top_k(&cpu.pool, p.as_slice::<A>(), experts, k, &mut largest, &mut chosen);
        });
        let values = p.to_f64();
        for (row, (chosen, p)) in chosen
            .chunks(k.max(1))
            .zip(values.chunks(experts))
            .enumerate()
        {
            let sum = if normalize {
                chosen.iter().map(|&e| p[e as usize]).sum()
            } else {
                1.0
            };
            each_dtype!(weights.dtype(), E => for (j, &e) in chosen.iter().enumerate() {
                weights.as_mut_slice::<E>()[row * k + j] = E::from_f64(p[e as usize] / sum);
            });
        }
        if let Some(stats) = stats {
            stats.add(experts, &values, &chosen, t);
        }
        let mut rows = vec![Vec::new(); experts];
        for (i, &e) in chosen.iter().enumerate() {
            rows[e as usize].push(((i / k) as u32, (i % k) as u32));
        }
        let chosen: Arc<[u32]> = chosen.into();
        let weights = self.record(weights, logits.node().is_some(), || SavedRouting {
            logits: logits.clone(),
            probabilities: p,
            chosen: chosen.clone(),
            k,
            normalize,
            stats: stats.cloned(),
        });
        Routing {
            chosen,
            weights,
            rows,
        }
    }

    /// `y[t] = Σ_j weights[t, j] * output of the expert chosen at (t, j)`.
    ///
    /// # Shapes
    /// `outputs[e] [routing.rows[e].len(), D]`, `weights [T, k]`, `y [T, D]`.
    #[track_caller]
    pub fn combine(&mut self, routing: &Routing, outputs: &[Var], d: usize) -> Var {
        let cpu = self.cpu().clone();
        let weights = &routing.weights.tensor;
        let t = weights.rows();
        let mut y = Tensor::zeros(&cpu, [t, d], weights.dtype(), Category::Activations);
        each_dtype!(weights.dtype(), E => {
            let rows = outputs.iter().flat_map(|output| output.tensor.as_slice::<E>().chunks(d));
            routing.sum(rows, y.as_mut_slice::<E>());
        });
        let flows = outputs
            .iter()
            .chain([&routing.weights])
            .any(|v| v.node().is_some());
        self.record(y, flows, || SavedCombine {
            weights: routing.weights.clone(),
            rows: routing.rows.clone(),
            outputs: outputs.to_vec(),
        })
    }
}

struct SavedRouting {
    logits: Var,
    probabilities: Tensor,
    chosen: Arc<[u32]>,
    k: usize,
    normalize: bool,
    stats: Option<Arc<RouterStats>>,
}

impl Backward for SavedRouting {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let (p, dw) = (self.probabilities.to_f64(), dy.to_f64());
        let experts = self.probabilities.cols();
        let balance = self.stats.as_ref().map(|s| s.gradient());
        let mut dlogits = vec![0.0; p.len()];
        for (row, p) in p.chunks(experts).enumerate() {
            let mut dp = balance.clone().unwrap_or_else(|| vec![0.0; experts]);
            let chosen = &self.chosen[row * self.k..(row + 1) * self.k];
            let dw = &dw[row * self.k..(row + 1) * self.k];
            let sum: f64 = if self.normalize {
                chosen.iter().map(|&e| p[e as usize]).sum()
            } else {
                1.0
            };
            // w_j = p_j / s: dp_j = (dw_j - Σ_i dw_i w_i) / s when normalized, dw_j otherwise.
            let mean: f64 = chosen
                .iter()
                .zip(dw)
                .map(|(&e, g)| g * p[e as usize] / sum)
                .sum();
            for (&e, g) in chosen.iter().zip(dw) {
                dp[e as usize] += if self.normalize { (g - mean) / sum } else { *g };
            }
            let dot: f64 = dp.iter().zip(p).map(|(a, b)| a * b).sum();
            let out = &mut dlogits[row * experts..(row + 1) * experts];
            out.iter_mut()
                .zip(&dp)
                .zip(p)
                .for_each(|((o, dp), p)| *o = p * (dp - dot));
        }
        cx.add(
            self.logits.node(),
            from_f64(&cpu, &dlogits, *self.logits.shape(), &dy),
        );
    }
}

struct SavedCombine {
    weights: Var,
    rows: Vec<Vec<(u32, u32)>>,
    outputs: Vec<Var>,
}

impl Backward for SavedCombine {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let (k, d) = (self.weights.tensor.cols(), dy.cols());
        let mut dweights = vec![0.0f64; self.weights.tensor.len()];
        for (rows, output) in self.rows.iter().zip(&self.outputs) {
            let mut dout = Tensor::empty(&cpu, *output.shape(), dy.dtype(), Category::Activations);
            each_dtype!(dy.dtype(), E => {
                let (w, dy) = (self.weights.tensor.as_slice::<E>(), dy.as_slice::<E>());
                let out = output.tensor.as_slice::<E>().chunks(d);
                for ((&(row, j), out), dout) in rows.iter().zip(out).zip(dout.as_mut_slice::<E>().chunks_mut(d)) {
                    let place = row as usize * k + j as usize;
                    let (w, dy) = (w[place].load(), &dy[row as usize * d..(row as usize + 1) * d]);
                    dweights[place] += out.iter().zip(dy).map(|(o, g)| o.to_f64() * g.to_f64()).sum::<f64>();
                    dout.iter_mut().zip(dy).for_each(|(o, g)| *o = E::store(w * g.load()));
                }
            });
            cx.add(output.node(), dout);
        }
        let dweights = from_f64(&cpu, &dweights, *self.weights.shape(), &dy);
        cx.add(self.weights.node(), dweights);
    }
}

fn from_f64(cpu: &Cpu, values: &[f64], shape: Shape, like: &Tensor) -> Tensor {
    each_dtype!(like.dtype(), E => {
        let values: Vec<E> = values.iter().map(|&v| E::from_f64(v)).collect();
        Tensor::from_slice(cpu, &values, shape, Category::Activations)
    })
}
