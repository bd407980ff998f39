//! Tensors in the safetensors format: one file, or a Hugging Face folder of shards with an index.
//!
//! A file is eight bytes of header length, a JSON header naming each tensor's type, shape and byte range, and the
//! bytes themselves. Reading maps the file and converts only the rows asked for; writing streams, so that no more
//! than one tensor needs to be in memory. Everything a header claims is checked before it is believed.
//!
//! # Source
//! <https://huggingface.co/docs/safetensors/index>, section "Format".

mod header;
mod reader;
mod value;
mod writer;

pub use ::safetensors::Dtype;
pub use header::{Header, Info, Spec};
pub use reader::{Tensors, View};
pub(crate) use reader::{is_plain_name, nearest};
pub use value::{Value, read_values};

pub use writer::{Options, TensorWriter, write_file, write_folder};
pub(crate) use writer::{encode_index, plan_shards, shard_name, write_tensors};

/// The weights of a folder that fit one file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of a folder whose weights are sharded.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
