//! `windlass launch`: starts ranks on one host or many through mpirun, mpiexec or srun, cores bound to each, and starts
//! a training that failed again from its last checkpoint.

mod command;
mod hosts;

use super::{failure, usage};
use anyhow::Result;
use clap::Parser;
use command::{CommandLine, Launcher, Plan};
use hosts::{Filter, Host};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use windlass::store::checkpoint::Checkpoints;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Hosts and their slots, one `host slots=N` a line, as DeepSpeed reads it [default: this machine]
    #[arg(short = 'H', long, value_name = "FILE")]
    hostfile: Option<PathBuf>,
    /// Only these hosts and slots: host1@host2:0,2
    #[arg(short, long, value_name = "SLOTS", conflicts_with_all = ["exclude", "num_nodes", "num_ranks"])]
    include: Option<String>,
    /// All but these hosts and slots
    #[arg(short, long, value_name = "SLOTS", conflicts_with_all = ["num_nodes", "num_ranks"])]
    exclude: Option<String>,
    /// Only the first N hosts
    #[arg(long, alias = "num_nodes", value_name = "N")]
    num_nodes: Option<usize>,
    /// Only the first N slots of each host; without a hostfile, the number of ranks
    #[arg(
        long,
        alias = "num_ranks",
        alias = "num_gpus",
        alias = "num-gpus",
        value_name = "N"
    )]
    num_ranks: Option<usize>,
    /// What starts the ranks
    #[arg(long, value_enum, default_value = "openmpi")]
    launcher: Launcher,
    /// Bind each rank to cores of its own: a number of them, or `none` [default: the cores of this machine divided by
    /// the slots of the largest host]
    #[arg(long, value_name = "CORES")]
    bind: Option<String>,
    /// Further words for the launcher, separated by spaces
    #[arg(
        long,
        alias = "launcher_args",
        value_name = "WORDS",
        allow_hyphen_values = true
    )]
    launcher_args: Option<String>,
    /// Start a training that fails again with --resume, up to N times
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_restarts: usize,
    /// Print what would be started, and where each rank would run
    #[arg(long)]
    dry_run: bool,
    /// The verb to run on every rank, and its flags
    #[arg(last = true, required = true, value_name = "VERB")]
    verb: Vec<String>,
}

/// Where DeepSpeed looks for a hostfile.
const DEFAULT_HOSTFILE: &str = "/job/hostfile";

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    // What every rank would refuse is refused once, before anything starts.
    let words = ["windlass".to_owned()].into_iter().chain(args.verb.clone());
    let verb = match crate::Cli::try_parse_from(words) {
        Ok(cli) => cli.command,
        Err(error) => error.exit(),
    };
    let run = match &verb {
        crate::Command::Train(train) => Some(Checkpoints::open(train.out())),
        crate::Command::Finetune(tune) => Some(Checkpoints::open(tune.out())),
        crate::Command::Launch(_) => {
            return Err(usage("launch cannot launch itself", "name the verb to run"));
        }
        _ => None,
    };
    if args.max_restarts > 0 && run.is_none() {
        return Err(usage(
            format!("--max-restarts: '{}' cannot be resumed", args.verb[0]),
            "`train` and `finetune` continue from a checkpoint; leave --max-restarts out",
        ));
    }
    let plan = args.plan()?;
    if args.dry_run {
        let command = plan.command(&rank_file_path())?;
        println!("{command}");
        plan.places().iter().for_each(|line| println!("{line}"));
        if let Some(file) = command.rank_file {
            println!("{}:\n{}", file.path, file.text.trim_end());
        }
        return Ok(());
    }
    let stopped = Arc::new(AtomicBool::new(false));
    // Ctrl-C reaches the launcher too, as one of the same group: what it does about it is awaited.
    let flag = stopped.clone();
    ctrlc::set_handler(move || flag.store(true, SeqCst))?;
    supervise(plan, args.max_restarts, run.as_ref(), &stopped)
}

/// Runs the command, again while it fails and restarts are left: with `--resume` once there is a checkpoint.
fn supervise(
    mut plan: Plan,
    max_restarts: usize,
    run: Option<&Checkpoints>,
    stopped: &AtomicBool,
) -> Result<()> {
    let mut restarts = 0;
    loop {
        let command = plan.command(&rank_file_path())?;
        eprintln!("launch: {command}");
        let Some(problem) = start(&command)? else {
            return Ok(());
        };
        if stopped.load(SeqCst) {
            let hint = "continue with the same command and --resume";
            return Err(failure("interrupted", hint));
        }
        if restarts == max_restarts {
            let restarted = match restarts {
                0 => String::new(),
                1 => ", after one restart".to_owned(),
                n => format!(", after {n} restarts"),
            };
            let hint = "the cause stands in the output of the ranks above";
            let message = format!("the job failed ({problem}){restarted}");
            return Err(failure(message, hint));
        }
        restarts += 1;
        let resumable = match run {
            Some(run) => !run.steps()?.is_empty(),
            None => false,
        };
        let how = if resumable {
            "with --resume"
        } else {
            "from the start: there is no checkpoint yet"
        };
        eprintln!("launch: the job failed ({problem}); restart {restarts} of {max_restarts} {how}");
        if resumable && !plan.program.iter().any(|word| word == "--resume") {
            plan.program.push("--resume".to_owned());
        }
    }
}

/// Runs the command to its end; what went wrong, if something did.
fn start(line: &CommandLine) -> Result<Option<String>> {
    if let Some(file) = &line.rank_file {
        std::fs::write(&file.path, &file.text).map_err(|error| {
            failure(format!("cannot write {}: {error}", file.path), "set TMPDIR")
        })?;
    }
    let ended = Command::new(&line.words[0]).args(&line.words[1..]).status();
    if let Some(file) = &line.rank_file {
        // It lies among temporary files; nothing depends on its absence.
        let _ = std::fs::remove_file(&file.path);
    }
    let status = ended.map_err(|error| {
        let hint =
            "install it (Debian: openmpi-bin, mpich or slurm-client) or choose another --launcher";
        failure(format!("cannot start {}: {error}", line.words[0]), hint)
    })?;
    Ok((!status.success()).then(|| status.to_string()))
}

fn rank_file_path() -> String {
    let name = format!("windlass-ranks-{}", std::process::id());
    std::env::temp_dir().join(name).display().to_string()
}

impl Args {
    fn plan(&self) -> Result<Plan> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let hosts = self.hosts(cores)?;
        let program = std::env::current_exe()?.display().to_string();
        let words = self
            .launcher_args
            .iter()
            .flat_map(|text| text.split_whitespace());
        let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let mut variables: Vec<String> = variables
            .filter(|name| name.starts_with("WINDLASS_") || name == "RUST_BACKTRACE")
            .collect();
        variables.sort();
        Ok(Plan {
            launcher: self.launcher,
            cores: self.cores(&hosts, cores)?,
            ranks: self.num_ranks.unwrap_or(1),
            hosts,
            // The owner of a process's entry is its effective user.
            root: std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0),
            variables,
            more: words.map(str::to_owned).collect(),
            program: [program]
                .into_iter()
                .chain(self.verb.iter().cloned())
                .collect(),
        })
    }

    /// The hosts and slots that the flags choose. None: those of Slurm's allocation.
    fn hosts(&self, cores: usize) -> Result<Vec<Host>> {
        let default = PathBuf::from(DEFAULT_HOSTFILE);
        let path = self
            .hostfile
            .clone()
            .or_else(|| default.exists().then_some(default));
        let Some(path) = path else {
            let filters = [
                ("--include", self.include.is_some()),
                ("--exclude", self.exclude.is_some()),
            ];
            if let Some((flag, _)) = filters.into_iter().find(|(_, given)| *given) {
                return Err(usage(
                    format!("{flag} without hosts to choose from"),
                    "give a --hostfile",
                ));
            }
            if self.launcher == Launcher::Slurm {
                return match (self.num_nodes, self.num_ranks) {
                    (None, Some(1..)) => Ok(Vec::new()),
                    _ => Err(usage(
                        "srun needs the number of ranks",
                        "give --num-ranks and leave the hosts to Slurm, or give a --hostfile",
                    )),
                };
            }
            let ranks = self.num_ranks.unwrap_or(cores);
            let local = vec![Host::whole("localhost", ranks.max(1))];
            return hosts::limit(local, self.num_nodes, self.num_ranks);
        };
        let text = super::read_text(&path)?;
        let all = hosts::parse(&text, &path.display().to_string())?;
        match (&self.include, &self.exclude) {
            (Some(text), _) => Filter::Include.apply(&all, text),
            (_, Some(text)) => Filter::Exclude.apply(&all, text),
            _ => hosts::limit(all, self.num_nodes, self.num_ranks),
        }
    }

    /// Cores for each rank. Ranks that would have to share cores are not bound, and that is said.
    fn cores(&self, hosts: &[Host], cores: usize) -> Result<Option<usize>> {
        match self.bind.as_deref() {
            Some("none") => Ok(None),
            Some(number) => match number.parse() {
                Ok(cores @ 1..=4096) => Ok(Some(cores)),
                _ => Err(usage(
                    format!("--bind {number}"),
                    "a number of cores, or none",
                )),
            },
            None if hosts.is_empty() => Ok(None),
            None => {
                let slots = hosts.iter().map(|host| host.of).max().unwrap_or(1);
                if slots > cores {
                    eprintln!("launch: {slots} ranks share {cores} cores of a host: not bound");
                    return Ok(None);
                }
                Ok(Some(cores / slots))
            }
        }
    }
}
