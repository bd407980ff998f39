//! Architectures as lists of units of plain functions over borrowed weights; configuration, tokenizer, chat templates.
//!
//! Nothing here loads, gathers, saves or prints: a model declares its parameters and computes on weights it borrows.

mod adapter;
mod cache;
pub mod chat;
pub mod config;
mod decoder;
mod families;
pub mod gguf;
mod model;
mod names;
mod presets;
mod rope;
pub mod tokenizer;
mod tokens;

pub use adapter::{ADAPTER_CONFIG_FILE, ADAPTER_FILE, Adapter, AdapterConfig, Targets};
pub use cache::{Cached, KvBlocks};
pub use chat::{ChatError, ChatOptions, ChatTemplate, LocalTime};
pub use config::ModelError;
pub use decoder::decoder;
pub use families::{
    DecoderConfig, Experts, LayerOptions, Norm, Placement, QkNorm, known_architectures,
};
pub use model::{Layer, Model};
pub use names::Naming;
pub use presets::{PRESETS, Preset, preset_config};
pub use rope::{Rope, Scaling};
pub use tokenizer::{Tokenizer, TokenizerError};
pub use tokens::{Goal, Objective, Sequence, Tokens};
