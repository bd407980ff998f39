//! Self-attention of a block: projections, norms of queries and keys, rotation, the key-value cache.

use super::params::{Linear, NormSlots, Params, normed};
use crate::families::{DecoderConfig, LayerOptions, Norm, QkNorm};
use crate::rope::Rope;
use crate::tokens::Tokens;
use std::sync::Arc;
use windlass_tensor::{AttentionShape, Tape, Var, Weights};

/// The norm of queries or of keys.
enum QkNormSlots {
    Without,
    /// One weight, over each head or over all heads together.
    One(NormSlots),
    /// A weight for each head.
    Each(Vec<NormSlots>),
}

impl QkNormSlots {
    /// `at` is the name up to `q` or `k`; `width` that of all heads.
    fn declare(c: &DecoderConfig, at: &str, width: usize, p: &mut Params<'_>) -> Self {
        match c.qk_norm {
            QkNorm::Without => Self::Without,
            QkNorm::Head => Self::One(p.norm(&format!("{at}_norm"), c.head_dim, c.norm)),
            QkNorm::Full => Self::One(p.norm(&format!("{at}_norm"), width, c.norm)),
            QkNorm::EachHead => {
                let kind = Norm::Layer { bias: false };
                let name = |head: usize| format!("{at}_layernorm.norms.{head}");
                let heads = 0..width / c.head_dim;
                Self::Each(heads.map(|h| p.norm(&name(h), c.head_dim, kind)).collect())
            }
        }
    }

    fn forward(&self, w: &Weights, x: Var, tape: &mut Tape) -> Var {
        match self {
            Self::Without => x,
            Self::One(norm) => norm.forward(w, &x, tape),
            Self::Each(norms) => {
                let width = x.tensor.cols() / norms.len();
                let parts: Vec<Var> = norms
                    .iter()
                    .enumerate()
                    .map(|(h, norm)| {
                        let head = tape.split(&x, h * width..(h + 1) * width);
                        norm.forward(w, &head, tape)
                    })
                    .collect();
                tape.concat(&parts.iter().collect::<Vec<_>>())
            }
        }
    }
}

/// Self-attention with its projections.
pub(super) struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    o_norm: Option<NormSlots>,
    q_norm: QkNormSlots,
    k_norm: QkNormSlots,
    rope: Option<Arc<Rope>>,
    shape: AttentionShape,
}

impl Attention {
    pub(super) fn declare(
        c: &DecoderConfig,
        at: &str,
        options: &LayerOptions,
        p: &mut Params<'_>,
    ) -> Self {
        let (d, hd) = (c.hidden_size, c.head_dim);
        let (q_dim, kv_dim) = (c.num_attention_heads * hd, c.num_key_value_heads * hd);
        let at = format!("{at}.self_attn");
        let q_norm = QkNormSlots::declare(c, &format!("{at}.q"), q_dim, p);
        let k_norm = QkNormSlots::declare(c, &format!("{at}.k"), kv_dim, p);
        let o_norm = c
            .sub_norms
            .then(|| p.norm(&format!("{at}.attn_sub_norm"), q_dim, c.norm));
        Attention {
            q: p.linear(&format!("{at}.q_proj"), q_dim, d, c.qkv_bias),
            k: p.linear(&format!("{at}.k_proj"), kv_dim, d, c.qkv_bias),
            v: p.linear(&format!("{at}.v_proj"), kv_dim, d, c.qkv_bias),
            o: p.output(&format!("{at}.o_proj"), d, q_dim, c.o_bias),
            o_norm,
            q_norm,
            k_norm,
            rope: options.rope.map(|i| c.ropes[i].clone()),
            shape: AttentionShape {
                heads: c.num_attention_heads,
                kv_heads: c.num_key_value_heads,
                head_dim: hd,
                scale: c.attention_scale,
                softcap: c.attn_logit_softcapping,
                window: options.window,
            },
        }
    }

    pub(super) fn forward(
        &self,
        w: &Weights,
        h: &Var,
        residual: Option<&Var>,
        layer: usize,
        batch: &Tokens,
        tape: &mut Tape,
    ) -> Var {
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], w, h, tape);
        let mut q = self.q_norm.forward(w, q, tape);
        let mut k = self.k_norm.forward(w, k, tape);
        if let Some(rope) = &self.rope {
            let table = rope.table(batch.positions.iter().max().map_or(0, |&p| p as usize + 1));
            q = tape.rope(q, self.shape.head_dim, &table, &batch.positions);
            k = tape.rope(k, self.shape.head_dim, &table, &batch.positions);
        }
        let a = match &batch.cache {
            None => tape.attention(&self.shape, &batch.segments, &q, &k, &v),
            Some(cache) => {
                let cpu = tape.cpu().clone();
                let mut blocks = cache.blocks.lock().expect("no panic while it was held");
                let kv = blocks.append(&cpu, layer, (&k.tensor, &v.tensor), &cache.slots);
                tape.attention_paged(&self.shape, &batch.segments, &q, kv, &cache.table)
            }
        };
        let a = normed(&self.o_norm, w, a, tape);
        self.o.forward(w, &a, residual, tape)
    }
}
