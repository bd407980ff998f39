//! `windlass convert` and `windlass eval logits` from outside.

use std::fs;
use std::path::Path;
use std::process::Command;
use windlass::store::gguf::File;

/// Exit code and stderr of a run.
fn windlass(arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    let output = command
        .args(arguments)
        .env_remove("WINDLASS_KERNELS")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), stderr)
}

#[track_caller]
fn ok(arguments: &[&str]) {
    let (code, stderr) = windlass(arguments);
    assert_eq!(code, 0, "{arguments:?}: {stderr}");
}

#[track_caller]
fn refused(arguments: &[&str], expected: i32, words: &str) {
    let (code, stderr) = windlass(arguments);
    assert_eq!(code, expected, "{arguments:?}: {stderr}");
    assert!(stderr.contains(words), "'{stderr}' does not say '{words}'");
    assert!(stderr.contains("hint: "), "{stderr}");
}

#[test]
fn folders_become_files_and_files_folders() {
    let arch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../windlass-train/tests/fixtures/arch");
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let model = arch.join("llama");
    let model = model.to_str().unwrap();
    let (file, small, folder) = (path("a.gguf"), path("q8.gguf"), path("b"));
    ok(&["convert", model, &file]);
    // Rows of 16 are no blocks of 32.
    let (code, stderr) = windlass(&["convert", model, &small, "--type", "q8_0"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("instead of Q8_0"), "{stderr}");
    let opened = File::open(Path::new(&small)).unwrap();
    assert_eq!(
        opened.metadata().get_u32("general.file_type").unwrap(),
        Some(7)
    );
    ok(&["convert", &file, &folder]);
    let logits = |model: &str, name: &str| {
        let out = path(name);
        ok(&[
            "eval", "logits", "--model", model, "--ids", "1,5,2,23", "--out", &out,
        ]);
        fs::read(out).unwrap()
    };
    let want = logits(model, "x");
    assert_eq!(want.len(), 4 * 24 * 4);
    assert!(logits(&file, "y") == want && logits(&folder, "z") == want);
    refused(&["convert", &file, &file], 1, "is a file");
    refused(&["convert", &file, &folder], 1, "holds a model");
    refused(
        &["convert", model, &path("c")],
        2,
        "is no name of a GGUF file",
    );
    refused(
        &["convert", &file, &folder, "--type", "q8_0"],
        2,
        "for a folder",
    );
    let gemma = arch.join("gemma2");
    refused(
        &["convert", gemma.to_str().unwrap(), &path("d.gguf")],
        1,
        "query_pre_attn_scalar",
    );
    assert!(!Path::new(&path("d.gguf")).exists());
}
