//! What a run leaves for people to look at: `metrics.jsonl`, TensorBoard event files and CSV.
//!
//! A record is a step and named numbers. All files hold the same; nothing here decides what is measured or shows it.

mod csv;
mod events;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use windlass_store::atomic::{RealDisk, write_atomic};

pub use csv::CsvWriter;
pub use events::EventWriter;

use crate::error::{Error, Result};

/// The name of the file of records in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Records as lines of JSON, each complete on the disk's side of a crash of the program.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens `metrics.jsonl` in `folder`: empty for a new run; for a run resumed after `last_step`, with the records
    /// up to that step. Later ones, and a line that was cut off, are removed.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Store`] when the file cannot be read or written.
    pub fn open(folder: &Path, last_step: Option<u64>) -> Result<Self> {
        let path = folder.join(METRICS_FILE);
        let kept = match last_step {
            Some(last) if path.is_file() => {
                let text = std::fs::read_to_string(&path);
                let text = text.map_err(|error| Error::io("read", &path, error))?;
                keep(&text, last)
            }
            _ => String::new(),
        };
        write_atomic(&RealDisk, &path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| Error::io("open", &path, error))?;
        Ok(Self { file, path })
    }

    /// Appends the record of a step: `{"step": step, ...}`. Numbers that are not finite are written as null.
    ///
    /// # Errors
    /// [`Error::Io`] when the line cannot be written.
    pub fn write(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut record = Map::new();
        record.insert("step".into(), step.into());
        for (name, value) in values {
            record.insert((*name).to_owned(), Value::from(*value));
        }
        // One call, so that no half line stands before a complete one.
        let line = format!("{}\n", Value::Object(record));
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|error| Error::io("write", &self.path, error))
    }
}

/// What is written beside the two files in a run's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MonitorOptions {
    /// A folder for TensorBoard with DeepSpeed's names, over samples.
    pub tensorboard: Option<PathBuf>,
    /// A folder for CSV files with DeepSpeed's names, over samples.
    pub csv: Option<PathBuf>,
    /// Whether records say where the time of a step went.
    pub wall_clock_breakdown: bool,
    /// The step, from 1, before which the layers are profiled.
    pub profile_step: Option<u64>,
}

/// All files of a run.
#[derive(Debug)]
pub struct Monitors {
    metrics: Metrics,
    events: EventWriter,
    tensorboard: Option<EventWriter>,
    csv: Option<CsvWriter>,
    batch: u64,
}

impl Monitors {
    /// Opens the files of a run in `folder` and those of the options, of a run that is new or resumed after `last_step`,
    /// and whose steps are `batch` samples. `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Store`] when a file cannot be read or written.
    pub fn open(
        folder: &Path,
        options: &MonitorOptions,
        wall_time: f64,
        last_step: Option<u64>,
        batch: u64,
    ) -> Result<Self> {
        let last = last_step.map(|step| step * batch);
        let tensorboard = options.tensorboard.as_deref();
        let csv = options.csv.as_deref();
        Ok(Self {
            metrics: Metrics::open(folder, last_step)?,
            events: EventWriter::create(folder, wall_time, last_step)?,
            tensorboard: tensorboard
                .map(|folder| EventWriter::create(folder, wall_time, last))
                .transpose()?,
            csv: csv
                .map(|folder| CsvWriter::create(folder, last))
                .transpose()?,
            batch,
        })
    }

    /// Appends the record of a step to all of them.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn write(&mut self, step: u64, wall_time: f64, values: &[(&str, f64)]) -> Result<()> {
        self.metrics.write(step, values)?;
        self.events.write(step, wall_time, values)?;
        if self.tensorboard.is_none() && self.csv.is_none() {
            return Ok(());
        }
        let named: Vec<(String, f64)> = values.iter().map(|(n, v)| (curve(n), *v)).collect();
        let named: Vec<(&str, f64)> = named.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        let samples = step * self.batch;
        if let Some(tensorboard) = &mut self.tensorboard {
            tensorboard.write(samples, wall_time, &named)?;
        }
        match &mut self.csv {
            Some(csv) => csv.write(samples, &named),
            None => Ok(()),
        }
    }
}

/// DeepSpeed's name of a number.
fn curve(name: &str) -> String {
    match name.strip_suffix("_ms") {
        Some("reduce") => "Train/Samples/elapsed_time_ms_backward_allreduce".into(),
        Some(part) => format!("Train/Samples/elapsed_time_ms_{part}"),
        None if name == "loss" => "Train/Samples/train_loss".into(),
        None => format!("Train/Samples/{name}"),
    }
}

/// The complete lines of records up to step `last`.
fn keep(text: &str, last: u64) -> String {
    let complete = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let kept = complete.filter(|line| {
        let record: Option<Value> = serde_json::from_str(line).ok();
        let step = record.and_then(|record| record["step"].as_u64());
        step.is_some_and(|step| step <= last)
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_drops_what_came_after_the_checkpoint() {
        let folder = std::env::temp_dir().join(format!("windlass-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(METRICS_FILE);
        let mut metrics = Metrics::open(&folder, None).unwrap();
        for step in 1..=5 {
            metrics
                .write(step, &[("loss", 1.5 / step as f64), ("lr", f64::NAN)])
                .unwrap();
        }
        metrics.file.write_all(b"{\"step\":3,\"lo").unwrap();
        let mut metrics = Metrics::open(&folder, Some(3)).unwrap();
        metrics.write(4, &[("loss", 0.25)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let expected = "{\"step\":1,\"loss\":1.5,\"lr\":null}\n{\"step\":2,\"loss\":0.75,\"lr\":null}\n\
                        {\"step\":3,\"loss\":0.5,\"lr\":null}\n{\"step\":4,\"loss\":0.25}\n";
        assert_eq!(text, expected);
        Metrics::open(&folder, None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(Metrics::open(&folder, None).is_err());
    }
}
