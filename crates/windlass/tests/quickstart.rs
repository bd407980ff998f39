//! The quickstart, shorter than a user's: it must learn, and leave a model that loads, in four bits too.

use std::path::Path;
use std::process::Command;

/// Chance is below 30 %: one answer in two when comparing, one in four when remembering, next to none elsewhere.
const LEAST_SCORE: u32 = 60;

/// What a command prints.
fn windlass(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_windlass"))
        .args(args)
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {err}");
    String::from_utf8(output.stdout).unwrap()
}

/// Four bits of our own predict no worse than the same bits of a file, where scales are shared by 128 columns almost as
/// well.
fn four_bits_predict_as_well(folder: &Path) {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (model, plain, packed) = (path("model"), path("model.gguf"), path("q4_0.gguf"));
    let text = std::fs::read_to_string(folder.join("corpus.txt")).unwrap();
    let end = &text[text.ceil_char_boundary(text.len() - 60_000)..];
    std::fs::write(path("end.txt"), end).unwrap();
    windlass(&["convert", &model, &plain]);
    windlass(&["quantize", &plain, &packed, "--type", "Q4_0", "--pure"]);
    let perplexity = |model: &[&str]| {
        let text = path("end.txt");
        let eval = [
            "eval",
            "perplexity",
            "--json",
            "--file",
            &text,
            "--window",
            "64",
            "--model",
        ];
        let report = windlass(&[&eval[..], model].concat());
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        report["perplexity"].as_f64().unwrap()
    };
    let file = perplexity(&[&packed]);
    let [q4, q4g128] = ["q4", "q4g128"].map(|load| perplexity(&[&model, "--load-in", load]));
    let bf16 = perplexity(&[&model]);
    println!("perplexity {bf16:.3}, Q4_0 {file:.3}, q4 {q4:.3}, q4g128 {q4g128:.3}");
    assert!(q4 <= 1.005 * file, "q4 {q4} beside {file}");
    assert!(q4g128 <= 1.01 * file, "q4g128 {q4g128} beside {file}");
    assert!(q4 != bf16 && q4 < 1.1 * bf16, "q4 {q4} beside {bf16}");
}

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
    four_bits_predict_as_well(&folder.path().join("quickstart"));
}
