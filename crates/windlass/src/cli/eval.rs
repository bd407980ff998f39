//! `windlass eval`: how well a model predicts a text, answers questions with choices, or its bare logits.

use super::source::{Source, misuse};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use windlass::infer::divergence::{Divergence, divergence, perplexity_of_halves};
use windlass::infer::saved_logits::SavedLogits;
use windlass::infer::score::{Tally, parse_questions, perplexity};
use windlass::progress::Progress;
use windlass::store::atomic::{Disk, RealDisk, write_atomic};

/// The window without `--window`, where the model's context is longer: that of llama-perplexity.
const DEFAULT_WINDOW: usize = 512;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    noun: Noun,
}

#[derive(clap::Subcommand)]
enum Noun {
    /// Perplexity of a text (exp of the mean loss of its tokens), or the divergence from a reference model
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
    #[arg(
        long,
        short,
        value_name = "FILE",
        required_unless_present = "kl_divergence"
    )]
    file: Option<PathBuf>,
    /// Tokens read at once [default: the model's context, at most 512]. The second half of each window is scored, as
    /// llama-perplexity does it
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Let windows overlap instead: N tokens from one to the next. Each token is scored once, given at least
    /// window - N tokens before it, except in the first window
    #[arg(long, value_name = "N", conflicts_with = "save_logits")]
    stride: Option<usize>,
    /// Read control tokens that are spelled in the text as text, as llama-perplexity does
    #[arg(long, conflicts_with = "kl_divergence")]
    literal: bool,
    /// Keep the log-probabilities of all tokens in a file: two bytes for each token of the text and of the vocabulary
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    /// How far the model is from the one whose log-probabilities are in this file (of --save-logits, or of
    /// llama-perplexity), on the text that is in it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["file", "window", "stride", "save_logits"])]
    kl_divergence: Option<PathBuf>,
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
    let Some(file) = &args.file else {
        let path = args.kl_divergence.as_ref();
        return run_divergence(args, path.expect("one of the two is given"));
    };
    let text = super::read_text(file)?;
    let model = args.source.open()?;
    let tokenizer = model.tokenizer()?;
    let ids = tokenizer.encode_with(&text, true, !args.literal)?;
    if !args.literal && ids != tokenizer.encode_with(&text, true, false)? {
        let note = "the text spells control tokens, which are read as such; llama-perplexity reads them as text: --literal";
        eprintln!("note: {note}");
    }
    let window = args.window.unwrap_or(model.context().min(DEFAULT_WINDOW));
    let start = Instant::now();
    let mut progress = Progress::new(ids.len() as u64, "perplexity");
    let mut tell = |done, loss: f64| {
        progress.set(done as u64, &format!("perplexity {:.3}", loss.exp()));
    };
    let score = match args.stride {
        Some(stride) => perplexity(&model, &ids, window, stride, &mut tell),
        None => {
            let save = args.save_logits.as_ref();
            let save = save.map(|path| (&RealDisk as &dyn Disk, path.as_path()));
            perplexity_of_halves(&model, &ids, window, save, &mut tell)
        }
    };
    let score = score.map_err(misuse)?;
    let seconds = start.elapsed().as_secs_f64();
    progress.finish(&format!("{} windows", score.windows));
    // What a token says of the text, times tokens a byte.
    let share = ids.len() as f64 / text.len() as f64;
    let bits_per_byte = score.loss / std::f64::consts::LN_2 * share;
    if args.json {
        let more = json!({ "bits_per_byte": bits_per_byte });
        print_json(&args.source, file, &score, more, seconds)
    } else {
        println!(
            "perplexity     {:.4} ± {:.4}",
            score.perplexity, score.error
        );
        println!("loss           {:.4} nats a token", score.loss);
        println!("bits per byte  {bits_per_byte:.4}");
        println!("scored tokens  {} of {}", score.scored_tokens, score.tokens);
        match score.stride {
            Some(stride) => println!("window         {}, stride {stride}", score.window),
            None => println!("window         {}, the second half scored", score.window),
        }
        Ok(())
    }
}

fn run_divergence(args: &PerplexityArgs, path: &Path) -> Result<()> {
    let reference = SavedLogits::open(path)?;
    let model = args.source.open()?;
    let start = Instant::now();
    let mut progress = Progress::new(reference.windows() as u64, "divergence");
    let found = divergence(&model, &reference, &mut |done, kl| {
        progress.set(done as u64, &format!("mean {kl:.2e}"));
    });
    let found = found.map_err(misuse)?;
    let seconds = start.elapsed().as_secs_f64();
    progress.finish(&format!("{} windows", found.windows));
    match args.json {
        true => print_json(&args.source, path, &found, json!({}), seconds),
        false => {
            say_divergence(&found);
            Ok(())
        }
    }
}

fn say_divergence(found: &Divergence) {
    let line = |name: &str, value: f64, error: f64, unit: &str| {
        println!("{name:<22} {value:>10.6} ± {error:.6}{unit}");
    };
    let percent =
        |name: &str, value: f64, error: f64| line(name, 100.0 * value, 100.0 * error, " %");
    line("perplexity", found.perplexity, found.perplexity_error, "");
    let (value, error) = (found.reference_perplexity, found.reference_perplexity_error);
    line("of the reference", value, error, "");
    let (value, error) = (found.perplexity_ratio, found.perplexity_ratio_error);
    line("ratio", value, error, "");
    line("mean KL divergence", found.mean_kl, found.mean_kl_error, "");
    println!("{:<22} {:>10.6}", "median", found.median_kl);
    println!("{:<22} {:>10.6}", "99 %", found.kl_99);
    println!("{:<22} {:>10.6}", "maximum", found.max_kl);
    percent("same likeliest token", found.same_top, found.same_top_error);
    percent("mean Δp", found.mean_delta_p, found.mean_delta_p_error);
    percent("RMS Δp", found.rms_delta_p, found.rms_delta_p_error);
    println!(
        "{:<22} {:>10} in {} windows of {}, the second half of each",
        "scored tokens", found.scored_tokens, found.windows, found.window
    );
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
