//! `windlass adapter`: PEFT's adapters, looked at, merged into their models and taken out again, and combined.

use super::source::Source;
use super::{Machine, failure, usage};
use anyhow::Result;
use serde_json::json;
use std::path::{Path, PathBuf};
use windlass::compress::{FileType, Options, plan_tensors};
use windlass::infer::convert::Folder;
use windlass::infer::{AdapterFolder, LoadedModel, write_adapter};
use windlass::model::{AdapterConfig, Targets};
use windlass::progress::say;
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::BlockType;
use windlass::store::safetensors::Dtype;
use windlass::tensor::{DType, FileTensor, Layout};

/// What to do with adapters.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Write a model with its adapter merged, as a Hugging Face folder or GGUF file
    Merge(MergeArgs),
    /// Take an adapter out of a model it was merged into
    Unmerge(MergeArgs),
    /// Write several adapters as one that does what they do together
    Add(AddArgs),
    /// Make an adapter of what fine-tuning changed in a whole model
    Extract(ExtractArgs),
    /// Write an adapter as a GGUF file for llama.cpp, or one from there as PEFT's folder
    Convert(ConvertArgs),
    /// Say what an adapter is
    Inspect(InspectArgs),
}

#[derive(clap::Args)]
pub struct MergeArgs {
    #[command(flatten)]
    source: Source,
    /// The folder to write, or the file if it ends with .gguf
    #[arg(long, value_name = "DIR|FILE")]
    out: PathBuf,
    /// Storage type of the weights: F32, F16, BF16 [default: the model's, and BF16 for a packed one]
    #[arg(long = "type", short = 't', value_enum, value_name = "TYPE")]
    file_type: Option<Kind>,
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
pub struct AddArgs {
    /// The folders of the adapters
    #[arg(required = true, num_args = 2.., value_name = "ADAPTER")]
    adapters: Vec<PathBuf>,
    /// How much of each counts [default: 1 for each]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "W,W,...",
        allow_hyphen_values = true
    )]
    weights: Vec<f64>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
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

#[derive(clap::Args)]
pub struct InspectArgs {
    /// The folder of the adapter
    adapter: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Merge(args) => merge(&args, 1.0),
        Verb::Unmerge(args) => merge(&args, -1.0),
        Verb::Add(args) => add(&args),
        Verb::Extract(args) => extract(&args),
        Verb::Convert(args) => convert(&args),
        Verb::Inspect(args) => inspect(&args),
    }
}

fn merge(args: &MergeArgs, sign: f32) -> Result<()> {
    if args.source.adapter.is_none() {
        return Err(usage(
            "no --adapter",
            "name the adapter's folder with --adapter",
        ));
    }
    let model = args.source.open_without_tokenizer()?;
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

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "gguf")
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
    if args.source.adapter.is_none() {
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
    let model = args.source.open_without_tokenizer()?;
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

/// The tensors of an adapter, by their kind and module.
struct Read {
    folder: AdapterFolder,
    /// Module, `A`, `B`, rank.
    modules: Vec<(String, Vec<f32>, Vec<f32>, usize)>,
}

fn floats(folder: &AdapterFolder, name: &str) -> Result<(Vec<f32>, Vec<usize>)> {
    let view = folder.tensors.get(name)?;
    let mut out = vec![<f32 as Default>::default(); view.elements()];
    view.read_into(0..view.rows(), &mut out)?;
    Ok((out, view.shape.to_vec()))
}

fn read(path: &Path) -> Result<Read> {
    let folder = AdapterFolder::open(path)?;
    if folder.config.use_dora || !folder.config.modules_to_save.is_empty() {
        let message = format!(
            "{}: DoRA and modules that are saved whole do not add up",
            path.display()
        );
        return Err(failure(
            message,
            "merge such adapters one after another instead",
        ));
    }
    let names: Vec<String> = folder.tensors.names().map(str::to_owned).collect();
    let mut modules = Vec::new();
    for name in names {
        if let Some(module) = name.strip_suffix(".lora_A.weight") {
            let (a, shape) = floats(&folder, &name)?;
            let (b, _) = floats(&folder, &format!("{module}.lora_B.weight"))?;
            modules.push((module.to_owned(), a, b, shape[0]));
        }
    }
    Ok(Read { folder, modules })
}

/// Adds the factors of a module that several adapters have, and gives their rank.
fn put_together(
    module: &str,
    all: &[Read],
    weights: &[f64],
    tensors: &mut Vec<(FileTensor, Vec<f32>)>,
) -> Result<usize> {
    let mut parts = Vec::new();
    for (one, weight) in all.iter().zip(weights) {
        if let Some((_, a, b, r)) = one.modules.iter().find(|(name, ..)| name == module) {
            let scale = one
                .folder
                .config
                .scale(module.trim_start_matches("base_model.model."))?;
            parts.push((a, b, *r, (weight * scale) as f32));
        }
    }
    let rank: usize = parts.iter().map(|(_, _, r, _)| r).sum();
    let (_, b, r, _) = parts[0];
    let (inputs, outputs) = (parts[0].0.len() / r, b.len() / r);
    if parts
        .iter()
        .any(|(a, b, r, _)| a.len() != r * inputs || b.len() != r * outputs)
    {
        let message = format!("{module} has not the same shape in all adapters");
        return Err(failure(
            message,
            "adapters that are added belong to one model",
        ));
    }
    let a = parts
        .iter()
        .flat_map(|(a, _, _, s)| a.iter().map(move |v| v * s));
    let rows = (0..outputs).flat_map(|row| {
        parts
            .iter()
            .flat_map(move |(_, b, r, _)| b[row * r..(row + 1) * r].iter().copied())
    });
    tensors.push((
        tensor(module, "lora_A", [rank, inputs]),
        a.collect::<Vec<f32>>(),
    ));
    tensors.push((tensor(module, "lora_B", [outputs, rank]), rows.collect()));
    Ok(rank)
}

/// One adapter whose factors are those of all, side by side: its product is the weighted sum of theirs, exactly.
fn add(args: &AddArgs) -> Result<()> {
    let weights = match args.weights.as_slice() {
        [] => vec![1.0; args.adapters.len()],
        some if some.len() == args.adapters.len() => some.to_vec(),
        some => {
            let message = format!(
                "{} --weights for {} adapters",
                some.len(),
                args.adapters.len()
            );
            return Err(usage(message, "give one for each"));
        }
    };
    let all: Vec<Read> = args
        .adapters
        .iter()
        .map(|path| read(path))
        .collect::<Result<_>>()?;
    let mut order: Vec<&str> = Vec::new();
    for (module, ..) in all.iter().flat_map(|one| &one.modules) {
        if !order.contains(&module.as_str()) {
            order.push(module);
        }
    }
    let (mut tensors, mut ranks) = (Vec::new(), Vec::new());
    for module in order {
        let rank = put_together(module, &all, &weights, &mut tensors)?;
        ranks.push((
            module.trim_start_matches("base_model.model.").to_owned(),
            rank,
        ));
    }
    let rank = ranks.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
    let names = ranks.iter().map(|(name, _)| name.clone()).collect();
    let others = ranks.into_iter().filter(|(_, r)| *r != rank);
    let exact = |name: &str| name.replace('.', "\\.");
    let others: Vec<(String, usize)> = others.map(|(name, r)| (exact(&name), r)).collect();
    let config = AdapterConfig {
        r: rank,
        lora_alpha: rank as f64,
        target_modules: Targets::Names(names),
        alpha_pattern: others
            .iter()
            .map(|(name, r)| (name.clone(), *r as f64))
            .collect(),
        rank_pattern: others,
        fan_in_fan_out: all[0].folder.config.fan_in_fan_out,
        base_model_name_or_path: all[0].folder.config.base_model_name_or_path.clone(),
        ..AdapterConfig::default()
    };
    write_adapter(&args.out, &config, &tensors)?;
    println!("{}: rank {rank}", args.out.display());
    Ok(())
}

fn tensor(module: &str, kind: &str, shape: [usize; 2]) -> FileTensor {
    FileTensor {
        name: format!("{module}.{kind}.weight"),
        shape: shape.into(),
        parts: Vec::new(),
        layout: Layout::Rows,
    }
}

fn inspect(args: &InspectArgs) -> Result<()> {
    let folder = AdapterFolder::open(&args.adapter)?;
    let config = &folder.config;
    let (mut parameters, mut kinds) = (0, Vec::new());
    let (mut modules, mut whole) = (0, Vec::new());
    for name in folder.tensors.names() {
        parameters += folder.tensors.get(name)?.elements();
        match name.split_once(".lora_") {
            Some((module, rest)) => {
                modules += usize::from(rest.starts_with("A."));
                let kind = module.rsplit('.').next().unwrap_or(module).to_owned();
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
            None => whole.push(name.to_owned()),
        }
    }
    let method = match (config.use_dora, config.use_rslora) {
        (true, _) => "DoRA",
        (false, true) => "rsLoRA",
        (false, false) => "LoRA",
    };
    if args.json {
        let mut json = config.to_json();
        json["parameters"] = json!(parameters);
        json["modules"] = json!(modules);
        println!("{json}");
        return Ok(());
    }
    println!(
        "method      {method}, rank {}, alpha {}",
        config.r, config.lora_alpha
    );
    for (name, patterns) in [
        (
            "ranks",
            config
                .rank_pattern
                .iter()
                .map(|(n, r)| format!("{n}: {r}"))
                .collect::<Vec<_>>(),
        ),
        (
            "alphas",
            config
                .alpha_pattern
                .iter()
                .map(|(n, a)| format!("{n}: {a}"))
                .collect(),
        ),
    ] {
        if !patterns.is_empty() {
            println!("{name:<11} {}", patterns.join(", "));
        }
    }
    println!(
        "base        {}",
        config
            .base_model_name_or_path
            .as_deref()
            .unwrap_or("not said")
    );
    println!("modules     {modules} ({})", kinds.join(", "));
    if !whole.is_empty() {
        println!("whole       {}", whole.join(", "));
    }
    println!("parameters  {parameters}");
    Ok(())
}
