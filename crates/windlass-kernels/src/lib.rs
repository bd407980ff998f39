//! CPU kernels of Windlass: slices in, slices out.
//!
//! Every kernel exists first as a safe scalar function in [`reference`] — the specification — and then as SIMD
//! versions behind one table of function pointers ([`dispatch`]), chosen once. Work is split over rows and columns,
//! never over the inner dimension in a thread-dependent way, so results do not depend on the number of threads.
//!
//! This crate knows nothing of tensors, models or files.

pub mod dispatch;
mod element;
pub mod memory;
pub mod pool;
pub mod simd;
pub mod split;

pub use element::{DType, Element, Float};
