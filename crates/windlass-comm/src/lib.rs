//! Process groups and collectives.
//!
//! A [`Group`] is one rank's handle on its world. The transports give the same bits: a reduction is a sum in rank order,
//! whoever carries the numbers. Every collective counts what its rank sends ([`Traffic`]), and none waits for ever: a
//! rank that is late, lost or in another collective is named in the [`Error`] of all the others.
//!
//! It does not start ranks, and it does not choose what to send when: that is the caller's.

mod datum;
mod error;
mod fold;
mod group;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod request;
mod traffic;

pub use datum::{Datum, Element, Real};
pub use error::{Error, Result};
pub use group::{Group, balanced};
pub use request::Collective;
pub use traffic::{Traffic, Volume};
