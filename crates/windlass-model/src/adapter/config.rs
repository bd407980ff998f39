//! The settings of an adapter: PEFT's `adapter_config.json`, read and written.

use crate::config::{Fields, ModelError};
use serde_json::{Map, Value, json};

/// An adapter's settings, as PEFT names them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The file they come from, for messages.
    pub file: String,
    /// Rank.
    pub r: usize,
    /// The adapter's product is scaled by `lora_alpha / r`, or by `lora_alpha / √r` with `use_rslora`.
    pub lora_alpha: f64,
    /// Part of an adapter's input that is dropped in training.
    pub lora_dropout: f64,
    /// Whether the scale falls with the root of the rank (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Whether magnitude and direction are trained apart (Liu et al. 2024).
    pub use_dora: bool,
    /// The modules that get adapters.
    pub target_modules: Targets,
    /// Modules among them that get none.
    pub exclude_modules: Option<Targets>,
    /// The layers whose modules get adapters; all when `None`.
    pub layers_to_transform: Option<Vec<usize>>,
    /// What stands in front of the number of a layer.
    pub layers_pattern: Vec<String>,
    /// Other ranks by patterns of names; the first match counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Other values of `lora_alpha` by patterns of names.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules that are trained and saved whole.
    pub modules_to_save: Vec<String>,
    /// Whether a table that is the head too stays one when it is trained whole.
    pub ensure_weight_tying: bool,
    /// Whether `A` begins normal instead of uniform.
    pub gaussian: bool,
    /// Whether the adapted matrices are transposed in files (GPT-2).
    pub fan_in_fan_out: bool,
    /// What the adapter belongs to.
    pub base_model_name_or_path: Option<String>,
}

/// A choice of modules.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Those that PEFT adapts by default: the attention's inputs.
    Usual,
    /// Every matrix of the blocks (`"all-linear"`).
    AllLinear,
    /// Those whose whole name matches a pattern.
    Pattern(String),
    /// Those that end with one of some names.
    Names(Vec<String>),
}

impl Default for AdapterConfig {
    /// Rank 16, alpha 32, all matrices.
    fn default() -> Self {
        AdapterConfig {
            file: super::ADAPTER_CONFIG_FILE.into(),
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            ensure_weight_tying: false,
            gaussian: false,
            fan_in_fan_out: false,
            base_model_name_or_path: None,
        }
    }
}

/// Keys that are read here.
const KNOWN: [&str; 19] = [
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "ensure_weight_tying",
    "init_lora_weights",
    "fan_in_fan_out",
    "bias",
    "base_model_name_or_path",
    "loftq_config",
];

/// Keys that change nothing about what an adapter computes.
const WITHOUT_EFFECT: [&str; 10] = [
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "task_type",
    "megatron_core",
    "runtime_config",
    "qalora_group_size",
    "eva_config",
    "corda_config",
];

impl AdapterConfig {
    /// Reads an `adapter_config.json`; `file` names it in messages.
    ///
    /// # Errors
    /// Values that are none, and settings that would change results and are not supported.
    pub fn from_json(file: &str, text: &str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_str(text).map_err(|error| ModelError::Json {
            file: file.into(),
            message: error.to_string(),
        })?;
        let f = Fields::root(file, &value)?;
        refuse(&f, &value)?;
        // PEFT's own defaults, for keys that are left out.
        let config = AdapterConfig {
            file: file.to_owned(),
            r: f.int("r")?.unwrap_or(8),
            lora_alpha: f.number("lora_alpha")?.unwrap_or(8.0),
            lora_dropout: f.number("lora_dropout")?.unwrap_or(0.0),
            use_rslora: f.flag("use_rslora")?.unwrap_or(false),
            use_dora: f.flag("use_dora")?.unwrap_or(false),
            target_modules: targets(&f, &value, "target_modules")?.unwrap_or(Targets::Usual),
            exclude_modules: targets(&f, &value, "exclude_modules")?,
            layers_to_transform: match &value["layers_to_transform"] {
                Value::Number(_) => f.int("layers_to_transform")?.map(|layer| vec![layer]),
                _ => f.list("layers_to_transform", |v| v.as_u64().map(|n| n as usize))?,
            },
            layers_pattern: texts(&f, &value, "layers_pattern")?.unwrap_or_default(),
            rank_pattern: pattern(&f, &value, "rank_pattern", |v| {
                v.as_u64().map(|n| n as usize).filter(|&n| n > 0)
            })?,
            alpha_pattern: pattern(&f, &value, "alpha_pattern", Value::as_f64)?,
            modules_to_save: texts(&f, &value, "modules_to_save")?.unwrap_or_default(),
            ensure_weight_tying: f.flag("ensure_weight_tying")?.unwrap_or(false),
            gaussian: value["init_lora_weights"] == "gaussian",
            fan_in_fan_out: f.flag("fan_in_fan_out")?.unwrap_or(false),
            base_model_name_or_path: f.text("base_model_name_or_path")?,
        };
        config.check()?;
        Ok(config)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// The first that is out of its range.
    pub fn check(&self) -> Result<(), ModelError> {
        if self.r == 0 || self.r > 1 << 16 {
            return Err(self.error("r", format!("is {}", self.r), "ranks are 4 to 256"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let message = format!("is {}", self.lora_dropout);
            return Err(self.error("lora_dropout", message, "it is at least 0 and below 1"));
        }
        if !self.lora_alpha.is_finite() {
            let message = format!("is {}", self.lora_alpha);
            return Err(self.error("lora_alpha", message, "it is a finite number"));
        }
        Ok(())
    }

    /// The file as PEFT writes it: keys in order, `inference_mode` true.
    pub fn to_json(&self) -> Value {
        let choice = |targets: &Targets| match targets {
            Targets::Usual => Value::Null,
            Targets::AllLinear => json!("all-linear"),
            Targets::Pattern(pattern) => json!(pattern),
            Targets::Names(names) => json!(names),
        };
        let mut all: Vec<(&str, Value)> = vec![
            ("alpha_pattern", object(&self.alpha_pattern)),
            ("auto_mapping", Value::Null),
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("bias", json!("none")),
            (
                "exclude_modules",
                self.exclude_modules.as_ref().map_or(Value::Null, choice),
            ),
            ("fan_in_fan_out", json!(self.fan_in_fan_out)),
            ("inference_mode", json!(true)),
            (
                "init_lora_weights",
                match self.gaussian {
                    true => json!("gaussian"),
                    false => json!(true),
                },
            ),
            ("layers_pattern", or_null(&self.layers_pattern)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("modules_to_save", or_null(&self.modules_to_save)),
            ("peft_type", json!("LORA")),
            ("r", json!(self.r)),
            ("rank_pattern", object(&self.rank_pattern)),
            ("revision", Value::Null),
            ("target_modules", choice(&self.target_modules)),
            ("task_type", json!("CAUSAL_LM")),
            ("use_dora", json!(self.use_dora)),
            ("use_rslora", json!(self.use_rslora)),
        ];
        if self.ensure_weight_tying {
            // A key that older versions of PEFT do not know.
            all.push(("ensure_weight_tying", json!(true)));
        }
        all.sort_by_key(|(key, _)| *key);
        let all = all.into_iter().map(|(key, value)| (key.to_owned(), value));
        Value::Object(all.collect::<Map<_, _>>())
    }

    pub(super) fn error(
        &self,
        key: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> ModelError {
        ModelError::Key {
            file: self.file.clone(),
            key: key.to_owned(),
            message: message.into(),
            hint: hint.into(),
        }
    }
}

/// Refuses what would compute something else than it says.
fn refuse(f: &Fields<'_>, value: &Value) -> Result<(), ModelError> {
    let kind = f.text("peft_type")?;
    if kind.as_deref() != Some("LORA") {
        let kind = kind.unwrap_or_else(|| "none".to_owned());
        return Err(f.unsupported("peft_type", &kind, "adapters are of the type LORA"));
    }
    if let Some(bias) = f.text("bias")?.filter(|bias| bias != "none") {
        let hint = "biases are not trained with adapters: use \"none\"";
        return Err(f.unsupported("bias", &bias, hint));
    }
    match &value["init_lora_weights"] {
        Value::Null | Value::Bool(_) => {}
        Value::String(init) if ["gaussian", "eva", "orthogonal"].contains(&init.as_str()) => {}
        other => {
            let hint = "such an adapter belongs to a base that was changed with it: convert it with PEFT's \
                        path_initial_model_for_weight_conversion first";
            return Err(f.error(
                "init_lora_weights",
                format!("{other} is not supported"),
                hint,
            ));
        }
    }
    let empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    let known = |key: &&str| !KNOWN.contains(key) && !WITHOUT_EFFECT.contains(key);
    match f.keys().filter(known).find(|key| !empty(&value[*key])) {
        Some(key) => {
            let message = format!("{} is not supported", value[key]);
            let hint = "it would change what the adapter computes; adapters without it can be used";
            Err(f.error(key, message, hint))
        }
        None => Ok(()),
    }
}

fn targets(f: &Fields<'_>, value: &Value, key: &str) -> Result<Option<Targets>, ModelError> {
    Ok(match &value[key] {
        Value::String(text) if text == "all-linear" => Some(Targets::AllLinear),
        Value::String(text) => Some(Targets::Pattern(text.clone())),
        _ => f
            .list(key, |v| v.as_str().map(str::to_owned))?
            .map(Targets::Names),
    })
}

/// A list of texts, or one text.
fn texts(f: &Fields<'_>, value: &Value, key: &str) -> Result<Option<Vec<String>>, ModelError> {
    match &value[key] {
        Value::String(text) => Ok(Some(vec![text.clone()])),
        _ => f.list(key, |v| v.as_str().map(str::to_owned)),
    }
}

fn pattern<T>(
    f: &Fields<'_>,
    value: &Value,
    key: &str,
    item: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>, ModelError> {
    let Some(map) = value[key].as_object() else {
        return match &value[key] {
            Value::Null => Ok(Vec::new()),
            other => Err(f.error(key, format!("is {other}"), "it maps patterns to numbers")),
        };
    };
    let entries = map.iter().map(|(name, number)| {
        let number = item(number).ok_or_else(|| {
            let message = format!("\"{name}\" is {number}");
            f.error(key, message, "it maps patterns to positive numbers")
        })?;
        Ok((name.clone(), number))
    });
    entries.collect()
}

fn object<T: Copy + Into<Numeric>>(entries: &[(String, T)]) -> Value {
    let entries = entries
        .iter()
        .map(|(name, value)| (name.clone(), (*value).into().0));
    Value::Object(entries.collect::<Map<_, _>>())
}

/// A number as JSON.
struct Numeric(Value);

impl From<usize> for Numeric {
    fn from(value: usize) -> Self {
        Numeric(json!(value))
    }
}

impl From<f64> for Numeric {
    fn from(value: f64) -> Self {
        Numeric(number(value))
    }
}

/// A whole number without a point, as PEFT writes it.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}

fn or_null(list: &[String]) -> Value {
    match list.is_empty() {
        true => Value::Null,
        false => json!(list),
    }
}
