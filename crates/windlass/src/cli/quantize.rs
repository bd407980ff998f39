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
    #[command(flatten)]
    mix: Mix,
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

/// Flags that change which tensor gets which type, and how it is rounded.
#[derive(clap::Args)]
pub(super) struct Mix {
    /// Give every matrix the main type of the mix
    #[arg(long, requires = "file_type")]
    pure: bool,
    /// How much each column matters: a file of `windlass imatrix` or llama-imatrix
    #[arg(long, value_name = "FILE", requires = "file_type")]
    imatrix: Option<PathBuf>,
    /// Another type for tensors in whose name the pattern is found; the first that is found counts
    #[arg(long, value_name = "REGEX=TYPE", value_parser = override_of, requires = "file_type")]
    tensor_type: Vec<(Regex, BlockType)>,
    /// The type of the output matrix
    #[arg(long, value_name = "TYPE", value_parser = block_type, requires = "file_type")]
    output_tensor_type: Option<BlockType>,
    /// The type of the token embeddings
    #[arg(long, value_name = "TYPE", value_parser = block_type, requires = "file_type")]
    token_embedding_type: Option<BlockType>,
    /// Keep the output matrix as it is
    #[arg(long, requires = "file_type")]
    leave_output_tensor: bool,
}

impl Mix {
    /// The types and roundings of a mix.
    pub(super) fn options(&self, file_type: FileType) -> Result<Options> {
        if self.pure && !file_type.base().is_writable() {
            let message = format!("--type {file_type}");
            return Err(usage(message, "choose a type that is written"));
        }
        let mut options = Options {
            pure: self.pure,
            overrides: self.tensor_type.clone(),
            output_type: self.output_tensor_type,
            embedding_type: self.token_embedding_type,
            leave_output: self.leave_output_tensor,
            ..Options::new(file_type)
        };
        if let Some(path) = &self.imatrix {
            options.importance = Some(Importance::open(path)?);
            options.importance_name = path.display().to_string();
        }
        Ok(options)
    }

    /// The first flag that was given.
    pub(super) fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--pure", self.pure),
            ("--imatrix", self.imatrix.is_some()),
            ("--tensor-type", !self.tensor_type.is_empty()),
            ("--output-tensor-type", self.output_tensor_type.is_some()),
            (
                "--token-embedding-type",
                self.token_embedding_type.is_some(),
            ),
            ("--leave-output-tensor", self.leave_output_tensor),
        ];
        flags
            .iter()
            .find(|(_, given)| *given)
            .map(|(flag, _)| *flag)
    }
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
    let input = &args.input;
    let folder = input.is_dir() || input.extension().is_some_and(|end| end == "safetensors");
    if folder && input.exists() {
        let message = format!("{} is no GGUF file", input.display());
        let hint =
            "a Hugging Face folder becomes one by windlass convert FOLDER FILE.gguf --type TYPE";
        return Err(failure(message, hint));
    }
    let options = Options {
        allow_requantize: args.allow_requantize,
        ..args.mix.options(args.file_type)?
    };
    let file = File::open(input)?;
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
    let fallen = report.tensors.iter().filter(|t| t.instead_of.is_some());
    let fallen = fallen.count();
    for line in fallbacks(&report.tensors) {
        eprintln!("note: {line}");
    }
    if let Some(line) = unmeasured(&report.without_importance) {
        eprintln!("note: {line}");
    }
    if args.json {
        let object = json!({
            "file_type": args.file_type.name(), "parameters": report.elements,
            "bytes_before": before, "bytes_after": after,
            "bits_per_weight": bits(after), "fallbacks": fallen,
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

/// The tensors that could not get the type that was meant for them: a line for those of a kind.
pub(super) fn fallbacks(tensors: &[Planned]) -> Vec<String> {
    let mut kinds: Vec<(&Planned, BlockType, usize)> = Vec::new();
    for tensor in tensors {
        let Some(meant) = tensor.instead_of else {
            continue;
        };
        let row = tensor.info.row_len();
        let same = |(first, other, _): &&mut (&Planned, BlockType, usize)| {
            first.target == tensor.target && *other == meant && first.info.row_len() == row
        };
        match kinds.iter_mut().find(same) {
            Some((_, _, count)) => *count += 1,
            None => kinds.push((tensor, meant, 1)),
        }
    }
    let line = |(first, meant, count): &(&Planned, BlockType, usize)| {
        let more = match count {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        format!(
            "{}{more}: {} instead of {meant}, since rows of {} are no whole blocks",
            first.info.name,
            first.target,
            first.info.row_len()
        )
    };
    kinds.iter().map(line).collect()
}

/// The matrices that lose bits without importances, where others have some.
pub(super) fn unmeasured(names: &[String]) -> Option<String> {
    let first = names.first()?;
    let count = names.len();
    Some(format!(
        "{count} matrices have no importances, the first is {first}"
    ))
}
