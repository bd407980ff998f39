//! Flags about the adapter that is trained, and how it begins.

use super::{Args as All, Method};
use crate::cli::source::Packing;
use crate::cli::usage;
use anyhow::Result;
use clap::ValueEnum;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use windlass::infer::LoadedModel;
use windlass::model::{AdapterConfig, Targets};
use windlass::progress::say;
use windlass::store::atomic::RealDisk;

/// The folder of matrices that LoftQ changed, in that of the run.
const BASE: &str = "base";

/// The folder of the run's own base, where LoftQ has made one.
pub fn own_base(all: &All) -> Option<PathBuf> {
    Some(all.out.join(BASE)).filter(|folder| folder.is_dir())
}

/// The flags that open the model as the adapter was trained with it.
pub fn base(all: &All) -> String {
    if let Some(base) = own_base(all) {
        return format!("--model {}", base.display());
    }
    let packs = all.method == Method::Qlora && !all.model.ends_with(".gguf");
    let packing = all.load_in.unwrap_or(Packing::Q4).to_possible_value();
    match packing.filter(|_| packs || all.load_in.is_some()) {
        Some(packing) => format!("--model {} --load-in {}", all.model, packing.get_name()),
        None => format!("--model {}", all.model),
    }
}

/// How a new adapter begins.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// It changes nothing: A even between bounds, B zero
    Zero,
    /// The same with a normal A
    Gaussian,
    /// With qlora: it makes up for what packing takes from the matrices
    Loftq,
}

/// The adapter that is trained.
#[derive(clap::Args)]
pub struct Args {
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value_t = 16)]
    rank: usize,
    /// Scale of the adapters, times the rank
    #[arg(long, default_value_t = 32.0)]
    alpha: f64,
    /// Part of an adapter's input that is dropped in training
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Modules that get adapters: all-linear, the ends of names, or a pattern of whole names
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAME,...",
        default_value = "all-linear"
    )]
    target: Vec<String>,
    /// Modules that are trained and saved whole, such as embed_tokens,lm_head; a table that is the head too stays one
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    modules_to_save: Vec<String>,
    /// Scale by the root of the rank
    #[arg(long)]
    rslora: bool,
    /// How a new adapter begins
    #[arg(long, value_enum, default_value_t = Init::Zero)]
    init: Init,
    /// loftq: how often in turn matrices are packed and the adapter is made of what that takes from them
    #[arg(long, value_name = "N", default_value = "1")]
    loftq_iterations: NonZeroUsize,
}

/// Gives the model a new adapter.
pub fn begin(args: &All, path: &Path, model: &mut LoadedModel) -> Result<()> {
    let given = &args.adapter;
    if given.init != Init::Loftq && given.loftq_iterations.get() > 1 {
        return Err(usage(
            "--loftq-iterations without --init loftq",
            "add --init loftq",
        ));
    }
    match given.init {
        Init::Loftq => loftq(args, path, model),
        Init::Zero | Init::Gaussian => {
            let config = config(args, model)?;
            Ok(model.new_adapter(&config, args.seed)?)
        }
    }
}

/// Gives the model an adapter that makes up for packing.
fn loftq(args: &All, path: &Path, model: &mut LoadedModel) -> Result<()> {
    let turns = args.adapter.loftq_iterations.get();
    let config = config(args, model)?;
    if args.plan {
        return Ok(model.new_adapter(&config, args.seed)?);
    }
    let folder = args.out.join("init");
    let told = model.loftq(path, &config, turns, &folder)?;
    say(&format!(
        "loftq: of what packing takes from {} modules, the adapter leaves {:.1} %",
        told.modules,
        100.0 * told.rest / told.change.max(f64::MIN_POSITIVE)
    ));
    if turns > 1 {
        let base = args.out.join(BASE);
        model.save_packed(&RealDisk, &base)?;
        say(&format!(
            "loftq: the matrices are others now: the adapter belongs to {}",
            base.display()
        ));
    }
    Ok(model.add_adapter(&folder)?)
}

/// The modules that a flag names.
pub fn targets(given: &[String]) -> Targets {
    match given {
        [one] if one == "all-linear" => Targets::AllLinear,
        [one] if one.contains(['*', '\\', '(', '[', '|', '+', '^', '$']) => {
            Targets::Pattern(one.clone())
        }
        some => Targets::Names(some.to_vec()),
    }
}

/// The settings of a new adapter.
fn config(args: &All, model: &LoadedModel) -> Result<AdapterConfig> {
    let given = &args.adapter;
    let target_modules = targets(&given.target);
    let use_dora = args.method == Method::Dora;
    let config = AdapterConfig {
        file: "the flags".into(),
        r: given.rank,
        lora_alpha: given.alpha,
        lora_dropout: given.dropout,
        use_rslora: given.rslora,
        use_dora,
        gaussian: given.init == Init::Gaussian,
        target_modules,
        modules_to_save: given.modules_to_save.clone(),
        ensure_weight_tying: model.config.tie_word_embeddings,
        base_model_name_or_path: Some(args.model.clone()),
        ..AdapterConfig::default()
    };
    config.check()?;
    Ok(config)
}
