//! Models by name: a local path stays what it is, an id such as `org/name@revision` is fetched from the
//! Hugging Face hub into its standard cache, which other tools share.
//!
//! `hf-hub` speaks the protocol and writes the cache. Added around it are offline work, one commit for all
//! files of a model, checks that a snapshot is complete, and messages that say what to do. Only safetensors
//! weights are fetched. The module does not read what it fetches, except the index of the shards.

mod error;
mod fetch;

use std::path::{Path, PathBuf};

use hf_hub::{Repo, RepoType};

use crate::progress::Progress;
use fetch::Fetch;

pub use error::HubError;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The small files that are fetched where a repository has them.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// What happens while a model is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes of a file have arrived.
    Received {
        /// The file's name.
        file: &'a str,
        /// Bytes so far, those of an earlier attempt included.
        done: u64,
        /// Bytes of the whole file.
        total: u64,
    },
    /// A file is complete.
    Finished {
        /// The file's name.
        file: &'a str,
    },
    /// Something the user should know.
    Note(String),
}

/// A hub, a cache and how to use them.
#[derive(Debug, Clone)]
pub struct Hub {
    /// The folder of `models--org--name` folders.
    pub cache: PathBuf,
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// The access token.
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// How often a broken transfer is continued before giving up.
    pub retries: usize,
}

/// The folder of a model: an existing path itself, or a hub id fetched as the environment says, with progress
/// on stderr.
///
/// # Errors
/// [`HubError`]; see [`Hub::resolve`].
pub fn resolve(model: &str) -> Result<PathBuf, HubError> {
    if Path::new(model).exists() {
        return Ok(PathBuf::from(model));
    }
    let mut shown: Option<(String, Progress)> = None;
    Hub::from_env()?.resolve(model, &mut |event| match event {
        Event::Received { file, done, total } => {
            if shown.as_ref().is_none_or(|(name, _)| name != file) {
                shown = Some((file.to_owned(), Progress::new(total, file)));
            }
            if let Some((_, bar)) = &mut shown {
                let (so_far, all) = (done as f64 / 1e6, total as f64 / 1e6);
                bar.set(done, &format!("{so_far:.1} of {all:.1} MB"));
            }
        }
        Event::Finished { .. } => {
            if let Some((_, bar)) = shown.take() {
                bar.finish("fetched");
            }
        }
        Event::Note(text) => eprintln!("note: {text}"),
    })
}

impl Hub {
    /// The hub of the environment: `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH` and the token file.
    ///
    /// # Errors
    /// [`HubError::NoHome`].
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_lookup(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    /// As [`Hub::from_env`], with the environment as an argument.
    ///
    /// # Errors
    /// [`HubError::NoHome`] when neither `home` nor a variable names a place for the cache.
    ///
    /// # Source
    /// huggingface_hub, "Environment variables".
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<String>,
        home: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let get = |name: &str| {
            let value = lookup(name)?;
            let value = value.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let expand = |path: String| match (path.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(path),
        };
        let path = |name: &str| get(name).map(expand);
        let hf_home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(home.as_ref()?.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(hf_home.as_ref()?.join("token")));
        let file_token = || {
            let text = std::fs::read_to_string(token_file?).ok()?;
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        };
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let offline = get("HF_HUB_OFFLINE").map(|value| value.to_uppercase());
        Ok(Self {
            cache: cache.ok_or(HubError::NoHome)?,
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: get("HF_TOKEN").or_else(file_token),
            offline: matches!(offline.as_deref(), Some("1" | "ON" | "YES" | "TRUE")),
            retries: 3,
        })
    }

    /// The folder of a model: an existing path itself, or the snapshot of a hub id in the cache, fetched as
    /// far as it is missing. `progress` is told what happens.
    ///
    /// A snapshot is one commit. When the hub cannot be reached, a complete cached snapshot is used and a
    /// note says so.
    ///
    /// # Errors
    /// [`HubError`] names the model and has a hint.
    pub fn resolve(
        &self,
        model: &str,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<PathBuf, HubError> {
        if Path::new(model).exists() {
            return Ok(PathBuf::from(model));
        }
        let id = ModelId::parse(model).ok_or_else(|| HubError::NoSuchModel {
            model: model.to_owned(),
        })?;
        if self.offline {
            let Some(snapshot) = self.cached(&id) else {
                return Err(self.not_cached(&id, "the model".to_owned()));
            };
            let missing = missing_files(&snapshot)?;
            if missing.is_empty() {
                return Ok(snapshot);
            }
            return Err(self.not_cached(&id, missing.join(", ")));
        }
        let fetch = Fetch::new(self, &id)?;
        match fetch.run(progress) {
            Err(HubError::Unreachable { reason, .. }) if self.has_complete(&id) => {
                let snapshot = self.cached(&id).unwrap_or_default();
                let endpoint = &self.endpoint;
                progress(Event::Note(format!(
                    "cannot reach {endpoint} ({reason}): using the cached {}",
                    snapshot.display()
                )));
                Ok(snapshot)
            }
            other => other,
        }
    }

    /// The snapshot that the cache has for an id, complete or not.
    fn cached(&self, id: &ModelId) -> Option<PathBuf> {
        let folder = self.cache.join(id.repo(&id.revision).folder_name());
        let by_commit = folder.join("snapshots").join(&id.revision);
        if by_commit.is_dir() {
            return Some(by_commit);
        }
        let commit = std::fs::read_to_string(folder.join("refs").join(&id.revision)).ok()?;
        let snapshot = folder.join("snapshots").join(commit.trim());
        (is_safe_name(commit.trim()) && snapshot.is_dir()).then_some(snapshot)
    }

    fn has_complete(&self, id: &ModelId) -> bool {
        let missing = self.cached(id).map(|snapshot| missing_files(&snapshot));
        matches!(missing, Some(Ok(names)) if names.is_empty())
    }

    fn not_cached(&self, id: &ModelId, missing: String) -> HubError {
        HubError::NotCached {
            id: id.to_string(),
            cache: self.cache.clone(),
            missing,
        }
    }
}

/// An id of the form `org/name[@revision]`, safe to use in paths and addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelId {
    name: String,
    revision: String,
}

impl ModelId {
    fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, model) = name.split_once('/')?;
        let revision_is_safe = revision.split('/').all(is_safe_name);
        (is_safe_name(org) && is_safe_name(model) && revision_is_safe).then(|| Self {
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, revision.to_owned())
    }
}

impl std::fmt::Display for ModelId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

/// Whether a text is one plain component of a path.
fn is_safe_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

/// The files that a snapshot lacks to be loaded.
fn missing_files(snapshot: &Path) -> Result<Vec<String>, HubError> {
    let mut needed = vec![CONFIG.to_owned()];
    if !snapshot.join(WEIGHTS).exists() && snapshot.join(INDEX).exists() {
        needed.extend(shards(&snapshot.join(INDEX))?);
    } else {
        needed.push(WEIGHTS.to_owned());
    }
    needed.retain(|name| !snapshot.join(name).exists());
    Ok(needed)
}

/// The shard files named by an index, sorted, each once.
fn shards(path: &Path) -> Result<Vec<String>, HubError> {
    let bad = |reason: String| HubError::BadIndex {
        path: path.to_owned(),
        reason,
    };
    let text = std::fs::read(path).map_err(|error| bad(error.to_string()))?;
    let index: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let map = index["weight_map"].as_object();
    let map = map.ok_or_else(|| bad("weight_map is missing".to_owned()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(name) if is_safe_name(name) => names.push(name.to_owned()),
            _ => return Err(bad(format!("weight_map of {tensor} names {file}"))),
        }
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}
