//! The glue to the MPI library: messages in memory of their own, sent and received without blocking.
//!
//! The one file of this transport that calls a foreign function. Why that is sound: a message under way owns its
//! memory ([`Flight`]), and memory that MPI may still touch is never given back; one thread at a time uses the library
//! (`MPI_THREAD_SERIALIZED`, one [`Wire`] a process, which is not shared between threads).

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::Communicator;
use mpi::{Threading, traits::AsRaw};

use crate::datum::Datum;
use crate::error::{Error, Result};

/// What a message is, so that kinds do not mix.
#[derive(Clone, Copy)]
pub enum Channel {
    /// What a rank is about to do.
    Header = 1,
    /// A piece of data.
    Data = 2,
    /// A last word.
    Note = 3,
}

/// Memory for a message, aligned for every [`Datum`].
pub struct Buffer {
    words: Vec<u64>,
    length: usize,
}

impl Buffer {
    /// Zeroed memory for so many bytes.
    pub fn new(capacity: usize) -> Self {
        Self {
            words: vec![0; capacity.div_ceil(8)],
            length: capacity,
        }
    }

    /// Sets how many of its bytes are used.
    pub fn resize(&mut self, length: usize) {
        let capacity = self.words.len() * 8;
        assert!(
            length <= capacity,
            "{length} bytes in a buffer of {capacity}"
        );
        self.length = length;
    }

    /// The message as bytes.
    pub fn bytes(&self) -> &[u8] {
        &bytes_of(&self.words)[..self.length]
    }

    /// The message as bytes to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytes_of_mut(&mut self.words)[..self.length]
    }

    /// The message as numbers.
    pub fn numbers<T: Datum>(&self) -> &[T] {
        let count = self.length / size_of::<T>();
        // SAFETY: the words are aligned for every datum and any bits are one; `resize` keeps the length inside.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), count) }
    }
}

/// Numbers as bytes.
pub fn bytes_of<T: Datum>(numbers: &[T]) -> &[u8] {
    // SAFETY: a datum is a plain number without padding; the trait is sealed.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// Numbers as bytes to be written.
pub fn bytes_of_mut<T: Datum>(numbers: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bits are a number.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// This process in its MPI job. The library is shut down with it, in step with all ranks; see [`Wire::forget`].
pub struct Wire {
    universe: Option<Universe>,
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// Not to be shared between threads.
    alone: PhantomData<std::cell::Cell<()>>,
}

// SAFETY: the library was started for calls from any thread, one at a time; the handle is an address or a number that
// means the same to all threads.
unsafe impl Send for Wire {}

impl Wire {
    /// Starts the library; once a process.
    pub fn start() -> Result<Self> {
        let failed = |problem: &str| Error::Mpi {
            problem: problem.to_owned(),
        };
        let started = mpi::initialize_with_threading(Threading::Serialized);
        let (universe, provided) = started.ok_or_else(|| failed("it is already in use"))?;
        if !matches!(provided, Threading::Serialized | Threading::Multiple) {
            return Err(failed("it was built without support for threads"));
        }
        let world = universe.world();
        let wire = Self {
            comm: world.as_raw(),
            rank: world.rank() as usize,
            size: world.size() as usize,
            universe: Some(universe),
            alone: PhantomData,
        };
        Ok(wire)
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// Leaves the library running until the process ends: shutting it down would wait for ranks that do not come.
    pub fn forget(&mut self) {
        std::mem::forget(self.universe.take());
    }

    /// Ends all processes of the job.
    pub fn end_job(&self, code: i32) {
        // SAFETY: the library is running.
        unsafe { ffi::MPI_Abort(self.comm, code) };
    }

    /// Sends a message.
    pub fn send(&self, to: usize, channel: Channel, buffer: Buffer) -> Flight {
        let (at, count) = (buffer.words.as_ptr(), buffer.length as i32);
        let mut request = MaybeUninit::uninit();
        // SAFETY: the flight keeps the memory until the message has left.
        let request = unsafe {
            ffi::MPI_Isend(
                at.cast(),
                count,
                ffi::RSMPI_UINT8_T,
                to as i32,
                channel as i32,
                self.comm,
                request.as_mut_ptr(),
            );
            request.assume_init()
        };
        Flight {
            request,
            buffer: Some(buffer),
            landed: false,
        }
    }

    /// Awaits a message of at most the buffer's length, from one rank or from any.
    pub fn receive(&self, from: Option<usize>, channel: Channel, mut buffer: Buffer) -> Flight {
        let (at, count) = (buffer.words.as_mut_ptr(), buffer.length as i32);
        let mut request = MaybeUninit::uninit();
        // SAFETY: the flight keeps the memory until the message is there.
        let request = unsafe {
            let from = from.map_or(ffi::RSMPI_ANY_SOURCE, |rank| rank as i32);
            ffi::MPI_Irecv(
                at.cast(),
                count,
                ffi::RSMPI_UINT8_T,
                from,
                channel as i32,
                self.comm,
                request.as_mut_ptr(),
            );
            request.assume_init()
        };
        Flight {
            request,
            buffer: Some(buffer),
            landed: false,
        }
    }
}

/// A message under way. Dropped before it has landed, it leaves its memory to the library.
pub struct Flight {
    request: ffi::MPI_Request,
    buffer: Option<Buffer>,
    landed: bool,
}

// SAFETY: as for `Wire`, beside which it is kept.
unsafe impl Send for Flight {}

impl Flight {
    /// Asks whether the message has arrived or left, and lets the library work. Needs the library's owner, so that it
    /// is called by one thread at a time.
    pub fn test(&mut self, _wire: &Wire) -> bool {
        if !self.landed {
            let mut flag = 0;
            // SAFETY: the request is active: it was started and has not completed.
            unsafe { ffi::MPI_Test(&mut self.request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
            self.landed = flag != 0;
        }
        self.landed
    }

    /// The message, or the memory of one sent.
    ///
    /// # Panics
    /// If it has not landed.
    pub fn into_buffer(mut self) -> Buffer {
        assert!(self.landed, "a message that is still under way");
        self.buffer.take().expect("a message has memory")
    }

    /// Gives up a message that nobody has sent, so that the library can be shut down.
    pub fn cancel(mut self, wire: &Wire) {
        if !self.test(wire) {
            // SAFETY: the request is active.
            unsafe {
                ffi::MPI_Cancel(&mut self.request);
                ffi::MPI_Wait(&mut self.request, ffi::RSMPI_STATUS_IGNORE);
            }
            self.landed = true;
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            std::mem::forget(self.buffer.take());
        }
    }
}
