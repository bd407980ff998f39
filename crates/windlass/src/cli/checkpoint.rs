//! `windlass checkpoint`: what a checkpoint is, whether it is whole, and its masters as a Hugging Face folder.

use super::drive::{bytes, count};
use super::failure;
use anyhow::Result;
use std::path::{Path, PathBuf};
use windlass::store::checkpoint::{CheckpointDir, Checkpoints};
use windlass::train::{export, summary};

/// What to do.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Write the f32 masters as a Hugging Face folder, whatever the ranks and stage that saved them
    Export {
        /// A run's folder (its latest checkpoint) or one checkpoint
        checkpoint: PathBuf,
        /// The folder to write
        out: PathBuf,
    },
    /// Read every byte and compare it with what was saved
    Verify {
        /// A run's folder (all its checkpoints) or one checkpoint
        checkpoint: PathBuf,
    },
    /// Say what a checkpoint holds
    Inspect {
        /// A run's folder (its latest checkpoint) or one checkpoint
        checkpoint: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Runs the verb.
pub fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Export { checkpoint, out } => {
            let found = one(&checkpoint)?;
            if out.join("config.json").exists() {
                let message = format!("{} holds a model already", out.display());
                return Err(failure(message, "choose another folder"));
            }
            export(&found, &out)?;
            eprintln!("step {} in f32: {}", found.step(), out.display());
            Ok(())
        }
        Verb::Verify { checkpoint } => verify(&checkpoint),
        Verb::Inspect { checkpoint, json } => inspect(&one(&checkpoint)?, json),
    }
}

/// One checkpoint: the folder itself, or the latest one in it.
fn one(path: &Path) -> Result<CheckpointDir> {
    if path.join("manifest.json").exists() {
        return Ok(CheckpointDir::open(path)?);
    }
    let found = Checkpoints::open(path).latest()?.ok_or_else(|| {
        failure(
            format!("no checkpoint in {}", path.display()),
            "give the folder of a run (--out of `windlass train`) or of one checkpoint",
        )
    })?;
    if let Some(note) = found.note {
        eprintln!("note: {note}");
    }
    Ok(found.checkpoint)
}

fn verify(path: &Path) -> Result<()> {
    let checkpoints = Checkpoints::open(path);
    let names = checkpoints.names()?;
    let all = if names.is_empty() {
        vec![one(path)?]
    } else {
        let open = |name: &String| checkpoints.get_named(name);
        names.iter().map(open).collect::<Result<Vec<_>, _>>()?
    };
    for checkpoint in all {
        checkpoint.verify()?;
        let files = checkpoint.files().count();
        println!("{}: {files} files, whole", checkpoint.path().display());
    }
    Ok(())
}

fn inspect(checkpoint: &CheckpointDir, json: bool) -> Result<()> {
    let summary = summary(checkpoint)?;
    if json {
        println!("{}", serde_json::to_string(&summary)?);
        return Ok(());
    }
    println!("{}", checkpoint.path().display());
    println!(
        "step        {}, {} tokens seen",
        summary.step,
        count(summary.tokens_seen as usize)
    );
    println!(
        "model       {}, {} parameters",
        summary.model_type,
        count(summary.parameters)
    );
    println!("weights     {}", summary.dtype);
    println!("optimizer   {:?}", summary.optimizer);
    println!("saved by    {} ranks; any number can resume", summary.ranks);
    for file in checkpoint.files() {
        let size = std::fs::metadata(checkpoint.path().join(file)).map_or(0, |m| m.len());
        println!("{:>12}  {file}", bytes(size as usize));
    }
    Ok(())
}
