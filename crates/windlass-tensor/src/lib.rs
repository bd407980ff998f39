//! Tensors, weights, ops with their backward passes, and the tape.
//!
//! An op is one file in [`ops`]: its forward method on [`Tape`] and the struct that the tape keeps for its backward
//! pass. The tape records the *slots* of a unit's weights, never the weights: `backward` is handed them again.

mod layout;
pub mod ops;
mod packed;
pub mod rng;
mod shape;
mod tape;
mod tensor;
mod weight;

pub use half::{bf16, f16};
pub use layout::{FileTensor, Layout, ParamId, UnitSpec};
pub use ops::{
    Expert, IGNORED, Lora, Projection, RopeTable, RouterStats, Routing, Sloped, UnitOverlay,
    row_norms,
};
pub use packed::Packed;
pub use rng::Rng;
pub use shape::Shape;
pub use tape::{Backprop, Backward, Kept, Recipe, Recorded, Tape, Var, Watch};
pub use tensor::{Cpu, Tensor};
pub use weight::{Grads, Init, Param, ParamSpec, Weight, Weights};
pub use windlass_kernels as kernels;
pub use windlass_kernels::DType;
pub use windlass_kernels::activation::Activation;
pub use windlass_kernels::attention::{AttentionShape, Segment};
pub use windlass_kernels::memory::Category;
