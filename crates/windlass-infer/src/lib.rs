//! Generation: sampling, stop conditions, the decode loop.

mod error;
pub mod sampler;
pub mod stop;

pub use error::InferError;
