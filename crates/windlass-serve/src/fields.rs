//! A request's JSON object, read key by key.
//!
//! What is read is taken out; what is left at the end was not understood and is refused by name, so that no setting is
//! ignored in silence. `null` is as good as absent everywhere.

use crate::refusal::Refusal;
use serde_json::{Map, Value};

/// Fields that change nothing about the answer of a server of one's own.
const HARMLESS: [&str; 5] = [
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

/// An object that is being read.
pub(crate) struct Fields {
    /// Where it is in the request: empty, or such as `messages[2].`.
    at: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The whole request.
    pub fn new(body: Value) -> Result<Self, Refusal> {
        match body {
            Value::Object(map) => Ok(Fields {
                at: String::new(),
                map,
            }),
            other => Err(Refusal::invalid(format!(
                "the body must be a JSON object, not {}",
                kind(&other)
            ))),
        }
    }

    /// An object inside the request, by its place.
    pub fn inside(at: impl Into<String>, value: Value) -> Result<Self, Refusal> {
        let at = at.into();
        match value {
            Value::Object(map) => Ok(Fields { at: at + ".", map }),
            other => Err(Refusal::field(
                at,
                format!("must be an object, not {}", kind(&other)),
            )),
        }
    }

    /// The place of a field, as errors name it.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.at)
    }

    /// A refusal of a field.
    pub fn refuse(&self, name: &str, problem: impl std::fmt::Display) -> Refusal {
        Refusal::field(self.path(name), problem)
    }

    /// Any value.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        // The order of what is left does not matter, so the last may take the place of the one removed.
        self.map.swap_remove(name).filter(|value| !value.is_null())
    }

    /// A value that is left to be read.
    pub fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn wrong(&self, name: &str, wanted: &str, value: &Value) -> Refusal {
        self.refuse(name, format!("must be {wanted}, not {}", kind(value)))
    }

    /// True or false.
    pub fn bool(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(name, "true or false", &other)),
        }
    }

    /// A number within limits.
    pub fn number(&mut self, name: &str, from: f64, to: f64) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if (from..=to).contains(&number) => Ok(Some(number)),
            Some(number) => {
                Err(self.refuse(name, format!("must be from {from} to {to}, not {number}")))
            }
            None => Err(self.wrong(name, "a number", &value)),
        }
    }

    /// A whole number within limits.
    pub fn integer(&mut self, name: &str, from: i64, to: i64) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.take(name) else {
            return Ok(None);
        };
        let Value::Number(number) = &value else {
            return Err(self.wrong(name, "a whole number", &value));
        };
        match number.as_i64() {
            Some(number) if (from..=to).contains(&number) => Ok(Some(number)),
            _ => Err(self.refuse(
                name,
                format!("must be a whole number from {from} to {to}, not {number}"),
            )),
        }
    }

    /// A count within limits.
    pub fn count(&mut self, name: &str, from: usize, to: usize) -> Result<Option<usize>, Refusal> {
        let number = self.integer(name, from as i64, to as i64)?;
        Ok(number.map(|number| number as usize))
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, "a string", &other)),
        }
    }

    /// A text that must be there.
    pub fn need_text(&mut self, name: &str) -> Result<String, Refusal> {
        match self.text(name)? {
            Some(text) => Ok(text),
            None => Err(self.refuse(name, "is missing")),
        }
    }

    /// A list.
    pub fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => Err(self.wrong(name, "a list", &other)),
        }
    }

    /// An object, to be read in turn.
    pub fn object(&mut self, name: &str) -> Result<Option<Fields>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(value) => Fields::inside(self.path(name), value).map(Some),
        }
    }

    /// A field that is accepted where it asks for what happens anyway, and refused by name otherwise.
    pub fn only(&mut self, name: &str, accepted: &[Value], reason: &str) -> Result<(), Refusal> {
        match self.take(name) {
            Some(value) if !accepted.contains(&value) => Err(self.refuse(name, reason)),
            _ => Ok(()),
        }
    }

    /// Refuses what was not read. Of a whole request some fields are known to change nothing.
    pub fn finish(mut self) -> Result<(), Refusal> {
        if self.at.is_empty() {
            self.only(
                "store",
                &[false.into()],
                "nothing is stored here: leave it out, or false",
            )?;
            self.only(
                "service_tier",
                &["auto".into(), "default".into()],
                "there is one tier here: leave it out",
            )?;
            self.map
                .retain(|name, _| !HARMLESS.contains(&name.as_str()));
        }
        let left = self.map.iter().find(|(_, value)| !value.is_null());
        match left {
            Some((name, _)) => Err(self.refuse(name, "this field is not supported")),
            None => Ok(()),
        }
    }

    /// The values that were not read.
    pub fn rest(self) -> Map<String, Value> {
        self.map
    }
}

/// What a value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
