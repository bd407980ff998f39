//! Importance matrices: how much each column of a weight matrix matters, measured as the mean square of what it is
//! multiplied with.

use std::collections::BTreeMap;
use std::path::Path;

use windlass_store::atomic::Disk;
use windlass_store::gguf::{self, BlockType, Metadata, TensorInfo};
use windlass_store::mmap::{Mapped, bytes_of};
use windlass_tensor::kernels::blocks::dequantize;

use crate::error::{Error, Result};

/// Endings of the two tensors that a GGUF file has for each matrix.
const SQUARES: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// The key and value of its kind.
const KIND: (&str, &str) = ("general.type", "imatrix");
/// Keys of what it was measured on.
const DATASETS: &str = "imatrix.datasets";
const CHUNKS: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";

/// Mean squares of the inputs of weight matrices, by the matrices' names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance {
    /// The texts that it was measured on.
    pub datasets: Vec<String>,
    /// Pieces of text that were run.
    pub chunks: u32,
    /// Tokens of a piece; 0 if it is not known.
    pub chunk_size: u32,
    entries: BTreeMap<String, Entry>,
}

/// Sums of squares of each column, and how often they were summed: for each expert, one after another.
#[derive(Clone, Debug, Default, PartialEq)]
struct Entry {
    squares: Vec<f32>,
    counts: Vec<f32>,
}

impl Importance {
    /// Reads a file of llama-imatrix, of its older kind (`.dat`) too.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Importance`] if the file breaks its format.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Mapped::open(path)?;
        if file.bytes().starts_with(b"GGUF") {
            return Self::from_gguf(path);
        }
        parse_old(file.bytes()).map_err(|problem| Error::Importance {
            path: path.to_owned(),
            problem,
        })
    }

    fn from_gguf(path: &Path) -> Result<Self> {
        let refuse = |problem: String| Error::Importance {
            path: path.to_owned(),
            problem,
        };
        let file = gguf::File::open(path)?;
        let metadata = file.metadata();
        if metadata.get_str(KIND.0)? != Some(KIND.1) {
            let problem = format!("its key '{}' is not '{}'", KIND.0, KIND.1);
            return Err(refuse(problem));
        }
        let mut all = Importance {
            datasets: metadata.get_strings(DATASETS)?.unwrap_or_default().to_vec(),
            chunks: metadata.get_u32(CHUNKS)?.unwrap_or(0),
            chunk_size: metadata.get_u32(CHUNK_SIZE)?.unwrap_or(0),
            entries: BTreeMap::new(),
        };
        for info in file.tensors() {
            let Some(name) = info.name.strip_suffix(SQUARES) else {
                continue;
            };
            let read = |name: &str| -> Result<Vec<f32>> {
                let info = file.tensor(name)?;
                if info.block_type != BlockType::F32 {
                    return Err(refuse(format!("tensor '{name}' is {}", info.block_type)));
                }
                let mut values = vec![0.0; info.elements()];
                dequantize(info.block_type, file.bytes(name)?, &mut values);
                Ok(values)
            };
            let entry = Entry {
                squares: read(&info.name)?,
                counts: read(&format!("{name}{COUNTS}"))?,
            };
            entry.check(name).map_err(refuse)?;
            all.entries.insert(name.to_owned(), entry);
        }
        Ok(all)
    }

    /// Writes it as a GGUF file, as llama-imatrix does.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn write(&self, disk: &dyn Disk, path: &Path) -> Result<()> {
        let mut metadata = Metadata::new();
        metadata.insert(KIND.0, KIND.1);
        metadata.insert(DATASETS, self.datasets.clone());
        metadata.insert(CHUNKS, self.chunks);
        metadata.insert(CHUNK_SIZE, self.chunk_size);
        let mut tensors = Vec::new();
        for (name, entry) in &self.entries {
            let experts = entry.counts.len();
            let columns = entry.squares.len() / experts;
            let info = |ending, columns| {
                TensorInfo::new(
                    format!("{name}{ending}"),
                    [experts, columns],
                    BlockType::F32,
                )
            };
            tensors.extend([info(SQUARES, columns), info(COUNTS, 1)]);
        }
        let mut writer = gguf::Writer::create(disk, path, &metadata, &tensors)?;
        for (name, entry) in &self.entries {
            writer.write(&format!("{name}{SQUARES}"), bytes_of(&entry.squares))?;
            writer.write(&format!("{name}{COUNTS}"), bytes_of(&entry.counts))?;
        }
        Ok(writer.finish()?)
    }

    /// Sets the sums of squares of a matrix's inputs and how many inputs were summed: for each expert its columns and
    /// its count, one after another.
    ///
    /// # Panics
    /// If the columns are no whole number for each count.
    #[track_caller]
    pub fn insert(&mut self, name: impl Into<String>, squares: Vec<f32>, counts: Vec<f32>) {
        let (name, entry) = (name.into(), Entry { squares, counts });
        if let Err(problem) = entry.check(&name) {
            panic!("{problem}");
        }
        self.entries.insert(name, entry);
    }

    /// The names of the matrices, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The mean squares of a matrix's columns, expert after expert; 1 for an expert that saw no input. `None` if the
    /// matrix was not measured.
    pub fn columns(&self, name: &str) -> Option<Vec<f32>> {
        let entry = self.entries.get(name)?;
        let width = entry.squares.len() / entry.counts.len();
        let experts = entry.squares.chunks(width).zip(&entry.counts);
        let mean = |(squares, count): (&[f32], &f32)| {
            let one = |s: &f32| if *count > 0.0 { s / count } else { 1.0 };
            squares.iter().map(one).collect::<Vec<_>>()
        };
        Some(experts.flat_map(mean).collect())
    }
}

impl Entry {
    fn check(&self, name: &str) -> Result<(), String> {
        let (columns, experts) = (self.squares.len(), self.counts.len());
        if columns == 0 || experts == 0 || !columns.is_multiple_of(experts) {
            return Err(format!(
                "matrix '{name}' has {columns} columns for {experts} counts"
            ));
        }
        let bad = |v: &&f32| !v.is_finite() || **v < 0.0;
        match self.squares.iter().chain(&self.counts).find(bad) {
            Some(value) => Err(format!("matrix '{name}' has a value of {value}")),
            None => Ok(()),
        }
    }
}

/// The older file: a count of matrices; of each a name, a number of calls and the columns; then the number of chunks and
/// the name of the text.
fn parse_old(file: &[u8]) -> Result<Importance, String> {
    let mut rest = file;
    let mut take = |count: usize, what: &str| -> Result<&[u8], String> {
        if count > rest.len() {
            let left = rest.len();
            return Err(format!(
                "cut short: {what} needs {count} bytes, {left} follow"
            ));
        }
        let (taken, after) = rest.split_at(count);
        rest = after;
        Ok(taken)
    };
    let integer = |bytes: &[u8], what: &str| -> Result<usize, String> {
        let value = i32::from_le_bytes(bytes.try_into().expect("taken as long"));
        usize::try_from(value).map_err(|_| format!("{what} is {value}"))
    };
    let count = integer(take(4, "the number of matrices")?, "the number of matrices")?;
    let mut all = Importance::default();
    for i in 0..count {
        let what = format!("the name of matrix {i}");
        let length = integer(take(4, &what)?, &what)?;
        let name = std::str::from_utf8(take(length, &what)?)
            .map_err(|_| format!("{what} is not UTF-8: this is no importance matrix"))?;
        let what = format!("matrix '{name}'");
        let calls = integer(take(4, &what)?, &what)?;
        let columns = integer(take(4, &what)?, &what)?;
        let bytes = take(columns.saturating_mul(4), &what)?;
        let numbers = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let entry = Entry {
            squares: numbers.collect(),
            counts: vec![calls.max(1) as f32],
        };
        entry.check(name)?;
        all.entries.insert(name.to_owned(), entry);
    }
    // The first files ended here.
    if let Ok(bytes) = take(4, "") {
        all.chunks = integer(bytes, "the number of chunks")? as u32;
        let length = integer(take(4, "the text's name")?, "the text's name")?;
        let name = take(length, "the text's name")?;
        all.datasets
            .push(String::from_utf8_lossy(name).into_owned());
    }
    Ok(all)
}
