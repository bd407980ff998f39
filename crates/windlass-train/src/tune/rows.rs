//! Rows of `.jsonl`, `.json`, `.csv` and `.parquet` files, all of them in memory.

use super::csv;
use crate::data::records::{Array, Lines};
use crate::error::{Error, Place, Result};
use parquet::file::reader::SerializedFileReader;
use parquet::record::{Field, Row as TableRow};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One row of a file.
#[derive(Clone, Debug)]
pub struct Row {
    /// Columns and values.
    pub fields: Map<String, Value>,
    /// The file.
    pub path: Arc<PathBuf>,
    /// Where in the file.
    pub place: Place,
}

impl Row {
    /// Where the row is, for messages.
    pub fn at(&self) -> String {
        format!("{}{}", self.path.display(), self.place)
    }

    /// An error about the row.
    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.to_path_buf(),
            place: self.place,
            reason: reason.into(),
        }
    }
}

/// Reads all rows of some files.
///
/// # Errors
/// Files of other formats, files that are damaged, rows that are no objects; no row at all.
pub fn read_rows(paths: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for path in paths {
        let ending = path.extension().and_then(|end| end.to_str());
        let shared = Arc::new(path.clone());
        let mut push = |value: Value, place: Place| match value {
            Value::Object(fields) => {
                rows.push(Row {
                    fields,
                    path: shared.clone(),
                    place,
                });
                Ok(())
            }
            _ => Err(Error::Malformed {
                path: path.clone(),
                place,
                reason: "a row is an object with named fields".into(),
            }),
        };
        match ending.map(str::to_ascii_lowercase).as_deref() {
            Some("jsonl" | "ndjson") => {
                let mut lines = Lines::open(path, "")?;
                while let Some((value, place)) = lines.record()? {
                    push(value, place)?;
                }
            }
            Some("json") => {
                let mut array = Array::open(path, "")?;
                while let Some((value, place)) = array.record()? {
                    push(value, place)?;
                }
            }
            Some("csv") => {
                for (place, value) in comma_separated(path)? {
                    push(value, place)?;
                }
            }
            Some("parquet") => {
                for (place, value) in table(path)? {
                    push(value, place)?;
                }
            }
            _ => return Err(Error::NoTable(path.clone())),
        }
    }
    if rows.is_empty() {
        let places: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        return Err(Error::EmptyCorpus {
            places: places.join(", "),
        });
    }
    Ok(rows)
}

fn comma_separated(path: &Path) -> Result<Vec<(Place, Value)>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io("read", path, error))?;
    let text = String::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to() as u64,
    })?;
    let malformed = |line: u64, reason: String| Error::Malformed {
        path: path.to_owned(),
        place: Place::Line(line),
        reason,
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let records = csv::records(text).map_err(|(line, reason)| malformed(line, reason.into()))?;
    let mut records = records.into_iter();
    let Some((_, names)) = records.next() else {
        return Ok(Vec::new());
    };
    let rows = records.map(|(line, fields)| {
        if fields.len() != names.len() {
            let (found, wanted) = (fields.len(), names.len());
            return Err(malformed(
                line,
                format!("{found} fields under {wanted} names"),
            ));
        }
        let named = names
            .iter()
            .cloned()
            .zip(fields.into_iter().map(Value::from));
        Ok((Place::Line(line), Value::Object(named.collect())))
    });
    rows.collect()
}

fn table(path: &Path) -> Result<Vec<(Place, Value)>> {
    let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    let fail = |reason: String| Error::Malformed {
        path: path.to_owned(),
        place: Place::File,
        reason: format!("not a Parquet file: {reason}"),
    };
    let reader = SerializedFileReader::new(file).map_err(|error| fail(error.to_string()))?;
    let mut rows = Vec::new();
    for (index, row) in reader.into_iter().enumerate() {
        let row = row.map_err(|error| fail(error.to_string()))?;
        rows.push((Place::Row(index as u64 + 1), object(&row)));
    }
    Ok(rows)
}

fn object(row: &TableRow) -> Value {
    let columns = row.get_column_iter();
    let columns = columns.map(|(name, field)| (name.clone(), value(field)));
    Value::Object(columns.collect())
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(v) => json!(v),
        Field::Byte(v) => json!(v),
        Field::Short(v) => json!(v),
        Field::Int(v) => json!(v),
        Field::Long(v) => json!(v),
        Field::UByte(v) => json!(v),
        Field::UShort(v) => json!(v),
        Field::UInt(v) => json!(v),
        Field::ULong(v) => json!(v),
        Field::Float(v) => json!(v),
        Field::Double(v) => json!(v),
        Field::Str(text) => json!(text),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter();
            let entries = entries.map(|(key, v)| match key {
                Field::Str(key) => (key.clone(), value(v)),
                other => (other.to_string(), value(v)),
            });
            Value::Object(entries.collect())
        }
        other => json!(other.to_string()),
    }
}
