//! What a `config.json` decides, as the decoder understands it: the options and nothing that reads them.

use crate::names::Naming;
use crate::rope::Rope;
use serde_json::Value;
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
    /// Whether the inputs of the last product of attention and of the MLP have norms of their own (BitNet).
    pub sub_norms: bool,
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
