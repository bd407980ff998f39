//! `windlass adapter merge` and `unmerge`: a model with its adapters in its weights, or with one taken out of them.

use super::{Kind, is_gguf};
use crate::cli::source::Source;
use crate::cli::{failure, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use windlass::compress::{FileType, Options, plan_tensors};
use windlass::infer::LoadedModel;
use windlass::infer::convert::Folder;
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::BlockType;
use windlass::store::safetensors::Dtype;
use windlass::tensor::DType;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// The folder to write, or the file if it ends with .gguf
    #[arg(long, value_name = "DIR|FILE")]
    out: PathBuf,
    /// Storage type of the weights: F32, F16, BF16 [default: the model's, and BF16 for a packed one]
    #[arg(long = "type", short = 't', value_enum, value_name = "TYPE")]
    file_type: Option<Kind>,
}

/// Merges adapters, or takes them out with `sign` -1.
pub fn merge(args: &Args, sign: f32) -> Result<()> {
    if args.source.adapter.is_empty() {
        return Err(usage(
            "no --adapter",
            "name the adapter's folder with --adapter",
        ));
    }
    let model = args.source.open_unread()?;
    let config = &model.adapter.as_ref().expect("an adapter").config;
    if sign < 0.0 && (config.use_dora || !config.modules_to_save.is_empty()) {
        let what = match config.use_dora {
            true => "row norms that DoRA has replaced",
            false => "modules that the adapter has replaced whole",
        };
        let message = format!("the adapter cannot be taken out: nothing tells the {what}");
        return Err(failure(
            message,
            "go back to the model that it was made for",
        ));
    }
    let dtype = match (args.file_type, model.dtype) {
        (Some(Kind::F32), _) => Dtype::F32,
        (Some(Kind::F16), _) => Dtype::F16,
        (Some(Kind::Bf16), _) => Dtype::BF16,
        (None, _) if model.is_packed()? => Dtype::BF16,
        (None, DType::Bf16) => Dtype::BF16,
        (None, DType::F16) => Dtype::F16,
        (None, _) => Dtype::F32,
    };
    match is_gguf(&args.out) {
        true => save_gguf(&model, &args.out, dtype, sign)?,
        false => model.save_merged(&args.out, dtype, sign)?,
    }
    println!(
        "{}: {} modules in {dtype}",
        args.out.display(),
        model.adapter.as_ref().map_or(0, |a| a.modules.len())
    );
    Ok(())
}

/// Writes a merged model as a GGUF file, by way of a folder that is removed again.
fn save_gguf(model: &LoadedModel, out: &Path, dtype: Dtype, sign: f32) -> Result<()> {
    let name = out.file_stem().unwrap_or(out.as_os_str());
    let place = out.with_extension("merging");
    if place.exists() {
        let message = format!("{} is in the way", place.display());
        return Err(failure(message, "remove it, or choose another --out"));
    }
    let made = || -> Result<()> {
        model.save_merged(&place.join(name), dtype, sign)?;
        let folder = Folder::open(&place.join(name))?;
        let kind = match dtype {
            Dtype::F16 => FileType::F16,
            Dtype::BF16 => FileType::BF16,
            _ => FileType::F32,
        };
        let planned = plan_tensors(folder.metadata(), folder.tensors(), &Options::new(kind))?;
        let types: Vec<BlockType> = planned.iter().map(|tensor| tensor.target).collect();
        let types = (kind.id(), types.as_slice());
        Ok(folder.write(model.store.cpu(), &RealDisk, out, types, |_, _| {})?)
    };
    let result = made();
    if place.is_dir() {
        std::fs::remove_dir_all(&place)?;
    }
    result
}
