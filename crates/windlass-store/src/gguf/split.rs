//! Files of a model that was split: which belong together, and whether all are there.

use std::path::{Path, PathBuf};

use super::header::Header;
use super::metadata::Metadata;
use crate::error::{Error, Result};

/// The keys that only the parts of a split model have.
pub(super) const PREFIX: &str = "split.";
const COUNT: &str = "split.count";
const NUMBER: &str = "split.no";
const TENSORS: &str = "split.tensors.count";
/// No model has more parts; names have room for five digits.
const MAX_PARTS: usize = 99_999;

/// How many files the model has; 1 if it is not split.
pub(super) fn count(metadata: &Metadata) -> Result<usize> {
    let count = metadata.get::<usize>(COUNT)?.unwrap_or(1);
    if count > MAX_PARTS {
        let problem = format!("key '{COUNT}' is {count}: no model has so many files");
        return Err(Error::corrupt(metadata.path(), problem));
    }
    Ok(count.max(1))
}

/// The files of a split model, in order, from the name of one: `NAME-00002-of-00005.gguf`.
///
/// # Errors
/// [`Error::Corrupt`] if the name is another or files are missing.
pub(super) fn parts(path: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let ending = format!("-of-{count:05}.gguf");
    let stem = name.strip_suffix(&ending).and_then(|stem| {
        let (stem, number) = stem.split_at_checked(stem.len().checked_sub(6)?)?;
        let digits = number.strip_prefix('-')?;
        digits.bytes().all(|b| b.is_ascii_digit()).then_some(stem)
    });
    let Some(stem) = stem else {
        let problem = format!(
            "one of {count} files of a split model, but its name does not end in -NNNNN{ending}: the others cannot be found"
        );
        return Err(Error::corrupt(path, problem));
    };
    let part = |i| path.with_file_name(format!("{stem}-{i:05}{ending}"));
    let parts: Vec<PathBuf> = (1..=count).map(part).collect();
    let missing: Vec<&PathBuf> = parts.iter().filter(|part| !part.exists()).collect();
    if let Some(first) = missing.first() {
        let problem = format!(
            "{} of the model's {count} files are missing, the first is {}",
            missing.len(),
            first.display()
        );
        return Err(Error::corrupt(path, problem));
    }
    Ok(parts)
}

/// Checks that a file is part `number` (from 0) of `count`.
pub(super) fn check_part(path: &Path, header: &Header, number: usize, count: usize) -> Result<()> {
    let mut metadata = header.metadata.clone();
    metadata.set_path(path);
    let found: (usize, usize) = (metadata.require(NUMBER)?, metadata.require(COUNT)?);
    if found != (number, count) {
        let problem = format!(
            "keys '{NUMBER}' and '{COUNT}' are {} and {}, expected {number} and {count}: the files belong to different models",
            found.0, found.1
        );
        return Err(Error::corrupt(path, problem));
    }
    Ok(())
}

/// Checks the number of tensors of all parts together against what the first part says.
pub(super) fn check_total(metadata: &Metadata, found: usize) -> Result<()> {
    match metadata.get::<usize>(TENSORS)? {
        Some(expected) if expected != found => {
            let problem = format!(
                "key '{TENSORS}' is {expected}, but the files hold {found} tensors: they belong to different models"
            );
            Err(Error::corrupt(metadata.path(), problem))
        }
        _ => Ok(()),
    }
}
