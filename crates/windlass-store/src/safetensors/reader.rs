//! Reading: one file, or a folder of shards, as one table of tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::header::{Header, Info};
use super::value::{Value, is_floating, read_values};
use super::{Dtype, INDEX_FILE, SINGLE_FILE};
use crate::atomic::folder_of;
use crate::error::{Error, Result};
use crate::mmap::{self, Mapped, Plain};

/// The tensors of a file or a folder. Nothing is read before it is asked for.
#[derive(Debug)]
pub struct Tensors {
    path: PathBuf,
    files: Vec<Mapped>,
    tensors: BTreeMap<String, (usize, Info)>,
    metadata: BTreeMap<String, String>,
}

impl Tensors {
    /// Opens a `.safetensors` file, an `.index.json` with its shards, or a folder holding `model.safetensors` or
    /// `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`] for damaged, cut-short or contradictory files and missing shards,
    /// [`Error::Unsupported`] for a folder without safetensors weights.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            for (name, open) in [
                (SINGLE_FILE, Self::open_files as fn(_, _) -> _),
                (INDEX_FILE, Self::open_index),
            ] {
                let file = path.join(name);
                if file.exists() {
                    return open(path, vec![file]);
                }
            }
            return Err(no_weights(path));
        }
        if path.extension().is_some_and(|e| e == "json") {
            return Self::open_index(path, vec![path.to_owned()]);
        }
        Self::open_files(path, vec![path.to_owned()])
    }

    fn open_index(path: &Path, index: Vec<PathBuf>) -> Result<Self> {
        let weight_map = read_index(&index[0])?;
        let shards: BTreeSet<&String> = weight_map.values().collect();
        let folder = folder_of(&index[0]);
        let shards: Vec<PathBuf> = shards.into_iter().map(|name| folder.join(name)).collect();
        let missing: Vec<String> = shards
            .iter()
            .filter(|s| !s.exists())
            .map(|s| s.display().to_string())
            .collect();
        if !missing.is_empty() {
            let problem = format!(
                "{} of {} shards are missing: {}",
                missing.len(),
                shards.len(),
                missing.join(", ")
            );
            return Err(Error::corrupt(&index[0], problem));
        }
        let found = Self::open_files(path, shards)?;
        for (name, shard) in &weight_map {
            let there = found
                .tensors
                .get(name)
                .map(|(file, _)| found.files[*file].path());
            if there != Some(&folder.join(shard)) {
                let problem =
                    format!("tensor '{name}' is listed for {shard}, which does not hold it");
                return Err(Error::corrupt(&index[0], problem));
            }
        }
        Ok(found)
    }

    fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut all = Tensors {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        for path in files {
            let file = Mapped::open(&path)?;
            let header =
                Header::parse(file.bytes()).map_err(|problem| Error::corrupt(&path, problem))?;
            for (name, info) in header.tensors {
                if let Some((other, _)) = all.tensors.get(&name) {
                    let problem = format!(
                        "tensor '{name}' is also in {}",
                        all.files[*other].path().display()
                    );
                    return Err(Error::corrupt(&path, problem));
                }
                all.tensors.insert(name, (all.files.len(), info));
            }
            all.metadata.extend(header.metadata);
            all.files.push(file);
        }
        Ok(all)
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weight files.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(Mapped::path)
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Stored bytes of all tensors.
    pub fn total_bytes(&self) -> usize {
        self.tensors
            .values()
            .map(|(_, info)| info.bytes.len())
            .sum()
    }

    /// The free-form text entries of the file; of all shards together.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// A tensor in place.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], naming the nearest existing one.
    pub fn get<'a>(&'a self, name: &'a str) -> Result<View<'a>> {
        let Some((file, info)) = self.tensors.get(name) else {
            return Err(Error::MissingTensor {
                path: self.path.clone(),
                name: name.to_owned(),
                nearest: nearest(name, self.names()),
            });
        };
        let file = &self.files[*file];
        Ok(View {
            path: file.path(),
            name,
            dtype: info.dtype,
            shape: &info.shape,
            bytes: &file.bytes()[info.bytes.clone()],
        })
    }

    /// Reads `rows` of a tensor's first dimension into `out`, converted from the stored floating type.
    ///
    /// # Shapes
    /// `out`: [rows.len(), product of the other dimensions]. A scalar has one row.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Mismatch`] if the rows do not exist, the stored type is not a floating one,
    /// or `out` has another length.
    pub fn read_into<T: Value>(&self, name: &str, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        self.get(name)?.read_into(rows, out)
    }
}

/// One tensor's stored bytes, in place.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    path: &'a Path,
    name: &'a str,
    /// Type of the stored elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [usize],
    /// Row-major little-endian elements.
    pub bytes: &'a [u8],
}

impl<'a> View<'a> {
    /// Size of the first dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements in one row: the product of the other dimensions.
    pub fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Checks the shape that the caller is about to rely on.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming both shapes.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(self.mismatch(format!("{shape:?}"), format!("{:?}", self.shape)))
    }

    /// The elements in place, without conversion; `None` if the file does not align them.
    ///
    /// # Panics
    /// If `T` has not the stored type's size: check [`View::dtype`] first.
    #[track_caller]
    pub fn as_slice<T: Plain>(&self) -> Option<&'a [T]> {
        assert_eq!(
            size_of::<T>() * 8,
            self.dtype.bitsize(),
            "bits of the type asked for and of the stored {}",
            self.dtype
        );
        mmap::view(self.bytes)
    }

    /// As [`Tensors::read_into`].
    ///
    /// # Errors
    /// [`Error::Mismatch`].
    pub fn read_into<T: Value>(&self, rows: Range<usize>, out: &mut [T]) -> Result<()> {
        if !is_floating(self.dtype) {
            return Err(self.mismatch("F32, BF16, F16 or F64".to_owned(), self.dtype.to_string()));
        }
        if rows.start > rows.end || rows.end > self.rows() {
            let found = format!("{:?}, with {} rows", self.shape, self.rows());
            return Err(self.mismatch(format!("a tensor with rows {rows:?}"), found));
        }
        let row_len = self.row_len();
        if rows.len() * row_len != out.len() {
            let found = format!(
                "{:?}: rows {rows:?} have {} values",
                self.shape,
                rows.len() * row_len
            );
            return Err(self.mismatch(format!("{} values", out.len()), found));
        }
        let row_bytes = row_len * self.dtype.bitsize() / 8;
        read_values(
            self.dtype,
            &self.bytes[rows.start * row_bytes..rows.end * row_bytes],
            out,
        );
        Ok(())
    }

    fn mismatch(&self, expected: String, found: String) -> Error {
        Error::Mismatch {
            path: self.path.to_owned(),
            name: self.name.to_owned(),
            expected,
            found,
        }
    }
}

/// The index of a sharded model.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Tensor name → shard file name, each a plain name in the index's folder.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| Error::corrupt(path, format!("not a shard index: {e}")))?;
    if let Some(shard) = index.weight_map.values().find(|name| !is_plain_name(name)) {
        return Err(Error::corrupt(
            path,
            format!("shard '{shard}' is not a file name in the same folder"),
        ));
    }
    Ok(index.weight_map)
}

/// Whether `name` is one component of a path, so that a file cannot lead its reader elsewhere.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}

fn no_weights(folder: &Path) -> Error {
    let names: Vec<String> = std::fs::read_dir(folder)
        .map(|dir| {
            dir.flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default();
    let ends_with = |ending: &str| names.iter().find(|name| name.ends_with(ending));
    let hint = if let Some(name) = ends_with(".safetensors") {
        format!("name the file itself: {}", folder.join(name).display())
    } else if let Some(name) = ends_with(".bin").or(ends_with(".pt")).or(ends_with(".pth")) {
        format!(
            "{name} is a PyTorch file: convert it with `save_pretrained(.., safe_serialization=True)`"
        )
    } else {
        "download the model's weights into this folder".to_owned()
    };
    let problem = format!("no {SINGLE_FILE} or {INDEX_FILE} in this folder");
    Error::Unsupported {
        path: folder.to_owned(),
        problem,
        hint,
    }
}

/// The candidate with the smallest edit distance, if that is at most a third of the name.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    candidates
        .map(|candidate| {
            (
                edit_distance(name.as_bytes(), candidate.as_bytes()),
                candidate,
            )
        })
        .min()
        .filter(|(distance, _)| distance * 3 <= name.len())
        .map(|(_, candidate)| candidate.to_owned())
}

/// Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein).
fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
