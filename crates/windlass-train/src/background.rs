//! Checkpoints that are written beside training: copied into memory between two steps, written by a thread of each rank,
//! committed when all ranks have agreed, between two later steps, that theirs are written.
//!
//! The threads touch files and nothing else: what ranks tell one another is said by the ranks themselves.

use crate::checkpoint::plain;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::save::{Place, Saved, WeightFiles, together_save, written_bytes};
use crate::together::{exchange, together};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use windlass_comm::Group;
use windlass_store::checkpoint::{CheckpointDir, Writer, prepare_blocks};

/// A checkpoint on its way to the disk.
pub(crate) struct Pending {
    /// The folder that it will be.
    path: PathBuf,
    keep: Option<NonZeroUsize>,
    /// Whether nobody else is asked before it is committed.
    alone: bool,
    /// `None` once it was taken to be ended.
    phase: Option<Phase>,
}

enum Phase {
    /// Each rank writes what it has copied.
    Writing(JoinHandle<Result<Writer>>),
    /// The first rank lists the files of all and makes the checkpoint the latest; the others wait.
    Committing(Option<JoinHandle<Result<CheckpointDir>>>),
}

impl Phase {
    fn is_finished(&self) -> bool {
        match self {
            Phase::Writing(thread) => thread.is_finished(),
            Phase::Committing(thread) => thread.as_ref().is_none_or(JoinHandle::is_finished),
        }
    }
}

/// What a look at a checkpoint on its way has shown.
enum Look {
    Underway(Pending),
    Committed(PathBuf),
}

impl Pending {
    /// Starts to write what `writer` holds.
    ///
    /// # Errors
    /// A system without another thread.
    pub(crate) fn start(
        mut writer: Writer,
        path: PathBuf,
        keep: Option<NonZeroUsize>,
        group: &Group,
    ) -> Result<Self> {
        let thread = spawn(&path, move || {
            writer.flush()?;
            Ok(writer)
        })?;
        Ok(Pending {
            path,
            keep,
            alone: group.size() == 1,
            phase: Some(Phase::Writing(thread)),
        })
    }

    /// Goes on as far as all ranks can, or to the end if they are to wait. Collective.
    fn look(mut self, group: &Group, wait: bool) -> Result<Look> {
        while let Some(phase) = self.phase.take() {
            let finished = u64::from(wait || phase.is_finished());
            let all = group.collect("a checkpoint in the background", &[finished]);
            let all = all.map_err(|e| Error::Store(e.into()))?;
            if all.contains(&0) {
                self.phase = Some(phase);
                return Ok(Look::Underway(self));
            }
            match phase {
                Phase::Writing(thread) => {
                    let written = join(thread);
                    together(group, "write a checkpoint", written.as_ref().err())?;
                    self.phase = Some(self.commit(written?, group)?);
                }
                Phase::Committing(thread) => {
                    let committed = thread.map(join).transpose();
                    together(group, "commit a checkpoint", committed.as_ref().err())?;
                    committed?;
                }
            }
        }
        Ok(Look::Committed(std::mem::take(&mut self.path)))
    }

    /// Lets the first rank commit what all have written. Collective.
    fn commit(&self, mut writer: Writer, group: &Group) -> Result<Phase> {
        if group.rank() != 0 {
            exchange(group, "checkpoint files", &writer.leave())?;
            return Ok(Phase::Committing(None));
        }
        let lists = exchange(group, "checkpoint files", &[])?;
        let keep = self.keep;
        let thread = spawn(&self.path, move || {
            for list in lists.iter().filter(|list| !list.is_empty()) {
                writer.adopt(list)?;
            }
            Ok(writer.commit(keep)?)
        })?;
        Ok(Phase::Committing(Some(thread)))
    }
}

impl Drop for Pending {
    /// An engine that goes while a checkpoint is on its way waits for the disk. Alone it commits; among several ranks, who
    /// may be gone, it does not, and the checkpoint before this one stays the latest.
    fn drop(&mut self) {
        match self.phase.take() {
            Some(Phase::Writing(thread)) => {
                if let Ok(Ok(writer)) = thread.join()
                    && self.alone
                {
                    // Nobody is left to be told of an error; the checkpoint before this one stays.
                    let _ = writer.commit(self.keep);
                }
            }
            Some(Phase::Committing(Some(thread))) => drop(thread.join()),
            Some(Phase::Committing(None)) | None => {}
        }
    }
}

fn spawn<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    let builder = std::thread::Builder::new().name("checkpoint".into());
    builder
        .spawn(work)
        .map_err(|e| Error::io("start a thread to write", path, e))
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    match thread.join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

impl<B> Engine<B> {
    /// Writes a checkpoint, in the background where the options say so: then only the copy into memory is waited for,
    /// and the end of the one before. Returns the folder that it is or will be. Collective.
    pub(crate) fn save_with(
        &mut self,
        place: Place<'_>,
        files: WeightFiles,
        keep: Option<NonZeroUsize>,
        head: &mut dyn FnMut(&mut Writer) -> Result<()>,
    ) -> Result<PathBuf> {
        self.look_after_checkpoint(true)?;
        match together_save(place, self, files, keep, head)? {
            Saved::Here(checkpoint) => {
                let path = checkpoint.path().to_owned();
                self.last_checkpoint = Some(path.clone());
                Ok(path)
            }
            Saved::Underway(pending) => {
                let path = pending.path.clone();
                self.pending = Some(pending);
                Ok(path)
            }
        }
    }

    /// Takes the memory of checkpoints in the background before the first one needs it.
    pub(crate) fn prepare_checkpoints(&self) {
        let cpu = self.store().cpu();
        if self.options().async_checkpoints && !cpu.pool.is_dry() {
            prepare_blocks(&cpu.memory, written_bytes(self, plain(self)));
        }
    }

    /// Waits until the checkpoint in the background, if there is one, is complete on the disk and the one to continue
    /// from. To be called after the last [`Engine::save_checkpoint`] of several ranks; [`Engine::step`] looks by itself,
    /// without waiting. Collective.
    ///
    /// # Errors
    /// What hindered writing, on all ranks when it hindered one; checkpoints before it stay.
    pub fn finish_checkpoint(&mut self) -> Result<()> {
        self.look_after_checkpoint(true)
    }

    /// The last checkpoint that this engine has saved or loaded and that is complete on the disk.
    pub fn last_checkpoint(&self) -> Option<&Path> {
        self.last_checkpoint.as_deref()
    }

    /// Goes on with the checkpoint in the background as far as all ranks can. Collective while there is one.
    pub(crate) fn look_after_checkpoint(&mut self, wait: bool) -> Result<()> {
        let Some(pending) = self.pending.take() else {
            return Ok(());
        };
        match pending.look(self.store().group(), wait)? {
            Look::Underway(pending) => self.pending = Some(pending),
            Look::Committed(path) => self.last_checkpoint = Some(path),
        }
        Ok(())
    }
}
