//! Windlass: mechanical advantage for language models. The facade library and the command line.

pub mod hub;
pub mod progress;
