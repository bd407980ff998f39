//! A block: where the norms and sums stand around attention and MLP.

use super::attention::Attention;
use super::mlp::{Ffn, Mlp};
use super::params::{NormSlots, Params, normed};
use crate::families::{DecoderConfig, LayerOptions, Placement};
use crate::model::Layer;
use crate::tokens::Tokens;
use windlass_tensor::{Tape, Var, Weights};

/// Attention and MLP with their norms around the residual stream.
pub(super) struct Block {
    index: usize,
    placement: Placement,
    attention: Attention,
    mlp: Mlp,
    /// Before attention.
    norm_in: Option<NormSlots>,
    /// After attention, before the sum.
    norm_out: Option<NormSlots>,
    /// Before the MLP.
    mlp_norm_in: Option<NormSlots>,
    /// After the MLP, before the sum.
    mlp_norm_out: Option<NormSlots>,
}

impl Block {
    pub(super) fn declare(
        c: &DecoderConfig,
        index: usize,
        options: &LayerOptions,
        p: &mut Params<'_>,
    ) -> Self {
        let at = format!("model.layers.{index}");
        let norm = |p: &mut Params<'_>, name: &str| {
            Some(p.norm(&format!("{at}.{name}"), c.hidden_size, c.norm))
        };
        let (mut norm_in, mut norm_out, mut mlp_norm_in, mut mlp_norm_out) =
            (None, None, None, None);
        match c.placement {
            Placement::Pre | Placement::Parallel => {
                norm_in = norm(p, "input_layernorm");
                mlp_norm_in = norm(p, "post_attention_layernorm");
            }
            Placement::ParallelShared => norm_in = norm(p, "input_layernorm"),
            Placement::Post => {
                norm_out = norm(p, "post_attention_layernorm");
                mlp_norm_out = norm(p, "post_feedforward_layernorm");
            }
            Placement::Sandwich => {
                norm_in = norm(p, "input_layernorm");
                norm_out = norm(p, "post_attention_layernorm");
                mlp_norm_in = norm(p, "pre_feedforward_layernorm");
                mlp_norm_out = norm(p, "post_feedforward_layernorm");
            }
        }
        let attention = Attention::declare(c, &at, options, p);
        let mlp = match &c.experts {
            Some(experts) if options.experts => Mlp::experts(c, &at, experts, p),
            _ => Mlp::Dense(Ffn::declare(
                c,
                &format!("{at}.mlp"),
                c.intermediate_size,
                p,
            )),
        };
        Block {
            index,
            placement: c.placement,
            attention,
            mlp,
            norm_in,
            norm_out,
            mlp_norm_in,
            mlp_norm_out,
        }
    }

    /// `x + norm(inner(h))`, the sum fused into `inner` where no norm stands between.
    fn residual(
        norm: &Option<NormSlots>,
        w: &Weights,
        x: &Var,
        tape: &mut Tape,
        inner: impl FnOnce(Option<&Var>, &mut Tape) -> Var,
    ) -> Var {
        match norm {
            None => inner(Some(x), tape),
            Some(norm) => {
                let y = inner(None, tape);
                let y = norm.forward(w, &y, tape);
                tape.add(x, &y)
            }
        }
    }
}

impl Layer<Tokens> for Block {
    fn forward(&self, w: &Weights, x: Var, batch: &Tokens, tape: &mut Tape) -> Var {
        let h = normed(&self.norm_in, w, x.clone(), tape);
        let attention = |residual: Option<&Var>, tape: &mut Tape| {
            self.attention
                .forward(w, &h, residual, self.index, batch, tape)
        };
        if matches!(
            self.placement,
            Placement::Parallel | Placement::ParallelShared
        ) {
            let after = attention(Some(&x), tape);
            let h = if self.mlp_norm_in.is_some() {
                normed(&self.mlp_norm_in, w, x.clone(), tape)
            } else {
                h.clone()
            };
            return self.mlp.forward(w, &h, Some(&after), batch, tape);
        }
        let x = Self::residual(&self.norm_out, w, &x, tape, attention);
        drop(h);
        let h = normed(&self.mlp_norm_in, w, x.clone(), tape);
        Self::residual(&self.mlp_norm_out, w, &x, tape, |residual, tape| {
            self.mlp.forward(w, &h, residual, batch, tape)
        })
    }
}
