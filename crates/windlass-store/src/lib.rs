//! Parameters at rest: file codecs, checkpoints, and where parameters live.
//!
//! [`safetensors`] reads and writes Hugging Face weights. It works on names, shapes and slices of numbers, and knows no
//! architecture. Whatever is written appears whole or not at all ([`atomic`]).

pub mod atomic;
mod error;
pub mod mmap;
pub mod safetensors;
mod store;
mod transfer;

pub use error::{Error, Result};
pub use store::{Gathered, Shard, Store, Values};
pub use transfer::{elements, load_weights, save_weights};
