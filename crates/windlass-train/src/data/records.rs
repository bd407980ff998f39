//! Files of records: one JSON value a line, a JSON array, a Parquet table. Each record gives one text.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::Value;
use windlass_store::mmap::Mapped;

use crate::error::{Error, Place, Result};

/// The text of a record: of an object's field, or of the record itself when it is a text. Null is an empty text.
fn text_of(record: Value, field: &str, path: &Path, place: Place) -> Result<String> {
    let found = match record {
        Value::String(text) => return Ok(text),
        Value::Object(mut object) => match object.remove(field) {
            Some(value) => value,
            None => {
                return Err(Error::MissingField {
                    path: path.to_owned(),
                    place,
                    field: field.to_owned(),
                    present: object.keys().cloned().collect(),
                });
            }
        },
        other => {
            return Err(Error::Malformed {
                path: path.to_owned(),
                place,
                reason: format!("{} where an object or a text should be", kind(&other)),
            });
        }
    };
    match found {
        Value::String(text) => Ok(text),
        Value::Null => Ok(String::new()),
        other => Err(Error::NotText {
            path: path.to_owned(),
            place,
            field: field.to_owned(),
            found: kind(&other).to_owned(),
        }),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A file with one JSON value a line; empty lines are left out.
pub(crate) struct Lines {
    file: BufReader<File>,
    path: PathBuf,
    field: String,
    line: u64,
    position: u64,
    buffer: Vec<u8>,
}

impl Lines {
    pub(crate) fn open(path: &Path, field: &str) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
        Ok(Self {
            file: BufReader::with_capacity(256 * 1024, file),
            path: path.to_owned(),
            field: field.to_owned(),
            line: 0,
            position: 0,
            buffer: Vec::new(),
        })
    }

    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn next(&mut self) -> Result<Option<String>> {
        match self.record()? {
            Some((record, place)) => text_of(record, &self.field, &self.path, place).map(Some),
            None => Ok(None),
        }
    }

    /// The next record, and where it is.
    pub(crate) fn record(&mut self) -> Result<Option<(Value, Place)>> {
        loop {
            self.buffer.clear();
            let read = self.file.read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|error| Error::io("read", &self.path, error))?;
            if read == 0 {
                return Ok(None);
            }
            self.line += 1;
            self.position += read as u64;
            let line = self
                .buffer
                .strip_prefix(b"\xef\xbb\xbf")
                .unwrap_or(&self.buffer);
            if line.trim_ascii().is_empty() {
                continue;
            }
            let place = Place::Line(self.line);
            let record = serde_json::from_slice(line).map_err(|error| Error::Malformed {
                path: self.path.clone(),
                place,
                reason: format!("not JSON: {error}"),
            })?;
            return Ok(Some((record, place)));
        }
    }
}

/// A file that is one JSON array. The file is mapped and its elements are parsed one by one.
pub(crate) struct Array {
    map: Mapped,
    path: PathBuf,
    field: String,
    row: u64,
    position: usize,
    done: bool,
}

impl Array {
    pub(crate) fn open(path: &Path, field: &str) -> Result<Self> {
        let mut array = Self {
            map: Mapped::open(path)?,
            path: path.to_owned(),
            field: field.to_owned(),
            row: 0,
            position: 0,
            done: false,
        };
        if array.map.bytes().starts_with(b"\xef\xbb\xbf") {
            array.position = 3;
        }
        match array.skip_space() {
            Some(b'[') => array.position += 1,
            None => array.done = true,
            Some(_) => {
                let reason = "the file is not a JSON array".into();
                return Err(array.malformed(Place::File, reason));
            }
        }
        if array.skip_space() == Some(b']') {
            array.done = true;
        }
        Ok(array)
    }

    pub(super) fn position(&self) -> u64 {
        self.position as u64
    }

    fn malformed(&self, place: Place, reason: String) -> Error {
        Error::Malformed {
            path: self.path.clone(),
            place,
            reason,
        }
    }

    /// Moves to the next byte that is not white space and returns it.
    fn skip_space(&mut self) -> Option<u8> {
        let rest = &self.map.bytes()[self.position..];
        let space = rest
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        self.position += space;
        rest.get(space).copied()
    }

    pub(super) fn next(&mut self) -> Result<Option<String>> {
        match self.record()? {
            Some((record, place)) => text_of(record, &self.field, &self.path, place).map(Some),
            None => Ok(None),
        }
    }

    /// The next record, and where it is.
    pub(crate) fn record(&mut self) -> Result<Option<(Value, Place)>> {
        if self.done {
            return Ok(None);
        }
        self.row += 1;
        let place = Place::Row(self.row);
        let rest = &self.map.bytes()[self.position..];
        let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<Value>();
        let record = match values.next() {
            Some(Ok(record)) => record,
            Some(Err(error)) => return Err(self.malformed(place, format!("not JSON: {error}"))),
            None => return Err(self.malformed(place, "the array is not closed".into())),
        };
        self.position += values.byte_offset();
        match self.skip_space() {
            Some(b',') => self.position += 1,
            Some(b']') => self.done = true,
            Some(_) => return Err(self.malformed(place, "no comma after the element".into())),
            None => return Err(self.malformed(place, "the array is not closed".into())),
        }
        Ok(Some((record, place)))
    }
}

/// One column of a Parquet file.
pub(super) struct Table {
    rows: RowIter<'static>,
    path: PathBuf,
    field: String,
    row: u64,
    row_count: u64,
    bytes: u64,
}

impl Table {
    pub(super) fn open(path: &Path, field: &str) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("open", path, error))?;
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        let fail = |error: parquet::errors::ParquetError| Error::Malformed {
            path: path.to_owned(),
            place: Place::File,
            reason: format!("not a Parquet file: {error}"),
        };
        let reader = SerializedFileReader::new(file).map_err(fail)?;
        let metadata = reader.metadata().file_metadata();
        let row_count = metadata.num_rows().max(0) as u64;
        let schema = metadata.schema();
        let columns = schema.get_fields();
        let Some(column) = columns.iter().find(|column| column.name() == field) else {
            return Err(Error::MissingField {
                path: path.to_owned(),
                place: Place::File,
                field: field.to_owned(),
                present: columns
                    .iter()
                    .map(|column| column.name().to_owned())
                    .collect(),
            });
        };
        let projection = Type::group_type_builder(schema.name())
            .with_fields(vec![column.clone()])
            .build();
        let rows = RowIter::from_file_into(Box::new(reader));
        let rows = rows.project(Some(projection.map_err(fail)?));
        Ok(Self {
            rows: rows.map_err(fail)?,
            path: path.to_owned(),
            field: field.to_owned(),
            row: 0,
            row_count,
            bytes,
        })
    }

    /// Estimated from the rows read.
    pub(super) fn position(&self) -> u64 {
        let share = self.row as f64 / self.row_count.max(1) as f64;
        (share * self.bytes as f64) as u64
    }

    pub(super) fn next(&mut self) -> Result<Option<String>> {
        let Some(row) = self.rows.next() else {
            return Ok(None);
        };
        self.row += 1;
        let place = Place::Row(self.row);
        let row = row.map_err(|error| Error::Malformed {
            path: self.path.clone(),
            place,
            reason: error.to_string(),
        })?;
        let not_text = |found: String| Error::NotText {
            path: self.path.clone(),
            place,
            field: self.field.clone(),
            found,
        };
        match row.into_columns().pop() {
            Some((_, Field::Str(text))) => Ok(Some(text)),
            Some((_, Field::Null)) | None => Ok(Some(String::new())),
            Some((_, Field::Bytes(bytes))) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => Ok(Some(text.to_owned())),
                Err(_) => Err(not_text("bytes that are not UTF-8".into())),
            },
            Some((_, other)) => Err(not_text(format!("{other}"))),
        }
    }
}
