//! The known architectures: a row each, from `config.json` to decoder options.

use crate::config::{Fields, ModelError, nearest};
use crate::names::Naming;
use crate::rope::Rope;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use windlass_tensor::Activation;

/// Which norm, with its epsilon.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Root mean square; the weight is `offset + w`.
    Rms {
        /// 1 in Gemma.
        offset: f32,
    },
    /// Layer norm, with or without a bias.
    Layer {
        /// Whether there is a bias.
        bias: bool,
    },
}

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// `x + attention(norm x)`, then `x + mlp(norm x)`.
    Pre,
    /// `x + norm(attention x)`, then `x + norm(mlp x)` (OLMo 2).
    Post,
    /// `x + norm(attention(norm x))`, then the same for the MLP (Gemma).
    Sandwich,
    /// `x + attention(norm x) + mlp(norm' x)` (GPT-NeoX).
    Parallel,
    /// `x + attention(norm x) + mlp(norm x)` with one norm (StableLM 2).
    ParallelShared,
}

/// Norms of queries and keys before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    Without,
    /// Over each head.
    Head,
    /// Over all heads together.
    Full,
    /// Layer norm without bias over each head, with weights of the head's own (StableLM 2 12B).
    EachHead,
}

/// What differs from layer to layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerOptions {
    /// Tokens that attention sees, the token itself included; all when `None`.
    pub window: Option<usize>,
    /// Index into [`DecoderConfig::ropes`]; no rotation when `None`.
    pub rope: Option<usize>,
    /// Whether the MLP is a mixture of experts.
    pub experts: bool,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// Number of experts.
    pub num_experts: usize,
    /// Experts of a token.
    pub num_experts_per_tok: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Coefficient of the load-balancing loss, 0 when it is not part of the loss.
    pub router_aux_loss_coef: f64,
}

/// Everything that decides what a decoder computes.
#[derive(Clone)]
#[expect(
    missing_docs,
    reason = "fields named as in config.json are defined there"
)]
pub struct DecoderConfig {
    /// `model_type`.
    pub model_type: &'static str,
    /// How files name and lay out the parameters.
    pub naming: Naming,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub norm: Norm,
    pub norm_eps: f32,
    pub placement: Placement,
    pub activation: Activation,
    /// Whether the MLP has a gate.
    pub gated: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: QkNorm,
    /// Factor of the scores before the softmax.
    pub attention_scale: f32,
    pub attn_logit_softcapping: Option<f32>,
    pub final_logit_softcapping: Option<f32>,
    pub ropes: Vec<Arc<Rope>>,
    /// One entry a layer.
    pub layers: Vec<LayerOptions>,
    /// Whether positions are an embedding of their own.
    pub learned_positions: bool,
    /// Factor of the token embeddings.
    pub embedding_scale: f32,
    pub tie_word_embeddings: bool,
    pub experts: Option<Experts>,
    /// Standard deviation of matrices before training.
    pub initializer_range: f32,
    /// Standard deviation of matrices that write to the residual stream.
    pub residual_init_std: f32,
    /// Settings that are read and not applied, for the user to know.
    pub notes: Vec<String>,
    /// The file as it was read.
    pub json: Value,
}

type Row = (
    &'static str,
    fn(&Fields<'_>, &mut DecoderConfig) -> Result<(), ModelError>,
);

/// `model_type` and what it changes on a Llama.
const FAMILIES: &[Row] = &[
    ("llama", llama),
    ("mistral", mistral),
    ("qwen2", qwen2),
    ("qwen3", qwen3),
    ("gemma2", gemma2),
    ("gemma3_text", gemma3),
    ("phi3", phi3),
    ("smollm3", smollm3),
    ("stablelm", stablelm),
    ("olmo2", olmo2),
    ("gpt2", gpt2),
    ("gpt_neox", gpt_neox),
    ("mixtral", mixtral),
    ("qwen3_moe", qwen3_moe),
];

/// The known values of `model_type`.
pub fn known_architectures() -> Vec<&'static str> {
    FAMILIES.iter().map(|(name, _)| *name).collect()
}

impl DecoderConfig {
    /// Reads the `config.json` of a model folder.
    ///
    /// # Errors
    /// When the file cannot be read or says something that is not understood.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let file = path.display().to_string();
        let text = std::fs::read_to_string(&path).map_err(|e| ModelError::Json {
            file: file.clone(),
            message: format!("cannot be read: {e}"),
        })?;
        Self::from_json(&file, &text)
    }

    /// Parses the text of a `config.json`; `file` is for messages.
    ///
    /// # Errors
    /// Malformed JSON, an unknown architecture, missing or contradicting keys, unsupported options.
    pub fn from_json(file: &str, text: &str) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text).map_err(|e| ModelError::Json {
            file: file.into(),
            message: e.to_string(),
        })?;
        let fields = Fields::root(file, &json)?;
        let name = fields.text("model_type")?.ok_or_else(|| {
            fields.error(
                "model_type",
                "is missing",
                format!("known: {}", known_architectures().join(", ")),
            )
        })?;
        let known = FAMILIES.iter().find(|(family, _)| *family == name);
        let Some((model_type, adapt)) = known else {
            return Err(ModelError::Architecture {
                file: file.into(),
                nearest: nearest(&name, known_architectures())
                    .unwrap_or_default()
                    .into(),
                name,
                known: known_architectures(),
            });
        };
        let mut config = base(model_type, &fields)?;
        adapt(&fields, &mut config)?;
        config.check(&fields)?;
        config.json = json;
        Ok(config)
    }

    /// Number of layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    fn check(&mut self, f: &Fields<'_>) -> Result<(), ModelError> {
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            let message = format!(
                "{} heads are not a multiple of it",
                self.num_attention_heads
            );
            return Err(f.error(
                "num_key_value_heads",
                message,
                "each key head serves the same number of query heads",
            ));
        }
        if f.has("quantization_config") {
            let hint = "load the unquantized model, or quantize it while loading with --load-in";
            return Err(f.error(
                "quantization_config",
                "quantized checkpoints cannot be loaded",
                hint,
            ));
        }
        for key in [
            "attention_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "hidden_dropout",
            "resid_dropout",
        ] {
            if f.number(key)?.is_some_and(|p| p != 0.0) {
                self.notes.push(format!(
                    "{key} is not applied: this engine trains without dropout"
                ));
            }
        }
        if self.layers.is_empty() || self.layers.len() > 10_000 {
            return Err(f.error(
                "num_hidden_layers",
                format!("is {}", self.layers.len()),
                "it must be 1 to 10000",
            ));
        }
        Ok(())
    }
}

/// A Llama with the sizes of the file: what the families start from.
fn base(model_type: &'static str, f: &Fields<'_>) -> Result<DecoderConfig, ModelError> {
    let gpt2 = model_type == "gpt2";
    let key =
        |modern: &'static str, old: &'static str| if gpt2 && f.has(old) { old } else { modern };
    let hidden_size = f.need_int(key("hidden_size", "n_embd"))?;
    let heads = f.need_int(key("num_attention_heads", "n_head"))?;
    let layers = f.need_int(key("num_hidden_layers", "n_layer"))?;
    if layers > 10_000 {
        return Err(f.error(
            "num_hidden_layers",
            format!("is {layers}"),
            "it must be 1 to 10000",
        ));
    }
    let head_dim = match f.int("head_dim")?.filter(|&d| d > 0) {
        Some(d) => d,
        None if hidden_size % heads == 0 => hidden_size / heads,
        None => {
            let message = format!("hidden_size {hidden_size} is not a multiple of it");
            return Err(f.error(
                "num_attention_heads",
                message,
                "give head_dim if heads have another width",
            ));
        }
    };
    let initializer_range = f.number("initializer_range")?.unwrap_or(0.02) as f32;
    let intermediate_size = match f.int(key("intermediate_size", "n_inner"))? {
        Some(n) => n,
        None if gpt2 => 4 * hidden_size,
        None => f.need_int("intermediate_size")?,
    };
    Ok(DecoderConfig {
        model_type,
        naming: Naming::Llama,
        vocab_size: f.need_int("vocab_size")?,
        hidden_size,
        intermediate_size,
        num_attention_heads: heads,
        num_key_value_heads: f
            .int("num_key_value_heads")?
            .filter(|&n| n > 0)
            .unwrap_or(heads),
        head_dim,
        max_position_embeddings: f
            .int(key("max_position_embeddings", "n_positions"))?
            .unwrap_or(2048),
        norm: Norm::Rms { offset: 0.0 },
        norm_eps: f.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        placement: Placement::Pre,
        activation: activation(f, "hidden_act", "silu")?,
        gated: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: QkNorm::Without,
        attention_scale: (head_dim as f32).powf(-0.5),
        attn_logit_softcapping: None,
        final_logit_softcapping: None,
        ropes: Vec::new(),
        layers: vec![
            LayerOptions {
                window: None,
                rope: None,
                experts: false
            };
            layers
        ],
        learned_positions: false,
        embedding_scale: 1.0,
        tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(false),
        experts: None,
        initializer_range,
        residual_init_std: initializer_range,
        notes: Vec::new(),
        json: Value::Null,
    })
}

fn activation(f: &Fields<'_>, key: &str, default: &str) -> Result<Activation, ModelError> {
    let name = f.text(key)?.unwrap_or(default.into());
    Ok(match name.as_str() {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        "relu" => Activation::Relu,
        other => {
            return Err(f.unsupported(
                key,
                other,
                "known: silu, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu",
            ));
        }
    })
}

/// Adds a rotary embedding to all layers. `kind` selects one of several (`rope_parameters.full_attention`).
fn rope(
    f: &Fields<'_>,
    c: &mut DecoderConfig,
    kind: Option<&'static str>,
    theta: f64,
    fraction: f64,
) -> Result<(), ModelError> {
    let mut parameters = f.object("rope_parameters")?;
    if let (Some(p), Some(kind)) = (&parameters, kind)
        && let Some(own) = p.object(kind)?
    {
        parameters = Some(own);
    }
    let scaling = match parameters {
        Some(p) => Some(p),
        None if kind == Some("sliding_attention") => None,
        None => f.object("rope_scaling")?,
    };
    let own = |key: &str| -> Result<Option<f64>, ModelError> {
        match &scaling {
            Some(s) => s.number(key),
            None => Ok(None),
        }
    };
    let theta = own("rope_theta")?
        .or(f.number("rope_theta")?.filter(|_| kind.is_none()))
        .unwrap_or(theta);
    let fraction = own("partial_rotary_factor")?
        .or(f.number("partial_rotary_factor")?)
        .unwrap_or(fraction);
    if !(theta > 0.0 && (0.0..=1.0).contains(&fraction)) {
        let message =
            format!("theta {theta} and partial rotary factor {fraction} make no rotation");
        return Err(f.error(
            "rope_parameters",
            message,
            "theta is positive, the factor between 0 and 1",
        ));
    }
    let rotary = (c.head_dim as f64 * fraction) as usize / 2 * 2;
    c.ropes
        .push(Arc::new(Rope::new(rotary, theta, scaling.as_ref(), f)?));
    let index = c.ropes.len() - 1;
    c.layers
        .iter_mut()
        .for_each(|layer| layer.rope = Some(index));
    Ok(())
}

/// Windows by `layer_types` when the file has it, else by `default(layer)`.
fn windows(
    f: &Fields<'_>,
    c: &mut DecoderConfig,
    default: impl Fn(usize) -> bool,
) -> Result<(), ModelError> {
    let Some(window) = f.int("sliding_window")?.filter(|&w| w > 0) else {
        return Ok(());
    };
    let types = f.list("layer_types", |v| v.as_str().map(String::from))?;
    if let Some(types) = &types {
        if types.len() != c.layers.len() {
            let message = format!("{} entries for {} layers", types.len(), c.layers.len());
            return Err(f.error("layer_types", message, "one entry a layer"));
        }
        if let Some(other) = types
            .iter()
            .find(|t| !["full_attention", "sliding_attention"].contains(&t.as_str()))
        {
            return Err(f.unsupported(
                "layer_types",
                other,
                "known: full_attention, sliding_attention",
            ));
        }
    }
    for (i, layer) in c.layers.iter_mut().enumerate() {
        let slides = types
            .as_ref()
            .map_or_else(|| default(i), |t| t[i] == "sliding_attention");
        layer.window = slides.then_some(window);
    }
    Ok(())
}

fn llama(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    c.mlp_bias = f.flag("mlp_bias")?.unwrap_or(false);
    rope(f, c, None, 10_000.0, 1.0)
}

fn mistral(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    windows(f, c, |_| true)?;
    rope(f, c, None, 10_000.0, 1.0)
}

fn qwen2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.qkv_bias = true;
    qwen_windows(f, c)?;
    rope(f, c, None, 10_000.0, 1.0)
}

fn qwen_windows(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    if f.flag("use_sliding_window")?.unwrap_or(false) {
        let first = f.int("max_window_layers")?.unwrap_or(28);
        windows(f, c, |i| i >= first)?;
    }
    Ok(())
}

fn qwen3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias, c.qk_norm) = (bias, bias, QkNorm::Head);
    if !f.has("head_dim") {
        set_head_dim(c, 128);
    }
    qwen_windows(f, c)?;
    rope(f, c, None, 10_000.0, 1.0)
}

fn set_head_dim(c: &mut DecoderConfig, head_dim: usize) {
    (c.head_dim, c.attention_scale) = (head_dim, (head_dim as f32).powf(-0.5));
}

fn gemma(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.norm = Norm::Rms { offset: 1.0 };
    c.placement = Placement::Sandwich;
    c.activation = activation(
        f,
        if f.has("hidden_activation") {
            "hidden_activation"
        } else {
            "hidden_act"
        },
        "gelu_pytorch_tanh",
    )?;
    c.tie_word_embeddings = f.flag("tie_word_embeddings")?.unwrap_or(true);
    c.embedding_scale = (c.hidden_size as f32).sqrt();
    c.attention_scale = f
        .number("query_pre_attn_scalar")?
        .unwrap_or(256.0)
        .powf(-0.5) as f32;
    c.attn_logit_softcapping = f.number("attn_logit_softcapping")?.map(|x| x as f32);
    c.final_logit_softcapping = f.number("final_logit_softcapping")?.map(|x| x as f32);
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    if f.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(f.unsupported(
            "use_bidirectional_attention",
            "true",
            "only causal decoders are supported",
        ));
    }
    Ok(())
}

fn gemma2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    gemma(f, c)?;
    windows(f, c, |i| i % 2 == 0)?;
    rope(f, c, None, 10_000.0, 1.0)
}

fn gemma3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    gemma(f, c)?;
    c.qk_norm = QkNorm::Head;
    let pattern = f
        .int("sliding_window_pattern")?
        .filter(|&p| p > 0)
        .unwrap_or(6);
    windows(f, c, |i| (i + 1) % pattern != 0)?;
    let (global, local) = (
        f.number("rope_theta")?.unwrap_or(1e6),
        f.number("rope_local_base_freq")?.unwrap_or(1e4),
    );
    rope(f, c, Some("full_attention"), global, 1.0)?;
    rope(f, c, Some("sliding_attention"), local, 1.0)?;
    c.layers
        .iter_mut()
        .for_each(|layer| layer.rope = Some(usize::from(layer.window.is_some())));
    Ok(())
}

fn phi3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.naming = Naming::Phi3;
    windows(f, c, |_| true)?;
    rope(f, c, None, 10_000.0, 1.0)
}

fn smollm3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    llama(f, c)?;
    if f.flag("use_sliding_window")?.unwrap_or(false) {
        windows(f, c, |_| false)?;
    }
    let interval = f
        .int("no_rope_layer_interval")?
        .filter(|&n| n > 0)
        .unwrap_or(4);
    let uses = f.list("no_rope_layers", |v| v.as_u64().map(|n| n != 0))?;
    for (i, layer) in c.layers.iter_mut().enumerate() {
        if !uses.as_ref().map_or((i + 1) % interval != 0, |u| {
            u.get(i).copied().unwrap_or(true)
        }) {
            layer.rope = None;
        }
    }
    Ok(())
}

fn stablelm(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.norm = Norm::Layer { bias: true };
    c.norm_eps = f.number("layer_norm_eps")?.unwrap_or(1e-5) as f32;
    c.qkv_bias = f.flag("use_qkv_bias")?.unwrap_or(false);
    if f.flag("use_parallel_residual")?.unwrap_or(false) {
        c.placement = Placement::ParallelShared;
    }
    if f.flag("qk_layernorm")?.unwrap_or(false) {
        c.qk_norm = QkNorm::EachHead;
    }
    rope(f, c, None, 10_000.0, 0.25)
}

fn olmo2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    (c.placement, c.qk_norm) = (Placement::Post, QkNorm::Full);
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    rope(f, c, None, 10_000.0, 1.0)
}

fn gpt2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.naming = Naming::Gpt2;
    c.norm = Norm::Layer { bias: true };
    c.norm_eps = f.number("layer_norm_epsilon")?.unwrap_or(1e-5) as f32;
    c.activation = activation(f, "activation_function", "gelu_new")?;
    (c.gated, c.learned_positions) = (false, true);
    (c.qkv_bias, c.o_bias, c.mlp_bias) = (true, true, true);
    c.tie_word_embeddings = f.flag("tie_word_embeddings")?.unwrap_or(true);
    c.residual_init_std = c.initializer_range / ((2 * c.layers.len()) as f32).sqrt();
    for (key, plain) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ] {
        if f.flag(key)?.is_some_and(|v| v != plain) {
            return Err(f.unsupported(
                key,
                &(!plain).to_string(),
                "only the usual GPT-2 attention is supported",
            ));
        }
    }
    Ok(())
}

fn gpt_neox(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.naming = Naming::NeoX {
        heads: c.num_attention_heads,
    };
    c.norm = Norm::Layer { bias: true };
    c.norm_eps = f.number("layer_norm_eps")?.unwrap_or(1e-5) as f32;
    c.activation = activation(f, "hidden_act", "gelu")?;
    c.gated = false;
    let bias = f.flag("attention_bias")?.unwrap_or(true);
    (c.qkv_bias, c.o_bias, c.mlp_bias) = (bias, bias, true);
    if f.flag("use_parallel_residual")?.unwrap_or(true) {
        c.placement = Placement::Parallel;
    }
    let theta = f.number("rotary_emb_base")?.unwrap_or(10_000.0);
    rope(f, c, None, theta, f.number("rotary_pct")?.unwrap_or(0.25))
}

fn experts(
    f: &Fields<'_>,
    count: &str,
    width: &str,
    normalize: bool,
) -> Result<Experts, ModelError> {
    let (num_experts, k) = (f.need_int(count)?, f.need_int("num_experts_per_tok")?);
    if k > num_experts {
        let message = format!("{k} of {num_experts} experts");
        return Err(f.error(
            "num_experts_per_tok",
            message,
            "a token cannot go to more experts than there are",
        ));
    }
    let counted = f.flag("output_router_logits")?.unwrap_or(false);
    let coefficient = f.number("router_aux_loss_coef")?.unwrap_or(0.001);
    Ok(Experts {
        num_experts,
        num_experts_per_tok: k,
        intermediate_size: f.need_int(width)?,
        norm_topk_prob: normalize,
        router_aux_loss_coef: if counted { coefficient } else { 0.0 },
    })
}

fn mixtral(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    mistral(f, c)?;
    c.naming = Naming::Mixtral;
    c.experts = Some(experts(f, "num_local_experts", "intermediate_size", true)?);
    c.layers.iter_mut().for_each(|layer| layer.experts = true);
    Ok(())
}

fn qwen3_moe(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    qwen3(f, c)?;
    let normalize = f.flag("norm_topk_prob")?.unwrap_or(false);
    let count = if f.has("num_experts") {
        "num_experts"
    } else {
        "num_local_experts"
    };
    c.experts = Some(experts(f, count, "moe_intermediate_size", normalize)?);
    let step = f
        .int("decoder_sparse_step")?
        .filter(|&s| s > 0)
        .unwrap_or(1);
    let dense = f
        .list("mlp_only_layers", |v| v.as_u64().map(|n| n as usize))?
        .unwrap_or_default();
    for (i, layer) in c.layers.iter_mut().enumerate() {
        layer.experts = !dense.contains(&i) && (i + 1) % step == 0;
    }
    Ok(())
}
