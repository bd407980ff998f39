//! A model ready to compute: configuration, weights and tokenizer, opened from a folder.
//!
//! Everything that can be wrong with a folder is found here, before anything is computed. Where the folder comes from
//! (a hub, a command line) is the caller's business.

use crate::InferError;
use crate::convert::of_unit;
use crate::quantized::{Checkpoint, Quantization};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use windlass_model::{Adapter, DecoderConfig, Model, Tokenizer, TokenizerError, Tokens, decoder};
use windlass_store::checkpoint::Checkpoints;
use windlass_store::gguf::is_gguf;
use windlass_store::packed as packed_file;
use windlass_store::safetensors::{Dtype, Tensors};
use windlass_store::{Loader, Store};
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::kernels::packed;
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, Packed, ParamId, UnitSpec, Weight, Weights,
};

/// A model with its weights and tokenizer.
pub struct LoadedModel {
    /// What the model computes.
    pub config: DecoderConfig,
    /// Its units and layers.
    pub model: Model<Tokens>,
    /// Its weights.
    pub store: Store,
    /// Its tokenizer, where the folder has one; see [`LoadedModel::tokenizer`].
    pub tokenizer: Option<Tokenizer>,
    /// Storage type of activations and of the weights that are not packed.
    pub dtype: DType,
    /// How sequences keep their keys and values: as activations are, in `bf16` beside packed weights, or as the caller sets it.
    pub kv_type: KvType,
    /// What the user should know: settings without effect, tensors without use.
    pub notes: Vec<String>,
    /// The folder that holds `config.json`, or the GGUF file.
    pub folder: PathBuf,
    /// Its adapter, where it has one.
    pub adapter: Option<Adapter>,
}

/// How keys and values are kept unless the caller decides: weights of few bits leave `f32` activations, whose keys and
/// values would outweigh them in a long context.
fn kv_type(dtype: DType, weights: &[Weights]) -> KvType {
    let packed = |weight: &Weight| matches!(weight, Weight::Packed(_));
    match weights.iter().flat_map(Weights::iter).any(packed) {
        true => KvType::Plain(DType::Bf16),
        false => KvType::Plain(dtype),
    }
}

/// How matrices are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadIn {
    /// As the file has them: blocks packed, other numbers plain.
    #[default]
    AsStored,
    /// Rounded to a layout as they are read, a unit at a time.
    Packed(packed::Layout),
    /// Plain numbers, in the storage type of activations: blocks and codes are unpacked.
    Plain,
}

impl LoadedModel {
    /// Opens a Hugging Face folder, a checkpoint, a folder of checkpoints (its latest one), a folder of
    /// [`LoadedModel::save_packed`], or a GGUF file.
    ///
    /// Without a `dtype` it is the file's own: `f32`, or `bf16` for files in 16 bits; `f32` beside packed matrices.
    ///
    /// # Errors
    /// A path without a model, an unknown architecture, missing, damaged or misshapen weights, a tokenizer that is
    /// damaged or has more tokens than the model.
    pub fn open(cpu: &Cpu, path: &Path, dtype: Option<DType>) -> Result<Self, InferError> {
        Self::open_in(cpu, path, dtype, LoadIn::AsStored)
    }

    /// As [`LoadedModel::open`], with matrices kept in another form.
    ///
    /// # Errors
    /// Those of [`LoadedModel::open`].
    pub fn open_in(
        cpu: &Cpu,
        path: &Path,
        dtype: Option<DType>,
        load_in: LoadIn,
    ) -> Result<Self, InferError> {
        if is_gguf(path) {
            return Self::open_gguf(cpu, path, dtype, load_in);
        }
        let mut notes = Vec::new();
        let folder = find_folder(path, &mut notes)?;
        if folder.join(packed_file::FILE_NAME).is_file() {
            return Self::open_packed(cpu, &folder, dtype, load_in, notes);
        }
        let (config, quantization) = DecoderConfig::load_quantized(&folder)?;
        let quantization = Quantization::of_folder(&folder, quantization.as_ref())?;
        notes.extend(config.notes.iter().cloned());
        let tokenizer = tokenizer_of(&folder, &config)?;
        let tensors = Tensors::open(&folder)?;
        let model = decoder(&config);
        let dtype = match dtype {
            Some(dtype) => dtype,
            None if load_in != LoadIn::AsStored || quantization.is_some() => DType::F32,
            None => file_dtype(&tensors, &mut notes)?,
        };
        if quantization.is_some() && matches!(load_in, LoadIn::Packed(_)) {
            let note = "matrices that the checkpoint has quantized keep their bits; the others are rounded";
            notes.push(note.to_owned());
        }
        let reader = Reader {
            cpu,
            tensors: &tensors,
            quantized: quantization.map(|q| Checkpoint::new(&tensors, q, config.naming)),
            config: &config,
            dtype,
            load_in,
        };
        let (weights, unused) = reader.read(&model)?;
        sort_out_unused(&folder, &config, unused, &mut notes)?;
        Ok(Self::assemble(
            cpu, config, model, weights, tokenizer, dtype, notes, &folder,
        ))
    }

    /// A model of its parts.
    #[expect(clippy::too_many_arguments, reason = "the parts of a model, once each")]
    pub(crate) fn assemble(
        cpu: &Cpu,
        config: DecoderConfig,
        model: Model<Tokens>,
        weights: Vec<Weights>,
        tokenizer: Option<Tokenizer>,
        dtype: DType,
        notes: Vec<String>,
        folder: &Path,
    ) -> Self {
        let kv_type = kv_type(dtype, &weights);
        let store = Store::new(cpu, model.units(), weights);
        LoadedModel {
            config,
            model,
            store,
            tokenizer,
            dtype,
            kv_type,
            notes,
            folder: folder.to_owned(),
            adapter: None,
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`TokenizerError::Missing`] when the folder has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer, InferError> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let missing = TokenizerError::Missing {
                folder: self.folder.clone(),
            };
            missing.into()
        })
    }

    /// Takes the tokenizer of another place; see [`open_tokenizer`](crate::vocabulary::open_tokenizer).
    ///
    /// # Errors
    /// When it cannot be loaded or has more tokens than the model.
    pub fn set_tokenizer(&mut self, path: &Path) -> Result<(), InferError> {
        let tokenizer = crate::vocabulary::open_tokenizer(path)?;
        tokenizer.check_vocabulary(self.config.vocab_size)?;
        self.tokenizer = Some(tokenizer);
        Ok(())
    }

    /// The most tokens of a text.
    pub fn context(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// The ids of a prompt, inside what the tokenizer puts around a text. An empty text becomes the token that begins
    /// one (or that ends the one before, as GPT-2 has it).
    ///
    /// # Errors
    /// No tokenizer; [`InferError::Empty`] when there is no such token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, InferError> {
        let tokenizer = self.tokenizer()?;
        let mut ids = tokenizer.encode(text, true)?;
        if ids.is_empty() {
            let begin = tokenizer.bos().or(tokenizer.eos().first().copied());
            ids.push(begin.ok_or(InferError::Empty {
                what: "the prompt",
                hint: "give some text: the tokenizer has no token that begins one",
            })?);
        }
        Ok(ids)
    }

    /// The token that the tokenizer puts before every text, where it does that.
    ///
    /// # Errors
    /// No tokenizer.
    pub fn begins_texts_with(&self) -> Result<Option<u32>, InferError> {
        let tokenizer = self.tokenizer()?;
        let around = tokenizer.encode("", true)?;
        Ok(around
            .first()
            .copied()
            .filter(|id| tokenizer.bos() == Some(*id)))
    }

    /// Bytes of all weights as they are kept, and of those that every token reads: a table of embeddings is looked up,
    /// and of experts a token reads its own.
    ///
    /// # Errors
    /// As the store gathers weights.
    pub fn weight_bytes(&self) -> Result<(usize, usize), InferError> {
        let (mut all, mut read) = (0, 0);
        let share = self.config.experts.as_ref().map_or(1.0, |experts| {
            experts.num_experts_per_tok as f64 / experts.num_experts as f64
        });
        for (index, unit) in self.model.units().iter().enumerate() {
            let weights = self.store.gather(index)?;
            for (param, weight) in unit.params.iter().zip(weights.iter()) {
                let bytes = match weight {
                    Weight::Packed(packed) => packed.bytes(),
                    Weight::Dense(tensor) => tensor.len() * tensor.dtype().size(),
                };
                all += bytes;
                let table = param.name == "model.embed_tokens.weight"
                    && !self.config.tie_word_embeddings
                    || param.name == "model.embed_positions.weight";
                let expert = param.name.contains(".mlp.experts.");
                read += match (table, expert) {
                    (true, _) => 0,
                    (_, true) => (bytes as f64 * share) as usize,
                    _ => bytes,
                };
            }
        }
        Ok((all, read))
    }

    /// Whether matrices are packed.
    ///
    /// # Errors
    /// As the store gathers weights.
    pub fn is_packed(&self) -> Result<bool, InferError> {
        for unit in 0..self.model.units().len() {
            let weights = self.store.gather(unit)?;
            if weights
                .iter()
                .any(|weight| matches!(weight, Weight::Packed(_)))
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The tokenizer of a folder, where it has one, which must not have more tokens than the model.
pub(crate) fn tokenizer_of(
    folder: &Path,
    config: &DecoderConfig,
) -> Result<Option<Tokenizer>, InferError> {
    match Tokenizer::load(folder) {
        Ok(tokenizer) => {
            tokenizer.check_vocabulary(config.vocab_size)?;
            Ok(Some(tokenizer))
        }
        Err(TokenizerError::Missing { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The folder with `config.json` that a path leads to.
pub(crate) fn find_folder(path: &Path, notes: &mut Vec<String>) -> Result<PathBuf, InferError> {
    let refuse = |problem: &str, hint: String| InferError::NoModel {
        path: path.to_owned(),
        problem: problem.to_owned(),
        hint,
    };
    if !path.exists() {
        let hint = "check the spelling of the path".to_owned();
        return Err(refuse("no such folder", hint));
    }
    if !path.is_dir() {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).display();
        let hint = format!("give the folder that holds config.json and the weights: {folder}");
        return Err(refuse("is a file, not the folder of a model", hint));
    }
    if path.join("config.json").is_file() {
        return Ok(path.to_owned());
    }
    if path.join("latest").is_file()
        && let Some(found) = Checkpoints::open(path).latest()?
    {
        notes.extend(found.note);
        return Ok(found.checkpoint.path().to_owned());
    }
    let inner = path.join("model");
    if inner.join("config.json").is_file() {
        return Ok(inner);
    }
    let hint = "a model folder holds config.json, model.safetensors and tokenizer.json; \
                a checkpoint folder holds a file named latest";
    Err(refuse("no config.json in this folder", hint.to_owned()))
}

/// The storage type that suits the largest tensor of a file.
fn file_dtype(tensors: &Tensors, notes: &mut Vec<String>) -> Result<DType, InferError> {
    let mut largest = (0, Dtype::F32);
    for name in tensors.names() {
        let view = tensors.get(name)?;
        if view.elements() > largest.0 {
            largest = (view.elements(), view.dtype);
        }
    }
    if largest.1 == Dtype::F16 {
        let note = "the F16 weights are rounded to bf16; --dtype f32 keeps every bit";
        notes.push(note.to_owned());
    }
    Ok(match largest.1 {
        Dtype::BF16 | Dtype::F16 => DType::Bf16,
        _ => DType::F32,
    })
}

/// The weights of all units. A tensor is in memory twice while it is packed, so the units with the largest ones are read
/// while there is little else.
pub(crate) fn units_of(
    model: &Model<Tokens>,
    mut read: impl FnMut(usize) -> Result<Weights, InferError>,
) -> Result<Vec<Weights>, InferError> {
    let units = model.units();
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by_key(|&unit| {
        let params = units[unit].params.iter();
        Reverse(params.map(|param| param.shape.len()).max())
    });
    let mut weights: Vec<Option<Weights>> = units.iter().map(|_| None).collect();
    for unit in order {
        weights[unit] = Some(read(unit)?);
    }
    Ok(weights.into_iter().flatten().collect())
}

/// What is needed to read the weights of a model.
struct Reader<'a> {
    cpu: &'a Cpu,
    tensors: &'a Tensors,
    /// The matrices that are quantized in the file.
    quantized: Option<Checkpoint<'a>>,
    config: &'a DecoderConfig,
    dtype: DType,
    load_in: LoadIn,
}

impl Reader<'_> {
    /// The weights of all units, and the names in the file that none of them asked for.
    fn read(&self, model: &Model<Tokens>) -> Result<(Vec<Weights>, BTreeSet<String>), InferError> {
        let map = self.config.naming.file_tensors(model);
        let mut unused: BTreeSet<String> = self.tensors.names().map(String::from).collect();
        let weights = units_of(model, |index| {
            let (unit, rest) = self.read_unit(&model.units()[index], &of_unit(&map, index))?;
            let rest: BTreeSet<String> = rest.into_iter().collect();
            unused.retain(|name| rest.contains(name));
            Ok(unit)
        })?;
        if let Some(quantized) = &self.quantized {
            let used = quantized.tensors_of(&map)?;
            unused.retain(|name| !used.contains(name));
        }
        Ok((weights, unused))
    }

    fn read_unit(
        &self,
        unit: &UnitSpec,
        map: &[FileTensor],
    ) -> Result<(Weights, Vec<String>), InferError> {
        let naming = self.config.naming;
        // Packed weights are rounded once, from what the file says.
        let dtype = match self.load_in {
            LoadIn::AsStored | LoadIn::Plain => self.dtype,
            LoadIn::Packed(_) => DType::F32,
        };
        let units = std::slice::from_ref(unit);
        let mut loader = Loader::new(self.cpu, self.tensors, units, map, |name| {
            naming.bare_name(name)
        });
        let mut weights: Vec<Option<Weight>> = vec![None; unit.params.len()];
        if let Some(quantized) = &self.quantized {
            for (slot, packed) in quantized.read(self.cpu, unit, map)? {
                weights[slot] = Some(kept(self.cpu, packed, self.load_in, self.dtype));
            }
        }
        for (slot, weight) in weights.iter_mut().enumerate() {
            if weight.is_some() {
                continue;
            }
            let shape = unit.params[slot].shape;
            let id = ParamId { unit: 0, slot };
            let tensor = loader.read(id, 0..shape.len(), dtype)?.reshape(shape);
            *weight = Some(match self.load_in {
                LoadIn::AsStored | LoadIn::Plain => tensor.into(),
                LoadIn::Packed(layout) if tensor.rows() > 1 => {
                    Weight::Packed(Packed::quantize(self.cpu, layout, &tensor))
                }
                LoadIn::Packed(_) => tensor.cast(self.cpu, self.dtype, Category::Weights).into(),
            });
        }
        let weights = Weights::new(weights.into_iter().flatten().collect());
        Ok((weights, loader.unused()))
    }
}

/// A matrix of a file that has it packed: as it is, or unpacked.
pub(crate) fn kept(cpu: &Cpu, packed: Packed, load_in: LoadIn, dtype: DType) -> Weight {
    match load_in {
        LoadIn::Plain => packed.unpack_rows(cpu, 0..packed.shape()[0], dtype).into(),
        LoadIn::AsStored | LoadIn::Packed(_) => Weight::Packed(packed),
    }
}

/// Tensors that files carry and models do not need: causal masks, tables of angles, second copies.
fn is_harmless(name: &str, config: &DecoderConfig) -> bool {
    const SUFFIXES: [&str; 5] = [
        ".attn.bias",
        ".attn.masked_bias",
        ".attention.bias",
        ".attention.masked_bias",
        "rotary_emb.inv_freq",
    ];
    let tied = config.tie_word_embeddings && ["lm_head.weight", "embed_out.weight"].contains(&name);
    tied || SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

pub(crate) fn sort_out_unused(
    folder: &Path,
    config: &DecoderConfig,
    unused: BTreeSet<String>,
    notes: &mut Vec<String>,
) -> Result<(), InferError> {
    const SHOWN: usize = 3;
    let unused: Vec<String> = unused
        .into_iter()
        .filter(|name| !is_harmless(name, config))
        .collect();
    let biases: Vec<String> = unused
        .iter()
        .filter(|name| name.ends_with(".bias") || name.ends_with(".scale"))
        .take(SHOWN)
        .cloned()
        .collect();
    if !biases.is_empty() {
        return Err(InferError::UnknownBias {
            path: folder.to_owned(),
            names: biases,
        });
    }
    if !unused.is_empty() {
        let more = if unused.len() > SHOWN { ", …" } else { "" };
        notes.push(format!(
            "{} tensors of the file are not used: {}{more}",
            unused.len(),
            unused[..unused.len().min(SHOWN)].join(", ")
        ));
    }
    Ok(())
}
