//! `windlass config check` and `windlass estimate` from outside.

use serde_json::{Value, json};
use std::process::Command;

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn windlass(arguments: &[&str]) -> Run {
    let output = Command::new(env!("CARGO_BIN_EXE_windlass"))
        .args(arguments)
        .output()
        .unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

const CONFIG: &str = r#"{
    # with a comment
    train_batch_size: "auto"
    train_micro_batch_size_per_gpu: 2
    bfloat16: {enabled: true}
    optimizer: {type: AdamW, params: {lr: "auto", torch_adam: true}}
    zero_optimization: {stage: 3, overlap_comm: true, reduce_bucket_size: "auto"}
    wandb: {enabled: false}
}"#;

#[test]
fn check_prints_every_key_with_value_origin_and_status() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ds_config.json");
    std::fs::write(&file, CONFIG).unwrap();
    let file = file.to_str().unwrap();
    let flags = ["--ranks", "4", "--lr", "3e-4", "--hidden-size", "64"];
    let run = windlass(&[&["config", "check", file][..], &flags].concat());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for [key, value, from, here] in [
        ["train_batch_size", "8", "auto", "honoured"],
        ["gradient_accumulation_steps", "1", "inferred", "honoured"],
        ["gradient_clipping", "1.0", "default", "honoured"],
        ["optimizer.params.lr", "0.0003", "auto", "honoured"],
        ["bf16.enabled", "true", "alias bfloat16, line 5", "honoured"],
        ["zero_optimization.stage", "3", "line 7", "honoured"],
        [
            "zero_optimization.reduce_bucket_size",
            "4096",
            "auto",
            "honoured",
        ],
        [
            "zero_optimization.overlap_comm",
            "true",
            "line 7",
            "no meaning here: ",
        ],
        ["wandb.enabled", "false", "line 8", "not supported: "],
    ] {
        let line = run
            .stdout
            .lines()
            .find(|line| line.starts_with(&format!("{key} ")));
        let line = line.unwrap_or_else(|| panic!("{key} in\n{}", run.stdout));
        let cells: Vec<&str> = line
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect();
        assert_eq!(cells[..3], [key, value, from]);
        assert!(cells[3].starts_with(here), "{line}");
    }
    assert!(
        run.stderr
            .contains("note: bfloat16 is an older name of bf16"),
        "{}",
        run.stderr
    );
    assert!(!run.stdout.contains("elasticity"), "{}", run.stdout);
    let all = windlass(&[&["config", "check", file, "--all"][..], &flags].concat());
    assert!(all.stdout.contains("elasticity.enabled"), "{}", all.stdout);

    let set = [
        "--json",
        "--set",
        "zero_optimization.stage=2",
        "--set",
        "bfloat16.enabled=false",
    ];
    let run = windlass(&[&["config", "check", file][..], &set].concat());
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    let row = |key: &str| {
        let rows = report["keys"].as_array().unwrap();
        rows.iter().find(|row| row["key"] == key).unwrap().clone()
    };
    let stage = json!({
        "key": "zero_optimization.stage", "value": 2, "from": "command line", "status": "honoured", "why": null,
    });
    assert_eq!(row("zero_optimization.stage"), stage);
    assert_eq!(row("bf16.enabled")["value"], false);
    assert_eq!(report["usable"], true);
    assert_eq!(report["fingerprint"].as_str().unwrap().len(), 64);
}

#[test]
fn check_refuses_with_everything_that_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ds_config.json");
    let text = "{train_batch_size: 3, train_micro_batch_size_per_gpu: 2\nzero_optimisation: {}\ntensor_parallel: {autotp_size: 2}}";
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let run = windlass(&["config", "check", file, "--json"]);
    assert_eq!(run.code, Some(1));
    for expected in [
        "3 problems",
        "line 1: train_batch_size: Check batch related parameters. train_batch_size is not equal to \
         micro_batch_per_gpu * gradient_acc_step * world_size 3 != 2 * 1 * 1",
        "line 2: zero_optimisation: unknown key (nearest known: zero_optimization)",
        "line 3: tensor_parallel.autotp_size: 2 is not supported",
        "hint: ",
    ] {
        assert!(
            run.stderr.contains(expected),
            "{expected} in\n{}",
            run.stderr
        );
    }
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["usable"], false);
    assert_eq!(report["problems"].as_array().unwrap().len(), 3);
    for (arguments, code) in [
        (&["config", "check", "no such file"][..], 1),
        (&["config", "check", file, "--ranks", "0"], 2),
        (&["config", "check", file, "--set", "stage"], 2),
        (&["config", "check"], 2),
        (&["config"], 2),
    ] {
        let run = windlass(arguments);
        assert_eq!(run.code, Some(code), "{arguments:?}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{}", run.stdout);
    }
}

#[test]
fn estimate_prints_the_tables_of_deepspeed() {
    let run = windlass(&[
        "estimate",
        "--params",
        "2851e6",
        "--largest-layer",
        "32000000",
        "--ranks-per-node",
        "8",
    ]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let expected = "\
a model, ZeRO-2, by DeepSpeed:
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
  127.45GB |   5.31GB | offload_optimizer=cpu \n  127.45GB |  11.28GB | offload_optimizer=none

a model, ZeRO-3, by DeepSpeed:
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params, 32M largest layer params.
  per CPU  |  per GPU |   Options
   71.69GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1
";
    assert!(run.stdout.starts_with(expected), "{}", run.stdout);
    let run = windlass(&[
        "estimate", "--size", "110m", "--arch", "gpt2", "--nodes", "2", "--json",
    ]);
    let report: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(report["hardware"], json!({"nodes": 2, "ranks_per_node": 1}));
    // GPT-2's positions and its tied embedding of 32,000 rows of 768.
    assert_eq!(report["size"]["largest_layer_params"], 32_000 * 768);
    let two = &report["deepspeed"]["zero2"][0];
    let params = report["size"]["total_params"].as_u64().unwrap();
    assert_eq!(
        (&two["per_gpu"], &two["per_cpu"]),
        (&json!(2 * params), &json!(24 * params))
    );
    assert_eq!(report["deepspeed"]["zero3"].as_array().unwrap().len(), 6);
    // Our own: each stage takes no more than the one before, and a disk far less.
    let peaks: Vec<u64> = report["predicted"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["peak"].as_u64().unwrap())
        .collect();
    assert_eq!(peaks.len(), 5, "four stages and a disk");
    assert!(peaks.windows(2).all(|pair| pair[1] <= pair[0]), "{peaks:?}");
    assert!(peaks[4] < peaks[0] / 2, "{peaks:?}");
    let states = 16 * params;
    assert!((states..states * 3 / 2).contains(&peaks[0]), "{peaks:?}");
    for (memory, fits, settings) in [
        ("8G", true, "these settings"),
        ("660M", true, "\"offload_optimizer\" to nvme in a --config"),
        (
            "1M",
            false,
            "\"nvme_path\" of \"activation_checkpointing\" in a --config and \"offload_optimizer\" to nvme in a --config",
        ),
    ] {
        let arguments = [
            "estimate", "--size", "42m", "--json", "--memory", memory, "--batch", "1",
        ];
        let run = windlass(&arguments);
        let report: Value = serde_json::from_str(&run.stdout).unwrap();
        let advice = &report["memory"];
        assert_eq!(advice["fits"], fits, "{memory}: {advice}");
        let named = advice["settings"].as_str().unwrap();
        assert!(named.ends_with(settings), "{memory}: {advice}");
    }
    for (arguments, code) in [
        (&["estimate"][..], 2),
        (&["estimate", "--params", "7e9"], 2),
        (&["estimate", "--params", "1.5", "--largest-layer", "1"], 2),
        (&["estimate", "--params", "1", "--largest-layer", "2"], 2),
        (
            &[
                "estimate",
                "--size",
                "110m",
                "--params",
                "1",
                "--largest-layer",
                "1",
            ],
            2,
        ),
        (&["estimate", "--size", "110m", "--nodes", "0"], 2),
        (&["estimate", "--size", "111m"], 1),
        (&["estimate", "--model", "no such folder"], 1),
    ] {
        let run = windlass(arguments);
        assert_eq!(run.code, Some(code), "{arguments:?}: {}", run.stderr);
        assert!(run.stdout.is_empty(), "{}", run.stdout);
    }
}
