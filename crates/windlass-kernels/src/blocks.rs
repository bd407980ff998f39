//! Block types: the fixed-size groups of numbers that GGUF files are made of.
//!
//! [`BlockType`] knows their names, ids and sizes. Bytes in, numbers out; this module knows no files.
//!
//! # Source
//! The layouts of `ggml-common.h` in llama.cpp.

mod kind;

pub use kind::{BlockType, UnknownType};
