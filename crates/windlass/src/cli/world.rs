//! The ranks of a job: threads of this process.

use super::{Machine, usage};
use anyhow::{Error, Result, anyhow};
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use windlass::comm::Group;
use windlass::tensor::Cpu;

/// Flags about ranks.
#[derive(clap::Args, Clone, Debug)]
pub struct World {
    /// Ranks that train together, as threads of this process
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub ranks: usize,
    /// Seconds that ranks wait for one another before the job ends with the name of the one that is missing
    #[arg(long, value_name = "SECONDS", default_value_t = 1800.0)]
    pub timeout: f64,
}

impl World {
    /// Runs `job` on every rank, each with its share of the machine's threads, and gives the first rank's result, or
    /// the error that brought the others down.
    pub fn run<T: Send>(
        &self,
        machine: &Machine,
        job: impl Fn(Group, Cpu) -> Result<T> + Sync,
    ) -> Result<T> {
        if self.ranks == 0 || self.ranks > 1024 {
            return Err(usage(
                format!("--ranks {}", self.ranks),
                "give a number from 1 to 1024",
            ));
        }
        let timeout = Duration::try_from_secs_f64(self.timeout)
            .ok()
            .filter(|t| !t.is_zero())
            .ok_or_else(|| {
                usage(
                    format!("--timeout {}", self.timeout),
                    "give seconds above 0",
                )
            })?;
        let threads = machine.cpu_threads()?;
        if self.ranks == 1 {
            return job(Group::solo(), Cpu::new(threads));
        }
        // Each rank has whole threads of its own; what does not divide evenly is left idle.
        let share = (threads / self.ranks).max(1);
        let results = std::thread::scope(|scope| {
            let ranks: Vec<_> = Group::local(self.ranks, timeout)
                .into_iter()
                .map(|group| scope.spawn(|| rank(group, share, &job)))
                .collect();
            let join = |rank: std::thread::ScopedJoinHandle<'_, Result<T>>| {
                rank.join()
                    .unwrap_or_else(|_| Err(anyhow!("a rank's thread died")))
            };
            ranks.into_iter().map(join).collect::<Vec<_>>()
        });
        first(results)
    }
}

/// One rank: a panic becomes an error, and the group learns of it before the thread ends.
fn rank<T>(group: Group, threads: usize, job: &impl Fn(Group, Cpu) -> Result<T>) -> Result<T> {
    let rank = group.rank();
    let run = AssertUnwindSafe(|| job(group, Cpu::new(threads)));
    std::panic::catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("rank {rank}: {}", text.unwrap_or("panicked")))
    })
}

/// The first rank's result; or an error, one that is a cause rather than a consequence where there is one.
fn first<T>(results: Vec<Result<T>>) -> Result<T> {
    let mut value = None;
    let mut error: Option<Error> = None;
    for (rank, result) in results.into_iter().enumerate() {
        match result {
            Ok(done) if rank == 0 => value = Some(done),
            Ok(_) => {}
            Err(e) => {
                let consequence = |e: &Error| {
                    e.chain().any(|cause| {
                        cause.is::<windlass::comm::Error>()
                            || matches!(
                                cause.downcast_ref(),
                                Some(windlass::train::Error::Peer { .. })
                            )
                    })
                };
                if error
                    .as_ref()
                    .is_none_or(|known| consequence(known) && !consequence(&e))
                {
                    error = Some(e);
                }
            }
        }
    }
    match (error, value) {
        (Some(error), _) => Err(error),
        (None, Some(value)) => Ok(value),
        (None, None) => Err(anyhow!("the first rank gave no result")),
    }
}
