//! What can go wrong between a model's name and its folder.

use std::path::PathBuf;

use super::{INDEX, WEIGHTS};

/// Why a model could not be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Neither a path that exists nor an id.
    #[error("{model}: no such file or folder, and not a hub id of the form org/name[@revision]")]
    NoSuchModel {
        /// What the user gave.
        model: String,
    },
    /// No folder for the cache can be named.
    #[error("no home directory is known, so the model cache has no place")]
    NoHome,
    /// The hub refuses access.
    #[error("{id}: {endpoint} refuses access (HTTP {status}): private, gated, or no such model")]
    Denied {
        /// The model's id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The hub knows no such model, revision or file.
    #[error("{id}: {what} not found on {endpoint}, and there is no such local path")]
    NotFound {
        /// The model's id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// "model or revision", or a file name.
        what: String,
    },
    /// The hub cannot be reached or is out of order, and the cache cannot stand in.
    #[error("{id}: cannot reach {endpoint}: {reason}")]
    Unreachable {
        /// The model's id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// The failure of the connection.
        reason: String,
    },
    /// A transfer broke off, or the cache cannot be written.
    #[error("{id}: fetching {file} into {} failed: {source}", cache.display())]
    Transfer {
        /// The model's id.
        id: String,
        /// The file.
        file: String,
        /// The cache folder.
        cache: PathBuf,
        /// The failure.
        source: std::io::Error,
    },
    /// Another process holds the lock of a file.
    #[error("{id}: another process is fetching {file}")]
    Busy {
        /// The model's id.
        id: String,
        /// The file.
        file: String,
    },
    /// The hub's answer makes no sense.
    #[error("{id}: unexpected answer of {endpoint} for {what}: {reason}")]
    Answer {
        /// The model's id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// What was asked for.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The repository has no safetensors weights.
    #[error("{id}: the repository has neither {WEIGHTS} nor {INDEX}")]
    NoWeights {
        /// The model's id.
        id: String,
    },
    /// Offline, and the cache has nothing or only a part.
    #[error("{id}: offline (HF_HUB_OFFLINE), and {} lacks {missing}", cache.display())]
    NotCached {
        /// The model's id.
        id: String,
        /// The cache folder.
        cache: PathBuf,
        /// The files that are missing, or "the model".
        missing: String,
    },
    /// The index of the shards cannot be understood.
    #[error("{}: not an index of safetensors shards: {reason}", path.display())]
    BadIndex {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl HubError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NoSuchModel { .. } => {
                "give a model folder, a checkpoint, or an id such as HuggingFaceTB/SmolLM2-135M"
            }
            Self::NoHome => "set HF_HOME to a folder for downloaded models",
            Self::Denied {
                with_token: false, ..
            } => {
                "check the spelling; for a private or gated model set HF_TOKEN (or run `hf auth login`) \
                 after accepting its terms on the model's page"
            }
            Self::Denied { .. } => {
                "check the spelling; the token that was sent may be wrong, or its owner has not accepted \
                 the model's terms on its page"
            }
            Self::NotFound { .. } => "check the spelling of the path, the id and the revision",
            Self::Unreachable { .. } => {
                "check the network and HF_ENDPOINT, or give the path of a local model folder"
            }
            Self::Transfer { source, .. }
                if source.kind() == std::io::ErrorKind::StorageFull
                    || source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                "set HF_HOME to a folder with enough space that you may write to"
            }
            Self::Transfer { .. } => "run the command again: it continues where it stopped",
            Self::Busy { .. } => "wait for the other process to end, then run the command again",
            Self::Answer { .. } => "check HF_ENDPOINT: a proxy or mirror may be answering",
            Self::NoWeights { .. } => {
                "only safetensors weights are read; convert the model or choose another repository"
            }
            Self::NotCached { .. } => "unset HF_HUB_OFFLINE once, with a network, to fetch it",
            Self::BadIndex { .. } => "delete the file and fetch the model again",
        };
        Some(text.to_owned())
    }
}
