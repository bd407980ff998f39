//! `windlass io bench`: what a disk gives to state that is offloaded to it, and which `aio` settings get the most.
//!
//! Measures through the swap files that training uses. The file has no name: however the program ends, it is gone.

mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use windlass::progress::Progress;
use windlass::store::swap::{
    AioOptions, Backend, Direction, Region, SwapFile, measure, memory_for,
};

use crate::cli::usage;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Find the `aio` settings with which a disk is fastest
    ///
    /// Tries all block sizes with all queue depths, then other numbers of threads on the best of them, then measures
    /// the best once more, and prints the speeds and an `aio` block for ds_config.json. Its file has no name in the
    /// folder and is gone when the program ends, also by Ctrl-C.
    Bench(BenchArgs),
}

#[derive(clap::Args)]
struct BenchArgs {
    /// Folder on the disk to measure: the `nvme_path` of ds_config.json
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Size of the file: 512M, 4G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    size: usize,
    /// Only read
    #[arg(long, conflicts_with = "write")]
    read: bool,
    /// Only write
    #[arg(long)]
    write: bool,
    /// Bytes of one transfer
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = parse_size,
        default_value = "128K,256K,512K,1M,2M,4M,8M,16M")]
    block_size: Vec<usize>,
    /// Transfers under way at a time
    #[arg(
        long,
        value_name = "NS",
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64"
    )]
    queue_depth: Vec<usize>,
    /// Threads, each with as many transfers under way (`intra_op_parallelism`)
    #[arg(
        long,
        value_name = "NS",
        value_delimiter = ',',
        default_value = "1,2,4"
    )]
    threads: Vec<usize>,
    /// Longest time of one measurement; 0 for the whole file each time
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    seconds: f64,
    /// Who moves the bytes [default: io_uring where the system has it]
    #[arg(long, value_enum)]
    backend: Option<Mover>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(clap::ValueEnum, Clone, Copy)]
enum Mover {
    /// The kernel, asked through io_uring
    #[value(name = "io_uring")]
    IoUring,
    /// Threads in blocking pread and pwrite calls
    Threads,
}

/// Settings that want more memory than this for what is under way are left out.
const MEMORY: usize = 512 << 20;
/// Settings that are tried with other numbers of threads, and measured once more.
const FINALISTS: usize = 3;
/// Measurements of each finalist; the middle one counts.
const ROUNDS: usize = 3;

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    match args.what {
        What::Bench(args) => bench(&args),
    }
}

/// Speeds of one setting, in GB/s.
#[derive(Clone, Debug)]
struct Trial {
    options: AioOptions,
    read: Option<f64>,
    write: Option<f64>,
}

impl Trial {
    /// GB/s when as much is read as written, or of the one direction measured.
    fn score(&self) -> f64 {
        match (self.read, self.write) {
            (Some(read), Some(write)) => 2.0 / (1.0 / read + 1.0 / write),
            (one, other) => one.or(other).unwrap_or(0.0),
        }
    }
}

/// The file under measurement.
struct Subject {
    file: SwapFile,
    region: Region,
    limit: Option<Duration>,
    directions: Vec<Direction>,
}

impl Subject {
    fn try_out(&mut self, options: &AioOptions) -> Result<Trial> {
        self.file.retune(options.clone())?;
        let mut trial = Trial {
            options: options.clone(),
            read: None,
            write: None,
        };
        for &direction in &self.directions {
            let speed = measure(&self.file, &self.region, direction, self.limit)?.gb_per_s();
            match direction {
                Direction::Read => trial.read = Some(speed),
                Direction::Write => trial.write = Some(speed),
            }
        }
        Ok(trial)
    }

    /// The middle of several measurements.
    fn measure_again(&mut self, options: &AioOptions) -> Result<Trial> {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(self.try_out(options)?);
        }
        Ok(Trial {
            options: options.clone(),
            read: median(rounds.iter().filter_map(|t| t.read).collect()),
            write: median(rounds.iter().filter_map(|t| t.write).collect()),
        })
    }
}

fn bench(args: &BenchArgs) -> Result<()> {
    let no_threads = || usage("--threads names no number", "such as --threads 1,2");
    let (&first, others) = args.threads.split_first().ok_or_else(no_threads)?;
    let (mut subject, grid) = prepare(args, first)?;
    let single = grid.len() == 1 && others.is_empty();
    let finals = if single { 1 } else { FINALISTS.min(grid.len()) };
    let total = grid.len() + finals * others.len() + if single { 0 } else { finals * ROUNDS };
    let mut bar = Progress::new(total as u64, "measuring");
    if let Some(note) = subject.file.note() {
        bar.note(note);
    }
    let mut done = 0;
    let mut step = |bar: &mut Progress, by: usize, trial: &Trial| {
        done += by as u64;
        bar.set(done, &report::line(trial));
    };
    let mut trials = Vec::new();
    for (block_size, queue_depth) in grid {
        let options = settings(block_size, queue_depth, first);
        trials.push(subject.try_out(&options)?);
        step(&mut bar, 1, &trials[trials.len() - 1]);
    }
    for trial in best(&trials, finals) {
        for &threads in others {
            let options = AioOptions {
                threads,
                ..trial.options.clone()
            };
            if fits(&options) {
                trials.push(subject.try_out(&options)?);
                step(&mut bar, 1, &trials[trials.len() - 1]);
            }
        }
    }
    let mut finalists = best(&trials, finals);
    if !single {
        for trial in &mut finalists {
            *trial = subject.measure_again(&trial.options)?;
            step(&mut bar, ROUNDS, trial);
        }
    }
    let winner = best(&finalists, 1).remove(0);
    bar.finish(&report::line(&winner));
    let report = report::Report {
        dir: &args.dir,
        bytes: args.size,
        backend: subject.file.backend(),
        direct: subject.file.is_direct(),
        trials: &trials,
        winner: &winner,
    };
    if args.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.text());
    }
    Ok(())
}

/// Checks the flags, takes the space, and writes the file once: a disk reads faster what was never written.
fn prepare(args: &BenchArgs, first: usize) -> Result<(Subject, Vec<(usize, usize)>)> {
    if !(0.0..=3600.0).contains(&args.seconds) {
        let message = format!("--seconds {}", args.seconds);
        return Err(usage(message, "use 0 to 3600"));
    }
    if args.size < 1 << 20 {
        let hint = "use at least 1M; what fits into the disk's own cache says little";
        return Err(usage(format!("--size {} bytes", args.size), hint));
    }
    let backend = args.backend.map(|mover| match mover {
        Mover::IoUring => Backend::IoUring,
        Mover::Threads => Backend::Threads,
    });
    let mut grid = Vec::new();
    for &block_size in &args.block_size {
        for &queue_depth in &args.queue_depth {
            for &threads in &args.threads {
                settings(block_size, queue_depth, threads).check(&args.dir)?;
            }
            if fits(&settings(block_size, queue_depth, first)) {
                grid.push((block_size, queue_depth));
            }
        }
    }
    if grid.is_empty() {
        let message = "--block-size times --queue-depth is more than 512 MiB";
        return Err(usage(message, "lower one of them"));
    }
    let options = AioOptions::default();
    let file = SwapFile::create(&args.dir, "windlass-io-bench", options, backend)?;
    let region = file.reserve(args.size)?;
    measure(&file, &region, Direction::Write, None)?;
    let directions = match (args.read, args.write) {
        (true, _) => vec![Direction::Read],
        (_, true) => vec![Direction::Write],
        _ => vec![Direction::Write, Direction::Read],
    };
    let subject = Subject {
        file,
        region,
        limit: (args.seconds > 0.0).then(|| Duration::from_secs_f64(args.seconds)),
        directions,
    };
    Ok((subject, grid))
}

fn settings(block_size: usize, queue_depth: usize, threads: usize) -> AioOptions {
    AioOptions {
        block_size,
        queue_depth,
        threads,
        ..AioOptions::default()
    }
}

fn fits(options: &AioOptions) -> bool {
    memory_for(options) <= MEMORY
}

/// The fastest trials, the fastest first.
fn best(trials: &[Trial], count: usize) -> Vec<Trial> {
    let mut sorted = trials.to_vec();
    sorted.sort_by(|a, b| b.score().total_cmp(&a.score()));
    sorted.truncate(count.max(1));
    sorted
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Bytes as `128K`, `1M`, `4G` (powers of 1024) or a plain number.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let wrong = || "not a size; such as 128K, 1M or 4G".to_owned();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let shift = match text[end..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: usize = text[..end].parse().map_err(|_| wrong())?;
    number
        .checked_mul(1 << shift)
        .filter(|&bytes| bytes > 0 && bytes <= 1 << 50)
        .ok_or_else(|| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("4096", Some(4096)),
            ("128K", Some(128 << 10)),
            ("1M", Some(1 << 20)),
            ("4GiB", Some(4 << 30)),
            ("2t", Some(2 << 40)),
            ("", None),
            ("0", None),
            ("K", None),
            ("1X", None),
            ("-1", None),
            ("1.5G", None),
            ("99999999999T", None),
        ] {
            assert_eq!(parse_size(text).ok(), bytes, "{text}");
        }
    }

    #[test]
    fn the_best_setting_serves_both_directions() {
        let trial = |queue_depth, read, write| Trial {
            options: settings(4096, queue_depth, 1),
            read,
            write,
        };
        let trials = [
            trial(1, Some(9.0), Some(0.5)),
            trial(2, Some(2.0), Some(2.0)),
            trial(3, Some(2.0), Some(1.9)),
        ];
        let order: Vec<usize> = best(&trials, 2)
            .iter()
            .map(|t| t.options.queue_depth)
            .collect();
        assert_eq!(order, [2, 3]);
        let one = [trial(1, None, Some(1.0)), trial(2, None, Some(3.0))];
        assert_eq!(best(&one, 1)[0].options.queue_depth, 2);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
    }
}
