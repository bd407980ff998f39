//! `windlass launch` from outside, with a launcher that only writes down what it was asked for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the binary in a folder, whose `mpirun` comes first.
fn launch(folder: &Path, arguments: &[&str]) -> Output {
    let path = std::env::var("PATH").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command.current_dir(folder).arg("launch").args(arguments);
    command.env("PATH", format!("{}:{path}", folder.display()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("WINDLASS_") || name == "RUST_BACKTRACE" {
            command.env_remove(name);
        }
    }
    command.env("WINDLASS_KERNELS", "scalar").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A folder with a hostfile and an `mpirun` that fails as often as asked and appends its words to `calls`.
fn folder(failures: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let hosts = "a slots=2 # first\nb slots=2\n";
    fs::write(folder.path().join("hosts"), hosts).unwrap();
    let script =
        format!("#!/bin/sh\necho \"$*\" >> calls\n[ $(wc -l < calls) -gt {failures} ] || exit 7\n");
    let mpirun = folder.path().join("mpirun");
    fs::write(&mpirun, script).unwrap();
    fs::set_permissions(&mpirun, fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

const TRAIN: [&str; 5] = ["--", "train", "data.txt", "--out", "run"];

#[test]
fn a_dry_run_shows_the_command_and_the_places() {
    let folder = folder(0);
    let program = env!("CARGO_BIN_EXE_windlass");
    let train = format!("{program} train data.txt --out run");
    let variables = "-x WINDLASS_KERNELS";
    for (flags, command, places) in [
        (
            &["-H", "hosts", "--bind", "2"][..],
            format!("-n 4 -host a:2,b:2 --map-by slot:PE=2 --bind-to core {variables} {train}"),
            "rank 0: a, cores 0-1\nrank 1: a, cores 2-3\nrank 2: b, cores 0-1\nrank 3: b, cores 2-3\n",
        ),
        (
            &["-H", "hosts", "--bind", "none", "--include", "b@a:1"],
            format!(
                "-n 3 -host a:1,b:2 --oversubscribe --map-by slot --bind-to none {variables} {train}"
            ),
            "rank 0: a, any core\nrank 1: b, any core\nrank 2: b, any core\n",
        ),
        (
            &[
                "-H",
                "hosts",
                "--bind",
                "1",
                "--num_nodes",
                "1",
                "--num-gpus",
                "1",
                "--launcher",
                "mpich",
            ],
            format!("-n 1 -hosts a:1 -bind-to core:1 {train}"),
            "rank 0: a, core 0\n",
        ),
        (
            &[
                "--num-ranks",
                "3",
                "--bind",
                "none",
                "--launcher_args",
                "--mca btl tcp,self",
            ],
            format!(
                "-n 3 -host localhost:3 --oversubscribe --map-by slot --bind-to none {variables} --mca btl tcp,self {train}"
            ),
            "rank 0: localhost, any core\nrank 1: localhost, any core\nrank 2: localhost, any core\n",
        ),
    ] {
        let output = launch(folder.path(), &[flags, &["--dry-run"], &TRAIN].concat());
        let shown = text(&output.stdout);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let (first, rest) = shown.split_once('\n').unwrap();
        let first = first.replace(" --allow-run-as-root", "");
        let launcher = first.split_once(' ').unwrap();
        assert_eq!(launcher.1, command);
        assert_eq!(rest, places);
    }
    assert!(!folder.path().join("calls").exists());
}

#[test]
fn a_training_that_fails_starts_again() {
    for (failures, max_restarts, checkpoint, code, resumes) in [
        (0, 2, true, 0, &[false][..]),
        (2, 2, true, 0, &[false, true, true]),
        (2, 3, false, 0, &[false, false, false]),
        (2, 1, true, 1, &[false, true]),
        (1, 0, true, 1, &[false]),
    ] {
        let folder = folder(failures);
        if checkpoint {
            let step = folder.path().join("run/step-00000007");
            fs::create_dir_all(&step).unwrap();
            fs::write(step.join("manifest.json"), "{}").unwrap();
        }
        let restarts = max_restarts.to_string();
        let flags = [
            "--max-restarts",
            &restarts,
            "--num-ranks",
            "2",
            "--bind",
            "none",
        ];
        let output = launch(folder.path(), &[&flags[..], &TRAIN].concat());
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{log}");
        let calls = fs::read_to_string(folder.path().join("calls")).unwrap();
        let resumed: Vec<bool> = calls
            .lines()
            .map(|call| call.ends_with(" --resume"))
            .collect();
        assert_eq!(resumed, resumes, "{log}");
        assert_eq!(
            log.matches("the job failed (exit status: 7)").count(),
            failures.min(max_restarts + 1)
        );
        assert_eq!(
            log.contains("there is no checkpoint yet"),
            !checkpoint,
            "{log}"
        );
    }
}

#[test]
fn misuse_is_refused_before_anything_starts() {
    let folder = folder(0);
    for (arguments, message) in [
        (
            &["--max-restarts", "1", "--", "info"][..],
            "--max-restarts: 'info' cannot be resumed",
        ),
        (
            &["--", "launch", "--", "info"],
            "launch cannot launch itself",
        ),
        (
            &["--", "train", "--no-such-flag"],
            "unexpected argument '--no-such-flag'",
        ),
        (
            &["--include", "a", "--", "info"],
            "--include without hosts to choose from",
        ),
        (
            &["-H", "hosts", "--include", "c", "--", "info"],
            "--include: there is no host 'c'",
        ),
        (&["-H", "hosts", "--bind", "0", "--", "info"], "--bind 0"),
        (&["-i", "a", "-e", "b", "--", "info"], "cannot be used with"),
        (
            &["--launcher", "slurm", "--", "info"],
            "srun needs the number of ranks",
        ),
        (&["-H", "hosts"], "required arguments"),
    ] {
        let output = launch(folder.path(), arguments);
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{log}");
        assert!(log.contains(message), "{log}");
    }
    let output = launch(folder.path(), &["-H", "none", "--", "info"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot read none"));
    assert!(!folder.path().join("calls").exists());
}
