//! What can go wrong with a tokenizer, and what to do about it.

use std::path::PathBuf;

use thiserror::Error;

use super::TOKENIZER_FILE;

/// What can go wrong with a tokenizer.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// There is no tokenizer at the place given.
    #[error("no {TOKENIZER_FILE} in {}", folder.display())]
    Missing {
        /// The folder that was searched.
        folder: PathBuf,
    },
    /// A file of the tokenizer cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file of the tokenizer is not what it should be.
    #[error("{} is not valid: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The parser's reason.
        reason: String,
    },
    /// Encoding, decoding or training failed inside the `tokenizers` crate.
    #[error("the tokenizer cannot {action}: {reason}")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// The library's reason.
        reason: String,
    },
    /// The vocabulary of a GGUF file contradicts itself or lacks something.
    #[error("the vocabulary is not valid: {reason}")]
    Vocabulary {
        /// What is wrong; names the key.
        reason: String,
    },
    /// `tokenizer.ggml.model` names an algorithm that is not known here.
    #[error("tokenizer.ggml.model is {model:?}, which is not supported")]
    UnknownAlgorithm {
        /// The name in the file.
        model: String,
    },
    /// `tokenizer.ggml.pre` names word patterns that are not known here.
    #[error("tokenizer.ggml.pre is {pre:?}, which is not known")]
    UnknownPre {
        /// The name in the file.
        pre: String,
        /// All known names.
        known: Vec<&'static str>,
    },
    /// A tokenizer that a GGUF file cannot describe.
    #[error("the tokenizer cannot be written to GGUF: {reason}")]
    NotInGguf {
        /// What such a file has no place for.
        reason: String,
    },
    /// The tokenizer can produce ids that the model has no embedding for.
    #[error(
        "the tokenizer has {tokenizer} tokens, but the vocabulary of the model (vocab_size) is {model}"
    )]
    LargerThanModel {
        /// The number of ids of the tokenizer.
        tokenizer: usize,
        /// The number of rows of the model's embedding.
        model: usize,
    },
    /// The vocabulary size asked for cannot hold every byte and the special tokens.
    #[error("a byte-level vocabulary of {asked} tokens is too small: it needs at least {least}")]
    TooSmall {
        /// The size asked for.
        asked: usize,
        /// The smallest size possible.
        least: usize,
    },
}

impl TokenizerError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(
                "give a Hugging Face folder, or a tokenizer with --tokenizer path/to/tokenizer.json"
                    .into(),
            ),
            Self::Invalid { .. } => {
                Some("the file may be a truncated download; fetch it again".into())
            }
            Self::LargerThanModel { tokenizer, .. } => Some(format!(
                "use the tokenizer that belongs to the model, or a model with vocab_size of at least {tokenizer}"
            )),
            Self::TooSmall { least, .. } => Some(format!("ask for a vocabulary of {least} or more")),
            Self::Vocabulary { .. } => Some("the file may be damaged; fetch or convert it again".into()),
            Self::UnknownAlgorithm { .. } => {
                Some("supported are llama (SentencePiece), gpt2 (byte-level BPE), bert and t5".into())
            }
            Self::UnknownPre { known, .. } => Some(format!(
                "known are {}; or give the model's own tokenizer with --tokenizer path/to/tokenizer.json",
                known.join(", ")
            )),
            Self::NotInGguf { .. } => {
                Some("keep the model as a Hugging Face folder, which every verb reads as well".into())
            }
            Self::Io { .. } | Self::Failed { .. } => None,
        }
    }
}
