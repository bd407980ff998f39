//! Repository tasks: `cargo xtask tidy` checks the laws of the architecture, `cargo xtask ci` runs every check.

mod ci;
mod tidy;

use anyhow::Context;
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask <task>

  tidy   refuse what the architecture forbids: dependencies, unsafe, printing, sizes, names
  ci     format, lints, tidy, tests, mpi, several hosts, documentation, fuzzing, quickstart, python;
         with names of steps, only these
";

fn main() -> anyhow::Result<ExitCode> {
    // What cargo says now: a binary built in another checkout of the same target folder would check that one.
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").context("started without cargo; use cargo xtask")?;
    let root = Path::new(&manifest).join("..").canonicalize()?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let passed = match arguments[..] {
        ["tidy"] => tidy::run(&root)?,
        ["ci", ref only @ ..] => ci::run(&root, only)?,
        ["help" | "-h" | "--help"] => {
            print!("{USAGE}");
            true
        }
        _ => {
            eprint!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    };
    Ok(ExitCode::from(u8::from(!passed)))
}
