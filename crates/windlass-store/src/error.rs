//! What can go wrong between a file and its reader, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed read or write of parameters at rest. The message names the file; [`Error::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as an infinitive: "read", "rename".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The content breaks its format: damaged, cut short, or another kind of file.
    #[error("{}: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        problem: String,
    },
    /// A well-formed file, or a folder, that this program does not read.
    #[error("{}: {problem}", path.display())]
    Unsupported {
        /// The file or folder.
        path: PathBuf,
        /// What it is.
        problem: String,
        /// What to do instead.
        hint: String,
    },
    /// A tensor is not in the file.
    #[error("{}: no tensor named '{name}'", path.display())]
    MissingTensor {
        /// The file or folder that was searched.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// The existing name with the smallest edit distance, if any is near.
        nearest: Option<String>,
    },
    /// A tensor is there, but with another shape or type than asked for.
    #[error("{}: tensor '{name}' is {found}, expected {expected}", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What the caller needs.
        expected: String,
        /// What the file has.
        found: String,
    },
    /// A metadata key that is needed is not in the file.
    #[error("{}: no metadata key '{key}'", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key asked for.
        key: String,
    },
    /// A metadata key has a value of another kind than its readers expect.
    #[error("{}: metadata key '{key}' is {found}, expected {expected}", path.display())]
    KeyKind {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What its readers expect.
        expected: &'static str,
        /// What the file has.
        found: String,
    },
    /// The ranks could not work together.
    #[error(transparent)]
    Comm(#[from] windlass_comm::Error),
    /// A checkpoint cannot be called so.
    #[error("'{0}' is not a name for a checkpoint")]
    NotAName(String),
    /// The checkpoint that a run would continue from already exists under this step.
    #[error("{} already holds a complete checkpoint", path.display())]
    CheckpointExists {
        /// The checkpoint's folder.
        path: PathBuf,
    },
}

impl Error {
    /// What the user can do, where something can be said beyond the message.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Io { action, source, .. } => return io_hint(action, source),
            Error::Comm(error) => return error.hint(),
            Error::Corrupt { .. } => {
                "the file is damaged or incomplete: compare its size and checksum with the source and fetch it again; if this machine wrote it, look at the disk's health (dmesg, smartctl)"
            }
            Error::Unsupported { hint, .. } => hint,
            Error::MissingTensor {
                nearest: Some(near),
                ..
            } => return Some(format!("did you mean '{near}'?")),
            Error::MissingTensor { nearest: None, .. } => {
                "the file holds another model: check that config.json and the weights belong together"
            }
            Error::MissingKey { .. } | Error::KeyKind { .. } => {
                "the file was written by another convention, or is incomplete: look at it with `windlass inspect`, and convert the model anew"
            }
            Error::Mismatch { .. } => "check that config.json and the weights belong together",
            Error::NotAName(_) => "it becomes a folder: no '/', no dot in front, and not 'latest'",
            Error::CheckpointExists { .. } => {
                "a resumed run continues after it: train further, or save elsewhere"
            }
        };
        Some(text.to_owned())
    }

    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn corrupt(path: &Path, problem: impl Into<String>) -> Self {
        Error::Corrupt {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }
}

/// `EIO`, which has no [`io::ErrorKind`].
const UNREADABLE: i32 = 5;

fn io_hint(action: &str, source: &io::Error) -> Option<String> {
    if source.raw_os_error() == Some(UNREADABLE) {
        let text = "the disk failed: look at its health (dmesg, smartctl) and use another one";
        return Some(text.to_owned());
    }
    let text = match source.kind() {
        io::ErrorKind::NotFound => "check the spelling of the path",
        io::ErrorKind::PermissionDenied => "check the permissions of the file and its folder",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free disk space, or write to another disk; what was there before is untouched"
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "write to another folder: this one is mounted read-only"
        }
        io::ErrorKind::AlreadyExists if action == "create" => "remove it, or choose another name",
        _ => return None,
    };
    Some(text.to_owned())
}
