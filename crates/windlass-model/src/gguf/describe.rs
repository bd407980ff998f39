//! From a configuration to the metadata of a GGUF file, as llama.cpp's loader asks for them, and the last touches of a
//! `config.json` made of such metadata.
//!
//! An architecture of GGUF files has fewer settings than a `config.json`: what it fixes is checked here, and a model
//! that differs is refused, since it would compute something else there.

use super::{Architecture, ROPE_FACTORS, architecture_of, query_width};
use crate::config::ModelError;
use crate::families::{DecoderConfig, Norm, Placement};
use crate::rope::Scaling;
use serde_json::{Value, json};
use windlass_tensor::Activation;

/// A value of metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Key {
    /// A count or a width.
    Count(usize),
    /// A number.
    Number(f64),
    /// A name.
    Text(&'static str),
    /// A choice.
    Flag(bool),
}

/// What a GGUF file says of a model beside its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// `general.architecture`.
    pub architecture: &'static str,
    /// Keys with the architecture before them, and their values.
    pub keys: Vec<(String, Key)>,
    /// Tensors that are settings: a name and elements.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
    /// Whether the output matrix is written although it is the embeddings'.
    pub own_output: bool,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// The metadata of a model.
///
/// # Errors
/// A setting that the architecture of GGUF files has no place for, by its key in `config.json`.
pub fn metadata(config: &DecoderConfig) -> Result<Description, ModelError> {
    let arch = architecture_of(config);
    check(config, arch)?;
    let mut out = Writer {
        config,
        arch: arch.name,
        keys: Vec::new(),
        tensors: Vec::new(),
        notes: Vec::new(),
    };
    out.sizes();
    out.windows()?;
    out.rotation()?;
    Ok(Description {
        architecture: arch.name,
        keys: out.keys,
        tensors: out.tensors,
        own_output: config.tie_word_embeddings && needs_output(arch.name),
        notes: out.notes,
    })
}

/// Architectures whose loader asks for an output matrix.
fn needs_output(arch: &str) -> bool {
    ["stablelm", "olmo2", "gptneox"].contains(&arch)
}

fn refuse(key: &str, message: impl Into<String>) -> ModelError {
    ModelError::Key {
        file: "config.json".into(),
        key: key.into(),
        message: message.into(),
        hint: "GGUF files of this architecture have no place for it: keep the Hugging Face folder"
            .into(),
    }
}

/// Refuses what the architecture fixes otherwise.
fn check(c: &DecoderConfig, arch: &Architecture) -> Result<(), ModelError> {
    let name = arch.name;
    let gemma = name.starts_with("gemma");
    let activation = match name {
        "gemma2" | "gemma3" | "gpt2" => Activation::GeluTanh,
        "gptneox" => Activation::Gelu,
        _ => Activation::Silu,
    };
    let (heads, layers) = (c.num_attention_heads, c.layers.len());
    let width = query_width(name, layers, c.hidden_size, heads, c.head_dim);
    let full_width = ["qwen2", "phi3", "olmo2", "stablelm", "gpt2", "gptneox"].contains(&name);
    let rotates = |i: usize| match name {
        "smollm3" => !(i + 1).is_multiple_of(4),
        _ => !c.learned_positions,
    };
    let no_output_bias = !["llama", "smollm3", "gpt2", "gptneox"].contains(&name);
    let normalized = c.experts.as_ref().is_none_or(|e| e.norm_topk_prob);
    let all_experts = c.layers.iter().all(|l| l.experts == c.experts.is_some());
    let caps = (c.attn_logit_softcapping, c.final_logit_softcapping);
    let (attention_cap, final_cap) = (caps.0.is_some(), caps.1.is_some());
    let faults = [
        (c.activation != activation, "hidden_act", "is another"),
        (
            c.attention_scale != (width as f32).powf(-0.5),
            "query_pre_attn_scalar",
            "is not the width of a head",
        ),
        (
            ["gemma2", "bitnet"].contains(&name) && !c.tie_word_embeddings,
            "tie_word_embeddings",
            "is false",
        ),
        (
            attention_cap != (name == "gemma2"),
            "attn_logit_softcapping",
            "is set where Gemma 2 alone has it, or missing there",
        ),
        (
            name == "gemma2" && !final_cap || final_cap && !gemma,
            "final_logit_softcapping",
            "is set where Gemma alone has it, or missing in Gemma 2",
        ),
        (!normalized, "norm_topk_prob", "is false"),
        (
            !all_experts,
            "mlp_only_layers",
            "leaves layers without experts (or decoder_sparse_step does)",
        ),
        (
            (0..layers).any(|i| c.layers[i].rope.is_some() != rotates(i)),
            "no_rope_layers",
            "is not every fourth layer",
        ),
        (c.o_bias && no_output_bias, "attention_bias", "is true"),
        (
            name == "gptneox" && !c.qkv_bias,
            "attention_bias",
            "is false",
        ),
        (
            full_width && heads * c.head_dim != c.hidden_size,
            "head_dim",
            "is not hidden_size / num_attention_heads",
        ),
    ];
    match faults.iter().find(|(fault, ..)| *fault) {
        Some((_, key, message)) => Err(refuse(key, *message)),
        None => Ok(()),
    }
}

struct Writer<'a> {
    config: &'a DecoderConfig,
    arch: &'static str,
    keys: Vec<(String, Key)>,
    tensors: Vec<(&'static str, Vec<f32>)>,
    notes: Vec<String>,
}

impl Writer<'_> {
    fn put(&mut self, name: &str, value: Key) {
        self.keys.push((format!("{}.{name}", self.arch), value));
    }

    fn count(&mut self, name: &str, value: usize) {
        self.put(name, Key::Count(value));
    }

    fn sizes(&mut self) {
        let c = self.config;
        self.count("vocab_size", c.vocab_size);
        self.count("block_count", c.layers.len());
        self.count("embedding_length", c.hidden_size);
        self.count("feed_forward_length", c.intermediate_size);
        self.count("attention.head_count", c.num_attention_heads);
        self.count("attention.head_count_kv", c.num_key_value_heads);
        self.count("attention.key_length", c.head_dim);
        self.count("attention.value_length", c.head_dim);
        let epsilon = match c.norm {
            Norm::Rms { .. } => "attention.layer_norm_rms_epsilon",
            Norm::Layer { .. } => "attention.layer_norm_epsilon",
        };
        self.put(epsilon, Key::Number(f64::from(c.norm_eps)));
        if ["gptneox", "stablelm"].contains(&self.arch) {
            let parallel = [Placement::Parallel, Placement::ParallelShared];
            let parallel = parallel.contains(&c.placement);
            self.put("use_parallel_residual", Key::Flag(parallel));
        }
        for (name, cap) in [
            ("attn_logit_softcapping", c.attn_logit_softcapping),
            ("final_logit_softcapping", c.final_logit_softcapping),
        ] {
            if let Some(cap) = cap {
                self.put(name, Key::Number(f64::from(cap)));
            }
        }
        if let Some(experts) = &c.experts {
            self.count("expert_count", experts.num_experts);
            self.count("expert_used_count", experts.num_experts_per_tok);
            if self.arch != "llama" {
                self.count("expert_feed_forward_length", experts.intermediate_size);
            }
        }
    }

    /// The context, and the layers that see a window of it.
    fn windows(&mut self) -> Result<(), ModelError> {
        let (c, context) = (self.config, self.config.max_position_embeddings);
        let widths: Vec<Option<usize>> = c.layers.iter().map(|layer| layer.window).collect();
        let smallest = widths.iter().flatten().min().copied();
        let cuts = smallest.is_some_and(|window| window < context);
        match self.arch {
            "gemma2" | "gemma3" => {
                self.count("context_length", context);
                self.count("attention.sliding_window", smallest.unwrap_or(context));
                let usual = if self.arch == "gemma2" { 2 } else { 6 };
                let fits = |period: usize| {
                    let mut layers = widths.iter().enumerate();
                    layers.all(|(i, window)| window.is_some() == (i % period + 1 < period))
                };
                if cuts && !fits(usual) {
                    let period = (1..=widths.len() + 1).find(|&period| fits(period));
                    let period =
                        period.ok_or_else(|| refuse("layer_types", "follows no period"))?;
                    self.count("attention.sliding_window_pattern", period);
                }
            }
            "phi3" => {
                self.count("context_length", context);
                if let Some(window) = smallest {
                    self.count("attention.sliding_window", window);
                }
            }
            _ if cuts => {
                // Within the first window all layers see everything: the model is exact there, and nowhere else.
                let window = smallest.expect("it cuts");
                self.count("context_length", window);
                self.notes.push(format!(
                    "the context is written as {window} instead of {context} tokens: beyond, the model sees a \
                     sliding window, which {} in GGUF files has not",
                    self.arch
                ));
            }
            _ => self.count("context_length", context),
        }
        Ok(())
    }

    fn rotation(&mut self) -> Result<(), ModelError> {
        let ropes = &self.config.ropes;
        let Some(rope) = ropes.first() else {
            return Ok(());
        };
        self.count("rope.dimension_count", rope.rotary());
        self.put("rope.freq_base", Key::Number(rope.theta()));
        if let Some(local) = ropes.get(1) {
            self.put("rope.freq_base_swa", Key::Number(local.theta()));
            if local.scaling() != Scaling::Plain {
                return Err(refuse("rope_parameters", "scales the rotation of windows"));
            }
        }
        let kind = |out: &mut Self, kind| out.put("rope.scaling.type", Key::Text(kind));
        let own = |names: &[&str], out: &Self, what: &str| match names.contains(&out.arch) {
            true => Ok(()),
            false => Err(refuse("rope_scaling", format!("is {what}"))),
        };
        match rope.scaling() {
            Scaling::Plain => {}
            Scaling::Linear { factor } => {
                kind(self, "linear");
                self.put("rope.scaling.factor", Key::Number(factor));
            }
            Scaling::Llama3 => {
                own(&["llama"], self, "llama3")?;
                self.tensors.push((ROPE_FACTORS[0], rope.divisors(false)));
            }
            Scaling::Yarn {
                factor,
                original,
                beta_fast,
                beta_slow,
                truncate,
            } => {
                let usual = if factor > 1.0 {
                    0.1 * factor.ln() + 1.0
                } else {
                    1.0
                };
                if !truncate || (rope.scale() - usual).abs() > 1e-6 {
                    return Err(refuse(
                        "rope_scaling",
                        "has truncate, mscale or attention_factor",
                    ));
                }
                kind(self, "yarn");
                self.put("rope.scaling.factor", Key::Number(factor));
                self.count("rope.scaling.original_context_length", original as usize);
                self.put("rope.scaling.yarn_beta_fast", Key::Number(beta_fast));
                self.put("rope.scaling.yarn_beta_slow", Key::Number(beta_slow));
            }
            Scaling::Long { original } => {
                own(&["llama", "phi3"], self, "longrope")?;
                kind(self, "longrope");
                self.count("rope.scaling.original_context_length", original);
                self.put("rope.scaling.attn_factor", Key::Number(rope.scale()));
                self.tensors.push((ROPE_FACTORS[1], rope.divisors(false)));
                self.tensors.push((ROPE_FACTORS[2], rope.divisors(true)));
            }
        }
        Ok(())
    }
}

/// `model_type` and the class of transformers that computes it.
const CLASSES: [(&str, &str); 14] = [
    ("llama", "LlamaForCausalLM"),
    ("mixtral", "MixtralForCausalLM"),
    ("smollm3", "SmolLM3ForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3_text", "Gemma3ForCausalLM"),
    ("stablelm", "StableLmForCausalLM"),
    ("olmo2", "Olmo2ForCausalLM"),
    ("bitnet", "BitNetForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt_neox", "GPTNeoXForCausalLM"),
];

/// Keys that only some model types have.
const RARE: [(&str, &[&str]); 9] = [
    ("use_qkv_bias", &["stablelm"]),
    ("qk_layernorm", &["stablelm"]),
    ("use_parallel_residual", &["stablelm", "gpt_neox"]),
    ("layer_norm_eps", &["stablelm", "gpt_neox"]),
    ("rotary_pct", &["gpt_neox"]),
    ("rotary_emb_base", &["gpt_neox"]),
    ("mlp_bias", &["llama", "smollm3"]),
    ("num_local_experts", &["mixtral"]),
    ("num_experts", &["qwen3_moe"]),
];

/// GPT-2's own names.
const GPT2: [(&str, &str); 5] = [
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
    ("max_position_embeddings", "n_positions"),
    ("intermediate_size", "n_inner"),
];

/// A `config.json` of [`config_json`](super::config_json) as transformers has it: with the class, and without the keys of
/// other models.
pub fn folder_config(mut config: Value) -> Value {
    let kind = config["model_type"].as_str().unwrap_or("").to_owned();
    let Some(map) = config.as_object_mut() else {
        return config;
    };
    map.retain(|key, value| {
        let rare = RARE.iter().find(|(name, _)| name == key);
        !value.is_null() && rare.is_none_or(|(_, kinds)| kinds.contains(&kind.as_str()))
    });
    if kind == "gpt2" {
        for (ours, theirs) in GPT2 {
            if let Some(value) = map.remove(ours) {
                map.insert(theirs.into(), value);
            }
        }
    }
    if let Some((_, class)) = CLASSES.iter().find(|(name, _)| *name == kind) {
        map.insert("architectures".into(), json!([class]));
    }
    if kind == "phi3"
        && let Some(original) = map
            .get("rope_scaling")
            .map(|s| s["original_max_position_embeddings"].clone())
    {
        map.insert("original_max_position_embeddings".into(), original);
    }
    config
}
