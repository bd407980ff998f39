//! Models made smaller.
//!
//! [`quantize`] rewrites a GGUF file with fewer bits: a [`FileType`] says how many on the whole, [`plan`] which tensor
//! gets which block type, an [`Importance`] matrix which columns matter most. What a block type is, and its arithmetic,
//! is the business of the kernels; what a file is, of the store. Nothing here needs to know what a model computes.

mod error;
mod file_type;
mod importance;
mod quantize;
mod select;

pub use error::{Error, Result};
pub use file_type::FileType;
pub use importance::Importance;
pub use quantize::{Options, Report, quantize};
pub use select::{Planned, plan, plan_tensors};
