//! `windlass eval`: how well a model predicts a text, or answers questions with choices.

use super::source::{Source, misuse};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use windlass::infer::score::{Tally, parse_questions, perplexity};
use windlass::progress::Progress;

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

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.noun {
        Noun::Perplexity(args) => run_perplexity(&args),
        Noun::Choice(args) => run_choice(&args),
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
