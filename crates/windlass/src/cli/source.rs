//! Flags that say which model to compute with and how to keep it, and the model itself.

use super::{Machine, Precision, usage};
use anyhow::Result;
use clap::builder::PossibleValue;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Instant;
use windlass::hub;
use windlass::infer::{InferError, LoadIn, LoadedModel};
use windlass::store::atomic::RealDisk;
use windlass::tensor::kernels::attention::KvType;
use windlass::tensor::kernels::packed::Layout;
use windlass::tensor::{Cpu, DType};

/// A model to compute with.
#[derive(clap::Args, Clone, Debug)]
pub struct Source {
    #[command(flatten)]
    pub base: Base,
    /// Adapter to apply: a folder (PEFT) or a GGUF file (LoRA); several times for several, whose changes add up. DIR@0.5
    /// counts half
    #[arg(long, value_name = "DIR|FILE", conflicts_with = "save_packed", value_parser = chosen)]
    pub adapter: Vec<(PathBuf, f64)>,
}

/// An adapter and how much of it counts: `DIR`, or `DIR@WEIGHT`. A path that exists is no other.
fn chosen(text: &str) -> Result<(PathBuf, f64), String> {
    let whole = (PathBuf::from(text), 1.0);
    match text.rsplit_once('@') {
        Some((path, weight)) if !whole.0.exists() && !path.is_empty() => {
            match (weight.parse::<f64>(), Path::new(path).exists()) {
                (Ok(weight), _) if weight.is_finite() => Ok((path.into(), weight)),
                (_, true) => Err(format!("{weight} is no weight: write {path}@0.5")),
                (_, false) => Ok(whole),
            }
        }
        _ => Ok(whole),
    }
}

/// A model as it is, without an adapter.
#[derive(clap::Args, Clone, Debug)]
pub struct Base {
    /// Hugging Face folder, checkpoint, GGUF file, folder of --save-packed, or hub id such as org/name[@revision]
    #[arg(long, short, value_name = "PATH|ID")]
    pub model: String,
    /// Tokenizer instead of the model's own: a tokenizer.json or its folder
    #[arg(long, value_name = "PATH")]
    pub tokenizer: Option<PathBuf>,
    /// Storage type of weights and activations [default: as in the file]
    #[arg(long, value_enum)]
    pub dtype: Option<Precision>,
    /// Pack the weights while loading, or unpack them
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub load_in: Option<Form>,
    /// How keys and values are kept [default: as activations, bf16 beside packed weights]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub kv_cache_dtype: Option<KvPrecision>,
    /// Keep the model in a folder as it is in memory: it opens at once
    #[arg(long, value_name = "FOLDER")]
    pub save_packed: Option<PathBuf>,
    #[command(flatten)]
    pub machine: Machine,
}

/// How weights are packed while they are loaded.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// 4-bit integers, symmetric, a scale for each 32
    #[value(alias = "q4s32")]
    Q4,
    /// 4-bit integers, symmetric, a scale for each 64
    Q4S64,
    /// 4-bit integers, symmetric, a scale for each 128: the smallest
    Q4S128,
    /// 4-bit integers with a zero, for each 32 a scale
    Q4G32,
    /// 4-bit integers with a zero, for each 64 a scale
    Q4G64,
    /// 4-bit integers with a zero, for each 128 a scale
    Q4G128,
    /// 8-bit integers, a scale for each 32
    Q8,
}

/// How weights are kept in memory, whatever the file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Packed while loading.
    Packed(Packing),
    /// Plain, in the storage type of activations.
    Plain(Precision),
}

impl clap::ValueEnum for Form {
    fn value_variants<'a>() -> &'a [Self] {
        use Form::{Packed, Plain};
        &[
            Packed(Packing::Q4),
            Packed(Packing::Q4S64),
            Packed(Packing::Q4S128),
            Packed(Packing::Q4G32),
            Packed(Packing::Q4G64),
            Packed(Packing::Q4G128),
            Packed(Packing::Q8),
            Plain(Precision::F32),
            Plain(Precision::Bf16),
            Plain(Precision::F16),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Form::Packed(packing) => packing.to_possible_value(),
            Form::Plain(precision) => {
                let plain = precision.to_possible_value()?;
                Some(plain.help("Plain numbers, as --dtype: quantized weights are unpacked"))
            }
        }
    }
}

/// How the key-value cache keeps numbers.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvPrecision {
    /// Single precision
    F32,
    /// 16 bits, the range of f32
    Bf16,
    /// 16 bits, more digits
    F16,
    /// Bytes, with a scale for each token and head
    Int8,
}

impl KvPrecision {
    /// The storage type.
    pub fn kind(self) -> KvType {
        match self {
            KvPrecision::F32 => KvType::Plain(DType::F32),
            KvPrecision::Bf16 => KvType::Plain(DType::Bf16),
            KvPrecision::F16 => KvType::Plain(DType::F16),
            KvPrecision::Int8 => KvType::Int8,
        }
    }
}

impl Packing {
    /// The layout of a packed matrix.
    pub fn layout(self) -> Layout {
        match self {
            Packing::Q4 => Layout::q4(32),
            Packing::Q4S64 => Layout::q4(64),
            Packing::Q4S128 => Layout::q4(128),
            Packing::Q4G32 => Layout::q4_asymmetric(32),
            Packing::Q4G64 => Layout::q4_asymmetric(64),
            Packing::Q4G128 => Layout::q4_asymmetric(128),
            Packing::Q8 => Layout::q8(),
        }
    }
}

impl Source {
    /// Finds, fetches and loads the model; says on stderr what was loaded and what should be known about it.
    pub fn open(&self) -> Result<LoadedModel> {
        let model = self.open_without_tokenizer()?;
        model.tokenizer()?;
        Ok(model)
    }

    /// As [`Source::open`], for what needs no text.
    pub fn open_without_tokenizer(&self) -> Result<LoadedModel> {
        self.open_on(&self.machine.cpu()?)
    }

    /// As [`Source::open_without_tokenizer`], for what reads weights and no text.
    pub fn open_unread(&self) -> Result<LoadedModel> {
        if self.kv_cache_dtype.is_some() {
            let message = "--kv-cache-dtype, where nothing is read or generated";
            return Err(usage(message, "leave it out"));
        }
        self.open_without_tokenizer()
    }

    /// As [`Source::open_without_tokenizer`], on the threads of another model.
    pub fn open_on(&self, cpu: &Cpu) -> Result<LoadedModel> {
        self.base.open_with(cpu, &self.adapter)
    }
}

impl Deref for Source {
    type Target = Base;
    fn deref(&self) -> &Base {
        &self.base
    }
}

impl Base {
    /// As [`Source::open`], without an adapter.
    pub fn open(&self) -> Result<LoadedModel> {
        let model = self.open_with(&self.machine.cpu()?, &[])?;
        model.tokenizer()?;
        Ok(model)
    }

    /// Storage type of activations, and how weights are kept.
    fn kept(&self) -> Result<(Option<DType>, LoadIn)> {
        let dtype = self.dtype.map(Precision::dtype);
        match (self.load_in, self.dtype) {
            (None, _) => Ok((dtype, LoadIn::AsStored)),
            (Some(Form::Packed(packing)), _) => Ok((dtype, LoadIn::Packed(packing.layout()))),
            (Some(Form::Plain(plain)), Some(other)) if plain != other => {
                let name = |precision: Precision| precision.dtype().name().to_lowercase();
                let message = format!("--load-in {} with --dtype {}", name(plain), name(other));
                let hint = "plain weights are of the type of activations: leave one of the two out";
                Err(usage(message, hint))
            }
            (Some(Form::Plain(plain)), _) => Ok((Some(plain.dtype()), LoadIn::Plain)),
        }
    }

    fn open_with(&self, cpu: &Cpu, adapters: &[(PathBuf, f64)]) -> Result<LoadedModel> {
        let folder = hub::resolve(&self.model)?;
        let start = Instant::now();
        let (dtype, load_in) = self.kept()?;
        let mut model = LoadedModel::open_in(cpu, &folder, dtype, load_in)?;
        if let Some(kind) = self.kv_cache_dtype {
            model.kv_type = kind.kind();
        }
        let parameters = model.model.num_params();
        let packed = match model.is_packed()? {
            true => {
                let bits = 8.0 * model.weight_bytes()?.0 as f64 / parameters as f64;
                format!(" with weights of {bits:.2} bits")
            }
            false => String::new(),
        };
        model.add_adapters(adapters)?;
        if let Some(tokenizer) = &self.tokenizer {
            model.set_tokenizer(tokenizer)?;
        }
        for note in &model.notes {
            eprintln!("note: {note}");
        }
        let adapted = match adapters {
            [] => String::new(),
            [one] => format!(" with the adapter {}", named(one)),
            some => {
                let names: Vec<String> = some.iter().map(named).collect();
                format!(" with the adapters {}", names.join(" and "))
            }
        };
        eprintln!(
            "loaded {}: {}, {:.1} M parameters, {}{packed}{adapted}, {} threads, {:.1} s",
            model.folder.display(),
            model.config.model_type,
            parameters as f64 / 1e6,
            model.dtype.name(),
            cpu.pool.threads(),
            start.elapsed().as_secs_f64(),
        );
        if let Some(folder) = &self.save_packed {
            model.save_packed(&RealDisk, folder)?;
            eprintln!("saved {}", folder.display());
        }
        Ok(model)
    }
}

/// An adapter as it was given.
fn named((path, weight): &(PathBuf, f64)) -> String {
    match *weight == 1.0 {
        true => path.display().to_string(),
        false => format!("{}@{weight}", path.display()),
    }
}

/// Settings out of range are mistakes in how the command was called.
pub fn misuse(error: InferError) -> anyhow::Error {
    match &error {
        InferError::Setting { hint, .. } => usage(error.to_string(), *hint),
        _ => error.into(),
    }
}
