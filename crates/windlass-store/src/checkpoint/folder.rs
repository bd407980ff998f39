//! One finished checkpoint: its manifest, and reading it back.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::safetensors::{Tensors, is_plain_name};

/// The list of a checkpoint's files.
pub(super) const MANIFEST: &str = "manifest.json";
/// What a manifest says it is.
const FORMAT: &str = "windlass-checkpoint";
/// The version of the layout; a reader refuses a newer one.
const VERSION: u32 = 1;

/// What a checkpoint holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: String,
    version: u32,
    step: u64,
    files: Vec<FileEntry>,
}

impl Manifest {
    /// The manifest of a checkpoint saved now.
    pub(super) fn new(step: u64, files: Vec<FileEntry>) -> Self {
        Manifest {
            format: FORMAT.to_owned(),
            version: VERSION,
            step,
            files,
        }
    }
}

/// One file of a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct FileEntry {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// A checkpoint that is there.
#[derive(Debug)]
pub struct CheckpointDir {
    path: PathBuf,
    manifest: Manifest,
}

impl CheckpointDir {
    pub(super) fn new(path: PathBuf, manifest: Manifest) -> Self {
        CheckpointDir { path, manifest }
    }

    /// Opens one checkpoint folder; checks that its files are present with their sizes.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no manifest, [`Error::Corrupt`] if it, or a file's size, is wrong,
    /// [`Error::Unsupported`] for the layout of a newer version.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = read_manifest(&path.join(MANIFEST))?;
        for file in &manifest.files {
            let file_path = path.join(&file.name);
            let bytes = fs::metadata(&file_path)
                .map_err(|e| Error::io("read", &file_path, e))?
                .len();
            if bytes != file.bytes {
                return Err(Error::corrupt(
                    &file_path,
                    format!("{bytes} bytes, but {} were saved", file.bytes),
                ));
            }
        }
        Ok(CheckpointDir {
            path: path.to_owned(),
            manifest,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The step after which it was saved.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The names of its files, sorted.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.manifest.files.iter().map(|file| file.name.as_str())
    }

    /// Reads every file and compares its SHA-256 with the manifest's.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the first file that changed; [`Error::Io`].
    pub fn verify(&self) -> Result<()> {
        for file in &self.manifest.files {
            let path = self.path.join(&file.name);
            if hash_file(&path)? != file.sha256 {
                return Err(Error::corrupt(
                    &path,
                    "its content is not what was saved (SHA-256 differs)",
                ));
            }
        }
        Ok(())
    }

    /// A file's content.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the checkpoint has no such file; [`Error::Io`].
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.file(name)?;
        fs::read(&path).map_err(|e| Error::io("read", &path, e))
    }

    /// A JSON file's content.
    ///
    /// # Errors
    /// As [`CheckpointDir::bytes`]; [`Error::Corrupt`] if it does not have the form of `T`.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let text = self.bytes(name)?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::corrupt(&self.path.join(name), e.to_string()))
    }

    /// A safetensors file's tensors.
    ///
    /// # Errors
    /// As [`CheckpointDir::bytes`] and [`Tensors::open`].
    pub fn tensors(&self, name: &str) -> Result<Tensors> {
        Tensors::open(&self.file(name)?)
    }

    /// The weights saved by [`super::Writer::weights`].
    ///
    /// # Errors
    /// As [`Tensors::open`].
    pub fn weights(&self) -> Result<Tensors> {
        Tensors::open(&self.path)
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        if !self.files().any(|file| file == name) {
            let there: Vec<&str> = self.files().collect();
            return Err(Error::corrupt(
                &self.path,
                format!("no file {name}; it holds {}", there.join(", ")),
            ));
        }
        Ok(self.path.join(name))
    }
}

fn read_manifest(path: &Path) -> Result<Manifest> {
    let text = fs::read(path).map_err(|e| Error::io("read", path, e))?;
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|e| Error::corrupt(path, e.to_string()))?;
    if manifest.format != FORMAT {
        return Err(Error::corrupt(
            path,
            format!("format '{}', expected '{FORMAT}'", manifest.format),
        ));
    }
    if manifest.version != VERSION {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            problem: format!(
                "layout version {}, this program reads {VERSION}",
                manifest.version
            ),
            hint: "continue with the version of the program that saved it".to_owned(),
        });
    }
    if let Some(file) = manifest
        .files
        .iter()
        .find(|file| !is_plain_name(&file.name))
    {
        return Err(Error::corrupt(
            path,
            format!("'{}' is not a file name", file.name),
        ));
    }
    Ok(manifest)
}

/// The SHA-256 of a file's content.
fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file
            .read(&mut buffer)
            .map_err(|e| Error::io("read", path, e))?
        {
            0 => return Ok(hex(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// A finished hash in lower-case hexadecimal digits.
pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}
