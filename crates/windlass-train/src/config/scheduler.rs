//! `scheduler`: from keys to a [`Scheduler`].

use super::values::Values;
use crate::schedule::deepspeed::{OneCycle, Scheduler, Warmup, WarmupType};

/// The schedule of a configuration; `base` is the rate of its optimizer.
pub(super) fn read(values: &mut Values, base: Option<f64>) -> Option<Scheduler> {
    let name = values.text("scheduler.type")?.to_lowercase();
    if !values.has("scheduler.params.last_batch_iteration") {
        return None;
    }
    match name.as_str() {
        "warmuplr" => {
            let max = match values.value(&param("warmup_max_lr")).as_f64() {
                Some(max) => max,
                None => {
                    let base = optimizer_rate(values, base, "WarmupLR without warmup_max_lr")?;
                    values.set(&param("warmup_max_lr"), base.into());
                    base
                }
            };
            Some(Scheduler::WarmupLR {
                min: number(values, "warmup_min_lr"),
                max,
                warmup: warmup(values),
            })
        }
        "warmupdecaylr" => Some(Scheduler::WarmupDecayLR {
            min: number(values, "warmup_min_lr"),
            max: number(values, "warmup_max_lr"),
            warmup: warmup(values),
            total: total(values)?,
        }),
        "warmupcosinelr" => Some(Scheduler::WarmupCosineLR {
            base: optimizer_rate(values, base, "WarmupCosineLR")?,
            min_ratio: number(values, "warmup_min_ratio"),
            cos_min_ratio: number(values, "cos_min_ratio"),
            warmup: warmup(values),
            total: total(values)?,
        }),
        "onecycle" => one_cycle(values).map(Scheduler::OneCycle),
        _ => Some(Scheduler::LRRangeTest {
            min: number(values, "lr_range_test_min_lr"),
            step_size: values.int(&param("lr_range_test_step_size")),
            step_rate: number(values, "lr_range_test_step_rate"),
            staircase: values.bool(&param("lr_range_test_staircase")),
        }),
    }
}

fn param(key: &str) -> String {
    format!("scheduler.params.{key}")
}

fn number(values: &Values, key: &str) -> f64 {
    values.number(&param(key))
}

fn warmup(values: &Values) -> Warmup {
    Warmup {
        steps: values.int(&param("warmup_num_steps")),
        shape: match values.text(&param("warmup_type")) {
            Some("linear") => WarmupType::Linear,
            _ => WarmupType::Log,
        },
    }
}

fn optimizer_rate(values: &mut Values, base: Option<f64>, whose: &str) -> Option<f64> {
    if base.is_none() {
        let message = format!("{whose} takes its peak from the optimizer, and there is none");
        values.wrong("scheduler.type", message, "set optimizer.params.lr");
    }
    base
}

/// `total_num_steps`, which has no default.
fn total(values: &mut Values) -> Option<u64> {
    let key = param("total_num_steps");
    let steps = values.value(&key).as_u64();
    if steps.is_none() {
        let hint = "give a number of steps; \"auto\" is filled in from the length of the run";
        values.wrong(&key, "it is missing", hint);
    }
    steps
}

fn one_cycle(values: &mut Values) -> Option<OneCycle> {
    let mut rate = |key: &str| {
        let key = param(key);
        let rate = values.value(&key).as_f64();
        if rate.is_none() {
            values.wrong(&key, "it is missing", "OneCycle has no default for it");
        }
        rate
    };
    let (min, max) = (rate("cycle_min_lr"), rate("cycle_max_lr"));
    let int = |key: &str| values.int(&param(key));
    let maybe = |key: &str| values.value(&param(key)).as_u64();
    Some(OneCycle {
        cycle_min_lr: min?,
        cycle_max_lr: max?,
        decay_lr_rate: number(values, "decay_lr_rate"),
        cycle_first_step_size: int("cycle_first_step_size"),
        cycle_second_step_size: maybe("cycle_second_step_size"),
        cycle_first_stair_count: int("cycle_first_stair_count"),
        cycle_second_stair_count: maybe("cycle_second_stair_count"),
        decay_step_size: int("decay_step_size"),
        cycle_momentum: values.bool(&param("cycle_momentum")),
        cycle_min_mom: number(values, "cycle_min_mom"),
        cycle_max_mom: number(values, "cycle_max_mom"),
        decay_mom_rate: number(values, "decay_mom_rate"),
    })
}
