//! What several architectures share: a Llama of the file's sizes to start from, rotations, windows, activations.

use super::options::{DecoderConfig, LayerOptions, Norm, Placement, QkNorm};
use crate::config::{Fields, ModelError};
use crate::names::Naming;
use crate::rope::Rope;
use serde_json::Value;
use std::sync::Arc;
use windlass_tensor::Activation;

/// A Llama with the sizes of the file: what the families start from.
pub(super) fn base(model_type: &'static str, f: &Fields<'_>) -> Result<DecoderConfig, ModelError> {
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
    let head_dim = head_dim(f, hidden_size, heads)?;
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
        sub_norms: false,
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

/// `head_dim`, or what is left of `hidden_size` for each head.
fn head_dim(f: &Fields<'_>, hidden_size: usize, heads: usize) -> Result<usize, ModelError> {
    match f.int("head_dim")?.filter(|&d| d > 0) {
        Some(d) => Ok(d),
        None if hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => {
            let message = format!("hidden_size {hidden_size} is not a multiple of it");
            Err(f.error(
                "num_attention_heads",
                message,
                "give head_dim if heads have another width",
            ))
        }
    }
}

/// The activation that `key` names.
pub(super) fn activation(
    f: &Fields<'_>,
    key: &str,
    default: &str,
) -> Result<Activation, ModelError> {
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
pub(super) fn rope(
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
pub(super) fn windows(
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
