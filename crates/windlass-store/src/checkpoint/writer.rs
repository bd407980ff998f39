//! One checkpoint being written.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Checkpoints;
use super::folder::{CheckpointDir, FileEntry, MANIFEST, Manifest, hex};
use super::held::Held;
use crate::atomic::DiskFile;
use crate::error::{Error, Result};
use crate::safetensors::{
    INDEX_FILE, Options, Spec, TensorWriter, encode_index, is_plain_name, plan_shards, shard_name,
    write_tensors,
};
use windlass_tensor::kernels::memory::Memory;

/// A checkpoint being written. [`Writer::commit`] makes it real; dropping it leaves nothing.
pub struct Writer {
    home: Checkpoints,
    name: String,
    step: u64,
    temp: PathBuf,
    files: BTreeMap<String, FileEntry>,
    /// Files that are not written yet.
    held: Option<Held>,
    /// Whether the folder is no longer this writer's to remove.
    committed: bool,
}

impl Writer {
    /// Starts writing in `temp`, an empty folder.
    pub(super) fn new(home: &Checkpoints, name: &str, step: u64, temp: PathBuf) -> Self {
        Writer {
            home: home.clone(),
            name: name.to_owned(),
            step,
            temp,
            files: BTreeMap::new(),
            held: None,
            committed: false,
        }
    }

    /// Starts writing beside another writer, to whom the folder belongs.
    pub(super) fn joined(home: &Checkpoints, name: &str, step: u64, temp: PathBuf) -> Self {
        let mut writer = Self::new(home, name, step, temp);
        writer.committed = true;
        writer
    }

    /// Keeps the files added from now on in blocks of `memory` ([`HELD_BLOCK`](super::HELD_BLOCK) bytes each) until
    /// [`Writer::flush`], which another thread may call.
    pub fn hold(&mut self, memory: &Memory) {
        self.held = Some(Held::new(memory));
    }

    /// Writes the files that were held, in the order in which they were added.
    ///
    /// # Errors
    /// As [`Writer::bytes`].
    pub fn flush(&mut self) -> Result<()> {
        let Some(mut held) = self.held.take() else {
            return Ok(());
        };
        while let Some((name, bytes)) = held.next() {
            self.write(&name, |path, out| {
                held.pour(bytes, out)
                    .map_err(|e| Error::io("write", path, e))
            })?;
        }
        Ok(())
    }

    /// Adds a file with this content.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the name was added before, or is not a plain file name.
    #[track_caller]
    pub fn bytes(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.file(name, |path, file| {
            file.write_all(content)
                .map_err(|e| Error::io("write", path, e))
        })
    }

    /// Adds a JSON file.
    ///
    /// # Errors
    /// As [`Writer::bytes`].
    ///
    /// # Panics
    /// As [`Writer::bytes`].
    #[track_caller]
    pub fn json(&mut self, name: &str, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_vec_pretty(value)
            .expect("a checkpoint's state maps to JSON with text keys");
        self.bytes(name, &text)
    }

    /// Adds a safetensors file; `fill` as in [`crate::safetensors::write_file`].
    ///
    /// # Errors
    /// As [`Writer::bytes`], and what `fill` returns.
    ///
    /// # Panics
    /// As [`Writer::bytes`].
    #[track_caller]
    pub fn tensors(
        &mut self,
        name: &str,
        specs: &[Spec],
        metadata: &BTreeMap<String, String>,
        mut fill: impl FnMut(usize, &mut TensorWriter) -> Result<()>,
    ) -> Result<()> {
        let order: Vec<usize> = (0..specs.len()).collect();
        self.file(name, |path, file| {
            write_tensors(file, path, specs, &order, metadata, &mut fill)
        })
    }

    /// Adds a model's weights under the names of a Hugging Face folder; as [`crate::safetensors::write_folder`].
    ///
    /// # Errors
    /// As [`Writer::bytes`], and what `fill` returns.
    ///
    /// # Panics
    /// As [`Writer::bytes`].
    #[track_caller]
    pub fn weights(
        &mut self,
        specs: &[Spec],
        options: &Options,
        mut fill: impl FnMut(usize, &mut TensorWriter) -> Result<()>,
    ) -> Result<()> {
        let shards = plan_shards(specs, options.max_shard_bytes);
        for shard in 0..shards.len() {
            self.weights_shard(specs, &shards, shard, &options.metadata, &mut fill)?;
        }
        self.weights_index(specs, &shards)
    }

    /// Adds one of the files of a model's weights: the tensors `shards[shard]` of `specs`.
    ///
    /// # Errors
    /// As [`Writer::weights`].
    ///
    /// # Panics
    /// As [`Writer::bytes`].
    #[track_caller]
    pub fn weights_shard(
        &mut self,
        specs: &[Spec],
        shards: &[Vec<usize>],
        shard: usize,
        metadata: &BTreeMap<String, String>,
        mut fill: impl FnMut(usize, &mut TensorWriter) -> Result<()>,
    ) -> Result<()> {
        let name = shard_name(shard, shards.len());
        self.file(&name, |path, file| {
            write_tensors(file, path, specs, &shards[shard], metadata, &mut fill)
        })
    }

    /// Adds the index over the files of a model's weights, where there are several.
    ///
    /// # Errors
    /// As [`Writer::bytes`].
    #[track_caller]
    pub fn weights_index(&mut self, specs: &[Spec], shards: &[Vec<usize>]) -> Result<()> {
        if shards.len() > 1 {
            self.bytes(INDEX_FILE, &encode_index(specs, shards))?;
        }
        Ok(())
    }

    /// Ends the part of a rank that joined ([`Checkpoints::join`]): the list of what it wrote, for
    /// [`Writer::adopt`] on the rank that began.
    ///
    /// # Panics
    /// If files are held that were not written.
    #[track_caller]
    pub fn leave(self) -> Vec<u8> {
        assert!(self.held.is_none(), "files held in memory are lost");
        let files: Vec<&FileEntry> = self.files.values().collect();
        serde_json::to_vec(&files).expect("a list of names, sizes and hashes")
    }

    /// Takes over the files that another rank wrote.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for anything but the list of [`Writer::leave`].
    pub fn adopt(&mut self, files: &[u8]) -> Result<()> {
        let files: Vec<FileEntry> = serde_json::from_slice(files)
            .map_err(|e| Error::corrupt(&self.temp, format!("list of files: {e}")))?;
        self.files
            .extend(files.into_iter().map(|file| (file.name.clone(), file)));
        Ok(())
    }

    /// Makes the checkpoint real and the one to continue from, then removes the oldest beyond `keep`, if given.
    ///
    /// # Errors
    /// [`Error::Io`]. An error in removing old checkpoints comes after this one is safe.
    pub fn commit(mut self, keep: Option<NonZeroUsize>) -> Result<CheckpointDir> {
        self.flush()?;
        let manifest = Manifest::new(self.step, self.files.values().cloned().collect());
        self.json(MANIFEST, &manifest)?;
        let path = self.home.put_in_place(&self.name, &self.temp)?;
        self.committed = true;
        self.home.name_latest(&self.name, keep)?;
        Ok(CheckpointDir::new(path, manifest))
    }

    /// Adds one file, to the disk or to what is held.
    #[track_caller]
    fn file(
        &mut self,
        name: &str,
        write: impl FnOnce(&Path, &mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        assert!(is_plain_name(name), "'{name}' is not a plain file name");
        let held = self.held.as_ref().is_some_and(|held| held.contains(name));
        let known = held || self.files.contains_key(name);
        assert!(!known, "'{name}' was added before");
        match &mut self.held {
            Some(held) => {
                held.begin(name);
                write(&self.temp.join(name), held)
            }
            None => self.write(name, write),
        }
    }

    /// Writes one file, forces it to the disk and notes its size and hash.
    fn write(
        &mut self,
        name: &str,
        write: impl FnOnce(&Path, &mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let path = self.temp.join(name);
        let file = self
            .home
            .disk
            .create(&path)
            .map_err(|e| Error::io("create", &path, e))?;
        let mut file = Hashing {
            file,
            hash: Sha256::new(),
            bytes: 0,
        };
        write(&path, &mut file)?;
        file.file.sync().map_err(|e| Error::io("write", &path, e))?;
        let entry = FileEntry {
            name: name.to_owned(),
            bytes: file.bytes,
            sha256: hex(file.hash),
        };
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.committed {
            // The error that led here is the one worth reporting; `begin` removes what is left.
            let _ = self.home.disk().remove_dir(&self.temp);
        }
    }
}

/// A file that hashes and counts what passes.
struct Hashing {
    file: Box<dyn DiskFile>,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
