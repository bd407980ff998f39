//! `windlass eval`: how well a model predicts a text, answers questions with choices, or its bare logits.

use super::source::{Source, misuse};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use windlass::infer::score::{Tally, parse_questions, perplexity};
use windlass::progress::Progress;
use windlass::store::atomic::{RealDisk, write_atomic};

/// The window without `--window`, where the model's context is longer.
const DEFAULT_WINDOW: usize = 1024;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    noun: Noun,
}

#[derive(clap::Subcommand)]
enum Noun {
    /// Perplexity of a text: exp of the mean loss of its tokens
    Perplexity(PerplexityArgs),
    /// Multiple-choice questions, answered by the likelihood of each choice
    Choice(ChoiceArgs),
    /// The logits after each of some tokens, to compare programs
    Logits(LogitsArgs),
}

#[derive(clap::Args)]
struct PerplexityArgs {
    #[command(flatten)]
    source: Source,
    /// Text file
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Tokens read at once [default: the model's context, at most 1024]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens from one window to the next; each token is scored once, given at least window - stride tokens
    /// before it, except in the first window [default: half the window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct ChoiceArgs {
    #[command(flatten)]
    source: Source,
    /// JSONL file: question (or context, prompt), choices (or endings) and answer (or label: index from 0, or a letter)
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct LogitsArgs {
    #[command(flatten)]
    source: Source,
    /// The tokens: ids with commas between them
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// File for the logits: little-endian f32, a row of the vocabulary for each token
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.noun {
        Noun::Perplexity(args) => run_perplexity(&args),
        Noun::Choice(args) => run_choice(&args),
        Noun::Logits(args) => run_logits(&args),
    }
}

fn run_perplexity(args: &PerplexityArgs) -> Result<()> {
    let text = super::read_text(&args.file)?;
    let model = args.source.open()?;
    let ids = model.tokenizer()?.encode(&text, true)?;
    let window = args.window.unwrap_or(model.context().min(DEFAULT_WINDOW));
    let stride = args.stride.unwrap_or(window.div_ceil(2));
    let start = Instant::now();
    let mut progress = Progress::new(ids.len() as u64, "perplexity");
    let score = perplexity(&model, &ids, window, stride, &mut |done, loss| {
        progress.set(done as u64, &format!("perplexity {:.3}", loss.exp()));
    });
    let score = score.map_err(misuse)?;
    let seconds = start.elapsed().as_secs_f64();
    progress.finish(&format!("{} windows", score.windows));
    let bits_per_byte =
        score.loss * score.scored_tokens as f64 / std::f64::consts::LN_2 / text.len() as f64;
    if args.json {
        let more = json!({ "bits_per_byte": bits_per_byte });
        print_json(&args.source, &args.file, &score, more, seconds)
    } else {
        println!("perplexity     {:.4}", score.perplexity);
        println!("loss           {:.4} nats a token", score.loss);
        println!("bits per byte  {bits_per_byte:.4}");
        println!("scored tokens  {} of {}", score.scored_tokens, score.tokens);
        println!("window         {}, stride {}", score.window, score.stride);
        Ok(())
    }
}

fn run_choice(args: &ChoiceArgs) -> Result<()> {
    let name = args.file.display().to_string();
    let questions = parse_questions(&name, &super::read_text(&args.file)?)?;
    let model = args.source.open()?;
    let start = Instant::now();
    let mut progress = Progress::new(questions.len() as u64, "questions");
    let mut tally = Tally::default();
    for (index, question) in questions.iter().enumerate() {
        let scores = model.score_choices(question)?;
        tally.add(&scores, question.answer);
        let so_far = format!("accuracy {:.3}", tally.accuracy().accuracy);
        progress.set(index as u64 + 1, &so_far);
    }
    let seconds = start.elapsed().as_secs_f64();
    progress.finish(&format!("{} answered", questions.len()));
    let accuracy = tally.accuracy();
    if args.json {
        print_json(&args.source, &args.file, &accuracy, json!({}), seconds)
    } else {
        println!("questions           {}", accuracy.questions);
        println!("accuracy            {:.4}", accuracy.accuracy);
        println!("accuracy per token  {:.4}", accuracy.accuracy_per_token);
        println!("accuracy per byte   {:.4}", accuracy.accuracy_per_byte);
        Ok(())
    }
}

fn run_logits(args: &LogitsArgs) -> Result<()> {
    let model = args.source.open_without_tokenizer()?;
    let logits = model.logits(&args.ids)?.to_f32();
    let bytes: Vec<u8> = logits
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    write_atomic(&RealDisk, &args.out, &bytes)?;
    println!(
        "{}: {} tokens, {} logits each",
        args.out.display(),
        args.ids.len(),
        model.config.vocab_size
    );
    Ok(())
}

fn print_json(
    source: &Source,
    file: &Path,
    score: &impl serde::Serialize,
    more: Value,
    seconds: f64,
) -> Result<()> {
    let mut all = Map::new();
    let head = json!({ "model": source.model, "file": file.display().to_string() });
    for part in [
        head,
        serde_json::to_value(score)?,
        more,
        json!({ "seconds": seconds }),
    ] {
        all.extend(part.as_object().cloned().unwrap_or_default());
    }
    println!("{}", Value::Object(all));
    Ok(())
}
