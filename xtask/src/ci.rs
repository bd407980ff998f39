//! Every check of the repository, one after the other: the command that the README names.
//!
//! All steps run even when an earlier one fails, so that one run shows everything. It needs Rust; the fuzz
//! step also a C++ compiler and the last ones Python; they are skipped in words without. What MPI needs is installed.

mod clients;
mod debian;
mod hosts;
mod mpi;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context;

use crate::tidy;

/// How long each fuzz target runs in seconds.
const FUZZ_SECONDS: u32 = 10;

/// What reads the files of the quickstart.
const PYTHON_PACKAGES: [&str; 5] = [
    "numpy",
    "safetensors",
    "setuptools<81",
    "tensorboard",
    "tokenizers",
];

/// What a step came to.
enum Outcome {
    Passed(String),
    Failed(String),
    Skipped(String),
}

/// The tests of all crates together.
#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
}

/// Runs every step, or only those named; true when none failed.
pub fn run(root: &Path, only: &[&str]) -> anyhow::Result<bool> {
    let started = Instant::now();
    let mut totals = Totals::default();
    let mut report = Vec::new();
    let mut step = |name: &'static str, check: &mut dyn FnMut() -> anyhow::Result<Outcome>| {
        if !only.is_empty() && !only.contains(&name) {
            return;
        }
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = check().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        report.push((name, start.elapsed().as_secs_f64(), outcome));
    };
    step("format", &mut || cargo(root, &["fmt", "--all", "--check"]));
    step("lints", &mut || {
        let targets = ["clippy", "--release", "--workspace", "--all-targets"];
        cargo(root, &[&targets[..], &["--", "-D", "warnings"]].concat())
    });
    step("tidy", &mut || Ok(outcome(tidy::run(root)?, "see above")));
    step("tests", &mut || tests(root, &mut totals));
    step("mpi", &mut || mpi::processes(root, &mut totals));
    step("several hosts", &mut || mpi::hosts(root));
    step("documentation", &mut || {
        let mut doc = command(
            root,
            "cargo",
            &["doc", "--release", "--workspace", "--no-deps"],
        );
        status(doc.env("RUSTDOCFLAGS", "-D warnings"))
    });
    step("fuzzing", &mut || fuzz(root));
    step("quickstart", &mut || quickstart(root));
    step("python", &mut || python(root));
    step("clients", &mut || clients::run(root));

    println!();
    // A name that no step has must not pass for one that did.
    let mut all_passed = only
        .iter()
        .all(|name| report.iter().any(|(known, ..)| known == name));
    for (name, seconds, outcome) in &report {
        let (word, detail) = match outcome {
            Outcome::Passed(detail) => ("passed", detail),
            Outcome::Skipped(detail) => ("skipped", detail),
            Outcome::Failed(detail) => ("FAILED", detail),
        };
        all_passed &= word != "FAILED";
        println!("{name:<14} {word:<8} {seconds:>6.1} s  {detail}");
    }
    let verdict = if all_passed { "passed" } else { "FAILED" };
    println!("ci {verdict} in {:.0} s", started.elapsed().as_secs_f64());
    println!("{} passed, {} failed", totals.passed, totals.failed);
    Ok(all_passed)
}

fn outcome(passed: bool, failure: &str) -> Outcome {
    if passed {
        Outcome::Passed(String::new())
    } else {
        Outcome::Failed(failure.to_owned())
    }
}

fn command(folder: &Path, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder);
    command.env("CARGO_TERM_COLOR", "never");
    command
}

fn cargo(root: &Path, arguments: &[&str]) -> anyhow::Result<Outcome> {
    status(&mut command(root, "cargo", arguments))
}

fn status(command: &mut Command) -> anyhow::Result<Outcome> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    Ok(outcome(status.success(), &status.to_string()))
}

/// All tests of all crates.
fn tests(root: &Path, totals: &mut Totals) -> anyhow::Result<Outcome> {
    let arguments = ["test", "--release", "--workspace", "--no-fail-fast"];
    counted(root, &arguments, totals)
}

/// Runs `cargo test`, adding up the summary line of each test binary.
fn counted(root: &Path, arguments: &[&str], totals: &mut Totals) -> anyhow::Result<Outcome> {
    let before = (totals.passed, totals.failed);
    let mut child = command(root, "cargo", arguments)
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo test")?;
    let stdout = child.stdout.take().context("the output of cargo test")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        if let Some((passed, failed)) = summary(&line) {
            totals.passed += passed;
            totals.failed += failed;
        }
    }
    let status = child.wait()?;
    if !status.success() && totals.failed == before.1 {
        // A crate that does not compile or a test binary that dies leaves no summary line.
        totals.failed += 1;
    }
    let (passed, failed) = (totals.passed - before.0, totals.failed - before.1);
    let detail = format!("{passed} passed, {failed} failed");
    Ok(match status.success() {
        true => Outcome::Passed(detail),
        false => Outcome::Failed(detail),
    })
}

/// The counts of a line such as `test result: ok. 10 passed; 0 failed; 0 ignored; …`.
fn summary(line: &str) -> Option<(u64, u64)> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |name: &str| {
        let mut parts = counts.split("; ");
        parts.find_map(|part| part.strip_suffix(name)?.trim().parse().ok())
    };
    Some((count("passed")?, count("failed")?))
}

/// A short run of every fuzz target. It is built here with the coverage flags of cargo-fuzz, so that neither
/// that tool nor a nightly compiler is needed.
fn fuzz(root: &Path) -> anyhow::Result<Outcome> {
    let folder = root.join("fuzz");
    if !folder.join("Cargo.toml").exists() {
        return Ok(Outcome::Skipped("there are no fuzz targets".to_owned()));
    }
    if Command::new("c++").arg("--version").output().is_err() {
        return Ok(Outcome::Skipped(
            "libFuzzer needs a C++ compiler".to_owned(),
        ));
    }
    let host = host()?;
    let target = root.join("target/fuzz");
    let flags = [
        "--cfg fuzzing -Cdebug-assertions -Ccodegen-units=1 -Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
    ]
    .join(" ");
    let mut build = command(&folder, "cargo", &["build", "--release", "--target", &host]);
    build.env("RUSTFLAGS", flags);
    build.env("CARGO_TARGET_DIR", &target);
    if let Outcome::Failed(detail) = status(&mut build)? {
        return Ok(Outcome::Failed(format!("the build: {detail}")));
    }
    let mut failed = Vec::new();
    let names = fuzz_targets(&folder)?;
    for name in &names {
        let corpus = target.join("corpus").join(name);
        std::fs::create_dir_all(&corpus)?;
        let program = target.join(&host).join("release").join(name);
        let limit = format!("-max_total_time={FUZZ_SECONDS}");
        let artifacts = format!("-artifact_prefix={}/", target.display());
        let mut run = Command::new(&program);
        run.args([limit.as_str(), artifacts.as_str(), "-rss_limit_mb=4096"]);
        run.arg(&corpus);
        let seeds = folder.join("seeds").join(name);
        if seeds.is_dir() {
            run.arg(seeds);
        }
        // Its log is long, and of use only when an input was found.
        let output = run
            .output()
            .with_context(|| program.display().to_string())?;
        let log = String::from_utf8_lossy(&output.stderr);
        let done = log.lines().rfind(|line| line.starts_with("Done "));
        println!("{name}: {}", done.unwrap_or(log.as_ref()));
        if !output.status.success() {
            failed.push(name.as_str());
        }
    }
    if !failed.is_empty() {
        return Ok(Outcome::Failed(failed.join(", ")));
    }
    let detail = format!("{} targets, {FUZZ_SECONDS} s each", names.len());
    Ok(Outcome::Passed(detail))
}

/// The target triple of this machine.
fn host() -> anyhow::Result<String> {
    let output = Command::new("rustc").arg("-vV").output()?;
    let text = String::from_utf8(output.stdout)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}

/// The names of the targets: one file each.
fn fuzz_targets(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in folder.join("fuzz_targets").read_dir()? {
        let path = PathBuf::from(entry?.file_name());
        if let (Some(stem), Some("rs")) = (
            path.file_stem().and_then(|stem| stem.to_str()),
            path.extension().and_then(|ending| ending.to_str()),
        ) {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Where the quickstart runs; its files stay until the next run.
fn quickstart_folder(root: &Path) -> PathBuf {
    root.join("target/ci-quickstart")
}

/// The first command of the README, as a user runs it, in an empty folder.
fn quickstart(root: &Path) -> anyhow::Result<Outcome> {
    let folder = quickstart_folder(root);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let manifest = root.join("Cargo.toml");
    let manifest = manifest.to_string_lossy();
    let arguments = [
        "run",
        "--release",
        "--manifest-path",
        &manifest,
        "--",
        "quickstart",
    ];
    status(&mut command(&folder, "cargo", &arguments))
}

/// Reads the files of the quickstart with Python's own tools, where Python and a package index are at hand.
fn python(root: &Path) -> anyhow::Result<Outcome> {
    with_python(root, "python", &PYTHON_PACKAGES, |interpreter| {
        let mut script = Command::new(interpreter);
        script.arg(root.join("xtask/python/read_quickstart.py"));
        script.arg(quickstart_folder(root));
        status(&mut script)
    })
}

/// Does something with a Python that has packages, in an environment of its own; skipped where that cannot be.
fn with_python(
    root: &Path,
    name: &str,
    packages: &[&str],
    work: impl FnOnce(&Path) -> anyhow::Result<Outcome>,
) -> anyhow::Result<Outcome> {
    let skipped = |reason: &str| Ok(Outcome::Skipped(reason.to_owned()));
    let venv = root.join("target").join(name);
    let interpreter = venv.join("bin/python");
    if !interpreter.exists() {
        let mut create = Command::new("python3");
        let created = create.args(["-m", "venv"]).arg(&venv).status();
        if !created.is_ok_and(|status| status.success()) {
            return skipped("python3 with venv is not here");
        }
    }
    let mut install = Command::new(&interpreter);
    install.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]);
    install.args(packages);
    if let Outcome::Failed(_) = status(&mut install)? {
        return skipped("pip cannot install the packages");
    }
    work(&interpreter)
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn summary_lines_are_understood() {
        for (line, expected) in [
            (
                "test result: ok. 10 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.16s",
                Some((10, 0)),
            ),
            (
                "test result: FAILED. 9 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
                Some((9, 1)),
            ),
            ("test a::b ... ok", None),
            ("running 3 tests", None),
        ] {
            assert_eq!(summary(line), expected, "{line}");
        }
    }
}
