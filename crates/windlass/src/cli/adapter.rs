//! `windlass adapter`: PEFT's adapters, looked at, merged into their models and taken out again, and combined.

mod add;
mod inspect;
mod merge;

use super::source::Source;
use super::{Machine, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use windlass::infer::LoadedModel;
use windlass::model::AdapterConfig;
use windlass::progress::say;
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::BlockType;
use windlass::tensor::DType;

/// What to do with adapters.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Write a model with its adapter merged, as a Hugging Face folder or GGUF file
    Merge(merge::Args),
    /// Take an adapter out of a model it was merged into
    Unmerge(merge::Args),
    /// Write several adapters as one that does what they do together
    Add(add::Args),
    /// Make an adapter of what fine-tuning changed in a whole model
    Extract(ExtractArgs),
    /// Write an adapter as a GGUF file for llama.cpp, or one from there as PEFT's folder
    Convert(ConvertArgs),
    /// Say what an adapter is
    Inspect(inspect::Args),
}

#[derive(clap::ValueEnum, Clone, Copy)]
enum Kind {
    #[value(name = "F32", alias = "f32")]
    F32,
    #[value(name = "F16", alias = "f16")]
    F16,
    #[value(name = "BF16", alias = "bf16")]
    Bf16,
}

#[derive(clap::Args)]
pub struct ExtractArgs {
    /// The model as it was: a Hugging Face folder or id, or a GGUF file
    #[arg(long, value_name = "PATH|ID")]
    base: String,
    /// The model as it is now
    #[arg(long, short, value_name = "PATH|ID")]
    model: String,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value_t = 16)]
    rank: usize,
    /// Scale of the adapters, times the rank [default: the rank]
    #[arg(long)]
    alpha: Option<f64>,
    /// Modules that get adapters: all-linear, the ends of names, or a pattern of whole names
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "all-linear"
    )]
    target: Vec<String>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    machine: Machine,
}

#[derive(clap::Args)]
pub struct ConvertArgs {
    #[command(flatten)]
    source: Source,
    /// The file to write, if it ends with .gguf, or the folder
    #[arg(long, value_name = "FILE|DIR")]
    out: PathBuf,
    /// Storage type in a GGUF file [default: F32]
    #[arg(long = "type", short = 't', value_enum, value_name = "TYPE")]
    file_type: Option<Kind>,
}

/// Runs the verb.
pub fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Merge(args) => merge::merge(&args, 1.0),
        Verb::Unmerge(args) => merge::merge(&args, -1.0),
        Verb::Add(args) => add::add(&args),
        Verb::Extract(args) => extract(&args),
        Verb::Convert(args) => convert(&args),
        Verb::Inspect(args) => inspect::inspect(&args),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "gguf")
}

fn extract(args: &ExtractArgs) -> Result<()> {
    let cpu = args.machine.cpu()?;
    let open = |path: &str| -> Result<LoadedModel> {
        let path = windlass::hub::resolve(path)?;
        let model = LoadedModel::open(&cpu, &path, Some(DType::F32))?;
        model
            .notes
            .iter()
            .for_each(|note| say(&format!("note: {note}")));
        Ok(model)
    };
    let config = AdapterConfig {
        file: "the flags".into(),
        r: args.rank,
        lora_alpha: args.alpha.unwrap_or(args.rank as f64),
        target_modules: super::finetune::targets(&args.target),
        base_model_name_or_path: Some(args.base.clone()),
        ..AdapterConfig::default()
    };
    config.check()?;
    let (base, tuned) = (open(&args.base)?, open(&args.model)?);
    let told = base.extract_adapter(&tuned, &config, &args.out)?;
    if !told.others.is_empty() {
        let (count, shown) = (
            told.others.len(),
            told.others[..told.others.len().min(3)].join(", "),
        );
        say(&format!(
            "note: {count} tensors that get no adapter differ too, and stay as they are in the base: {shown}"
        ));
    }
    let left = 100.0 * told.rest / told.change.max(f64::MIN_POSITIVE);
    println!(
        "{}: {} modules, rank {}, {left:.2} % of the change is left out",
        args.out.display(),
        told.modules,
        args.rank
    );
    Ok(())
}

fn convert(args: &ConvertArgs) -> Result<()> {
    if args.source.adapter.is_empty() {
        return Err(usage(
            "no --adapter",
            "name the adapter's folder or GGUF file with --adapter",
        ));
    }
    let is_file = is_gguf(&args.out);
    if !is_file && args.file_type.is_some() {
        let message = "--type, and --out is a folder";
        return Err(usage(message, "folders hold F32, as PEFT writes them"));
    }
    let model = args.source.open_unread()?;
    match is_file {
        true => {
            let kind = match args.file_type {
                None | Some(Kind::F32) => BlockType::F32,
                Some(Kind::F16) => BlockType::F16,
                Some(Kind::Bf16) => BlockType::BF16,
            };
            model.save_adapter_gguf(&RealDisk, &args.out, kind)?;
        }
        false => model.save_adapter(&args.out)?,
    }
    let modules = model.adapter.as_ref().map_or(0, |a| a.modules.len());
    println!("{}: {modules} modules", args.out.display());
    Ok(())
}
