//! From files to batches: documents are read, tokenized once into a file, and cut into shuffled sequences.
//!
//! [`Corpus`] reads documents, [`tokenize`] makes a [`TokenFile`] of them, [`Split`] holds some back, and
//! [`Sampler`] and [`Evaluation`] hand out [`Batch`]es. Nothing here knows a model.

pub mod read;
pub mod sampler;
pub mod split;
pub mod tokens;

pub(crate) mod records;
mod text;

pub use read::{Corpus, Piece, Pieces, ReadOptions};
pub use sampler::{Batch, Evaluation, Packing, Sampler, SamplerState};
pub use split::{Split, View};
pub use tokens::{Progress, TokenFile, TokenizeOptions, Tokenized, tokenize};
