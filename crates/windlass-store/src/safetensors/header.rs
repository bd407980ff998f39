//! The header: parsed from hostile bytes, written from declarations.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::value::{Error as ValueError, StrDeserializer};
use serde::de::{Deserializer, Error as _, IntoDeserializer, MapAccess, Visitor};

use super::Dtype;

/// Longest accepted header, as in the reference implementation: 100 MB.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;
/// The data starts at a multiple of this, so that a mapped tensor is aligned to its element and to a cache line.
const DATA_ALIGNMENT: usize = 64;
/// The header's one entry that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

/// A tensor to be written: its name, type and shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Name, unique in the file.
    pub name: String,
    /// Type of the stored elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
}

impl Spec {
    /// Declares a tensor.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        Spec {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// Stored size in bytes.
    ///
    /// # Panics
    /// If the size passes `usize`, or elements smaller than a byte do not fill whole bytes.
    #[track_caller]
    pub fn bytes(&self) -> usize {
        match byte_size(self.dtype, &self.shape) {
            Ok(bytes) => bytes,
            Err(problem) => panic!("tensor '{}': {problem}", self.name),
        }
    }
}

/// What the header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Type of the stored elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes lie, counted from the start of the file.
    pub bytes: Range<usize>,
}

/// A checked header: the ranges lie in the file, do not overlap, leave no byte over and have the sizes of their shapes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The tensors by name.
    pub tensors: BTreeMap<String, Info>,
    /// The free-form text entries.
    pub metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses and checks the header of `file`, the whole file's bytes.
    ///
    /// # Errors
    /// What is wrong, in words, for any input; it never panics.
    pub fn parse(file: &[u8]) -> Result<Header, String> {
        let data_start = header_end(file)?;
        let text = std::str::from_utf8(&file[LENGTH_BYTES..data_start])
            .map_err(|e| format!("the header is not text: {e}; this is no safetensors file"))?;
        let raw: RawHeader =
            serde_json::from_str(text).map_err(|e| format!("the header is not valid: {e}"))?;
        let tensors = check_tensors(raw.tensors, data_start, file.len())?;
        Ok(Header {
            tensors,
            metadata: raw.metadata,
        })
    }
}

/// Where the header ends and the data starts.
fn header_end(file: &[u8]) -> Result<usize, String> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!(
            "{} bytes are too few for a safetensors file",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let hint = if file.starts_with(b"PK") || file.starts_with(b"\x80") {
            " (this looks like a PyTorch .bin or .pt file)"
        } else if file.starts_with(b"version https://git-lfs") {
            " (this is a Git LFS pointer: run `git lfs pull`)"
        } else {
            ""
        };
        return Err(format!(
            "a header of {length} bytes is beyond the format's {MAX_HEADER_BYTES}{hint}"
        ));
    }
    if length > rest.len() as u64 {
        return Err(format!(
            "cut short: a header of {length} bytes is announced, {} bytes follow",
            rest.len()
        ));
    }
    Ok(LENGTH_BYTES + length as usize)
}

/// Turns offsets into file ranges after checking each tensor alone and all of them together.
fn check_tensors(
    raw: Vec<(String, RawInfo)>,
    data_start: usize,
    file_len: usize,
) -> Result<BTreeMap<String, Info>, String> {
    let data_len = file_len - data_start;
    let mut spans = Vec::with_capacity(raw.len());
    let mut tensors = BTreeMap::new();
    for (name, info) in raw {
        let (begin, end) = info.data_offsets;
        if begin > end {
            return Err(format!(
                "tensor '{name}': its bytes end ({end}) before they begin ({begin})"
            ));
        }
        if end > data_len as u64 {
            return Err(format!(
                "cut short: tensor '{name}' ends at byte {end} of the data, which has {data_len} bytes"
            ));
        }
        let (begin, end) = (begin as usize, end as usize);
        let info = info
            .check(data_start + begin..data_start + end)
            .map_err(|e| format!("tensor '{name}': {e}"))?;
        spans.push((begin, end, name.clone()));
        if tensors.insert(name, info).is_some() {
            let name = spans.pop().map(|s| s.2).unwrap_or_default();
            return Err(format!("tensor '{name}' is listed twice"));
        }
    }
    spans.sort();
    let mut covered = 0;
    for (begin, end, name) in spans {
        if begin < covered {
            return Err(format!(
                "tensor '{name}' overlaps the one before it (starts at {begin}, which ends at {covered})"
            ));
        }
        if begin > covered {
            return Err(format!(
                "{} bytes before tensor '{name}' belong to no tensor",
                begin - covered
            ));
        }
        covered = end;
    }
    if covered != data_len {
        return Err(format!(
            "{} bytes at the end belong to no tensor",
            data_len - covered
        ));
    }
    Ok(tensors)
}

/// Bytes of a tensor. No product of any of its dimensions overflows if this succeeds, empty tensors included.
fn byte_size(dtype: Dtype, shape: &[usize]) -> Result<usize, String> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize(), |product, &d| product.checked_mul(d.max(1)));
    match bits {
        None => Err(format!("shape {shape:?} overflows")),
        Some(_) if shape.contains(&0) => Ok(0),
        Some(bits) if bits % 8 != 0 => Err(format!("{bits} bits are no whole number of bytes")),
        Some(bits) => Ok(bits / 8),
    }
}

/// One entry as the JSON has it.
#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl RawInfo {
    fn check(self, bytes: Range<usize>) -> Result<Info, String> {
        let name: StrDeserializer<'_, ValueError> = self.dtype.as_str().into_deserializer();
        let dtype =
            Dtype::deserialize(name).map_err(|_| format!("unknown dtype '{}'", self.dtype))?;
        let expected = byte_size(dtype, &self.shape)?;
        if expected != bytes.len() {
            let shape = &self.shape;
            return Err(format!(
                "{} bytes, but {dtype} {shape:?} needs {expected}",
                bytes.len()
            ));
        }
        Ok(Info {
            dtype,
            shape: self.shape,
            bytes,
        })
    }
}

/// The JSON object in order, so that a name listed twice is seen rather than overwritten.
struct RawHeader {
    tensors: Vec<(String, RawInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader {
            tensors: Vec::new(),
            metadata: BTreeMap::new(),
        };
        while let Some(key) = map.next_key::<String>()? {
            let named = |e: A::Error| A::Error::custom(format!("'{key}': {e}"));
            if key == METADATA_KEY {
                header.metadata = map.next_value().map_err(named)?;
            } else {
                let info = map.next_value().map_err(named)?;
                header.tensors.push((key, info));
            }
        }
        Ok(header)
    }
}

/// The header of a file that holds `specs` back to back in this order, padded so that the data is aligned.
pub(super) fn encode(specs: &[&Spec], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        object.insert(METADATA_KEY.to_owned(), serde_json::json!(metadata));
    }
    let mut offset = 0;
    for spec in specs {
        let end = offset + spec.bytes();
        let entry = serde_json::json!({
            "dtype": spec.dtype.to_string(), "shape": spec.shape, "data_offsets": [offset, end],
        });
        let before = object.insert(spec.name.clone(), entry);
        assert!(
            before.is_none(),
            "tensor '{}' is declared twice, or has a reserved name",
            spec.name
        );
        offset = end;
    }
    let mut json = serde_json::Value::Object(object).to_string().into_bytes();
    let padded = (LENGTH_BYTES + json.len()).next_multiple_of(DATA_ALIGNMENT) - LENGTH_BYTES;
    json.resize(padded, b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}
