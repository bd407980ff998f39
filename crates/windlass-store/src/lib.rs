//! Parameters at rest: file codecs, checkpoints, and where parameters live.
//!
//! [`safetensors`] reads and writes Hugging Face weights, [`gguf`] those of llama.cpp; [`llama2c`] reads the files of a llama2.c model;
//! [`packed`] keeps a model as it is in memory; [`checkpoint`] keeps folders that a killed run can continue from. All of them work on names, shapes and slices of
//! numbers. Whatever is written appears whole or not at all ([`atomic`]), except for [`swap`] files, which are state of a
//! running program and vanish with it.

pub mod atomic;
pub mod checkpoint;
mod error;
pub mod gguf;
pub mod llama2c;
pub mod mmap;
pub mod packed;
pub mod safetensors;
mod store;
pub mod swap;
mod transfer;

pub use error::{Error, Result};
pub use store::{
    ArrayKind, Deal, Gathered, Home, Placement, Shard, Shelved, Stage, StateEntry, StateSpec,
    Store, Tier, Wire, partition,
};
pub use transfer::{Loader, elements, load_weights, save_weights};
