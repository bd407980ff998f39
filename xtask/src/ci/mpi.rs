//! The checks over MPI: ranks as processes of this host, and of two hosts that exist for the length of the check.
//!
//! What they need is installed where that is possible (Debian, root). Where it is not, the checks fail, unless
//! `WINDLASS_CI_SKIP=mpi,hosts` says that they may be left out.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::hosts::Hosts;
use super::{Outcome, Totals, cargo, command, counted, status};

/// A program or library that is looked for, and the Debian packages that bring it.
const NEEDS: [(&str, &[&str]); 4] = [
    ("mpicc", &["libopenmpi-dev"]),
    ("mpirun", &["openmpi-bin"]),
    ("clang", &["clang", "libclang-dev"]),
    ("ip", &["iproute2"]),
];

/// Whether the user lets a check be left out.
pub fn may_skip(name: &str) -> bool {
    let list = std::env::var("WINDLASS_CI_SKIP").unwrap_or_default();
    list.split(',').any(|skipped| skipped.trim() == name)
}

fn present(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Installs what is missing.
fn install() -> anyhow::Result<()> {
    let missing = || NEEDS.iter().filter(|(program, _)| !present(program));
    let packages: Vec<&str> = missing()
        .flat_map(|(_, packages)| packages.iter().copied())
        .collect();
    if packages.is_empty() {
        return Ok(());
    }
    println!("installing {}", packages.join(" "));
    for arguments in [
        &["update", "--quiet"][..],
        &[&["install", "--yes", "--quiet"], &packages[..]].concat(),
    ] {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        // Whether it worked shows below.
        let _ = apt.status();
    }
    let missing: Vec<&str> = missing().map(|(program, _)| *program).collect();
    if !missing.is_empty() {
        bail!(
            "{} not found and not installable here: install {}, or set WINDLASS_CI_SKIP=mpi,hosts",
            missing.join(", "),
            packages.join(" ")
        );
    }
    Ok(())
}

/// Lints and tests of what the feature `mpi` adds.
pub fn processes(root: &Path, totals: &mut Totals) -> anyhow::Result<Outcome> {
    if may_skip("mpi") {
        return Ok(Outcome::Skipped("WINDLASS_CI_SKIP names it".to_owned()));
    }
    install()?;
    let feature = ["--release", "-p", "windlass-comm", "--features", "mpi"];
    let lints = [
        &["clippy"],
        &feature[..],
        &["--all-targets", "--", "-D", "warnings"],
    ]
    .concat();
    if let Outcome::Failed(detail) = cargo(root, &lints)? {
        return Ok(Outcome::Failed(format!("lints: {detail}")));
    }
    counted(
        root,
        &[&["test"], &feature[..], &["--no-fail-fast"]].concat(),
        totals,
    )
}

/// Four ranks on two hosts against four threads: every collective gives the same numbers.
pub fn hosts(root: &Path) -> anyhow::Result<Outcome> {
    if may_skip("hosts") {
        return Ok(Outcome::Skipped("WINDLASS_CI_SKIP names it".to_owned()));
    }
    install()?;
    let build = [
        "build",
        "--release",
        "-p",
        "windlass-comm",
        "--features",
        "mpi",
        "--example",
        "selftest",
    ];
    if let Outcome::Failed(detail) = cargo(root, &build)? {
        return Ok(Outcome::Failed(format!("the build: {detail}")));
    }
    let selftest = built(root)?.join("examples/selftest");
    let expected = output(command(root, &selftest.to_string_lossy(), &["local", "4"]))?;
    let hosts = Hosts::new()?;
    let before = hosts.bytes_sent()?;
    let (program, folder) = (selftest.to_string_lossy(), root);
    let found = output(hosts.mpirun(folder, 4, &[program.as_ref(), "mpi"]))?;
    let sent = hosts.bytes_sent()? - before;
    println!("{found}");
    if found != expected {
        return Ok(Outcome::Failed(format!("four threads gave\n{expected}")));
    }
    // Otherwise the messages went another way, and nothing was tested.
    if sent < 100_000_000 {
        return Ok(Outcome::Failed(format!(
            "only {sent} bytes left the first host"
        )));
    }
    let lines = found.lines().count();
    let detail = format!(
        "{lines} results of 4 ranks on 2 hosts as of 4 threads; {} MB sent",
        sent / 1_000_000
    );
    Ok(Outcome::Passed(detail))
}

/// Where cargo puts release builds.
fn built(root: &Path) -> anyhow::Result<PathBuf> {
    let metadata = ["metadata", "--format-version", "1", "--no-deps"];
    let metadata = output(command(root, "cargo", &metadata))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let target = metadata["target_directory"]
        .as_str()
        .context("target_directory")?;
    Ok(Path::new(target).join("release"))
}

/// What a command that must succeed prints.
fn output(mut command: Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{command:?}: {}\n{log}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a command that must succeed.
pub fn succeed(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    match status(Command::new(program).args(arguments))? {
        Outcome::Passed(_) => Ok(()),
        _ => bail!("{program} {} failed", arguments.join(" ")),
    }
}
