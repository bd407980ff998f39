//! The ops, one file each: forward, and what the tape keeps for the backward pass.

mod activation;
mod attention;
mod cross_entropy;
mod embedding;
mod experts;
mod glue;
mod linear;
mod lora;
mod moe;
mod norm;
mod overlay;
mod packed_weight;
mod rope;

pub use cross_entropy::{IGNORED, Sloped};
pub use experts::{Expert, Projection};
pub use lora::{Lora, row_norms};
pub use moe::{RouterStats, Routing};
pub(crate) use overlay::Overlays;
pub use overlay::UnitOverlay;
pub use rope::RopeTable;
