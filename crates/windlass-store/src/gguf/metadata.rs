//! Keys with typed values, in the order of the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::value::{Array, FromValue, Value};
use crate::error::{Error, Result};

/// The metadata of a file, in order. It knows the file's path so that errors can name it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Value)>,
    index: BTreeMap<String, usize>,
}

impl Metadata {
    /// Empty metadata, for a file to be written.
    pub fn new() -> Self {
        Self::default()
    }

    /// The file it was read from; empty if it was read from none.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn set_path(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
    }

    /// Keys and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries
            .iter()
            .map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether there is a value for `key`, of any kind.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&at| &self.entries[at].1)
    }

    /// The value of a key as `T`; `None` if there is no such key.
    ///
    /// # Errors
    /// [`Error::KeyKind`] if the value is of another kind or does not fit.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => Err(Error::KeyKind {
                path: self.path.clone(),
                key: key.to_owned(),
                expected: T::EXPECTED,
                found: describe(value),
            }),
        }
    }

    /// The value of a key that must be there.
    ///
    /// # Errors
    /// [`Error::MissingKey`]; [`Error::KeyKind`].
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| Error::MissingKey {
            path: self.path.clone(),
            key: key.to_owned(),
        })
    }

    /// A text; `None` if there is no such key.
    ///
    /// # Errors
    /// [`Error::KeyKind`]; so in the other methods.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key)
    }

    /// An integer of 32 bits.
    ///
    /// # Errors
    /// [`Error::KeyKind`].
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        self.get(key)
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::KeyKind`].
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        self.get(key)
    }

    /// True or false.
    ///
    /// # Errors
    /// [`Error::KeyKind`].
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
    }

    /// An array of any kind.
    ///
    /// # Errors
    /// [`Error::KeyKind`].
    pub fn get_array(&self, key: &str) -> Result<Option<&Array>> {
        self.get(key)
    }

    /// An array of texts, in place.
    ///
    /// # Errors
    /// [`Error::KeyKind`].
    pub fn get_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key)
    }

    /// Sets a key: at its old place, or at the end. Returns what was there.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        if let Some(&at) = self.index.get(&key) {
            return Some(std::mem::replace(&mut self.entries[at].1, value));
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value));
        None
    }

    /// Keeps only the keys that `keep` says so of.
    pub fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.entries.retain(|(key, _)| keep(key));
        let keys = self.entries.iter().enumerate();
        self.index = keys.map(|(at, (key, _))| (key.clone(), at)).collect();
    }
}

/// A value for a message: its kind, and itself where it is short.
fn describe(value: &Value) -> String {
    let kind = value.describe();
    match value {
        Value::Array(array) => format!("an {kind} ({} values)", array.len()),
        Value::String(text) if text.len() > 40 => format!("a {kind} of {} bytes", text.len()),
        Value::String(text) => format!("the {kind} '{text}'"),
        Value::U8(v) => format!("{v} ({kind})"),
        Value::I8(v) => format!("{v} ({kind})"),
        Value::U16(v) => format!("{v} ({kind})"),
        Value::I16(v) => format!("{v} ({kind})"),
        Value::U32(v) => format!("{v} ({kind})"),
        Value::I32(v) => format!("{v} ({kind})"),
        Value::F32(v) => format!("{v} ({kind})"),
        Value::Bool(v) => format!("{v} ({kind})"),
        Value::U64(v) => format!("{v} ({kind})"),
        Value::I64(v) => format!("{v} ({kind})"),
        Value::F64(v) => format!("{v} ({kind})"),
    }
}
