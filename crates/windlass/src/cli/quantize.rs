//! `windlass quantize`: a GGUF file with fewer bits.

use super::drive::bytes;
use super::{Machine, failure, usage};
use anyhow::{Context, Result};
use regex::Regex;
use serde_json::json;
use std::path::PathBuf;
use windlass::compress::{FileType, Importance, Options, Planned, Report, plan, quantize};
use windlass::progress::Progress;
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::{BlockType, File};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// The GGUF file (of a split model any of its files), in F32, F16 or BF16
    input: PathBuf,
    /// The file to write
    #[arg(required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// What to quantize to: Q4_K_M, Q8_0, IQ4_XS, ...
    #[arg(long = "type", short = 't', value_name = "TYPE", value_parser = file_type)]
    file_type: FileType,
    /// Give every matrix the main type of the mix
    #[arg(long)]
    pure: bool,
    /// How much each column matters: a file of `windlass imatrix` or llama-imatrix
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Another type for tensors in whose name the pattern is found; the first that is found counts
    #[arg(long, value_name = "REGEX=TYPE", value_parser = override_of)]
    tensor_type: Vec<(Regex, BlockType)>,
    /// The type of the output matrix
    #[arg(long, value_name = "TYPE", value_parser = block_type)]
    output_tensor_type: Option<BlockType>,
    /// The type of the token embeddings
    #[arg(long, value_name = "TYPE", value_parser = block_type)]
    token_embedding_type: Option<BlockType>,
    /// Keep the output matrix as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// Allow a source that is quantized already, which adds to its errors
    #[arg(long)]
    allow_requantize: bool,
    /// Say what each tensor would become, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// The mix of a name.
pub(super) fn file_type(name: &str) -> Result<FileType, String> {
    FileType::from_name(name).ok_or_else(|| {
        let names: Vec<&str> = FileType::ALL.iter().map(|kind| kind.name()).collect();
        format!("one of {}", names.join(", "))
    })
}

fn block_type(name: &str) -> Result<BlockType, String> {
    let found = BlockType::from_name(name).filter(|kind| kind.is_writable());
    found.ok_or_else(|| {
        let writable = BlockType::ALL.iter().filter(|kind| kind.is_writable());
        let names: Vec<&str> = writable.map(|kind| kind.name()).collect();
        format!("one of {}", names.join(", "))
    })
}

fn override_of(text: &str) -> Result<(Regex, BlockType), String> {
    let (pattern, name) = text
        .rsplit_once('=')
        .ok_or("a pattern and a type: attn_v=Q6_K")?;
    let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
    Ok((pattern, block_type(name)?))
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    if args.pure && !args.file_type.base().is_writable() {
        let message = format!("--type {}", args.file_type);
        return Err(usage(message, "choose a type that is written"));
    }
    let file = File::open(&args.input)?;
    let mut options = Options {
        pure: args.pure,
        overrides: args.tensor_type.clone(),
        output_type: args.output_tensor_type,
        embedding_type: args.token_embedding_type,
        leave_output: args.leave_output_tensor,
        allow_requantize: args.allow_requantize,
        ..Options::new(args.file_type)
    };
    if let Some(path) = &args.imatrix {
        options.importance = Some(Importance::open(path)?);
        options.importance_name = path.display().to_string();
    }
    if args.dry_run {
        let tensors = plan(&file, &options)?;
        say_plan(&tensors, &args)?;
        return Ok(());
    }
    let output = args.output.as_ref().context("an output is required")?;
    if output.is_dir() {
        let message = format!("{} is a folder", output.display());
        return Err(failure(message, "name a file in it"));
    }
    let cpu = args.machine.cpu()?;
    let mut bar = Progress::new(file.total_bytes() as u64, "quantize");
    let report = quantize(
        &cpu.pool,
        &RealDisk,
        &file,
        output,
        &options,
        |tensor, done| {
            bar.set(done as u64, &tensor.info.name);
        },
    )?;
    bar.finish(&format!("{}", output.display()));
    say(&report, &args)
}

/// What was done.
fn say(report: &Report, args: &Args) -> Result<()> {
    let bits = |bytes: usize| 8.0 * bytes as f64 / report.elements.max(1) as f64;
    let (before, after) = (report.bytes_before, report.bytes_after);
    let instead = fallbacks(&report.tensors);
    for line in &instead {
        eprintln!("note: {line}");
    }
    if !report.without_importance.is_empty() {
        let count = report.without_importance.len();
        let first = &report.without_importance[0];
        eprintln!("note: {count} matrices have no importances, the first is {first}");
    }
    if args.json {
        let object = json!({
            "file_type": args.file_type.name(), "parameters": report.elements,
            "bytes_before": before, "bytes_after": after,
            "bits_per_weight": bits(after), "fallbacks": instead.len(),
            "without_importance": report.without_importance,
            "tensors": report.tensors.iter().map(row).collect::<Vec<_>>(),
        });
        println!("{object}");
        return Ok(());
    }
    println!(
        "{}: {} of weights before, {} after; {:.2} bits per weight before, {:.2} after",
        args.file_type,
        bytes(before),
        bytes(after),
        bits(before),
        bits(after)
    );
    Ok(())
}

fn row(tensor: &Planned) -> serde_json::Value {
    json!({
        "name": tensor.info.name, "shape": tensor.info.shape,
        "from": tensor.info.block_type.name(), "to": tensor.target.name(),
    })
}

fn say_plan(tensors: &[Planned], args: &Args) -> Result<()> {
    let size = |t: &Planned| t.target.size_of(t.info.elements()).unwrap_or(0);
    let after: usize = tensors.iter().map(size).sum();
    let elements: usize = tensors.iter().map(|t| t.info.elements()).sum();
    let bits = 8.0 * after as f64 / elements.max(1) as f64;
    if args.json {
        let rows: Vec<_> = tensors.iter().map(row).collect();
        let object = json!({
            "file_type": args.file_type.name(), "parameters": elements, "bytes_after": after,
            "bits_per_weight": bits, "tensors": rows,
        });
        println!("{object}");
        return Ok(());
    }
    let width = tensors.iter().map(|t| t.info.name.len()).max().unwrap_or(0);
    for tensor in tensors {
        let (name, from, to) = (&tensor.info.name, tensor.info.block_type, tensor.target);
        println!(
            "{name:<width$}  {from:<7} {to:<7} {:>10}",
            bytes(size(tensor))
        );
    }
    for line in fallbacks(tensors) {
        eprintln!("note: {line}");
    }
    println!(
        "{}: {}, {bits:.2} bits per weight",
        args.file_type,
        bytes(after)
    );
    Ok(())
}

/// The tensors that could not get the type that was meant for them.
pub(super) fn fallbacks(tensors: &[Planned]) -> Vec<String> {
    let line = |tensor: &Planned| {
        let meant = tensor.instead_of?;
        Some(format!(
            "{}: {} instead of {meant}, since rows of {} are no whole blocks",
            tensor.info.name,
            tensor.target,
            tensor.info.row_len()
        ))
    };
    tensors.iter().filter_map(line).collect()
}
