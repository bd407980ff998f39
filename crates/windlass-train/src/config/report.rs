//! What each key came to: value, origin, status.

use serde::ser::{Serialize, SerializeStruct, Serializer};
use serde_json::Value;

use super::keys::Status;
use super::tree::Origin;

/// A key of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The key with the keys above it.
    pub key: String,
    /// Its resolved value.
    pub value: Value,
    /// Where the value came from.
    pub origin: Origin,
    /// What becomes of it.
    pub status: Status,
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut row = serializer.serialize_struct("Row", 5)?;
        row.serialize_field("key", &self.key)?;
        row.serialize_field("value", &self.value)?;
        row.serialize_field("from", &self.origin.to_string())?;
        row.serialize_field("status", self.status.name())?;
        row.serialize_field("why", &self.status.why())?;
        row.end()
    }
}
