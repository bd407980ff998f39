//! The two files of a llama2.c model: weights (`stories15M.bin`) and vocabulary (`tokenizer.bin`).
//!
//! They are read into the names, orientation and rotary layout of a Hugging Face Llama, so that nothing else needs to
//! know the format. The export versions 0 (no magic number) and 1, both `f32`, are read; version 2 (`int8`) is refused.
//!
//! # Source
//! `export.py` and `run.c` of <https://github.com/karpathy/llama2.c>.

mod tokenizer;

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::atomic::{Disk, write_atomic};
use crate::error::{Error, Result};
use crate::mmap::Mapped;
use crate::safetensors::{Dtype, Options, Spec, read_values, write_folder};

pub use tokenizer::Tokenizer;

/// First four bytes of versions 1 and later.
const MAGIC: u32 = 0x616b_3432;
/// Where the weights of version 1 start.
const HEADER_BYTES_V1: usize = 256;
/// Where those of version 0 start: after seven `i32`.
const HEADER_BYTES_V0: usize = 28;

/// The dimensions of a llama2.c model, in the words of `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads.
    pub num_key_value_heads: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Longest context the model was trained for.
    pub max_position_embeddings: usize,
    /// Whether the embedding is also the output layer.
    pub tie_word_embeddings: bool,
}

impl Config {
    /// The model's `config.json`. What the file does not say is as `run.c` has it: theta 10,000, epsilon 1e-5, BOS 1,
    /// EOS 2.
    pub fn to_json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim(),
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": false,
            "mlp_bias": false,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        })
    }

    fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    /// From the seven numbers of the header; `tied` overrides the sign of the vocabulary size, which says it in
    /// version 0.
    fn parse(fields: [i32; 7], tied: Option<bool>) -> Result<Self, String> {
        let [dim, ffn, layers, heads, kv_heads, vocab, positions] = fields;
        let tie_word_embeddings = tied.unwrap_or(vocab > 0);
        let size = |name: &str, value: i32| match usize::try_from(value) {
            Ok(size) if size > 0 => Ok(size),
            _ => Err(format!("{name} is {value}; this is no llama2.c model")),
        };
        let config = Config {
            hidden_size: size("dim", dim)?,
            intermediate_size: size("hidden_dim", ffn)?,
            num_hidden_layers: size("n_layers", layers)?,
            num_attention_heads: size("n_heads", heads)?,
            num_key_value_heads: size("n_kv_heads", kv_heads)?,
            vocab_size: size("vocab_size", vocab.saturating_abs())?,
            max_position_embeddings: size("seq_len", positions)?,
            tie_word_embeddings,
        };
        let (d, h, kv) = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        );
        if d % h != 0 || (d / h) % 2 != 0 || h % kv != 0 {
            let problem = "; this is no llama2.c model";
            return Err(format!(
                "dim {d}, n_heads {h} and n_kv_heads {kv} do not fit together{problem}"
            ));
        }
        Ok(config)
    }
}

/// One kind of tensor in the file: there once, or for every layer in a row.
struct Part {
    /// Full name, or the name within `model.layers.N.`; empty for the rotary tables, which are recomputed.
    name: &'static str,
    shape: Vec<usize>,
    per_layer: bool,
    /// Number of heads whose rows are in the order of rotated pairs.
    rotary_heads: Option<usize>,
}

/// The parts of a file in their order.
fn parts(config: &Config, version: u32) -> Vec<Part> {
    let (d, ffn) = (config.hidden_size, config.intermediate_size);
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let kv = config.head_dim() * kv_heads;
    let once = |name, shape: &[usize]| Part {
        name,
        shape: shape.to_vec(),
        per_layer: false,
        rotary_heads: None,
    };
    let each = |name, shape: &[usize]| Part {
        per_layer: true,
        ..once(name, shape)
    };
    let rotary = |name, shape: &[usize], heads| Part {
        rotary_heads: Some(heads),
        ..each(name, shape)
    };

    let embedding = once("model.embed_tokens.weight", &[config.vocab_size, d]);
    let attention_norm = each("input_layernorm.weight", &[d]);
    let ffn_norm = each("post_attention_layernorm.weight", &[d]);
    let final_norm = once("model.norm.weight", &[d]);
    let attention = [
        rotary("self_attn.q_proj.weight", &[d, d], heads),
        rotary("self_attn.k_proj.weight", &[kv, d], kv_heads),
        each("self_attn.v_proj.weight", &[kv, d]),
        each("self_attn.o_proj.weight", &[d, d]),
    ];
    let mlp = [
        each("mlp.gate_proj.weight", &[ffn, d]),
        each("mlp.down_proj.weight", &[d, ffn]),
        each("mlp.up_proj.weight", &[ffn, d]),
    ];
    let mut parts: Vec<Part> = match version {
        0 => {
            // Cosines and sines.
            let tables = once(
                "",
                &[2, config.max_position_embeddings, config.head_dim() / 2],
            );
            let front = [embedding, attention_norm]
                .into_iter()
                .chain(attention)
                .chain([ffn_norm]);
            front.chain(mlp).chain([final_norm, tables]).collect()
        }
        _ => [attention_norm, ffn_norm, final_norm, embedding]
            .into_iter()
            .chain(attention)
            .chain(mlp)
            .collect(),
    };
    if !config.tie_word_embeddings {
        parts.push(once("lm_head.weight", &[config.vocab_size, d]));
    }
    parts
}

/// A weights file.
#[derive(Debug)]
pub struct Model {
    file: Mapped,
    config: Config,
    specs: Vec<Spec>,
    sources: Vec<Source>,
}

/// Where a tensor lies, and how its rows are ordered there.
#[derive(Debug)]
struct Source {
    bytes: Range<usize>,
    rotary_heads: Option<usize>,
}

impl Model {
    /// Opens a weights file of version 0 or 1.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if the header is no llama2.c header or the length does not follow from it;
    /// [`Error::Unsupported`] for later versions.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        let bytes = file.bytes();
        let corrupt = |problem: String| Error::corrupt(path, problem);
        let word = |i: usize| {
            bytes
                .get(i * 4..i * 4 + 4)
                .and_then(|b| b.try_into().ok())
                .map(i32::from_le_bytes)
        };
        let words = |first: usize| -> Result<[i32; 7]> {
            let words: Option<Vec<i32>> = (first..first + 7).map(word).collect();
            let words = words.and_then(|w| w.try_into().ok());
            words.ok_or_else(|| {
                corrupt(format!(
                    "{} bytes are too few for a llama2.c header",
                    bytes.len()
                ))
            })
        };
        let is_v0 = word(0).map(i32::cast_unsigned) != Some(MAGIC);
        let (config, version, start) = if is_v0 {
            (Config::parse(words(0)?, None), 0, HEADER_BYTES_V0)
        } else if word(1) == Some(1) {
            let tied = bytes.get(36).map(|&shared| shared != 0);
            (Config::parse(words(2)?, tied), 1, HEADER_BYTES_V1)
        } else {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                problem: format!("llama2.c export version {}", word(1).unwrap_or(0)),
                hint: "export the model again with `export.py --version 1`".to_owned(),
            });
        };
        let config = config.map_err(corrupt)?;
        let (specs, sources) = place(&config, version, start, bytes.len()).map_err(corrupt)?;
        Ok(Model {
            config,
            specs,
            sources,
            file,
        })
    }

    /// The dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors under their Hugging Face names, in the file's order, `F32`.
    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// The elements of `specs()[i]`. Query and key rows are brought from rotated pairs (2j, 2j+1) to the layout of
    /// halves, (j, j + head_dim/2), that Hugging Face's rotary embedding works on.
    ///
    /// # Panics
    /// If there is no such tensor.
    #[track_caller]
    pub fn read(&self, i: usize) -> Vec<f32> {
        let (spec, source) = (&self.specs[i], &self.sources[i]);
        let mut stored = vec![0f32; spec.shape.iter().product()];
        read_values(
            Dtype::F32,
            &self.file.bytes()[source.bytes.clone()],
            &mut stored,
        );
        let Some(heads) = source.rotary_heads else {
            return stored;
        };
        let width = spec.shape[1];
        let half = spec.shape[0] / heads / 2;
        let mut halves = Vec::with_capacity(stored.len());
        for head in stored.chunks_exact(2 * half * width) {
            for odd in 0..2 {
                for pair in head.chunks_exact(2 * width) {
                    halves.extend_from_slice(&pair[odd * width..(odd + 1) * width]);
                }
            }
        }
        halves
    }
}

/// Lays the parts over the file; all sizes are checked before any is believed.
fn place(
    config: &Config,
    version: u32,
    start: usize,
    file_len: usize,
) -> Result<(Vec<Spec>, Vec<Source>), String> {
    let parts = parts(config, version);
    let layers = config.num_hidden_layers;
    let end = parts.iter().try_fold(start, |end, part| {
        let copies = if part.per_layer { layers } else { 1 };
        let bytes = part
            .shape
            .iter()
            .try_fold(4 * copies, |product, &n| usize::checked_mul(product, n));
        end.checked_add(bytes?)
    });
    if end != Some(file_len) {
        let expected = end.map_or("more than fits an address".to_owned(), |end| {
            end.to_string()
        });
        return Err(format!(
            "{file_len} bytes, but its header asks for {expected}; cut short, or no llama2.c model"
        ));
    }
    let (mut specs, mut sources, mut offset) = (Vec::new(), Vec::new(), start);
    for part in parts {
        for layer in 0..if part.per_layer { layers } else { 1 } {
            let name = if part.per_layer {
                format!("model.layers.{layer}.{}", part.name)
            } else {
                part.name.to_owned()
            };
            let spec = Spec::new(name, Dtype::F32, part.shape.clone());
            let bytes = offset..offset + spec.bytes();
            offset = bytes.end;
            if !spec.name.is_empty() {
                specs.push(spec);
                sources.push(Source {
                    bytes,
                    rotary_heads: part.rotary_heads,
                });
            }
        }
    }
    Ok((specs, sources))
}

/// Writes a Hugging Face folder: `config.json`, weights, `tokenizer.json` and `tokenizer_config.json`.
///
/// # Errors
/// As [`Model::open`] and [`Tokenizer::open`]; [`Error::Corrupt`] if the two files are not of one model; [`Error::Io`].
pub fn convert(disk: &dyn Disk, model: &Path, tokenizer: &Path, folder: &Path) -> Result<()> {
    let weights = Model::open(model)?;
    let vocabulary = Tokenizer::open(tokenizer)?;
    let (has, needs) = (vocabulary.len(), weights.config.vocab_size);
    if has != needs {
        let problem = format!(
            "{has} tokens, but {} has a vocabulary of {needs}",
            model.display()
        );
        return Err(Error::corrupt(tokenizer, problem));
    }
    let files = [
        ("config.json", weights.config.to_json()),
        ("tokenizer.json", vocabulary.to_json()),
        ("tokenizer_config.json", vocabulary.to_config_json()),
    ];
    write_folder(
        disk,
        folder,
        weights.specs(),
        &Options::default(),
        |i, out| out.values(&weights.read(i)),
    )?;
    for (name, content) in files {
        write_atomic(
            disk,
            &folder.join(name),
            format!("{content:#}\n").as_bytes(),
        )?;
    }
    Ok(())
}
