//! `windlass estimate`: the memory that training a model takes: by DeepSpeed's formulas, and by replaying a step of this
//! program without its arithmetic.

use super::drive::bytes;
use super::io::parse_size;
use super::{fits, usage};
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use windlass::model::{DecoderConfig, decoder, preset_config};
use windlass::store::{Placement, Stage, Tier};
use windlass::tensor::{Category, DType};
use windlass::train::estimate::{
    Hardware, ModelSize, zero2_rows, zero2_table, zero3_rows, zero3_table,
};
use windlass::train::{EngineOptions, Fit, Outline, StepShape, fit, plan_rank};

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
    /// Sequences of a step on each rank, for this program's own prediction
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens of a sequence [default: 512, or the model's context where that is shorter]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    seq_len: Option<u32>,
    /// Predict with the layers run again in the backward pass
    #[arg(long)]
    checkpoint_activations: bool,
    /// Memory of each machine, such as 4G: says whether training fits, and if not, which setting would make it fit
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "params")]
    memory: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The model to estimate.
struct Subject {
    name: String,
    size: ModelSize,
    config: Option<DecoderConfig>,
}

/// What a rank takes in one stage, on one tier.
#[derive(serde::Serialize)]
struct Predicted {
    stage: u8,
    offload: &'static str,
    weights: usize,
    gradients: usize,
    optimizer: usize,
    activations: usize,
    workspace: usize,
    /// The most that is taken from the system at a time.
    peak: usize,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let subject = args.subject()?;
    let hardware = Hardware {
        nodes: args.nodes,
        ranks_per_node: args.ranks_per_node,
    };
    let predicted = args.predict(&subject);
    let advice = args.advise(&subject);
    if args.json {
        let mut report = json!({
            "model": subject.name, "size": subject.size, "hardware": hardware,
            "predicted": predicted, "deepspeed": {
                "zero2": zero2_rows(subject.size, hardware), "zero3": zero3_rows(subject.size, hardware),
            },
        });
        if let Some(fit) = &advice {
            report["memory"] = json!({
                "fits": fit.fits, "settings": fits::settings(&fit.changes), "peak": fit.bytes,
            });
        }
        println!("{report}");
        return Ok(());
    }
    let [two, three] = sections(&subject, hardware);
    print!("{two}\n{three}");
    if !predicted.is_empty() {
        print!("\n{}", table(&subject, &args, &predicted));
    }
    if let Some(fit) = &advice {
        println!("\n{}", args.told(fit));
    }
    Ok(())
}

/// Our own prediction, activations and buffers included.
fn table(subject: &Subject, args: &Args, rows: &[Predicted]) -> String {
    use std::fmt::Write;
    let ranks = args.ranks_per_node * args.nodes;
    let mut text = format!(
        "{}, by this program, for each of {ranks} ranks: bf16 with f32 masters, AdamW, {} sequences of {} tokens a rank\n  \
         peak      weights   gradients  optimizer  activations  workspace | options\n",
        subject.name,
        args.batch,
        args.tokens(subject),
    );
    for row in rows {
        let gb = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
        let _ = writeln!(
            text,
            "{:>7.2}GB {:>9.2}GB {:>9.2}GB {:>8.2}GB {:>10.2}GB {:>8.2}GB | stage {}, offload {}",
            gb(row.peak),
            gb(row.weights),
            gb(row.gradients),
            gb(row.optimizer),
            gb(row.activations),
            gb(row.workspace),
            row.stage,
            row.offload,
        );
    }
    text
}

/// DeepSpeed's tables for stage 2 and for stage 3.
fn sections(subject: &Subject, hardware: Hardware) -> [String; 2] {
    let heading =
        |stage: &str, table: String| format!("{}, {stage}, by DeepSpeed:\n{table}", subject.name);
    [
        heading("ZeRO-2", zero2_table(subject.size, hardware)),
        heading("ZeRO-3", zero3_table(subject.size, hardware)),
    ]
}

impl Args {
    /// Tokens of a sequence.
    fn tokens(&self, subject: &Subject) -> usize {
        let context = |config: &DecoderConfig| 512.min(config.max_position_embeddings);
        let usual = subject.config.as_ref().map_or(512, context);
        self.seq_len.map_or(usual, |n| n as usize)
    }

    /// What makes training at stage 0 fit in the memory that was given.
    fn advise(&self, subject: &Subject) -> Option<Fit> {
        let limit = self.memory? / self.ranks_per_node as usize;
        let run = Outline {
            dtype: DType::Bf16,
            options: self.options(),
            shape: self.shape(subject),
            placement: Placement::default(),
            ranks: (self.ranks_per_node * self.nodes) as usize,
        };
        Some(fit(subject.config.as_ref()?, run, limit))
    }

    /// The advice in words.
    fn told(&self, fit: &Fit) -> String {
        let limit = bytes(self.memory.unwrap_or_default());
        let needed = bytes(fit.bytes * self.ranks_per_node as usize);
        let settings = fits::settings(&fit.changes);
        match (fit.fits, fit.changes.is_empty()) {
            (true, true) => {
                format!("fits in {limit} at stage 0 as it is: {needed} on each machine")
            }
            (true, false) => format!("fits in {limit} with {settings}: {needed} on each machine"),
            (false, _) => format!(
                "does not fit in {limit}: the least is {needed} on each machine, with {settings}"
            ),
        }
    }

    fn options(&self) -> EngineOptions {
        EngineOptions {
            activation_checkpointing: self.checkpoint_activations,
            ..EngineOptions::default()
        }
    }

    fn shape(&self, subject: &Subject) -> StepShape {
        StepShape {
            micro_batch: self.batch as usize,
            seq_len: self.tokens(subject),
            gradient_accumulation_steps: 1,
        }
    }

    /// A step of each stage, and of stage 3 with everything on a disk, without its arithmetic.
    fn predict(&self, subject: &Subject) -> Vec<Predicted> {
        let Some(config) = &subject.config else {
            return Vec::new();
        };
        let (options, shape) = (self.options(), self.shape(subject));
        let ranks = (self.ranks_per_node * self.nodes) as usize;
        let stages = (0..4)
            .filter_map(Stage::from_number)
            .map(|stage| (stage, Tier::Memory));
        let rows = stages.chain([(Stage::Parameters, Tier::Nvme)]);
        rows.map(|(stage, tier)| {
            let placement = Placement {
                stage,
                parameters: tier,
                optimizer: tier,
                ..Placement::default()
            };
            let memory = plan_rank(config, DType::Bf16, options, shape, placement, ranks).memory;
            Predicted {
                stage: stage.number(),
                offload: if tier == Tier::Nvme { "nvme" } else { "none" },
                weights: memory.of(Category::Weights),
                gradients: memory.of(Category::Gradients),
                optimizer: memory.of(Category::Optimizer),
                activations: memory.of(Category::Activations),
                workspace: memory.of(Category::Workspace),
                peak: memory.reserved,
            }
        })
        .collect()
    }

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
                config: None,
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
        Ok(Subject {
            name,
            size,
            config: Some(config),
        })
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
