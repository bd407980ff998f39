//! The quickstart, shorter than a user's: it must learn, and leave a model that loads.

use std::process::Command;

/// Chance is below 30 %: one answer in two when comparing, one in four when remembering, next to none elsewhere.
const LEAST_SCORE: u32 = 60;

#[test]
fn a_short_quickstart_learns() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_windlass"))
        .args(["quickstart", "--steps", "600", "--out"])
        .arg(folder.path().join("quickstart"))
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{err}");
    let line = out
        .lines()
        .find(|line| line.trim_start().starts_with("all"))
        .expect("a score");
    let score: u32 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(score >= LEAST_SCORE, "{out}");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(
            folder.path().join("quickstart/model").join(file).is_file(),
            "{file}"
        );
    }
}
