//! `windlass finetune` over ranks, from outside: a plan, and the same run by one rank, by several, and after an interruption.

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs the binary in a folder.
fn windlass(folder: &Path, words: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command.current_dir(folder).args(words.split_whitespace());
    let output = command.env_remove("WINDLASS_KERNELS").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{words}: {said}");
    said
}

/// A folder with a tiny model that knows next to nothing, samples, and a configuration that partitions everything.
fn bench() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    write("config.json", config.to_string());
    let line = |n: usize| format!("the crank turns {n} times and lifts {} loads\n", n * n % 17);
    write("text.txt", (0..200).map(line).collect());
    let sample = |n: usize| {
        let sample = json!({ "prompt": format!("turn {n}: "), "completion": line(n) });
        sample.to_string() + "\n"
    };
    write("samples.jsonl", (0..12).map(sample).collect());
    let zero = json!({
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": "auto",
        "optimizer": { "type": "AdamW", "params": { "lr": 1e-2 } },
        "zero_optimization": { "stage": 3, "stage3_param_persistence_threshold": 0 },
    });
    write("zero3.json", zero.to_string());
    let base = "train text.txt --model-config config.json --vocab-size 300 --steps 3 --batch 2 --seq-len 32 --out base";
    windlass(folder.path(), base);
    folder
}

/// The losses that a run has written down.
fn losses(folder: &Path, run: &str) -> Vec<f64> {
    let text = fs::read_to_string(folder.join(run).join("metrics.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["loss"].as_f64()).collect()
}

#[test]
fn ranks_tune_as_one_does() {
    let bench = bench();
    let folder = bench.path();
    let tune = "finetune --model base --data samples.jsonl --config zero3.json --max-length 48 --held-out 0.25 --threads 2";
    let two = format!("{tune} --method qlora --steps 6 --accumulate 1 --ranks 2");
    let plan = windlass(folder, &format!("{two} --plan"));
    for words in [
        "trainable params: ",
        " for each of 2 ranks",
        "sent by each rank in a step",
        "steps: 6, of at most ",
        "time: about ",
    ] {
        assert!(plan.contains(words), "{words}: {plan}");
    }
    windlass(
        folder,
        &format!("{tune} --method qlora --steps 6 --accumulate 2 --out one"),
    );
    windlass(folder, &format!("{two} --out two"));
    let (one, two) = (losses(folder, "one"), losses(folder, "two"));
    assert_eq!(one.len(), 6);
    for (a, b) in one.iter().zip(&two) {
        assert!((a - b).abs() < 1e-4, "{one:?} and {two:?}");
    }
    assert!(two[5] < two[0], "{two:?}");
    for file in [
        "best/adapter_model.safetensors",
        "last/adapter_model.safetensors",
    ] {
        let bytes = ["one", "two"].map(|run| fs::read(folder.join(run).join(file)).unwrap().len());
        assert_eq!(bytes[0], bytes[1], "{file}");
    }
    // All weights, and more steps on another number of ranks.
    let full = format!("{tune} --method full --steps 4 --save-every 2 --sample turn");
    windlass(
        folder,
        &format!("{full} --accumulate 1 --ranks 2 --out full"),
    );
    fs::remove_dir_all(folder.join("full/step-00000004")).unwrap();
    fs::write(folder.join("full/latest"), "step-00000002").unwrap();
    let before = losses(folder, "full");
    windlass(
        folder,
        &format!("{full} --accumulate 2 --out full --resume"),
    );
    let after = losses(folder, "full");
    for (a, b) in before[2..].iter().zip(&after[after.len() - 2..]) {
        assert!((a - b).abs() < 1e-4, "{before:?} and {after:?}");
    }
    let model = fs::read(folder.join("full/last/config.json")).unwrap();
    assert!(!model.is_empty());
}
