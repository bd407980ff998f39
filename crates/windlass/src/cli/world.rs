//! The ranks of a job: threads of this process, or processes that an MPI launcher has started.

#[cfg(not(feature = "mpi"))]
use super::failure;
use super::{Machine, usage};
use anyhow::{Context, Error, Result, anyhow};
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use windlass::comm::Group;
use windlass::tensor::Cpu;

/// How long a process whose job was ended by another rank waits before it ends: so long that rank can say why.
const MOURNING: Duration = Duration::from_secs(1);

/// Flags about ranks.
#[derive(clap::Args, Clone, Debug)]
pub struct World {
    /// Ranks that train together, as threads of this process [default: 1, or the processes of an MPI job]
    #[arg(long, value_name = "N")]
    pub ranks: Option<usize>,
    /// Seconds that ranks wait for one another before the job ends with the name of the one that is missing
    #[arg(long, value_name = "SECONDS", default_value_t = 1800.0)]
    pub timeout: f64,
}

/// The ranks of a job.
pub enum Ranks {
    /// Threads of this process, and how long they wait for one another.
    Threads(usize, Duration),
    /// This process and others.
    Process(Box<Group>),
}

impl World {
    /// The ranks that the flags ask for, or those of the MPI job that this process belongs to.
    ///
    /// # Errors
    /// On impossible numbers, and if the program was built without MPI.
    pub fn join(&self) -> Result<Ranks> {
        let timeout = Duration::try_from_secs_f64(self.timeout)
            .ok()
            .filter(|t| !t.is_zero())
            .ok_or_else(|| {
                usage(
                    format!("--timeout {}", self.timeout),
                    "give seconds above 0",
                )
            })?;
        if let Some(processes) = launched() {
            if self.ranks.is_some_and(|ranks| ranks != processes) {
                return Err(usage(
                    format!(
                        "--ranks {} in an MPI job of {processes}",
                        self.ranks.unwrap_or(1)
                    ),
                    "leave --ranks out: its processes are the ranks",
                ));
            }
            let group = over_mpi(timeout)?;
            if group.rank() > 0 {
                windlass::progress::hush();
            }
            return Ok(Ranks::Process(Box::new(group)));
        }
        let ranks = self.ranks.unwrap_or(1);
        if ranks == 0 || ranks > 1024 {
            return Err(usage(
                format!("--ranks {ranks}"),
                "give a number from 1 to 1024",
            ));
        }
        Ok(Ranks::Threads(ranks, timeout))
    }
}

/// The number of processes of the MPI job that this one belongs to, if it does.
fn launched() -> Option<usize> {
    // Open MPI; MPICH and Slurm with its own interface; Slurm with PMIx.
    let slurm = std::env::var_os("PMIX_RANK").and_then(|_| number("SLURM_STEP_NUM_TASKS"));
    number("OMPI_COMM_WORLD_SIZE")
        .or(number("PMI_SIZE"))
        .or(slurm)
}

/// A number in the environment.
fn number(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}

/// What the launchers call this process's place among those of its host.
fn place_on_host() -> usize {
    let names = [
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "SLURM_LOCALID",
    ];
    names.into_iter().find_map(number).unwrap_or(0)
}

/// What the launchers say of the number of processes on this host.
fn processes_on_host() -> usize {
    let names = [
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "SLURM_NTASKS_PER_NODE",
    ];
    names.into_iter().find_map(number).unwrap_or(1).max(1)
}

#[cfg(feature = "mpi")]
fn over_mpi(timeout: Duration) -> Result<Group> {
    Ok(Group::mpi(timeout)?)
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(_: Duration) -> Result<Group> {
    Err(failure(
        "an MPI launcher started this process, but the program was built without MPI",
        "build it with --features mpi, or start it without the launcher: --ranks N are threads",
    ))
}

impl Ranks {
    /// How many share this machine's memory.
    pub fn here(&self) -> usize {
        match self {
            Ranks::Threads(ranks, _) => *ranks,
            Ranks::Process(_) => processes_on_host(),
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Ranks::Threads(ranks, _) => *ranks,
            Ranks::Process(group) => group.size(),
        }
    }

    /// Prepares files that all ranks use: the first process, then the first of each other host, then the rest, which
    /// find them. Every process needs what this returns.
    ///
    /// # Errors
    /// Those of the preparation, or if another process's failed.
    pub fn prepare<T>(&self, prepare: impl FnOnce() -> Result<T>) -> Result<T> {
        let Ranks::Process(group) = self else {
            return prepare();
        };
        let turn = match (group.rank(), place_on_host()) {
            (0, _) => 0,
            (_, 0) => 1,
            _ => 2,
        };
        for _ in 0..turn {
            group.barrier("preparation")?;
        }
        let prepared = prepare().with_context(|| format!("rank {}", group.rank()))?;
        for _ in turn..3 {
            group.barrier("preparation")?;
        }
        Ok(prepared)
    }

    /// Runs `job` on every rank, each with its share of the machine's threads. Gives the first rank's result, or that
    /// of this process, or the error that brought the others down.
    pub fn run<T: Send>(
        self,
        machine: &Machine,
        job: impl Fn(Group, Cpu) -> Result<T> + Sync,
    ) -> Result<T> {
        let threads = machine.cpu_threads()?;
        let (ranks, timeout) = match self {
            Ranks::Threads(ranks, timeout) => (ranks, timeout),
            Ranks::Process(group) => return process(*group, threads, &job),
        };
        if ranks == 1 {
            return job(Group::solo(), Cpu::new(threads));
        }
        // Each rank has whole threads of its own; what does not divide evenly is left idle.
        let share = (threads / ranks).max(1);
        let results = std::thread::scope(|scope| {
            let ranks: Vec<_> = Group::local(ranks, timeout)
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

/// The rank that this process is. A launcher ends a job when the first process fails: one that failed because of
/// another waits a moment, so that the cause is heard.
fn process<T>(group: Group, threads: usize, job: &impl Fn(Group, Cpu) -> Result<T>) -> Result<T> {
    let here = processes_on_host();
    // Cores that the launcher has bound this process to are its own; others it shares.
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let bound = all_cores().is_some_and(|all| cores * here <= all);
    let share = if bound && threads <= cores {
        threads
    } else {
        (threads / here).max(1)
    };
    let name = format!("rank {}", group.rank());
    rank(group, share, job).map_err(|error| {
        if is_consequence(&error) {
            std::thread::sleep(MOURNING);
        }
        error.context(name)
    })
}

/// The cores of this host, whatever this process is bound to.
fn all_cores() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    Some(
        text.lines()
            .filter(|line| line.starts_with("processor"))
            .count(),
    )
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
                if error
                    .as_ref()
                    .is_none_or(|known| is_consequence(known) && !is_consequence(&e))
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

/// Whether an error tells of another rank's.
fn is_consequence(error: &Error) -> bool {
    error.chain().any(|cause| {
        let peer = matches!(
            cause.downcast_ref(),
            Some(windlass::train::Error::Peer { .. })
        );
        peer || cause.is::<windlass::comm::Error>()
    })
}
