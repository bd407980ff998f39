//! Block types: the fixed-size groups of numbers that GGUF files are made of.
//!
//! [`BlockType`] knows their names, ids and sizes, [`Codes`] takes a block apart and puts it together, and on that rest
//! [`dequantize`] and [`quantize`]. Slices in, slices out: what tensors the numbers belong to is not known here. The
//! codebook types (`IQ1_S` to `IQ3_S`) are read and not written.
//!
//! # Source
//! The layouts of `ggml-common.h` in llama.cpp.

mod codebook;
mod codes;
mod dequantize;
mod encode;
mod kind;
mod quantize;
mod search;
mod super_block;

pub use codes::{Codes, FLOAT4, Levels, MAX_ELEMENTS, SIGN, UNEVEN, codes};
pub use dequantize::{dequantize, dequantize_all, first_bad_block, first_bad_block_of_all};
pub use kind::{BlockType, UnknownType};
pub use quantize::{quantize, quantize_all};
