//! Read-only memory maps of files, and typed views of their bytes.
//!
//! The only file of this crate with `unsafe` code. It maps and casts; it knows no format.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Advice, Mmap, UncheckedAdvice};

use crate::error::{Error, Result};

#[cfg(target_endian = "big")]
compile_error!("every file format read here is little-endian and is viewed in place");

mod sealed {
    pub trait Sealed {}
}

/// A number for which every bit pattern is a value, so that bytes can be viewed as a slice of it.
pub trait Plain: sealed::Sealed + Copy + Default + Send + Sync + 'static {}

macro_rules! plain {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Plain for $t {})* };
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, f16, bf16);

/// Views `bytes` as little-endian `T`s in place; `None` if they are misaligned or not a whole number of `T`.
pub fn view<T: Plain>(bytes: &[u8]) -> Option<&[T]> {
    // SAFETY: `Plain` is sealed and holds only numbers without padding or invalid bit patterns.
    let (head, body, tail) = unsafe { bytes.align_to::<T>() };
    (head.is_empty() && tail.is_empty()).then_some(body)
}

/// The bytes of a slice of numbers, in place.
pub fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: a `Plain` has no padding, `u8` has alignment 1, and the length covers exactly the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// How a mapped file will be read; a hint to the kernel's read-ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// From front to back: read far ahead.
    Sequential,
    /// Here and there: do not read ahead.
    Random,
}

/// A whole file mapped read-only.
///
/// Pages are read on first use and can be dropped by the kernel, so a file larger than memory can be mapped.
/// The file must not be shortened while it is mapped: the process would be killed on the next access beyond its new
/// end (this crate replaces files only by renaming a new one into place, which leaves existing maps intact).
#[derive(Debug)]
pub struct Mapped {
    map: Mmap,
    path: PathBuf,
}

impl Mapped {
    /// Maps `path`. An empty file gives an empty slice.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened or mapped, or is a folder.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
        if file
            .metadata()
            .map_err(|e| Error::io("read", path, e))?
            .is_dir()
        {
            return Err(Error::io(
                "read",
                path,
                std::io::ErrorKind::IsADirectory.into(),
            ));
        }
        // SAFETY: the map is read-only and private to this value. That nobody rewrites the file underneath is the
        // documented condition of this type, as of every memory-mapped reader.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, e))?;
        Ok(Mapped {
            map,
            path: path.to_owned(),
        })
    }

    /// The file's content.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Views a byte range as `T`s in place.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the range passes the end of the file, is no whole number of `T`, or starts misaligned.
    pub fn slice<T: Plain>(&self, range: Range<usize>) -> Result<&[T]> {
        let width = size_of::<T>();
        let part = self.bytes().get(range.clone()).ok_or_else(|| {
            let problem = format!(
                "bytes {range:?} asked for, but the file has {}",
                self.bytes().len()
            );
            Error::corrupt(&self.path, problem)
        })?;
        view(part).ok_or_else(|| {
            let problem =
                format!("bytes {range:?} are not a whole number of aligned {width}-byte values");
            Error::corrupt(&self.path, problem)
        })
    }

    /// The whole file as `T`s in place: a token file is `slice_all::<u16>()` or `slice_all::<u32>()`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the file's length is no multiple of `T`'s size.
    pub fn slice_all<T: Plain>(&self) -> Result<&[T]> {
        self.slice(0..self.bytes().len())
    }

    /// Tells the kernel how the file will be read.
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel refuses the hint.
    pub fn advise(&self, access: Access) -> Result<()> {
        let advice = match access {
            Access::Sequential => Advice::Sequential,
            Access::Random => Advice::Random,
        };
        self.map
            .advise(advice)
            .map_err(|e| Error::io("advise on", &self.path, e))
    }

    /// Gives back the memory of a range that was read and will not be soon; reading it again reads the file again.
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel refuses.
    pub fn release(&self, range: Range<usize>) -> Result<()> {
        let len = range.end.min(self.map.len()).saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the map is of a file and never written, so its pages come back with the same content.
        let done = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, len)
        };
        done.map_err(|e| Error::io("advise on", &self.path, e))
    }
}
