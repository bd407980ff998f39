//! GGUF files: typed metadata and tensors of blocks, in one file or in several.
//!
//! A file is a header of counts, keys with typed values, a list of tensors, padding, and the tensors' bytes. Reading
//! maps the file and copies no tensor; everything a header claims is checked against the file's size before memory is
//! taken for it. Versions 2 and 3 are read, version 3 is written, one tensor at a time.
//!
//! What the bytes of a tensor mean is the business of [`windlass_tensor::kernels::blocks`].
//!
//! # Source
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>

mod cursor;
mod header;
mod metadata;
mod reader;
mod split;
mod value;
mod writer;

pub use header::{Header, Problem, TensorInfo};
pub use metadata::Metadata;
pub use reader::{File, is_gguf};
pub use value::{Array, FromValue, Kind, Value};
pub use windlass_tensor::kernels::blocks::BlockType;
pub use writer::{MAX_NAME_BYTES, Writer};

/// The first four bytes of every file.
const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
const VERSION: u32 = 3;
/// Where tensors begin if the file does not say: at multiples of this.
const DEFAULT_ALIGNMENT: usize = 32;
/// The key of another alignment.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Largest alignment that is believed, in bytes: beyond pages of any size that weights are mapped in.
const MAX_ALIGNMENT: u32 = 1 << 24;
/// Dimensions that a tensor may have.
const MAX_DIMS: usize = 4;
