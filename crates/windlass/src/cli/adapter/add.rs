//! `windlass adapter add`: several adapters as one.

use crate::cli::{failure, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use windlass::infer::{AdapterFolder, write_adapter};
use windlass::model::{AdapterConfig, Targets};
use windlass::tensor::{FileTensor, Layout};

#[derive(clap::Args)]
pub struct Args {
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
pub fn add(args: &Args) -> Result<()> {
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
