//! Windlass: mechanical advantage for language models. The facade library and the command line.

pub mod accelerator;
pub mod hub;
pub mod prelude;
pub mod progress;

pub use windlass_train::{initialize, initialize_on};
pub use {
    windlass_comm as comm, windlass_compress as compress, windlass_infer as infer,
    windlass_model as model, windlass_serve as serve, windlass_store as store,
};
pub use {windlass_tensor as tensor, windlass_train as train};
