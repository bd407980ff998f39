//! Files of packed weights: what a model is in memory, so that it is mapped instead of made.
//!
//! A file is 56 bytes (magic, two versions, the header's length and SHA-256), a header in JSON, and the arrays: packed
//! matrices as they are multiplied, on page boundaries; plain tensors; orders of columns. Matrices stay in the mapping,
//! plain tensors are copied. Two versions: that of the file, and that of the layouts
//! ([`LAYOUT_VERSION`]): a file that another version wrote is refused, for it is made again in seconds.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use windlass_tensor::kernels::blocks::{FLOAT4, UNEVEN};
use windlass_tensor::kernels::packed::{Codes, LAYOUT_VERSION, Layout, Min, PackedMatrix, Scale};
use windlass_tensor::{Category, Cpu, DType, Packed, Shape, Tensor, Weight, each_dtype};

use crate::atomic::{AtomicFile, Disk};
use crate::error::{Error, Result};
use crate::mmap::{Mapped, bytes_of};

/// The name of the file in a model's folder.
pub const FILE_NAME: &str = "packed.windlass";

const MAGIC: &[u8; 8] = b"WINDLASS";
const VERSION: u32 = 1;
/// Magic, versions, length and checksum of the header.
const PREFIX: usize = 8 + 4 + 4 + 8 + 32;
/// Where arrays begin: at multiples of a page.
const PAGE: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Header {
    /// Storage type of activations.
    dtype: String,
    /// Bytes after the header.
    bytes: usize,
    /// Places and numbers of columns.
    orders: Vec<Place>,
    tensors: BTreeMap<String, Entry>,
}

/// Bytes behind the header.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Place {
    offset: usize,
    bytes: usize,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    shape: Vec<usize>,
    #[serde(flatten)]
    place: Place,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// Plain numbers of a type.
    Dense(String),
    /// A packed matrix, maybe with the index of its order.
    Packed {
        codes: String,
        offset: u8,
        scale: String,
        columns: usize,
        min: String,
        order: Option<usize>,
    },
}

const CODES: [(&str, Codes); 8] = [
    ("u2", Codes::U2),
    ("u3", Codes::U3),
    ("u4", Codes::U4),
    ("u5", Codes::U5),
    ("u6", Codes::U6),
    ("u8", Codes::U8),
    ("uneven", Codes::Table(&UNEVEN)),
    ("float4", Codes::Table(&FLOAT4)),
];
const MINS: [(&str, Min); 4] = [
    ("none", Min::Without),
    ("half", Min::Half),
    ("zero", Min::Zero),
    ("super", Min::Super),
];
const DTYPES: [DType; 4] = [DType::F32, DType::Bf16, DType::F16, DType::F64];

impl Kind {
    fn packed(layout: &Layout, order: Option<usize>) -> Self {
        let codes = CODES.iter().find(|(_, codes)| *codes == layout.codes);
        let min = MINS.iter().find(|(_, min)| *min == layout.min);
        let (scale, columns) = match layout.scale {
            Scale::Half { group } => ("half", group),
            Scale::Exponent => ("exponent", layout.sub()),
            Scale::Super { sub } => ("super", sub),
        };
        Kind::Packed {
            codes: codes.expect("a table of the block types").0.into(),
            offset: layout.offset,
            scale: scale.into(),
            columns,
            min: min.expect("every kind of minimum").0.into(),
            order,
        }
    }

    /// The layout of a packed matrix; `None` if there is no such.
    fn layout(&self) -> Option<Layout> {
        let Kind::Packed {
            codes,
            offset,
            scale,
            columns,
            min,
            ..
        } = self
        else {
            return None;
        };
        let layout = Layout {
            codes: CODES.iter().find(|(name, _)| name == codes)?.1,
            offset: *offset,
            scale: match scale.as_str() {
                "half" => Scale::Half { group: *columns },
                "exponent" => Scale::Exponent,
                "super" => Scale::Super { sub: *columns },
                _ => return None,
            },
            min: MINS.iter().find(|(name, _)| name == min)?.1,
        };
        layout.problem().is_none().then_some(layout)
    }
}

fn dtype_of(name: &str) -> Option<DType> {
    DTYPES.into_iter().find(|dtype| dtype.name() == name)
}

/// Writes weights by name, and the storage type of the activations, to a file that appears whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write<'w>(
    disk: &dyn Disk,
    path: &Path,
    dtype: DType,
    weights: &[(&'w str, &'w Weight)],
) -> Result<()> {
    let mut header = Header {
        dtype: dtype.name().into(),
        bytes: 0,
        orders: Vec::new(),
        tensors: BTreeMap::new(),
    };
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut put = |bytes: &'w [u8]| {
        let place = Place {
            offset: header.bytes,
            bytes: bytes.len(),
        };
        parts.push(bytes);
        header.bytes = (place.offset + place.bytes).next_multiple_of(PAGE);
        place
    };
    let mut orders: Vec<&[u32]> = Vec::new();
    for (name, weight) in weights {
        let (place, kind) = match weight {
            Weight::Dense(tensor) => (put(dense_bytes(tensor)), {
                Kind::Dense(tensor.dtype().name().into())
            }),
            Weight::Packed(packed) => {
                let order = packed.order().map(|order| {
                    let order: &[u32] = order;
                    let known = orders.iter().position(|other| *other == order);
                    known.unwrap_or_else(|| {
                        orders.push(order);
                        header.orders.push(put(bytes_of(order)));
                        orders.len() - 1
                    })
                });
                let matrix = packed.matrix();
                (put(matrix.bytes()), Kind::packed(matrix.layout(), order))
            }
        };
        let shape = weight.shape().to_vec();
        let entry = Entry { shape, place, kind };
        header.tensors.insert((*name).to_owned(), entry);
    }
    let json = serde_json::to_vec(&header).expect("plain values");
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend(LAYOUT_VERSION.to_le_bytes());
    head.extend((json.len() as u64).to_le_bytes());
    head.extend(Sha256::digest(&json));
    head.extend(json);
    let file = AtomicFile::create(disk, path)?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    let padding = [0u8; PAGE];
    let mut pour = |bytes: &[u8]| -> std::io::Result<()> {
        file.write_all(bytes)?;
        file.write_all(&padding[..bytes.len().next_multiple_of(PAGE) - bytes.len()])
    };
    let mut parts = std::iter::once(&head[..]).chain(parts);
    let poured = parts.try_for_each(&mut pour);
    poured.map_err(|e| Error::io("write", path, e))?;
    let file = file.into_inner();
    file.map_err(|e| Error::io("write", path, e.into_error()))?
        .commit()
}

fn dense_bytes(tensor: &Tensor) -> &[u8] {
    match tensor.dtype() {
        DType::F32 => bytes_of(tensor.as_slice::<f32>()),
        DType::Bf16 => bytes_of(tensor.as_slice::<half::bf16>()),
        DType::F16 => bytes_of(tensor.as_slice::<half::f16>()),
        DType::F64 => bytes_of(tensor.as_slice::<f64>()),
    }
}

/// A mapped file of packed weights.
pub struct PackedFile {
    map: Arc<Mapped>,
    header: Header,
    dtype: DType,
    /// Where the arrays begin.
    start: usize,
    orders: Vec<Arc<[u32]>>,
}

/// A packed matrix in the mapping.
struct Part {
    map: Arc<Mapped>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.map.bytes()[self.range.clone()]
    }
}

impl PackedFile {
    /// Maps a file and checks its header; arrays are read when they are used.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] for a damaged file; [`Error::Unsupported`] for one of another version.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let bytes = map.bytes();
        let corrupt = |problem: &str| Error::corrupt(path, problem);
        if !bytes.starts_with(MAGIC) {
            return Err(corrupt("no file of packed weights"));
        }
        let cut = || corrupt("cut short");
        let word = |at: usize| -> Result<u32> {
            let bytes = bytes.get(at..at + 4).ok_or_else(cut)?;
            Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
        };
        for (at, ours, what) in [(8, VERSION, "file"), (12, LAYOUT_VERSION, "matrix")] {
            let found = word(at)?;
            if found != ours {
                return Err(Error::Unsupported {
                    path: path.to_owned(),
                    problem: format!("packed by {what} layout {found}, this program has {ours}"),
                    hint: "pack the model again: --model ORIGINAL --save-packed FOLDER".into(),
                });
            }
        }
        let length = u64::from(word(16)?) | u64::from(word(20)?) << 32;
        let end = usize::try_from(length)
            .ok()
            .and_then(|n| n.checked_add(PREFIX));
        let json = bytes.get(PREFIX..end.ok_or_else(cut)?).ok_or_else(cut)?;
        if Sha256::digest(json)[..] != bytes[24..PREFIX] {
            return Err(corrupt("the header is damaged: its checksum is another"));
        }
        let header: Header = serde_json::from_slice(json)
            .map_err(|error| corrupt(&format!("the header is damaged: {error}")))?;
        let start = (PREFIX + json.len()).next_multiple_of(PAGE);
        if start.checked_add(header.bytes) != Some(bytes.len()) {
            let problem = format!(
                "cut short: {} bytes of {}",
                bytes.len(),
                start.saturating_add(header.bytes)
            );
            return Err(corrupt(&problem));
        }
        let dtype = dtype_of(&header.dtype).ok_or_else(|| corrupt("an unknown storage type"))?;
        let mut file = PackedFile {
            map: Arc::new(map),
            header,
            dtype,
            start,
            orders: Vec::new(),
        };
        for place in &file.header.orders {
            let range = file.range(place)?;
            let order: Arc<[u32]> = file.map.slice::<u32>(range)?.into();
            file.orders.push(order);
        }
        Ok(file)
    }

    /// Storage type of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The names of the weights.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Name, shape, form and bytes of each weight. A form is a type, or the codes of a packed matrix and the columns that share a
    /// scale, with `z` for zeros and `m` for minimums beside the scales: `u4/32`, `u4/128z`.
    pub fn forms(&self) -> impl Iterator<Item = (&str, &[usize], String, usize)> {
        self.header.tensors.iter().map(|(name, entry)| {
            let form = match &entry.kind {
                Kind::Dense(dtype) => dtype.to_uppercase(),
                Kind::Packed {
                    codes,
                    columns,
                    min,
                    ..
                } => {
                    let more = match min.as_str() {
                        "none" => "",
                        "zero" => "z",
                        _ => "m",
                    };
                    format!("{codes}/{columns}{more}")
                }
            };
            (name.as_str(), &entry.shape[..], form, entry.place.bytes)
        })
    }

    fn range(&self, place: &Place) -> Result<Range<usize>> {
        let end = place.offset.checked_add(place.bytes);
        match end.filter(|end| *end <= self.header.bytes && place.offset.is_multiple_of(PAGE)) {
            Some(end) => Ok(self.start + place.offset..self.start + end),
            None => Err(Error::corrupt(
                self.map.path(),
                "an array lies outside of the file",
            )),
        }
    }

    /// A weight: a packed one in the mapping, a plain one as a copy.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Mismatch`] for another shape; [`Error::Corrupt`].
    pub fn weight(&self, cpu: &Cpu, name: &str, shape: Shape) -> Result<Weight> {
        let path = self.map.path();
        let entry = self.header.tensors.get(name);
        let entry = entry.ok_or_else(|| Error::MissingTensor {
            path: path.to_owned(),
            name: name.to_owned(),
            nearest: None,
        })?;
        if entry.shape != shape.to_vec() {
            return Err(Error::Mismatch {
                path: path.to_owned(),
                name: name.to_owned(),
                expected: shape.to_string(),
                found: format!("{:?}", entry.shape),
            });
        }
        let range = self.range(&entry.place)?;
        let corrupt = |problem: &str| Error::corrupt(path, format!("tensor '{name}': {problem}"));
        if let Kind::Dense(dtype) = &entry.kind {
            let dtype = dtype_of(dtype).ok_or_else(|| corrupt("an unknown storage type"))?;
            let mut tensor = Tensor::empty(cpu, shape, dtype, Category::Weights);
            each_dtype!(dtype, E => {
                let values = self.map.slice::<E>(range)?;
                if values.len() != tensor.len() {
                    return Err(corrupt("its bytes are not those of its shape"));
                }
                tensor.as_mut_slice::<E>().copy_from_slice(values);
            });
            return Ok(tensor.into());
        }
        let layout = entry.kind.layout();
        let layout = layout.ok_or_else(|| corrupt("an unknown layout"))?;
        let [rows, cols] = entry.shape[..] else {
            return Err(corrupt("no matrix, but packed"));
        };
        if PackedMatrix::packed_bytes(&layout, [rows, cols]) != range.len() {
            return Err(corrupt("its bytes are not those of its shape"));
        }
        let part = Part {
            map: self.map.clone(),
            range,
        };
        let matrix = PackedMatrix::from_bytes(layout, [rows, cols], Arc::new(part));
        let packed = Packed::from(matrix);
        let Kind::Packed {
            order: Some(order), ..
        } = entry.kind
        else {
            return Ok(Weight::Packed(packed));
        };
        let order = self.orders.get(order).filter(|order| permutes(order, cols));
        let order = order.ok_or_else(|| corrupt("its order does not name every column once"))?;
        Ok(Weight::Packed(packed.with_order(order.clone())))
    }
}

fn permutes(order: &[u32], cols: usize) -> bool {
    let mut seen = vec![false; cols];
    let new = |&column: &u32| {
        let place = seen.get_mut(column as usize);
        place.is_some_and(|seen| !std::mem::replace(seen, true))
    };
    order.len() == cols && order.iter().all(new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_tensor::kernels::blocks::BlockType;

    #[test]
    fn every_layout_has_a_name() {
        let own = [32, 64, 128, 256].map(|n| [Layout::q4(n), Layout::q4_asymmetric(n)]);
        let own = own.into_iter().flatten().chain([Layout::q8()]);
        let known = BlockType::ALL.iter().filter_map(|kind| Layout::of(*kind));
        for layout in own.chain(known) {
            let kind = Kind::packed(&layout, None);
            let text = serde_json::to_string(&kind).unwrap();
            let kind: Kind = serde_json::from_str(&text).unwrap();
            assert_eq!(kind.layout(), Some(layout), "{text}");
        }
        for (codes, scale, columns, min) in [
            ("u6", "half", 32, "none"),
            ("u4", "half", 33, "none"),
            ("u4", "super", 16, "none"),
            ("u4", "half", 32, "super"),
            ("u4", "super", 32, "zero"),
            ("u9", "half", 32, "none"),
        ] {
            let kind = Kind::Packed {
                codes: codes.into(),
                offset: 0,
                scale: scale.into(),
                columns,
                min: min.into(),
                order: None,
            };
            assert_eq!(kind.layout(), None, "{codes} {scale} {columns} {min}");
        }
    }
}
