//! The parameters of each learning-rate schedule of DeepSpeed.

use super::Status::Unsupported;
use super::{BOOL, COUNT, INT, Key, Kind, NOT_NEGATIVE, NUMBER, POSITIVE, UNIT, YES, key};

const RAMP: Kind = Kind::Choice(&["log", "linear"]);
const RESUMED: Key = key(
    "last_batch_iteration",
    Kind::Signed,
    "-1",
    Unsupported("a run resumes from a checkpoint"),
);

/// The schedules: the name and the parameters of each. A default of `null` on `total_num_steps`, `cycle_min_lr` and
/// `cycle_max_lr` means that there is none.
pub const SCHEDULERS: &[(&str, &[Key])] = &[
    ("WarmupLR", WARMUP),
    ("WarmupDecayLR", WARMUP_DECAY),
    ("WarmupCosineLR", WARMUP_COSINE),
    ("OneCycle", ONE_CYCLE),
    ("LRRangeTest", RANGE_TEST),
];

const WARMUP: &[Key] = &[
    key("warmup_min_lr", NOT_NEGATIVE, "0.0", YES),
    key("warmup_max_lr", NOT_NEGATIVE, "null", YES),
    key("warmup_num_steps", COUNT, "1000", YES),
    key("warmup_type", RAMP, r#""log""#, YES),
    RESUMED,
];

const WARMUP_DECAY: &[Key] = &[
    key("total_num_steps", INT, "null", YES),
    key("warmup_min_lr", NOT_NEGATIVE, "0.0", YES),
    key("warmup_max_lr", NOT_NEGATIVE, "0.001", YES),
    key("warmup_num_steps", COUNT, "1000", YES),
    key("warmup_type", RAMP, r#""log""#, YES),
    RESUMED,
];

const WARMUP_COSINE: &[Key] = &[
    key("total_num_steps", INT, "null", YES),
    key("warmup_min_ratio", UNIT, "0.0", YES),
    key("warmup_num_steps", COUNT, "1000", YES),
    key("cos_min_ratio", UNIT, "0.0001", YES),
    key("warmup_type", RAMP, r#""log""#, YES),
    RESUMED,
];

const ONE_CYCLE: &[Key] = &[
    key("cycle_min_lr", NOT_NEGATIVE, "null", YES),
    key("cycle_max_lr", NOT_NEGATIVE, "null", YES),
    key("decay_lr_rate", NOT_NEGATIVE, "0.0", YES),
    key("cycle_first_step_size", COUNT, "2000", YES),
    key("cycle_second_step_size", COUNT, "null", YES),
    key("cycle_first_stair_count", INT, "0", YES),
    key("cycle_second_stair_count", INT, "null", YES),
    key("decay_step_size", INT, "0", YES),
    key("cycle_momentum", BOOL, "true", YES),
    key("cycle_min_mom", UNIT, "0.8", YES),
    key("cycle_max_mom", UNIT, "0.9", YES),
    key("decay_mom_rate", NUMBER, "0.0", YES),
    RESUMED,
];

const RANGE_TEST: &[Key] = &[
    key("lr_range_test_min_lr", POSITIVE, "0.001", YES),
    key("lr_range_test_step_size", COUNT, "2000", YES),
    key("lr_range_test_step_rate", NUMBER, "1.0", YES),
    key("lr_range_test_staircase", BOOL, "false", YES),
    RESUMED,
];
