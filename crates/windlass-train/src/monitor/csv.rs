//! Curves as CSV, a file a number, as DeepSpeed's `csv_monitor` writes them: `Train/Samples/lr` is
//! `Train_Samples_lr.csv` with the columns `step` (samples so far) and `lr`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A folder of CSV files being written.
#[derive(Debug)]
pub struct CsvWriter {
    folder: PathBuf,
    last: Option<u64>,
    files: BTreeMap<String, (PathBuf, File)>,
}

impl CsvWriter {
    /// Files in `folder`, which is created. A new run starts with a header of its own behind what is there; one that is
    /// resumed after `last` samples drops what it had written about later ones.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be created.
    pub fn create(folder: &Path, last: Option<u64>) -> Result<Self> {
        let created = std::fs::create_dir_all(folder);
        created.map_err(|error| Error::io("create", folder, error))?;
        Ok(Self {
            folder: folder.to_owned(),
            last,
            files: BTreeMap::new(),
        })
    }

    /// Appends a row to the file of each value.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn write(&mut self, samples: u64, values: &[(&str, f64)]) -> Result<()> {
        for &(name, value) in values {
            if !self.files.contains_key(name) {
                let opened = open(&self.folder, name, self.last)?;
                self.files.insert(name.to_owned(), opened);
            }
            let (path, file) = self.files.get_mut(name).expect("it was opened");
            let written = file.write_all(format!("{samples},{value}\r\n").as_bytes());
            written.map_err(|error| Error::io("write", path, error))?;
        }
        Ok(())
    }
}

/// The file of a number, ready for the rows after `last` samples.
fn open(folder: &Path, name: &str, last: Option<u64>) -> Result<(PathBuf, File)> {
    let path = folder.join(format!("{}.csv", name.replace(['/', ' '], "_")));
    let column = name.rsplit('/').next().expect("a name");
    let header = format!("step,{column}\r\n");
    let kept = match last.filter(|_| path.is_file()) {
        Some(last) => {
            let text = std::fs::read_to_string(&path);
            let text = text.map_err(|error| Error::io("read", &path, error))?;
            let kept = keep(&text, &header, last);
            std::fs::write(&path, &kept).map_err(|error| Error::io("write", &path, error))?;
            kept
        }
        None => String::new(),
    };
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let mut file = file.map_err(|error| Error::io("open", &path, error))?;
    if !kept.contains(&header) {
        let written = file.write_all(header.as_bytes());
        written.map_err(|error| Error::io("write", &path, error))?;
    }
    Ok((path, file))
}

/// A file as it was after `last` samples of the run that wrote the last header.
fn keep(text: &str, header: &str, last: u64) -> String {
    let Some(start) = text.rfind(header) else {
        return text.to_owned();
    };
    let (before, run) = text.split_at(start + header.len());
    let rows = run.split_inclusive('\n').filter(|row| {
        let samples = row.split(',').next().and_then(|cell| cell.parse().ok());
        row.ends_with('\n') && samples.is_some_and(|samples: u64| samples <= last)
    });
    before.chars().chain(rows.flat_map(str::chars)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_run_starts_a_table_and_a_resumed_one_continues_its_own() {
        let folder = std::env::temp_dir().join(format!("windlass-csv-{}", std::process::id()));
        let lr = "Train/Samples/lr";
        let write = |last: Option<u64>, samples: std::ops::Range<u64>| {
            let mut csv = CsvWriter::create(&folder, last).unwrap();
            for sample in samples {
                csv.write(8 * sample, &[(lr, 0.5 / sample as f64)]).unwrap();
            }
        };
        write(None, 1..3);
        write(None, 1..4);
        write(Some(8), 2..3);
        let text = std::fs::read_to_string(folder.join("Train_Samples_lr.csv")).unwrap();
        let first = "step,lr\r\n8,0.5\r\n16,0.25\r\n";
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(text, format!("{first}{first}"));
    }
}
