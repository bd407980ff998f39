//! Reading `config.json`: typed fields, errors that name file and key.

use serde_json::{Map, Value};

/// What is wrong with a model's description.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A key is missing, or of the wrong type or value.
    #[error("{file}: key \"{key}\": {message}")]
    Key {
        /// The file.
        file: String,
        /// The key, with the keys above it.
        key: String,
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// Not a JSON object.
    #[error("{file}: {message}")]
    Json {
        /// The file.
        file: String,
        /// What the parser says.
        message: String,
    },
    /// An architecture that is not known.
    #[error("{file}: unknown architecture \"{name}\"")]
    Architecture {
        /// The file.
        file: String,
        /// The name in the file.
        name: String,
        /// The nearest known name.
        nearest: String,
        /// All known names.
        known: Vec<&'static str>,
    },
}

impl ModelError {
    /// What the user can do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            ModelError::Key { hint, .. } => hint.clone(),
            ModelError::Json { .. } => {
                "a model folder needs the config.json of its Hugging Face repository".into()
            }
            ModelError::Architecture { nearest, known, .. } => {
                format!("nearest known: {nearest}; all: {}", known.join(", "))
            }
        })
    }
}

/// The candidate nearest to `name` by edit distance.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .min_by_key(|candidate| edit_distance(name, candidate))
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// An object of a JSON file, read field by field.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    file: &'a str,
    path: &'a str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The root object of a file.
    ///
    /// # Errors
    /// When the value is not an object.
    pub fn root(file: &'a str, value: &'a Value) -> Result<Self, ModelError> {
        let map = value.as_object().ok_or_else(|| ModelError::Json {
            file: file.into(),
            message: format!("a JSON object is expected and this is {}", kind(value)),
        })?;
        Ok(Fields {
            file,
            path: "",
            map,
        })
    }

    fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// An error about a key.
    pub fn error(
        &self,
        key: &str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> ModelError {
        let key = if self.path.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", self.path)
        };
        ModelError::Key {
            file: self.file.into(),
            key,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// An error about a value that is understood and not supported.
    pub fn unsupported(&self, key: &str, value: &str, hint: &str) -> ModelError {
        self.error(key, format!("\"{value}\" is not supported"), hint)
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> ModelError {
        self.error(
            key,
            format!("{expected} is expected and this is {}", kind(value)),
            "correct the file or download it again",
        )
    }

    /// An optional non-negative integer; a float without a fraction counts.
    pub fn int(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let int = value.as_u64().or_else(|| {
            value
                .as_f64()
                .filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f))
                .map(|f| f as u64)
        });
        int.map(|i| Some(i as usize))
            .ok_or_else(|| self.wrong(key, "a non-negative integer", value))
    }

    /// A required positive integer below 2^40.
    pub fn need_int(&self, key: &str) -> Result<usize, ModelError> {
        match self.int(key)? {
            None => Err(self.error(key, "is missing", "every model of this architecture has it")),
            Some(0) => Err(self.error(key, "is 0", "it must be positive")),
            Some(i) if i >= 1 << 40 => {
                Err(self.error(key, format!("is {i}"), "it is absurdly large"))
            }
            Some(i) => Ok(i),
        }
    }

    /// An optional number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|f| f.is_finite())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a number", value))
    }

    /// A required number.
    pub fn need_number(&self, key: &str) -> Result<f64, ModelError> {
        self.number(key)?
            .ok_or_else(|| self.error(key, "is missing", "every model of this kind has it"))
    }

    /// A required list of `len` numbers.
    pub fn need_numbers(&self, key: &str, len: usize) -> Result<Vec<f64>, ModelError> {
        let value = self
            .value(key)
            .ok_or_else(|| self.error(key, "is missing", "every model of this kind has it"))?;
        let list: Option<Vec<f64>> = value
            .as_array()
            .and_then(|a| a.iter().map(Value::as_f64).collect());
        list.filter(|l| l.len() == len)
            .ok_or_else(|| self.wrong(key, &format!("a list of {len} numbers"), value))
    }

    /// An optional boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, "true or false", value))
    }

    /// An optional text.
    pub fn text(&self, key: &str) -> Result<Option<String>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(|s| Some(s.into()))
            .ok_or_else(|| self.wrong(key, "a text", value))
    }

    /// An optional list of `T`.
    pub fn list<T>(
        &self,
        key: &str,
        item: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let list = value.as_array().and_then(|a| a.iter().map(item).collect());
        list.map(Some)
            .ok_or_else(|| self.wrong(key, "a list", value))
    }

    /// An optional object.
    pub fn object(&self, key: &'a str) -> Result<Option<Fields<'a>>, ModelError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong(key, "an object", value))?;
        Ok(Some(Fields {
            file: self.file,
            path: key,
            map,
        }))
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    /// Whether the key is present and not null.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        other => {
            let text = other.to_string();
            let end = text.char_indices().nth(40).map_or(text.len(), |(i, _)| i);
            text[..end].into()
        }
    }
}
