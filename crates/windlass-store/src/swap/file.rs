//! The file on the disk: opened without a name, past the page cache, and never shorter than promised.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use windlass_tensor::Category;
use windlass_tensor::kernels::memory::Memory;

use super::sums::BLOCK;
use crate::error::{Error, Result};

/// An open file that vanishes with its last handle.
#[derive(Debug)]
pub(super) struct DiskFile {
    fd: OwnedFd,
    path: PathBuf,
    direct: bool,
    note: Option<String>,
}

impl DiskFile {
    /// Opens a file in `dir` that has no name, or loses it at once.
    pub(super) fn create(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        let fail = |e: Errno| Error::io("create", &path, e.into());
        let direct = open(dir, name, OFlags::DIRECT).and_then(|fd| probe(&fd).map(|()| fd));
        let (fd, refused) = match direct {
            Ok(fd) => (fd, None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                let fd = open(dir, name, OFlags::empty()).map_err(fail)?;
                let why = "its file system refuses O_DIRECT: going through the page cache";
                (fd, Some(format!("{}: {why}", path.display())))
            }
            Err(e) => return Err(fail(e)),
        };
        Ok(DiskFile {
            fd,
            path,
            direct: refused.is_none(),
            note: refused,
        })
    }

    /// The name by which messages speak of the file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers bypass the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Why transfers do not bypass the page cache.
    pub(super) fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Extends the file from `old` to `new` bytes of zeros and takes their space on the disk now.
    pub(super) fn extend(&self, old: u64, new: u64) -> Result<()> {
        let fail = |e: Errno| Error::io("extend", &self.path, e.into());
        self.refuse_if_full(new - old)?;
        match rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), old, new - old) {
            Ok(()) => Ok(()),
            // The file system cannot take space ahead of time; what is free now was looked at above.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                rustix::fs::ftruncate(&self.fd, new).map_err(fail)
            }
            Err(e) => {
                rustix::fs::ftruncate(&self.fd, old).map_err(fail)?;
                if e == Errno::NOSPC {
                    self.refuse_if_full(new - old)?;
                }
                Err(fail(e))
            }
        }
    }

    fn refuse_if_full(&self, wanted: u64) -> Result<()> {
        let disk = rustix::fs::fstatvfs(&self.fd)
            .map_err(|e| Error::io("read the free space of", &self.path, e.into()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if wanted <= free {
            return Ok(());
        }
        let missing = (wanted - free).div_ceil(1 << 20);
        let (wanted, free) = (wanted.div_ceil(1 << 20), free >> 20);
        let message = format!("{wanted} MiB wanted, {free} MiB free: {missing} MiB are missing");
        let full = io::Error::new(io::ErrorKind::StorageFull, message);
        Err(Error::io("extend", &self.path, full))
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open(dir: &Path, name: &str, extra: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | extra;
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(dir, flags | OFlags::TMPFILE, mode) {
        // File systems that know no nameless files (EISDIR: kernels that do not).
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
            let path = dir.join(format!(".{name}.{}.swap", std::process::id()));
            let created = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
            rustix::fs::unlink(&path)?;
            Ok(created)
        }
        opened => opened,
    }
}

/// Some file systems accept the flag and refuse the first transfer.
fn probe(fd: &OwnedFd) -> rustix::io::Result<()> {
    let zeros = Memory::new().alloc(BLOCK, Category::Workspace);
    rustix::io::pwrite(fd, &zeros.block()[..BLOCK], 0)?;
    rustix::fs::ftruncate(fd, 0)
}

/// Bytes that can still be written to the file system of `dir`.
pub(super) fn free_bytes(dir: &Path) -> Result<u64> {
    let fail = |e| Error::io("read the free space of", dir, e);
    let folder = File::open(dir).map_err(fail)?;
    let disk = rustix::fs::fstatvfs(&folder).map_err(|e| fail(e.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}
