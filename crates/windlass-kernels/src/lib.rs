//! CPU kernels of Windlass: slices in, slices out.
//!
//! Every kernel exists first as a safe scalar function in [`mod@reference`] — the specification — and then as SIMD
//! versions behind one table of function pointers ([`dispatch`]), chosen once. Work is split over rows and columns,
//! never over the inner dimension in a thread-dependent way, so results do not depend on the number of threads.
//!
//! This crate knows nothing of tensors, models or files.

pub mod activation;
pub mod attention;
pub mod blocks;
pub mod cast;
pub mod cost;
pub mod cross_entropy;
pub mod dispatch;
mod element;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
pub mod memory;
pub mod norm;
pub mod optim;
pub mod packed;
pub mod pool;
pub mod reduce;
pub mod reference;
pub mod roofline;
pub mod rope;
pub mod simd;
pub mod softmax;
pub mod split;
mod stream;
mod tasks;
mod tiles;
pub mod topk;

pub use element::{DType, Element, Float};
