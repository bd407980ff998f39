//! The one decoder: embedding, blocks and head, built from [`DecoderConfig`] as units and layers.

use crate::families::{DecoderConfig, Experts, LayerOptions, Norm, Placement, QkNorm};
use crate::model::{Layer, Model};
use crate::rope::Rope;
use crate::tokens::{Goal, Tokens};
use std::sync::Arc;
use windlass_tensor::{Activation, AttentionShape, Init, ParamSpec, Tape, Var, Weights};

/// Declares a decoder: a unit for each block, and either one unit for embedding and head together (tied) or one each.
pub fn decoder(config: &DecoderConfig) -> Model<Tokens> {
    let mut model = Model::new();
    let mut p = Params::new(config);
    let embedding = Embedding {
        table: p.matrix("model.embed_tokens", config.vocab_size, config.hidden_size),
        positions: config.learned_positions.then(|| {
            p.matrix(
                "model.embed_positions",
                config.max_position_embeddings,
                config.hidden_size,
            )
        }),
        scale: config.embedding_scale,
    };
    let tied = config.tie_word_embeddings;
    let root = (!tied).then(|| model.unit("embedding", p.take()));
    let head = Head {
        norm: p.norm("model.norm", config.hidden_size, config.norm),
        projection: if tied {
            embedding.table
        } else {
            p.matrix("lm_head", config.vocab_size, config.hidden_size)
        },
        softcap: config.final_logit_softcapping,
    };
    let last = match root {
        Some(root) => {
            model.layer(root, embedding);
            None
        }
        None => {
            let shared = model.unit("embedding and head", p.take());
            model.layer(shared, embedding);
            Some(shared)
        }
    };
    let rest = if last.is_none() { p.take() } else { Vec::new() };
    for (index, options) in config.layers.iter().enumerate() {
        let block = Block::declare(config, index, options, &mut p);
        let unit = model.unit(format!("layer {index}"), p.take());
        model.layer(unit, block);
    }
    let last = last.unwrap_or_else(|| model.unit("head", rest));
    model.layer(last, head);
    model
}

/// Collects the parameters of a unit while its layer is declared.
struct Params<'a> {
    config: &'a DecoderConfig,
    specs: Vec<ParamSpec>,
}

#[derive(Clone, Copy)]
struct Linear {
    weight: usize,
    bias: Option<usize>,
}

#[derive(Clone, Copy)]
struct NormSlots {
    weight: usize,
    bias: Option<usize>,
    kind: Norm,
    eps: f32,
}

impl<'a> Params<'a> {
    fn new(config: &'a DecoderConfig) -> Self {
        Params {
            config,
            specs: Vec::new(),
        }
    }

    fn take(&mut self) -> Vec<ParamSpec> {
        std::mem::take(&mut self.specs)
    }

    fn push(&mut self, spec: ParamSpec) -> usize {
        self.specs.push(spec);
        self.specs.len() - 1
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> usize {
        self.push(ParamSpec::normal(
            format!("{name}.weight"),
            [rows, cols],
            self.config.initializer_range,
        ))
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Linear {
        let weight = self.matrix(name, rows, cols);
        let bias = bias.then(|| {
            self.push(ParamSpec::constant(
                format!("{name}.bias"),
                [rows],
                Init::Zeros,
            ))
        });
        Linear { weight, bias }
    }

    /// A matrix that writes to the residual stream.
    fn output(&mut self, name: &str, rows: usize, cols: usize, bias: bool) -> Linear {
        let linear = self.linear(name, rows, cols, bias);
        self.specs[linear.weight].init = Init::Normal(self.config.residual_init_std);
        linear
    }

    fn norm(&mut self, name: &str, width: usize, kind: Norm) -> NormSlots {
        let init = if kind == (Norm::Rms { offset: 1.0 }) {
            Init::Zeros
        } else {
            Init::Ones
        };
        let weight = self.push(ParamSpec::constant(format!("{name}.weight"), [width], init));
        let bias = (kind == Norm::Layer { bias: true }).then(|| {
            self.push(ParamSpec::constant(
                format!("{name}.bias"),
                [width],
                Init::Zeros,
            ))
        });
        NormSlots {
            weight,
            bias,
            kind,
            eps: self.config.norm_eps,
        }
    }
}

impl Linear {
    fn forward(&self, w: &Weights, x: &Var, residual: Option<&Var>, tape: &mut Tape) -> Var {
        tape.linear(x, w.at(self.weight), self.bias.map(|b| w.at(b)), residual)
    }
}

impl NormSlots {
    fn forward(&self, w: &Weights, x: &Var, tape: &mut Tape) -> Var {
        match self.kind {
            Norm::Rms { offset } => tape.rms_norm(x, w.at(self.weight), self.eps, offset),
            Norm::Layer { .. } => {
                tape.layer_norm(x, w.at(self.weight), self.bias.map(|b| w.at(b)), self.eps)
            }
        }
    }
}

struct Embedding {
    table: usize,
    positions: Option<usize>,
    scale: f32,
}

impl Layer<Tokens> for Embedding {
    fn forward(&self, w: &Weights, _: Var, batch: &Tokens, tape: &mut Tape) -> Var {
        let x = tape.embedding(w.at(self.table), &batch.ids, self.scale, batch.dtype);
        match self.positions {
            Some(slot) => {
                let p = tape.embedding(w.at(slot), &batch.positions, 1.0, batch.dtype);
                tape.add(&x, &p)
            }
            None => x,
        }
    }
}

struct Head {
    norm: NormSlots,
    projection: usize,
    softcap: Option<f32>,
}

impl Layer<Tokens> for Head {
    fn forward(&self, w: &Weights, x: Var, batch: &Tokens, tape: &mut Tape) -> Var {
        let head = w.at(self.projection);
        match &batch.goal {
            Goal::Loss {
                targets,
                denominator,
            } => {
                let h = self.norm.forward(w, &x, tape);
                let loss = tape.cross_entropy(&h, head, targets, self.softcap, *denominator);
                match &batch.router {
                    // The routers' gradient flows where they were recorded; here the value joins the loss.
                    Some((stats, coefficient)) => {
                        let balance = stats.close(tape.seed() * coefficient);
                        tape.shift(coefficient * balance, &loss)
                    }
                    None => loss,
                }
            }
            Goal::TokenLosses { targets } => {
                let h = self.norm.forward(w, &x, tape);
                tape.token_losses(&h, head, targets, self.softcap)
            }
            Goal::Logits { rows } => {
                let x = tape.gather_rows(&x, rows);
                let h = self.norm.forward(w, &x, tape);
                tape.logits(&h, head, self.softcap)
            }
        }
    }
}

struct Block {
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
    fn declare(
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

fn normed(norm: &Option<NormSlots>, w: &Weights, x: &Var, tape: &mut Tape) -> Var {
    norm.as_ref()
        .map_or_else(|| x.clone(), |norm| norm.forward(w, x, tape))
}

impl Layer<Tokens> for Block {
    fn forward(&self, w: &Weights, x: Var, batch: &Tokens, tape: &mut Tape) -> Var {
        let h = normed(&self.norm_in, w, &x, tape);
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
                normed(&self.mlp_norm_in, w, &x, tape)
            } else {
                h.clone()
            };
            return self.mlp.forward(w, &h, Some(&after), batch, tape);
        }
        let x = Self::residual(&self.norm_out, w, &x, tape, attention);
        drop(h);
        let h = normed(&self.mlp_norm_in, w, &x, tape);
        Self::residual(&self.mlp_norm_out, w, &x, tape, |residual, tape| {
            self.mlp.forward(w, &h, residual, batch, tape)
        })
    }
}

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

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: QkNormSlots,
    k_norm: QkNormSlots,
    rope: Option<Arc<Rope>>,
    shape: AttentionShape,
}

impl Attention {
    fn declare(c: &DecoderConfig, at: &str, options: &LayerOptions, p: &mut Params<'_>) -> Self {
        let (d, hd) = (c.hidden_size, c.head_dim);
        let (q_dim, kv_dim) = (c.num_attention_heads * hd, c.num_key_value_heads * hd);
        let at = format!("{at}.self_attn");
        let q_norm = QkNormSlots::declare(c, &format!("{at}.q"), q_dim, p);
        let k_norm = QkNormSlots::declare(c, &format!("{at}.k"), kv_dim, p);
        Attention {
            q: p.linear(&format!("{at}.q_proj"), q_dim, d, c.qkv_bias),
            k: p.linear(&format!("{at}.k_proj"), kv_dim, d, c.qkv_bias),
            v: p.linear(&format!("{at}.v_proj"), kv_dim, d, c.qkv_bias),
            o: p.output(&format!("{at}.o_proj"), d, q_dim, c.o_bias),
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

    fn forward(
        &self,
        w: &Weights,
        h: &Var,
        residual: Option<&Var>,
        layer: usize,
        batch: &Tokens,
        tape: &mut Tape,
    ) -> Var {
        let q = self.q.forward(w, h, None, tape);
        let k = self.k.forward(w, h, None, tape);
        let v = self.v.forward(w, h, None, tape);
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
                let (k, v) = cache
                    .lock()
                    .expect("cache")
                    .append(layer, &k.tensor, &v.tensor);
                let (k, v) = (tape.constant(k), tape.constant(v));
                tape.attention(&self.shape, &batch.segments, &q, &k, &v)
            }
        };
        self.o.forward(w, &a, residual, tape)
    }
}

/// A feed-forward network, gated or not.
struct Ffn {
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

impl Ffn {
    fn declare(c: &DecoderConfig, at: &str, width: usize, p: &mut Params<'_>) -> Self {
        let d = c.hidden_size;
        Ffn {
            gate: c
                .gated
                .then(|| p.linear(&format!("{at}.gate_proj"), width, d, c.mlp_bias)),
            up: p.linear(&format!("{at}.up_proj"), width, d, c.mlp_bias),
            down: p.output(&format!("{at}.down_proj"), d, width, c.mlp_bias),
            activation: c.activation,
        }
    }

    fn forward(&self, w: &Weights, h: &Var, residual: Option<&Var>, tape: &mut Tape) -> Var {
        let a = match &self.gate {
            Some(gate) => {
                let gate = gate.forward(w, h, None, tape);
                let up = self.up.forward(w, h, None, tape);
                tape.gated(self.activation, &gate, &up)
            }
            None => {
                let up = self.up.forward(w, h, None, tape);
                tape.activation(self.activation, &up)
            }
        };
        self.down.forward(w, &a, residual, tape)
    }
}

enum Mlp {
    Dense(Ffn),
    Experts {
        router: Linear,
        experts: Vec<Ffn>,
        per_token: usize,
        normalize: bool,
    },
}

impl Mlp {
    fn experts(c: &DecoderConfig, at: &str, e: &Experts, p: &mut Params<'_>) -> Self {
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

    fn forward(
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
        let routing = tape.routing(&logits, per_token, normalize, batch.router.as_ref().map(|(stats, _)| stats));
        let outputs: Vec<Var> = experts
            .iter()
            .zip(&routing.rows)
            .map(|(expert, rows)| {
                let rows: Vec<u32> = rows.iter().map(|(row, _)| *row).collect();
                let x = tape.gather_rows(h, &rows);
                expert.forward(w, &x, None, tape)
            })
            .collect();
        let y = tape.combine(&routing, &outputs, h.tensor.cols());
        match residual {
            Some(x) => tape.add(x, &y),
            None => y,
        }
    }
}
