//! Causal attention over packed sequences.

use crate::tape::{Backprop, Backward};
use crate::{AttentionShape, Segment, Tape, Tensor, Var, each_dtype};
use std::sync::Arc;
use windlass_kernels::Element;
use windlass_kernels::attention::{PagedKv, Rows, attention, attention_backward, attention_paged};
use windlass_kernels::memory::Category;

impl Tape {
    /// `softmax(mask(scale * q kᵀ)) v` for each head and segment, without a `T x T` matrix.
    ///
    /// # Shapes
    /// `q [Tq, heads * head_dim]`, `k` and `v [Tk, kv_heads * head_dim]`, output like `q`.
    ///
    /// # Source
    /// Dao et al. 2022, "FlashAttention"; Ainslie et al. 2023 (grouped queries).
    #[track_caller]
    pub fn attention(
        &mut self,
        shape: &AttentionShape,
        segments: &Arc<[Segment]>,
        q: &Var,
        k: &Var,
        v: &Var,
    ) -> Var {
        let cpu = self.cpu().clone();
        let dtype = q.tensor.dtype();
        let mut out = Tensor::empty(&cpu, *q.shape(), dtype, Category::Activations);
        let lse_shape = [shape.heads, q.tensor.rows()];
        let mut lse = Tensor::empty(&cpu, lse_shape, dtype.accumulator(), Category::Activations);
        each_dtype!(dtype, E => attention(
            &cpu.pool,
            shape,
            segments,
            rows::<E>(&q.tensor),
            rows::<E>(&k.tensor),
            rows::<E>(&v.tensor),
            out.as_mut_slice::<E>(),
            lse.as_mut_slice::<<E as Element>::Acc>(),
        ));
        let flows = [q, k, v].iter().any(|x| x.node().is_some());
        let saved_out = (self.is_recording() && flows).then(|| out.clone());
        self.record(out, flows, || Saved {
            shape: *shape,
            segments: segments.clone(),
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            out: saved_out.expect("recording"),
            lse,
        })
    }

    /// [`Tape::attention`] to keys and values in pages, `kv_start` of a segment being `PAGE` times the place of its first
    /// page in `table`. It has no backward pass.
    ///
    /// # Panics
    /// As [`attention_paged`], or when a gradient flows through `q`.
    #[track_caller]
    pub fn attention_paged(
        &mut self,
        shape: &AttentionShape,
        segments: &[Segment],
        q: &Var,
        kv: &PagedKv,
        table: &[u32],
    ) -> Var {
        let cpu = self.cpu().clone();
        let dtype = q.tensor.dtype();
        let mut out = Tensor::empty(&cpu, *q.shape(), dtype, Category::Activations);
        let lse_shape = [shape.heads, q.tensor.rows()];
        let mut lse = Tensor::empty(&cpu, lse_shape, dtype.accumulator(), Category::Activations);
        each_dtype!(dtype, E => attention_paged(
            &cpu.pool,
            shape,
            segments,
            rows::<E>(&q.tensor),
            kv,
            table,
            out.as_mut_slice::<E>(),
            lse.as_mut_slice::<<E as Element>::Acc>(),
        ));
        self.record_opaque("attention to pages", out, &[q])
    }
}

fn rows<E: Element>(x: &Tensor) -> Rows<'_, E> {
    Rows {
        data: x.as_slice::<E>(),
        stride: x.cols(),
    }
}

struct Saved {
    shape: AttentionShape,
    segments: Arc<[Segment]>,
    q: Var,
    k: Var,
    v: Var,
    out: Tensor,
    lse: Tensor,
}

impl Backward for Saved {
    fn backward(self: Box<Self>, cx: &mut Backprop<'_>, dy: Tensor) {
        let cpu = cx.cpu();
        let like = |x: &Var| Tensor::empty(&cpu, *x.shape(), dy.dtype(), Category::Activations);
        let (mut dq, mut dk, mut dv) = (like(&self.q), like(&self.k), like(&self.v));
        each_dtype!(dy.dtype(), E => attention_backward(
            &cpu.pool,
            &self.shape,
            &self.segments,
            rows::<E>(&self.q.tensor),
            rows::<E>(&self.k.tensor),
            rows::<E>(&self.v.tensor),
            self.out.as_slice::<E>(),
            self.lse.as_slice::<<E as Element>::Acc>(),
            dy.as_slice::<E>(),
            dq.as_mut_slice::<E>(),
            dk.as_mut_slice::<E>(),
            dv.as_mut_slice::<E>(),
        ));
        cx.add(self.q.node(), dq);
        cx.add(self.k.node(), dk);
        cx.add(self.v.node(), dv);
    }
}
