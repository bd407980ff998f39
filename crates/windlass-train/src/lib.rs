//! Training: engine, optimizers, schedules, precision, data.
