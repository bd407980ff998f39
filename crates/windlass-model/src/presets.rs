//! Sizes for training from scratch.

use crate::config::{ModelError, nearest};
use crate::families::known_architectures;
use serde_json::{Value, json};

/// A size: the shape of a decoder without its architecture.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(
    missing_docs,
    reason = "fields named as in config.json are defined there"
)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub max_position_embeddings: usize,
    /// Whether embedding and head share their weights.
    pub tied: bool,
}

const fn size(
    name: &'static str,
    [
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
    ]: [usize; 5],
    max_position_embeddings: usize,
    tied: bool,
) -> Preset {
    Preset {
        name,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        max_position_embeddings,
        tied,
    }
}

/// The sizes, named by their parameters with a vocabulary of 32,000 (the smallest: without the embedding).
pub const PRESETS: &[Preset] = &[
    size("1m", [128, 352, 4, 4, 2], 512, true),
    size("3m", [192, 512, 6, 6, 3], 512, true),
    size("15m", [288, 768, 6, 6, 6], 1024, true),
    size("42m", [512, 1376, 8, 8, 8], 1024, true),
    size("110m", [768, 2048, 12, 12, 12], 1024, true),
    size("350m", [1024, 2816, 24, 16, 8], 2048, true),
    size("1b", [2048, 5632, 22, 32, 4], 2048, false),
];

/// The `config.json` of an architecture at a size, for a vocabulary.
///
/// # Errors
/// An unknown architecture or size, with the nearest name.
pub fn preset_config(
    architecture: &str,
    size: &str,
    vocab_size: usize,
) -> Result<String, ModelError> {
    let known = known_architectures();
    if !known.contains(&architecture) {
        return Err(ModelError::Architecture {
            file: "--arch".into(),
            name: architecture.into(),
            nearest: nearest(architecture, known.iter().copied())
                .unwrap_or_default()
                .into(),
            known,
        });
    }
    let Some(preset) = PRESETS.iter().find(|p| p.name == size) else {
        let names: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
        let near = nearest(size, names.iter().copied()).unwrap_or_default();
        return Err(ModelError::Key {
            file: "--size".into(),
            key: size.into(),
            message: "unknown size".into(),
            hint: format!("nearest known: {near}; all: {}", names.join(", ")),
        });
    };
    let mut config = shape(preset, architecture, vocab_size);
    let map = config.as_object_mut().expect("an object");
    for (key, value) in extras(architecture, preset) {
        map.insert(key.into(), value);
    }
    Ok(serde_json::to_string_pretty(&config).expect("plain values"))
}

fn shape(p: &Preset, architecture: &str, vocab_size: usize) -> Value {
    if architecture == "gpt2" {
        return json!({
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": vocab_size,
            "n_embd": p.hidden_size, "n_head": p.num_attention_heads, "n_layer": p.num_hidden_layers,
            "n_positions": p.max_position_embeddings, "n_ctx": p.max_position_embeddings,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": small_init(p.hidden_size),
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": true,
        });
    }
    json!({
        "architectures": [class(architecture)], "model_type": architecture, "vocab_size": vocab_size,
        "hidden_size": p.hidden_size, "intermediate_size": p.intermediate_size,
        "num_hidden_layers": p.num_hidden_layers, "num_attention_heads": p.num_attention_heads,
        "num_key_value_heads": p.num_key_value_heads, "max_position_embeddings": p.max_position_embeddings,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": small_init(p.hidden_size),
        "tie_word_embeddings": p.tied,
    })
}

/// `sqrt(2 / (5 d))`, to four decimals: 0.02 at the width of GPT-2, and enough for a narrow model to learn quickly.
///
/// # Source
/// Nguyen and Salazar 2019, "Transformers without Tears".
fn small_init(hidden_size: usize) -> f64 {
    ((0.4 / hidden_size as f64).sqrt() * 1e4).round() / 1e4
}

fn class(architecture: &str) -> &'static str {
    match architecture {
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        "gemma3_text" => "Gemma3ForCausalLM",
        "phi3" => "Phi3ForCausalLM",
        "smollm3" => "SmolLM3ForCausalLM",
        "stablelm" => "StableLmForCausalLM",
        "olmo2" => "Olmo2ForCausalLM",
        "gpt_neox" => "GPTNeoXForCausalLM",
        "mixtral" => "MixtralForCausalLM",
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        _ => "LlamaForCausalLM",
    }
}

/// What an architecture needs beside the shape, where its own defaults do not fit a small model.
fn extras(architecture: &str, p: &Preset) -> Vec<(&'static str, Value)> {
    let head_dim = p.hidden_size / p.num_attention_heads;
    match architecture {
        "mistral" => vec![("sliding_window", Value::Null)],
        "qwen3" => vec![("head_dim", json!(head_dim))],
        "gemma2" | "gemma3_text" => vec![
            ("head_dim", json!(head_dim)),
            ("query_pre_attn_scalar", json!(head_dim)),
            ("hidden_activation", json!("gelu_pytorch_tanh")),
            ("sliding_window", json!(p.max_position_embeddings / 2)),
            ("tie_word_embeddings", json!(true)),
        ],
        "phi3" => vec![("pad_token_id", json!(0)), ("sliding_window", Value::Null)],
        "stablelm" => vec![
            ("layer_norm_eps", json!(1e-5)),
            ("partial_rotary_factor", json!(0.25)),
        ],
        "gpt_neox" => vec![
            ("layer_norm_eps", json!(1e-5)),
            ("rotary_pct", json!(0.25)),
            ("hidden_act", json!("gelu")),
            ("num_key_value_heads", json!(p.num_attention_heads)),
        ],
        "mixtral" => vec![
            ("num_local_experts", json!(4)),
            ("num_experts_per_tok", json!(2)),
            ("sliding_window", Value::Null),
            ("output_router_logits", json!(true)),
            ("router_aux_loss_coef", json!(0.01)),
        ],
        "qwen3_moe" => vec![
            ("head_dim", json!(head_dim)),
            ("num_experts", json!(8)),
            ("num_experts_per_tok", json!(2)),
            ("moe_intermediate_size", json!(p.intermediate_size / 4)),
            ("norm_topk_prob", json!(true)),
            ("decoder_sparse_step", json!(1)),
            ("mlp_only_layers", json!([])),
            ("output_router_logits", json!(true)),
        ],
        _ => Vec::new(),
    }
}
