//! What `windlass io bench` says: tables for people, one object for machines, and the block to paste.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Value, json};
use windlass::store::swap::{AioOptions, Backend};

use super::Trial;

/// Everything that was found out.
pub struct Report<'a> {
    /// The folder.
    pub dir: &'a Path,
    /// Size of the file.
    pub bytes: usize,
    /// Who moved the bytes.
    pub backend: Backend,
    /// Whether transfers bypassed the page cache.
    pub direct: bool,
    /// All measurements.
    pub trials: &'a [Trial],
    /// The setting to use, and its speeds.
    pub winner: &'a Trial,
}

impl Report<'_> {
    /// For a terminal.
    pub fn text(&self) -> String {
        let cache = match self.direct {
            true => "O_DIRECT",
            false => "through the page cache: these are speeds of memory, not of the disk",
        };
        let mut text = format!(
            "{} · {} file · {} · {cache}\n",
            self.dir.display(),
            size(self.bytes),
            self.backend.name()
        );
        for (name, speed) in DIRECTIONS {
            self.table(&mut text, name, speed);
        }
        let aio = serde_json::to_string_pretty(&json!({ "aio": aio(&self.winner.options) }));
        let aio = aio.expect("a value without maps of other keys");
        let line = line(self.winner);
        let _ = write!(text, "\nbest: {line}\nfor ds_config.json:\n{aio}\n");
        text
    }

    /// One direction: blocks down, depths across; other numbers of threads below.
    fn table(&self, text: &mut String, name: &str, speed: Speed) {
        let Some(threads) = self.trials.first().map(|t| t.options.threads) else {
            return;
        };
        if self.trials.iter().all(|t| speed(t).is_none()) {
            return;
        }
        let (grid, others): (Vec<&Trial>, Vec<&Trial>) = self
            .trials
            .iter()
            .partition(|t| t.options.threads == threads);
        let blocks: BTreeSet<usize> = grid.iter().map(|t| t.options.block_size).collect();
        let depths: BTreeSet<usize> = grid.iter().map(|t| t.options.queue_depth).collect();
        let plural = if threads == 1 { "" } else { "s" };
        let _ = write!(text, "\n{name}, GB/s, {threads} thread{plural}\n  block");
        for depth in &depths {
            let _ = write!(text, "{:>8}", format!("x{depth}"));
        }
        for &block in &blocks {
            let _ = write!(text, "\n{:>7}", size(block));
            for &depth in &depths {
                let found = grid
                    .iter()
                    .find(|t| t.options.block_size == block && t.options.queue_depth == depth);
                let cell = found.and_then(|t| speed(t));
                let cell = cell.map_or("-".to_owned(), |s| format!("{s:.2}"));
                let _ = write!(text, "{cell:>8}");
            }
        }
        text.push('\n');
        for trial in others {
            let gb = speed(trial).unwrap_or_default();
            let _ = writeln!(text, "  {}: {gb:.2}", setting(&trial.options));
        }
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let trial = |t: &Trial| {
            json!({
                "aio": aio(&t.options), "read_gb_s": t.read, "write_gb_s": t.write,
            })
        };
        json!({
            "dir": self.dir, "bytes": self.bytes, "direct": self.direct, "backend": self.backend.name(),
            "best": trial(self.winner),
            "trials": self.trials.iter().map(trial).collect::<Vec<_>>(),
        })
    }
}

/// The speed of a trial in one direction, where it was measured.
type Speed = fn(&Trial) -> Option<f64>;

const DIRECTIONS: [(&str, Speed); 2] = [("write", |t| t.write), ("read", |t| t.read)];

/// A setting and its speeds in a line.
pub fn line(trial: &Trial) -> String {
    let mut line = setting(&trial.options);
    for (name, speed) in DIRECTIONS {
        if let Some(gb) = speed(trial) {
            let _ = write!(line, " · {name} {gb:.2} GB/s");
        }
    }
    line
}

fn setting(options: &AioOptions) -> String {
    let (block, depth) = (size(options.block_size), options.queue_depth);
    match options.threads {
        1 => format!("{block} x{depth}"),
        n => format!("{block} x{depth}, {n} threads"),
    }
}

/// The block of `ds_config.json`.
fn aio(options: &AioOptions) -> Value {
    json!({
        "block_size": options.block_size,
        "queue_depth": options.queue_depth,
        "intra_op_parallelism": options.threads,
        "single_submit": options.single_submit,
        "overlap_events": options.overlap_events,
    })
}

fn size(bytes: usize) -> String {
    for (shift, unit) in [(30, 'G'), (20, 'M'), (10, 'K')] {
        if bytes >= 1 << shift && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}
