//! The experts of a layer with packed weights: all of them in a few runs of the threads.

use super::moe::Routing;
use super::packed_weight::PackedWeight;
use crate::{Activation, DType, Param, Tape, Tensor, Var, each_dtype};
use std::ops::Range;
use windlass_kernels::memory::Category;
use windlass_kernels::packed::{Activations, Product, multiply_groups};

/// A weight and its bias.
pub type Projection<'w> = (Param<'w>, Option<Param<'w>>);

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
    /// that have rows (of as many as fit a cache) are one run of the threads for `gate` and `up`, and one for `down`.
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
        let gates = match experts.first()?.gate {
            Some(_) => Some(self.packed_weights(experts, |e| e.gate)?),
            None => None,
        };
        let ups = self.packed_weights(experts, |e| Some(e.up))?;
        let downs = self.packed_weights(experts, |e| Some(e.down))?;
        let groups: Vec<Vec<u32>> = routing
            .rows
            .iter()
            .map(|rows| rows.iter().map(|(row, _)| *row).collect())
            .collect();
        let dtype = h.tensor.dtype();
        let shape = [h.tensor.rows(), downs.first()?.packed.shape()[0]];
        let mut y = Tensor::zeros(self.cpu(), shape, dtype, Category::Activations);
        if groups.iter().any(|group| !group.is_empty()) {
            let (x, ranges) = self.rounded(&h.tensor, &groups);
            let mut parts = Vec::new();
            for span in spans(&groups) {
                let gates = gates.as_ref().map(|gates| &gates[span.clone()]);
                let (ups, ranges) = (&ups[span.clone()], &ranges[span.clone()]);
                let a = match gates {
                    Some(gates) if gates.iter().zip(ups).all(|(g, u)| g.goes_beside(u)) => {
                        self.products(&x, ranges, dtype, ups, Some((kind, gates)))
                    }
                    Some(gates) => {
                        let gate = self.products(&x, ranges, dtype, gates, None);
                        let up = self.products(&x, ranges, dtype, ups, None);
                        self.gated(kind, &gate, &up)
                    }
                    None => {
                        let up = self.products(&x, ranges, dtype, ups, None);
                        self.activation(kind, &up)
                    }
                };
                let (a, ranges) = self.rounded(&a.tensor, &in_order(&groups[span.clone()]));
                parts.push(self.products(&a, &ranges, dtype, &downs[span], None).tensor);
            }
            each_dtype!(dtype, E => {
                // The spans' rows one after another are those of all experts.
                let rows = parts.iter().flat_map(|part| part.as_slice::<E>().chunks(shape[1]));
                routing.sum(rows, y.as_mut_slice::<E>());
            });
        }
        Some(self.record_opaque("a packed product", y, &[]))
    }

    /// Rows rounded to integers, in groups.
    fn rounded(&self, x: &Tensor, groups: &[Vec<u32>]) -> (Activations, Vec<Range<usize>>) {
        let cpu = self.cpu();
        each_dtype!(x.dtype(), E => {
            let x = Activations::quantize(&cpu.pool, &cpu.memory, x.as_slice::<E>(), x.cols());
            x.grouped(&cpu.pool, &cpu.memory, groups)
        })
    }

    /// One weight of each expert, where all are packed with their columns in order and nothing else is asked for.
    fn packed_weights<'w>(
        &self,
        experts: &[Expert<'w>],
        which: impl Fn(&Expert<'w>) -> Option<Projection<'w>>,
    ) -> Option<Vec<PackedWeight<'w>>> {
        let weight = |expert| {
            let weight = self.packed_weight(which(expert)?)?;
            weight.packed.order().is_none().then_some(weight)
        };
        experts.iter().map(weight).collect()
    }

    /// Products of groups of rows with a weight each, gated by those with another; the groups' results stand one after another.
    #[track_caller]
    fn products(
        &mut self,
        x: &Activations,
        groups: &[Range<usize>],
        dtype: DType,
        weights: &[PackedWeight<'_>],
        gates: Option<(Activation, &[PackedWeight<'_>])>,
    ) -> Var {
        let cpu = self.cpu().clone();
        let rows: usize = groups.iter().map(Range::len).sum();
        let cols = weights.first().map_or(0, |weight| weight.packed.shape()[0]);
        let mut y = Tensor::empty(&cpu, [rows, cols], dtype, Category::Activations);
        each_dtype!(dtype, E => {
            let mut products = Vec::new();
            let mut rest = y.as_mut_slice::<E>();
            for (i, (group, weight)) in groups.iter().zip(weights).enumerate() {
                let (out, after) = rest.split_at_mut(group.len() * cols);
                rest = after;
                if !group.is_empty() {
                    let gate = gates.map(|(kind, gates)| gates[i].gate(kind));
                    products.push((group.clone(), Product { gate, ..weight.product(out) }));
                }
            }
            multiply_groups(&cpu.pool, x, &mut products);
        });
        self.record_opaque("a packed product", y, &[])
    }
}

/// Rows of experts that are computed together, if one has not more: what lies between products stays in a cache.
const ROWS: usize = 256;

/// Neighboring groups of no more rows together than that.
fn spans(groups: &[Vec<u32>]) -> Vec<Range<usize>> {
    let (mut spans, mut start, mut rows) = (Vec::new(), 0, 0);
    for (at, group) in groups.iter().enumerate() {
        if rows > 0 && rows + group.len() > ROWS {
            spans.push(start..at);
            (start, rows) = (at, 0);
        }
        rows += group.len();
    }
    spans.push(start..groups.len());
    spans
}

/// Groups of the same sizes, of rows that stand one after another.
fn in_order(groups: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut total = 0;
    let mut next = |group: &Vec<u32>| {
        let start = total;
        total += group.len() as u32;
        (start..total).collect()
    };
    groups.iter().map(&mut next).collect()
}
