//! What can go wrong between ranks, and what the user can do about it.

use std::time::Duration;

use crate::request::Collective;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failed collective. After any but [`Error::Disagree`] the group is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Ranks did not come to a collective in time.
    #[error(
        "{collective} '{tag}': {} did not arrive within {waited:?}",
        ranks(missing)
    )]
    Timeout {
        /// What the others wait in.
        collective: Collective,
        /// What it is for.
        tag: String,
        /// The ranks that are not there.
        missing: Vec<usize>,
        /// How long the others waited.
        waited: Duration,
    },
    /// A rank is gone: it gave up its group, returned or panicked.
    #[error("{collective} '{tag}': rank {rank} is gone ({how})")]
    Lost {
        /// What this rank was in.
        collective: Collective,
        /// What it is for.
        tag: String,
        /// The rank that is gone.
        rank: usize,
        /// What is known of its end.
        how: &'static str,
    },
    /// Two ranks are in different collectives.
    #[error("ranks do not do the same: rank {} is in {}, rank {} in {}", first.0, first.1, second.0, second.1)]
    Mismatch {
        /// A rank and its call.
        first: (usize, String),
        /// Another rank and its call.
        second: (usize, String),
    },
    /// A rank called [`Group::abort`](crate::Group::abort).
    #[error("rank {rank} stopped the job: {why}")]
    Aborted {
        /// The rank that stopped it.
        rank: usize,
        /// Its reason.
        why: String,
    },
    /// Ranks have different values of something that must be the same everywhere.
    #[error("ranks disagree on {what}: {} from rank 0", differ(ranks))]
    Disagree {
        /// What is compared.
        what: String,
        /// The ranks whose value is not that of rank 0.
        ranks: Vec<usize>,
    },
    /// The MPI library cannot be used.
    #[error("MPI: {problem}")]
    Mpi {
        /// Why not.
        problem: String,
    },
}

impl Error {
    /// What the user can do, where something can be said beyond the message.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Error::Timeout { .. } => {
                "the rank hangs, is much slower, or its host is away: see its log; the timeout may be too short"
            }
            Error::Lost { .. } => "see the log of that rank for the cause",
            Error::Mismatch { .. } => {
                "ranks run different programs, configurations or data: start all of them the same way"
            }
            Error::Aborted { .. } => return None,
            Error::Disagree { .. } => {
                "start every rank with the same program, configuration, model and checkpoint"
            }
            Error::Mpi { .. } => {
                "start the program with the mpirun of the library it was built with"
            }
        };
        Some(text.to_owned())
    }
}

fn ranks(list: &[usize]) -> String {
    let names: Vec<String> = list.iter().map(usize::to_string).collect();
    let word = if list.len() == 1 { "rank" } else { "ranks" };
    format!("{word} {}", names.join(", "))
}

fn differ(list: &[usize]) -> String {
    let verb = if list.len() == 1 { "differs" } else { "differ" };
    format!("{} {verb}", ranks(list))
}
