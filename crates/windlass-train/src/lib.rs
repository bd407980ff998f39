//! Training: engine, optimizers, schedules, precision, data.
//!
//! This is the one place where a model and the store of its parameters meet.

mod engine;
mod optimizer;

pub use engine::{Engine, EngineOptions, Loss, NonFinite, StepReport, run};
pub use optimizer::Optimizer;
