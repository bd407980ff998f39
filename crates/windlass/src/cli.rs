//! The verbs of the command line, one file each, and what they share: machine, models, errors.

use anyhow::{Error, Result};
use std::process::ExitCode;
use windlass::hub::HubError;
use windlass::infer::InferError;
use windlass::model::tokenizer::TokenizerError;
use windlass::model::{ChatError, ModelError};
use windlass::store;
use windlass::tensor::kernels::dispatch::Level;
use windlass::tensor::{Cpu, DType};

pub mod adapter;
pub mod bench;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod drive;
pub mod estimate;
pub mod eval;
pub mod finetune;
mod fits;
pub mod generate;
pub mod imatrix;
pub mod info;
pub mod inspect;
pub mod io;
pub mod launch;
pub mod lessons;
mod observe;
pub mod quantize;
pub mod quickstart;
pub mod recipe;
mod sampling;
pub mod serve;
mod settings;
pub mod source;
pub mod tokenize;
pub mod train;
mod world;

/// A mistake in how the command was called: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Usage {
    /// What is wrong; names the flag.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// An error about how the command was called.
pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Error {
    Usage {
        message: message.into(),
        hint: hint.into(),
    }
    .into()
}

/// A failure with a hint, where no library error says it better: exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What is wrong; names the file, key or flag.
    pub message: String,
    /// What to do.
    pub hint: String,
}

/// A failure with a hint.
pub fn failure(message: impl Into<String>, hint: impl Into<String>) -> Error {
    Failure {
        message: message.into(),
        hint: hint.into(),
    }
    .into()
}

/// Lets the program end without a complaint when the reader of its output went away, as `head` does: a success where the
/// results were being printed, a failure where only notes were, for the work may not be done.
pub fn end_when_nobody_reads() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload_as_str().unwrap_or_default();
        match text.strip_prefix("failed printing to ") {
            Some(rest) if rest.ends_with("(os error 32)") => {
                std::process::exit(i32::from(rest.starts_with("stderr")))
            }
            _ => report(panic),
        }
    }));
}

/// Prints an error and its hint, and gives the exit code.
pub fn report(error: &Error) -> ExitCode {
    let mut text = format!("error: {}\n", told(error));
    if let Some(hint) = error.chain().find_map(hint) {
        text += &format!("hint: {hint}\n");
    }
    // One piece is one write: the ranks of a job share stderr.
    eprint!("{text}");
    let misuse = error.chain().any(|cause| cause.is::<Usage>());
    ExitCode::from(if misuse { 2 } else { 1 })
}

/// An error and its causes, but for those that it says itself.
fn told(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(usage) = cause.downcast_ref::<Usage>() {
        return Some(usage.hint.clone());
    }
    if let Some(failure) = cause.downcast_ref::<Failure>() {
        return Some(failure.hint.clone());
    }
    let hints = [
        cause
            .downcast_ref::<ModelError>()
            .and_then(ModelError::hint),
        cause
            .downcast_ref::<TokenizerError>()
            .and_then(TokenizerError::hint),
        cause.downcast_ref::<ChatError>().and_then(ChatError::hint),
        cause
            .downcast_ref::<store::Error>()
            .and_then(store::Error::hint),
        cause
            .downcast_ref::<InferError>()
            .and_then(InferError::hint),
        cause
            .downcast_ref::<windlass::compress::Error>()
            .and_then(windlass::compress::Error::hint),
        cause
            .downcast_ref::<windlass::train::Error>()
            .and_then(windlass::train::Error::hint),
        cause.downcast_ref::<HubError>().and_then(HubError::hint),
        cause
            .downcast_ref::<windlass::serve::ServeError>()
            .and_then(windlass::serve::ServeError::hint),
    ];
    hints.into_iter().flatten().next()
}

/// Flags about the machine, shared by all verbs that compute.
#[derive(clap::Args, Clone, Debug)]
pub struct Machine {
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl Machine {
    /// The machine as asked for.
    pub fn cpu(&self) -> Result<Cpu> {
        Ok(Cpu::new(self.cpu_threads()?))
    }

    /// Its number of threads.
    pub fn cpu_threads(&self) -> Result<usize> {
        Level::from_env()
            .map_err(|message| usage(message, "unset WINDLASS_KERNELS to use the best one"))?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = self.threads.unwrap_or(cores);
        if threads == 0 || threads > 1024 {
            return Err(usage(
                format!("--threads {threads}"),
                format!("this machine has {cores} cores"),
            ));
        }
        Ok(threads)
    }
}

/// Storage type of weights and activations.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Single precision throughout
    F32,
    /// Half the memory: bf16 weights and activations; sums, master weights and moments in f32
    Bf16,
    /// The same in f16, with a dynamic loss scale in training
    F16,
}

impl Precision {
    /// The storage type.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::F16 => DType::F16,
        }
    }
}

/// A whole text file.
pub fn read_text(path: &std::path::Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| {
        let hint = "check the spelling and the permissions of the path";
        failure(format!("cannot read {}: {error}", path.display()), hint)
    })?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let message = format!("{}: not UTF-8 text at byte {at}", path.display());
        failure(message, "convert it: iconv -f latin1 -t utf-8")
    })
}
