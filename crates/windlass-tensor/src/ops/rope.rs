//! Rotary position embedding.

use crate::tape::{Backprop, Backward};
use crate::{Tape, Tensor, Var, each_dtype};
use std::sync::Arc;
use windlass_kernels::rope::{Rope, rope};

/// Cosines and sines of every position: `[positions, rotary / 2]` each.
#[derive(Debug)]
pub struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    rotary: usize,
    interleaved: bool,
}

impl RopeTable {
    /// Angles `position * inv_freq[i]`, computed in `f64`; both functions are multiplied by `scale`.
    ///
    /// The first `2 * inv_freq.len()` elements of a head are rotated, in pairs `(i, i + rotary / 2)`, or
    /// `(2i, 2i + 1)` when `interleaved`.
    ///
    /// # Source
    /// Su et al. 2021, "RoFormer".
    pub fn new(positions: usize, inv_freq: &[f64], scale: f64, interleaved: bool) -> Self {
        let angles = (0..positions).flat_map(|p| inv_freq.iter().map(move |f| p as f64 * f));
        let (sin, cos) = angles
            .map(|a| ((a.sin() * scale) as f32, (a.cos() * scale) as f32))
            .unzip();
        RopeTable {
            cos,
            sin,
            rotary: 2 * inv_freq.len(),
            interleaved,
        }
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.rotary / 2).unwrap_or(0)
    }

    fn apply(
        &self,
        cpu: &crate::Cpu,
        x: &mut Tensor,
        head_dim: usize,
        positions: &[u32],
        inverse: bool,
    ) {
        let stride = x.cols();
        let shape = Rope {
            stride,
            heads: stride / head_dim,
            head_dim,
            rotary: self.rotary,
            interleaved: self.interleaved,
            inverse,
        };
        each_dtype!(x.dtype(), E => rope(&cpu.pool, x.as_mut_slice::<E>(), &shape, &self.cos, &self.sin, positions));
    }
}

impl Tape {
    /// Rotates each head of `x` by its row's position; in place when nobody else holds `x`.
    ///
    /// # Shapes
    /// `x [T, heads * head_dim]`, `positions [T]`.
    #[track_caller]
    pub fn rope(
        &mut self,
        x: Var,
        head_dim: usize,
        table: &Arc<RopeTable>,
        positions: &Arc<[u32]>,
    ) -> Var {
        assert_eq!(
            x.tensor.rows(),
            positions.len(),
            "rows of {} against the positions",
            x.shape()
        );
        let cpu = self.cpu().clone();
        let node = x.node();
        let mut y = x.tensor;
        if !y.is_unique() {
            y = y.deep_clone(&cpu, windlass_kernels::memory::Category::Activations);
        }
        table.apply(&cpu, &mut y, head_dim, positions, false);
        self.record(y, node.is_some(), || Saved {
            x: node,
            head_dim,
            table: table.clone(),
            positions: positions.clone(),
        })
    }
}

struct Saved {
    x: Option<usize>,
    head_dim: usize,
    table: Arc<RopeTable>,
    positions: Arc<[u32]>,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, mut dy: Tensor) {
        let cpu = cx.cpu();
        if !dy.is_unique() {
            dy = dy.deep_clone(&cpu, windlass_kernels::memory::Category::Activations);
        }
        self.table
            .apply(&cpu, &mut dy, self.head_dim, &self.positions, true);
        cx.add(self.x, dy);
    }
}
