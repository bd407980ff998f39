//! The checks over MPI: ranks as processes of this host, and of two hosts that exist for the length of the check.
//!
//! What they need is installed where that is possible (Debian, root). Where it is not, the checks fail, unless
//! `WINDLASS_CI_SKIP=mpi,hosts` says that they may be left out.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::hosts::Hosts;
use super::{Outcome, Totals, cargo, command, counted, debian, status};

/// What is needed, and the Debian packages that bring it.
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

/// Installs what is missing.
fn install() -> anyhow::Result<()> {
    let missing = debian::install(&NEEDS, &[]);
    if !missing.is_empty() {
        bail!(
            "{} not found and not installable here: install it, or set WINDLASS_CI_SKIP=mpi,hosts",
            missing.join(", ")
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

/// Four ranks on two hosts against four threads: every collective gives the same numbers, and a training the same
/// losses and weights.
pub fn hosts(root: &Path) -> anyhow::Result<Outcome> {
    if may_skip("hosts") {
        return Ok(Outcome::Skipped("WINDLASS_CI_SKIP names it".to_owned()));
    }
    install()?;
    let comm = [
        "-p",
        "windlass-comm",
        "--features",
        "mpi",
        "--example",
        "selftest",
    ];
    let train = ["-p", "windlass", "--features", "mpi"];
    for package in [&comm[..], &train] {
        if let Outcome::Failed(detail) = cargo(root, &[&["build", "--release"], package].concat())?
        {
            return Ok(Outcome::Failed(format!("the build: {detail}")));
        }
    }
    let programs = built(root)?;
    let hosts = Hosts::new()?;
    let results = collectives(&hosts, root, &programs.join("examples/selftest"))?;
    let files = training(&hosts, root, &programs.join("windlass"))?;
    Ok(Outcome::Passed(format!(
        "4 ranks on 2 hosts as 4 threads: {results}; {files} files of a training"
    )))
}

/// Compares the results of all collectives.
fn collectives(hosts: &Hosts, root: &Path, selftest: &Path) -> anyhow::Result<String> {
    let selftest = selftest.to_string_lossy();
    let expected = output(command(root, &selftest, &["local", "4"]))?;
    let before = hosts.bytes_sent()?;
    let found = output(hosts.mpirun(root, 4, &[selftest.as_ref(), "mpi"]))?;
    let sent = hosts.bytes_sent()? - before;
    println!("{found}");
    if found != expected {
        bail!("four threads gave\n{expected}");
    }
    // Otherwise the messages went another way, and nothing was tested.
    if sent < 100_000_000 {
        bail!("only {sent} bytes left the first host");
    }
    let lines = found.lines().count();
    Ok(format!("{lines} results, {} MB sent", sent / 1_000_000))
}

/// Compares a training by four threads with one that `windlass launch` starts on two hosts; how many files are equal.
fn training(hosts: &Hosts, root: &Path, windlass: &Path) -> anyhow::Result<usize> {
    let folder = root.join("target/ci-hosts");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let line = |n: u32| {
        format!(
            "The ship {n} left port {} for port {}.\n",
            n * 7 % 13,
            n * n % 31
        )
    };
    std::fs::write(
        folder.join("text.txt"),
        (0..500).map(line).collect::<String>(),
    )?;
    let slots = hosts
        .addresses()
        .map(|address| format!("{address} slots=2\n"));
    std::fs::write(folder.join("hosts"), slots.concat())?;
    let lines = (0..20).map(|n| {
        let line = serde_json::json!({ "prompt": format!("The ship {n}"), "completion": line(n) });
        line.to_string() + "\n"
    });
    std::fs::write(folder.join("samples.jsonl"), lines.collect::<String>())?;
    // Parameters of any size are partitioned.
    let config = serde_json::json!({
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "optimizer": { "type": "AdamW", "params": { "lr": 1e-2 } },
        "zero_optimization": { "stage": 3, "stage3_param_persistence_threshold": 0 },
    });
    std::fs::write(folder.join("zero3.json"), config.to_string())?;
    let windlass = windlass.to_string_lossy();
    let train = "train text.txt --size 1m --vocab-size 300 --steps 6 --batch 1 --accumulate 2 --seq-len 64 \
                 --dtype bf16 --zero-stage 3 --save-every 3";
    let steps = ["step-00000003", "step-00000006"];
    let trained = compared(hosts, &folder, &windlass, train, &steps)?;
    let tune = "finetune --model train-threads --data samples.jsonl --method qlora --steps 4 --max-length 64 --held-out 0.3 \
                --config zero3.json --save-every 2";
    let steps = ["step-00000002", "step-00000004", "best", "last"];
    Ok(trained + compared(hosts, &folder, &windlass, tune, &steps)?)
}

/// Runs a verb by four threads and by four processes on two hosts; how many files of some folders are equal.
fn compared(
    hosts: &Hosts,
    folder: &Path,
    windlass: &str,
    words: &str,
    folders: &[&str],
) -> anyhow::Result<usize> {
    let words: Vec<&str> = words.split_whitespace().collect();
    let names = ["threads", "processes"].map(|how| format!("{}-{how}", words[0]));
    let threads = [&words[..], &["--ranks", "4", "--out", &names[0]]].concat();
    output(command(folder, windlass, &threads))?;
    let network = hosts.network().join(" ");
    let launch = [
        "launch",
        "--hostfile",
        "hosts",
        "--bind",
        "none",
        "--launcher-args",
        &network,
        "--",
    ];
    let launch = [&[windlass], &launch[..], &words, &["--out", &names[1]]].concat();
    output(hosts.on_first(folder, &launch))?;
    let [expected, found] = names.map(|run| folder.join(run));
    if losses(&expected)? != losses(&found)? {
        bail!(
            "{}: the losses are not those of four threads: {}",
            words[0],
            folder.display()
        );
    }
    let mut equal = 0;
    for inner in folders {
        for entry in expected.join(inner).read_dir()? {
            let name = entry?.file_name();
            let read = |run: &Path| std::fs::read(run.join(inner).join(&name));
            if read(&expected)? != read(&found)? {
                bail!(
                    "{} {inner}/{} is not that of four threads",
                    words[0],
                    name.to_string_lossy()
                );
            }
            equal += 1;
        }
    }
    Ok(equal)
}

/// The losses and gradient norms that a run has written down, with their steps.
fn losses(run: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl"))?;
    let mut losses = Vec::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let keys = ["step", "loss", "grad_norm", "eval_loss"];
        losses.push(keys.map(|key| line[key].to_string()).join(" "));
    }
    Ok(losses)
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
