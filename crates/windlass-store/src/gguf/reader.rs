//! Reading: one file, or the files of a split model, as one table of tensors.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::MAGIC;
use super::header::{Header, Problem, TensorInfo};
use super::metadata::Metadata;
use super::split;
use crate::error::{Error, Result};
use crate::mmap::Mapped;
use crate::safetensors::nearest;

/// A model's GGUF file, or files. No tensor is read before it is asked for.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    version: u32,
    files: Vec<Mapped>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    places: Vec<(usize, Range<usize>)>,
    index: BTreeMap<String, usize>,
}

impl File {
    /// Opens a file; all files of a split model (`NAME-00001-of-00003.gguf`) with any one of them.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] for damaged, cut-short or contradictory files and missing parts;
    /// [`Error::Unsupported`] for versions and block types that are not read; [`Error::KeyKind`] and
    /// [`Error::MissingKey`] for the keys of a split model.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, mut header) = read(path)?;
        header.metadata.set_path(path);
        let count = split::count(&header.metadata)?;
        let mut all = File {
            path: path.to_owned(),
            version: header.version,
            files: Vec::new(),
            metadata: Metadata::new(),
            tensors: Vec::new(),
            places: Vec::new(),
            index: BTreeMap::new(),
        };
        if count == 1 {
            all.metadata = std::mem::take(&mut header.metadata);
            all.add(file, header)?;
        } else {
            for (number, part) in split::parts(path, count)?.iter().enumerate() {
                let (file, mut header) = read(part)?;
                split::check_part(part, &header, number, count)?;
                if number == 0 {
                    all.metadata = std::mem::take(&mut header.metadata);
                    all.metadata.set_path(part);
                }
                all.add(file, header)?;
            }
            split::check_total(&all.metadata, all.tensors.len())?;
        }
        all.metadata.retain(|key| !key.starts_with(split::PREFIX));
        Ok(all)
    }

    fn add(&mut self, file: Mapped, header: Header) -> Result<()> {
        for (info, range) in header.tensors {
            let at = self.tensors.len();
            if let Some(other) = self.index.insert(info.name.clone(), at) {
                let (other, _) = &self.places[other];
                let problem = format!(
                    "tensor '{}' is also in {}",
                    info.name,
                    self.files[*other].path().display()
                );
                return Err(Error::corrupt(file.path(), problem));
            }
            self.tensors.push(info);
            self.places.push((self.files.len(), range));
        }
        self.files.push(file);
        Ok(())
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The files of the model, in order: one, unless it is split.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.files.iter().map(Mapped::path)
    }

    /// The mapped files, in the order of [`File::parts`].
    pub fn maps(&self) -> &[Mapped] {
        &self.files
    }

    /// The typed metadata; of the first file, without the keys of the split.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// What the file says of a tensor.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], naming the nearest existing one.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.find(name).map(|at| &self.tensors[at])
    }

    /// A tensor's bytes, in place: rows of whole blocks, the first row first.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], naming the nearest existing one.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (file, range) = &self.places[self.find(name)?];
        Ok(&self.files[*file].bytes()[range.clone()])
    }

    /// Gives back the memory that a tensor's bytes took when they were read.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Io`] if the kernel refuses.
    pub fn release(&self, name: &str) -> Result<()> {
        let (file, range) = &self.places[self.find(name)?];
        self.files[*file].release(range.clone())
    }

    /// Stored bytes of all tensors.
    pub fn total_bytes(&self) -> usize {
        self.places.iter().map(|(_, range)| range.len()).sum()
    }

    fn find(&self, name: &str) -> Result<usize> {
        let found = self.index.get(name).copied();
        found.ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            nearest: nearest(name, self.index.keys().map(String::as_str)),
        })
    }
}

/// Whether a path is a file that begins as a GGUF file does, or is named as one.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    let begins = |mut file: fs::File| file.read_exact(&mut magic).is_ok() && magic == MAGIC;
    path.is_file()
        && (path.extension().is_some_and(|end| end == "gguf")
            || fs::File::open(path).is_ok_and(begins))
}

fn read(path: &Path) -> Result<(Mapped, Header)> {
    let file = Mapped::open(path)?;
    let header = Header::parse(file.bytes()).map_err(|problem| match problem {
        Problem::Corrupt(problem) => Error::corrupt(path, problem),
        Problem::Unsupported { problem, hint } => Error::Unsupported {
            path: path.to_owned(),
            problem,
            hint,
        },
    })?;
    Ok((file, header))
}
