//! The laws on single source files.

use std::ops::Range;

use super::Violation;
use super::exceptions::Exceptions;
use super::lexer::{find_word, functions, line_at, mask, test_items};

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;

/// Where `unsafe` may stand: folders end with a slash.
const UNSAFE_ALLOWED: [&str; 5] = [
    "crates/windlass-kernels/",
    // Glue between ranks: threads lend each other their slices in one place.
    "crates/windlass-comm/src/local/lend.rs",
    // Glue to the MPI library.
    "crates/windlass-comm/src/mpi/wire.rs",
    // Files are mapped into memory in one place.
    "crates/windlass-store/src/mmap.rs",
    // The direct-I/O file of windlass-store: memory that a disk reads or fills by itself.
    "crates/windlass-store/src/swap/ring.rs",
];

/// The one file and variable of the environment below the binary.
const KERNEL_LEVEL: (&str, &str) = (
    "crates/windlass-kernels/src/dispatch.rs",
    "WINDLASS_KERNELS",
);

const PRINTING: [&str; 6] = [
    "println!",
    "eprintln!",
    "print!",
    "eprint!",
    "stdout",
    "stderr",
];
const CLOCK_AND_CHANCE: [&str; 6] = [
    "Instant",
    "SystemTime",
    "std::time",
    "thread_rng",
    "RandomState",
    "getrandom",
];
const EMPTY_NAMES: [&str; 7] = [
    "utils", "util", "common", "types", "helpers", "misc", "stuff",
];
const UNFINISHED: [&str; 2] = ["todo!", "unimplemented!"];
/// Split so that this file does not refuse itself.
const MARKERS: [&str; 3] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
];
const MACHINE_PATHS: [&str; 3] = [
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("/tmp/ba", "sh"),
];
/// The snippets that must be refused.
const SNIPPETS: &str = "xtask/src/tidy/tests.rs";

/// The laws on any text: nothing unfinished is marked, and no path of one machine is written down.
pub fn check_text(path: &str, text: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    if path == SNIPPETS {
        return violations;
    }
    for marker in MARKERS {
        for at in find_word(text, marker) {
            let message = format!("{marker}: finish it or write down the limit in the document");
            violations.push(Violation::new(path, line_at(text, at), message));
        }
    }
    for machine_path in MACHINE_PATHS {
        for (at, _) in text.match_indices(machine_path) {
            let message = format!("`{machine_path}` is a path of one machine");
            violations.push(Violation::new(path, line_at(text, at), message));
        }
    }
    violations
}

/// A Rust file, prepared for the laws.
pub struct Source<'a> {
    path: &'a str,
    text: &'a str,
    code: String,
    tests: Vec<Range<usize>>,
    whole_file_is_test: bool,
}

impl<'a> Source<'a> {
    /// Finds what is code and what is a test.
    pub fn new(path: &'a str, text: &'a str) -> Self {
        let code = mask(text);
        let tests = test_items(&code);
        let parts: Vec<&str> = path.split('/').collect();
        let in_folder = |names: &[&str]| parts.iter().any(|part| names.contains(part));
        Self {
            path,
            text,
            code,
            tests,
            whole_file_is_test: in_folder(&["tests", "benches", "examples", "tests.rs"]),
        }
    }

    /// The lines outside tests.
    pub fn code_lines(&self) -> usize {
        if self.whole_file_is_test {
            return 0;
        }
        let in_tests = self
            .tests
            .iter()
            .map(|r| self.code[r.clone()].lines().count());
        self.text.lines().count().saturating_sub(in_tests.sum())
    }

    /// Every law on Rust files.
    pub fn check(&self, exceptions: &mut Exceptions) -> Vec<Violation> {
        let mut violations = Vec::new();
        self.check_unsafe(&mut violations);
        self.check_unfinished(&mut violations);
        self.check_names(&mut violations);
        self.check_attributes(&mut violations);
        if !self.whole_file_is_test {
            self.check_output_and_environment(&mut violations);
            self.check_clock(&mut violations);
            self.check_sizes(exceptions, &mut violations);
        }
        violations
    }

    fn refuse(&self, at: usize, message: impl Into<String>) -> Violation {
        Violation::new(self.path, line_at(self.text, at), message)
    }

    fn in_tests(&self, at: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&at))
    }

    /// Where a phrase stands in code outside tests.
    fn outside_tests<'s>(&'s self, phrase: &'s str) -> impl Iterator<Item = usize> + 's {
        find_phrase(&self.code, phrase).filter(|&at| !self.in_tests(at))
    }

    fn check_unsafe(&self, violations: &mut Vec<Violation>) {
        if UNSAFE_ALLOWED
            .iter()
            .any(|place| self.path.starts_with(place))
        {
            return;
        }
        for at in find_word(&self.code, "unsafe") {
            violations.push(self.refuse(at, "`unsafe` outside windlass-kernels"));
        }
    }

    fn check_unfinished(&self, violations: &mut Vec<Violation>) {
        for phrase in UNFINISHED {
            for at in find_phrase(&self.code, phrase) {
                violations.push(self.refuse(at, format!("`{phrase}`: nothing is left unfinished")));
            }
        }
        for at in find_phrase(&self.code, "dbg!") {
            violations.push(self.refuse(at, "`dbg!` is for debugging"));
        }
        for at in find_phrase(&self.code, "#[ignore") {
            violations.push(self.refuse(at, "an ignored test tests nothing"));
        }
        for (at, _) in self.text.match_indices("```ignore") {
            if self.code[at..].starts_with("   ") && !self.in_literal(at) {
                violations.push(self.refuse(at, "an ignored example tests nothing"));
            }
        }
    }

    /// Whether blanked text belongs to a literal rather than to a comment.
    fn in_literal(&self, at: usize) -> bool {
        let line = self.text[..at].rfind('\n').map_or(0, |newline| newline + 1);
        !self.text[line..at].trim_start().starts_with("//")
    }

    fn check_names(&self, violations: &mut Vec<Violation>) {
        let model = self.path.starts_with("crates/windlass-model/");
        let mut parts: Vec<&str> = self.path.split('/').collect();
        let file = parts.pop().unwrap_or_default();
        parts.push(file.strip_suffix(".rs").unwrap_or(file));
        for name in parts {
            let bare = name.strip_prefix("windlass-").unwrap_or(name);
            if EMPTY_NAMES.contains(&bare) {
                let message = format!("`{name}` says nothing: name what is in it");
                violations.push(Violation::new(self.path, 0, message));
            }
            if model && name.starts_with("quantized_") {
                let message = "a quantized twin: `linear` chooses by the weight's representation";
                violations.push(Violation::new(self.path, 0, message));
            }
        }
        for at in find_word(&self.code, "mod") {
            let name = word_after(&self.code, at + 3);
            if EMPTY_NAMES.contains(&name) {
                let message = format!("`{name}` says nothing: name what is in it");
                violations.push(self.refuse(at, message));
            }
        }
        for at in find_word(&self.code, "struct") {
            if model && word_after(&self.code, at + 6).starts_with("Quantized") {
                let message = "a quantized twin: `linear` chooses by the weight's representation";
                violations.push(self.refuse(at, message));
            }
        }
    }

    /// A lint is switched off with a reason, and by `expect`, which notices when it is no longer needed.
    fn check_attributes(&self, violations: &mut Vec<Violation>) {
        for (lint, wanted) in [
            ("allow(", "use #[expect(.., reason = \"..\")]"),
            ("expect(", ""),
        ] {
            for opening in ["#[", "#!["] {
                let attribute = format!("{opening}{lint}");
                for (at, _) in self.code.match_indices(&attribute) {
                    let end = self.code[at..].find(']').unwrap_or(0);
                    if !find_word(&self.code[at..at + end], "reason").any(|_| true) {
                        let message = format!("`{attribute}..)]` without a reason {wanted}");
                        violations.push(self.refuse(at, message.trim_end()));
                    }
                }
            }
        }
    }

    fn check_output_and_environment(&self, violations: &mut Vec<Violation>) {
        let free = ["crates/windlass/", "xtask/", "fuzz/", "bindings/"];
        if free.iter().any(|place| self.path.starts_with(place)) || self.is_build_script() {
            return;
        }
        for phrase in PRINTING {
            for at in self.outside_tests(phrase) {
                let message = format!("`{phrase}`: only the crate windlass prints");
                violations.push(self.refuse(at, message));
            }
        }
        for at in self.outside_tests("env::") {
            let line = self
                .text
                .lines()
                .nth(line_at(self.text, at) - 1)
                .unwrap_or("");
            let (file, variable) = KERNEL_LEVEL;
            if self.path != file || !line.contains(variable) {
                let message = "`env::`: only the crate windlass reads the environment";
                violations.push(self.refuse(at, message));
            }
        }
    }

    fn is_build_script(&self) -> bool {
        self.path.ends_with("/build.rs")
    }

    fn check_clock(&self, violations: &mut Vec<Violation>) {
        if !self.path.starts_with("crates/windlass-infer/") {
            return;
        }
        for phrase in CLOCK_AND_CHANCE {
            for at in self.outside_tests(phrase) {
                let message =
                    format!("`{phrase}`: time and chance are arguments in windlass-infer");
                violations.push(self.refuse(at, message));
            }
        }
    }

    fn check_sizes(&self, exceptions: &mut Exceptions, violations: &mut Vec<Violation>) {
        let lines = self.code_lines();
        if lines > MAX_FILE_LINES && !exceptions.covers(self.path) {
            let message = format!("{lines} lines without tests, of {MAX_FILE_LINES}");
            violations.push(Violation::new(self.path, 0, message));
        }
        for function in functions(&self.code) {
            let lines = self.code[function.range.clone()].lines().count();
            let start = function.range.start;
            if lines <= MAX_FUNCTION_LINES || self.in_tests(start) {
                continue;
            }
            let name = function.name;
            if !exceptions.covers(&format!("{}:{name}", self.path)) {
                let message = format!("function {name}: {lines} lines, of {MAX_FUNCTION_LINES}");
                violations.push(self.refuse(start, message));
            }
        }
    }
}

/// Where a phrase stands in code, not as the end or the beginning of a longer word.
fn find_phrase<'a>(code: &'a str, phrase: &'a str) -> impl Iterator<Item = usize> + 'a {
    let word = |c: char| c == '_' || c.is_alphanumeric();
    code.match_indices(phrase)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let before = code[..at].chars().next_back();
            let after = code[at + phrase.len()..].chars().next();
            let joined_before = phrase.starts_with(word) && before.is_some_and(word);
            let joined_after = phrase.ends_with(word) && after.is_some_and(word);
            !joined_before && !joined_after
        })
}

fn word_after(code: &str, at: usize) -> &str {
    let rest = code[at..].trim_start();
    let end = rest.find(|c: char| c != '_' && !c.is_alphanumeric());
    &rest[..end.unwrap_or(rest.len())]
}
