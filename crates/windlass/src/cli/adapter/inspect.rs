//! `windlass adapter inspect`: what an adapter is.

use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use windlass::infer::AdapterFolder;
use windlass::model::AdapterConfig;

#[derive(clap::Args)]
pub struct Args {
    /// The folder of the adapter
    adapter: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn method(config: &AdapterConfig) -> &'static str {
    match (config.use_dora, config.use_rslora) {
        (true, _) => "DoRA",
        (false, true) => "rsLoRA",
        (false, false) => "LoRA",
    }
}

/// Whether a tensor is a table once more, under the name of the head that it is too.
fn is_copy(config: &AdapterConfig, name: &str) -> bool {
    let heads = [".lm_head.weight", ".embed_out.weight"];
    config.ensure_weight_tying && heads.iter().any(|head| name.ends_with(head))
}

/// Says what an adapter is.
pub fn inspect(args: &Args) -> Result<()> {
    let folder = AdapterFolder::open(&args.adapter)?;
    let config = &folder.config;
    let (mut parameters, mut kinds) = (0, Vec::new());
    let (mut modules, mut whole) = (0, Vec::new());
    for name in folder.tensors.names() {
        if !is_copy(config, name) {
            parameters += folder.tensors.get(name)?.elements();
        }
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
    if args.json {
        let mut json = config.to_json();
        json["parameters"] = json!(parameters);
        json["modules"] = json!(modules);
        println!("{json}");
        return Ok(());
    }
    println!(
        "method      {}, rank {}, alpha {}",
        method(config),
        config.r,
        config.lora_alpha
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
