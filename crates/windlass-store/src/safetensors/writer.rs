//! Writing: headers from declarations, tensors one after another through a callback.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::header::{Spec, encode};
use super::value::{Value, append_values};
use super::{INDEX_FILE, SINGLE_FILE};
use crate::atomic::{AtomicFile, Disk, write_atomic};
use crate::error::{Error, Result};

/// Values converted at a time.
const CHUNK: usize = 1 << 16;

/// How a folder of weights is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Largest shard's tensors, in bytes; a tensor larger than this gets a shard of its own.
    pub max_shard_bytes: usize,
    /// The header's free-form text entries. Other readers want `format: pt`.
    pub metadata: BTreeMap<String, String>,
}

impl Default for Options {
    /// Shards of 5 GB, `format: pt`.
    fn default() -> Self {
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        Options {
            max_shard_bytes: 5_000_000_000,
            metadata,
        }
    }
}

/// Takes one tensor's elements, in row-major order and in pieces of any size.
pub struct TensorWriter<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    spec: &'a Spec,
    written: usize,
    buffer: &'a mut Vec<u8>,
}

impl TensorWriter<'_> {
    /// The tensor being written.
    pub fn spec(&self) -> &Spec {
        self.spec
    }

    /// Appends values, converted to the declared floating type with one rounding to nearest even.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the declared type is not a floating one (use [`TensorWriter::bytes`]), or with more values than declared.
    #[track_caller]
    pub fn values<T: Value>(&mut self, values: &[T]) -> Result<()> {
        if T::DTYPE == self.spec.dtype {
            return self.bytes(crate::mmap::bytes_of(values));
        }
        for chunk in values.chunks(CHUNK) {
            let mut buffer = std::mem::take(self.buffer);
            buffer.clear();
            append_values(self.spec.dtype, chunk, &mut buffer);
            let result = self.bytes(&buffer);
            *self.buffer = buffer;
            result?;
        }
        Ok(())
    }

    /// Appends little-endian elements as they are to be stored.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// With more bytes than declared.
    #[track_caller]
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len();
        assert!(
            self.written <= self.spec.bytes(),
            "{} bytes written for {:?}",
            self.written,
            self.spec
        );
        self.out
            .write_all(bytes)
            .map_err(|e| Error::io("write", self.path, e))
    }
}

/// Streams a whole file's content: the header, then those of `specs` that `order` names, widest elements first so that
/// every tensor is aligned. `fill` is called with a tensor's position in `specs`.
#[track_caller]
pub(crate) fn write_tensors(
    out: &mut dyn Write,
    path: &Path,
    specs: &[Spec],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
    fill: &mut dyn FnMut(usize, &mut TensorWriter) -> Result<()>,
) -> Result<()> {
    let mut order = order.to_vec();
    order.sort_by_key(|&i| std::cmp::Reverse(specs[i].dtype.bitsize()));
    let declared: Vec<&Spec> = order.iter().map(|&i| &specs[i]).collect();
    out.write_all(&encode(&declared, metadata))
        .map_err(|e| Error::io("write", path, e))?;
    let mut buffer = Vec::new();
    for i in order {
        let spec = &specs[i];
        let mut tensor = TensorWriter {
            out,
            path,
            spec,
            written: 0,
            buffer: &mut buffer,
        };
        fill(i, &mut tensor)?;
        assert_eq!(
            tensor.written,
            spec.bytes(),
            "bytes written and bytes declared by {spec:?}"
        );
    }
    Ok(())
}

/// Writes one file, whole or not at all. `fill(i, writer)` gives the elements of `specs[i]`; the order of calls is the
/// file's layout.
///
/// # Errors
/// [`Error::Io`], and what `fill` returns.
///
/// # Panics
/// If `fill` gives more or fewer elements than declared, or a name is declared twice.
#[track_caller]
pub fn write_file(
    disk: &dyn Disk,
    path: &Path,
    specs: &[Spec],
    metadata: &BTreeMap<String, String>,
    mut fill: impl FnMut(usize, &mut TensorWriter) -> Result<()>,
) -> Result<()> {
    let mut file = AtomicFile::create(disk, path)?;
    let order: Vec<usize> = (0..specs.len()).collect();
    write_tensors(&mut file, path, specs, &order, metadata, &mut fill)?;
    file.commit()
}

/// Writes a folder's weights: `model.safetensors`, or shards with an index where they exceed
/// [`Options::max_shard_bytes`]. Returns the weight files.
///
/// All files are complete on the disk before the first one is put in place, and the index is put in place last; then
/// weight files of an earlier save that are no part of this one are removed.
///
/// # Errors
/// As [`write_file`]. When the disk is full the folder keeps its earlier weights.
///
/// # Panics
/// As [`write_file`].
#[track_caller]
pub fn write_folder(
    disk: &dyn Disk,
    folder: &Path,
    specs: &[Spec],
    options: &Options,
    mut fill: impl FnMut(usize, &mut TensorWriter) -> Result<()>,
) -> Result<Vec<PathBuf>> {
    disk.create_dir(folder)
        .map_err(|e| Error::io("create", folder, e))?;
    let shards = plan_shards(specs, options.max_shard_bytes);
    let mut files = Vec::new();
    for (i, order) in shards.iter().enumerate() {
        let path = folder.join(shard_name(i, shards.len()));
        let mut file = AtomicFile::create(disk, &path)?;
        write_tensors(&mut file, &path, specs, order, &options.metadata, &mut fill)?;
        file.sync()?;
        files.push(file);
    }
    let mut paths = Vec::new();
    for file in files {
        paths.push(file.target().to_owned());
        file.commit()?;
    }
    if shards.len() > 1 {
        write_atomic(
            disk,
            &folder.join(INDEX_FILE),
            &encode_index(specs, &shards),
        )?;
    }
    remove_stale(disk, folder, &paths)?;
    Ok(paths)
}

/// Cuts `specs` into shards, in order, each as full as the limit allows; at least one, perhaps empty.
pub(crate) fn plan_shards(specs: &[Spec], max_bytes: usize) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for (i, spec) in specs.iter().enumerate() {
        if filled > 0 && filled + spec.bytes() > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += spec.bytes();
        shards.last_mut().expect("starts with one").push(i);
    }
    shards
}

/// The name of shard `i` of `count`; one alone is `model.safetensors`.
pub(crate) fn shard_name(i: usize, count: usize) -> String {
    if count == 1 {
        SINGLE_FILE.to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", i + 1)
    }
}

/// The content of the index of these shards.
pub(crate) fn encode_index(specs: &[Spec], shards: &[Vec<usize>]) -> Vec<u8> {
    let total: usize = specs.iter().map(Spec::bytes).sum();
    let mut weight_map = BTreeMap::new();
    for (shard, members) in shards.iter().enumerate() {
        for &i in members {
            let before = weight_map.insert(&specs[i].name, shard_name(shard, shards.len()));
            assert!(
                before.is_none(),
                "tensor '{}' is declared twice",
                specs[i].name
            );
        }
    }
    let index =
        serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let mut text = serde_json::to_vec_pretty(&index).expect("strings and numbers");
    text.push(b'\n');
    text
}

/// Removes weight files of an earlier save: they would be read together with, or instead of, the ones just `kept`.
fn remove_stale(disk: &dyn Disk, folder: &Path, kept: &[PathBuf]) -> Result<()> {
    let entries = std::fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
    for entry in entries {
        let path = entry.map_err(|e| Error::io("read", folder, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let shard =
            name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        let index = name == INDEX_FILE && kept.len() == 1;
        if (shard || index || name == SINGLE_FILE) && !kept.contains(&path) {
            disk.remove_file(&path)
                .map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}
