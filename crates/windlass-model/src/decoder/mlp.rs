//! The MLP of a block: a feed-forward network, or experts behind a router.

use super::params::{Linear, NormSlots, Params, normed};
use crate::families::{DecoderConfig, Experts};
use crate::tokens::Tokens;
use windlass_tensor::{Activation, Expert, Tape, Var, Weights};

/// A feed-forward network, gated or not.
pub(super) struct Ffn {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    down_norm: Option<NormSlots>,
    activation: Activation,
}

impl Ffn {
    pub(super) fn declare(c: &DecoderConfig, at: &str, width: usize, p: &mut Params<'_>) -> Self {
        let d = c.hidden_size;
        Ffn {
            gate: c
                .gated
                .then(|| p.linear(&format!("{at}.gate_proj"), width, d, c.mlp_bias)),
            up: p.linear(&format!("{at}.up_proj"), width, d, c.mlp_bias),
            down: p.output(&format!("{at}.down_proj"), d, width, c.mlp_bias),
            down_norm: c
                .sub_norms
                .then(|| p.norm(&format!("{at}.ffn_sub_norm"), width, c.norm)),
            activation: c.activation,
        }
    }

    /// Its weights, where they are all there is to it: nothing stands between them.
    fn params<'w>(&self, w: &'w Weights) -> Option<Expert<'w>> {
        self.down_norm.is_none().then(|| Expert {
            gate: self.gate.map(|gate| gate.params(w)),
            up: self.up.params(w),
            down: self.down.params(w),
        })
    }

    fn forward(&self, w: &Weights, h: &Var, residual: Option<&Var>, tape: &mut Tape) -> Var {
        let a = match &self.gate {
            Some(gate) => tape.gated_linears(self.activation, h, gate.params(w), self.up.params(w)),
            None => {
                let up = self.up.forward(w, h, None, tape);
                tape.activation(self.activation, &up)
            }
        };
        let a = normed(&self.down_norm, w, a, tape);
        match residual {
            // What takes up the residual is the block's output.
            Some(x) => self.down.forward_out(w, &a, x, tape),
            None => self.down.forward(w, &a, None, tape),
        }
    }
}

/// The MLP of a block: one network, or a router and its experts.
pub(super) enum Mlp {
    Dense(Ffn),
    Experts {
        router: Linear,
        experts: Vec<Ffn>,
        per_token: usize,
        normalize: bool,
    },
}

impl Mlp {
    pub(super) fn experts(c: &DecoderConfig, at: &str, e: &Experts, p: &mut Params<'_>) -> Self {
        let router = p.linear(
            &format!("{at}.mlp.gate"),
            e.num_experts,
            c.hidden_size,
            false,
        );
        let experts = (0..e.num_experts)
            .map(|i| Ffn::declare(c, &format!("{at}.mlp.experts.{i}"), e.intermediate_size, p))
            .collect();
        Mlp::Experts {
            router,
            experts,
            per_token: e.num_experts_per_tok,
            normalize: e.norm_topk_prob,
        }
    }

    pub(super) fn forward(
        &self,
        w: &Weights,
        h: &Var,
        residual: Option<&Var>,
        batch: &Tokens,
        tape: &mut Tape,
    ) -> Var {
        let (router, experts, per_token, normalize) = match self {
            Mlp::Dense(ffn) => return ffn.forward(w, h, residual, tape),
            Mlp::Experts {
                router,
                experts,
                per_token,
                normalize,
            } => (router, experts, *per_token, *normalize),
        };
        let logits = router.forward(w, h, None, tape);
        let routing = tape.routing(
            &logits,
            per_token,
            normalize,
            batch.router.as_ref().map(|(stats, _)| stats),
        );
        let packed: Option<Vec<Expert<'_>>> = experts.iter().map(|e| e.params(w)).collect();
        let grouped = packed.zip(experts.first()).and_then(|(packed, first)| {
            tape.packed_experts(first.activation, h, &routing, &packed)
        });
        let y = match grouped {
            Some(y) => y,
            None => {
                let outputs = experts.iter().zip(&routing.rows).map(|(expert, rows)| {
                    let rows: Vec<u32> = rows.iter().map(|(row, _)| *row).collect();
                    let x = tape.gather_rows(h, &rows);
                    tape.on_rows(&rows, |tape| expert.forward(w, &x, None, tape))
                });
                let outputs: Vec<Var> = outputs.collect();
                tape.combine(&routing, &outputs, h.tensor.cols())
            }
        };
        match residual {
            Some(x) => tape.add(x, &y),
            None => y,
        }
    }
}
