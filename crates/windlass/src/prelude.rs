//! What a program usually needs, in one `use windlass::prelude::*`.
//!
//! Loading and generating: [`LoadedModel`], [`Generator`]. Training: [`decoder`] or a [`Model`] of one's own, a
//! [`Store`] for its parameters, an [`Engine`] over both. The crates behind it are modules of [`crate`].

pub use windlass_infer::score::{Perplexity, perplexity};
pub use windlass_infer::{
    GenerateOptions, Generation, Generator, InferError, LoadedModel, SamplingParams, StopReason,
};
pub use windlass_model::{
    DecoderConfig, Goal, Layer, Model, Tokenizer, Tokens, decoder, preset_config,
};
pub use windlass_store::Store;
pub use windlass_tensor::{
    Activation, Category, Cpu, DType, Init, ParamSpec, Rng, Tape, Tensor, Var, Weights,
};
pub use windlass_train::{Engine, EngineOptions, Optimizer, load_model};
