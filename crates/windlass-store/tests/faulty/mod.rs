//! A disk that fills up, dies, or loses what was never forced onto it.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use windlass_store::atomic::{Disk, DiskFile, RealDisk};

/// How the disk fails once its budget is used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Every further byte is refused; everything else works.
    Full,
    /// Nothing works any more, clean-up included: the process was killed.
    Killed,
    /// As `Killed`, and what was not forced to the disk is lost: the power went. Of the folder entries not forced,
    /// the i-th is lost if bit i mod 3 is set, as they may reach the disk in any order.
    PowerLoss(u8),
}

/// A real disk with a budget.
#[derive(Clone)]
pub struct FaultyDisk(Arc<Mutex<State>>);

struct State {
    fault: Fault,
    operations_left: u64,
    bytes_left: u64,
    dead: bool,
    /// Length that is surely on the disk, of every file written since the start.
    forced: HashMap<PathBuf, u64>,
    /// Entries created and renames done in folders not forced since, oldest first.
    entries: Vec<Entry>,
}

enum Entry {
    Created(PathBuf),
    Renamed {
        from: PathBuf,
        to: PathBuf,
        replaced: Option<Vec<u8>>,
    },
}

impl FaultyDisk {
    /// A disk that fails after so many operations or so many bytes, whichever comes first.
    pub fn new(fault: Fault, operations: u64, bytes: u64) -> Self {
        FaultyDisk(Arc::new(Mutex::new(State {
            fault,
            operations_left: operations,
            bytes_left: bytes,
            dead: false,
            forced: HashMap::new(),
            entries: Vec::new(),
        })))
    }

    /// Leaves the real folder as the next start of the machine would find it.
    pub fn crash(&self) {
        let mut state = self.0.lock().unwrap();
        state.dead = true;
        let Fault::PowerLoss(lost) = state.fault else {
            return;
        };
        for (path, length) in std::mem::take(&mut state.forced) {
            if let Ok(file) = std::fs::OpenOptions::new().write(true).open(path) {
                file.set_len(length).unwrap();
            }
        }
        let entries = std::mem::take(&mut state.entries).into_iter().enumerate();
        for (_, entry) in entries
            .filter(|(i, _)| lost >> (i % 3) & 1 == 1)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
        {
            match entry {
                Entry::Created(path) => drop(std::fs::remove_file(path)),
                Entry::Renamed { from, to, replaced } => {
                    if std::fs::rename(&to, &from).is_ok()
                        && let Some(content) = replaced
                    {
                        std::fs::write(&to, content).unwrap();
                    }
                }
            }
        }
    }

    /// Operations and bytes still allowed.
    pub fn left(&self) -> (u64, u64) {
        let state = self.0.lock().unwrap();
        (state.operations_left, state.bytes_left)
    }

    fn operation(&self) -> io::Result<std::sync::MutexGuard<'_, State>> {
        let mut state = self.0.lock().unwrap();
        if state.operations_left == 0 && state.fault != Fault::Full {
            state.dead = true;
        }
        if state.dead {
            return Err(io::Error::other("the disk is dead"));
        }
        state.operations_left = state.operations_left.saturating_sub(1);
        Ok(state)
    }
}

struct FaultyFile {
    disk: FaultyDisk,
    path: PathBuf,
    file: Box<dyn DiskFile>,
}

impl Write for FaultyFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.disk.operation()?;
        let allowed = bytes
            .len()
            .min(usize::try_from(state.bytes_left).unwrap_or(usize::MAX));
        if allowed == 0 && !bytes.is_empty() {
            state.dead = state.fault != Fault::Full;
            return Err(ErrorKind::StorageFull.into());
        }
        state.bytes_left -= allowed as u64;
        self.file.write_all(&bytes[..allowed])?;
        Ok(allowed)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for FaultyFile {
    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.disk.operation()?;
        let length = std::fs::metadata(&self.path)?.len();
        state.forced.insert(self.path.clone(), length);
        Ok(())
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.operation()?;
        let file = RealDisk.create(path)?;
        state.forced.insert(path.to_owned(), 0);
        state.entries.push(Entry::Created(path.to_owned()));
        Ok(Box::new(FaultyFile {
            disk: self.clone(),
            path: path.to_owned(),
            file,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        let replaced = std::fs::read(to).ok();
        RealDisk.rename(from, to)?;
        let moved = |path: PathBuf| match path.strip_prefix(from) {
            Ok(rest) if rest.as_os_str().is_empty() => to.to_owned(),
            Ok(rest) => to.join(rest),
            Err(_) => path,
        };
        state.forced = std::mem::take(&mut state.forced)
            .into_iter()
            .map(|(p, n)| (moved(p), n))
            .collect();
        // A renamed file's first entry no longer matters; those of the files in a renamed folder do.
        state
            .entries
            .retain(|entry| !matches!(entry, Entry::Created(path) if path == from));
        for entry in &mut state.entries {
            if let Entry::Created(path) = entry {
                *path = moved(std::mem::take(path));
            }
        }
        state.entries.push(Entry::Renamed {
            from: from.to_owned(),
            to: to.to_owned(),
            replaced,
        });
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let _state = self.operation()?;
        RealDisk.create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        state.entries.retain(|entry| match entry {
            Entry::Created(at) | Entry::Renamed { to: at, .. } => at.parent() != Some(path),
        });
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        state.forced.remove(path);
        RealDisk.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        state.forced.retain(|file, _| !file.starts_with(path));
        RealDisk.remove_dir(path)
    }
}
