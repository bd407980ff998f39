//! The transfer of one model's files from the hub into the cache.

use std::path::{Component, Path, PathBuf};

use hf_hub::Cache;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};

use super::{
    COMPANIONS, CONFIG, Event, Hub, HubError, INDEX, ModelId, WEIGHTS, is_safe_name, shards,
};

/// One model on its way into the cache.
pub(super) struct Fetch<'a> {
    hub: &'a Hub,
    id: &'a ModelId,
    api: Api,
}

impl<'a> Fetch<'a> {
    pub(super) fn new(hub: &'a Hub, id: &'a ModelId) -> Result<Self, HubError> {
        let api = ApiBuilder::from_cache(Cache::new(hub.cache.clone()))
            .with_endpoint(hub.endpoint.clone())
            .with_token(hub.token.clone())
            .with_retries(hub.retries)
            .with_user_agent("windlass", env!("CARGO_PKG_VERSION"))
            .with_progress(false)
            .build();
        let fetch = |api| Self { hub, id, api };
        api.map(fetch).map_err(|error| HubError::Unreachable {
            id: id.to_string(),
            endpoint: hub.endpoint.clone(),
            reason: error.to_string(),
        })
    }

    /// Fetches what is missing of one commit and names the commit in `refs` once it is complete.
    pub(super) fn run(&self, progress: &mut dyn FnMut(Event<'_>)) -> Result<PathBuf, HubError> {
        let branch = self.id.repo(&self.id.revision);
        let info = self.api.repo(branch.clone()).info();
        let info = info.map_err(|error| self.explain(error, None))?;
        if !is_safe_name(&info.sha) {
            return Err(self.answer("the model", format!("commit {:?}", info.sha)));
        }
        let commit = self.api.repo(self.id.repo(&info.sha));
        let snapshot = self.hub.cache.join(branch.folder_name());
        let snapshot = snapshot.join("snapshots").join(&info.sha);
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);

        let mut names = vec![CONFIG.to_owned()];
        names.extend(COMPANIONS.iter().filter(|n| has(n)).map(|n| n.to_string()));
        if has(WEIGHTS) {
            names.push(WEIGHTS.to_owned());
        } else if has(INDEX) {
            self.fetch(&commit, INDEX, &snapshot, progress)?;
            names.extend(shards(&snapshot.join(INDEX))?);
        } else {
            return Err(HubError::NoWeights {
                id: self.id.to_string(),
            });
        }
        for name in &names {
            self.fetch(&commit, name, &snapshot, progress)?;
        }
        let cache = Cache::new(self.hub.cache.clone()).repo(branch);
        let named = cache.create_ref(&info.sha);
        named.map_err(|error| self.explain(ApiError::IoError(error), Some("refs")))?;
        Ok(snapshot)
    }

    /// Fetches one file into the snapshot, unless it is there.
    fn fetch(
        &self,
        commit: &ApiRepo,
        name: &str,
        snapshot: &Path,
        progress: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), HubError> {
        let pointer = snapshot.join(name);
        if pointer.exists() {
            return Ok(());
        }
        // A link whose blob was deleted would make the download fail at its last step.
        std::fs::remove_file(&pointer).ok();
        let explain = |error| self.explain(error, Some(name));
        let metadata = self.api.metadata(&commit.url(name)).map_err(explain)?;
        let mut components = Path::new(metadata.etag()).components();
        if !components.all(|part| matches!(part, Component::Normal(_))) {
            return Err(self.answer(name, format!("etag {:?}", metadata.etag())));
        }
        let size = metadata.size() as u64;
        let blob = Cache::new(self.hub.cache.clone())
            .repo(self.id.repo(&self.id.revision))
            .blob_path(metadata.etag());
        // Nothing is left to ask for after a complete part whose renaming was interrupted.
        let part = blob.with_extension("part");
        if part.metadata().is_ok_and(|found| found.len() >= size) {
            std::fs::remove_file(&part).ok();
        }
        let report = Report {
            file: name,
            done: 0,
            total: size,
            progress,
        };
        let fetched = commit.download_with_progress(name, report);
        let fetched = fetched.map_err(explain)?;
        if fetched != pointer {
            let reason = format!("commit {} was asked for", snapshot.display());
            return Err(self.answer(name, reason));
        }
        let found = pointer.metadata().map_or(0, |found| found.len());
        if found != size {
            std::fs::remove_file(&pointer).ok();
            std::fs::remove_file(&blob).ok();
            let reason = format!("{found} of {size} bytes arrived");
            let short = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason);
            return Err(explain(ApiError::IoError(short)));
        }
        progress(Event::Finished { file: name });
        Ok(())
    }

    fn answer(&self, what: &str, reason: String) -> HubError {
        HubError::Answer {
            id: self.id.to_string(),
            endpoint: self.hub.endpoint.clone(),
            what: what.to_owned(),
            reason,
        }
    }

    /// What a failure of `hf-hub` means to the user; `file` is none when the model itself was asked for.
    fn explain(&self, error: ApiError, file: Option<&str>) -> HubError {
        let id = self.id.to_string();
        let endpoint = self.hub.endpoint.clone();
        let what = file.unwrap_or("model or revision").to_owned();
        match error {
            ApiError::TooManyRetries(last) => self.explain(*last, file),
            ApiError::IoError(source) => HubError::Transfer {
                id,
                file: what,
                cache: self.hub.cache.clone(),
                source,
            },
            ApiError::LockAcquisition(_) => HubError::Busy { id, file: what },
            ApiError::RequestError(request) => match *request {
                ureq::Error::StatusCode(status @ (401 | 403)) => HubError::Denied {
                    id,
                    endpoint,
                    status,
                    with_token: self.hub.token.is_some(),
                },
                ureq::Error::StatusCode(404) => HubError::NotFound { id, endpoint, what },
                ureq::Error::StatusCode(status) if status < 500 => {
                    self.answer(&what, format!("HTTP {status}"))
                }
                ureq::Error::Json(reason) => self.answer(&what, reason.to_string()),
                other => HubError::Unreachable {
                    id,
                    endpoint,
                    reason: other.to_string(),
                },
            },
            other => self.answer(&what, other.to_string()),
        }
    }
}

/// Turns the increments of `hf-hub` into totals.
struct Report<'a> {
    file: &'a str,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Event<'_>),
}

impl hf_hub::api::Progress for Report<'_> {
    /// Called again at each attempt, followed by an update with what an earlier one has left.
    fn init(&mut self, size: usize, _filename: &str) {
        self.done = 0;
        self.total = size as u64;
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.progress)(Event::Received {
            file: self.file,
            done: self.done,
            total: self.total,
        });
    }

    fn finish(&mut self) {}
}
