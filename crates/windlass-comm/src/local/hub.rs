//! Where ranks meet: requests are compared, late and lost ranks are named.
//!
//! It moves no data. What is lent at a meeting is read by [`super::lend`], which trusts two promises made here:
//! [`Hub::arrive`] succeeds for all ranks or for none, and only with requests that fit each other; [`Hub::pass`]
//! returns when every rank has called it, and never before.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::lend::Lent;
use crate::error::{Error, Result};
use crate::request::{Call, Request};

/// Rounds of waiting in place before a thread sleeps: some microseconds. There may be more ranks than cores.
const SPINS: usize = 200;

/// The meeting place of a world.
pub struct Hub {
    timeout: Duration,
    board: Mutex<Board>,
    changed: Condvar,
    /// The board's count of meetings and whether it is broken, to be read without its lock.
    meetings: AtomicU64,
    broken: AtomicBool,
}

struct Board {
    /// Meetings that all ranks came to.
    meetings: u64,
    here: Vec<bool>,
    places: Vec<Place>,
    broken: Option<Break>,
}

/// What a rank brought to a meeting.
struct Place {
    call: Call,
    lent: Lent,
}

/// Why there will be no further meeting.
enum Break {
    Timeout { missing: Vec<usize>, during: Call },
    Lost { rank: usize, how: &'static str },
    Mismatch(Error),
    Aborted { rank: usize, why: String },
}

impl Hub {
    pub fn new(size: usize, timeout: Duration) -> Self {
        let place = || Place {
            call: Call::new(),
            lent: Lent::nothing(),
        };
        Self {
            timeout,
            board: Mutex::new(Board {
                meetings: 0,
                here: vec![false; size],
                places: (0..size).map(|_| place()).collect(),
                broken: None,
            }),
            changed: Condvar::new(),
            meetings: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// Waits until all ranks have come with requests that fit.
    pub fn arrive(&self, rank: usize, request: &Request<'_>, lent: Lent) -> Result<()> {
        let mut board = self.lock();
        if let Some(reason) = &board.broken {
            return Err(reason.error(request, self.timeout));
        }
        board.places[rank].call.set(request);
        board.places[rank].lent = lent;
        if let Some(error) = board.misfit(rank) {
            return Err(self.fail(&mut board, Break::Mismatch(error), request));
        }
        let before = board.meetings;
        if self.enter(&mut board, rank) {
            return Ok(());
        }
        drop(board);
        let deadline = Instant::now() + self.timeout;
        if self.spin(before) {
            return Ok(());
        }
        let mut board = self.lock();
        loop {
            // A meeting that took place counts, even if the world broke afterwards: the others act on it.
            if board.meetings != before {
                return Ok(());
            }
            if let Some(reason) = &board.broken {
                return Err(reason.error(request, self.timeout));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = (0..board.here.len()).filter(|&rank| !board.here[rank]);
                let reason = Break::Timeout {
                    missing: missing.collect(),
                    during: board.places[rank].call.clone(),
                };
                return Err(self.fail(&mut board, reason, request));
            }
            let waited = self.changed.wait_timeout(board, left);
            board = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all ranks have come here, whatever else happens: they are reading each other's memory.
    pub fn pass(&self, rank: usize) {
        let mut board = self.lock();
        let before = board.meetings;
        if self.enter(&mut board, rank) {
            return;
        }
        drop(board);
        if self.spin(before) {
            return;
        }
        let mut board = self.lock();
        while board.meetings == before {
            let waited = self.changed.wait(board);
            board = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What the ranks brought to the meeting that this rank is in.
    pub fn brought<R>(&self, mut view: impl FnMut(&Call, Lent) -> R) -> Vec<R> {
        let board = self.lock();
        let places = board.places.iter();
        places.map(|place| view(&place.call, place.lent)).collect()
    }

    /// Stops the world.
    pub fn abort(&self, rank: usize, why: &str) {
        let why = why.to_owned();
        self.break_up(&mut self.lock(), Break::Aborted { rank, why });
    }

    /// A rank will come to no further meeting.
    pub fn leave(&self, rank: usize, how: &'static str) {
        self.break_up(&mut self.lock(), Break::Lost { rank, how });
    }

    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks a rank as here; the last one opens the way for all.
    fn enter(&self, board: &mut Board, rank: usize) -> bool {
        board.here[rank] = true;
        if !board.here.iter().all(|&here| here) {
            return false;
        }
        board.here.fill(false);
        board.meetings += 1;
        self.meetings.store(board.meetings, Ordering::Release);
        self.changed.notify_all();
        true
    }

    /// Waits in place for a short while; true when the meeting took place.
    fn spin(&self, before: u64) -> bool {
        for _ in 0..SPINS {
            if self.meetings.load(Ordering::Acquire) != before {
                return true;
            }
            if self.broken.load(Ordering::Relaxed) {
                return false;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn fail(&self, board: &mut Board, reason: Break, request: &Request<'_>) -> Error {
        let error = reason.error(request, self.timeout);
        self.break_up(board, reason);
        error
    }

    /// The first reason stays: later ones follow from it.
    fn break_up(&self, board: &mut Board, reason: Break) {
        board.broken.get_or_insert(reason);
        self.broken.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }
}

impl Board {
    /// Compares what a rank brought with what lies there already.
    fn misfit(&self, rank: usize) -> Option<Error> {
        let call = &self.places[rank].call;
        let mut others = (0..self.here.len()).filter(|&other| self.here[other]);
        let other = others.find(|&other| !call.fits(rank, &self.places[other].call, other))?;
        let named = |rank: usize| (rank, self.places[rank].call.to_string());
        Some(Error::Mismatch {
            first: named(rank.min(other)),
            second: named(rank.max(other)),
        })
    }
}

impl Break {
    /// The error of a rank that is in, or now asks for, a collective.
    fn error(&self, request: &Request<'_>, timeout: Duration) -> Error {
        match self {
            Break::Timeout { missing, during } => Error::Timeout {
                collective: during.collective,
                tag: during.tag.clone(),
                missing: missing.clone(),
                waited: timeout,
            },
            Break::Lost { rank, how } => Error::Lost {
                collective: request.collective,
                tag: request.tag.to_owned(),
                rank: *rank,
                how,
            },
            Break::Mismatch(error) => error.clone(),
            Break::Aborted { rank, why } => Error::Aborted {
                rank: *rank,
                why: why.clone(),
            },
        }
    }
}
