//! What a run is given: ranks, settings of the command line, and what `"auto"` becomes.

use serde_json::{Value, json};

use super::values::Values;

/// What fills in `"auto"`. What is `None` is not known; then `"auto"` is the default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Auto {
    /// Sequences of one forward pass of one rank.
    pub train_micro_batch_size_per_gpu: Option<u64>,
    /// Forward passes of one optimizer step.
    pub gradient_accumulation_steps: Option<u64>,
    /// The largest gradient norm.
    pub gradient_clipping: Option<f64>,
    /// Learning rate: of the optimizer, and the peak of a warm-up.
    pub lr: Option<f64>,
    /// Decays of the moments.
    pub betas: Option<(f64, f64)>,
    /// Added to the root of the second moment.
    pub eps: Option<f64>,
    /// Decay of weights.
    pub weight_decay: Option<f64>,
    /// Steps of the warm-up.
    pub warmup_num_steps: Option<u64>,
    /// Steps of the run.
    pub total_num_steps: Option<u64>,
    /// Whether the run is in fp16.
    pub fp16: Option<bool>,
    /// Whether the run is in bf16.
    pub bf16: Option<bool>,
    /// The width of the model: stage 3 takes bucket sizes from it.
    pub hidden_size: Option<u64>,
}

/// Everything about a run that is not in its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    /// Data-parallel ranks; at least 1.
    pub world_size: u64,
    /// What fills in `"auto"`, and must agree with what the file says otherwise.
    pub auto: Auto,
    /// Keys set on the command line, which stand before the file.
    pub overrides: Vec<(String, Value)>,
}

impl Context {
    /// A run of a number of ranks that gives nothing else.
    pub fn ranks(world_size: u64) -> Self {
        Self {
            world_size,
            auto: Auto::default(),
            overrides: Vec::new(),
        }
    }
}

/// Fills in `"auto"` and what the file does not mention, and refuses what the file and the run say differently.
pub(super) fn fill(values: &mut Values, auto: &Auto) {
    for (key, value) in given(auto) {
        if !values.has(key) {
            continue;
        }
        if values.is_auto(key) || !values.is_given(key) {
            values.set(key, value);
        } else if !values.is_set(key) && !same(values.value(key), &value) {
            let message = format!(
                "{} in the file, {value} on the command line",
                values.value(key)
            );
            let hint = format!("set {key} to \"auto\" in the file, or leave the flag away");
            values.wrong(key, message, hint);
        }
    }
    if values.has(MIN_LR) && values.is_auto(MIN_LR) {
        values.set(MIN_LR, json!(0.0));
    }
    if let Some(width) = auto.hidden_size {
        from_hidden_size(values, width);
    }
}

const MIN_LR: &str = "scheduler.params.warmup_min_lr";

fn same(a: &Value, b: &Value) -> bool {
    let numbers = |v: &Value| -> Option<Vec<f64>> {
        match v {
            Value::Array(items) => items.iter().map(Value::as_f64).collect(),
            v => Some(vec![v.as_f64()?]),
        }
    };
    a == b || numbers(a).is_some_and(|a| numbers(b) == Some(a))
}

/// Key and value, where the run gives one.
fn given(auto: &Auto) -> impl Iterator<Item = (&'static str, Value)> {
    let number = |n: Option<f64>| n.map(|n| json!(n));
    let int = |n: Option<u64>| n.map(|n| json!(n));
    [
        (
            "train_micro_batch_size_per_gpu",
            int(auto.train_micro_batch_size_per_gpu),
        ),
        (
            "gradient_accumulation_steps",
            int(auto.gradient_accumulation_steps),
        ),
        ("gradient_clipping", number(auto.gradient_clipping)),
        ("optimizer.params.lr", number(auto.lr)),
        (
            "optimizer.params.betas",
            auto.betas.map(|(first, second)| json!([first, second])),
        ),
        ("optimizer.params.eps", number(auto.eps)),
        ("optimizer.params.weight_decay", number(auto.weight_decay)),
        ("scheduler.params.warmup_max_lr", number(auto.lr)),
        (
            "scheduler.params.warmup_num_steps",
            int(auto.warmup_num_steps.map(|steps| steps.max(1))),
        ),
        (
            "scheduler.params.total_num_steps",
            int(auto.total_num_steps),
        ),
        ("fp16.enabled", auto.fp16.map(Value::Bool)),
        ("bf16.enabled", auto.bf16.map(Value::Bool)),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value?)))
}

/// The sizes that Hugging Face takes from the width of the model.
fn from_hidden_size(values: &mut Values, width: u64) {
    let square = width.saturating_mul(width);
    for (key, size) in [
        ("reduce_bucket_size", square),
        ("stage3_prefetch_bucket_size", (0.9 * square as f64) as u64),
        (
            "stage3_param_persistence_threshold",
            width.saturating_mul(10),
        ),
    ] {
        let key = format!("zero_optimization.{key}");
        if values.is_auto(&key) {
            values.set(&key, size.into());
        }
    }
}
