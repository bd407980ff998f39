//! Files of a reference model's log-probabilities, in 16 bits: what `llama-perplexity --kl-divergence-base` writes.
//!
//! The tokens of a text stand in front, so a comparison needs neither the text nor its tokenizer. A row is a scale, the
//! least log-probability, and a code for each token of the vocabulary; what is less likely than `e^-16` of the likeliest
//! token is lost.
//!
//! # Source
//! `tools/perplexity/perplexity.cpp` of llama.cpp.

use crate::InferError;
use std::io::{BufWriter, Write};
use std::path::Path;
use windlass_store::Error as StoreError;
use windlass_store::atomic::{AtomicFile, Disk};
use windlass_store::mmap::Mapped;

/// How a file begins.
const MAGIC: &[u8; 8] = b"_logits_";
/// Magic, window, vocabulary, windows.
const HEADER: usize = 8 + 3 * 4;
/// The largest difference of log-probabilities that is kept.
const RANGE: f32 = 16.0;

/// The first token of a window of `window` whose logits count.
pub(crate) fn first_scored(window: usize) -> usize {
    window / 2
}

/// Bytes of a row: scale, least value, codes of an even number of tokens.
fn row_bytes(vocabulary: usize) -> usize {
    2 * (vocabulary.next_multiple_of(2) + 4)
}

/// The log-probabilities that a reference model gave to the tokens of a text.
pub struct SavedLogits {
    file: Mapped,
    window: usize,
    vocabulary: usize,
    windows: usize,
}

/// The log-probabilities after one token.
#[derive(Clone, Copy)]
pub(crate) struct Row<'a> {
    scale: f32,
    least: f32,
    codes: &'a [u8],
}

impl Row<'_> {
    /// The log-probability of a token.
    pub fn of(&self, token: usize) -> f32 {
        let code = u16::from_le_bytes([self.codes[2 * token], self.codes[2 * token + 1]]);
        self.scale * f32::from(code) + self.least
    }
}

impl SavedLogits {
    /// Opens a file of this program or of llama-perplexity.
    ///
    /// # Errors
    /// A file that cannot be read, is of another kind or cut short.
    pub fn open(path: &Path) -> Result<Self, InferError> {
        let file = Mapped::open(path)?;
        let bytes = file.bytes();
        let refuse = |problem: String| {
            let path = path.to_owned();
            Err(StoreError::Corrupt { path, problem }.into())
        };
        if bytes.len() < HEADER || !bytes.starts_with(MAGIC) {
            return refuse("holds no saved logits: it does not begin with _logits_".into());
        }
        let count = |index: usize| {
            let at = MAGIC.len() + 4 * index;
            let value = i32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
            usize::try_from(value).unwrap_or(0)
        };
        let (window, vocabulary, windows) = (count(0), count(1), count(2));
        if window < 4 || vocabulary == 0 || windows == 0 {
            return refuse(format!(
                "says {windows} windows of {window} tokens from a vocabulary of {vocabulary}"
            ));
        }
        let rows = window - 1 - first_scored(window);
        let size = rows
            .checked_mul(row_bytes(vocabulary))
            .and_then(|size| size.checked_add(4 * window))
            .and_then(|size| size.checked_mul(windows))
            .and_then(|size| size.checked_add(HEADER));
        if size != Some(bytes.len()) {
            let problem = format!(
                "has {} bytes, not those of {windows} windows of {window} tokens from a vocabulary of {vocabulary}: \
                 it was cut short or damaged",
                bytes.len()
            );
            return refuse(problem);
        }
        Ok(SavedLogits {
            file,
            window,
            vocabulary,
            windows,
        })
    }

    /// Tokens of a window.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Tokens of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Windows of the text.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// The tokens of the text.
    pub fn ids(&self) -> Vec<u32> {
        let bytes = &self.file.bytes()[HEADER..][..4 * self.window * self.windows];
        let ids = bytes.as_chunks::<4>().0.iter();
        ids.map(|id| u32::from_le_bytes(*id)).collect()
    }

    /// The log-probabilities after the tokens of the second half of a window, but for its last.
    ///
    /// # Errors
    /// Damaged numbers.
    pub(crate) fn rows(&self, window: usize) -> Result<Vec<Row<'_>>, InferError> {
        let (size, count) = (
            row_bytes(self.vocabulary),
            self.window - 1 - first_scored(self.window),
        );
        let start = HEADER + 4 * self.window * self.windows + window * count * size;
        let rows = self.file.bytes()[start..][..count * size].chunks_exact(size);
        let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("four bytes"));
        rows.map(|row| {
            let row = Row {
                scale: number(&row[..4]),
                least: number(&row[4..8]),
                codes: &row[8..],
            };
            match row.scale >= 0.0 && row.scale.is_finite() && row.least.is_finite() {
                true => Ok(row),
                false => Err(StoreError::Corrupt {
                    path: self.file.path().to_owned(),
                    problem: format!("window {window} has scales that are no finite numbers"),
                }
                .into()),
            }
        })
        .collect()
    }
}

/// A file being written.
pub(crate) struct Writer<'d> {
    file: BufWriter<AtomicFile<'d>>,
}

impl<'d> Writer<'d> {
    /// Starts a file for these windows of tokens.
    ///
    /// # Errors
    /// [`StoreError::Io`], as in all methods.
    pub fn create(
        disk: &'d dyn Disk,
        path: &Path,
        ids: &[u32],
        window: usize,
        vocabulary: usize,
    ) -> Result<Self, StoreError> {
        let file = AtomicFile::create(disk, path)?;
        let mut writer = Writer {
            file: BufWriter::with_capacity(1 << 20, file),
        };
        let mut head = MAGIC.to_vec();
        for count in [window, vocabulary, ids.len() / window] {
            head.extend((count as i32).to_le_bytes());
        }
        head.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        writer.write(&head)?;
        Ok(writer)
    }

    /// Appends rows made by [`encode`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.file.write_all(bytes).map_err(|source| StoreError::Io {
            action: "write",
            path: self.file.get_ref().target().to_owned(),
            source,
        })
    }

    /// Puts the file in place.
    pub fn finish(self) -> Result<(), StoreError> {
        let path = self.file.get_ref().target().to_owned();
        let file = self.file.into_inner().map_err(|error| StoreError::Io {
            action: "write",
            path,
            source: error.into_error(),
        })?;
        file.commit()
    }
}

/// A row of logits, whose `log_sum` is the logarithm of the sum of their exponentials, as it is stored.
pub(crate) fn encode(logits: &[f32], log_sum: f64) -> Vec<u8> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = logits.iter().copied().fold(f32::INFINITY, f32::min);
    let least = least.max(largest - RANGE);
    let scale = (largest - least) / 65535.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut bytes = Vec::with_capacity(row_bytes(logits.len()));
    bytes.extend(scale.to_le_bytes());
    bytes.extend(((f64::from(least) - log_sum) as f32).to_le_bytes());
    for &logit in logits {
        // A cast takes what lies outside to the ends.
        let code = (inverse * (logit - least)).round_ties_even() as u16;
        bytes.extend(code.to_le_bytes());
    }
    bytes.resize(row_bytes(logits.len()), 0);
    bytes
}
