//! The one decoder: embedding, blocks and head, built from [`DecoderConfig`] as units and layers.

mod attention;
mod block;
mod mlp;
mod params;

use crate::families::DecoderConfig;
use crate::model::{Layer, Model};
use crate::tokens::{Goal, Tokens};
use block::Block;
use params::{NormSlots, Params};
use windlass_tensor::{Tape, Var, Weights};

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
            Goal::Objective { targets, objective } => {
                let h = self.norm.forward(w, &x, tape);
                let of = |losses: &[f64]| objective.evaluate(losses);
                tape.objective(&h, head, targets, self.softcap, &of)
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
            Goal::Hidden { rows } => {
                let x = tape.gather_rows(&x, rows);
                self.norm.forward(w, &x, tape)
            }
        }
    }
}
