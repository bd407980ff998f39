//! Checkpoints: folders that a killed run can continue from.
//!
//! ```text
//! DIR/step-00000100/…              safetensors files and JSON, whatever the caller puts there
//! DIR/step-00000100/manifest.json  the name, size and SHA-256 of each, written last
//! DIR/latest                       the name of the folder to continue from
//! ```
//!
//! A checkpoint is written in a hidden folder, forced to the disk file by file, renamed to its final name, and only
//! then does `latest` (itself replaced by renaming) name it; old checkpoints are removed after that. So at every moment
//! there is a complete checkpoint, the old or the new one, whatever stops the machine. What a checkpoint means — which
//! tensors, which counters — is the caller's business.

mod folder;
mod held;
mod writer;

use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::atomic::{Disk, RealDisk, TEMP_SUFFIX, folder_of, sync_dir, write_atomic};
use crate::error::{Error, Result};

pub use folder::CheckpointDir;
pub use held::HELD_BLOCK;
pub use writer::Writer;

/// The file that names the checkpoint to continue from.
const LATEST: &str = "latest";

/// A folder of checkpoints.
#[derive(Clone)]
pub struct Checkpoints {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
}

/// What [`Checkpoints::latest`] found.
#[derive(Debug)]
pub struct Resume {
    /// The checkpoint to continue from, complete and verified.
    pub checkpoint: CheckpointDir,
    /// Why this is not the checkpoint that `latest` names; to be shown to the user.
    pub note: Option<String>,
}

impl Checkpoints {
    /// The checkpoints in `dir`, which need not exist yet.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self::on(Arc::new(RealDisk), dir)
    }

    /// As [`Checkpoints::open`], writing through another disk.
    pub fn on(disk: Arc<dyn Disk>, dir: impl Into<PathBuf>) -> Self {
        Checkpoints {
            disk,
            dir: dir.into(),
        }
    }

    /// The folder that holds the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The steps that have a checkpoint folder, complete or not, in increasing order.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = entries(&self.dir)?
            .iter()
            .filter_map(|name| step_of(name))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The folder of the checkpoint of a step, whether it is there or not.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(folder_name(step))
    }

    /// The checkpoint of one step; its files' presence and sizes are checked, not their content.
    ///
    /// # Errors
    /// As [`CheckpointDir::open`].
    pub fn get(&self, step: u64) -> Result<CheckpointDir> {
        CheckpointDir::open(&self.dir.join(folder_name(step)))
    }

    /// The checkpoint to continue from, every byte of it verified; `None` if nothing was ever saved here.
    ///
    /// It is the one that `latest` names. If that is missing or damaged it is the newest complete one, and
    /// [`Resume::note`] says so.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if there are checkpoints but none is complete: a run must not silently start over.
    pub fn latest(&self) -> Result<Option<Resume>> {
        let mut problems = Vec::new();
        let named = self
            .named_by_latest()
            .and_then(|step| step.map(|s| self.verified(s)).transpose());
        match named {
            Ok(Some(checkpoint)) => {
                return Ok(Some(Resume {
                    checkpoint,
                    note: None,
                }));
            }
            Ok(None) => problems.push(format!("{} is missing", self.dir.join(LATEST).display())),
            Err(error) => problems.push(error.to_string()),
        }
        let steps = self.steps()?;
        if steps.is_empty() && !self.dir.join(LATEST).exists() {
            return Ok(None);
        }
        for &step in steps.iter().rev() {
            match self.verified(step) {
                Ok(checkpoint) => {
                    let note = format!(
                        "{}; continuing from {}",
                        problems.join("; "),
                        folder_name(step)
                    );
                    return Ok(Some(Resume {
                        checkpoint,
                        note: Some(note),
                    }));
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        problems.dedup();
        Err(Error::corrupt(
            &self.dir,
            format!("no complete checkpoint: {}", problems.join("; ")),
        ))
    }

    /// Starts the checkpoint of `step`, after removing what killed runs left half-written.
    ///
    /// A folder of the same step is removed, unless it is the one that [`Checkpoints::latest`] gives.
    ///
    /// # Errors
    /// [`Error::CheckpointExists`] in that case; [`Error::Io`].
    pub fn begin(&self, step: u64) -> Result<Writer> {
        let disk = &*self.disk;
        disk.create_dir(&self.dir)
            .map_err(|e| Error::io("create", &self.dir, e))?;
        for name in entries(&self.dir)? {
            let path = self.dir.join(&name);
            if name.starts_with(".step-") && name.ends_with(TEMP_SUFFIX) {
                disk.remove_dir(&path)
                    .map_err(|e| Error::io("remove", &path, e))?;
            } else if name.starts_with(".latest.") && name.ends_with(TEMP_SUFFIX) {
                disk.remove_file(&path)
                    .map_err(|e| Error::io("remove", &path, e))?;
            }
        }
        let path = self.dir.join(folder_name(step));
        if path.exists() {
            if self
                .latest()
                .ok()
                .flatten()
                .is_some_and(|found| found.checkpoint.step() == step)
            {
                return Err(Error::CheckpointExists { path });
            }
            self.remove(step)?;
        }
        let temp = self.hidden(step);
        disk.create_dir(&temp)
            .map_err(|e| Error::io("create", &temp, e))?;
        Ok(Writer::new(self, step, temp))
    }

    /// Joins the checkpoint of `step` that another rank began, to write some of its files.
    pub fn join(&self, step: u64) -> Writer {
        Writer::joined(self, step, self.hidden(step))
    }

    fn verified(&self, step: u64) -> Result<CheckpointDir> {
        let checkpoint = self.get(step)?;
        checkpoint.verify()?;
        Ok(checkpoint)
    }

    /// The step that `latest` names; `None` if there is no such file.
    fn named_by_latest(&self) -> Result<Option<u64>> {
        let path = self.dir.join(LATEST);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &path, e)),
            Ok(text) => match std::str::from_utf8(&text)
                .ok()
                .and_then(|name| step_of(name.trim_end()))
            {
                Some(step) => Ok(Some(step)),
                None => Err(Error::corrupt(&path, "does not name a checkpoint")),
            },
        }
    }

    fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Gives a written folder its final name, for good.
    fn put_in_place(&self, step: u64, temp: &Path) -> Result<PathBuf> {
        let path = self.dir.join(folder_name(step));
        sync_dir(self.disk(), temp)?;
        self.disk
            .rename(temp, &path)
            .map_err(|e| Error::io("rename into", &path, e))?;
        sync_dir(self.disk(), &self.dir)?;
        sync_dir(self.disk(), folder_of(&self.dir))?;
        Ok(path)
    }

    /// Lets `latest` name a step that is in place, and removes what is then too old.
    fn name_latest(&self, step: u64, keep: Option<NonZeroUsize>) -> Result<()> {
        let name = format!("{}\n", folder_name(step));
        write_atomic(self.disk(), &self.dir.join(LATEST), name.as_bytes())?;
        match keep {
            Some(keep) => self.prune(keep, step),
            None => Ok(()),
        }
    }

    /// The hidden name under which a step is written, and removed.
    fn hidden(&self, step: u64) -> PathBuf {
        self.dir
            .join(format!(".{}{TEMP_SUFFIX}", folder_name(step)))
    }

    /// Removes a checkpoint so that it is gone at once, not file by file.
    fn remove(&self, step: u64) -> Result<()> {
        let (path, hidden) = (self.dir.join(folder_name(step)), self.hidden(step));
        self.disk
            .rename(&path, &hidden)
            .map_err(|e| Error::io("remove", &path, e))?;
        self.disk
            .remove_dir(&hidden)
            .map_err(|e| Error::io("remove", &hidden, e))
    }

    /// Removes the oldest checkpoints beyond `keep`, but not `newest`, which `latest` names.
    fn prune(&self, keep: NonZeroUsize, newest: u64) -> Result<()> {
        let steps = self.steps()?;
        let surplus = steps.len().saturating_sub(keep.get());
        for &step in steps.iter().filter(|&&step| step != newest).take(surplus) {
            self.remove(step)?;
        }
        Ok(())
    }
}

/// The folder of a step.
fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a folder's name; only the very name that [`folder_name`] gives counts.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}

/// Names in a folder; none if it does not exist.
fn entries(dir: &Path) -> Result<Vec<String>> {
    match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => listing
            .and_then(|dir| {
                dir.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                    .collect()
            })
            .map_err(|e| Error::io("read", dir, e)),
    }
}
