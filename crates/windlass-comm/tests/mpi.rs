//! Ranks as processes under `mpirun`: the same results as threads, and faults that are named. Needs Open MPI or MPICH.

use std::path::PathBuf;
use std::process::{Command, Output};

/// The example, which is built beside this test.
fn selftest() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap();
    folder.join("examples/selftest")
}

/// Runs that many processes with these arguments.
fn mpirun(ranks: usize, arguments: &[&str]) -> Output {
    let version = Command::new("mpirun").arg("--version").output();
    let version = version.expect("mpirun, of the package openmpi-bin or mpich");
    let mut run = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        run.args(["--allow-run-as-root", "--oversubscribe"]);
    }
    run.args(["-n", &ranks.to_string()]);
    let run = run.arg(selftest()).arg("mpi").args(arguments);
    run.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn processes_give_the_bits_of_threads() {
    for ranks in [1, 2, 3, 4] {
        let mut threads = Command::new(selftest());
        let threads = threads
            .args(["local", &ranks.to_string()])
            .output()
            .unwrap();
        let processes = mpirun(ranks, &[]);
        let log = text(&processes.stderr);
        assert!(
            threads.status.success() && processes.status.success(),
            "{log}"
        );
        let expected = text(&threads.stdout);
        assert_eq!(expected.lines().count(), 15, "{expected}");
        assert_eq!(text(&processes.stdout), expected, "{ranks} ranks: {log}");
    }
}

#[test]
fn faults_end_the_job_and_are_named() {
    let waiting = "all-reduce 'sum layers.3': rank 1";
    for (fault, wanted) in [
        ("stall", format!("{waiting} did not arrive within 3s")),
        // The launcher ends a job in which a process dies.
        ("die", "rank 1".to_owned()),
        (
            "leave",
            format!("{waiting} is gone (it has left the group)"),
        ),
        ("panic", "on purpose".to_owned()),
        ("abort", "rank 1 stopped the job: disk full".to_owned()),
        ("differ", "rank 1 in broadcast 'weights' of 3 u8".to_owned()),
        (
            "disagree",
            "ranks disagree on the configuration: rank 1".to_owned(),
        ),
    ] {
        let ended = mpirun(3, &["fault", fault, "1"]);
        let log = text(&ended.stderr) + &text(&ended.stdout);
        assert!(!ended.status.success(), "{fault}: {log}");
        assert!(log.contains(&wanted), "{fault}: {log}");
    }
}
