//! Chunks under way in both directions, a limited number of them, and the wait for what is missing.

use std::time::{Duration, Instant};

use super::World;
use super::cargo::Cargo;
use super::wire::{Buffer, Channel, Flight};
use crate::error::{Error, Result};
use crate::request::Request;

/// Chunks that are under way with each rank while one is worked on.
const AHEAD: usize = 2;

/// Bytes that are under way at most, each way, with all ranks together; but no chunk is smaller than the second number
/// or larger than the third.
const UNDER_WAY: (usize, usize, usize) = (8 << 20, 64 << 10, 1 << 20);

/// Looks at messages before a wait gives the core to others.
const EAGER: u32 = 100;

/// Looks at messages before it sleeps between them.
const PATIENT: u32 = 2000;

/// How long it sleeps.
const NAP: Duration = Duration::from_micros(50);

type Flights = Vec<(usize, Flight)>;

/// What is under way from one position on.
#[derive(Default)]
struct Stage {
    receives: Flights,
    sends: Flights,
}

impl World {
    /// Sends and receives all of a cargo.
    pub(super) fn exchange(&self, request: &Request<'_>, cargo: &mut impl Cargo) -> Result<()> {
        let chunk = self.chunk();
        let longest = self
            .others()
            .map(|other| cargo.outgoing(other).max(cargo.incoming(other)));
        let longest = longest.max().unwrap_or(0);
        let steps = longest.div_ceil(chunk);
        let mut stages: Vec<Stage> = Vec::new();
        stages.resize_with(AHEAD, Stage::default);
        for step in 0..steps.min(AHEAD) {
            stages[step % AHEAD] = self.start(cargo, step * chunk);
        }
        for step in 0..steps {
            let Stage {
                mut receives,
                mut sends,
            } = std::mem::take(&mut stages[step % AHEAD]);
            self.wait(request, self.timeout, &mut receives, &mut sends)?;
            if !receives.is_empty() {
                let mut chunks: Vec<Option<Buffer>> = Vec::new();
                chunks.resize_with(self.size(), || None);
                for (other, flight) in receives {
                    chunks[other] = Some(flight.into_buffer());
                }
                cargo.unload(step * chunk, &chunks);
                self.pool.borrow_mut().extend(chunks.into_iter().flatten());
            }
            self.recycle(sends);
            if step + AHEAD < steps {
                stages[step % AHEAD] = self.start(cargo, (step + AHEAD) * chunk);
            }
        }
        // A world of one exchanges nothing, but sums are due.
        if self.size() == 1 {
            cargo.unload(0, &[None]);
        }
        Ok(())
    }

    /// Sends chunks from a position on and asks for those of the others.
    fn start(&self, cargo: &impl Cargo, at: usize) -> Stage {
        let mut stage = Stage::default();
        for other in self.others() {
            let length = cargo.incoming(other).saturating_sub(at).min(self.chunk());
            if length > 0 {
                let buffer = self.buffer(length);
                let flight = self.wire.receive(Some(other), Channel::Data, buffer);
                stage.receives.push((other, flight));
            }
        }
        for other in self.others() {
            let length = cargo.outgoing(other).saturating_sub(at).min(self.chunk());
            if length > 0 {
                let mut buffer = self.buffer(length);
                cargo.load(other, at..at + length, buffer.bytes_mut());
                let flight = self.wire.send(other, Channel::Data, buffer);
                stage.sends.push((other, flight));
            }
        }
        stage
    }

    /// Waits until all of these have landed.
    pub(super) fn wait(
        &self,
        request: &Request<'_>,
        timeout: Duration,
        receives: &mut Flights,
        sends: &mut Flights,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut looks = 0;
        loop {
            let mut missing = self.missing(receives);
            let unsent = self.missing(sends);
            if missing.is_empty() {
                missing = unsent;
            }
            if missing.is_empty() {
                return Ok(());
            }
            looks += 1;
            if looks < EAGER {
                continue;
            }
            self.listen()?;
            if Instant::now() > deadline {
                return Err(Error::Timeout {
                    collective: request.collective,
                    tag: request.tag.to_owned(),
                    missing,
                    waited: timeout,
                });
            }
            // There may be more ranks than cores.
            match looks < PATIENT {
                true => std::thread::yield_now(),
                false => std::thread::sleep(NAP),
            }
        }
    }

    /// The ranks whose messages have not landed.
    fn missing(&self, flights: &mut Flights) -> Vec<usize> {
        let mut missing = Vec::new();
        for (other, flight) in flights {
            if !flight.test(&self.wire) {
                missing.push(*other);
            }
        }
        missing
    }

    /// Fails if a rank has said its last word.
    fn listen(&self) -> Result<()> {
        let mut slot = self.note.borrow_mut();
        let Some(mut note) = slot.take() else {
            return Ok(());
        };
        if !note.test(&self.wire) {
            *slot = Some(note);
            return Ok(());
        }
        let note = note.into_buffer();
        let (rank, rest) = note
            .bytes()
            .split_first_chunk()
            .expect("notes have one length");
        let (length, text) = rest.split_first_chunk().expect("notes have one length");
        let text = text.get(..u32::from_le_bytes(*length) as usize);
        Err(Error::Aborted {
            rank: u64::from_le_bytes(*rank) as usize,
            why: String::from_utf8_lossy(text.unwrap_or_default()).into_owned(),
        })
    }

    /// Bytes of a chunk: the same on all ranks, and a multiple of every datum's.
    fn chunk(&self) -> usize {
        let (all, least, most) = UNDER_WAY;
        (all / AHEAD / self.size().next_power_of_two()).clamp(least, most)
    }

    /// Memory for a message of so many bytes.
    pub(super) fn buffer(&self, length: usize) -> Buffer {
        let capacity = self.chunk().max(super::header::capacity(self.size()));
        let pooled = self.pool.borrow_mut().pop();
        let mut buffer = pooled.unwrap_or_else(|| Buffer::new(capacity));
        buffer.resize(length);
        buffer
    }

    /// Keeps the memory of messages that have landed.
    pub(super) fn recycle(&self, flights: Flights) {
        let buffers = flights.into_iter().map(|(_, flight)| flight.into_buffer());
        self.pool.borrow_mut().extend(buffers);
    }
}
