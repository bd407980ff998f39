//! `windlass train` from outside: killed and resumed, interrupted, planned, refused, on every kind of file.

use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use windlass::store::checkpoint::Checkpoints;
use windlass::tensor::Rng;

/// A folder with a text and the configuration of a tiny model.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
        });
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let bench = Bench { folder };
        bench.file("text.txt", &stories(30).join("\n##\n"));
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// Training of the tiny model on `data` into the folder `out`, with more flags.
    fn command(&self, data: &str, out: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
        command.env_remove("WINDLASS_KERNELS").arg("train");
        command
            .arg(self.path(data))
            .arg("--out")
            .arg(self.path(out));
        command.arg("--model-config").arg(self.path("config.json"));
        let small = "--vocab-size 300 --batch 2 --seq-len 32 --threads 1";
        command.args(small.split(' ')).args(flags);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, data: &str, out: &str, flags: &[&str]) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.command(data, out, flags).output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }
}

fn stories(count: usize) -> Vec<String> {
    let words = ["rope", "crank", "load", "lifts", "turns", "slow", "heavy"];
    let mut rng = Rng::new(11);
    let mut story = || {
        (0..40)
            .map(|_| *rng.choose(&words))
            .collect::<Vec<_>>()
            .join(" ")
    };
    (0..count).map(|_| story()).collect()
}

/// All files of the checkpoint after `step`: weights, moments and place.
fn state(out: &Path, step: u64) -> Vec<(String, Vec<u8>)> {
    let checkpoint = Checkpoints::open(out).get(step).unwrap();
    let read = |name: &str| (name.to_string(), checkpoint.bytes(name).unwrap());
    checkpoint.files().map(read).collect()
}

/// The step that `latest` names; 0 before the first checkpoint.
fn named(out: &Path) -> u64 {
    let name = fs::read_to_string(out.join("latest")).unwrap_or_default();
    let digits = name.trim().trim_start_matches("step-");
    digits.parse().unwrap_or(0)
}

/// Kills a run some time after it has saved `step`; false if it ended before.
fn kill_after(mut child: Child, out: &Path, step: u64, wait: Duration) -> bool {
    while named(out) < step && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(wait);
    let ended = child.try_wait().unwrap();
    assert!(ended.is_none_or(|status| status.success()), "{ended:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    ended.is_none()
}

#[test]
fn a_killed_run_ends_where_an_undisturbed_one_does() {
    // Alone, and on ranks that write a checkpoint together.
    killed_and_resumed(&[]);
    killed_and_resumed(&["--ranks", "3", "--zero-stage", "3"]);
    // And while checkpoints are written beside the steps.
    killed_and_resumed(&["--async-checkpoints", "--ranks", "2"]);
}

fn killed_and_resumed(ranks: &[&str]) {
    let bench = Bench::new();
    let steps = 24;
    let mut flags = vec!["--steps", "24", "--save-every", "1", "--eval-every", "5"];
    flags.extend(ranks);
    let (code, said) = bench.run("text.txt", "whole", &flags);
    assert_eq!(code, Some(0), "{said}");

    let out = bench.path("killed");
    let mut rng = Rng::new(3);
    let (mut kills, mut places) = (0, Vec::new());
    while named(&out) < steps - 4 {
        let resume = Checkpoints::open(&out).latest().unwrap();
        places.push(resume.as_ref().map_or(0, |found| found.checkpoint.step()));
        let mut command = bench.command("text.txt", "killed", &flags);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.args(resume.map(|_| "--resume"));
        let (saved, wait) = (named(&out) + rng.below(4), rng.below(25));
        let child = command.spawn().unwrap();
        kills += u32::from(kill_after(child, &out, saved, Duration::from_millis(wait)));
    }
    println!("killed {kills} times, started at {places:?}");
    assert!(kills >= 3, "{kills} kills, started at {places:?}");
    let mut rest = flags.to_vec();
    rest.push("--resume");
    let (code, said) = bench.run("text.txt", "killed", &rest);
    assert_eq!(code, Some(0), "{said}");
    assert!(state(&out, steps) == state(&bench.path("whole"), steps));
    let kept = Checkpoints::open(&out).steps().unwrap();
    assert_eq!(kept.last(), Some(&steps));
    assert!(kept.len() <= 2, "{kept:?}");
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_ends_well() {
    let bench = Bench::new();
    let mut child = bench
        .command("text.txt", "run", &["--steps", "10000000"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let metrics = bench.path("run/metrics.jsonl");
    let begin = Instant::now();
    while fs::metadata(&metrics).map_or(0, |m| m.len()) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(120), "no step");
        assert_eq!(child.try_wait().unwrap(), None);
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let found = Checkpoints::open(bench.path("run"))
        .latest()
        .unwrap()
        .unwrap();
    let last = fs::read_to_string(&metrics).unwrap();
    let last: serde_json::Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
    assert_eq!(last["step"], found.checkpoint.step());
}

#[test]
fn a_plan_writes_nothing_and_an_old_run_is_not_overwritten() {
    let bench = Bench::new();
    let (code, said) = bench.run("text.txt", "run", &["--plan"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("parameters") && said.contains("memory: "),
        "{said}"
    );
    assert!(said.contains("fits: "), "{said}");
    // A run that does not fit is refused, and what would make it fit is named; nothing makes it fit in a kilobyte.
    let flags = |memory| ["--memory", memory, "--plan"];
    for (memory, hints) in [
        ("575K", ["it fits with --", "it then needs"]),
        ("1K", ["no setting", "--checkpoint-activations"]),
    ] {
        let (code, said) = bench.run("text.txt", "run", &flags(memory));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("error: the run needs "), "{said}");
        let hint = said.lines().find(|l| l.starts_with("hint: ")).unwrap();
        assert!(hints.iter().all(|part| hint.contains(part)), "{hint}");
    }
    assert!(!bench.path("run").exists());

    let (code, said) = bench.run("text.txt", "run", &["--resume"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("hint: leave --resume out"), "{said}");
    let (code, said) = bench.run("text.txt", "run", &["--steps", "2"]);
    assert_eq!(code, Some(0), "{said}");
    let before = state(&bench.path("run"), 2);
    let (code, said) = bench.run("text.txt", "run", &["--steps", "3"]);
    assert_eq!(code, Some(1));
    assert!(
        said.contains("another run") && said.contains("--resume"),
        "{said}"
    );
    assert!(state(&bench.path("run"), 2) == before);
    let (code, said) = bench.run(
        "text.txt",
        "run",
        &["--steps", "3", "--resume", "--seed", "7"],
    );
    assert_eq!(code, Some(1));
    assert!(
        said.contains("cannot resume") && said.contains("hint: "),
        "{said}"
    );
}

#[test]
fn every_kind_of_file_is_learned_from() {
    let bench = Bench::new();
    let stories = stories(30);
    let records: Vec<_> = stories
        .iter()
        .map(|s| json!({"id": 1, "story": s}))
        .collect();
    let lines: Vec<String> = records.iter().map(|r| r.to_string()).collect();
    bench.file("data.jsonl", &lines.join("\n"));
    bench.file("data.json", &json!(records).to_string());
    parquet(&bench.path("data.parquet"), &stories);
    for data in ["data.jsonl", "data.json", "data.parquet"] {
        let out = format!("run-{data}");
        let (code, said) = bench.run(data, &out, &["--field", "story", "--steps", "2"]);
        assert_eq!(code, Some(0), "{data}: {said}");
        assert!(said.contains("of 30 documents"), "{data}: {said}");
        assert_eq!(Checkpoints::open(bench.path(&out)).steps().unwrap(), [2]);
    }
    let first = state(&bench.path("run-data.jsonl"), 2);
    for other in ["run-data.json", "run-data.parquet"] {
        assert!(state(&bench.path(other), 2) == first, "{other}");
    }
    let (code, said) = bench.run("data.jsonl", "other", &["--field", "text"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("story"), "the fields that exist: {said}");
}

/// Numbers of the rows of a table of collectives: name, then calls, bytes, theory.
fn collectives(said: &str) -> Vec<[&str; 4]> {
    let after = said
        .rsplit("communication of the first rank")
        .next()
        .unwrap();
    let rows = after
        .lines()
        .skip(2)
        .take_while(|row| row.starts_with("  "));
    rows.map(|row| {
        let cells: Vec<&str> = row.split_whitespace().collect();
        [cells[0], cells[1], cells[2], cells[3]]
    })
    .collect()
}

/// Gradients of four passes, reduced one by one or together: a quarter of the bytes.
#[test]
fn gradients_are_reduced_once_a_step_where_that_is_asked_for() {
    let bench = Bench::new();
    bench.file("ds.json", r#"{"sync_each_batch": false, "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "optimizer": {"type": "AdamW"}}"#);
    let config = bench.path("ds.json").display().to_string();
    let reduced = |name: &str, more: &[&str]| -> usize {
        let flags = "--steps 2 --ranks 2 --accumulate 4 --comms --zero-stage 1".split(' ');
        let flags: Vec<&str> = flags.chain(more.iter().copied()).collect();
        let (code, said) = bench.run("text.txt", name, &flags);
        assert_eq!(code, Some(0), "{said}");
        let rows = collectives(&said);
        let [_, _, bytes, theory] = rows.iter().find(|row| row[0] == "reduce_scatter").unwrap();
        assert_eq!(bytes, theory, "{said}");
        bytes.replace(['_', ','], "").parse().unwrap()
    };
    let each = reduced("each", &[]);
    assert_eq!(each, 4 * reduced("once", &["--reduce-once"]));
    assert_eq!(each, 4 * reduced("file", &["--config", &config]));
    let refused = ["--reduce-once", "--zero-stage", "2", "--ranks", "2"];
    let (code, said) = bench.run("text.txt", "refused", &refused);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("--reduce-once with --zero-stage 2") && said.contains("hint: "),
        "{said}"
    );
}

#[test]
fn what_a_configuration_asks_to_be_shown_is_shown() {
    let bench = Bench::new();
    let check = |name: &str, stage: u8, accumulate: u32, ranks: u32, expected: &[&str]| {
        let config = json!({
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": true},
            "steps_per_print": 2, "wall_clock_breakdown": true, "dump_state": true,
            "comms_logger": {"enabled": true},
            "flops_profiler": {"enabled": true, "profile_step": 2, "output_file": bench.path("profile")},
            "csv_monitor": {"enabled": true, "output_path": bench.path("curves"), "job_name": name},
            "tensorboard": {"enabled": true, "job_name": "board"},
        });
        let file = bench.file("ds_config.json", &config.to_string());
        let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
        let out = bench.path(name);
        command.env_remove("WINDLASS_KERNELS").arg("train");
        command.arg(bench.path("text.txt")).arg("--out").arg(&out);
        command.arg("--model-config").arg(bench.path("config.json"));
        command.arg("--config").arg(&file);
        command.args("--vocab-size 300 --seq-len 32 --threads 1 --steps 4".split(' '));
        command.args(["--ranks", &ranks.to_string()]);
        let Output { status, stderr, .. } = command.output().unwrap();
        let said = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{said}");

        let lines = |start: &str| said.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(
            (lines("step=2, skipped=0, lr=1e-3, loss="), lines("step=")),
            (1, 2),
            "{said}"
        );
        assert_eq!(lines("time (ms), mean of 2 steps: forward "), 2, "{said}");
        assert_eq!(lines("time (ms), mean of 4 steps: forward "), 1, "{said}");
        assert_eq!(lines("comms_logger.enabled "), 1, "{said}");

        let rows = collectives(&said);
        let names: Vec<&str> = rows
            .iter()
            .map(|row| row[0])
            .filter(|n| *n != "control")
            .collect();
        assert_eq!(names, expected, "{said}");
        for [name, calls, bytes, theory] in rows {
            assert!(
                name == "control" || (bytes == theory && calls != "0"),
                "{name}: {said}"
            );
        }

        let profile = fs::read_to_string(bench.path("profile")).unwrap();
        let rows: Vec<Vec<&str>> = profile
            .lines()
            .skip(2)
            .map(|line| {
                line.trim_start()
                    .split("  ")
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        let column = |column: usize| -> Vec<&str> {
            rows.iter()
                .map(|row: &Vec<&str>| row[column].trim())
                .collect()
        };
        assert_eq!(
            column(0),
            ["embedding", "layer 0", "layer 1", "head", "all"],
            "{profile}"
        );
        // q and o of 32 x 32, k and v of 32 x 16, three matrices of 32 x 48, two norms; the table has 320 rows of 32.
        let matrices = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48;
        let (block, table) = (matrices + 64, 320 * 32 + 32);
        let parameters = [table, block, block, 0, table + 2 * block].map(|n| n.to_string());
        assert_eq!(column(1), parameters, "{profile}");
        // One sequence of 32 tokens: 32 x 33 / 2 pairs, two products of 32 over the heads for each.
        let forward = 2 * 32 * matrices + 4 * 32 * (32 * 33 / 2);
        let head = 2 * 32 * 320 * 32;
        let flops = [0, forward, forward, head, 2 * forward + head]
            .map(|n| format!("{:.6}", f64::from(n) / 1e9));
        assert_eq!(column(2), flops, "{profile}");
        for (row, name) in rows.iter().zip(column(0)).skip(1) {
            let numbers: Vec<f64> = row[3..]
                .iter()
                .map(|cell| cell.trim().parse().unwrap())
                .collect();
            assert!(numbers[0] > 0.0 && numbers[3] > 0.0, "{name}: {profile}");
            assert!(numbers[1] > 0.0 || name == "head", "{name}: {profile}");
        }

        let batch = u64::from(accumulate * ranks);
        let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
        let records: Vec<serde_json::Value> = metrics
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        for (key, column) in [
            ("loss", "train_loss"),
            ("lr", "lr"),
            ("forward_ms", "elapsed_time_ms_forward"),
            ("reduce_ms", "elapsed_time_ms_backward_allreduce"),
            ("eval_loss", "eval_loss"),
        ] {
            let path = bench.path(&format!("curves/{name}/Train_Samples_{column}.csv"));
            let text = fs::read_to_string(path).unwrap();
            let mut rows = text.split("\r\n");
            assert_eq!(rows.next(), Some(format!("step,{column}").as_str()));
            let mut written = records.iter().filter(|record| record[key].is_f64());
            for row in rows.by_ref().take_while(|row| !row.is_empty()) {
                let record = written.next().expect("a record for each row");
                let (samples, value) = row.split_once(',').unwrap();
                let step = record["step"].as_u64().unwrap();
                assert_eq!(samples.parse(), Ok(step * batch), "{text}");
                let (value, expected): (f64, _) = (value.parse().unwrap(), record[key].as_f64());
                // The reader of JSON is off by a bit now and then.
                assert!(
                    (value - expected.unwrap()).abs() <= 1e-12 * value.abs(),
                    "{text}"
                );
            }
            assert!(
                written.next().is_none() && text.lines().count() > 1,
                "{text}"
            );
        }
        let board = fs::read_dir(out.join("board"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        let board = fs::read(board.path()).unwrap();
        let tag = b"Train/Samples/train_loss";
        assert_eq!(
            board
                .windows(tag.len())
                .filter(|bytes| bytes == tag)
                .count(),
            4
        );
    };
    check("one", 2, 1, 1, &[]);
    let both = ["all_gather", "reduce_scatter"];
    check("replicated", 0, 2, 3, &both);
    check("partitioned", 3, 2, 2, &both);
}

/// A Parquet file with the column `story`.
fn parquet(path: &Path, stories: &[String]) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::writer::SerializedFileWriter;
    let schema = "message table { required byte_array story (UTF8); }";
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema.into(), Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<ByteArray> = stories.iter().map(|s| s.as_str().into()).collect();
    let typed = column.typed::<ByteArrayType>();
    typed.write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

/// A `ds_config.json` on two ranks with everything offloaded; the run goes on alone, and its masters are exported.
#[test]
fn a_deepspeed_configuration_trains_on_ranks_and_is_exported() {
    let bench = Bench::new();
    let folder = bench.folder.path().display();
    let config = format!(
        r#"{{
            "train_batch_size": 8,  // two ranks, two sequences, twice
            "train_micro_batch_size_per_gpu": "auto",
            "bf16": {{"enabled": true}},
            "optimizer": {{"type": "Adam", "params": {{"lr": 1e-3, "weight_decay": 0.1}}}},
            "scheduler": {{"type": "WarmupCosineLR", "params": {{"total_num_steps": "auto", "warmup_num_steps": 2}}}},
            "zero_optimization": {{
                "stage": 3,
                "stage3_param_persistence_threshold": 1e2,
                "offload_param": {{"device": "nvme", "nvme_path": "{folder}"}},
                "offload_optimizer": {{"device": "nvme", "nvme_path": "{folder}"}},
            }},
        }}"#
    );
    bench.file("ds.json", &config);
    let ds = bench.path("ds.json");
    let flags = ["--config", ds.to_str().unwrap(), "--steps", "6"];
    let run = |flags: &[&str]| bench.run("text.txt", "out", flags);
    let (code, text) = run(&[&flags[..], &["--ranks", "2", "--save-every", "3"]].concat());
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("for each of 2 ranks"), "{text}");
    let found = Checkpoints::open(bench.path("out")).latest().unwrap();
    assert_eq!(found.unwrap().checkpoint.step(), 6);

    // Alone it takes more of the same sequences in a step.
    let (code, text) = run(&["--config", ds.to_str().unwrap(), "--steps", "8", "--resume"]);
    assert_eq!(code, Some(0), "{text}");
    let checkpoint = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
        let output = command.arg("checkpoint").args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (out, f32s) = (bench.path("out"), bench.path("f32"));
    let (out, f32s) = (out.to_str().unwrap(), f32s.to_str().unwrap());
    let (code, text) = checkpoint(&["verify", out]);
    assert_eq!(
        (code, text.matches("whole").count()),
        (Some(0), 2),
        "{text}"
    );
    let (_, text) = checkpoint(&["inspect", out, "--json"]);
    let summary: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&summary["step"], &summary["ranks"]),
        (&json!(8), &json!(1))
    );
    for (from, saved_by) in [("out", 1), ("out/step-00000006", 2)] {
        let (from, to) = (bench.path(from), format!("{f32s}-{saved_by}"));
        let (code, text) = checkpoint(&["export", from.to_str().unwrap(), &to]);
        assert_eq!(code, Some(0), "{text}");
        let step = if saved_by == 1 { 8 } else { 6 };
        let weights = Checkpoints::open(out).get(step).unwrap().weights().unwrap();
        let masters = windlass::store::safetensors::Tensors::open(Path::new(&to)).unwrap();
        let mut finer = 0;
        for name in weights.names() {
            let (weight, master) = (weights.get(name).unwrap(), masters.get(name).unwrap());
            for (w, m) in weight.bytes.chunks(2).zip(master.bytes.chunks(4)) {
                let master = u32::from_le_bytes([m[0], m[1], m[2], m[3]]);
                let weight = u16::from_le_bytes([w[0], w[1]]);
                let rounded = (master.wrapping_add(0x8000) >> 16) as u16;
                assert_eq!(rounded, weight, "{name}");
                finer += usize::from(master & 0xffff != 0);
            }
        }
        assert!(finer > 1000, "{finer} masters are finer than their weights");
    }
    let (code, text) = checkpoint(&["export", out, out]);
    assert_eq!(
        code,
        Some(0),
        "a folder of checkpoints holds no model of its own: {text}"
    );
    let (code, text) = checkpoint(&["export", out, out]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("hint:"), "{text}");
}
