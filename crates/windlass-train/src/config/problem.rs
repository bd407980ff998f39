//! What is wrong with a configuration: all of it, each with key, line and hint.

use std::fmt;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// The key with the keys above it; empty for the file as a whole.
    pub key: String,
    /// The line in the file, where there is one.
    pub line: Option<u32>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(out, "line {line}: ")?;
        }
        if !self.key.is_empty() {
            write!(out, "{}: ", self.key)?;
        }
        out.write_str(&self.message)
    }
}

/// A configuration that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {}", lines(.problems))]
pub struct Invalid {
    /// The file, or what stands for it.
    pub name: String,
    /// Everything that is wrong; at least one.
    pub problems: Vec<Problem>,
}

fn lines(problems: &[Problem]) -> String {
    match problems {
        [one] => one.to_string(),
        many => many
            .iter()
            .fold(format!("{} problems", many.len()), |text, problem| {
                let hint = problem.hint.as_ref().map(|hint| format!(" ({hint})"));
                format!("{text}\n  {problem}{}", hint.unwrap_or_default())
            }),
    }
}

impl Invalid {
    /// What to do, when one thing is wrong; several have their hints beside them.
    pub fn hint(&self) -> Option<String> {
        match &self.problems[..] {
            [one] => one.hint.clone(),
            _ => Some(
                "correct all of these; windlass config check prints what every key comes to"
                    .to_owned(),
            ),
        }
    }
}
