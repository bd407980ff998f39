//! Adapters that belong to rows instead of the model: how requests with different ones share a batch.
//!
//! The product with the weight itself is made once for all rows; what an adapter adds touches its own rows alone, by the
//! arithmetic of a model that has this adapter. Only inference knows overlays: nothing here is recorded.

use super::lora::{Lora, add_product, assert_fits, rescale, row_norms};
use crate::{Cpu, DType, Param, Tape, Tensor, Var, Weights, each_dtype};
use std::ops::Range;
use std::sync::Arc;
use windlass_kernels::memory::Category;

/// The low-rank adapters of one unit's weights with all their values, which are no parameters of the unit.
#[derive(Clone, Debug, Default)]
pub struct UnitOverlay {
    links: Vec<Link>,
    weights: Weights,
}

#[derive(Clone, Debug)]
struct Link {
    /// Slot of the adapted weight in its unit.
    slot: usize,
    /// Slots of the adapter's values among those of the overlay.
    lora: Lora,
    /// Norms of the rows of the adapted weight, where it has magnitudes.
    norms: Vec<f64>,
}

impl UnitOverlay {
    /// Adapters, each with the slot of the weight in `base` that it adapts; their own slots are those of `weights`. `dtype`
    /// is that of the values they will be multiplied with.
    pub fn new(
        cpu: &Cpu,
        links: impl IntoIterator<Item = (usize, Lora)>,
        weights: Weights,
        base: &Weights,
        dtype: DType,
    ) -> Self {
        let link = |(slot, lora): (usize, Lora)| {
            let adapter = Some((&lora, &weights));
            let norms = lora
                .magnitude
                .map(|_| row_norms(cpu, base.at(slot).weight, adapter, dtype));
            Link {
                slot,
                lora,
                norms: norms.unwrap_or_default(),
            }
        };
        let links = links.into_iter().map(link).collect();
        UnitOverlay { links, weights }
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        let tensors = self.weights.iter().map(|weight| weight.dense());
        tensors.map(|t| t.len() * t.dtype().size()).sum()
    }
}

/// Rows of a batch, ascending, each run with the overlay that it is computed with.
pub(crate) type Overlays = Vec<(Range<usize>, Arc<UnitOverlay>)>;

impl Tape {
    /// Computes runs of rows, given in ascending order, with overlays for the unit. Other rows have none.
    ///
    /// # Panics
    /// When the tape records, or runs overlap.
    #[must_use]
    #[track_caller]
    pub fn with_overlays(mut self, runs: Vec<(Range<usize>, Arc<UnitOverlay>)>) -> Self {
        assert!(!self.is_recording(), "overlays on a tape that records");
        let ordered = runs.windows(2).all(|w| w[0].0.end <= w[1].0.start);
        assert!(ordered, "runs of rows one after another");
        self.overlays = runs;
        self
    }

    /// Computes on values that hold only some of the batch's rows, which are ascending.
    pub fn on_rows<T>(&mut self, rows: &[u32], compute: impl FnOnce(&mut Tape) -> T) -> T {
        if self.overlays.is_empty() {
            return compute(self);
        }
        let place = |row: usize| rows.partition_point(|&r| (r as usize) < row);
        let part = |(run, overlay): &(Range<usize>, Arc<UnitOverlay>)| {
            (place(run.start)..place(run.end), overlay.clone())
        };
        let part = self.overlays.iter().map(part).collect();
        let whole = std::mem::replace(&mut self.overlays, part);
        let result = compute(self);
        self.overlays = whole;
        result
    }

    /// Whether an overlay of any row adapts a weight.
    pub(super) fn is_overlaid(&self, slot: usize) -> bool {
        let adapts = |overlay: &UnitOverlay| overlay.links.iter().any(|link| link.slot == slot);
        self.overlays.iter().any(|(_, overlay)| adapts(overlay))
    }

    /// A product with what the rows' overlays make of it. `y` is the product with the weight, bias and residual included.
    #[track_caller]
    pub(super) fn overlay(
        &mut self,
        x: &Var,
        mut y: Var,
        w: Param<'_>,
        bias: Option<Param<'_>>,
        residual: Option<&Var>,
    ) -> Var {
        let overlays = std::mem::take(&mut self.overlays);
        for (rows, overlay) in &overlays {
            let link = overlay.links.iter().find(|link| link.slot == w.slot);
            let Some(link) = link.filter(|_| !rows.is_empty()) else {
                continue;
            };
            let input = x.tensor.slice_rows(rows.clone());
            match link.lora.magnitude {
                None => link.add(self.cpu(), overlay, &input, &mut y.tensor, rows.clone()),
                Some(slot) => {
                    let input = self.constant(input);
                    let mut t = self.product(&input, w, None, None).tensor;
                    let all = 0..t.rows();
                    link.add(self.cpu(), overlay, &input.tensor, &mut t, all);
                    let magnitudes = overlay.weights.at(slot).weight.dense().to_f64();
                    each_dtype!(t.dtype(), E => {
                        let n = t.cols();
                        let range = rows.start * n..rows.end * n;
                        let bias = bias.map(|b| b.weight.dense().as_slice::<E>());
                        let residual = residual.map(|r| &r.tensor.as_slice::<E>()[range.clone()]);
                        let out = &mut y.tensor.as_mut_slice::<E>()[range];
                        rescale(t.as_slice::<E>(), (&magnitudes, &link.norms), bias, residual, out);
                    });
                }
            }
        }
        self.overlays = overlays;
        y
    }
}

impl Link {
    /// Adds the low-rank product of `x` to the rows of `y`.
    fn add(
        &self,
        cpu: &Cpu,
        overlay: &UnitOverlay,
        x: &Tensor,
        y: &mut Tensor,
        rows: Range<usize>,
    ) {
        let dtype = x.dtype();
        let (a, b) = self.lora.factors(cpu, &overlay.weights, dtype);
        let n = y.cols();
        assert_fits(x, &a, &b, n);
        each_dtype!(dtype, E => {
            let y = &mut y.as_mut_slice::<E>()[rows.start * n..rows.end * n];
            let category = Category::Workspace;
            add_product(cpu, x.as_slice::<E>(), (&a, &b), self.lora.scale, y, category);
        });
    }
}
