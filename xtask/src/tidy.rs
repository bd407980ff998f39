//! The laws of the architecture, checked on `cargo metadata` and the sources.
//!
//! Each law is an absence and has a test with a snippet that it refuses. What rustc and clippy can check is
//! left to them; tidy only makes sure that every crate asks for it.

mod edges;
mod exceptions;
mod files;
mod laws;
mod lexer;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use exceptions::Exceptions;

/// Something that a law refuses.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    path: String,
    /// Counted from 1; 0 stands for the whole file.
    line: usize,
    message: String,
}

impl Violation {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line,
            message: message.into(),
        }
    }
}

/// Prints every violation and a summary; true when there is none.
pub fn run(root: &Path) -> anyhow::Result<bool> {
    let mut violations = edges::check(&metadata(root)?)?;
    violations.extend(files::check(root)?);
    let list = root.join(exceptions::PATH);
    let list = std::fs::read_to_string(&list).with_context(|| list.display().to_string())?;
    let mut exceptions = Exceptions::parse(&list)?;
    let (mut count, mut code_lines, mut test_lines) = (0, 0, 0);
    for path in sources(root)? {
        let bytes = std::fs::read(root.join(&path)).with_context(|| path.clone())?;
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        violations.extend(laws::check_text(&path, &text));
        if path.ends_with(".rs") {
            let source = laws::Source::new(&path, &text);
            violations.extend(source.check(&mut exceptions));
            count += 1;
            code_lines += source.code_lines();
            test_lines += text.lines().count() - source.code_lines();
        }
    }
    violations.extend(exceptions.unused());
    violations.sort();
    for Violation {
        path,
        line,
        message,
    } in &violations
    {
        match line {
            0 => println!("{path}: {message}"),
            _ => println!("{path}:{line}: {message}"),
        }
    }
    let found = violations.len();
    println!(
        "tidy: {count} Rust files, {code_lines} lines and {test_lines} of tests, {} size exceptions, \
         {found} violations",
        exceptions.len()
    );
    Ok(violations.is_empty())
}

fn metadata(root: &Path) -> anyhow::Result<serde_json::Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The text files of the repository, as sorted paths relative to its root.
fn sources(root: &Path) -> anyhow::Result<Vec<String>> {
    const SKIPPED: [&str; 6] = [
        ".git",
        "target",
        "runs",
        "corpus",
        "artifacts",
        "__pycache__",
    ];
    const ENDINGS: [&str; 6] = [".rs", ".toml", ".md", ".py", ".sh", "/run"];
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let here = root.join(&folder);
        for entry in here
            .read_dir()
            .with_context(|| here.display().to_string())?
        {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = folder.join(&name);
            if entry.file_type()?.is_dir() {
                if !SKIPPED.contains(&name.as_str()) {
                    folders.push(path);
                }
                continue;
            }
            let path = path.to_string_lossy().replace('\\', "/");
            if ENDINGS.iter().any(|ending| path.ends_with(ending)) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}
