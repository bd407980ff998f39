//! Training: engine, optimizers, schedules, precision, data.
//!
//! This is the one place where a model and the store of its parameters meet.

mod background;
mod checkpoint;
pub mod config;
pub mod corpus;
pub mod data;
mod engine;
pub mod error;
pub mod estimate;
mod evaluate;
mod export;
mod fit;
mod initialize;
pub mod loss_scale;
pub mod monitor;
mod no_sync;
mod optimizer;
mod pace;
mod pass;
mod plan;
pub mod preference;
mod profile;
mod save;
pub mod schedule;
mod together;
mod trainer;
pub mod tune;

pub use engine::{Engine, EngineOptions, EngineState, Loss, Losses, StepReport};
pub use error::{Error, Result};
pub use evaluate::{idle, run};
pub use export::{CheckpointSummary, export, summary};
pub use fit::{Change, Fit, Outline, fit};
pub use initialize::{initialize, initialize_on};
pub use no_sync::NoSync;
pub use optimizer::Optimizer;
pub use pace::{Likeness, Pace, pace};
pub use plan::{Plan, StepShape, measure_step, plan, plan_batch, plan_rank};
pub use profile::LayerProfile;
pub use save::load_model;
pub use trainer::{End, Event, Lessons, StepEvent, StepTimes, Subject, TrainOptions, Trainer};
