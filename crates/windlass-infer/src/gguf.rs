//! Models in GGUF files: the configuration from metadata, blocks straight into packed matrices.

use crate::loaded::{LoadedModel, sort_out_unused, units_of};
use crate::{InferError, LoadIn, vocabulary};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;
use windlass_model::gguf::{Place, config_json, place};
use windlass_model::{DecoderConfig, Tokenizer, decoder};
use windlass_store::gguf::{self, File, TensorInfo};
use windlass_tensor::kernels::blocks::{BlockType, dequantize, first_bad_block_of_all};
use windlass_tensor::kernels::packed::{Layout, PackedMatrix};
use windlass_tensor::{
    Category, Cpu, DType, Packed, ParamSpec, Shape, Tensor, Weight, Weights, each_dtype,
};

impl LoadedModel {
    /// Opens a GGUF file; of a split model, its first part.
    ///
    /// Matrices stay in the bits they have, unless `load_in` says otherwise. Without a `dtype`, activations and plain
    /// weights are `f32`, or what the plain matrices of the file are.
    ///
    /// # Errors
    /// A file that is damaged or no model, an unknown architecture, missing or misshapen tensors.
    pub(crate) fn open_gguf(
        cpu: &Cpu,
        path: &Path,
        dtype: Option<DType>,
        load_in: LoadIn,
    ) -> Result<Self, InferError> {
        let file = File::open(path)?;
        if file.tensors().next().is_none() {
            return Err(InferError::NoModel {
                path: path.to_owned(),
                problem: "has metadata and no weights".into(),
                hint: "it may be the vocabulary of a model, which `windlass tokenize` takes".into(),
            });
        }
        let (config, mut notes) = config(&file, path)?;
        let tokenizer = tokenizer(file.metadata(), &config)?;
        let model = decoder(&config);
        let dtype = dtype.unwrap_or_else(|| plain_dtype(&file));
        let mut reader = Reader {
            cpu,
            file: &file,
            path,
            config: &config,
            dtype,
            load_in,
            rounded: Vec::new(),
            used: BTreeSet::new(),
        };
        let weights = units_of(&model, |unit| {
            let params = model.units()[unit].params.iter();
            let read: Result<Vec<Weight>, InferError> =
                params.map(|param| reader.take(param)).collect();
            Ok(Weights::new(read?))
        })?;
        if !reader.rounded.is_empty() {
            let kinds = reader.rounded.join(", ");
            notes.push(format!(
                "{kinds} has no kernels of its own: these tensors are rounded to q8"
            ));
        }
        let unused = reader.unused()?;
        sort_out_unused(path, &config, unused, &mut notes)?;
        Ok(Self::assemble(
            cpu, config, model, weights, tokenizer, dtype, notes, path,
        ))
    }
}

/// The tokenizer of the metadata, where they have one, which must not have more tokens than the model.
pub(crate) fn tokenizer(
    metadata: &gguf::Metadata,
    config: &DecoderConfig,
) -> Result<Option<Tokenizer>, InferError> {
    // "none" and "no_vocab" stand for a model without one.
    match metadata.get_str("tokenizer.ggml.model")? {
        None | Some("none" | "no_vocab") => Ok(None),
        Some(_) => {
            let tokenizer = Tokenizer::from_gguf(&vocabulary::read(metadata)?)?;
            tokenizer.check_vocabulary(config.vocab_size)?;
            Ok(Some(tokenizer))
        }
    }
}

/// The configuration that the metadata describe, and what should be known about it.
pub(crate) fn config(file: &File, path: &Path) -> Result<(DecoderConfig, Vec<String>), InferError> {
    let name = path.display().to_string();
    let shape = |tensor: &str| file.tensor(tensor).ok().map(|info| info.shape.clone());
    let numbers = |tensor: &str| {
        let info = file.tensor(tensor).ok()?;
        let mut numbers = vec![0f32; info.elements()];
        dequantize(info.block_type, file.bytes(tensor).ok()?, &mut numbers);
        Some(numbers)
    };
    let json = config_json(&name, &json(file.metadata()), &shape, &numbers)?;
    let config = DecoderConfig::from_json(&name, &json.to_string())?;
    let notes = config.notes.clone();
    Ok((config, notes))
}

/// The scalars of the metadata.
fn json(metadata: &gguf::Metadata) -> Value {
    use gguf::Value as V;
    let scalars = metadata.iter().filter_map(|(key, value)| {
        let value: Value = match value {
            V::U8(v) => (*v).into(),
            V::I8(v) => (*v).into(),
            V::U16(v) => (*v).into(),
            V::I16(v) => (*v).into(),
            V::U32(v) => (*v).into(),
            V::I32(v) => (*v).into(),
            V::U64(v) => (*v).into(),
            V::I64(v) => (*v).into(),
            V::F32(v) => f64::from(*v).into(),
            V::F64(v) => (*v).into(),
            V::Bool(v) => (*v).into(),
            V::String(v) => v.as_str().into(),
            V::Array(_) => return None,
        };
        Some((key.to_owned(), value))
    });
    Value::Object(scalars.collect::<Map<_, _>>())
}

/// The storage type of the file's matrices where they are plain; `f32` beside packed ones.
fn plain_dtype(file: &File) -> DType {
    let largest = file.tensors().max_by_key(|info| info.elements());
    match largest.map(|info| info.block_type) {
        Some(BlockType::BF16) => DType::Bf16,
        Some(BlockType::F16) => DType::F16,
        _ => DType::F32,
    }
}

struct Reader<'a> {
    cpu: &'a Cpu,
    file: &'a File,
    path: &'a Path,
    config: &'a DecoderConfig,
    dtype: DType,
    load_in: LoadIn,
    /// Names of types that were rounded, for a note.
    rounded: Vec<&'static str>,
    /// Tensors that were read.
    used: BTreeSet<String>,
}

/// Tensors of files that the configuration is made of, or that need no reading: what they say follows from the metadata.
const KNOWN: [&str; 4] = [
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
    ".attn_rot_embd.weight",
];

impl Reader<'_> {
    /// A parameter, whose bytes in the file are not needed any more.
    fn take(&mut self, param: &ParamSpec) -> Result<Weight, InferError> {
        let (weight, tensor) = self.read(param)?;
        self.file.release(&tensor)?;
        self.used.insert(tensor);
        Ok(weight)
    }

    /// The tensors that no parameter was made of, but for the known ones, biases of zeros, scales of one, and a tied model's output.
    fn unused(&self) -> Result<BTreeSet<String>, InferError> {
        let mut unused = BTreeSet::new();
        for info in self.file.tensors() {
            let known = KNOWN.iter().any(|known| info.name.ends_with(known))
                || self.config.tie_word_embeddings && info.name == "output.weight";
            if known || self.used.contains(&info.name) {
                continue;
            }
            let neutral = match info.name.rsplit_once('.') {
                Some((_, "bias")) => Some(0.0),
                Some((_, "scale")) => Some(1.0),
                _ => None,
            };
            if let Some(neutral) = neutral {
                let mut values = vec![0f32; info.elements()];
                dequantize(info.block_type, self.file.bytes(&info.name)?, &mut values);
                if values.iter().all(|&value| value == neutral) {
                    continue;
                }
            }
            unused.insert(info.name.clone());
        }
        Ok(unused)
    }

    /// A parameter, and the name of its tensor.
    fn read(&mut self, param: &ParamSpec) -> Result<(Weight, String), InferError> {
        let shape = param.shape;
        let (vector, rows, cols) = match shape.to_vec()[..] {
            [rows, cols] => (false, rows, cols),
            _ => (true, 1, shape.len()),
        };
        // A vector's elements are the rows of its tensor.
        let place = place(self.config, &param.name, if vector { cols } else { rows });
        let info = self.file.tensor(&place.tensor)?;
        check(self.path, info, &place, &shape)?;
        let bytes = self.file.bytes(&place.tensor)?;
        if vector {
            self.check_blocks(info, bytes)?;
            return Ok((self.vector(info, bytes, &place, shape), place.tensor));
        }
        let row = |n: usize| place.row(n, rows);
        let layout = match (self.load_in, Layout::of(info.block_type)) {
            (LoadIn::AsStored, Some(_)) => {
                let (pool, memory) = (&self.cpu.pool, &self.cpu.memory);
                let packed = PackedMatrix::from_blocks(
                    pool,
                    memory,
                    info.block_type,
                    [rows, cols],
                    bytes,
                    row,
                );
                let packed = packed.map_err(|block| self.bad_block(info, block))?;
                return Ok((Weight::Packed(Packed::from(packed)), place.tensor));
            }
            (LoadIn::Packed(layout), _) => Some(layout),
            (LoadIn::Plain, _) => None,
            (LoadIn::AsStored, None) => match info.block_type {
                BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::F64 => None,
                other => {
                    if !self.rounded.contains(&other.name()) {
                        self.rounded.push(other.name());
                    }
                    Some(Layout::q8())
                }
            },
        };
        self.check_blocks(info, bytes)?;
        let dense = self.dense(
            info,
            bytes,
            [rows, cols],
            row,
            layout.map_or(self.dtype, |_| DType::F32),
        );
        let weight = match layout {
            Some(layout) => Weight::Packed(Packed::quantize(self.cpu, layout, &dense)),
            None => dense.into(),
        };
        Ok((weight, place.tensor))
    }

    /// Checks that the scales of the blocks are numbers.
    fn check_blocks(&self, info: &TensorInfo, bytes: &[u8]) -> Result<(), InferError> {
        match first_bad_block_of_all(&self.cpu.pool, info.block_type, bytes) {
            Some(block) => Err(self.bad_block(info, block)),
            None => Ok(()),
        }
    }

    fn bad_block(&self, info: &TensorInfo, block: usize) -> InferError {
        InferError::NoModel {
            path: self.path.to_owned(),
            problem: match info.block_type.elements() {
                1 => format!("tensor {}: weight {block} is no finite number", info.name),
                _ => format!(
                    "tensor {}: block {block} has a scale that is no finite number",
                    info.name
                ),
            },
            hint: "the file is damaged: download it again".into(),
        }
    }

    fn vector(&self, info: &TensorInfo, bytes: &[u8], place: &Place, shape: Shape) -> Weight {
        let mut all = vec![0f32; info.elements()];
        dequantize(info.block_type, bytes, &mut all);
        let values: Vec<f32> = (0..shape[0])
            .map(|n| all[place.row(n, shape[0])] - place.offset)
            .collect();
        let tensor = Tensor::from_slice(self.cpu, &values, shape, Category::Weights);
        tensor.cast(self.cpu, self.dtype, Category::Weights).into()
    }

    fn dense(
        &self,
        info: &TensorInfo,
        bytes: &[u8],
        [rows, cols]: [usize; 2],
        row: impl Fn(usize) -> usize,
        dtype: DType,
    ) -> Tensor {
        let size = info.byte_size() / info.rows();
        let mut out = Tensor::empty(self.cpu, [rows, cols], dtype, Category::Weights);
        let mut values = vec![0f32; cols];
        each_dtype!(dtype, E => for (n, out) in out.as_mut_slice::<E>().chunks_mut(cols).enumerate() {
            dequantize(info.block_type, &bytes[row(n) * size..][..size], &mut values);
            for (out, value) in out.iter_mut().zip(&values) {
                *out = windlass_tensor::kernels::Element::from_f64(f64::from(*value));
            }
        });
        out
    }
}

/// Checks that a tensor holds the rows that a parameter asks for.
pub(crate) fn check(
    path: &Path,
    info: &TensorInfo,
    place: &Place,
    shape: &Shape,
) -> Result<(), InferError> {
    let fits = match (&place.rows, shape.to_vec().len()) {
        (None, 1) => info.elements() == shape[0],
        (Some(rows), 1) => rows.end <= info.elements(),
        (None, _) => info.rows() == shape[0] && info.row_len() == shape[1],
        (Some(rows), _) => rows.end <= info.rows() && info.row_len() == shape[1],
    };
    if fits {
        return Ok(());
    }
    let problem = format!(
        "tensor {} has the shape {:?} where the metadata ask for {shape}",
        info.name, info.shape
    );
    Err(InferError::NoModel {
        path: path.to_owned(),
        problem,
        hint: "the file is damaged, or of a variant of the architecture that is not known".into(),
    })
}
