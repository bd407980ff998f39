//! Plain text files, read in blocks. The encoding is UTF-8; nothing else is guessed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use windlass_model::tokenizer::split_point;

use super::read::Piece;
use crate::error::{Error, Result};

/// Bytes read at a time.
const BLOCK: usize = 256 * 1024;

/// An open text file.
pub(super) struct Text {
    file: File,
    path: PathBuf,
    separator: Option<String>,
    size: Option<usize>,
    /// Bytes read that are not yet known to be whole characters.
    bytes: Vec<u8>,
    buffer: String,
    /// Where the part of the buffer begins that was not handed out.
    start: usize,
    /// Up to where no separator begins.
    searched: usize,
    /// Up to where there is no split point.
    uncut: usize,
    read: u64,
    end_of_file: bool,
    /// Whether nothing of the current document has been handed out.
    fresh: bool,
    /// Whether a document is still to come.
    open: bool,
}

impl Text {
    pub(super) fn open(
        path: &Path,
        separator: Option<String>,
        size: Option<usize>,
    ) -> Result<Self> {
        Ok(Self {
            file: File::open(path).map_err(|error| Error::io("open", path, error))?,
            path: path.to_owned(),
            separator: separator.filter(|separator| !separator.is_empty()),
            size,
            bytes: Vec::new(),
            buffer: String::new(),
            start: 0,
            searched: 0,
            uncut: 0,
            read: 0,
            end_of_file: false,
            fresh: true,
            open: true,
        })
    }

    pub(super) fn position(&self) -> u64 {
        self.read
    }

    /// The next piece; white space only when a document is empty.
    pub(super) fn next(&mut self) -> Result<Option<Piece>> {
        while self.open {
            self.trim_start();
            if let Some((from, length)) = self.find_separator() {
                let piece = self.take(from, true);
                self.start += length;
                return Ok(Some(piece));
            }
            if self.end_of_file {
                self.open = false;
                let rest = self.buffer.len() - self.start;
                if self.separator.is_some() && self.fresh && rest == 0 {
                    // The last separator ends a document; it begins none.
                    return Ok(None);
                }
                return Ok(Some(self.take(self.buffer.len(), true)));
            }
            if let Some(point) = self.find_cut() {
                return Ok(Some(self.take(point, false)));
            }
            self.fill()?;
        }
        Ok(None)
    }

    /// With separators, the line break after one belongs to it.
    fn trim_start(&mut self) {
        if self.fresh && self.separator.is_some() {
            let rest = &self.buffer[self.start..];
            self.start += rest.len() - rest.trim_start_matches(['\r', '\n']).len();
        }
    }

    /// Where the next separator begins, and its length.
    fn find_separator(&mut self) -> Option<(usize, usize)> {
        let separator = self.separator.as_ref()?;
        let from = self.searched.max(self.start);
        if let Some(found) = self.buffer[from..].find(separator.as_str()) {
            return Some((from + found, separator.len()));
        }
        let kept = self.buffer.len().saturating_sub(separator.len());
        self.searched = self.buffer.floor_char_boundary(kept).max(self.start);
        None
    }

    /// Where a long document can be cut, before anything that could be the beginning of a separator.
    fn find_cut(&mut self) -> Option<usize> {
        let size = self.size?;
        // The line break before a separator belongs to the separator.
        let margin = self
            .separator
            .as_ref()
            .map_or(0, |separator| separator.len() + 2);
        let end = self
            .buffer
            .floor_char_boundary(self.buffer.len().saturating_sub(margin));
        if end < self.start + size {
            return None;
        }
        let from = self.uncut.max(self.start);
        let point = split_point(&self.buffer[from..end]).map(|point| from + point);
        if point.is_none_or(|point| point <= self.start) {
            self.uncut = self
                .buffer
                .floor_char_boundary(end.saturating_sub(12))
                .max(from);
            return None;
        }
        point
    }

    /// Hands out the buffer up to `to`.
    fn take(&mut self, to: usize, last: bool) -> Piece {
        let mut text = &self.buffer[self.start..to];
        if last && self.separator.is_some() {
            text = text.trim_end_matches(['\r', '\n']);
        }
        let text = text.to_owned();
        self.start = to;
        self.fresh = last;
        Piece::part(text, last)
    }

    /// Reads one more block.
    fn fill(&mut self) -> Result<()> {
        self.buffer.drain(..self.start);
        self.searched = self.searched.saturating_sub(self.start);
        self.uncut = self.uncut.saturating_sub(self.start);
        self.start = 0;
        let held = self.bytes.len();
        let block = (&mut self.file)
            .take(BLOCK as u64)
            .read_to_end(&mut self.bytes);
        let block = block.map_err(|error| Error::io("read", &self.path, error))?;
        let first = self.read == 0;
        let offset = self.read - held as u64;
        self.read += block as u64;
        self.end_of_file = block == 0;
        let complete = match std::str::from_utf8(&self.bytes) {
            Ok(_) => self.bytes.len(),
            Err(error) if error.error_len().is_none() && !self.end_of_file => error.valid_up_to(),
            Err(error) => {
                return Err(Error::NotUtf8 {
                    path: self.path.clone(),
                    offset: offset + error.valid_up_to() as u64,
                });
            }
        };
        let text = String::from_utf8_lossy(&self.bytes[..complete]);
        // A byte order mark is no text.
        self.buffer += if first {
            text.trim_start_matches('\u{feff}')
        } else {
            &text
        };
        self.bytes.drain(..complete);
        Ok(())
    }
}
