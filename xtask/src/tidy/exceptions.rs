//! The one list of files and functions that may be longer than the law says. It only shrinks.

use anyhow::bail;

use super::Violation;

/// Where the list lies.
pub const PATH: &str = "xtask/exceptions.txt";

/// The list, and which of its lines were needed.
#[derive(Debug, Default)]
pub struct Exceptions {
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    line: usize,
    subject: String,
    used: bool,
}

impl Exceptions {
    /// Reads lines of `path[:function] reason`; empty lines and lines that start with `#` are skipped.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut entries: Vec<Entry> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (subject, reason) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if reason.trim().len() < 10 {
                bail!("{PATH}:{}: {subject} needs a reason", index + 1);
            }
            if entries.iter().any(|entry| entry.subject == subject) {
                bail!("{PATH}:{}: {subject} is listed twice", index + 1);
            }
            entries.push(Entry {
                line: index + 1,
                subject: subject.to_owned(),
                used: false,
            });
        }
        Ok(Self { entries })
    }

    /// Whether `path` or `path:function` is excepted, which marks the line as needed.
    pub fn covers(&mut self, subject: &str) -> bool {
        let entry = self.entries.iter_mut().find(|e| e.subject == subject);
        entry.is_some_and(|entry| {
            entry.used = true;
            true
        })
    }

    /// The number of lines.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The lines that nothing needed.
    pub fn unused(&self) -> impl Iterator<Item = Violation> {
        let unused = self.entries.iter().filter(|entry| !entry.used);
        unused.map(|entry| {
            let message = format!("{} needs no exception any more: remove it", entry.subject);
            Violation::new(PATH, entry.line, message)
        })
    }
}
