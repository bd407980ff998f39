//! `windlass inspect` and `windlass quantize` from outside.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use windlass::store::atomic::RealDisk;
use windlass::store::gguf::{BlockType, Metadata, TensorInfo, Writer};
use windlass::store::safetensors::{Dtype, Options, Spec, write_folder};

/// Exit code, stdout and stderr of a run.
fn windlass(arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    let output = command
        .args(arguments)
        .env_remove("WINDLASS_KERNELS")
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[track_caller]
fn ok(arguments: &[&str]) -> String {
    let (code, stdout, stderr) = windlass(arguments);
    assert_eq!(code, 0, "{arguments:?}: {stderr}");
    stdout
}

#[track_caller]
fn refused(arguments: &[&str], expected: i32, words: &str) {
    let (code, _, stderr) = windlass(arguments);
    assert_eq!(code, expected, "{arguments:?}: {stderr}");
    assert!(stderr.contains(words), "'{stderr}' does not say '{words}'");
    assert!(
        stderr.contains("hint: ") || stderr.contains("--help"),
        "{stderr}"
    );
}

/// A little Llama in `F16`.
fn model(folder: &Path) -> PathBuf {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    metadata.insert("general.name", "a little model");
    metadata.insert("llama.context_length", 512u32);
    metadata.insert("llama.embedding_length", 256u32);
    metadata.insert("llama.block_count", 2u32);
    metadata.insert("llama.attention.head_count", 4u32);
    metadata.insert("llama.attention.head_count_kv", vec![2u32, 1]);
    metadata.insert("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    let tokens: Vec<String> = (0..300).map(|i| format!("t{i}")).collect();
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert(
        "tokenizer.chat_template",
        "{% for m in messages %}\n{{ m.content }}{% endfor %} and on and on and on",
    );
    let mut tensors = vec![TensorInfo::new(
        "token_embd.weight",
        [300, 256],
        BlockType::F16,
    )];
    for layer in 0..2 {
        let name = |part| format!("blk.{layer}.{part}.weight");
        tensors.push(TensorInfo::new(name("attn_norm"), [256], BlockType::F32));
        tensors.push(TensorInfo::new(name("attn_v"), [64, 256], BlockType::F16));
        tensors.push(TensorInfo::new(
            name("ffn_down"),
            [256, 320],
            BlockType::F16,
        ));
    }
    let path = folder.join("model.gguf");
    let mut writer = Writer::create(&RealDisk, &path, &metadata, &tensors).unwrap();
    for info in &tensors {
        // 1.0 in either type.
        let bytes = match info.block_type {
            BlockType::F16 => 0x3c00u16.to_le_bytes().repeat(info.elements()),
            _ => 1f32.to_le_bytes().repeat(info.elements()),
        };
        writer.write(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    path
}

/// Compares with a file of `tests/snapshots`; `WINDLASS_UPDATE_SNAPSHOTS=1` writes it anew.
#[track_caller]
fn snapshot(name: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/snapshots")
        .join(name);
    if std::env::var_os("WINDLASS_UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        fs::write(&file, text).unwrap();
    }
    let known = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        text == known,
        "{} has changed; if that is right, set WINDLASS_UPDATE_SNAPSHOTS=1:\n{text}",
        file.display()
    );
}

#[test]
fn inspect_says_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let path = path.to_str().unwrap();
    snapshot("inspect-gguf.txt", &ok(&["inspect", path]));
    let object: Value = serde_json::from_str(&ok(&["inspect", path, "--json"])).unwrap();
    assert_eq!(
        object["parameters"],
        300 * 256 + 2 * (256 + 64 * 256 + 256 * 320)
    );
    assert_eq!(object["run"]["kv_bytes_per_token"], 3 * 64 * 2 * 2);
    assert_eq!(object["tensors"][1]["name"], "blk.0.attn_norm.weight");
    let template = ok(&["inspect", path, "--key", "tokenizer.chat_template"]);
    assert!(template.contains("\n{{ m.content }}"), "{template}");
    let tokens: Value =
        serde_json::from_str(&ok(&["inspect", path, "--key", "tokenizer.ggml.tokens"])).unwrap();
    assert_eq!(tokens.as_array().unwrap().len(), 300);
    refused(
        &["inspect", path, "--key", "no.such"],
        1,
        "no metadata key 'no.such'",
    );

    let hf = folder.path().join("hf");
    let specs = [
        Spec::new("a.weight", Dtype::BF16, [4, 6]),
        Spec::new("b.weight", Dtype::F32, [6]),
    ];
    let fill = |i: usize, out: &mut windlass::store::safetensors::TensorWriter| {
        out.values(&vec![1f32; [24, 6][i]])
    };
    write_folder(&RealDisk, &hf, &specs, &Options::default(), fill).unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 6, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 1, "max_position_embeddings": 64}"#;
    fs::write(hf.join("config.json"), config).unwrap();
    snapshot(
        "inspect-safetensors.txt",
        &ok(&["inspect", hf.to_str().unwrap()]),
    );

    let broken = folder.path().join("broken.gguf");
    fs::write(&broken, b"GGUF\x01\0\0\0").unwrap();
    refused(&["inspect", broken.to_str().unwrap()], 1, "GGUF version 1");
    let nothing = folder.path().join("vocabulary.gguf");
    let keys = Metadata::new();
    let writer = Writer::create(&RealDisk, &nothing, &keys, &[]).unwrap();
    writer.finish().unwrap();
    refused(
        &["generate", "--model", nothing.to_str().unwrap()],
        1,
        "has metadata and no weights",
    );
    fs::write(&broken, b"tjgg\x01\0\0\0").unwrap();
    refused(&["inspect", broken.to_str().unwrap()], 1, "old GGJT");
    refused(
        &["inspect", folder.path().join("none.gguf").to_str().unwrap()],
        1,
        "none.gguf",
    );
    refused(
        &["inspect", folder.path().to_str().unwrap()],
        1,
        "no model.safetensors",
    );
}

/// As `windlass inspect FILE | head -0`: no complaint, whichever stream nobody reads.
#[test]
fn output_that_nobody_reads_ends_the_program() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let closed = |arguments: &[&str], code: i32| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
        let pipes = command.args(arguments).stdout(Stdio::piped());
        let mut child = pipes.stderr(Stdio::piped()).spawn().unwrap();
        match code {
            0 => drop(child.stdout.take()),
            _ => drop(child.stderr.take()),
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    };
    let path = path.to_str().unwrap();
    closed(&["inspect", path], 0);
    let out = folder.path().join("out.gguf");
    let arguments = ["quantize", path, out.to_str().unwrap(), "-t", "Q4_K_M"];
    closed(&arguments, 1);
}

#[test]
fn quantize_writes_fewer_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (source, out) = (path.to_str().unwrap(), folder.path().join("out.gguf"));
    let out = out.to_str().unwrap();
    let plan = ok(&["quantize", source, "--type", "q4_k_m", "--dry-run"]);
    snapshot("quantize-plan.txt", &plan);
    assert!(!Path::new(out).exists());
    let (_, _, notes) = windlass(&["quantize", source, "--type", "q6_k", "--dry-run"]);
    // A line for all that fell back alike.
    assert!(
        notes.contains("blk.0.ffn_down.weight and 1 more: Q8_0 instead of Q6_K"),
        "{notes}"
    );
    let object: Value =
        serde_json::from_str(&ok(&["quantize", source, out, "--type", "Q8_0", "--json"])).unwrap();
    assert_eq!(object["tensors"][0]["to"], "Q8_0");
    let text = ok(&["inspect", out]);
    assert!(text.contains("general.file_type"), "{text}");
    let types = [
        "--tensor-type",
        "attn_v=Q5_0",
        "--token-embedding-type",
        "f32",
        "--threads",
        "1",
    ];
    ok(&[&["quantize", source, out, "-t", "Q4_0"], &types[..]].concat());
    let object: Value = serde_json::from_str(&ok(&["inspect", out, "--json"])).unwrap();
    assert_eq!(object["tensors"][0]["type"], "F32");
    assert_eq!(object["tensors"][2]["type"], "Q5_0");
    assert_eq!(object["tensors"][3]["type"], "Q4_0");

    let nowhere = folder.path().join("none/out.gguf");
    let nowhere = nowhere.to_str().unwrap();
    let (_, _, said) = windlass(&["quantize", source, nowhere, "--type", "Q8_0"]);
    assert_eq!(said.matches("No such file").count(), 1, "{said}");
    refused(&["quantize", source, out], 2, "--type");
    refused(&["quantize", source, "--type", "Q8_0"], 2, "OUTPUT");
    refused(&["quantize", source, out, "--type", "Q9"], 2, "Q4_K_M");
    refused(
        &[
            "quantize",
            source,
            out,
            "--type",
            "Q8_0",
            "--tensor-type",
            "x",
        ],
        2,
        "attn_v=Q6_K",
    );
    refused(
        &[
            "quantize",
            source,
            out,
            "--type",
            "Q8_0",
            "--tensor-type",
            "(=Q8_0",
        ],
        2,
        "regex",
    );
    refused(
        &[
            "quantize",
            source,
            out,
            "--type",
            "Q8_0",
            "--tensor-type",
            "a=IQ1_S",
        ],
        2,
        "one of",
    );
    refused(
        &["quantize", source, source, "--type", "Q8_0"],
        1,
        "both the source and the result",
    );
    refused(&["quantize", out, source, "--type", "Q8_0"], 1, "already");
    refused(
        &[
            "quantize",
            source,
            folder.path().to_str().unwrap(),
            "--type",
            "Q8_0",
        ],
        1,
        "is a folder",
    );
    refused(
        &[
            "quantize",
            source,
            out,
            "--type",
            "Q8_0",
            "--imatrix",
            source,
        ],
        1,
        "is not 'imatrix'",
    );
}
