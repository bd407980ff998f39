//! Models from Hugging Face folders into GGUF files, and back: a parameter at a time, whole or not at all.
//!
//! The types of a file's tensors are the caller's choice; this module knows what a tensor is made of.

mod folder;
mod weights;

pub(crate) use folder::described;
pub use folder::{folder_dtype, write_hugging_face};
pub(crate) use weights::{encode, of_unit};

use crate::loaded::{find_folder, sort_out_unused, tokenizer_of};
use crate::quantized::Quantization;
use crate::{InferError, vocabulary};
use std::path::{Path, PathBuf};
use weights::{Weights, exact_blocks, exact_type, holds};
use windlass_model::gguf::{Key, Place, metadata, place};
use windlass_model::{DecoderConfig, Model, Tokens, decoder};
use windlass_store::Error as StoreError;
use windlass_store::atomic::{Disk, write_atomic};
use windlass_store::gguf::{BlockType, Metadata, TensorInfo, Value, Writer};
use windlass_store::safetensors::{Dtype, Options, Spec, Tensors, write_folder};
use windlass_tensor::{Cpu, FileTensor, ParamId, ParamSpec};

/// The version of the block types, as llama.cpp counts them.
const QUANTIZATION_VERSION: u32 = 2;

/// A Hugging Face folder, described as a GGUF file. The weights may be those of a quantized checkpoint.
pub struct Folder {
    path: PathBuf,
    config: DecoderConfig,
    model: Model<Tokens>,
    tensors: Tensors,
    quantization: Option<Quantization>,
    metadata: Metadata,
    plan: Vec<Made>,
    infos: Vec<TensorInfo>,
    notes: Vec<String>,
}

/// How a folder becomes a file.
pub struct Encoding<'a> {
    /// The keys of the file.
    pub keys: &'a Metadata,
    /// The types of [`Folder::tensors`].
    pub types: &'a [BlockType],
    /// How much each column of a tensor matters, by its name: one number a column, or of a tensor with several matrices one a
    /// column of each; `None` for all alike.
    pub importance: &'a dyn Fn(&str) -> Option<Vec<f32>>,
}

/// What a tensor is made of: parameters in the order of its rows, or numbers.
enum Made {
    Of(Vec<(ParamId, Place)>),
    Numbers(Vec<f32>),
}

impl Folder {
    /// Opens a model folder, a checkpoint or a folder of checkpoints, and describes it.
    ///
    /// # Errors
    /// As [`LoadedModel::open`](crate::LoadedModel::open); settings and tokenizers that a GGUF file cannot say.
    pub fn open(path: &Path) -> Result<Self, InferError> {
        let mut notes = Vec::new();
        let folder = find_folder(path, &mut notes)?;
        let (config, quantization) = DecoderConfig::load_quantized(&folder)?;
        let quantization = Quantization::of_folder(&folder, quantization.as_ref())?;
        let description = metadata(&config)?;
        notes.extend(description.notes.iter().cloned());
        let mut keys = Metadata::new();
        keys.insert("general.architecture", description.architecture);
        keys.insert("general.type", "model");
        keys.insert("general.name", name_of(path).as_str());
        for (key, value) in description.keys {
            keys.insert(key, value_of(value));
        }
        match tokenizer_of(&folder, &config)? {
            Some(tokenizer) => {
                let (words, more) = tokenizer.to_gguf(config.vocab_size)?;
                vocabulary::write(&words, &mut keys);
                notes.extend(more);
            }
            None => {
                keys.insert("tokenizer.ggml.model", "no_vocab");
                notes.push("the folder has no tokenizer, so the file has none".into());
            }
        }
        let model = decoder(&config);
        let (mut infos, mut plan) = layout(&config, &model, description.own_output);
        for (name, numbers) in description.tensors {
            infos.push(TensorInfo::new(name, [numbers.len()], BlockType::F32));
            plan.push(Made::Numbers(numbers));
        }
        let tensors = Tensors::open(&folder)?;
        let all = Folder {
            path: folder.clone(),
            config,
            model,
            tensors,
            quantization,
            metadata: keys,
            plan,
            infos,
            notes,
        };
        all.checked(&folder)
    }

    /// Checks that the weights are all there, in the shapes that are asked for.
    fn checked(mut self, folder: &Path) -> Result<Self, InferError> {
        let (cpu, map) = (Cpu::new(1), self.map());
        let unused = self.weights(&cpu, &map).check()?;
        sort_out_unused(folder, &self.config, unused, &mut self.notes)?;
        Ok(self)
    }

    fn map(&self) -> Vec<FileTensor> {
        self.config.naming.file_tensors(&self.model)
    }

    fn weights<'a>(&'a self, cpu: &'a Cpu, map: &'a [FileTensor]) -> Weights<'a> {
        let (units, naming) = (self.model.units(), self.config.naming);
        let quantization = self.quantization.as_ref();
        Weights::new(cpu, &self.tensors, units, map, naming, quantization)
    }

    /// Whether the folder is a quantized checkpoint.
    pub fn is_quantized(&self) -> bool {
        self.quantization.is_some()
    }

    /// The types that hold the folder's quantized matrices to the bit, in the order of [`Folder::tensors`]; `None` for
    /// tensors that are plain, and for those that no type holds: with zeros of their own, or groups of scattered inputs.
    ///
    /// # Errors
    /// Damaged tensors.
    pub fn exact_types(&self, cpu: &Cpu) -> Result<Vec<Option<BlockType>>, InferError> {
        let map = self.map();
        let mut weights = self.weights(cpu, &map);
        let mut types = Vec::new();
        for made in &self.plan {
            let Made::Of(parts) = made else {
                types.push(None);
                continue;
            };
            let mut kinds = Vec::new();
            for (id, _) in parts {
                kinds.push(weights.packed(*id)?.as_ref().and_then(exact_type));
            }
            // Parts of one tensor have one type.
            types.push(kinds[0].filter(|kind| kinds.iter().all(|other| *other == Some(*kind))));
        }
        Ok(types)
    }

    /// The keys of the file, but for those of its types.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors of the file, all in `F32`.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    /// What the user should know.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The type of the folder's largest tensor of floating-point numbers.
    ///
    /// # Errors
    /// A damaged file.
    pub fn dtype(&self) -> Result<Dtype, InferError> {
        let mut largest = (0, Dtype::F32);
        for name in self.tensors.names() {
            let view = self.tensors.get(name)?;
            let floating = matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
            if floating && view.elements() > largest.0 {
                largest = (view.elements(), view.dtype);
            }
        }
        Ok(largest.1)
    }

    /// Writes the file, with these types for [`Folder::tensors`] and their number for `general.file_type`; `progress` is
    /// told the tensor and how many elements are done.
    ///
    /// # Errors
    /// Weights that are not finite or too large for their type; whatever hinders reading and writing.
    ///
    /// # Panics
    /// Without a type for each tensor.
    pub fn write(
        &self,
        cpu: &Cpu,
        disk: &dyn Disk,
        out: &Path,
        (file_type, types): (u32, &[BlockType]),
        progress: impl FnMut(&TensorInfo, usize),
    ) -> Result<(), InferError> {
        let mut keys = self.metadata.clone();
        keys.insert("general.file_type", file_type);
        keys.insert("general.quantization_version", QUANTIZATION_VERSION);
        let encoding = Encoding {
            keys: &keys,
            types,
            importance: &|_| None,
        };
        self.write_encoded(cpu, disk, out, &encoding, progress)
    }

    /// As [`Folder::write`], with keys and roundings of the caller's choice.
    ///
    /// # Errors
    /// Those of [`Folder::write`].
    ///
    /// # Panics
    /// Without a type for each tensor.
    pub fn write_encoded(
        &self,
        cpu: &Cpu,
        disk: &dyn Disk,
        out: &Path,
        encoding: &Encoding<'_>,
        mut progress: impl FnMut(&TensorInfo, usize),
    ) -> Result<(), InferError> {
        let Encoding {
            keys,
            types,
            importance,
        } = *encoding;
        assert_eq!(types.len(), self.infos.len(), "types and tensors");
        let infos: Vec<TensorInfo> = self.infos.iter().zip(types).map(retyped).collect();
        let map = self.map();
        let mut weights = self.weights(cpu, &map);
        let mut writer = Writer::create(disk, out, keys, &infos)?;
        let mut done = 0;
        for (info, made) in infos.iter().zip(&self.plan) {
            let columns = importance(&info.name);
            let mut put = |bytes: &[u8], count: usize| {
                writer.write(&info.name, bytes)?;
                done += count;
                progress(info, done);
                Ok::<(), InferError>(())
            };
            match made {
                Made::Numbers(values) => put(&encode(cpu, info, values, None)?, values.len())?,
                Made::Of(parts) => {
                    for (part, (id, place)) in parts.iter().enumerate() {
                        let spec = &self.model.units()[id.unit].params[id.slot];
                        let columns = part_of(columns.as_deref(), info.row_len(), part);
                        let packed = weights.packed(*id)?;
                        let bytes = match packed.filter(|p| holds(info.block_type, p)) {
                            Some(packed) => {
                                let rows = spec.shape[0];
                                let start = place.rows.as_ref().map_or(0, |rows| rows.start);
                                exact_blocks(&packed, info.block_type, |row| {
                                    place.row(row, rows) - start
                                })
                            }
                            None => {
                                let values = weights.values(*id)?;
                                encode(cpu, info, &arranged(&values, spec, place), columns)?
                            }
                        };
                        put(&bytes, spec.shape.len())?;
                    }
                }
            }
        }
        Ok(writer.finish()?)
    }

    /// Writes the folder anew with plain weights in `dtype`: what quantized matrices stand for. `progress` is told the tensor
    /// and how many elements are done.
    ///
    /// # Errors
    /// Damaged tensors; whatever hinders writing.
    pub fn write_plain(
        &self,
        cpu: &Cpu,
        disk: &dyn Disk,
        out: &Path,
        dtype: Dtype,
        mut progress: impl FnMut(&str, usize),
    ) -> Result<(), InferError> {
        let map = self.map();
        let mut weights = self.weights(cpu, &map);
        let tokenizer = tokenizer_of(&self.path, &self.config)?;
        let specs = specs_of(&map, dtype);
        let (mut done, mut failed) = (0, None);
        let written = write_folder(disk, out, &specs, &Options::default(), |index, writer| {
            let tensor = &map[index];
            let values = tensor.parts.iter().map(|id| weights.values(*id));
            let values: Vec<Vec<f32>> = match values.collect() {
                Ok(values) => values,
                Err(InferError::Store(error)) => return Err(error),
                Err(error) => {
                    failed = Some(error);
                    let problem = "a quantized matrix cannot be read".to_owned();
                    let path = self.path.clone();
                    return Err(StoreError::Corrupt { path, problem });
                }
            };
            let parts: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
            let rows = |id: &ParamId| self.model.units()[id.unit].params[id.slot].shape[0];
            let rows: Vec<usize> = tensor.parts.iter().map(rows).collect();
            done += tensor.shape.len();
            progress(&tensor.name, done);
            writer.values(&tensor.join(&parts, &rows))
        });
        if let Some(error) = failed {
            return Err(error);
        }
        written?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.save(out)?;
        }
        let mut json = self.config.json.clone();
        json["torch_dtype"] = dtype_name(dtype).into();
        let text = serde_json::to_vec_pretty(&json).expect("a JSON value");
        Ok(write_atomic(disk, &config_path(out), &text)?)
    }
}

/// The importances of a part of a tensor: its own where each part has some, as experts do, or those that all parts share.
fn part_of(columns: Option<&[f32]>, row_len: usize, part: usize) -> Option<&[f32]> {
    let columns = columns?;
    match columns.len() == row_len {
        true => Some(columns),
        false => columns.chunks_exact(row_len).nth(part),
    }
}

/// The tensors of a folder, all in one type.
fn specs_of(map: &[FileTensor], dtype: Dtype) -> Vec<Spec> {
    let spec = |tensor: &FileTensor| Spec::new(tensor.name.clone(), dtype, tensor.shape.to_vec());
    map.iter().map(spec).collect()
}

/// The name of a model: that of its folder.
fn name_of(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

fn value_of(key: Key) -> Value {
    match key {
        Key::Count(count) => (count as u32).into(),
        Key::Number(number) => (number as f32).into(),
        Key::Text(text) => text.into(),
        Key::Flag(flag) => flag.into(),
    }
}

fn retyped((info, block_type): (&TensorInfo, &BlockType)) -> TensorInfo {
    TensorInfo::new(info.name.clone(), info.shape.clone(), *block_type)
}

/// The tensors of the file, and the parameters that they hold.
fn layout(
    config: &DecoderConfig,
    model: &Model<Tokens>,
    own_output: bool,
) -> (Vec<TensorInfo>, Vec<Made>) {
    let mut found: Vec<(String, Vec<(ParamId, Place)>)> = Vec::new();
    for (unit, spec) in model.units().iter().enumerate() {
        for (slot, param) in spec.params.iter().enumerate() {
            let place = place(config, &param.name, param.shape[0]);
            let id = ParamId { unit, slot };
            match found.iter_mut().find(|(name, _)| *name == place.tensor) {
                Some((_, parts)) => parts.push((id, place)),
                None => found.push((place.tensor.clone(), vec![(id, place)])),
            }
        }
    }
    if own_output {
        let (_, parts) = found
            .iter()
            .find(|(name, _)| name == "token_embd.weight")
            .expect("every decoder has embeddings");
        found.push(("output.weight".into(), parts.clone()));
    }
    let (mut infos, mut plan) = (Vec::new(), Vec::new());
    for (name, mut parts) in found {
        parts.sort_by_key(|(_, place)| place.rows.as_ref().map_or(0, |rows| rows.start));
        let (first, _) = parts[0];
        let shape = model.units()[first.unit].params[first.slot].shape.to_vec();
        let stacked = name.contains("_exps.") || parts.len() > 1 && name.contains("_norm.");
        let shape = match &parts.last().expect("a part").1.rows {
            Some(_) if stacked => [vec![parts.len()], shape].concat(),
            Some(rows) => [vec![rows.end], shape[1..].to_vec()].concat(),
            None => shape,
        };
        infos.push(TensorInfo::new(name, shape, BlockType::F32));
        plan.push(Made::Of(parts));
    }
    (infos, plan)
}

/// The elements of a parameter as the file has them.
fn arranged(values: &[f32], spec: &ParamSpec, place: &Place) -> Vec<f32> {
    let rows = spec.shape[0];
    let cols = values.len() / rows;
    let start = place.rows.as_ref().map_or(0, |rows| rows.start);
    let mut out = vec![0f32; values.len()];
    for (row, values) in values.chunks_exact(cols).enumerate() {
        let at = place.row(row, rows) - start;
        let out = &mut out[at * cols..][..cols];
        for (out, value) in out.iter_mut().zip(values) {
            *out = value + place.offset;
        }
    }
    out
}

fn config_path(folder: &Path) -> PathBuf {
    folder.join("config.json")
}

/// What `config.json` calls a type.
fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}
