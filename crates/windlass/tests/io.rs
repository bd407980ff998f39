//! `windlass io bench` from outside.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

fn command(dir: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command.args(["io", "bench", "--dir"]).arg(dir).args(flags);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(dir: &Path, flags: &[&str]) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command(dir, flags).output().expect("a run");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (status.code(), text(stdout), text(stderr))
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).expect("the folder").count()
}

const SMALL: [&str; 10] = [
    "--size",
    "6M",
    "--seconds",
    "0.05",
    "--block-size",
    "64K,1M",
    "--queue-depth",
    "1,4",
    "--threads",
    "1,2",
];

#[test]
fn settings_are_swept_and_the_best_can_be_pasted() {
    let dir = tempfile::tempdir().expect("a folder");
    let with = |more: &[&str]| run(dir.path(), &[&SMALL, more].concat());
    let (code, stdout, stderr) = with(&["--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("one object");
    let trials = report["trials"].as_array().expect("a list");
    assert_eq!(trials.len(), 4 + 3, "four settings, three with two threads");
    for trial in trials {
        for speed in ["read_gb_s", "write_gb_s"] {
            assert!(trial[speed].as_f64().is_some_and(|s| s > 0.0), "{trial}");
        }
    }
    let best = &report["best"]["aio"];
    for key in ["block_size", "queue_depth", "intra_op_parallelism"] {
        assert!(best[key].as_u64().is_some_and(|n| n > 0), "{best}");
    }
    for backend in ["io_uring", "threads"] {
        let (code, stdout, stderr) = with(&["--read", "--backend", backend]);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(stdout.contains("\nread, GB/s, 1 thread\n"), "{stdout}");
        assert!(!stdout.contains("write, GB"), "{stdout}");
        let (_, block) = stdout.split_once("for ds_config.json:\n").expect("a block");
        let block: Value = serde_json::from_str(block).expect("JSON to paste");
        assert_eq!(block["aio"]["overlap_events"], true);
    }
    assert_eq!(entries(dir.path()), 0, "nothing stays");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path();
    let missing = path.join("missing");
    for (dir, flags, code, says) in [
        (path, &["--size", "1000T"][..], 1, "are missing"),
        (&missing, &[], 1, "missing/windlass-io-bench"),
        (path, &["--size", "much"], 2, "such as 128K, 1M or 4G"),
        (path, &["--size", "4K"], 2, "--size 4096"),
        (path, &["--block-size", "1000"], 1, "aio.block_size is 1000"),
        (path, &["--queue-depth", "0"], 1, "aio.queue_depth is 0"),
        (
            path,
            &["--block-size", "512M", "--queue-depth", "64"],
            2,
            "512 MiB",
        ),
        (path, &["--seconds=-1"], 2, "--seconds"),
        (path, &["--read", "--write"], 2, "--write"),
    ] {
        let (found, stdout, stderr) = run(dir, flags);
        assert_eq!(found, Some(code), "{flags:?}: {stderr}");
        assert!(
            stderr.contains(says) && stdout.is_empty(),
            "{flags:?}: {stderr}"
        );
        let clap = stderr.contains("For more information");
        assert!(clap || stderr.contains("hint: "), "{flags:?}: {stderr}");
    }
}

#[test]
fn a_killed_run_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut child = command(dir.path(), &["--size", "64M"])
        .spawn()
        .expect("a run");
    std::thread::sleep(Duration::from_millis(300));
    assert!(
        child.try_wait().expect("its state").is_none(),
        "it takes longer"
    );
    child.kill().expect("a kill");
    child.wait().expect("its end");
    assert_eq!(entries(dir.path()), 0);
}
