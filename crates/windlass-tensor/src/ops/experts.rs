//! The experts of a layer with packed weights: all of them in a few runs of the threads.

use super::moe::Routing;
use crate::{Activation, Packed, Param, Tape, Tensor, Var, Weight, each_dtype};
use windlass_kernels::Element;
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Activations, Product, multiply_groups};

/// A weight and its bias.
pub type Projection<'w> = (Param<'w>, Option<Param<'w>>);

/// One weight of an expert and its bias.
type PackedWeight<'w> = (&'w Packed, Option<&'w Tensor>);

/// The projections of a feed-forward network.
pub struct Expert<'w> {
    /// What the activation is applied to; without it, that is `up`.
    pub gate: Option<Projection<'w>>,
    /// From the width of the model.
    pub up: Projection<'w>,
    /// Back to it.
    pub down: Projection<'w>,
}

impl Tape {
    /// What [`Tape::combine`] makes of the experts' outputs for their rows, `down(act(gate(h)) * up(h))`, with the bits that
    /// the experts would give one by one. Rows are rounded once, however many experts they have; the products of all experts
    /// that have rows are one run of the threads for `gate` and `up`, and one for `down`.
    ///
    /// `None` where that cannot be: weights that are not packed or have adapters, columns in an order of their own, tapes
    /// that do not round or are watched.
    ///
    /// # Shapes
    /// `h [T, D]`, `gate` and `up [F, D]`, `down [D, F]`, `y [T, D]`.
    ///
    /// # Panics
    /// When shapes do not fit.
    #[track_caller]
    pub fn packed_experts(
        &mut self,
        kind: Activation,
        h: &Var,
        routing: &Routing,
        experts: &[Expert<'_>],
    ) -> Option<Var> {
        if !self.rounds() || self.watch.is_some() {
            return None;
        }
        let gates = match experts.first()?.gate {
            Some(_) => Some(self.packed_weights(experts, |e| e.gate.as_ref())?),
            None => None,
        };
        let ups = self.packed_weights(experts, |e| Some(&e.up))?;
        let downs = self.packed_weights(experts, |e| Some(&e.down))?;
        let groups: Vec<Vec<u32>> = routing
            .rows
            .iter()
            .map(|rows| rows.iter().map(|(row, _)| *row).collect())
            .collect();
        // Rows of all experts one after another.
        let mut places = Vec::with_capacity(groups.len());
        let mut total = 0;
        for group in &groups {
            let end = total + group.len() as u32;
            places.push((total..end).collect());
            total = end;
        }
        let [up, gate] = self.products(&h.tensor, &groups, [Some(&ups), gates.as_deref()]);
        let up = self.record_opaque("a packed product", up?, &[]);
        let a = match gate {
            Some(gate) => {
                let gate = self.record_opaque("a packed product", gate, &[]);
                self.gated(kind, &gate, &up)
            }
            None => self.activation(kind, &up),
        };
        let [y, _] = self.products(&a.tensor, &places, [Some(&downs), None]);
        let parts = y?;
        let shape = [h.tensor.rows(), parts.cols()];
        let mut y = Tensor::zeros(self.cpu(), shape, h.tensor.dtype(), Category::Activations);
        each_dtype!(y.dtype(), E => {
            let d = parts.cols();
            let of = |rows: &Vec<u32>| {
                let first = rows.first().map_or(0, |&row| row as usize * d);
                &parts.as_slice::<E>()[first..first + rows.len() * d]
            };
            routing.sum(places.iter().map(of), d, y.as_mut_slice::<E>());
        });
        Some(self.record_opaque("a packed product", y, &[]))
    }

    /// One weight of each expert with its bias, where all are packed and nothing else is asked for.
    fn packed_weights<'w>(
        &self,
        experts: &'w [Expert<'w>],
        which: impl Fn(&'w Expert<'w>) -> Option<&'w Projection<'w>>,
    ) -> Option<Vec<PackedWeight<'w>>> {
        let weight = |expert| {
            let (weight, bias) = which(expert)?;
            match weight.weight {
                Weight::Packed(packed)
                    if packed.order().is_none()
                        && !(self.has_adapters() && weight.lora.is_some()) =>
                {
                    Some((packed, bias.as_ref().map(|bias| bias.weight.dense())))
                }
                _ => None,
            }
        };
        experts.iter().map(weight).collect()
    }

    /// Products of groups of rows with a weight each, or with two; the groups' results stand one after another.
    #[track_caller]
    fn products(
        &self,
        x: &Tensor,
        groups: &[Vec<u32>],
        weights: [Option<&[PackedWeight<'_>]>; 2],
    ) -> [Option<Tensor>; 2] {
        let cpu = self.cpu();
        let rows: usize = groups.iter().map(Vec::len).sum();
        let mut outputs = weights.map(|weights| {
            let cols = weights?.first()?.0.shape()[0];
            Some(Tensor::empty(
                cpu,
                [rows, cols],
                x.dtype(),
                Category::Activations,
            ))
        });
        if rows == 0 {
            return outputs;
        }
        each_dtype!(x.dtype(), E => {
            let rounded = Activations::quantize(&cpu.pool, &cpu.memory, x.as_slice::<E>(), x.cols());
            let (rounded, ranges) = rounded.grouped(&cpu.pool, &cpu.memory, groups);
            let mut products = Vec::new();
            for (weights, output) in weights.iter().zip(&mut outputs) {
                let (Some(weights), Some(output)) = (weights, output) else { continue };
                let cols = output.cols();
                let mut rest = output.as_mut_slice::<E>();
                for (range, (packed, bias)) in ranges.iter().zip(weights.iter()) {
                    let (out, after) = rest.split_at_mut(range.len() * cols);
                    rest = after;
                    if !range.is_empty() {
                        products.push((range.clone(), product::<E>(packed, *bias, out)));
                    }
                }
            }
            multiply_groups(&cpu.pool, &rounded, &mut products);
        });
        outputs
    }
}

fn product<'a, E: Element>(
    packed: &'a Packed,
    bias: Option<&'a Tensor>,
    out: &'a mut [E],
) -> Product<'a, E> {
    Product {
        matrix: packed.matrix(),
        bias: bias.map(Tensor::as_slice::<E>),
        residual: None,
        out,
    }
}
