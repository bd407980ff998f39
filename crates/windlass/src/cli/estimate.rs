//! `windlass estimate`: the memory that training a model takes, by DeepSpeed's formulas.

use super::usage;
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use windlass::model::{DecoderConfig, decoder, preset_config};
use windlass::train::estimate::{
    Hardware, ModelSize, zero2_rows, zero2_table, zero3_rows, zero3_table,
};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// A model: a Hugging Face folder
    #[arg(long, value_name = "FOLDER", group = "which")]
    model: Option<PathBuf>,
    /// A new model of this size (1m, 3m, 15m, 42m, 110m, 350m, 1b)
    #[arg(long, group = "which")]
    size: Option<String>,
    /// Architecture of a new model (llama, gpt2, qwen3, ...)
    #[arg(long, default_value = "llama", conflicts_with_all = ["model", "params"])]
    arch: String,
    /// Vocabulary of a new model
    #[arg(long, default_value_t = 32_000, value_name = "N", conflicts_with_all = ["model", "params"])]
    vocab_size: usize,
    /// A model of this many parameters, also written 7e9
    #[arg(long, value_name = "N", group = "which", value_parser = count, requires = "largest_layer")]
    params: Option<u64>,
    /// Parameters of its largest layer
    #[arg(long, value_name = "N", value_parser = count, requires = "params")]
    largest_layer: Option<u64>,
    /// Ranks of each machine
    #[arg(long, default_value_t = 1, value_name = "G", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    ranks_per_node: u64,
    /// Machines
    #[arg(long, default_value_t = 1, value_name = "M", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    nodes: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The model to estimate.
struct Subject {
    name: String,
    size: ModelSize,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let subject = args.subject()?;
    let hardware = Hardware {
        nodes: args.nodes,
        ranks_per_node: args.ranks_per_node,
    };
    if args.json {
        let report = json!({
            "model": subject.name, "size": subject.size, "hardware": hardware,
            "deepspeed": {
                "zero2": zero2_rows(subject.size, hardware), "zero3": zero3_rows(subject.size, hardware),
            },
        });
        println!("{report}");
        return Ok(());
    }
    let [two, three] = sections(&subject, hardware);
    print!("{two}\n{three}");
    Ok(())
}

/// What is printed for stage 2 and for stage 3: one table below the other. Predictions of this program's own belong here.
fn sections(subject: &Subject, hardware: Hardware) -> [String; 2] {
    let heading =
        |stage: &str, table: String| format!("{}, {stage}, by DeepSpeed:\n{table}", subject.name);
    [
        heading("ZeRO-2", zero2_table(subject.size, hardware)),
        heading("ZeRO-3", zero3_table(subject.size, hardware)),
    ]
}

impl Args {
    fn subject(&self) -> Result<Subject> {
        if let (Some(total_params), Some(largest_layer_params)) = (self.params, self.largest_layer)
        {
            if largest_layer_params > total_params {
                return Err(usage(
                    format!("--largest-layer {largest_layer_params}"),
                    format!("the model has {total_params} parameters in all"),
                ));
            }
            return Ok(Subject {
                name: "a model".to_owned(),
                size: ModelSize {
                    total_params,
                    largest_layer_params,
                },
            });
        }
        let (name, config) = match (&self.model, &self.size) {
            (Some(folder), _) => (folder.display().to_string(), DecoderConfig::load(folder)?),
            (None, Some(size)) => {
                let text = preset_config(&self.arch, size, self.vocab_size)?;
                let name = format!("{} {size}", self.arch);
                (name, DecoderConfig::from_json("--size", &text)?)
            }
            (None, None) => {
                return Err(usage(
                    "no model is given",
                    "give --model FOLDER, --size SIZE, or --params N with --largest-layer N",
                ));
            }
        };
        let size = ModelSize::of(decoder(&config).units());
        Ok(Subject { name, size })
    }
}

/// A whole number, also written `7e9`.
fn count(text: &str) -> Result<u64, String> {
    let number: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    match number.fract() == 0.0 && (1.0..1e18).contains(&number) {
        true => Ok(number as u64),
        false => Err("it must be a whole number from 1 to 1e18".to_owned()),
    }
}
