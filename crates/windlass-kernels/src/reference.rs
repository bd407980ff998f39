//! The specification: every kernel as a safe scalar function, straight loops, generic over the storage type.
//!
//! Functions take the arguments of the public kernel without the pool, and work on any number of rows, so that they
//! are at once the oracle of the tests, the scalar level, and what `f64` (finite differences) always runs.

mod activation;
mod cross_entropy;
mod elementwise;
mod embedding;
mod norm;
mod optim;
mod reduce;
mod rope;
mod softmax;
mod topk;

pub use activation::{activation, activation_backward, gated, gated_backward};
pub use cross_entropy::cross_entropy_rows;
pub use elementwise::{add, axpy, cast, fill, mul, scale, scale_in_place, sum_rows, transpose};
pub use embedding::{gather, scatter_add};
pub use norm::{layer_norm, layer_norm_dw, layer_norm_dx, rms_norm, rms_norm_dw, rms_norm_dx};
pub use optim::optimizer_step;
pub(crate) use optim::{doubles, update, update_stored};
pub use reduce::{count_nonfinite, dot, sum_squares};
pub use rope::rope;
pub use softmax::{log_softmax, log_softmax_backward, softmax, softmax_backward};
pub use topk::top_k;
