//! The header: parsed from hostile bytes. Nothing it claims is believed before it is checked.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use windlass_tensor::kernels::blocks::BlockType;

use super::cursor::Cursor;
use super::metadata::Metadata;
use super::value::Value;
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_ALIGNMENT, MAX_DIMS, VERSION};

/// Bytes of the shortest key with its value: an empty name, a type, one byte.
const LEAST_KEY_BYTES: usize = 8 + 4 + 1;
/// Bytes of the shortest tensor entry: an empty name, dimensions, type, offset.
const LEAST_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A tensor of a file: its name, shape and how its elements are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the file.
    pub name: String,
    /// Dimensions, outermost first: the reverse of the file's order. Empty for a scalar.
    pub shape: Vec<usize>,
    /// How the elements of a row are stored; rows are whole blocks.
    pub block_type: BlockType,
}

impl TensorInfo {
    /// Declares a tensor.
    pub fn new(
        name: impl Into<String>,
        shape: impl Into<Vec<usize>>,
        block_type: BlockType,
    ) -> Self {
        TensorInfo {
            name: name.into(),
            shape: shape.into(),
            block_type,
        }
    }

    /// Elements of a row, which is contiguous: the last dimension.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of rows: the product of the other dimensions.
    pub fn rows(&self) -> usize {
        self.shape
            .split_last()
            .map_or(1, |(_, d)| d.iter().product())
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Stored size in bytes.
    ///
    /// # Panics
    /// If rows are no whole blocks or the size passes `usize`, which no tensor of a file that was opened does.
    #[track_caller]
    pub fn byte_size(&self) -> usize {
        match check_size(self) {
            Ok(bytes) => bytes,
            Err(problem) => panic!("{problem}"),
        }
    }
}

/// Why a file is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It breaks the format.
    Corrupt(String),
    /// It is another kind of file, or of a kind that is not read.
    Unsupported {
        /// What it is.
        problem: String,
        /// What to do instead.
        hint: String,
    },
}

impl Problem {
    pub(super) fn corrupt(problem: impl Into<String>) -> Self {
        Problem::Corrupt(problem.into())
    }

    fn unsupported(problem: impl Into<String>, hint: &str) -> Self {
        Problem::Unsupported {
            problem: problem.into(),
            hint: hint.to_owned(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Corrupt(problem) | Problem::Unsupported { problem, .. } => {
                f.write_str(problem)
            }
        }
    }
}

/// A checked header: ranges lie in the file, are aligned, do not overlap and have the sizes of their shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// The format's version, 2 or 3.
    pub version: u32,
    /// The typed metadata.
    pub metadata: Metadata,
    /// The tensors, and where their bytes lie from the start of the file.
    pub tensors: Vec<(TensorInfo, Range<usize>)>,
}

impl Header {
    /// Parses and checks the header of `file`, the whole file's bytes.
    ///
    /// # Errors
    /// What is wrong, in words, for any input; it never panics.
    pub fn parse(file: &[u8]) -> Result<Header, Problem> {
        let mut cursor = Cursor::new(file);
        let version = read_version(file, &mut cursor)?;
        let tensors = cursor.count(LEAST_TENSOR_BYTES, "tensors")?;
        let keys = cursor.count(LEAST_KEY_BYTES, "metadata keys")?;
        let metadata = read_metadata(&mut cursor, keys)?;
        let alignment = alignment(&metadata)?;
        let tensors = read_tensors(&mut cursor, tensors)?;
        let start = cursor.position().next_multiple_of(alignment);
        let tensors = place(tensors, start, alignment, file.len())?;
        Ok(Header {
            version,
            metadata,
            tensors,
        })
    }
}

fn read_version(file: &[u8], cursor: &mut Cursor) -> Result<u32, Problem> {
    if !file.starts_with(&MAGIC) {
        return Err(foreign(file));
    }
    cursor.take(MAGIC.len() as u64, "the magic number")?;
    let version = cursor.u32("the version")?;
    match version {
        2 | VERSION => Ok(version),
        1 => Err(Problem::unsupported(
            "GGUF version 1, of August 2023, which is not read",
            "convert the model anew from its original weights, or get a current file",
        )),
        _ if version.swap_bytes() <= 0xff => Err(Problem::unsupported(
            "a big-endian GGUF file, which is not read",
            "get the little-endian file of the model, or convert it with gguf-py's gguf_convert_endian",
        )),
        _ => Err(Problem::unsupported(
            format!("GGUF version {version} is not known, only 2 and 3"),
            "the file is damaged, or newer than this program: update it",
        )),
    }
}

/// What a file without the magic number is.
fn foreign(file: &[u8]) -> Problem {
    const OLD: &str =
        "convert the model anew from its original weights: llama.cpp gave this format up in 2023";
    const TORCH: &str =
        "save it as safetensors with `save_pretrained(.., safe_serialization=True)`";
    let known: [(&[u8], &str, &str); 8] = [
        (
            b"FUGG",
            "GGUF with its magic number reversed",
            "a big-endian copy: get another one",
        ),
        (b"lmgg", "an old GGML file", OLD),
        (b"fmgg", "an old GGMF file", OLD),
        (b"tjgg", "an old GGJT file", OLD),
        (b"PK", "a PyTorch or zip file", TORCH),
        (b"\x80", "a Python pickle", TORCH),
        (
            b"version https://git-lfs",
            "a Git LFS pointer",
            "run `git lfs pull`",
        ),
        (
            b"<",
            "a web page",
            "fetch the file itself, not the page about it",
        ),
    ];
    match known.iter().find(|(magic, ..)| file.starts_with(magic)) {
        Some((_, what, hint)) => Problem::unsupported(format!("this is {what}, not GGUF"), hint),
        None => Problem::corrupt("no GGUF file: it does not begin with 'GGUF'"),
    }
}

fn read_metadata(cursor: &mut Cursor, count: usize) -> Result<Metadata, Problem> {
    let mut metadata = Metadata::new();
    for i in 0..count {
        let key = cursor.string(&format!("the name of metadata key {i}"))?;
        let value = cursor.value(key)?;
        if metadata.insert(key, value).is_some() {
            return Err(Problem::corrupt(format!("key '{key}' is there twice")));
        }
    }
    Ok(metadata)
}

/// Where tensors begin: at multiples of so many bytes.
pub(super) fn alignment(metadata: &Metadata) -> Result<usize, Problem> {
    match metadata.value(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(bytes)) if bytes.is_power_of_two() && bytes <= MAX_ALIGNMENT => {
            Ok(bytes as usize)
        }
        Some(Value::U32(bytes)) => Err(Problem::corrupt(format!(
            "key '{ALIGNMENT_KEY}' is {bytes}, no power of two up to {MAX_ALIGNMENT}"
        ))),
        Some(other) => Err(Problem::corrupt(format!(
            "key '{ALIGNMENT_KEY}' is {}, expected u32",
            other.describe()
        ))),
    }
}

/// The list of tensors, each with its offset in the data. Shapes are checked, offsets are not.
fn read_tensors(cursor: &mut Cursor, count: usize) -> Result<Vec<(TensorInfo, u64)>, Problem> {
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    for i in 0..count {
        let name = cursor.string(&format!("the name of tensor {i}"))?;
        if !names.insert(name) {
            return Err(Problem::corrupt(format!("tensor '{name}' is there twice")));
        }
        let what = format!("the entry of tensor '{name}'");
        let dims = cursor.u32(&what)? as usize;
        if dims > MAX_DIMS {
            return Err(Problem::corrupt(format!(
                "tensor '{name}' has {dims} dimensions, at most {MAX_DIMS} are possible"
            )));
        }
        let mut shape = Vec::with_capacity(dims);
        for _ in 0..dims {
            let size = cursor.u64(&what)?;
            let size = usize::try_from(size)
                .ok()
                .filter(|d| *d <= isize::MAX as usize);
            shape.push(size.ok_or_else(|| {
                Problem::corrupt(format!("tensor '{name}' has a negative dimension"))
            })?);
        }
        shape.reverse();
        let block_type = BlockType::from_id(cursor.u32(&what)?).map_err(|unknown| {
            let hint = "make the file anew with a current llama.cpp, or get another quantization";
            Problem::unsupported(format!("tensor '{name}': {unknown}"), hint)
        })?;
        let info = TensorInfo::new(name, shape, block_type);
        check_size(&info).map_err(Problem::Corrupt)?;
        tensors.push((info, cursor.u64(&what)?));
    }
    Ok(tensors)
}

/// Bytes of a tensor, if rows are whole blocks and nothing overflows.
pub(super) fn check_size(info: &TensorInfo) -> Result<usize, String> {
    let TensorInfo {
        name,
        shape,
        block_type,
    } = info;
    let row = info.row_len();
    if !row.is_multiple_of(block_type.elements()) {
        return Err(format!(
            "tensor '{name}' has rows of {row} elements, no whole blocks of {} ({block_type})",
            block_type.elements()
        ));
    }
    // No product of any of the dimensions overflows, empty tensors included.
    let elements = shape
        .iter()
        .try_fold(1usize, |product, &d| product.checked_mul(d.max(1)));
    let bytes = elements.and_then(|elements| match shape.contains(&0) {
        true => Some(0),
        false => block_type.size_of(elements),
    });
    bytes.ok_or_else(|| format!("tensor '{name}': the shape {shape:?} overflows"))
}

/// Turns offsets into file ranges after checking each tensor alone and all of them together.
fn place(
    tensors: Vec<(TensorInfo, u64)>,
    start: usize,
    alignment: usize,
    file_len: usize,
) -> Result<Vec<(TensorInfo, Range<usize>)>, Problem> {
    let mut placed = Vec::with_capacity(tensors.len());
    for (info, offset) in tensors {
        let name = &info.name;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(Problem::corrupt(format!(
                "tensor '{name}' is misaligned: its offset {offset} is no multiple of {alignment}"
            )));
        }
        let bytes = check_size(&info).map_err(Problem::Corrupt)?;
        let begin = usize::try_from(offset)
            .ok()
            .and_then(|o| o.checked_add(start));
        let end = begin.and_then(|begin| begin.checked_add(bytes));
        let (Some(begin), Some(end)) = (begin, end) else {
            let problem = format!("tensor '{name}': its offset {offset} is beyond any file");
            return Err(Problem::corrupt(problem));
        };
        if end > file_len {
            return Err(Problem::corrupt(format!(
                "cut short: tensor '{name}' ends at byte {end}, the file has {file_len}"
            )));
        }
        placed.push((info, begin..end));
    }
    let mut order: Vec<usize> = (0..placed.len()).collect();
    order.sort_by_key(|&i| (placed[i].1.start, placed[i].1.end));
    for pair in order.windows(2) {
        let (first, second) = (&placed[pair[0]], &placed[pair[1]]);
        if second.1.start < first.1.end {
            return Err(Problem::corrupt(format!(
                "tensor '{}' overlaps '{}': it begins at byte {}, the other ends at {}",
                second.0.name, first.0.name, second.1.start, first.1.end
            )));
        }
    }
    Ok(placed)
}
