//! Inference: models loaded from folders, generation, and scores.
//!
//! Nothing here prints, reads a clock or draws from a global random source: text goes to a callback, time is the
//! caller's, seeds are arguments.

pub mod adapter;
pub mod convert;
pub mod divergence;
pub mod engine;
mod error;
pub mod generate;
mod gguf;
pub mod inputs;
pub mod loaded;
mod passes;
pub mod quantized;
pub mod sampler;
mod saved;
pub mod saved_logits;
pub mod score;
mod session;
mod speculate;
pub mod stop;
pub mod vocabulary;
pub mod workload;

pub use adapter::{
    AdapterFolder, Extracted, Overlay, OverlayLoader, low_rank, write_adapter, write_sum,
};
pub use error::InferError;
pub use generate::{GenerateOptions, Generation, Generator};
pub use loaded::{LoadIn, LoadedModel};
pub use sampler::SamplingParams;
pub use session::Session;
pub use speculate::{Guess, Guesses};
pub use stop::StopReason;
