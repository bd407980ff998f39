//! Tensors, weights, ops with their backward passes, and the tape.

pub mod rng;

pub use rng::Rng;
