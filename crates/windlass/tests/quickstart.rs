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
/// well: half of all tokens are as near to the unrounded model. Perplexity, of a model as small as this and trained anew on
/// each kind of CPU, differs by a percent or two by chance, for a few tokens decide it.
fn four_bits_predict_as_well(folder: &Path) {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (model, plain, packed) = (path("model"), path("model.gguf"), path("q4_0.gguf"));
    let (end, logits) = (path("end.txt"), path("logits.bin"));
    let text = std::fs::read_to_string(folder.join("corpus.txt")).unwrap();
    let tail = &text[text.ceil_char_boundary(text.len() - 60_000)..];
    std::fs::write(&end, tail).unwrap();
    windlass(&["convert", &model, &plain]);
    windlass(&["quantize", &plain, &packed, "--type", "Q4_0", "--pure"]);
    let perplexity = |flags: &[&str]| -> serde_json::Value {
        let eval = ["eval", "perplexity", "--json", "--model"];
        serde_json::from_str(&windlass(&[&eval[..], flags].concat())).unwrap()
    };
    let number = |report: &serde_json::Value, key: &str| report[key].as_f64().unwrap();
    let keep = [
        &model,
        "--file",
        &end,
        "--window",
        "64",
        "--save-logits",
        &logits,
    ];
    let bf16 = number(&perplexity(&keep), "perplexity");
    let [file, q4, q4g128] = [
        &[&packed[..]][..],
        &[&model, "--load-in", "q4"],
        &[&model, "--load-in", "q4g128"],
    ]
    .map(|flags| {
        let report = perplexity(&[flags, &["--kl-divergence", &logits]].concat());
        println!("{flags:?}: {report}");
        ["median_kl", "perplexity"].map(|key| number(&report, key))
    });
    println!(
        "perplexity {bf16:.3}; divergence and perplexity: Q4_0 {file:?}, q4 {q4:?}, q4g128 {q4g128:?}"
    );
    assert!(q4[0] > 0.0 && q4[0] <= file[0], "q4 {q4:?} beside {file:?}");
    assert!(
        q4g128[0] <= 1.1 * file[0],
        "q4g128 {q4g128:?} beside {file:?}"
    );
    for [_, perplexity] in [q4, q4g128] {
        assert!(perplexity <= 1.03 * file[1], "{perplexity} beside {file:?}");
    }
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
