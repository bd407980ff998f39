//! `windlass convert`: a Hugging Face folder as a GGUF file, or a GGUF file as a folder.

use super::drive::bytes;
use super::quantize::{Mix, fallbacks, unmeasured as unmeasured_note};
use super::{Machine, failure, usage};
use anyhow::Result;
use serde_json::json;
use std::path::{Path, PathBuf};
use windlass::compress::{FileType, plan_tensors};
use windlass::hub;
use windlass::infer::convert::{Encoding, Folder, folder_dtype, write_hugging_face};
use windlass::progress::Progress;
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::{BlockType, File, TensorInfo, is_gguf};
use windlass::store::packed::FILE_NAME as PACKED;
use windlass::store::safetensors::Dtype;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face folder (GPTQ, AWQ and compressed-tensors too), a checkpoint or a hub id; or a GGUF file (of a split
    /// model any of its files)
    input: String,
    /// The GGUF file to write; or the folder, for a file and for a quantized folder
    output: PathBuf,
    /// Of a file: F32, F16, BF16, Q8_0, Q4_K_M, ...; of a folder's weights: F32, F16, BF16 [default: as they are, and
    /// F32 for the weights of a quantized file; codes of a quantized folder are kept where Q4_0 or Q8_0 holds them]
    #[arg(long = "type", short = 't', value_name = "TYPE", value_parser = super::quantize::file_type)]
    file_type: Option<FileType>,
    #[command(flatten)]
    mix: Mix,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let input = hub::resolve(&args.input)?;
    let output = &args.output;
    if is_gguf(&input) {
        refuse_mix(&args)?;
        return to_folder(&args, &input);
    }
    if input.join(PACKED).is_file() {
        let message = format!("{} holds weights packed by --save-packed", input.display());
        let hint = "convert the folder or file that they were packed from";
        return Err(failure(message, hint));
    }
    let folder = Folder::open(&input)?;
    let file = !output.is_dir() && output.extension().is_some_and(|end| end == "gguf");
    if file {
        return to_file(&args, &folder);
    }
    if !folder.is_quantized() {
        let message = format!("{} is no name of a GGUF file", output.display());
        return Err(usage(message, "a folder becomes a file: name it NAME.gguf"));
    }
    refuse_mix(&args)?;
    to_plain(&args, &folder)
}

/// Flags about the tensors of a file have no meaning for a folder.
fn refuse_mix(args: &Args) -> Result<()> {
    match args.mix.given() {
        None => Ok(()),
        Some(flag) => Err(usage(
            format!("{flag} for the folder {}", args.output.display()),
            "the weights of a folder are F32, F16 or BF16",
        )),
    }
}

fn to_file(args: &Args, folder: &Folder) -> Result<()> {
    let output = &args.output;
    let cpu = args.machine.cpu()?;
    let exact = match args.file_type {
        None if folder.is_quantized() => folder.exact_types(&cpu)?,
        _ => Vec::new(),
    };
    let file_type = match args.file_type {
        Some(file_type) => file_type,
        None => match folder.dtype()? {
            Dtype::BF16 => FileType::BF16,
            Dtype::F16 => FileType::F16,
            _ => FileType::F32,
        },
    };
    let mut options = args.mix.options(file_type)?;
    let planned = plan_tensors(folder.metadata(), folder.tensors(), &options)?;
    let unmeasured = options.check(&planned)?;
    for note in folder.notes() {
        eprintln!("note: {note}");
    }
    for line in fallbacks(&planned)
        .into_iter()
        .chain(unmeasured_note(&unmeasured))
    {
        eprintln!("note: {line}");
    }
    let mut types: Vec<BlockType> = planned.iter().map(|tensor| tensor.target).collect();
    for (kind, exact) in types.iter_mut().zip(&exact) {
        *kind = exact.unwrap_or(*kind);
    }
    options.file_type = main_type(folder, &exact).unwrap_or(file_type);
    let mut keys = folder.metadata().clone();
    options.describe(&mut keys);
    let importance = options.importance.as_ref();
    let encoding = Encoding {
        keys: &keys,
        types: &types,
        importance: &|tensor| importance?.columns(tensor),
    };
    let elements: usize = folder.tensors().iter().map(TensorInfo::elements).sum();
    let mut bar = Progress::new(elements as u64, "convert");
    folder.write_encoded(&cpu, &RealDisk, output, &encoding, |tensor, done| {
        bar.set(done as u64, &tensor.name);
    })?;
    bar.finish(&output.display().to_string());
    let sizes = folder.tensors().iter().zip(&types);
    let size: usize = sizes
        .map(|(info, kind)| kind.size_of(info.elements()).unwrap_or(0))
        .sum();
    say(args, options.file_type.name(), elements, size);
    Ok(())
}

/// The name of a file whose quantized matrices keep their codes, if there are any; says which do not.
fn main_type(folder: &Folder, exact: &[Option<BlockType>]) -> Option<FileType> {
    let matrices = folder.tensors().iter().zip(exact);
    let matrices = matrices.filter(|(info, _)| {
        let router = info.name.contains("ffn_gate_inp");
        info.name.starts_with("blk.") && info.shape.len() > 1 && !router
    });
    let kinds: Vec<Option<BlockType>> = matrices.map(|(_, kind)| *kind).collect();
    let rest = kinds.iter().filter(|kind| kind.is_none()).count();
    if rest > 0 {
        eprintln!(
            "note: {rest} matrices of the layers are plain, have zeros of their own or scattered groups, which no type \
             holds to the bit: they become plain numbers; give a --type to round them"
        );
    }
    let count = |kind| kinds.iter().filter(|other| **other == Some(kind)).count();
    match (count(BlockType::Q4_0), count(BlockType::Q8_0)) {
        (0, 0) => None,
        (four, eight) if four >= eight => Some(FileType::Q4_0),
        _ => Some(FileType::Q8_0),
    }
}

/// A quantized folder as one of plain weights.
fn to_plain(args: &Args, folder: &Folder) -> Result<()> {
    let dtype = match args.file_type {
        None => folder.dtype()?,
        Some(file_type) => plain_type(file_type)?,
    };
    keep_models(&args.output)?;
    for note in folder.notes() {
        eprintln!("note: {note}");
    }
    let cpu = args.machine.cpu()?;
    let elements: usize = folder.tensors().iter().map(TensorInfo::elements).sum();
    let mut bar = Progress::new(elements as u64, "convert");
    folder.write_plain(&cpu, &RealDisk, &args.output, dtype, |tensor, done| {
        bar.set(done as u64, tensor);
    })?;
    bar.finish(&args.output.display().to_string());
    let size = elements * dtype.bitsize() / 8;
    say(args, &dtype.to_string(), elements, size);
    Ok(())
}

/// Refuses to write over the model of a folder.
fn keep_models(folder: &Path) -> Result<()> {
    if folder.join("config.json").exists() {
        let message = format!("{} holds a model", folder.display());
        return Err(failure(message, "name a new folder"));
    }
    Ok(())
}

/// The type of a folder's weights.
fn plain_type(file_type: FileType) -> Result<Dtype> {
    match file_type {
        FileType::F32 => Ok(Dtype::F32),
        FileType::F16 => Ok(Dtype::F16),
        FileType::BF16 => Ok(Dtype::BF16),
        other => {
            let message = format!("--type {other} for a folder");
            let hint = "the weights of a folder are F32, F16 or BF16";
            Err(usage(message, hint))
        }
    }
}

fn to_folder(args: &Args, input: &Path) -> Result<()> {
    let output = &args.output;
    if output.is_file() {
        let message = format!("{} is a file", output.display());
        return Err(failure(message, "a GGUF file becomes a folder: name one"));
    }
    let file = File::open(input)?;
    let dtype = match args.file_type {
        None => folder_dtype(&file),
        Some(file_type) => plain_type(file_type)?,
    };
    keep_models(output)?;
    let elements: usize = file.tensors().map(TensorInfo::elements).sum();
    let mut bar = Progress::new(elements as u64, "convert");
    let notes = write_hugging_face(&file, &RealDisk, output, dtype, |tensor, done| {
        bar.set(done as u64, tensor);
    })?;
    bar.finish(&output.display().to_string());
    for note in notes {
        eprintln!("note: {note}");
    }
    say(
        args,
        &dtype.to_string(),
        elements,
        elements * dtype.bitsize() / 8,
    );
    Ok(())
}

fn say(args: &Args, kind: &str, elements: usize, size: usize) {
    if args.json {
        let object = json!({
            "output": args.output.display().to_string(), "type": kind, "parameters": elements,
            "bytes": size,
        });
        println!("{object}");
        return;
    }
    println!(
        "{}: {kind}, {:.1} M parameters, {} of weights",
        args.output.display(),
        elements as f64 / 1e6,
        bytes(size)
    );
}
