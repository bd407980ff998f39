//! What can go wrong in generation through the user's files and choices, or the model's output.

use std::path::PathBuf;
use windlass_model::{ModelError, TokenizerError};

/// An error of this crate; the message names the flag, file or token at fault.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// A sampling or stop setting lies outside its range.
    #[error("--{flag} {value}: must be {rule}")]
    Setting {
        /// The command line's name of the setting, without dashes.
        flag: &'static str,
        /// The value that was given.
        value: String,
        /// The range, as the end of the sentence "must be …".
        rule: &'static str,
        /// What to give instead.
        hint: &'static str,
    },
    /// A logit is NaN or +∞: no distribution exists.
    #[error("the model gave the logit {value} to token {token}")]
    BadLogit {
        /// The token id.
        token: u32,
        /// NaN or +∞.
        value: f32,
    },
    /// Every logit is −∞: no token is allowed.
    #[error("no token can be chosen: all {vocabulary} logits are -inf")]
    NoToken {
        /// The number of logits.
        vocabulary: usize,
    },
    /// A path that leads to no model.
    #[error("{}: {problem}", path.display())]
    NoModel {
        /// The path given.
        path: PathBuf,
        /// What is there instead.
        problem: String,
        /// What to give instead.
        hint: String,
    },
    /// The file has biases, or scales of whole matrices, that the configuration does not know: the model would compute
    /// something else.
    #[error("{}: the configuration asks for no bias or scale where the file has one: {}", path.display(), names.join(", "))]
    UnknownBias {
        /// The folder.
        path: PathBuf,
        /// Some of the tensors' names.
        names: Vec<String>,
    },
    /// More tokens than the model has positions for.
    #[error(
        "{what} has {tokens} tokens, but the context of the model (max_position_embeddings) is {context}"
    )]
    TooLong {
        /// What is too long: "the prompt".
        what: String,
        /// Its tokens.
        tokens: usize,
        /// The model's positions.
        context: usize,
    },
    /// An id that the model has no embedding for.
    #[error("token {id}: the vocabulary of the model (vocab_size) is {vocabulary}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The number of rows of the embedding.
        vocabulary: usize,
    },
    /// There is nothing to continue or to score.
    #[error("{what} is empty")]
    Empty {
        /// What is: "the prompt".
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A line of a file of questions that is not one.
    #[error("{file}: line {line}: {problem}")]
    Question {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A tensor whose weights cannot be stored or read as asked.
    #[error("tensor {tensor}: {problem}")]
    Unfit {
        /// Its name in the GGUF file.
        tensor: String,
        /// Why not.
        problem: String,
    },
    /// The model has another vocabulary than the one it is compared with.
    #[error("the vocabulary of the model is {found}, that of the saved logits {expected}")]
    OtherVocabulary {
        /// Tokens of the model.
        found: usize,
        /// Tokens of the reference.
        expected: usize,
    },
    /// More tokens than there are keys and values for.
    #[error(
        "the request may come to {tokens} tokens, but there is key-value memory for {capacity}"
    )]
    NoRoom {
        /// The most tokens it may have computed.
        tokens: usize,
        /// The tokens that all blocks hold.
        capacity: usize,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests are waiting already")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// An adapter that cannot be used.
    #[error("adapter {}: {problem}", path.display())]
    Adapter {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// The model's description.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The weights.
    #[error(transparent)]
    Store(#[from] windlass_store::Error),
}

impl InferError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Setting { hint, .. } | Self::Empty { hint, .. } => hint,
            Self::BadLogit { .. } => {
                "the weights are damaged or the training has diverged: try an earlier checkpoint"
            }
            Self::NoToken { .. } => return None,
            Self::NoModel { hint, .. } | Self::Adapter { hint, .. } => hint.as_str(),
            Self::UnknownBias { .. } => {
                "check that config.json and the weights belong together (attention_bias, mlp_bias)"
            }
            Self::TooLong { .. } => "shorten it, or use a model with a longer context",
            Self::UnknownToken { .. } => "use the tokenizer that belongs to the model",
            Self::Question { .. } => {
                "each line is an object such as {\"question\": \"1 + 1 =\", \"choices\": [\"2\", \"3\"], \"answer\": 0}"
            }
            Self::OtherVocabulary { .. } => {
                "compare with the logits of the model that this one was made from (--save-logits)"
            }
            Self::Unfit { .. } => {
                "choose another --type; weights that are not finite are damage: fetch the model again"
            }
            Self::NoRoom { .. } => "ask for fewer tokens, or give the engine more blocks",
            Self::Busy { .. } => "try again later, or allow a longer queue with --max-queue",
            Self::Model(error) => return error.hint(),
            Self::Tokenizer(error) => return error.hint(),
            Self::Store(error) => return error.hint(),
        };
        Some(text.to_owned())
    }
}
