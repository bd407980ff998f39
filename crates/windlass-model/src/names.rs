//! Names and layouts of parameters in Hugging Face files.
//!
//! Inside, every architecture uses the names of a Llama; a family with other names or fused tensors has a table here.

use crate::model::Model;
use windlass_tensor::{FileTensor, Layout, ParamId};

/// How a family's files name and lay out parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// As inside.
    Llama,
    /// Queries, keys and values in one tensor, gate and up in another.
    Phi3,
    /// Transposed tensors, own names.
    Gpt2,
    /// Queries, keys and values interleaved by head, own names.
    NeoX {
        /// Number of heads.
        heads: usize,
    },
    /// Own names of the experts.
    Mixtral,
}

/// A part of an inside name, and what a file writes for it.
type Rule = (&'static str, &'static str);

const PHI3: &[Rule] = &[
    ("self_attn.q_proj", "self_attn.qkv_proj"),
    ("self_attn.k_proj", "self_attn.qkv_proj"),
    ("self_attn.v_proj", "self_attn.qkv_proj"),
    ("mlp.gate_proj", "mlp.gate_up_proj"),
    ("mlp.up_proj", "mlp.gate_up_proj"),
];

const GPT2: &[Rule] = &[
    ("model.layers.", "transformer.h."),
    ("model.embed_tokens", "transformer.wte"),
    ("model.embed_positions", "transformer.wpe"),
    ("model.norm", "transformer.ln_f"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.q_proj", "attn.c_attn"),
    ("self_attn.k_proj", "attn.c_attn"),
    ("self_attn.v_proj", "attn.c_attn"),
    ("self_attn.o_proj", "attn.c_proj"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
];

const NEOX: &[Rule] = &[
    ("model.layers.", "gpt_neox.layers."),
    ("model.embed_tokens", "gpt_neox.embed_in"),
    ("model.norm", "gpt_neox.final_layer_norm"),
    ("lm_head", "embed_out"),
    ("self_attn.q_proj", "attention.query_key_value"),
    ("self_attn.k_proj", "attention.query_key_value"),
    ("self_attn.v_proj", "attention.query_key_value"),
    ("self_attn.o_proj", "attention.dense"),
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
];

const MIXTRAL: &[Rule] = &[
    ("mlp.gate.", "block_sparse_moe.gate."),
    ("mlp.experts.", "block_sparse_moe.experts."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
];

impl Naming {
    fn rules(self) -> &'static [Rule] {
        match self {
            Naming::Llama => &[],
            Naming::Phi3 => PHI3,
            Naming::Gpt2 => GPT2,
            Naming::NeoX { .. } => NEOX,
            Naming::Mixtral => MIXTRAL,
        }
    }

    /// What files call the head; those of a model whose table is its head have none.
    pub(crate) fn head(self) -> &'static str {
        let renamed = self.rules().iter().find(|(inside, _)| *inside == "lm_head");
        renamed.map_or("lm_head", |(_, file)| file)
    }

    fn layout(self, file_name: &str) -> Layout {
        match self {
            Naming::Gpt2 if file_name.ends_with(".weight") && (file_name.contains(".c_")) => {
                Layout::Transposed
            }
            Naming::NeoX { heads } if file_name.contains("query_key_value") => {
                Layout::ByHead { heads }
            }
            _ => Layout::Rows,
        }
    }

    /// The tensors of a model's files, in the order of the units; those of adapters are in files of their own.
    pub fn file_tensors<B>(self, model: &Model<B>) -> Vec<FileTensor> {
        let mut tensors: Vec<FileTensor> = Vec::new();
        for (unit, spec) in model.units().iter().enumerate() {
            let of_adapter = |slot: usize| {
                let mut links = spec.adapters.iter().map(|(_, lora)| lora);
                links.any(|l| l.a == slot || l.b == slot || l.magnitude == Some(slot))
            };
            for (slot, param) in spec.params.iter().enumerate() {
                if of_adapter(slot) {
                    continue;
                }
                let mut name = param.name.clone();
                self.rules()
                    .iter()
                    .for_each(|(inside, file)| name = name.replace(inside, file));
                let id = ParamId { unit, slot };
                let rows = param.shape[0];
                match tensors.iter_mut().rev().take(16).find(|t| t.name == name) {
                    Some(tensor) => {
                        tensor.parts.push(id);
                        let mut axes = tensor.shape.to_vec();
                        let grown = if tensor.layout == Layout::Transposed {
                            axes.len() - 1
                        } else {
                            0
                        };
                        axes[grown] += rows;
                        tensor.shape = axes.as_slice().into();
                    }
                    None => {
                        let layout = self.layout(&name);
                        let mut axes = param.shape.to_vec();
                        if layout == Layout::Transposed {
                            axes.reverse();
                        }
                        tensors.push(FileTensor {
                            name,
                            shape: axes.as_slice().into(),
                            parts: vec![id],
                            layout,
                        });
                    }
                }
            }
        }
        tensors
    }

    /// The name under which a file that holds the bare decoder (without its head) has the same tensor.
    pub fn bare_name(self, name: &str) -> Option<&str> {
        ["model.", "transformer.", "gpt_neox."]
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix))
    }
}
