//! What GGUF files call the settings and tensors that a Hugging Face folder has: a `config.json` made of metadata,
//! metadata made of a configuration, and the place of every parameter.
//!
//! This module reads no files: it is given metadata as JSON and asked about names.

mod describe;

pub use describe::{Description, Key, folder_config, metadata};

use crate::config::{Fields, ModelError, nearest};
use crate::families::{DecoderConfig, Norm, Placement};
use crate::rope::Rope;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// An architecture as files name it, and how its tensors differ.
struct Architecture {
    /// `general.architecture`.
    name: &'static str,
    /// `model_type` of a `config.json`.
    model_type: &'static str,
    /// Whether rows of queries and keys are in the order of a rotation of neighbors.
    rotated: bool,
    /// Whether queries, keys and values are one tensor.
    fused_qkv: bool,
    /// Whether gate and up are one tensor, named after the latter.
    fused_up: bool,
}

const fn plain(name: &'static str, model_type: &'static str) -> Architecture {
    Architecture {
        name,
        model_type,
        rotated: false,
        fused_qkv: false,
        fused_up: false,
    }
}

const fn rotated(name: &'static str, model_type: &'static str) -> Architecture {
    Architecture {
        rotated: true,
        ..plain(name, model_type)
    }
}

const fn fused(name: &'static str, model_type: &'static str, fused_up: bool) -> Architecture {
    Architecture {
        fused_qkv: true,
        fused_up,
        ..plain(name, model_type)
    }
}

const ARCHITECTURES: &[Architecture] = &[
    rotated("llama", "llama"),
    rotated("smollm3", "smollm3"),
    plain("qwen2", "qwen2"),
    plain("qwen3", "qwen3"),
    plain("qwen3moe", "qwen3_moe"),
    plain("gemma2", "gemma2"),
    plain("gemma3", "gemma3_text"),
    plain("stablelm", "stablelm"),
    plain("olmo2", "olmo2"),
    plain("bitnet", "bitnet"),
    fused("phi3", "phi3", true),
    fused("gpt2", "gpt2", false),
    fused("gptneox", "gpt_neox", false),
];

fn architecture(f: &Fields<'_>, file: &str) -> Result<&'static Architecture, ModelError> {
    let name = f.text("general.architecture")?.ok_or_else(|| {
        let hint = "every model in a GGUF file has it; this may be a vocabulary or an adapter";
        f.error("general.architecture", "is missing", hint)
    })?;
    let names = || ARCHITECTURES.iter().map(|a| a.name);
    ARCHITECTURES
        .iter()
        .find(|a| a.name == name)
        .ok_or_else(|| ModelError::Architecture {
            file: file.into(),
            nearest: nearest(&name, names()).unwrap_or_default().into(),
            known: names().collect(),
            name,
        })
}

/// The `config.json` that says what a GGUF file's metadata say.
///
/// `shape` gives the shape of a tensor of the file, outermost dimension first, and `numbers` the elements of one: those
/// of [`ROPE_FACTORS`] are asked for.
///
/// # Errors
/// An unknown architecture; a key that is missing or has a wrong type or value: all name the file and the key.
pub fn config_json(
    file: &str,
    metadata: &Value,
    shape: &dyn Fn(&str) -> Option<Vec<usize>>,
    numbers: &dyn Fn(&str) -> Option<Vec<f32>>,
) -> Result<Value, ModelError> {
    let f = Fields::root(file, metadata)?;
    let arch = architecture(&f, file)?;
    let mut config = sizes(&f, arch.name)?;
    let mut put = |name: &str, value: Value| drop(config.insert(name.into(), value));
    let experts = f
        .int(&format!("{}.expert_count", arch.name))?
        .filter(|&n| n > 0);
    let model_type = match (arch.name, experts) {
        ("llama", Some(_)) => "mixtral",
        _ => arch.model_type,
    };
    put("model_type", model_type.into());
    if arch.name == "bitnet" {
        // Where a `config.json` says nothing, it means another one.
        put("hidden_act", "silu".into());
    }
    if let Some(count) = experts {
        put("num_local_experts", count.into());
        put("num_experts", count.into());
        put("norm_topk_prob", true.into());
    }
    let vocabulary = shape("token_embd.weight").and_then(|shape| shape.first().copied());
    put("vocab_size", vocabulary.map_or(Value::Null, Value::from));
    // What files do not say, their tensors do.
    let has = |name: &str| shape(name).is_some();
    let bias = |name: &str| has(&format!("blk.0.{name}.bias"));
    put("tie_word_embeddings", (!has("output.weight")).into());
    put(
        "attention_bias",
        (bias("attn_q") || bias("attn_qkv")).into(),
    );
    put("use_qkv_bias", bias("attn_q").into());
    put("mlp_bias", bias("ffn_down").into());
    put("qk_layernorm", has("blk.0.attn_q_norm.weight").into());
    let parallel = f.flag(&format!("{}.use_parallel_residual", arch.name))?;
    let parallel = parallel.unwrap_or(!has("blk.0.ffn_norm.weight"));
    put("use_parallel_residual", parallel.into());
    if let Some(scaling) = scaling(&f, arch.name, numbers)? {
        put("rope_scaling", scaling);
    }
    let layers = f.need_int(&format!("{}.block_count", arch.name))?;
    let period = f.int(&format!("{}.attention.sliding_window_pattern", arch.name))?;
    if let Some(period) = period.filter(|_| arch.name.starts_with("gemma")) {
        let slides = |layer: usize| period == 0 || layer % period + 1 < period;
        let kind = |layer| match slides(layer) {
            true => "sliding_attention",
            false => "full_attention",
        };
        put("layer_types", (0..layers).map(kind).collect());
    }
    Ok(Value::Object(config))
}

/// Keys with a number, and what a `config.json` calls it.
const NUMBERS: [(&str, &[&str]); 12] = [
    ("attention.head_count_kv", &["num_key_value_heads"]),
    ("feed_forward_length", &["intermediate_size"]),
    ("attention.layer_norm_rms_epsilon", &["rms_norm_eps"]),
    (
        "attention.layer_norm_epsilon",
        &["layer_norm_eps", "layer_norm_epsilon"],
    ),
    ("rope.freq_base", &["rope_theta", "rotary_emb_base"]),
    ("rope.local.freq_base", &["rope_local_base_freq"]),
    ("rope.freq_base_swa", &["rope_local_base_freq"]),
    ("attn_logit_softcapping", &["attn_logit_softcapping"]),
    ("final_logit_softcapping", &["final_logit_softcapping"]),
    ("attention.sliding_window", &["sliding_window"]),
    ("expert_used_count", &["num_experts_per_tok"]),
    ("expert_feed_forward_length", &["moe_intermediate_size"]),
];

/// Widths, counts and other numbers.
fn sizes(f: &Fields<'_>, arch: &str) -> Result<Map<String, Value>, ModelError> {
    let key = |name: &str| format!("{arch}.{name}");
    let mut config = Map::new();
    let mut put = |name: &str, value: Value| drop(config.insert(name.into(), value));
    let hidden = f.need_int(&key("embedding_length"))?;
    let heads = f.need_int(&key("attention.head_count"))?;
    put("hidden_size", hidden.into());
    put("num_hidden_layers", f.need_int(&key("block_count"))?.into());
    put("num_attention_heads", heads.into());
    put(
        "max_position_embeddings",
        f.need_int(&key("context_length"))?.into(),
    );
    let head_dim = f
        .int(&key("attention.key_length"))?
        .unwrap_or(hidden / heads);
    put("head_dim", head_dim.into());
    let values = key("attention.value_length");
    if let Some(width) = f.int(&values)?.filter(|&v| v != head_dim) {
        let message = format!("{width} where keys have {head_dim}");
        return Err(f.error(&values, message, "values as wide as keys are supported"));
    }
    for (name, ours) in NUMBERS {
        if let Some(value) = f.number(&key(name))? {
            ours.iter().for_each(|ours| put(ours, number(value)));
        }
    }
    if let Some(rotary) = f
        .int(&key("rope.dimension_count"))?
        .filter(|&r| r != head_dim)
    {
        let fraction = rotary as f64 / head_dim as f64;
        put("partial_rotary_factor", fraction.into());
        put("rotary_pct", fraction.into());
    }
    if arch.starts_with("gemma") {
        put(
            "query_pre_attn_scalar",
            query_scale(arch, f, hidden, heads, head_dim)?,
        );
    }
    Ok(config)
}

/// A whole number as one, so that integers are read as such.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 9e15 {
        true => (value as i64).into(),
        false => value.into(),
    }
}

/// Gemma's scale of scores is not in files.
fn query_scale(
    arch: &str,
    f: &Fields<'_>,
    hidden: usize,
    heads: usize,
    head_dim: usize,
) -> Result<Value, ModelError> {
    let layers = f.need_int(&format!("{arch}.block_count"))?;
    Ok(query_width(arch, layers, hidden, heads, head_dim).into())
}

/// The number whose root divides Gemma's scores: the width of a head, but for the largest model.
fn query_width(arch: &str, layers: usize, hidden: usize, heads: usize, head_dim: usize) -> usize {
    /// Layers of Gemma 2 27B and Gemma 3 27B.
    const LARGEST: [(&str, usize); 2] = [("gemma2", 46), ("gemma3", 62)];
    match LARGEST.contains(&(arch, layers)) {
        true => hidden / heads,
        false => head_dim,
    }
}

/// Tensors with what each frequency of the rotation is divided by: for all texts, for short and for long ones.
pub const ROPE_FACTORS: [&str; 3] = [
    "rope_freqs.weight",
    "rope_factors_short.weight",
    "rope_factors_long.weight",
];

/// The `rope_scaling` object, where there is a scaling.
fn scaling(
    f: &Fields<'_>,
    arch: &str,
    numbers: &dyn Fn(&str) -> Option<Vec<f32>>,
) -> Result<Option<Value>, ModelError> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let original = f.int(&key("original_context_length"))?;
    let context = f.need_int(&format!("{arch}.context_length"))?;
    let long = |short: Vec<f32>, long: Vec<f32>, factor: f64| {
        json!({
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": factor,
            "original_max_position_embeddings": original.unwrap_or(context),
        })
    };
    let [all, short_factors, long_factors] = ROPE_FACTORS.map(numbers);
    if let (Some(short), Some(far)) = (short_factors, long_factors) {
        let factor = f.number(&key("attn_factor"))?.unwrap_or(1.0);
        return Ok(Some(long(short, far, factor)));
    }
    let theta = f.number(&format!("{arch}.rope.freq_base"))?;
    if let Some(scaling) = all.as_deref().and_then(|factors| llama3(factors, theta)) {
        return Ok(Some(scaling));
    }
    if let Some(factors) = all {
        // Divisors of the frequencies, whatever made them.
        return Ok(Some(long(factors.clone(), factors, 1.0)));
    }
    let factor = f.number(&key("factor"))?.unwrap_or(1.0);
    match f.text(&key("type"))?.as_deref() {
        None | Some("none") => Ok(None),
        Some("linear") if factor == 1.0 => Ok(None),
        Some("linear") => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
        Some("yarn") => Ok(Some(json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": f.number(&key("yarn_beta_fast"))?,
            "beta_slow": f.number(&key("yarn_beta_slow"))?,
        }))),
        Some(other) => {
            let hint = "known scalings: none, linear, yarn, and the factors of rope_freqs.weight or rope_factors_*.weight";
            Err(f.unsupported(&key("type"), other, hint))
        }
    }
}

/// The scaling of Llama 3, if these divisors are its.
fn llama3(factors: &[f32], theta: Option<f64>) -> Option<Value> {
    let largest = factors.iter().copied().fold(0.0, f32::max);
    let scaling = json!({
        "rope_type": "llama3",
        "factor": f64::from(largest.round()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let fields = Fields::root("", &scaling).ok()?;
    let theta = theta.unwrap_or(10_000.0);
    let rope = Rope::new(2 * factors.len(), theta, Some(&fields), &fields).ok()?;
    let expected = rope.divisors(false);
    let mut pairs = expected.iter().zip(factors);
    pairs
        .all(|(expected, factor)| (expected - factor).abs() <= 1e-4 * factor.abs())
        .then_some(scaling)
}

/// Where a file keeps a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// Name of the tensor.
    pub tensor: String,
    /// Its rows, when it holds other parameters too. A stack of matrices counts the rows of all of them.
    pub rows: Option<Range<usize>>,
    /// Heads whose rows are in the order of a rotation of neighbors: row `h, 2 i + s` of the file is row `h, s, i` of the
    /// parameter.
    pub rotated_heads: Option<usize>,
    /// What the file has added to every element.
    pub offset: f32,
}

impl Place {
    /// The row of the file that holds row `row` of a parameter of `rows` rows.
    pub fn row(&self, row: usize, rows: usize) -> usize {
        let row = match self.rotated_heads {
            None => row,
            Some(heads) => {
                let dim = rows / heads;
                let (head, at) = (row / dim, row % dim);
                let (half, i) = (at / (dim / 2), at % (dim / 2));
                head * dim + 2 * i + half
            }
        };
        row + self.rows.as_ref().map_or(0, |rows| rows.start)
    }
}

/// The architecture of a configuration: a Llama's where its own has no name in GGUF files.
fn architecture_of(config: &DecoderConfig) -> &'static Architecture {
    let own = ARCHITECTURES
        .iter()
        .find(|a| a.model_type == config.model_type);
    own.unwrap_or(&ARCHITECTURES[0])
}

/// Where a GGUF file of the configuration's model keeps the parameter of a name and its number of rows.
///
/// # Panics
/// On a name that no decoder declares.
pub fn place(config: &DecoderConfig, name: &str, rows: usize) -> Place {
    let arch = architecture_of(config);
    let (kv, hd) = (config.num_key_value_heads, config.head_dim);
    let q_rows = config.num_attention_heads * hd;
    let mut place = Place {
        tensor: String::new(),
        rows: None,
        rotated_heads: None,
        offset: 0.0,
    };
    let (inside, kind) = name
        .rsplit_once('.')
        .expect("a parameter's name has a kind");
    place.offset = norm_offset(config, inside);
    let Some(rest) = inside.strip_prefix("model.layers.") else {
        place.tensor = format!("{}.{kind}", outside_layers(inside));
        return place;
    };
    let (layer, inside) = rest.split_once('.').expect("a layer's parameter");
    let tensor = match inside {
        "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" if arch.fused_qkv => {
            let start = match inside {
                "self_attn.q_proj" => 0,
                "self_attn.k_proj" => q_rows,
                _ => q_rows + kv * hd,
            };
            place.rows = Some(start..start + rows);
            "attn_qkv"
        }
        "self_attn.q_proj" => {
            place.rotated_heads = arch.rotated.then_some(config.num_attention_heads);
            "attn_q"
        }
        "self_attn.k_proj" => {
            place.rotated_heads = arch.rotated.then_some(kv);
            "attn_k"
        }
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "self_attn.attn_sub_norm" => "attn_sub_norm",
        "mlp.ffn_sub_norm" => "ffn_sub_norm",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => match config.placement {
            Placement::Sandwich | Placement::Post => "post_attention_norm",
            _ => "ffn_norm",
        },
        "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" | "mlp.up_proj" if arch.fused_up => {
            let start = if inside == "mlp.up_proj" { rows } else { 0 };
            place.rows = Some(start..start + rows);
            "ffn_up"
        }
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" => "ffn_gate_inp",
        other => one_of_many(other, rows, &mut place),
    };
    place.tensor = format!("blk.{layer}.{tensor}.{kind}");
    place
}

fn outside_layers(inside: &str) -> &'static str {
    match inside {
        "model.embed_tokens" => "token_embd",
        "model.embed_positions" => "position_embd",
        "model.norm" => "output_norm",
        "lm_head" => "output",
        other => panic!("a decoder has no parameter {other}"),
    }
}

/// Parameters that files stack: experts, and norms with a weight for each head.
fn one_of_many(inside: &str, rows: usize, place: &mut Place) -> &'static str {
    let (stack, number) = if let Some(rest) = inside.strip_prefix("mlp.experts.") {
        let (number, name) = rest.split_once('.').expect("an expert's parameter");
        let stack = match name {
            "gate_proj" => "ffn_gate_exps",
            "up_proj" => "ffn_up_exps",
            _ => "ffn_down_exps",
        };
        (stack, number)
    } else if let Some(number) = inside.strip_prefix("self_attn.q_layernorm.norms.") {
        ("attn_q_norm", number)
    } else if let Some(number) = inside.strip_prefix("self_attn.k_layernorm.norms.") {
        ("attn_k_norm", number)
    } else {
        panic!("a decoder's layer has no parameter {inside}");
    };
    let number: usize = number.parse().expect("a number");
    place.rows = Some(number * rows..(number + 1) * rows);
    stack
}

/// Files hold the weights of Gemma's norms as they multiply; we hold them less 1.
fn norm_offset(config: &DecoderConfig, inside: &str) -> f32 {
    match config.norm {
        Norm::Rms { offset } if inside.ends_with("norm") => offset,
        _ => 0.0,
    }
}
