//! What can go wrong in training, each with a message that names the place and, where there is one, a hint.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;
use windlass_model::TokenizerError;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Where in a data file something is: counted from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of a text file.
    Line(u64),
    /// A row of a table or an element of an array.
    Row(u64),
    /// The file as a whole.
    File,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(out, ", line {line}"),
            Self::Row(row) => write!(out, ", row {row}"),
            Self::File => Ok(()),
        }
    }
}

/// What can go wrong in training.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "read", "write", "open".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is of no format that can be read.
    #[error("{} is not a data file that can be read", .0.display())]
    UnknownFormat(PathBuf),
    /// There is no document to learn from.
    #[error("the data is empty: no document in {places}")]
    EmptyCorpus {
        /// The files and folders that were searched.
        places: String,
    },
    /// A text is not UTF-8.
    #[error("{} is not UTF-8: the byte at offset {offset} does not belong to a character", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Bytes before the first wrong one.
        offset: u64,
    },
    /// A file is not what its ending promises.
    #[error("{}{place}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// The parser's reason.
        reason: String,
    },
    /// A record has no text under the name of the field.
    #[error("{}{place} has no field `{field}`", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// The field that was asked for.
        field: String,
        /// The fields that exist.
        present: Vec<String>,
    },
    /// A field is there, but it is not a text.
    #[error("{}{place}: field `{field}` is {found}, not a text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// The field that was asked for.
        field: String,
        /// What it holds.
        found: String,
    },
    /// The tokenizer failed or does not fit.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A model's configuration cannot be used.
    #[error(transparent)]
    Model(#[from] windlass_model::ModelError),
    /// Files could not be mapped or saved.
    #[error(transparent)]
    Store(#[from] windlass_store::Error),
    /// The tokenizer does not say which token ends a text.
    #[error("the tokenizer declares no end-of-text token")]
    NoEndToken,
    /// A token file is damaged or of another version.
    #[error("{} is not a usable token file: {reason}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A part of the data is shorter than one sequence.
    #[error("the {part} data has {tokens} tokens, but one sequence needs {needed}")]
    TooFewTokens {
        /// "training" or "held-out".
        part: &'static str,
        /// The tokens there are.
        tokens: u64,
        /// The tokens of one sequence and its last target.
        needed: u64,
    },
    /// A run cannot be resumed because something changed since it was saved.
    #[error("cannot resume: {what} was {saved} and is {now}")]
    Changed {
        /// What changed.
        what: &'static str,
        /// Its value when the run was saved.
        saved: String,
        /// Its value now.
        now: String,
    },
    /// A sequence does not fit the model.
    #[error("sequences of {asked} tokens against a context of {context}")]
    ContextTooShort {
        /// Tokens of a sequence.
        asked: usize,
        /// `max_position_embeddings` of the model.
        context: usize,
    },
    /// The loss or its gradient is not a number; nothing was updated.
    #[error("the {what} of step {step} is {value}{}", match checkpoint {
        Some(path) => format!("; the last good checkpoint is {}", path.display()),
        None => "; there is no checkpoint yet".into(),
    })]
    NonFinite {
        /// The step that was refused.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// The value.
        value: f64,
        /// The last checkpoint.
        checkpoint: Option<PathBuf>,
    },
    /// Another rank failed in something that all do together.
    #[error("rank {rank} could not {what}: {message}")]
    Peer {
        /// The rank.
        rank: usize,
        /// What was done.
        what: &'static str,
        /// Its message.
        message: String,
    },
    /// Gradients cannot be left on the ranks.
    #[error(
        "no_sync in stage {stage}: each rank keeps only a part of the gradients, so every backward pass reduces them"
    )]
    NoSync {
        /// The stage of ZeRO.
        stage: u8,
    },
    /// A file that is no table.
    #[error("{} is no table that can be read", .0.display())]
    NoTable(PathBuf),
    /// Columns that say nothing about what a row is.
    #[error("{at}: the columns {} are of no known form", columns.join(", "))]
    UnknownForm {
        /// Where.
        at: String,
        /// The columns.
        columns: Vec<String>,
    },
    /// Rows of different forms.
    #[error("the data are of several forms: {first}, {other}")]
    MixedForms {
        /// The first row and its form.
        first: String,
        /// A row of another form.
        other: String,
    },
    /// Samples that teach nothing.
    #[error(
        "{count} of {total} samples have nothing to be learned in their first {most} tokens; the first is {first}"
    )]
    NothingLearned {
        /// How many.
        count: usize,
        /// Of how many.
        total: usize,
        /// The first of them.
        first: String,
        /// The tokens that a sample may have.
        most: usize,
    },
    /// A sample that is too long.
    #[error("{at} has {tokens} tokens, and at most {most} are taken")]
    SampleTooLong {
        /// Where.
        at: String,
        /// Its tokens.
        tokens: usize,
        /// The most that are taken.
        most: usize,
    },
    /// Messages, and no template to render them with.
    #[error("the data are conversations, and the model has no chat template")]
    NoTemplate,
    /// Only the assistant's words are to be learned, and the template does not mark them.
    #[error(
        "the chat template does not mark what the assistant says: it has no {{% generation %}} block"
    )]
    NoMarks,
    /// A conversation that the template does not take.
    #[error("{at}: {source}")]
    Chat {
        /// Where.
        at: String,
        /// The template's reason.
        source: windlass_model::ChatError,
    },
    /// A configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] crate::config::Invalid),
    /// A setting is outside its range.
    #[error("{setting} is {value}, but must be {range}")]
    Setting {
        /// The name of the setting.
        setting: &'static str,
        /// The value given.
        value: String,
        /// The values allowed.
        range: &'static str,
    },
}

impl Error {
    /// An [`Error::Io`].
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// What the user can do about samples.
    fn hint_about_samples(&self) -> Option<String> {
        let hint: String = match self {
            Self::Malformed { .. } => "mend it there, or take it out of the data".into(),
            Self::NoTable(_) => {
                "tables are .jsonl, .json (an array), .csv and .parquet".into()
            }
            Self::UnknownForm { .. } => {
                "known columns: text; prompt, completion (and label); messages (and tools, label); chosen, rejected; \
                 instruction, input, output; conversations"
                    .into()
            }
            Self::MixedForms { .. } => "give data of one form: the same columns in all rows".into(),
            Self::NothingLearned { .. } => {
                "remove these samples, or give more room with --max-length, or leave long ones out with --long drop".into()
            }
            Self::SampleTooLong { .. } => {
                "give more room with --max-length, or cut or leave out long samples with --long cut or --long drop".into()
            }
            Self::NoTemplate => "give one with --template FILE, or --template plain".into(),
            Self::NoMarks => {
                "put {% generation %} … {% endgeneration %} around the answers in a copy of it and give that with --template, \
                 or learn something else with --learn completion"
                    .into()
            }
            Self::Chat { source, .. } => return source.hint(),
            _ => return None,
        };
        Some(hint)
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Tokenizer(error) => return error.hint(),
            Self::Store(error) => return error.hint(),
            Self::Model(error) => return error.hint(),
            Self::Config(invalid) => return invalid.hint(),
            Self::UnknownFormat(_) => {
                "data files are .txt, .jsonl, .json (an array) and .parquet; rename plain text to .txt".into()
            }
            Self::EmptyCorpus { .. } => {
                "give files with text, or a folder that holds .txt, .jsonl, .json or .parquet files".into()
            }
            Self::NotUtf8 { path, .. } => format!(
                "convert it first: iconv -f LATIN1 -t UTF-8 {0} > {0}.utf8.txt",
                path.display()
            ),
            Self::MissingField { present, .. } if present.is_empty() => {
                "each record must be an object with the field, or a plain string".into()
            }
            Self::MissingField { present, .. } => {
                format!("choose one with --field: it has {}", present.join(", "))
            }
            Self::NotText { .. } => "choose a field that holds text with --field".into(),
            Self::Malformed { path, .. } if path.extension().is_some_and(|end| end == "json") => {
                "a .json file holds one array; a file with one object a line is called .jsonl".into()
            }
            Self::Malformed { .. }
            | Self::NoTable(_)
            | Self::UnknownForm { .. }
            | Self::MixedForms { .. }
            | Self::NothingLearned { .. }
            | Self::SampleTooLong { .. }
            | Self::NoTemplate
            | Self::NoMarks
            | Self::Chat { .. } => return self.hint_about_samples(),
            Self::NoEndToken => {
                "put a tokenizer_config.json with \"eos_token\" beside the tokenizer.json".into()
            }
            Self::TokenFile { path, .. } => {
                format!("delete {}; it is made again from the data", path.display())
            }
            Self::TooFewTokens { part: "training", .. } => {
                "give more text, or make the sequences shorter with --seq-len".into()
            }
            Self::TooFewTokens { .. } => "hold out a larger fraction, or give more text".into(),
            Self::Changed { .. } => {
                "resume with the same data and settings, or start a new run in another folder".into()
            }
            Self::ContextTooShort { context, .. } => {
                format!("ask for sequences of at most {context} tokens, or for a model with a longer context")
            }
            Self::NonFinite { .. } => {
                "lower the learning rate, lengthen the warm-up or train in f32; resume from the last checkpoint".into()
            }
            Self::NoSync { .. } => "use stage 0 or 1, or leave no_sync out".into(),
            Self::Io { .. } | Self::Setting { .. } | Self::Peer { .. } => {
                return None;
            }
        };
        Some(hint)
    }
}
