//! The command line of a launcher for given hosts. Values in, words out; nothing is run.

use super::hosts::Host;
use crate::cli::usage;
use anyhow::Result;
use std::fmt;

/// What starts the ranks.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// mpirun of Open MPI
    Openmpi,
    /// mpiexec of MPICH
    Mpich,
    /// srun of Slurm
    Slurm,
}

/// What is to be started where.
#[derive(Clone, Debug)]
pub struct Plan {
    pub launcher: Launcher,
    /// In rank order. Empty: the hosts that Slurm has allocated.
    pub hosts: Vec<Host>,
    /// Ranks, if no hosts are named.
    pub ranks: usize,
    /// Cores that each rank is bound to; slot `s` of a host has the cores from `s * this` on. None: not bound.
    pub cores: Option<usize>,
    /// Open MPI refuses the root user unless told otherwise.
    pub root: bool,
    /// Environment variables that the ranks get too; the other launchers pass on all of them.
    pub variables: Vec<String>,
    /// Further words for the launcher.
    pub more: Vec<String>,
    /// The program and its arguments.
    pub program: Vec<String>,
}

/// A file that the launcher reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankFile {
    pub path: String,
    pub text: String,
}

/// A command, and the file it reads if it needs one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    pub words: Vec<String>,
    pub rank_file: Option<RankFile>,
}

impl fmt::Display for CommandLine {
    /// As a shell would take it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
        for (at, word) in self.words.iter().enumerate() {
            let space = if at > 0 { " " } else { "" };
            if !word.is_empty() && word.chars().all(plain) {
                write!(f, "{space}{word}")?;
            } else {
                write!(f, "{space}'{}'", word.replace('\'', r"'\''"))?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// The number of ranks.
    pub fn size(&self) -> usize {
        match self.hosts.is_empty() {
            true => self.ranks,
            false => self.hosts.iter().map(|host| host.slots.len()).sum(),
        }
    }

    /// The command; `rank_file` is where a file may be written that it needs.
    ///
    /// # Errors
    /// If the launcher cannot do what is planned.
    pub fn command(&self, rank_file: &str) -> Result<CommandLine> {
        let mut words = Vec::new();
        let rank_file = match self.launcher {
            Launcher::Openmpi => self.openmpi(&mut words, rank_file),
            Launcher::Mpich => self.mpich(&mut words).map(|()| None)?,
            Launcher::Slurm => self.slurm(&mut words).map(|()| None)?,
        };
        words.extend(self.more.iter().cloned());
        words.extend(self.program.iter().cloned());
        Ok(CommandLine { words, rank_file })
    }

    /// `host:N,host:N`, ranks on each.
    fn host_counts(&self) -> String {
        let count = |host: &Host| format!("{}:{}", host.name, host.slots.len());
        self.hosts.iter().map(count).collect::<Vec<_>>().join(",")
    }

    fn openmpi(&self, words: &mut Vec<String>, rank_file: &str) -> Option<RankFile> {
        let mut add = |more: &[&str]| words.extend(more.iter().map(|word| word.to_string()));
        add(&["mpirun"]);
        if self.root {
            add(&["--allow-run-as-root"]);
        }
        add(&["-n", &self.size().to_string(), "-host", &self.host_counts()]);
        let mut file = None;
        match self.cores {
            None => add(&["--oversubscribe", "--map-by", "slot", "--bind-to", "none"]),
            Some(cores) if self.hosts.iter().all(Host::uses_first) => {
                add(&["--map-by", &format!("slot:PE={cores}"), "--bind-to", "core"]);
            }
            // Which cores a slot has can only be said rank by rank.
            Some(cores) => {
                add(&["--rankfile", rank_file]);
                let path = rank_file.to_owned();
                let text = self.rank_file(cores);
                file = Some(RankFile { path, text });
            }
        }
        for variable in &self.variables {
            add(&["-x", variable]);
        }
        file
    }

    /// Open MPI's file of ranks and cores.
    fn rank_file(&self, cores: usize) -> String {
        let places = self.hosts.iter().flat_map(|host| {
            let slots = host.slots.iter();
            slots.map(move |slot| (&host.name, slot * cores, slot * cores + cores - 1))
        });
        let line = |(rank, (name, first, last))| match first == last {
            true => format!("rank {rank}={name} slot={first}\n"),
            false => format!("rank {rank}={name} slot={first}-{last}\n"),
        };
        places.enumerate().map(line).collect()
    }

    /// The slots, if they are the same on all hosts, which is all that the other launchers can bind.
    fn slots_everywhere(&self) -> Result<&[usize]> {
        let mut slots = self.hosts.iter().map(|host| host.slots.as_slice());
        let first = slots.next().unwrap_or_default();
        if slots.all(|slots| slots == first) {
            return Ok(first);
        }
        Err(usage(
            "the launcher can only bind the same slots on all hosts",
            "use --bind none, the same slots everywhere, or --launcher openmpi",
        ))
    }

    fn mpich(&self, words: &mut Vec<String>) -> Result<()> {
        let mut add = |more: &[&str]| words.extend(more.iter().map(|word| word.to_string()));
        add(&["mpiexec", "-n", &self.size().to_string()]);
        add(&["-hosts", &self.host_counts()]);
        match self.cores {
            None => add(&["-bind-to", "none"]),
            Some(cores) if self.hosts.iter().all(Host::uses_first) => {
                add(&["-bind-to", &format!("core:{cores}")]);
            }
            Some(cores) => {
                let of_slot = |slot: &usize| {
                    let cores = slot * cores..(slot + 1) * cores;
                    cores
                        .map(|core| core.to_string())
                        .collect::<Vec<_>>()
                        .join("+")
                };
                let lists = self.slots_everywhere()?.iter().map(of_slot);
                let lists = lists.collect::<Vec<_>>().join(",");
                add(&["-bind-to", &format!("user:{lists}")]);
            }
        }
        Ok(())
    }

    fn slurm(&self, words: &mut Vec<String>) -> Result<()> {
        let mut add = |word: String| words.push(word);
        add("srun".into());
        add(format!("--ntasks={}", self.size()));
        if !self.hosts.is_empty() {
            let names: Vec<&str> = self.hosts.iter().map(|host| host.name.as_str()).collect();
            let each = self.hosts[0].slots.len();
            if self.hosts.iter().any(|host| host.slots.len() != each) {
                return Err(usage(
                    "srun starts as many ranks on each host",
                    "use --num-ranks, or --launcher openmpi",
                ));
            }
            add(format!("--nodes={}", names.len()));
            add(format!("--nodelist={}", names.join(",")));
            add(format!("--ntasks-per-node={each}"));
        }
        match self.cores {
            None => add("--cpu-bind=none".into()),
            Some(cores) => {
                add(format!("--cpus-per-task={cores}"));
                if self.hosts.iter().all(Host::uses_first) {
                    add("--cpu-bind=cores".into());
                } else {
                    let slots = self.slots_everywhere()?;
                    let masks: Option<Vec<String>> =
                        slots.iter().map(|slot| mask(*slot, cores)).collect();
                    let masks = masks.ok_or_else(|| {
                        usage("srun binds cores below 128 only", "use --bind none")
                    })?;
                    add(format!("--cpu-bind=mask_cpu:{}", masks.join(",")));
                }
            }
        }
        add("--kill-on-bad-exit=1".into());
        add("--export=ALL".into());
        Ok(())
    }

    /// Which rank runs where, for people to read: one line each.
    pub fn places(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for host in &self.hosts {
            for slot in &host.slots {
                let rank = lines.len();
                let name = &host.name;
                lines.push(match self.cores {
                    None => format!("rank {rank}: {name}, any core"),
                    Some(1) => format!("rank {rank}: {name}, core {slot}"),
                    Some(cores) => {
                        let (first, last) = (slot * cores, slot * cores + cores - 1);
                        format!("rank {rank}: {name}, cores {first}-{last}")
                    }
                });
            }
        }
        lines
    }
}

/// The cores of a slot as a hexadecimal mask; none beyond 128 cores.
fn mask(slot: usize, cores: usize) -> Option<String> {
    let first = slot.checked_mul(cores)?;
    (first + cores <= 128).then(|| {
        let ones = u128::MAX >> (128 - cores);
        format!("{:#x}", ones << first)
    })
}

#[cfg(test)]
mod tests {
    use super::super::hosts::{Filter, parse};
    use super::*;

    fn plan(launcher: Launcher, include: &str, cores: Option<usize>) -> Plan {
        let hosts = parse("a slots=4\nb slots=4\nc slots=2", "hosts").unwrap();
        Plan {
            launcher,
            hosts: Filter::Include.apply(&hosts, include).unwrap(),
            ranks: 0,
            cores,
            root: false,
            variables: Vec::new(),
            more: Vec::new(),
            program: vec!["windlass".into(), "train".into(), "my data".into()],
        }
    }

    #[test]
    fn commands_say_hosts_ranks_and_cores() {
        use Launcher::{Mpich, Openmpi, Slurm};
        for (launcher, include, cores, expected) in [
            (
                Openmpi,
                "a@c",
                Some(2),
                "mpirun -n 6 -host a:4,c:2 --map-by slot:PE=2 --bind-to core",
            ),
            (
                Openmpi,
                "a:0",
                None,
                "mpirun -n 1 -host a:1 --oversubscribe --map-by slot --bind-to none",
            ),
            (
                Openmpi,
                "a:1@c:0",
                Some(2),
                "mpirun -n 2 -host a:1,c:1 --rankfile FILE",
            ),
            (
                Mpich,
                "a@c",
                Some(3),
                "mpiexec -n 6 -hosts a:4,c:2 -bind-to core:3",
            ),
            (
                Mpich,
                "a@b",
                None,
                "mpiexec -n 8 -hosts a:4,b:4 -bind-to none",
            ),
            (
                Mpich,
                "a:1,3@b:1,3",
                Some(2),
                "mpiexec -n 4 -hosts a:2,b:2 -bind-to user:2+3,6+7",
            ),
            (
                Slurm,
                "a@b",
                Some(2),
                "srun --ntasks=8 --nodes=2 --nodelist=a,b --ntasks-per-node=4 --cpus-per-task=2 \
                 --cpu-bind=cores --kill-on-bad-exit=1 --export=ALL",
            ),
            (
                Slurm,
                "a:1,3",
                Some(2),
                "srun --ntasks=2 --nodes=1 --nodelist=a --ntasks-per-node=2 --cpus-per-task=2 \
                 --cpu-bind=mask_cpu:0xc,0xc0 --kill-on-bad-exit=1 --export=ALL",
            ),
            (
                Slurm,
                "c",
                None,
                "srun --ntasks=2 --nodes=1 --nodelist=c --ntasks-per-node=2 --cpu-bind=none \
                 --kill-on-bad-exit=1 --export=ALL",
            ),
        ] {
            let command = plan(launcher, include, cores).command("FILE").unwrap();
            assert_eq!(
                command.to_string(),
                format!("{expected} windlass train 'my data'")
            );
        }
    }

    #[test]
    fn what_a_launcher_cannot_do_is_said() {
        let same = "the launcher can only bind the same slots on all hosts";
        for (launcher, include, message) in [
            (Launcher::Mpich, "a:1@b:2", same),
            (Launcher::Slurm, "a:1@b:2", same),
            (
                Launcher::Slurm,
                "a@c",
                "srun starts as many ranks on each host",
            ),
        ] {
            let error = plan(launcher, include, Some(2))
                .command("FILE")
                .unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let error = plan(Launcher::Slurm, "a:3", Some(50))
            .command("FILE")
            .unwrap_err();
        assert_eq!(error.to_string(), "srun binds cores below 128 only");
    }

    #[test]
    fn single_slots_get_their_cores() {
        let plan = plan(Launcher::Openmpi, "a:1,3@c", Some(2));
        let file = plan.command("FILE").unwrap().rank_file.unwrap();
        let text = "rank 0=a slot=2-3\nrank 1=a slot=6-7\nrank 2=c slot=0-1\nrank 3=c slot=2-3\n";
        assert_eq!((file.path.as_str(), file.text.as_str()), ("FILE", text));
        let places = plan.places();
        assert_eq!(places[1], "rank 1: a, cores 6-7");
        let one = Plan {
            cores: Some(1),
            ..plan
        };
        assert_eq!(one.places()[1], "rank 1: a, core 3");
        assert!(one.rank_file(1).starts_with("rank 0=a slot=1\n"));
    }

    #[test]
    fn settings_of_the_user_reach_the_command() {
        let mut plan = plan(Launcher::Openmpi, "a", None);
        plan.root = true;
        plan.variables = vec!["WINDLASS_KERNELS".into()];
        plan.more = vec!["--mca".into(), "btl".into(), "tcp,self".into()];
        let expected = "mpirun --allow-run-as-root -n 4 -host a:4 --oversubscribe --map-by slot --bind-to none \
                        -x WINDLASS_KERNELS --mca btl tcp,self windlass train 'my data'";
        assert_eq!(plan.command("FILE").unwrap().to_string(), expected);
        plan.launcher = Launcher::Slurm;
        (plan.hosts, plan.ranks) = (Vec::new(), 3);
        let expected = "srun --ntasks=3 --cpu-bind=none --kill-on-bad-exit=1 --export=ALL \
                        --mca btl tcp,self windlass train 'my data'";
        assert_eq!(plan.command("FILE").unwrap().to_string(), expected);
    }
}
