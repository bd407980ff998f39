//! `windlass config`: what a `ds_config.json` comes to, before anything runs.

use super::usage;
use anyhow::Result;
use serde_json::{Value, json};
use std::path::PathBuf;
use windlass::train::Error;
use windlass::train::config::{Auto, Config, Context, Invalid, Origin, Row, Status};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Print every key with its value, where it came from, and what becomes of it; exit 1 when the file cannot be used
    Check(Check),
}

/// Flags of `config check`. Those about the run fill in what the file leaves to "auto".
#[derive(clap::Args)]
struct Check {
    /// The configuration: a file (JSON with comments), or the JSON in base64
    file: PathBuf,
    /// Data-parallel ranks of the run
    #[arg(long, default_value_t = 1, value_name = "N")]
    ranks: u64,
    /// Sequences of one forward pass of one rank
    #[arg(long, value_name = "N")]
    micro_batch: Option<u64>,
    /// Forward passes of one optimizer step
    #[arg(long, value_name = "N")]
    grad_accum: Option<u64>,
    /// Largest gradient norm
    #[arg(long, value_name = "NORM")]
    clip: Option<f64>,
    /// Learning rate
    #[arg(long)]
    lr: Option<f64>,
    /// Decay of the mean gradient and of the mean squared gradient
    #[arg(long, num_args = 2, value_names = ["BETA1", "BETA2"])]
    betas: Option<Vec<f64>>,
    /// Added to the root of the second moment
    #[arg(long)]
    eps: Option<f64>,
    /// Decay of weights
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Steps of the warm-up
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// Steps of the run
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Width of the model
    #[arg(long, value_name = "N")]
    hidden_size: Option<u64>,
    /// Set a key before the file does, for example zero_optimization.stage=3
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the known keys that the file leaves alone, too
    #[arg(long)]
    all: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Check(check) => check.run(),
    }
}

impl Check {
    fn run(&self) -> Result<()> {
        let context = self.context()?;
        let config = match Config::load(&self.file, &context) {
            Ok(config) => config,
            Err(error) => {
                if let (Error::Config(invalid), true) = (&error, self.json) {
                    print_invalid(invalid);
                }
                return Err(error.into());
            }
        };
        let rows: Vec<&Row> = config
            .report()
            .iter()
            .filter(|row| self.shows(row))
            .collect();
        if self.json {
            let fingerprint: String = config
                .fingerprint()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let report = json!({
                "file": self.file, "ranks": self.ranks, "usable": true, "fingerprint": fingerprint, "keys": rows,
                "notes": config.remarks(),
            });
            println!("{report}");
            return Ok(());
        }
        for line in table(&rows) {
            println!("{line}");
        }
        for note in config.remarks() {
            eprintln!("note: {note}");
        }
        Ok(())
    }

    fn context(&self) -> Result<Context> {
        if self.ranks == 0 {
            return Err(usage("--ranks 0", "a run has at least one rank"));
        }
        let overrides: Result<Vec<_>> = self.set.iter().map(|text| setting(text)).collect();
        Ok(Context {
            world_size: self.ranks,
            auto: Auto {
                train_micro_batch_size_per_gpu: self.micro_batch,
                gradient_accumulation_steps: self.grad_accum,
                gradient_clipping: self.clip,
                lr: self.lr,
                betas: self.betas.as_ref().map(|betas| (betas[0], betas[1])),
                eps: self.eps,
                weight_decay: self.weight_decay,
                warmup_num_steps: self.warmup_steps,
                total_num_steps: self.steps,
                fp16: None,
                bf16: None,
                hidden_size: self.hidden_size,
            },
            overrides: overrides?,
        })
    }

    /// Whether a row is in the table: what the file or the run says, and what is honoured.
    fn shows(&self, row: &Row) -> bool {
        self.all || row.origin != Origin::Default || row.status == Status::Honoured
    }
}

/// A setting such as `zero_optimization.stage=3`; a value that is no JSON is a text.
fn setting(text: &str) -> Result<(String, Value)> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(usage(
            format!("--set {text}"),
            "write KEY=VALUE, for example --set zero_optimization.stage=3",
        ));
    };
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_owned()));
    Ok((key.trim().to_owned(), value))
}

/// The lines of a table of keys.
pub(super) fn table(rows: &[&Row]) -> Vec<String> {
    let cells: Vec<[String; 4]> = rows
        .iter()
        .map(|row| {
            let becomes = match row.status.why() {
                Some(why) => format!("{}: {why}", row.status.name()),
                None => row.status.name().to_owned(),
            };
            let value = match &row.value {
                Value::Null => "-".to_owned(),
                value => value.to_string(),
            };
            [row.key.clone(), value, row.origin.to_string(), becomes]
        })
        .collect();
    let head = ["key", "value", "from", "here"].map(str::to_owned);
    let width = |column: usize| {
        let longest = cells.iter().map(|row| row[column].chars().count()).max();
        longest.unwrap_or(0).max(head[column].len())
    };
    let [w0, w1, w2] = [width(0), width(1), width(2)];
    let line = |row: &[String; 4]| {
        let [key, value, from, here] = row;
        let line = format!("{key:w0$}  {value:w1$}  {from:w2$}  {here}");
        line.trim_end().to_owned()
    };
    std::iter::once(&head).chain(&cells).map(line).collect()
}

fn print_invalid(invalid: &Invalid) {
    let report = json!({ "file": invalid.name, "usable": false, "problems": invalid.problems });
    println!("{report}");
}
