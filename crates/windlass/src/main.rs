//! The `windlass` command: parses, runs, reports errors with a hint, exits 0, 1 or 2.

use clap::{Parser, Subcommand};
use std::process::ExitCode;

mod cli;

/// Mechanical advantage for language models: train, run and measure them on the machine at hand.
#[derive(Parser)]
#[command(name = "windlass", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a small model on a built-in corpus in about a minute, score it, save it and let it speak
    Quickstart(cli::quickstart::Args),
    /// Train a model from scratch or from a Hugging Face folder
    Train(Box<cli::train::Args>),
    /// Fine-tune a model on samples: adapters, on plain or packed weights, or all weights
    Finetune(Box<cli::finetune::Args>),
    /// Show samples as a model would be trained on them
    #[command(subcommand)]
    Data(cli::lessons::Verb),
    /// Start ranks on one host or many, and start a training that failed again
    Launch(cli::launch::Args),
    /// Look at a checkpoint, verify it, or write its f32 masters as a Hugging Face folder
    #[command(subcommand)]
    Checkpoint(cli::checkpoint::Verb),
    /// Look at an adapter, merge it into its model, take it out, or add several
    #[command(subcommand)]
    Adapter(cli::adapter::Verb),
    /// Continue prompts with a model
    Generate(cli::generate::Args),
    /// Talk with a model through its chat template
    Chat(Box<cli::chat::Args>),
    /// Serve a model over HTTP, as OpenAI's API has it
    Serve(Box<cli::serve::Args>),
    /// Show the tokens of a text or of a conversation
    Tokenize(cli::tokenize::Args),
    /// Measure a model: perplexity of a text, or multiple-choice questions
    Eval(cli::eval::Args),
    /// Say what a model's file holds and what it takes to run it
    Inspect(cli::inspect::Args),
    /// Write a Hugging Face folder as a GGUF file, or a GGUF file as a folder
    Convert(cli::convert::Args),
    /// Write a GGUF file with fewer bits
    Quantize(Box<cli::quantize::Args>),
    /// Measure on a text how much each column of a model's matrices matters, for `quantize --imatrix`
    Imatrix(cli::imatrix::Args),
    /// Measure this machine: training steps or single kernels
    Bench(cli::bench::Args),
    /// Read a ds_config.json and say what becomes of each key
    Config(cli::config::Args),
    /// Estimate the memory that training a model takes, by DeepSpeed's formulas
    Estimate(cli::estimate::Args),
    /// Measure a disk for state that is offloaded to it
    Io(cli::io::Args),
    /// Say what this machine offers and which kernels will run
    Info(cli::info::Args),
}

fn main() -> ExitCode {
    cli::end_when_nobody_reads();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Quickstart(args) => cli::quickstart::run(args),
        Command::Train(args) => cli::train::run(*args),
        Command::Finetune(args) => cli::finetune::run(*args),
        Command::Data(verb) => cli::lessons::run(verb),
        Command::Launch(args) => cli::launch::run(args),
        Command::Checkpoint(verb) => cli::checkpoint::run(verb),
        Command::Adapter(verb) => cli::adapter::run(verb),
        Command::Generate(args) => cli::generate::run(args),
        Command::Chat(args) => cli::chat::run(&args),
        Command::Serve(args) => cli::serve::run(*args),
        Command::Tokenize(args) => cli::tokenize::run(args),
        Command::Eval(args) => cli::eval::run(args),
        Command::Inspect(args) => cli::inspect::run(args),
        Command::Convert(args) => cli::convert::run(args),
        Command::Quantize(args) => cli::quantize::run(*args),
        Command::Imatrix(args) => cli::imatrix::run(args),
        Command::Bench(args) => cli::bench::run(args),
        Command::Config(args) => cli::config::run(args),
        Command::Estimate(args) => cli::estimate::run(args),
        Command::Io(args) => cli::io::run(args),
        Command::Info(args) => cli::info::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::report(&error),
    }
}
