//! Checkpoints: folders that a killed run can continue from.
//!
//! ```text
//! DIR/step-00000100/…              safetensors files and JSON, whatever the caller puts there
//! DIR/step-00000100/manifest.json  the name, size and SHA-256 of each, written last
//! DIR/latest                       the name of the folder to continue from
//! ```
//!
//! A folder is called after its step, or by any other name that its writer gives it; a name may be used again.
//!
//! A checkpoint is written in a hidden folder, forced to the disk file by file, renamed to its final name, and only
//! then does `latest` (itself replaced by renaming) name it; old checkpoints are removed after that. One of the same name has
//! stepped aside meanwhile, under a hidden name where it is still found. So at every moment
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
use crate::safetensors::is_plain_name;

pub use folder::CheckpointDir;
pub use held::{HELD_BLOCK, prepare_blocks};
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
        self.get_named(&folder_name(step))
    }

    /// The checkpoint of a name, as [`Checkpoints::get`].
    ///
    /// # Errors
    /// As [`CheckpointDir::open`]; [`Error::NotAName`].
    pub fn get_named(&self, name: &str) -> Result<CheckpointDir> {
        check_name(name)?;
        let (path, aside) = (self.dir.join(name), self.aside(name));
        // Where a new one of the name was about to take its place.
        let path = if !path.exists() && aside.exists() {
            aside
        } else {
            path
        };
        CheckpointDir::open(&path)
    }

    /// The names of all checkpoint folders, complete or not, the one of the last step last.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn names(&self) -> Result<Vec<String>> {
        let step = |name: String| {
            let there = !name.starts_with('.') && self.dir.join(&name).is_dir();
            let manifest = self.dir.join(&name).join(folder::MANIFEST).exists();
            let found = self.get_named(&name).ok().map(|found| found.step());
            // What is damaged is listed all the same, so that it is missed.
            let step = found.or(step_of(&name)).or(manifest.then_some(0));
            Some((step.filter(|_| there)?, name))
        };
        let mut names: Vec<(u64, String)> =
            entries(&self.dir)?.into_iter().filter_map(step).collect();
        names.sort_unstable();
        Ok(names.into_iter().map(|(_, name)| name).collect())
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
            .and_then(|name| name.map(|n| self.verified(&n)).transpose());
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
        let names = self.names()?;
        if names.is_empty() && !self.dir.join(LATEST).exists() {
            return Ok(None);
        }
        for name in names.iter().rev() {
            match self.verified(name) {
                Ok(checkpoint) => {
                    let note = format!("{}; continuing from {name}", problems.join("; "));
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
        let name = folder_name(step);
        let writer = self.begin_named(&name, step)?;
        let path = self.dir.join(name);
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
        Ok(writer)
    }

    /// Starts a checkpoint called `name`, as [`Checkpoints::begin`]; another one of the name stays until this one takes
    /// its place.
    ///
    /// # Errors
    /// [`Error::NotAName`]; [`Error::Io`].
    pub fn begin_named(&self, name: &str, step: u64) -> Result<Writer> {
        check_name(name)?;
        let disk = &*self.disk;
        disk.create_dir(&self.dir)
            .map_err(|e| Error::io("create", &self.dir, e))?;
        for name in entries(&self.dir)? {
            self.clean_up(&name)?;
        }
        let temp = self.hidden(name);
        disk.create_dir(&temp)
            .map_err(|e| Error::io("create", &temp, e))?;
        Ok(Writer::new(self, name, step, temp))
    }

    /// Removes an entry of the folder that a killed run left, or gives a checkpoint that had stepped aside its name back.
    fn clean_up(&self, entry: &str) -> Result<()> {
        let path = self.dir.join(entry);
        let Some(hidden) = entry.strip_suffix(TEMP_SUFFIX) else {
            return Ok(());
        };
        if hidden.starts_with(".latest.") {
            let removed = self.disk.remove_file(&path);
            return removed.map_err(|e| Error::io("remove", &path, e));
        }
        if let Some(name) = hidden.strip_prefix(ASIDE)
            && !self.dir.join(name).exists()
        {
            let back = self.disk.rename(&path, &self.dir.join(name));
            back.map_err(|e| Error::io("rename", &path, e))?;
            return sync_dir(self.disk(), &self.dir);
        }
        match hidden.starts_with(ASIDE) || hidden.starts_with(UNDERWAY) {
            true => self.remove_dir(&path),
            false => Ok(()),
        }
    }

    /// Joins the checkpoint of `step` that another rank began, to write some of its files.
    pub fn join(&self, step: u64) -> Writer {
        self.join_named(&folder_name(step), step)
    }

    /// Joins the checkpoint called `name` that another rank began.
    pub fn join_named(&self, name: &str, step: u64) -> Writer {
        Writer::joined(self, name, step, self.hidden(name))
    }

    fn verified(&self, name: &str) -> Result<CheckpointDir> {
        let checkpoint = self.get_named(name)?;
        checkpoint.verify()?;
        Ok(checkpoint)
    }

    /// The name in `latest`; `None` if there is no such file.
    fn named_by_latest(&self) -> Result<Option<String>> {
        let path = self.dir.join(LATEST);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &path, e)),
            Ok(text) => {
                let name = std::str::from_utf8(&text).ok().map(str::trim_end);
                match name.filter(|name| check_name(name).is_ok()) {
                    Some(name) => Ok(Some(name.to_owned())),
                    None => Err(Error::corrupt(&path, "does not name a checkpoint")),
                }
            }
        }
    }

    fn disk(&self) -> &dyn Disk {
        &*self.disk
    }

    /// Gives a written folder its final name, for good. One that had the name steps aside.
    fn put_in_place(&self, name: &str, temp: &Path) -> Result<PathBuf> {
        let path = self.dir.join(name);
        sync_dir(self.disk(), temp)?;
        if path.join(folder::MANIFEST).exists() {
            let aside = self.disk.rename(&path, &self.aside(name));
            aside.map_err(|e| Error::io("rename", &path, e))?;
            sync_dir(self.disk(), &self.dir)?;
        }
        self.disk
            .rename(temp, &path)
            .map_err(|e| Error::io("rename into", &path, e))?;
        sync_dir(self.disk(), &self.dir)?;
        sync_dir(self.disk(), folder_of(&self.dir))?;
        Ok(path)
    }

    /// Lets `latest` name a checkpoint that is in place, and removes the one before it of the same name, and those that
    /// are then too old.
    fn name_latest(&self, name: &str, keep: Option<NonZeroUsize>) -> Result<()> {
        let line = format!("{name}\n");
        write_atomic(self.disk(), &self.dir.join(LATEST), line.as_bytes())?;
        let aside = self.aside(name);
        if aside.exists() {
            self.remove_dir(&aside)?;
        }
        match keep {
            Some(keep) => self.prune(keep, name),
            None => Ok(()),
        }
    }

    /// The hidden name under which a checkpoint is written, or removed.
    fn hidden(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{UNDERWAY}{name}{TEMP_SUFFIX}"))
    }

    /// The hidden name of a checkpoint while a new one takes its name.
    fn aside(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{ASIDE}{name}{TEMP_SUFFIX}"))
    }

    fn remove_dir(&self, path: &Path) -> Result<()> {
        let removed = self.disk.remove_dir(path);
        removed.map_err(|e| Error::io("remove", path, e))
    }

    /// Removes a checkpoint so that it is gone at once, not file by file.
    fn remove(&self, step: u64) -> Result<()> {
        let name = folder_name(step);
        let (path, hidden) = (self.dir.join(&name), self.hidden(&format!("{name}.old")));
        self.disk
            .rename(&path, &hidden)
            .map_err(|e| Error::io("remove", &path, e))?;
        self.remove_dir(&hidden)
    }

    /// Removes the oldest checkpoints of steps beyond `keep`, but not `newest`, which `latest` names.
    fn prune(&self, keep: NonZeroUsize, newest: &str) -> Result<()> {
        let steps = self.steps()?;
        let surplus = steps.len().saturating_sub(keep.get());
        let old = steps.iter().filter(|&&step| folder_name(step) != newest);
        old.take(surplus).try_for_each(|&step| self.remove(step))
    }
}

/// The beginning of the hidden name of a checkpoint that is not complete.
const UNDERWAY: &str = ".checkpoint-";
/// The beginning of the hidden name of a checkpoint whose name a new one takes.
const ASIDE: &str = ".replaced-";

/// Refuses names that are no folder's, or would be taken for something else.
fn check_name(name: &str) -> Result<()> {
    match is_plain_name(name) && !name.starts_with('.') && name != LATEST {
        true => Ok(()),
        false => Err(Error::NotAName(name.to_owned())),
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
