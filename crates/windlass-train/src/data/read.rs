//! Documents from `.txt`, `.jsonl`, `.json` and `.parquet` files, one after the other.
//!
//! Memory is bounded by the longest document (or by the piece size, when pieces are asked for), with one exception:
//! a `.json` array is mapped, and pages of it stay in memory as long as the system likes. Compressed archives are
//! not read.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use windlass_model::tokenizer::split_point;

use super::records::{Array, Lines, Table};
use super::text::Text;
use crate::error::{Error, Result};

/// How documents are found in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOptions {
    /// The field (JSON) or column (Parquet) that holds the text.
    pub field: String,
    /// Splits `.txt` files into documents wherever it occurs; without it, a file is one document.
    pub separator: Option<String>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            field: "text".into(),
            separator: None,
        }
    }
}

/// A list of data files.
#[derive(Clone, Debug)]
pub struct Corpus {
    files: Vec<(PathBuf, Format)>,
    bytes: u64,
    places: String,
    options: ReadOptions,
}

/// A part of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The text.
    pub text: String,
    /// Whether the document begins with it.
    pub first: bool,
    /// Whether the document ends with it.
    pub last: bool,
}

impl Piece {
    /// A part of a document; whether the document begins with it is found out later.
    pub(super) fn part(text: String, last: bool) -> Self {
        Self {
            text,
            first: false,
            last,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Format {
    Text,
    Lines,
    Array,
    Table,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        match ending.as_str() {
            "txt" => Some(Self::Text),
            "jsonl" | "ndjson" => Some(Self::Lines),
            "json" => Some(Self::Array),
            "parquet" => Some(Self::Table),
            _ => None,
        }
    }
}

impl Corpus {
    /// Lists the data files of `paths`, in the order given; a folder stands for the data files in it and below it, in
    /// the order of their names, hidden ones left out.
    ///
    /// # Errors
    /// [`Error::Io`] for a path that does not exist, [`Error::UnknownFormat`] for a file given by name that is none,
    /// [`Error::EmptyCorpus`] when there is no data file at all.
    pub fn open(paths: &[PathBuf], options: ReadOptions) -> Result<Self> {
        let mut files = Vec::new();
        for path in paths {
            let metadata = path.metadata();
            if metadata
                .map_err(|error| Error::io("open", path, error))?
                .is_dir()
            {
                list(path, &mut files)?;
            } else {
                let format = Format::of(path).ok_or_else(|| Error::UnknownFormat(path.clone()))?;
                files.push((path.clone(), format));
            }
        }
        let places: Vec<_> = paths
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let places = places.join(", ");
        if files.is_empty() {
            return Err(Error::EmptyCorpus { places });
        }
        let mut bytes = 0;
        for (path, _) in &files {
            let metadata = path.metadata();
            bytes += metadata
                .map_err(|error| Error::io("open", path, error))?
                .len();
        }
        Ok(Self {
            files,
            bytes,
            places,
            options,
        })
    }

    /// The data files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// The size of all files in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How the documents are found.
    pub fn options(&self) -> &ReadOptions {
        &self.options
    }

    /// Reads the documents, long ones in pieces of about `size` bytes cut at a
    /// [`split_point`], or whole without a `size`.
    pub fn pieces(&self, size: Option<usize>) -> Pieces<'_> {
        Pieces {
            corpus: self,
            next_file: 0,
            source: None,
            size: size.map(|size| size.max(64)),
            queue: VecDeque::new(),
            finished_bytes: 0,
            skipped: 0,
            documents: 0,
            begun: false,
            failed: false,
        }
    }

    /// The SHA-256 of the files' contents (not of their names) and of the options.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read.
    pub fn digest(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let options = format!("{:?}", self.options);
        hash.update(options.as_bytes());
        let mut block = vec![0; 1 << 20];
        for (path, format) in &self.files {
            let mut file = File::open(path).map_err(|error| Error::io("open", path, error))?;
            let mut length = 0u64;
            loop {
                let read = file.read(&mut block);
                let read = read.map_err(|error| Error::io("read", path, error))?;
                if read == 0 {
                    break;
                }
                length += read as u64;
                hash.update(&block[..read]);
            }
            hash.update(length.to_le_bytes());
            hash.update([*format as u8]);
        }
        Ok(hash.finalize().into())
    }
}

/// Adds the data files in and below `folder` to `files`.
fn list(folder: &Path, files: &mut Vec<(PathBuf, Format)>) -> Result<()> {
    let fail = |error| Error::io("read", folder, error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        if path.is_dir() {
            list(&path, files)?;
        } else if let Some(format) = Format::of(&path) {
            files.push((path, format));
        }
    }
    Ok(())
}

/// One open file.
enum Source {
    Text(Text),
    Lines(Lines),
    Array(Array),
    Table(Table),
}

/// The documents of a [`Corpus`], in order. Records whose text is empty, white space or null are left out.
///
/// Ends after the first error; a corpus without any document yields [`Error::EmptyCorpus`].
pub struct Pieces<'a> {
    corpus: &'a Corpus,
    next_file: usize,
    source: Option<Source>,
    size: Option<usize>,
    queue: VecDeque<Piece>,
    finished_bytes: u64,
    skipped: u64,
    documents: u64,
    /// Whether pieces of the current document have been handed out.
    begun: bool,
    failed: bool,
}

impl Pieces<'_> {
    /// How many bytes of the files have been read.
    pub fn bytes_read(&self) -> u64 {
        let current = match &self.source {
            None => 0,
            Some(Source::Text(text)) => text.position(),
            Some(Source::Lines(lines)) => lines.position(),
            Some(Source::Array(array)) => array.position(),
            Some(Source::Table(table)) => table.position(),
        };
        self.finished_bytes + current
    }

    /// How many empty documents have been left out.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The same since the last time it was asked for.
    pub(super) fn take_skipped(&mut self) -> u64 {
        std::mem::take(&mut self.skipped)
    }

    fn open_next(&mut self) -> Result<bool> {
        let Some((path, format)) = self.corpus.files.get(self.next_file) else {
            return Ok(false);
        };
        self.next_file += 1;
        let options = &self.corpus.options;
        self.source = Some(match format {
            Format::Text => Source::Text(Text::open(path, options.separator.clone(), self.size)?),
            Format::Lines => Source::Lines(Lines::open(path, &options.field)?),
            Format::Array => Source::Array(Array::open(path, &options.field)?),
            Format::Table => Source::Table(Table::open(path, &options.field)?),
        });
        Ok(true)
    }

    /// The next piece of the open files, empty ones included.
    fn read(&mut self) -> Result<Option<Piece>> {
        loop {
            if let Some(piece) = self.queue.pop_front() {
                return Ok(Some(piece));
            }
            let record = match &mut self.source {
                Some(Source::Text(text)) => {
                    if let Some(piece) = text.next()? {
                        return Ok(Some(piece));
                    }
                    None
                }
                Some(Source::Lines(lines)) => lines.next()?,
                Some(Source::Array(array)) => array.next()?,
                Some(Source::Table(table)) => table.next()?,
                None => None,
            };
            match record {
                Some(text) => cut(text, self.size, &mut self.queue),
                None => {
                    if let Some((path, _)) =
                        self.next_file.checked_sub(1).map(|i| &self.corpus.files[i])
                    {
                        self.finished_bytes += path.metadata().map_or(0, |metadata| metadata.len());
                    }
                    self.source = None;
                    if !self.open_next()? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// The next piece of a document that is not empty.
    fn advance(&mut self) -> Result<Option<Piece>> {
        while let Some(mut piece) = self.read()? {
            piece.first = !self.begun;
            if piece.first && piece.last && piece.text.trim().is_empty() {
                self.skipped += 1;
                continue;
            }
            self.begun = !piece.last;
            self.documents += u64::from(piece.last);
            return Ok(Some(piece));
        }
        if self.documents == 0 {
            let places = self.corpus.places.clone();
            return Err(Error::EmptyCorpus { places });
        }
        Ok(None)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let piece = self.advance().transpose();
        self.failed = !matches!(piece, Some(Ok(_)));
        piece
    }
}

/// Cuts a document that is in memory into pieces.
fn cut(text: String, size: Option<usize>, queue: &mut VecDeque<Piece>) {
    let Some(size) = size.filter(|&size| size < text.len()) else {
        queue.push_back(Piece::part(text, true));
        return;
    };
    let (mut begin, mut window) = (0, 0);
    while text.len() - begin > size {
        // A stretch without a split point makes the piece longer.
        let from = text.floor_char_boundary(begin + window);
        let to = text.ceil_char_boundary((begin + window + size).min(text.len()));
        match split_point(&text[from..to]) {
            Some(point) if from + point > begin => {
                let text = text[begin..from + point].to_owned();
                queue.push_back(Piece::part(text, false));
                (begin, window) = (from + point, 0);
            }
            _ if to == text.len() => break,
            // Three characters decide about a split point.
            _ => window = to - begin - 12,
        }
    }
    let text = text[begin..].to_owned();
    queue.push_back(Piece::part(text, true));
}
