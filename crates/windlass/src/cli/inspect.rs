//! `windlass inspect`: what a model's file holds: metadata, tensors, bits per weight, and what it takes to run.

mod gguf;
mod safetensors;

use super::drive::{bytes, count};
use super::failure;
use anyhow::Result;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file, a safetensors file, a Hugging Face folder, or a folder of --save-packed
    #[arg(value_name = "FILE")]
    path: PathBuf,
    /// Print the value of one metadata key in full, and nothing else
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a file holds.
#[derive(Serialize)]
struct Summary {
    format: String,
    files: usize,
    architecture: Option<String>,
    name: Option<String>,
    parameters: usize,
    bytes: usize,
    bits_per_weight: f64,
    types: Vec<TypeShare>,
    run: Option<Run>,
    metadata: Vec<Entry>,
    tensors: Vec<Tensor>,
}

/// What a type takes of a file.
#[derive(Serialize)]
struct TypeShare {
    #[serde(rename = "type")]
    kind: String,
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

/// What it takes to run the model.
#[derive(Serialize)]
struct Run {
    layers: usize,
    context_length: usize,
    /// Bytes of keys and values in 16 bits for each token of the context.
    kv_bytes_per_token: usize,
    /// Bytes of weights and of keys and values of a whole context.
    bytes_at_full_context: usize,
}

/// A metadata key.
#[derive(Serialize)]
struct Entry {
    key: String,
    kind: String,
    value: Value,
}

/// A tensor.
#[derive(Serialize)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    #[serde(rename = "type")]
    kind: String,
    bytes: usize,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let (summary, full) = if is_gguf(&args.path) {
        gguf::read(&args.path)?
    } else {
        safetensors::read(&args.path)?
    };
    if let Some(key) = &args.key {
        let Some(value) = full.get(key) else {
            let message = format!("{}: no metadata key '{key}'", args.path.display());
            return Err(failure(message, "without --key all keys are listed"));
        };
        match value {
            Value::String(text) if !args.json => println!("{text}"),
            _ => println!("{value}"),
        }
        return Ok(());
    }
    if args.json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        print!("{}", text(&summary));
    }
    Ok(())
}

/// Whether a file says that it is GGUF, or has its name.
fn is_gguf(path: &Path) -> bool {
    let magic = || -> std::io::Result<bool> {
        let mut first = [0; 4];
        std::io::Read::read_exact(&mut std::fs::File::open(path)?, &mut first)?;
        Ok(&first == b"GGUF")
    };
    path.is_file() && (path.extension().is_some_and(|e| e == "gguf") || magic().unwrap_or(false))
}

impl Summary {
    /// Adds up tensors. What it takes to run is completed with the bytes of all.
    fn new(format: String, files: usize, tensors: Vec<Tensor>, run: Option<Run>) -> Self {
        let elements = |t: &Tensor| t.shape.iter().product::<usize>();
        let parameters: usize = tensors.iter().map(elements).sum();
        let total: usize = tensors.iter().map(|t| t.bytes).sum();
        let mut shares = BTreeMap::new();
        for tensor in &tensors {
            let share = shares.entry(&tensor.kind).or_insert_with(|| TypeShare {
                kind: tensor.kind.clone(),
                tensors: 0,
                parameters: 0,
                bytes: 0,
            });
            share.tensors += 1;
            share.parameters += elements(tensor);
            share.bytes += tensor.bytes;
        }
        let mut types: Vec<TypeShare> = shares.into_values().collect();
        types.sort_by_key(|share| std::cmp::Reverse(share.bytes));
        let run = run.map(|run| Run {
            bytes_at_full_context: total + run.context_length * run.kv_bytes_per_token,
            ..run
        });
        Summary {
            format,
            files,
            architecture: None,
            name: None,
            parameters,
            bytes: total,
            bits_per_weight: 8.0 * total as f64 / parameters.max(1) as f64,
            types,
            run,
            metadata: Vec::new(),
            tensors,
        }
    }
}

impl Run {
    /// Of a model whose layers have so many elements of keys and values for a token.
    fn new(layers: usize, context_length: usize, kv_elements: usize) -> Self {
        Run {
            layers,
            context_length,
            kv_bytes_per_token: 2 * kv_elements,
            bytes_at_full_context: 0,
        }
    }
}

/// The summary for people.
fn text(summary: &Summary) -> String {
    let mut out = String::new();
    let mut line = |label: &str, value: String| {
        let _ = writeln!(out, "{label:<13}{value}");
    };
    let files = match summary.files {
        1 => String::new(),
        n => format!(", {n} files"),
    };
    line("format", format!("{}{files}", summary.format));
    if let Some(architecture) = &summary.architecture {
        line("architecture", architecture.clone());
    }
    if let Some(name) = &summary.name {
        line("name", name.clone());
    }
    line("parameters", count(summary.parameters));
    let bits = summary.bits_per_weight;
    line(
        "size",
        format!("{}, {bits:.2} bits per weight", bytes(summary.bytes)),
    );
    for (i, share) in summary.types.iter().enumerate() {
        let label = if i == 0 { "types" } else { "" };
        let percent = 100.0 * share.bytes as f64 / summary.bytes.max(1) as f64;
        let tensors = share.tensors;
        line(
            label,
            format!(
                "{:<8}{tensors:>5} tensors {:>10} {percent:>5.1} %",
                share.kind,
                bytes(share.bytes)
            ),
        );
    }
    if let Some(run) = &summary.run {
        line(
            "to run",
            format!(
                "{} of weights and {} for each token of context: {} at its longest, {} tokens",
                bytes(summary.bytes),
                bytes(run.kv_bytes_per_token),
                bytes(run.bytes_at_full_context),
                run.context_length
            ),
        );
    }
    list_metadata(&mut out, &summary.metadata);
    list_tensors(&mut out, &summary.tensors);
    out
}

fn list_metadata(out: &mut String, metadata: &[Entry]) {
    let width = metadata.iter().map(|e| e.key.len()).max().unwrap_or(0);
    let _ = writeln!(out, "\nmetadata: {} keys", metadata.len());
    for Entry { key, kind, value } in metadata {
        let text = match value {
            Value::String(text) => shorten(text),
            Value::Object(part) if part.contains_key("first") => {
                shorten(&format!("{} values: {}", part["values"], part["first"]))
            }
            other => shorten(&other.to_string()),
        };
        let _ = writeln!(out, "  {key:<width$}  {kind:<15}  {text}");
    }
}

fn list_tensors(out: &mut String, tensors: &[Tensor]) {
    let _ = writeln!(out, "\ntensors: {}", tensors.len());
    let shapes: Vec<String> = tensors.iter().map(|t| format!("{:?}", t.shape)).collect();
    let width = tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
    let shape_width = shapes.iter().map(String::len).max().unwrap_or(0);
    for (
        Tensor {
            name,
            kind,
            bytes: size,
            ..
        },
        shape,
    ) in tensors.iter().zip(&shapes)
    {
        let size = bytes(*size);
        let _ = writeln!(
            out,
            "  {name:<width$}  {shape:<shape_width$}  {kind:<8} {size:>10}"
        );
    }
}

/// The beginning of a text, on one line.
fn shorten(text: &str) -> String {
    const LENGTH: usize = 60;
    let escaped = text.replace('\n', "\\n").replace(['\t', '\r'], " ");
    match escaped.char_indices().nth(LENGTH) {
        Some((at, _)) => format!("{}…", &escaped[..at]),
        None => escaped,
    }
}
