//! One function for each architecture: what it changes on the Llama of [`base`](super::base::base).

use super::base::{activation, rope, windows};
use super::options::{DecoderConfig, Experts, Norm, Placement, QkNorm};
use crate::config::{Fields, ModelError};
use crate::names::Naming;

pub(super) fn llama(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    c.mlp_bias = f.flag("mlp_bias")?.unwrap_or(false);
    rope(f, c, None, 10_000.0, 1.0)
}

pub(super) fn bitnet(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.sub_norms = true;
    // What transformers takes where nothing is said, and what is refused by name.
    c.activation = activation(f, "hidden_act", "relu2")?;
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    rope(f, c, None, 500_000.0, 1.0)
}

pub(super) fn mistral(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    windows(f, c, |_| true)?;
    rope(f, c, None, 10_000.0, 1.0)
}

pub(super) fn qwen2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn qwen3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn gemma2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    gemma(f, c)?;
    windows(f, c, |i| i % 2 == 0)?;
    rope(f, c, None, 10_000.0, 1.0)
}

pub(super) fn gemma3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn phi3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    c.naming = Naming::Phi3;
    windows(f, c, |_| true)?;
    rope(f, c, None, 10_000.0, 1.0)
}

pub(super) fn smollm3(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn stablelm(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn olmo2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    (c.placement, c.qk_norm) = (Placement::Post, QkNorm::Full);
    let bias = f.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.o_bias) = (bias, bias);
    rope(f, c, None, 10_000.0, 1.0)
}

pub(super) fn gpt2(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn gpt_neox(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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

pub(super) fn mixtral(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
    mistral(f, c)?;
    c.naming = Naming::Mixtral;
    c.experts = Some(experts(f, "num_local_experts", "intermediate_size", true)?);
    c.layers.iter_mut().for_each(|layer| layer.experts = true);
    Ok(())
}

pub(super) fn qwen3_moe(f: &Fields<'_>, c: &mut DecoderConfig) -> Result<(), ModelError> {
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
