//! A corpus as one memory-mapped file of token ids, made once and used again while nothing changes.
//!
//! The file holds the ids (`u16` when the vocabulary fits, else `u32`), padding to eight bytes, the offset of every
//! document (`u64`, and the number of tokens after the last), a description in JSON, the length of the description
//! (`u64`) and eight bytes of signature; numbers are little-endian. Its name carries a key of everything that
//! decides its content: the files' contents, the tokenizer and the options. While it is made, eight bytes a document
//! are kept in memory, and a few pieces of text a thread.

use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use windlass_model::Tokenizer;
use windlass_store::atomic::{AtomicFile, RealDisk};
use windlass_store::mmap::{Mapped, Plain, bytes_of};

use super::read::{Corpus, Piece};
use crate::error::{Error, Result};

const SIGNATURE: &[u8; 8] = b"WLTOKENS";
const VERSION: u32 = 1;
/// Long documents are tokenized in pieces of this many bytes where the tokenizer allows it.
const PIECE: usize = 64 * 1024;
/// Bytes of text that a thread takes at a time.
const BATCH: usize = 256 * 1024;
/// Batches that wait for a thread, and results that wait for the writer, per thread.
const QUEUE: usize = 2;

/// How a corpus is tokenized.
#[derive(Clone, Debug)]
pub struct TokenizeOptions {
    /// The number of threads that tokenize.
    pub threads: usize,
    /// Whether each document begins with the tokenizer's begin-of-text token, if it has one.
    pub bos: bool,
    /// The folder of token files; it is created.
    pub folder: PathBuf,
}

/// How far tokenization has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the files done.
    pub bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Tokens written.
    pub tokens: u64,
}

/// A token file and where it came from.
#[derive(Debug)]
pub struct Tokenized {
    /// The tokens.
    pub file: TokenFile,
    /// Whether the file was there already, made of the same data.
    pub reused: bool,
}

/// The width of the ids in a token file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Width {
    /// Two bytes.
    U16,
    /// Four bytes.
    U32,
}

/// What a token file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The version of the format.
    pub version: u32,
    /// The content key: SHA-256 of data, tokenizer and options, in hexadecimal.
    pub key: String,
    /// The width of the ids.
    pub dtype: Width,
    /// The number of ids of the tokenizer: every id is smaller.
    pub vocab_size: usize,
    /// The number of tokens, with those that end (and begin) documents.
    pub tokens: u64,
    /// The number of documents.
    pub documents: u64,
    /// The number of documents left out because they were empty.
    pub skipped: u64,
    /// Bytes of text in the documents.
    pub text_bytes: u64,
    /// The id after each document.
    pub eos: u32,
    /// The id before each document.
    pub bos: Option<u32>,
}

/// An open token file: ids and document boundaries, mapped read-only.
#[derive(Debug)]
pub struct TokenFile {
    map: Mapped,
    description: Description,
    offsets: Range<usize>,
}

impl TokenFile {
    /// Opens a token file and checks its structure.
    ///
    /// # Errors
    /// [`Error::Store`] when it cannot be mapped, [`Error::TokenFile`] when it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        let damaged = |reason: &str| Error::TokenFile {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let bytes = map.bytes();
        let (rest, signature) = bytes
            .split_last_chunk::<8>()
            .ok_or_else(|| damaged("it is too short"))?;
        if signature != SIGNATURE {
            return Err(damaged("it does not end with the signature"));
        }
        let (rest, length) = rest
            .split_last_chunk::<8>()
            .ok_or_else(|| damaged("it is too short"))?;
        let length = u64::from_le_bytes(*length);
        let begin = (rest.len() as u64)
            .checked_sub(length)
            .ok_or_else(|| damaged("the description is longer than the file"))?
            as usize;
        let description: Description = serde_json::from_slice(&rest[begin..])
            .map_err(|error| damaged(&format!("the description cannot be read: {error}")))?;
        if description.version != VERSION {
            return Err(damaged(&format!(
                "it is of version {}",
                description.version
            )));
        }
        let width = match description.dtype {
            Width::U16 => 2,
            Width::U32 => 4,
        };
        let expected = description.tokens.checked_mul(width).and_then(|bytes| {
            let documents = description.documents.checked_add(1)?.checked_mul(8)?;
            bytes.checked_next_multiple_of(8)?.checked_add(documents)
        });
        if expected != Some(begin as u64) {
            return Err(damaged("its size is not that of its tokens and documents"));
        }
        let offsets = begin - 8 * (description.documents as usize + 1)..begin;
        let file = Self {
            map,
            description,
            offsets,
        };
        let ends = file.offsets();
        let ordered = ends.windows(2).all(|pair| pair[0] < pair[1]);
        if ends[0] != 0 || ends.last() != Some(&file.tokens()) || !ordered {
            return Err(damaged("its document boundaries are not in order"));
        }
        Ok(file)
    }

    /// What the file says about itself.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// The number of tokens.
    pub fn tokens(&self) -> u64 {
        self.description.tokens
    }

    /// Where each document begins, and the number of tokens: one more than there are documents.
    pub fn offsets(&self) -> &[u64] {
        self.view(self.offsets.clone())
    }

    /// Appends the ids of `range` to `ids`.
    ///
    /// # Panics
    /// When the range passes the end of the file.
    #[track_caller]
    pub fn read(&self, range: Range<u64>, ids: &mut Vec<u32>) {
        let (begin, end) = (range.start as usize, range.end as usize);
        assert!(
            range.end <= self.tokens(),
            "tokens {range:?} of a file of {}",
            self.tokens()
        );
        match self.description.dtype {
            Width::U16 => {
                let values: &[u16] = self.view(2 * begin..2 * end);
                ids.extend(values.iter().map(|&id| u32::from(id)));
            }
            Width::U32 => ids.extend_from_slice(self.view(4 * begin..4 * end)),
        }
    }

    fn view<T: Plain>(&self, bytes: Range<usize>) -> &[T] {
        let view = self.map.slice(bytes);
        view.expect("sizes were checked and the parts are aligned")
    }
}

/// Tokenizes a corpus into a file in `options.folder`, or finds the file that was made of the same data before.
///
/// Each document is followed by the tokenizer's first end-of-text id. The file appears whole or not at all, and its
/// content does not depend on the number of threads. `progress` is called from the calling thread.
///
/// # Errors
/// Those of reading the corpus; [`Error::NoEndToken`]; [`Error::Tokenizer`]; [`Error::Io`] and [`Error::Store`]
/// when the file cannot be written; [`Error::TokenFile`] when the file found is damaged.
pub fn tokenize(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    options: &TokenizeOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Tokenized> {
    let eos = *tokenizer.eos().first().ok_or(Error::NoEndToken)?;
    let bos = tokenizer.bos().filter(|_| options.bos);
    let key = key(corpus, tokenizer, eos, bos)?;
    let path = options.folder.join(format!("tokens-{}.bin", &key[..16]));
    if path.is_file() {
        let file = TokenFile::open(&path)?;
        if file.description.key == key {
            let reused = true;
            return Ok(Tokenized { file, reused });
        }
    }
    let create = std::fs::create_dir_all(&options.folder);
    create.map_err(|error| Error::io("create", &options.folder, error))?;
    let vocab_size = tokenizer.vocab_size();
    let narrow = vocab_size <= 1 << 16;
    let description = Description {
        version: VERSION,
        key,
        dtype: if narrow { Width::U16 } else { Width::U32 },
        vocab_size,
        tokens: 0,
        documents: 0,
        skipped: 0,
        text_bytes: 0,
        eos,
        bos,
    };
    let mut writer = Writer::create(&path, description)?;
    run(
        corpus,
        tokenizer,
        options.threads.max(1),
        &mut writer,
        progress,
    )?;
    writer.finish()?;
    let file = TokenFile::open(&path)?;
    let reused = false;
    Ok(Tokenized { file, reused })
}

/// Everything that decides the content of a token file.
fn key(corpus: &Corpus, tokenizer: &Tokenizer, eos: u32, bos: Option<u32>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(corpus.digest()?);
    hash.update(Sha256::digest(tokenizer.definition()));
    hash.update(format!("{VERSION} {eos} {bos:?}"));
    let bytes = hash.finalize();
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Text on its way to a thread.
struct Batch {
    pieces: Vec<Piece>,
    bytes_read: u64,
    skipped: u64,
}

/// Ids on their way to the writer.
struct Encoded {
    ids: Vec<u32>,
    /// The places in `ids` behind which a document ends.
    ends: Vec<usize>,
    text_bytes: u64,
    bytes_read: u64,
    skipped: u64,
}

/// Reads, encodes on `threads` threads, and writes. Batch `i` goes through thread `i mod threads`, so that the writer
/// gets them in order without having to sort.
fn run(
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    threads: usize,
    writer: &mut Writer,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let (eos, bos) = (writer.description.eos, writer.description.bos);
    std::thread::scope(|scope| {
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for _ in 0..threads {
            let (input, batches) = sync_channel::<Result<Batch>>(QUEUE);
            let (results, output) = sync_channel(QUEUE);
            scope.spawn(move || encode_batches(tokenizer, eos, bos, &batches, &results));
            inputs.push(input);
            outputs.push(output);
        }
        let size = tokenizer.splittable().then_some(PIECE);
        scope.spawn(move || read_batches(corpus, size, &inputs));
        for output in outputs.iter().cycle() {
            let Ok(encoded) = output.recv() else { break };
            let encoded = encoded?;
            let bytes = encoded.bytes_read;
            writer.write(encoded)?;
            progress(Progress {
                bytes,
                total_bytes: corpus.bytes(),
                tokens: writer.description.tokens,
            });
        }
        Ok(())
    })
}

/// Hands the corpus to the threads in turn; ends early when one hangs up.
fn read_batches(corpus: &Corpus, size: Option<usize>, inputs: &[SyncSender<Result<Batch>>]) {
    let mut pieces = corpus.pieces(size);
    for input in inputs.iter().cycle() {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let mut failure = None;
        while bytes < BATCH {
            match pieces.next() {
                Some(Ok(piece)) => {
                    bytes += piece.text.len() + 1;
                    batch.push(piece);
                }
                Some(Err(error)) => {
                    failure = Some(error);
                    break;
                }
                None => break,
            }
        }
        let ended = batch.is_empty() && pieces.skipped() == 0;
        let result = match failure {
            Some(error) => Err(error),
            None if ended => return,
            None => Ok(Batch {
                pieces: batch,
                bytes_read: pieces.bytes_read(),
                skipped: pieces.take_skipped(),
            }),
        };
        let last = result.is_err();
        if input.send(result).is_err() || last {
            return;
        }
    }
}

/// Turns batches into ids until there are no more, or nobody wants them.
fn encode_batches(
    tokenizer: &Tokenizer,
    eos: u32,
    bos: Option<u32>,
    batches: &Receiver<Result<Batch>>,
    results: &SyncSender<Result<Encoded>>,
) {
    for batch in batches {
        let encoded = batch.and_then(|batch| encode(tokenizer, eos, bos, &batch));
        if results.send(encoded).is_err() {
            return;
        }
    }
}

fn encode(tokenizer: &Tokenizer, eos: u32, bos: Option<u32>, batch: &Batch) -> Result<Encoded> {
    let mut encoded = Encoded {
        ids: Vec::new(),
        ends: Vec::new(),
        text_bytes: 0,
        bytes_read: batch.bytes_read,
        skipped: batch.skipped,
    };
    for piece in &batch.pieces {
        encoded.text_bytes += piece.text.len() as u64;
        if piece.first {
            encoded.ids.extend(bos);
        }
        encoded.ids.extend(tokenizer.encode(&piece.text, false)?);
        if piece.last {
            encoded.ids.push(eos);
            encoded.ends.push(encoded.ids.len());
        }
    }
    Ok(encoded)
}

/// The file being written.
struct Writer {
    file: BufWriter<AtomicFile<'static>>,
    path: PathBuf,
    description: Description,
    offsets: Vec<u64>,
}

impl Writer {
    fn create(path: &Path, description: Description) -> Result<Self> {
        let file = AtomicFile::create(&RealDisk, path)?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, file),
            path: path.to_owned(),
            description,
            offsets: vec![0],
        })
    }

    fn write(&mut self, encoded: Encoded) -> Result<()> {
        let written = self.description.tokens;
        let ends = encoded.ends.iter().map(|&end| written + end as u64);
        self.offsets.extend(ends);
        self.description.tokens += encoded.ids.len() as u64;
        self.description.documents += encoded.ends.len() as u64;
        self.description.skipped += encoded.skipped;
        self.description.text_bytes += encoded.text_bytes;
        let outcome = match self.description.dtype {
            Width::U16 => {
                let narrow: Vec<u16> = encoded.ids.iter().map(|&id| id as u16).collect();
                self.file.write_all(bytes_of(&narrow))
            }
            Width::U32 => self.file.write_all(bytes_of(&encoded.ids)),
        };
        outcome.map_err(|error| Error::io("write", &self.path, error))
    }

    fn finish(mut self) -> Result<()> {
        let fail = |error| Error::io("write", &self.path, error);
        let width = match self.description.dtype {
            Width::U16 => 2,
            Width::U32 => 4,
        };
        let bytes = self.description.tokens * width;
        let padding = bytes.next_multiple_of(8) - bytes;
        let description = serde_json::to_vec(&self.description).expect("a plain structure");
        let length = (description.len() as u64).to_le_bytes();
        let zeros = &[0; 8][..padding as usize];
        for part in [
            zeros,
            bytes_of(&self.offsets),
            &description,
            &length,
            SIGNATURE,
        ] {
            self.file.write_all(part).map_err(fail)?;
        }
        let file = self.file.into_inner();
        let file = file.map_err(|error| Error::io("write", &self.path, error.into_error()))?;
        Ok(file.commit()?)
    }
}
