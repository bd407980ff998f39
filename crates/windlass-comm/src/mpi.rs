//! The transport between processes, of one host or several: point-to-point messages over MPI.
//!
//! The library's own reductions are not used: their order of summation is its own. Pieces are exchanged and summed in
//! rank order, as between threads, so the bits are the same. Before data flows, all ranks tell each other their call
//! ([`header`]); then chunks of a limited size are under way in both directions ([`exchange`]). Whoever waits looks at
//! the clock and listens for a rank's last word.

mod cargo;
mod exchange;
mod header;
mod wire;

use std::cell::RefCell;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::datum::{Datum, Element, Real};
use crate::error::{Error, Result};
use crate::request::{Call, Collective, Extent, Request};
use cargo::{Places, Sums, SumsInPlace};
use header::Header;
use wire::{Buffer, Channel, Flight, Wire, bytes_of, bytes_of_mut};

/// How long a rank that stops tries to tell the others.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Bytes of a last word.
const NOTE_BYTES: usize = 1024;

/// One rank: this process.
pub struct World {
    wire: Wire,
    timeout: Duration,
    /// Memory of messages that have landed.
    pool: RefCell<Vec<Buffer>>,
    /// The last word of any other rank, listened for at all times.
    note: RefCell<Option<Flight>>,
    /// The first failure: it is that of all later collectives.
    broken: RefCell<Option<Error>>,
}

impl World {
    /// Joins the job.
    pub fn join(timeout: Duration) -> Result<Self> {
        let wire = Wire::start()?;
        let note = wire.receive(None, Channel::Note, Buffer::new(NOTE_BYTES));
        Ok(Self {
            wire,
            timeout,
            pool: RefCell::default(),
            note: RefCell::new(Some(note)),
            broken: RefCell::default(),
        })
    }

    pub fn rank(&self) -> usize {
        self.wire.rank()
    }

    pub fn size(&self) -> usize {
        self.wire.size()
    }

    /// Waits for all ranks.
    pub fn barrier(&self, request: &Request<'_>) -> Result<()> {
        self.guarded(|| self.meet(request))
    }

    pub fn all_gather<T: Datum>(
        &self,
        request: &Request<'_>,
        shards: &[Range<usize>],
        data: &mut [T],
    ) -> Result<()> {
        let shards: Vec<_> = shards.iter().map(in_bytes::<T>).collect();
        let sends = vec![shards[self.rank()].clone(); self.size()];
        let data = bytes_of_mut(data);
        self.run(request, &mut Places::in_place(data, sends, shards))
    }

    pub fn reduce_scatter<T: Real>(
        &self,
        request: &Request<'_>,
        shards: &[Range<usize>],
        data: &[T],
        out: &mut [T::Sum],
        accumulate: bool,
    ) -> Result<()> {
        let rank = self.rank();
        let mut sums = Sums {
            rank,
            shards,
            data,
            out,
            accumulate,
        };
        self.run(request, &mut sums)
    }

    pub fn all_reduce<T: Real<Sum = T>>(
        &self,
        request: &Request<'_>,
        shards: &[Range<usize>],
        data: &mut [T],
    ) -> Result<()> {
        let mut sums = SumsInPlace {
            rank: self.rank(),
            shards,
            data: &mut *data,
            sum: Vec::new(),
        };
        self.run(request, &mut sums)?;
        self.all_gather(request, shards, data)
    }

    pub fn broadcast<T: Datum>(
        &self,
        request: &Request<'_>,
        root: usize,
        data: &mut [T],
    ) -> Result<()> {
        let data = bytes_of_mut(data);
        let whole_if = |is: bool| if is { 0..data.len() } else { 0..0 };
        let sends = vec![whole_if(self.rank() == root); self.size()];
        let ranks = 0..self.size();
        let receives = ranks.map(|rank| whole_if(rank == root)).collect();
        self.run(request, &mut Places::in_place(data, sends, receives))
    }

    pub fn all_to_all<T: Datum>(
        &self,
        request: &Request<'_>,
        send: &[T],
        send_counts: &[usize],
        recv: &mut [T],
        recv_counts: &[usize],
    ) -> Result<()> {
        let pieces = |counts: &[usize]| {
            let mut end = 0;
            let pieces = counts.iter().map(|count| {
                end += count;
                in_bytes::<T>(&(end - count..end))
            });
            pieces.collect::<Vec<_>>()
        };
        let (sends, receives) = (pieces(send_counts), pieces(recv_counts));
        let (send, recv) = (bytes_of(send), bytes_of_mut(recv));
        let rank = self.rank();
        recv[receives[rank].clone()].copy_from_slice(&send[sends[rank].clone()]);
        self.run(request, &mut Places::apart(send, recv, sends, receives))
    }

    pub fn collect<T: Datum>(&self, request: &Request<'_>, value: &[T]) -> Result<Vec<T>> {
        let length = value.len();
        let place = |rank: usize| rank * length..(rank + 1) * length;
        let mut all = vec![T::default(); length * self.size()];
        all[place(self.rank())].copy_from_slice(value);
        let ranks = 0..self.size();
        let receives = ranks.map(|rank| in_bytes::<T>(&place(rank))).collect();
        let sends = vec![0..size_of_val(value); self.size()];
        let (value, to) = (bytes_of(value), bytes_of_mut(&mut all));
        self.run(request, &mut Places::apart(value, to, sends, receives))?;
        Ok(all)
    }

    /// Tells all ranks that this one stops, and why; for a moment, if they do not listen.
    pub fn abort(&self, why: &str) {
        let rank = self.rank();
        let why = why[..why.floor_char_boundary(NOTE_BYTES - 12)].to_owned();
        let notes = self.others().map(|other| {
            let mut note = Buffer::new(NOTE_BYTES);
            let bytes = note.bytes_mut();
            bytes[..8].copy_from_slice(&(rank as u64).to_le_bytes());
            bytes[8..12].copy_from_slice(&(why.len() as u32).to_le_bytes());
            bytes[12..12 + why.len()].copy_from_slice(why.as_bytes());
            self.wire.send(other, Channel::Note, note)
        });
        let mut notes: Vec<_> = notes.collect();
        let deadline = Instant::now() + LAST_WORD;
        while !self.landed(&mut notes) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let error = Error::Aborted { rank, why };
        self.broken.borrow_mut().get_or_insert(error);
    }

    /// Ends all processes of the job.
    pub fn end_job(&self, code: i32) {
        self.wire.end_job(code);
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank();
        (0..self.size()).filter(move |&other| other != rank)
    }

    /// Whether all messages have landed; it lets the library work on each.
    fn landed(&self, flights: &mut [Flight]) -> bool {
        let tested = flights.iter_mut().map(|flight| flight.test(&self.wire));
        tested.fold(true, |all, landed| all & landed)
    }

    /// Runs a collective unless one has failed before.
    fn guarded<R>(&self, run: impl FnOnce() -> Result<R>) -> Result<R> {
        if let Some(error) = &*self.broken.borrow() {
            return Err(error.clone());
        }
        let result = run();
        if let Err(error) = &result {
            self.broken.borrow_mut().get_or_insert(error.clone());
        }
        result
    }

    fn run(&self, request: &Request<'_>, cargo: &mut impl cargo::Cargo) -> Result<()> {
        self.guarded(|| {
            self.meet(request)?;
            self.exchange(request, cargo)
        })
    }

    /// Exchanges calls with all ranks and compares them.
    fn meet(&self, request: &Request<'_>) -> Result<()> {
        let mut call = Call::new();
        call.set(request);
        call.tag.truncate(header::cut(request.tag).len());
        let own = Header::Call(call.clone());
        for (other, header) in self.tell(&own, request, self.timeout)? {
            match header {
                Some(Header::Call(theirs)) if call.fits(self.rank(), &theirs, other) => {}
                Some(Header::Call(theirs)) => {
                    let mut named = [(self.rank(), call.to_string()), (other, theirs.to_string())];
                    named.sort();
                    let [first, second] = named;
                    return Err(Error::Mismatch { first, second });
                }
                Some(Header::Leaving { panicked }) => {
                    return Err(Error::Lost {
                        collective: request.collective,
                        tag: request.tag.to_owned(),
                        rank: other,
                        how: how_it_left(panicked),
                    });
                }
                None => {
                    return Err(Error::Mpi {
                        problem: format!("rank {other} runs another version of this program"),
                    });
                }
            }
        }
        Ok(())
    }

    /// Sends a header to all ranks and awaits theirs.
    fn tell(
        &self,
        header: &Header,
        request: &Request<'_>,
        timeout: Duration,
    ) -> Result<Vec<(usize, Option<Header>)>> {
        let capacity = header::capacity(self.size());
        let receives = self.others().map(|other| {
            let buffer = self.buffer(capacity);
            (
                other,
                self.wire.receive(Some(other), Channel::Header, buffer),
            )
        });
        let mut receives: Vec<_> = receives.collect();
        let sends = self.others().map(|other| {
            let mut buffer = self.buffer(capacity);
            let length = header.write(buffer.bytes_mut());
            buffer.resize(length);
            (other, self.wire.send(other, Channel::Header, buffer))
        });
        let mut sends: Vec<_> = sends.collect();
        self.wait(request, timeout, &mut receives, &mut sends)?;
        self.recycle(sends);
        let heard = receives.into_iter().map(|(other, flight)| {
            let buffer = flight.into_buffer();
            let header = Header::read(buffer.bytes());
            self.pool.borrow_mut().push(buffer);
            (other, header)
        });
        Ok(heard.collect())
    }
}

impl Drop for World {
    /// Leaves in step with the others if nothing has failed. Otherwise the library is left as it is: the launcher ends
    /// a job in which a process ends without having shut it down.
    fn drop(&mut self) {
        let panicked = std::thread::panicking();
        if self.broken.borrow().is_none() && self.leave(panicked) {
            if let Some(note) = self.note.take() {
                note.cancel(&self.wire);
            }
        } else {
            self.wire.forget();
        }
    }
}

impl World {
    /// Tells all ranks that this one leaves; true when all of them do.
    fn leave(&self, panicked: bool) -> bool {
        let request = Request {
            collective: Collective::Barrier,
            element: Element::U8,
            tag: "end",
            extent: Extent::Length(0),
        };
        let timeout = if panicked { LAST_WORD } else { self.timeout };
        let heard = self.tell(&Header::Leaving { panicked }, &request, timeout);
        let leaves = |(_, header): &(usize, _)| matches!(header, Some(Header::Leaving { .. }));
        !panicked && heard.is_ok_and(|heard| heard.iter().all(leaves))
    }
}

/// What is known of a rank's end, in the words of all transports.
fn how_it_left(panicked: bool) -> &'static str {
    if panicked {
        crate::local::PANICKED
    } else {
        crate::local::LEFT
    }
}

fn in_bytes<T>(range: &Range<usize>) -> Range<usize> {
    range.start * size_of::<T>()..range.end * size_of::<T>()
}
