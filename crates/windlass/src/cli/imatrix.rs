//! `windlass imatrix`: how much each column of a model's matrices matters, measured on a text.

use super::source::{Source, misuse};
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use windlass::compress::Importance;
use windlass::infer::inputs::input_squares;
use windlass::progress::Progress;
use windlass::store::atomic::RealDisk;

/// The window without `--window`, where the model's context is longer: that of llama-imatrix.
const DEFAULT_WINDOW: usize = 512;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Text file, of what the model will be used for
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    /// The file to write, for `windlass quantize --imatrix` and llama-quantize
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Tokens read at once [default: the model's context, at most 512]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Read this many windows of the text at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    windows: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let text = super::read_text(&args.file)?;
    let model = args.source.open()?;
    let mut ids = model.tokenizer()?.encode(&text, true)?;
    let window = args.window.unwrap_or(model.context().min(DEFAULT_WINDOW));
    if let Some(windows) = args.windows {
        ids.truncate(window.saturating_mul(windows as usize));
    }
    let start = Instant::now();
    let mut progress = Progress::new(ids.len() as u64, "imatrix");
    let inputs = input_squares(&model, &ids, window, &mut |done| {
        progress.set(done as u64, "tokens");
    });
    let inputs = inputs.map_err(misuse)?;
    let windows = ids.len() / window;
    progress.finish(&format!("{windows} windows"));
    let mut importance = Importance::default();
    importance.datasets.push(args.file.display().to_string());
    (importance.chunks, importance.chunk_size) = (windows as u32, window as u32);
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
    let mut unseen = Vec::new();
    for (name, inputs) in &inputs {
        if inputs.counts.contains(&0.0) {
            unseen.push(name);
        }
        importance.insert(name, narrow(&inputs.squares), narrow(&inputs.counts));
    }
    importance.write(&RealDisk, &args.out)?;
    if let Some(first) = unseen.first() {
        let count = unseen.len();
        eprintln!("note: {count} matrices have experts that no token chose, the first is {first}");
    }
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let object = json!({
            "model": args.source.model, "file": args.file.display().to_string(),
            "out": args.out.display().to_string(), "matrices": inputs.len(), "window": window,
            "windows": windows, "tokens": windows * window, "seconds": seconds,
        });
        println!("{object}");
    } else {
        println!(
            "{}: {} matrices, {windows} windows of {window} tokens",
            args.out.display(),
            inputs.len()
        );
    }
    Ok(())
}
