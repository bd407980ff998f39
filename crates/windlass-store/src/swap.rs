//! Swap files: state that does not fit in memory, on a fast disk, moved while the program computes.
//!
//! A [`SwapFile`] is one file past the page cache (`O_DIRECT`). Regions of it are reserved once and then written and
//! read as whole buffers or parts, in the background: the caller's thread gives a buffer away and gets it back from
//! [`Writing::wait`] or [`Reading::wait`]. Requests are cut into pieces of [`AioOptions::block_size`], of which
//! [`AioOptions::queue_depth`] are under way at a time; requests of the same bytes keep their order. Every 4096 bytes
//! carry a checksum, made when they are written and verified when they are read.
//!
//! The file has no name in its folder (it is made with `O_TMPFILE`, or unlinked right after it is made), so that a
//! killed program leaves nothing behind; `df` shows its space, `ls` does not. Nothing here decides what is moved
//! when, and nothing survives the program: checkpoints do that.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use windlass_tensor::kernels::memory::Buffer;

use crate::error::{Error, Result};
use file::DiskFile;
pub use measure::{Measured, measure, memory_for};
pub use queue::Direction;
use queue::{Place, Queue, Ticket};
use sums::{BLOCK, Sums};

mod file;
mod measure;
mod queue;
mod ring;
mod service;
mod sums;
#[cfg(test)]
mod tests;

/// How a disk is kept busy: the fields of the `aio` block of a `ds_config.json`, with its defaults.
///
/// `intra_op_parallelism` is `threads`. `use_gds` (transfers to a GPU) has no meaning here and no field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AioOptions {
    /// Bytes of one transfer; requests are cut into so many. A multiple of 4096.
    pub block_size: usize,
    /// Transfers under way at a time, for each thread.
    pub queue_depth: usize,
    /// `intra_op_parallelism`: rings, each with a thread of its own, that share the pieces of all requests. The
    /// fallback runs `threads * queue_depth` blocking calls at a time instead, 64 at most.
    pub threads: usize,
    /// Whether each transfer is handed to the kernel by a call of its own; otherwise as many as there are at once.
    /// The fallback always makes single calls.
    pub single_submit: bool,
    /// Whether a transfer that is done makes room for the next at once; otherwise a ring waits until all of
    /// `queue_depth` are done before it begins the next ones. The fallback always overlaps.
    pub overlap_events: bool,
}

impl Default for AioOptions {
    fn default() -> Self {
        AioOptions {
            block_size: 1 << 20,
            queue_depth: 8,
            threads: 1,
            single_submit: false,
            overlap_events: true,
        }
    }
}

/// The largest [`AioOptions::queue_depth`] and [`AioOptions::threads`], and what a transfer may hold.
const MAX_DEPTH: usize = 4096;
const MAX_THREADS: usize = 64;
const MAX_BLOCK: usize = 1 << 30;

impl AioOptions {
    /// Refuses what cannot be done, as [`SwapFile::create`] for `file` would.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names the key of the `aio` block.
    pub fn check(&self, file: &Path) -> Result<()> {
        let refuse = |problem: String, hint: &str| {
            Err(Error::Unsupported {
                path: file.to_owned(),
                problem,
                hint: hint.to_owned(),
            })
        };
        let block = self.block_size;
        if block == 0 || !block.is_multiple_of(BLOCK) || block > MAX_BLOCK {
            let problem = format!("aio.block_size is {block}");
            return refuse(
                problem,
                "use a multiple of 4096 up to 1 GiB, such as 1048576",
            );
        }
        if !(1..=MAX_DEPTH).contains(&self.queue_depth) {
            let problem = format!("aio.queue_depth is {}", self.queue_depth);
            return refuse(problem, "use 1 to 4096; the default is 8");
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            let problem = format!("aio.intra_op_parallelism is {}", self.threads);
            return refuse(problem, "use 1 to 64; the default is 1");
        }
        Ok(())
    }
}

/// Who moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The kernel, asked through io_uring by one thread for each ring.
    IoUring,
    /// Threads in blocking `pread` and `pwrite` calls.
    Threads,
}

impl Backend {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Backend::IoUring => "io_uring",
            Backend::Threads => "pread/pwrite threads",
        }
    }
}

/// What a swap file has done since it was made or its options were changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct IoStats {
    /// Bytes read, rounded up to whole blocks of 4096.
    pub bytes_read: u64,
    /// Bytes written, rounded up likewise.
    pub bytes_written: u64,
    /// Seconds with at least one request under way.
    pub busy_seconds: f64,
    /// Seconds that callers spent in `wait`, all threads together: what was not hidden behind their work.
    pub waited_seconds: f64,
}

/// A part of a swap file. It holds zeros until it is written. Its space comes back with the file.
#[derive(Clone, Debug)]
pub struct Region {
    file: u64,
    start: u64,
    bytes: usize,
    sums: Arc<Sums>,
}

impl Region {
    /// The bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The region's first `bytes`, to be written and read alone.
    ///
    /// # Panics
    /// If the region is shorter.
    #[track_caller]
    pub fn first(&self, bytes: usize) -> Region {
        assert!(bytes <= self.bytes, "{bytes} bytes of {}", self.bytes);
        Region {
            bytes,
            ..self.clone()
        }
    }
}

/// A file on a fast disk that buffers are moved to and from in the background.
///
/// Dropping it waits for requests under way; its space is free again afterwards.
pub struct SwapFile {
    id: u64,
    file: Arc<DiskFile>,
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    length: Mutex<u64>,
    options: AioOptions,
    backend: Backend,
    asked: Option<Backend>,
    note: Option<String>,
}

impl SwapFile {
    /// Makes a file in `dir`, of which messages speak as `dir/name`. Without a `backend`, the best available is used;
    /// [`SwapFile::note`] says if that is not io_uring and O_DIRECT.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder is missing or cannot be written to, or if the `backend` asked for is not
    /// available; [`Error::Unsupported`] for options out of range.
    pub fn create(
        dir: &Path,
        name: &str,
        options: AioOptions,
        backend: Option<Backend>,
    ) -> Result<SwapFile> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        options.check(&dir.join(name))?;
        let file = Arc::new(DiskFile::create(dir, name)?);
        let (queue, threads, used, refused) = start(&file, &options, backend)?;
        let mut swap = SwapFile {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            file,
            queue,
            threads,
            length: Mutex::new(0),
            options,
            backend: used,
            asked: backend,
            note: None,
        };
        swap.set_note(refused);
        Ok(swap)
    }

    /// Goes on with other options; waits for requests under way. Regions keep their content, [`SwapFile::stats`]
    /// starts again.
    ///
    /// # Errors
    /// As [`SwapFile::create`]; the old options then stay in force.
    pub fn retune(&mut self, options: AioOptions) -> Result<()> {
        options.check(self.file.path())?;
        let (queue, threads, used, refused) = start(&self.file, &options, self.asked)?;
        self.stop();
        (self.queue, self.threads, self.backend) = (queue, threads, used);
        self.options = options;
        self.set_note(refused);
        Ok(())
    }

    fn set_note(&mut self, refused: Option<String>) {
        let notes = [self.file.note().map(str::to_owned), refused];
        let notes: Vec<String> = notes.into_iter().flatten().collect();
        self.note = (!notes.is_empty()).then(|| notes.join("; "));
    }

    fn stop(&mut self) {
        self.queue.close();
        for thread in self.threads.drain(..) {
            // A thread that panicked has failed its requests; their callers know.
            let _ = thread.join();
        }
    }

    /// The options in force.
    pub fn options(&self) -> &AioOptions {
        &self.options
    }

    /// Who moves the bytes.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether transfers bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.file.is_direct()
    }

    /// Why the file is slower than it could be, if it is, for the caller to print.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Extends the file by a region of `bytes`, rounded up to 4096, and takes its space on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] that says how much is missing when the disk is too full.
    pub fn reserve(&self, bytes: usize) -> Result<Region> {
        let mut length = self.length.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *length;
        let blocks = bytes.div_ceil(BLOCK);
        if blocks > 0 {
            let end = start.saturating_add((blocks as u64).saturating_mul(BLOCK as u64));
            self.file.extend(start, end)?;
            *length = end;
        }
        Ok(Region {
            file: self.id,
            start,
            bytes,
            sums: Arc::new(Sums::zeros(blocks)),
        })
    }

    /// Writes the bytes of `buffer` to the start of `region`.
    ///
    /// # Panics
    /// As [`SwapFile::write_at`].
    #[track_caller]
    pub fn write(&self, region: &Region, buffer: Buffer) -> Writing {
        self.write_at(region, 0, buffer)
    }

    /// Writes the bytes of `buffer` to `region`, `offset` bytes from its start.
    ///
    /// # Panics
    /// If the region is another file's, the offset is no multiple of 4096, the bytes pass the region's end, or they
    /// end inside a block of 4096 that is not the region's last.
    #[track_caller]
    pub fn write_at(&self, region: &Region, offset: usize, buffer: Buffer) -> Writing {
        let end = offset + buffer.bytes();
        assert!(
            end.is_multiple_of(BLOCK) || end == region.bytes,
            "a write up to byte {end} of a region of {} ends inside a block of {BLOCK}",
            region.bytes
        );
        Writing(self.submit(Direction::Write, region, offset, buffer))
    }

    /// Fills the bytes of `buffer` from the start of `region`.
    ///
    /// # Panics
    /// As [`SwapFile::read_at`].
    #[track_caller]
    pub fn read(&self, region: &Region, buffer: Buffer) -> Reading {
        self.read_at(region, 0, buffer)
    }

    /// Fills the bytes of `buffer` from `region`, `offset` bytes from its start.
    ///
    /// # Panics
    /// If the region is another file's, the offset is no multiple of 4096, or the bytes pass the region's end.
    #[track_caller]
    pub fn read_at(&self, region: &Region, offset: usize, buffer: Buffer) -> Reading {
        Reading(self.submit(Direction::Read, region, offset, buffer))
    }

    #[track_caller]
    fn submit(
        &self,
        direction: Direction,
        region: &Region,
        offset: usize,
        buffer: Buffer,
    ) -> Arc<Ticket> {
        assert_eq!(region.file, self.id, "the region is another file's");
        assert!(
            offset.is_multiple_of(BLOCK),
            "offset {offset} is no multiple of {BLOCK}"
        );
        assert!(
            offset + buffer.bytes() <= region.bytes,
            "{} bytes at offset {offset} in a region of {}",
            buffer.bytes(),
            region.bytes
        );
        let place = Place {
            region: region.start,
            offset,
            sums: region.sums.clone(),
        };
        self.queue.submit(direction, place, buffer)
    }

    /// What was moved so far.
    pub fn stats(&self) -> IoStats {
        let (bytes_read, bytes_written, busy_seconds, waited_seconds) = self.queue.counts();
        IoStats {
            bytes_read,
            bytes_written,
            busy_seconds,
            waited_seconds,
        }
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A buffer on its way to the disk. Dropping it lets the write go on; an error is then only seen as a wrong checksum
/// by a later read.
#[must_use = "the buffer and the error come from `wait`"]
pub struct Writing(Arc<Ticket>);

impl Writing {
    /// Whether [`Writing::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.0.is_done()
    }

    /// Waits until the bytes are on the disk, as far as the disk says, and gives the buffer back.
    ///
    /// # Errors
    /// [`Error::Io`]; the buffer then goes back to its pool.
    pub fn wait(self) -> Result<Buffer> {
        self.0.wait()
    }
}

/// A buffer being filled from the disk. Dropping it lets the read go on to no use.
#[must_use = "the buffer and the error come from `wait`"]
pub struct Reading(Arc<Ticket>);

impl Reading {
    /// Whether [`Reading::wait`] would return at once.
    pub fn is_done(&self) -> bool {
        self.0.is_done()
    }

    /// Waits until the buffer is filled, and gives it back.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Corrupt`] if the disk gave back other bytes than it was given; the buffer then goes
    /// back to its pool.
    pub fn wait(self) -> Result<Buffer> {
        self.0.wait()
    }
}

/// Bytes that can still be written to the disk of `dir`.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be opened.
pub fn free_bytes(dir: &Path) -> Result<u64> {
    file::free_bytes(dir)
}

type Started = (Arc<Queue>, Vec<JoinHandle<()>>, Backend, Option<String>);

/// Starts the threads of the backend asked for, or of the best one available and why it is not the best of all.
fn start(file: &Arc<DiskFile>, options: &AioOptions, backend: Option<Backend>) -> Result<Started> {
    let begin = |backend| service::start(file, options, backend);
    let fail = |e| Error::io("start transfers of", file.path(), e);
    if let Some(backend) = backend {
        let (queue, threads) = begin(backend).map_err(fail)?;
        return Ok((queue, threads, backend, None));
    }
    match begin(Backend::IoUring) {
        Ok((queue, threads)) => Ok((queue, threads, Backend::IoUring, None)),
        Err(e) => {
            let why = format!("io_uring is not available ({e}): using threads of pread and pwrite");
            let (queue, threads) = begin(Backend::Threads).map_err(fail)?;
            Ok((queue, threads, Backend::Threads, Some(why)))
        }
    }
}
