//! `windlass bench serve`: many clients at once, without a server: throughput beside what each client waits for.

use crate::cli::source::Source;
use anyhow::Result;
use std::time::Instant;
use windlass::infer::engine::{Engine, EngineOptions};
use windlass::infer::workload::{Load, Workload};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Clients at once, each sending its next request when it has the answer to the last one; a row for each number
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [1, 2, 4, 8])]
    clients: Vec<usize>,
    /// Requests of each client
    #[arg(short = 'r', long, value_name = "N", default_value_t = 3)]
    requests: usize,
    /// Mean length of the prompts in tokens
    #[arg(short = 'p', long, value_name = "N", default_value_t = 512)]
    n_prompt: usize,
    /// Mean length of the answers in tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    n_gen: usize,
    /// Standard deviation of both lengths, as a share of the mean
    #[arg(long, value_name = "SHARE", default_value_t = 0.3)]
    spread: f64,
    /// Tokens of one pass through the model
    #[arg(long, value_name = "N", default_value_t = 512)]
    token_budget: usize,
    /// Decides lengths and tokens of the requests
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object a row
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let mut model = args.source.open_without_tokenizer()?;
    if !args.json {
        println!(
            "| clients | requests/s | prompt t/s | answer t/s | first token p50 / p90 / p95 | between tokens p50 / p90 / p95 | answer p50 / p90 / p95 | tokens a step |"
        );
        println!("|---:|---:|---:|---:|---:|---:|---:|---:|");
    }
    for &clients in &args.clients {
        let workload = Workload {
            requests: args.requests * clients,
            clients,
            prompt_tokens: args.n_prompt,
            new_tokens: args.n_gen,
            spread: args.spread,
            seed: args.seed,
        };
        let options = EngineOptions {
            token_budget: args.token_budget,
            max_sequences: clients,
            max_waiting: clients,
            kv_tokens: workload.kv_tokens(),
            ..EngineOptions::default()
        };
        let mut engine = Engine::new(model, options)?;
        let start = Instant::now();
        let load = workload.drive(&mut engine, &mut || start.elapsed().as_secs_f64())?;
        model = engine.into_model();
        match args.json {
            true => println!("{}", serde_json::to_string(&load)?),
            false => row(&load),
        }
    }
    Ok(())
}

fn row(load: &Load) {
    let waits = [load.first_token, load.between_tokens, load.answer].map(|q| {
        let show = |seconds: f64| match seconds < 1.0 {
            true => format!("{:.0} ms", 1e3 * seconds),
            false => format!("{seconds:.2} s"),
        };
        format!("{} / {} / {}", show(q.p50), show(q.p90), show(q.p95))
    });
    println!(
        "| {} | {:.3} | {:.1} | {:.1} | {} | {:.1} |",
        load.clients,
        load.requests_per_second,
        load.prompt_tokens_per_second,
        load.new_tokens_per_second,
        waits.join(" | "),
        load.tokens_per_step,
    );
}
