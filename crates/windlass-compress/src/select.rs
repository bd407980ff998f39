//! Which tensor gets which block type.
//!
//! The choices are those of llama.cpp, so that a file of a name means the same everywhere: they are the outcome of its
//! authors' measurements of perplexity. Tensors are told apart by their names in GGUF files.
//!
//! # Source
//! `src/llama-quant.cpp` of llama.cpp.

use windlass_store::gguf::{self, Metadata, TensorInfo};
use windlass_tensor::kernels::blocks::BlockType;

use crate::error::Result;
use crate::file_type::FileType;
use crate::quantize::Options;

/// What becomes of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// The tensor as it is.
    pub info: TensorInfo,
    /// The type it gets; its own if it is kept.
    pub target: BlockType,
    /// The type that was meant, where rows are no whole blocks of it.
    pub instead_of: Option<BlockType>,
}

/// What a tensor does in its model, as far as bits depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Embedding,
    Output,
    Query,
    Key,
    /// Values, alone or fused with queries and keys.
    Value {
        fused: bool,
    },
    AttentionOutput,
    Down,
    Other,
}

impl Role {
    fn of(name: &str) -> Role {
        match name {
            "output.weight" => return Role::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => return Role::Embedding,
            _ => {}
        }
        let parts = [
            ("attn_qkv.weight", Role::Value { fused: true }),
            ("attn_kv_b.weight", Role::Value { fused: false }),
            ("attn_v.weight", Role::Value { fused: false }),
            ("attn_k.weight", Role::Key),
            ("attn_q.weight", Role::Query),
            ("attn_output.weight", Role::AttentionOutput),
            ("ffn_down", Role::Down),
        ];
        let found = parts.iter().find(|(part, _)| name.contains(part));
        found.map_or(Role::Other, |(_, role)| *role)
    }
}

/// Parts of names whose tensors are small or sensitive and stay as they are.
const KEPT: [&str; 32] = [
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];
/// As [`KEPT`], at the beginning of a name or as all of it.
const KEPT_BEGINNINGS: [&str; 5] = [
    "position_embd.weight",
    "token_types.weight",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
];

/// Whether a tensor is a matrix of weights that may lose bits.
fn is_quantized(info: &TensorInfo, leave_output: bool) -> bool {
    let name = &info.name;
    let dims = info.shape.iter().skip_while(|d| **d == 1).count();
    dims >= 2
        && name.ends_with("weight")
        && !KEPT.iter().any(|part| name.contains(part))
        && !KEPT_BEGINNINGS.iter().any(|part| name.starts_with(part))
        && !(leave_output && name == "output.weight")
}

/// What the choice depends on besides the tensor.
struct Model {
    falcon: bool,
    layers: usize,
    experts: usize,
    /// Query heads that share a key head.
    group: usize,
    /// The largest Llama and Qwen 2, whose values are small beside their queries.
    seventy_billion: bool,
    values: usize,
    tied: bool,
    importance: bool,
}

impl Model {
    fn of(metadata: &Metadata, tensors: &[TensorInfo], importance: bool) -> Result<Self> {
        let architecture = metadata.get_str("general.architecture")?.unwrap_or("");
        let key = |name: &str| format!("{architecture}.{name}");
        let count = |name: &str| first(metadata, &key(name));
        let layers = count("block_count")?.unwrap_or(0);
        let heads = count("attention.head_count")?.unwrap_or(1);
        let key_heads = count("attention.head_count_kv")?.unwrap_or(heads);
        let group = heads.checked_div(key_heads).unwrap_or(0);
        let roles = || tensors.iter().map(|info| Role::of(&info.name));
        Ok(Model {
            falcon: architecture == "falcon",
            layers,
            experts: count("expert_count")?.unwrap_or(0),
            group,
            seventy_billion: layers == 80
                && (architecture == "llama" && group != 1 || architecture == "qwen2"),
            values: roles()
                .filter(|role| matches!(role, Role::Value { .. }))
                .count(),
            tied: !roles().any(|role| role == Role::Output),
            importance,
        })
    }
}

/// An integer, or the first of an array that has one for each layer.
fn first(metadata: &Metadata, key: &str) -> Result<Option<usize>> {
    if let Ok(values) = metadata.get::<Vec<usize>>(key) {
        return Ok(values.and_then(|values| values.first().copied()));
    }
    Ok(metadata.get::<usize>(key)?)
}

/// The type of every tensor, in the order of the file.
///
/// # Errors
/// [`crate::Error::Store`] if metadata that the choice depends on is of another kind.
pub fn plan(file: &gguf::File, options: &Options) -> Result<Vec<Planned>> {
    let tensors: Vec<TensorInfo> = file.tensors().cloned().collect();
    plan_tensors(file.metadata(), &tensors, options)
}

/// As [`plan`], for a file that is not there yet.
///
/// # Errors
/// Those of [`plan`].
pub fn plan_tensors(
    metadata: &Metadata,
    tensors: &[TensorInfo],
    options: &Options,
) -> Result<Vec<Planned>> {
    let model = Model::of(metadata, tensors, options.importance.is_some())?;
    let mut planned: Vec<Planned> = tensors
        .iter()
        .map(|info| Planned {
            info: info.clone(),
            target: info.block_type,
            instead_of: None,
        })
        .collect();
    // Layers are counted in their order, whatever the order of the file.
    let mut order: Vec<usize> = (0..planned.len()).collect();
    order.sort_by_key(|&i| {
        (
            layer_of(&planned[i].info.name),
            planned[i].info.name.clone(),
        )
    });
    let (mut values, mut downs) = (0, 0);
    for i in order {
        let Planned { info, .. } = &planned[i];
        if !is_quantized(info, options.leave_output) {
            continue;
        }
        let role = Role::of(&info.name);
        let chosen = choose(&model, options, info, role, (&mut values, &mut downs));
        let possible = fallback(chosen, info.row_len());
        planned[i].target = possible;
        planned[i].instead_of = (possible != chosen).then_some(chosen);
    }
    Ok(planned)
}

/// The layer of `blk.7.…`; none comes first.
fn layer_of(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("blk.")?.split_once('.')?;
    number.parse().ok()
}

/// What users ask for, then the mix.
fn choose(
    model: &Model,
    options: &Options,
    info: &TensorInfo,
    role: Role,
    (values, downs): (&mut usize, &mut usize),
) -> BlockType {
    match (role, options.embedding_type, options.output_type) {
        (Role::Embedding, Some(asked), _) | (Role::Output, _, Some(asked)) => return asked,
        _ => {}
    }
    let base = options.file_type.base();
    if base.elements() == 1 {
        return base;
    }
    let mut asked = options.overrides.iter();
    if let Some((_, asked)) = asked.find(|(pattern, _)| pattern.is_match(&info.name)) {
        return *asked;
    }
    if options.pure {
        return base;
    }
    if role == Role::Output || role == Role::Embedding && model.tied {
        let asked = options.output_type;
        return asked.unwrap_or_else(|| output(model, options.file_type, info));
    }
    if options.file_type == FileType::MXFP4_MOE {
        let experts = info.shape.len() > 2 && info.shape[info.shape.len() - 3] > 1;
        return if experts { base } else { BlockType::Q8_0 };
    }
    match role {
        Role::Value { .. } => {
            *values += 1;
            value(model, options.file_type, *values - 1)
        }
        Role::Down => {
            *downs += 1;
            let layer = match model.experts {
                0 | 1 => *downs - 1,
                _ => layer_of(&info.name).unwrap_or(0),
            };
            down(model, options.file_type, layer)
        }
        _ => other(model, options.file_type, role),
    }
}

/// The first and last eighth of the layers, and every third between them.
fn has_more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

fn output(model: &Model, file_type: FileType, info: &TensorInfo) -> BlockType {
    let base = file_type.base();
    let fits = info.row_len().is_multiple_of(base.elements());
    if file_type == FileType::MXFP4_MOE || model.falcon || !fits || base == BlockType::Q8_0 {
        BlockType::Q8_0
    } else {
        BlockType::Q6_K
    }
}

fn value(model: &Model, file_type: FileType, i: usize) -> BlockType {
    use BlockType::{Q3_K, Q4_K, Q5_K, Q6_K, Q8_0};
    let many = model.group >= 4;
    let chosen = match file_type {
        FileType::Q2_K if many => Q4_K,
        FileType::Q2_K => Q3_K,
        FileType::Q2_K_S if many => Q4_K,
        FileType::Q3_K_M if i < 2 => Q5_K,
        FileType::Q3_K_M => Q4_K,
        FileType::Q3_K_L => Q5_K,
        FileType::IQ4_NL | FileType::IQ4_XS if many => Q5_K,
        FileType::Q4_K_M | FileType::Q5_K_M if has_more_bits(i, model.values) => Q6_K,
        FileType::Q4_K_S if i < 4 => Q5_K,
        _ => file_type.base(),
    };
    match chosen {
        _ if model.experts == 8 => Q8_0,
        Q3_K | Q4_K if model.seventy_billion => Q5_K,
        _ => chosen,
    }
}

fn down(model: &Model, file_type: FileType, layer: usize) -> BlockType {
    use BlockType::{Q3_K, Q4_1, Q4_K, Q5_1, Q5_K, Q6_K};
    let early = layer < model.layers / 8;
    let very_early = layer < model.layers / 16;
    let more = has_more_bits(layer, model.layers);
    match file_type {
        FileType::Q2_K => Q3_K,
        FileType::Q2_K_S if early => Q4_K,
        FileType::Q3_K_M if very_early => Q5_K,
        FileType::Q3_K_M if !model.falcon || more => Q4_K,
        FileType::Q3_K_L if model.falcon => Q4_K,
        FileType::Q3_K_L => Q5_K,
        FileType::Q4_K_M if model.falcon && very_early => Q6_K,
        FileType::Q4_K_M if model.falcon && more => Q5_K,
        FileType::Q4_K_M if !model.falcon && more => Q6_K,
        FileType::IQ4_NL | FileType::IQ4_XS if early && !model.importance => Q5_K,
        FileType::Q5_K_M if more => Q6_K,
        FileType::Q4_K_S if early && !model.falcon => Q5_K,
        // With importances the plain types go wrong in the first of these now and then.
        FileType::Q4_0 if early && model.importance => Q4_1,
        FileType::Q5_0 if early && model.importance => Q5_1,
        _ => file_type.base(),
    }
}

fn other(model: &Model, file_type: FileType, role: Role) -> BlockType {
    use BlockType::{Q3_K, Q4_K, Q5_K, Q8_0};
    let base = file_type.base();
    match (role, file_type) {
        (Role::Embedding, FileType::TQ1_0 | FileType::TQ2_0 | FileType::Q2_0) => Q4_K,
        (Role::Key, _) if model.experts == 8 => Q8_0,
        (Role::AttentionOutput, FileType::Q3_K_L) if model.falcon => Q4_K,
        (Role::AttentionOutput, _) if model.falcon => base,
        (Role::AttentionOutput, _) if model.experts == 8 => match file_type {
            FileType::Q2_K
            | FileType::Q3_K_S
            | FileType::Q3_K_M
            | FileType::IQ4_NL
            | FileType::Q4_K_S
            | FileType::Q4_K_M
            | FileType::IQ4_XS => Q5_K,
            _ => base,
        },
        (Role::AttentionOutput, FileType::Q2_K) => Q3_K,
        (Role::AttentionOutput, FileType::Q3_K_M) => Q4_K,
        (Role::AttentionOutput, FileType::Q3_K_L) => Q5_K,
        _ => base,
    }
}

/// The type itself, or one of shorter blocks where rows are no whole blocks.
fn fallback(target: BlockType, row_len: usize) -> BlockType {
    use BlockType::*;
    let fits = |kind: BlockType| row_len.is_multiple_of(kind.elements());
    if fits(target) {
        return target;
    }
    let shorter = match target {
        IQ4_XS => IQ4_NL,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        _ => Q4_0,
    };
    if fits(shorter) { shorter } else { F16 }
}
