//! Files that appear whole or not at all.
//!
//! A file is written under a temporary name in its own folder, forced to the disk, renamed over the target, and the
//! folder is forced to the disk: a reader, or a machine that loses power, sees the old content or the new.
//! The [`Disk`] seam exists so that tests can fill the disk or stop it dead at any byte.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Everything this crate does to a disk besides reading.
pub trait Disk: Send + Sync {
    /// Creates a file that must not exist.
    ///
    /// # Errors
    /// The system's error; so in all methods.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Renames a file or folder; replaces an existing file.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Creates a folder and its missing parents.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Forces a folder's entries to the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder and its content.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// An open file of a [`Disk`].
pub trait DiskFile: Write + Send {
    /// Forces the content to the disk.
    ///
    /// # Errors
    /// The system's error.
    fn sync(&mut self) -> io::Result<()>;
}

/// The disk of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl DiskFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(
            OpenOptions::new().write(true).create_new(true).open(path)?,
        ))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}

/// The ending of every temporary name, so that what a killed process left behind can be recognized.
pub(crate) const TEMP_SUFFIX: &str = ".tmp";

/// A file being written beside its target. [`AtomicFile::commit`] puts it in place; dropping it removes it.
///
/// Writes are not buffered: hand over large pieces, or wrap it in a [`std::io::BufWriter`].
pub struct AtomicFile<'d> {
    disk: &'d dyn Disk,
    file: Box<dyn DiskFile>,
    temp: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl<'d> AtomicFile<'d> {
    /// Starts a file that will become `target`, in `target`'s folder, which must exist.
    ///
    /// # Errors
    /// [`Error::Io`] if the temporary file cannot be created.
    pub fn create(disk: &'d dyn Disk, target: &Path) -> Result<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let temp = target.with_file_name(format!(
            ".{name}.{}-{serial}{TEMP_SUFFIX}",
            std::process::id()
        ));
        let file = disk
            .create(&temp)
            .map_err(|e| Error::io("create", target, e))?;
        Ok(AtomicFile {
            disk,
            file,
            temp,
            target: target.to_owned(),
            committed: false,
        })
    }

    /// The name the file will get.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Forces what was written to the disk, without putting it in place.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&mut self) -> Result<()> {
        self.file
            .sync()
            .map_err(|e| Error::io("write", &self.target, e))
    }

    /// Forces the content to the disk and puts it in place of the target.
    ///
    /// # Errors
    /// [`Error::Io`]. Unless the very last step failed (forcing the folder), the target is as it was before.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        self.disk
            .rename(&self.temp, &self.target)
            .map_err(|e| Error::io("rename into", &self.target, e))?;
        self.committed = true;
        sync_dir(self.disk, folder_of(&self.target))
    }
}

impl Write for AtomicFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for AtomicFile<'_> {
    fn drop(&mut self) {
        if !self.committed {
            // The error that led here is the one worth reporting; a leftover `.tmp` is harmless.
            let _ = self.disk.remove_file(&self.temp);
        }
    }
}

/// Replaces the file `path` by `bytes`, whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_atomic(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(disk, path)?;
    file.write_all(bytes)
        .map_err(|e| Error::io("write", path, e))?;
    file.commit()
}

pub(crate) fn sync_dir(disk: &dyn Disk, path: &Path) -> Result<()> {
    disk.sync_dir(path)
        .map_err(|e| Error::io("sync folder", path, e))
}

/// The folder that holds `path`; a bare file name lies in `.`.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
