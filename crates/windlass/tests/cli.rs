//! The `windlass` binary from outside: output, exit codes, and what it says to bad input.

use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use windlass::model::{DecoderConfig, Tokenizer, decoder};
use windlass::store::checkpoint::Checkpoints;
use windlass::store::gguf::File;
use windlass::store::{Store, elements, save_weights};
use windlass::tensor::{Cpu, DType};

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    /// The output of a run that must succeed.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// The JSON objects that a successful run printed, one a line.
    #[track_caller]
    fn json(self) -> Vec<Value> {
        let lines = self.ok();
        lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

/// Runs the binary away from any hub and any setting of the caller's.
fn windlass(arguments: &[&str], environment: &[(&str, &str)], stdin: &str) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command.args(arguments).env_remove("WINDLASS_KERNELS");
    command
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", "no-such-cache");
    command.envs(environment.iter().copied());
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = pipes.stderr(Stdio::piped()).spawn().unwrap();
    // A run that fails before it reads closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

const TEXT: &str = "the cat sat on the mat and the dog sat on the log while the rat ran. ";

/// A folder with a tiny model of random weights, and its tokenizer.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with(json!({}))
    }

    /// A model whose configuration has these keys.
    fn with(changes: Value) -> Self {
        let fixture = Fixture {
            folder: tempfile::tempdir().unwrap(),
        };
        let folder = fixture.path();
        let base = json!({
            "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "initializer_range": 0.5, "tie_word_embeddings": false,
        });
        fs::write(folder.join("config.json"), base.to_string()).unwrap();
        fixture.edit_config(changes);
        let config = DecoderConfig::load(folder).unwrap();
        let model = decoder(&config);
        let store = Store::init(&Cpu::new(1), model.units(), DType::F32, 3);
        let map = config.naming.file_tensors(&model);
        save_weights(
            folder,
            model.units(),
            &map,
            DType::F32,
            &Default::default(),
            |id| elements(store.gather(id.unit).unwrap().at(id.slot).weight),
        )
        .unwrap();
        let texts = vec![TEXT; 20];
        Tokenizer::train(texts.iter(), 290, "<|end|>")
            .unwrap()
            .save(folder)
            .unwrap();
        fixture
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn name(&self) -> &str {
        self.path().to_str().unwrap()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.file(name), content).unwrap();
        self.file(name).display().to_string()
    }

    /// Sets keys of `config.json`; null removes.
    fn edit_config(&self, changes: Value) {
        let text = fs::read_to_string(self.file("config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&text).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        self.write("config.json", config.to_string());
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap();
    }

    /// Keeps the first bytes of a file.
    fn truncate(&self, name: &str, keep: usize) {
        let bytes = fs::read(self.file(name)).unwrap();
        self.write(name, &bytes[..keep]);
    }
}

/// A damage to a model folder, and what `generate` must say to it.
type Damage = (&'static str, fn(&Fixture), &'static [&'static str]);

const DAMAGES: &[Damage] = &[
    (
        "no configuration",
        |f| f.remove("config.json"),
        &["no config.json in this folder"],
    ),
    (
        "configuration cut",
        |f| f.truncate("config.json", 20),
        &["config.json", "EOF"],
    ),
    (
        "configuration is a list",
        |f| drop(f.write("config.json", "[1]")),
        &["config.json", "a JSON object is expected"],
    ),
    (
        "unknown architecture",
        |f| f.edit_config(json!({ "model_type": "lama" })),
        &[
            "config.json",
            "unknown architecture \"lama\"",
            "nearest known: llama",
            "mixtral",
            "gpt_neox",
        ],
    ),
    (
        "no architecture",
        |f| f.edit_config(json!({ "model_type": null })),
        &["\"model_type\": is missing", "qwen3"],
    ),
    (
        "missing key",
        |f| f.edit_config(json!({ "hidden_size": null })),
        &["config.json", "\"hidden_size\": is missing"],
    ),
    (
        "wrong type",
        |f| f.edit_config(json!({ "num_hidden_layers": "two" })),
        &[
            "\"num_hidden_layers\"",
            "a non-negative integer is expected and this is \"two\"",
        ],
    ),
    (
        "heads that do not divide",
        |f| f.edit_config(json!({ "num_key_value_heads": 3 })),
        &["\"num_key_value_heads\"", "4 heads are not a multiple"],
    ),
    (
        "no weights",
        |f| f.remove("model.safetensors"),
        &["no model.safetensors"],
    ),
    (
        "weights cut",
        |f| f.truncate("model.safetensors", 20_000),
        &["model.safetensors"],
    ),
    (
        "header cut",
        |f| f.truncate("model.safetensors", 100),
        &["model.safetensors"],
    ),
    (
        "empty weights",
        |f| f.truncate("model.safetensors", 0),
        &["model.safetensors"],
    ),
    (
        "weights of another kind",
        |f| drop(f.write("model.safetensors", [0xff; 4096])),
        &["model.safetensors"],
    ),
    (
        "another shape",
        |f| f.edit_config(json!({ "intermediate_size": 64 })),
        &["gate_proj", "[48, 32]", "expected [64, 32]"],
    ),
    (
        "another depth",
        |f| f.edit_config(json!({ "num_hidden_layers": 3 })),
        &["no tensor named 'model.layers.2.", "did you mean"],
    ),
    (
        "a shard that is not there",
        |f| {
            f.remove("model.safetensors");
            f.write(
                "model.safetensors.index.json",
                r#"{"weight_map": {"a": "model-1.safetensors"}}"#,
            );
        },
        &["1 of 1 shards are missing", "model-1.safetensors"],
    ),
    (
        "no tokenizer",
        |f| f.remove("tokenizer.json"),
        &["no tokenizer.json in", "--tokenizer"],
    ),
    (
        "tokenizer cut",
        |f| f.truncate("tokenizer.json", 500),
        &["tokenizer.json is not valid"],
    ),
    (
        "more tokens than embeddings",
        |f| f.edit_config(json!({ "vocab_size": 270 })),
        &[
            "(vocab_size) is 270",
            "the tokenizer that belongs to the model",
        ],
    ),
];

#[test]
fn damaged_models_are_refused_with_a_hint() {
    for (name, damage, expected) in DAMAGES {
        let fixture = Fixture::new();
        damage(&fixture);
        refuse(
            name,
            &["generate", "--model", fixture.name(), "--prompt", "the"],
            1,
            expected,
        );
    }
    let fixture = Fixture::with(json!({ "attention_bias": true }));
    fixture.edit_config(json!({ "attention_bias": false }));
    let said = [
        "no bias or scale where the file has one",
        "model.layers.0.self_attn.k_proj.bias",
        "attention_bias",
    ];
    refuse(
        "unknown biases",
        &["generate", "--model", fixture.name()],
        1,
        &said,
    );
}

/// Runs what must fail with `code`, saying the `expected` and ending with a hint.
#[track_caller]
fn refuse(name: &str, arguments: &[&str], code: i32, expected: &[&str]) {
    let run = windlass(arguments, &[], "");
    let said = &run.stderr;
    assert_eq!(run.code, Some(code), "{name}: {said}");
    for text in expected {
        assert!(said.contains(text), "{name}: {text:?} is not in\n{said}");
    }
    let last = said.trim_end().lines().last().unwrap_or_default();
    // The parser of the command line ends in its own words.
    let ends_well = last.starts_with("hint: ") || code == 2 && last.contains("--help");
    assert!(ends_well, "{name}: no hint at the end of\n{said}");
    assert!(
        !said.contains("panicked") && run.stdout.is_empty(),
        "{name}: {said}{}",
        run.stdout
    );
}

#[test]
fn bad_input_is_refused_by_name() {
    let fixture = Fixture::new();
    let model = fixture.name();
    let long = TEXT.repeat(20);
    let latin = fixture.write("latin.txt", b"caf\xe9");
    let empty = fixture.write("empty.txt", "");
    let short = fixture.write("short.txt", "the cat sat");
    let questions = fixture.write(
        "q.jsonl",
        "{\"question\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 5}",
    );
    let config = fixture.file("config.json").display().to_string();
    let checkpoints = tempfile::tempdir().unwrap();
    fs::write(checkpoints.path().join("latest"), "step-00000007\n").unwrap();
    let checkpoints = checkpoints.path().to_str().unwrap();
    let (generate, eval) = (
        &["generate", "--model", model][..],
        &["eval", "perplexity", "--model", model][..],
    );
    let choice = &["eval", "choice", "--model", model][..];
    for (start, more, code, expected) in [
        (
            &["generate", "--model", "no/such/folder"][..],
            &[][..],
            1,
            &["no/such/folder"][..],
        ),
        (&["generate", "--model", "org/name"], &[], 1, &["org/name"]),
        (
            &["generate", "--model", &config],
            &[],
            1,
            &["config.json", "is a file"],
        ),
        (
            &["generate", "--model", checkpoints],
            &[],
            1,
            &["no complete checkpoint", "step-00000007"],
        ),
        (&["generate"], &[], 2, &["--model"]),
        (&["generat"], &[], 2, &["generat"]),
        (
            generate,
            &["--prompt", &long],
            1,
            &["the prompt has", "max_position_embeddings) is 64"],
        ),
        (
            generate,
            &["--prompt-file", "no-such-file"],
            1,
            &["no-such-file"],
        ),
        (
            generate,
            &["--prompt-file", &latin],
            1,
            &["latin.txt", "byte 3"],
        ),
        (
            generate,
            &["--tokenizer", "no-such-file"],
            1,
            &["no tokenizer.json"],
        ),
        (generate, &["--frobnicate"], 2, &["--frobnicate"]),
        (
            generate,
            &["--temperature", "-1"],
            2,
            &["--temperature -1", "0 or more"],
        ),
        (
            generate,
            &["--temperature", "warm"],
            2,
            &["--temperature", "warm"],
        ),
        (
            generate,
            &["--temperature", "nan"],
            2,
            &["--temperature NaN"],
        ),
        (generate, &["--top-p", "2"], 2, &["--top-p 2", "at most 1"]),
        (generate, &["--min-p", "-0.1"], 2, &["--min-p -0.1"]),
        (
            generate,
            &["--repetition-penalty", "0"],
            2,
            &["--repetition-penalty 0"],
        ),
        (generate, &["--max-tokens", "0"], 2, &["--max-tokens 0"]),
        (generate, &["--stop", ""], 2, &["--stop"]),
        (
            generate,
            &["--greedy", "--top-k", "3"],
            2,
            &["--greedy", "--top-k"],
        ),
        (generate, &["--load-in", "q9"], 2, &["q9", "q8", "bf16"]),
        (
            generate,
            &["--load-in", "bf16", "--dtype", "f32"],
            2,
            &["--load-in bf16 with --dtype f32"],
        ),
        (generate, &["--dtype", "f8"], 2, &["f8", "bf16"]),
        (
            &["adapter", "merge", "--model", model, "--adapter", model],
            &["--out", "no-such-folder", "--kv-cache-dtype", "int8"],
            2,
            &["--kv-cache-dtype"],
        ),
        (generate, &["--threads", "0"], 2, &["--threads 0"]),
        (generate, &["-p", "-", "-p", "-"], 2, &["given twice"]),
        (eval, &[], 2, &["--file"]),
        (eval, &["--file", "no-such-file"], 1, &["no-such-file"]),
        (eval, &["--file", &latin], 1, &["latin.txt", "not UTF-8"]),
        (eval, &["--file", &empty], 1, &["the text is empty"]),
        (
            eval,
            &["--file", &config, "--window", "65"],
            2,
            &["--window 65", "context"],
        ),
        (
            eval,
            &["--file", &config, "--window", "8", "--stride", "9"],
            2,
            &["--stride 9"],
        ),
        (
            eval,
            &["--file", &short, "--window", "64"],
            2,
            &["--window 64", "the tokens of the text"],
        ),
        (
            eval,
            &["--kl-divergence", &config],
            1,
            &["config.json", "holds no saved logits"],
        ),
        (
            eval,
            &["--kl-divergence", "a", "--file", "b"],
            2,
            &["--kl-divergence", "--file"],
        ),
        (
            choice,
            &["--file", &questions],
            1,
            &["q.jsonl: line 1", "the answer 5 names none of 2"],
        ),
        (
            choice,
            &["--file", &empty],
            1,
            &["the file of questions is empty"],
        ),
    ] {
        let arguments = [start, more].concat();
        refuse(&format!("{arguments:?}"), &arguments, code, expected);
    }
    let forced = windlass(&["info"], &[("WINDLASS_KERNELS", "sse9")], "");
    assert_eq!(forced.code, Some(2));
    assert!(forced.stderr.contains("WINDLASS_KERNELS=sse9") && forced.stderr.contains("hint: "));
}

#[test]
fn generate_continues_every_prompt() {
    let fixture = Fixture::new();
    let model = fixture.name();
    let common = [
        "generate",
        "--model",
        model,
        "--max-tokens",
        "12",
        "--ignore-eos",
        "--threads",
        "2",
    ];
    let generate = |more: &[&str], stdin: &str| windlass(&[&common[..], more].concat(), &[], stdin);

    let objects = generate(
        &["--greedy", "--json", "-p", "the cat", "-p", "-"],
        "the dog\n",
    )
    .json();
    assert_eq!(objects.len(), 2);
    for (object, prompt) in objects.iter().zip(["the cat", "the dog"]) {
        assert_eq!(object["prompt"], prompt);
        assert_eq!(object["stop_reason"], "max_tokens");
        assert_eq!(object["generated_tokens"], 12);
        assert_eq!(object["ids"].as_array().unwrap().len(), 12);
        assert!(object["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(object["seconds"].as_f64().unwrap() > 0.0);
    }
    let text = objects[0]["text"].as_str().unwrap();
    assert_eq!(
        generate(&["--greedy", "-p", "the cat"], "").ok(),
        format!("{text}\n")
    );
    let file = fixture.write("prompt.txt", "the cat\n");
    assert_eq!(
        generate(&["--greedy", "--prompt-file", &file], "").ok(),
        format!("{text}\n")
    );

    // A seed decides, whatever else is asked for and however many threads compute.
    let seeded = |seed: &str, more: &[&str]| {
        let start = [
            "--temperature",
            "1.5",
            "--top-k",
            "50",
            "--seed",
            seed,
            "--json",
        ];
        let objects = generate(&[&start[..], more].concat(), "").json();
        objects.last().unwrap()["ids"].clone()
    };
    let first = seeded("1", &["-p", "the rat"]);
    assert_eq!(first, seeded("1", &["-p", "the log", "-p", "the rat"]));
    assert_ne!(first, seeded("2", &["-p", "the rat"]));

    // A stop string taken from the text ends it there.
    let middle = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[middle..].chars().take(2).collect();
    let objects = generate(
        &["--greedy", "--json", "-p", "the cat", "--stop", &stop],
        "",
    )
    .json();
    assert_eq!(objects[0]["stop_reason"], "stop_string");
    assert_eq!(objects[0]["stop_string"], stop.as_str());
    assert_eq!(objects[0]["text"], text.split(&stop).next().unwrap());

    // Without a prompt, in other representations, and to the end of the context.
    for more in [
        &["--dtype", "bf16"][..],
        &["--load-in", "q8"],
        &["--load-in", "q8", "--dtype", "bf16"],
        &["--load-in", "q4"],
        &["--load-in", "q4s64"],
        &["--load-in", "q4s128"],
        &["--load-in", "q4g32"],
        &["--load-in", "q4g64"],
        &["--load-in", "q4g128"],
        &["--load-in", "bf16"],
        &["--load-in", "f16", "--dtype", "f16"],
    ] {
        let run = generate(&[more, &["--greedy", "--json"]].concat(), "");
        let packed = more.get(1).is_some_and(|form| form.starts_with('q'));
        assert_eq!(
            run.stderr.contains("with weights of"),
            packed,
            "{more:?}: {}",
            run.stderr
        );
        let objects = run.json();
        assert_eq!(
            (
                &objects[0]["prompt_tokens"],
                &objects[0]["generated_tokens"]
            ),
            (&json!(1), &json!(12))
        );
    }
    let whole = [
        "generate",
        "--model",
        model,
        "--ignore-eos",
        "--json",
        "-p",
        "the",
    ];
    assert_eq!(
        windlass(&whole, &[], "").json()[0]["stop_reason"],
        "context"
    );
}

#[test]
fn checkpoints_open_like_models() {
    let fixture = Fixture::new();
    let runs = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::open(runs.path());
    let mut writer = checkpoints.begin(7).unwrap();
    for entry in fs::read_dir(fixture.path()).unwrap() {
        let entry = entry.unwrap();
        let (name, content) = (entry.file_name(), fs::read(entry.path()).unwrap());
        writer.bytes(name.to_str().unwrap(), &content).unwrap();
    }
    writer.commit(None).unwrap();
    let text = |model: &Path| {
        let model = model.to_str().unwrap();
        windlass(
            &["generate", "-m", model, "-p", "the", "--max-tokens", "5"],
            &[],
            "",
        )
        .ok()
    };
    let expected = text(fixture.path());
    assert_eq!(text(runs.path()), expected);
    assert_eq!(text(&runs.path().join("step-00000007")), expected);
}

#[test]
fn hub_ids_open_from_the_cache() {
    let fixture = Fixture::new();
    let home = tempfile::tempdir().unwrap();
    let repository = home.path().join("hub/models--org--tiny");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = repository.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), commit).unwrap();
    for entry in fs::read_dir(fixture.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), snapshot.join(entry.file_name())).unwrap();
    }
    let home = [("HF_HOME", home.path().to_str().unwrap())];
    let generate =
        |model: &str| windlass(&["generate", "-m", model, "--max-tokens", "5"], &home, "").ok();
    assert_eq!(generate("org/tiny"), generate(fixture.name()));
    assert_eq!(
        generate(&format!("org/tiny@{commit}")),
        generate(fixture.name())
    );
}

#[test]
fn eval_reports_its_measures() {
    let fixture = Fixture::new();
    let model = fixture.name();
    let file = fixture.write("text.txt", TEXT.repeat(5));
    let eval = [
        "eval",
        "perplexity",
        "--model",
        model,
        "--file",
        &file,
        "--window",
        "32",
    ];
    let run = |more: &[&str]| windlass(&[&eval[..], more].concat(), &[], "");
    let objects = run(&["--stride", "8", "--json"]).json();
    let field = |name: &str| objects[0][name].as_f64().unwrap();
    assert_eq!((field("window"), field("stride")), (32.0, 8.0));
    assert_eq!(field("scored_tokens"), field("tokens") - 1.0);
    assert!((field("loss").exp() / field("perplexity") - 1.0).abs() < 1e-9);
    let bits = field("loss") * field("tokens") / std::f64::consts::LN_2 / (5 * TEXT.len()) as f64;
    assert!((bits / field("bits_per_byte") - 1.0).abs() < 1e-9);
    let words = run(&["--stride", "8"]).ok();
    assert!(
        words.contains(&format!("{:.4}", field("perplexity"))),
        "{words}"
    );
    // Control tokens in a text are told of, and can be read as llama-perplexity reads them.
    let marked = fixture.write("marked.txt", format!("{TEXT}<|end|>").repeat(5));
    let eval = [
        "eval",
        "perplexity",
        "-m",
        model,
        "--window",
        "16",
        "--json",
        "-f",
        &marked,
    ];
    let read = |more: &[&str]| windlass(&[&eval[..], more].concat(), &[], "");
    let (marks, literal) = (read(&[]), read(&["--literal"]));
    assert!(marks.stderr.contains("--literal"), "{}", marks.stderr);
    assert!(!literal.stderr.contains("note:"), "{}", literal.stderr);
    let tokens = |run: Run| run.json()[0]["tokens"].as_u64().unwrap();
    assert!(tokens(marks) + 4 < tokens(literal));

    let saved = fixture.write("saved", "");
    let halves = run(&["--json", "--save-logits", &saved]).json();
    assert!(halves[0]["stride"].is_null());
    let (tokens, scored) = (&halves[0]["tokens"], &halves[0]["scored_tokens"]);
    assert_eq!(tokens.as_u64().unwrap() / 32 * 15, scored.as_u64().unwrap());
    let compare = |more: &[&str]| {
        let compare = [
            "eval",
            "perplexity",
            "--model",
            model,
            "--kl-divergence",
            &saved,
        ];
        windlass(&[&compare[..], more].concat(), &[], "")
    };
    let found = &compare(&["--json"]).json()[0];
    assert_eq!(
        (&found["scored_tokens"], &found["same_top"]),
        (scored, &1.0.into())
    );
    let of = |name: &str| found[name].as_f64().unwrap();
    assert!(of("mean_kl").abs() < 1e-6 && (of("perplexity_ratio") - 1.0).abs() < 1e-3);
    let rounded = &compare(&["--json", "--dtype", "bf16"]).json()[0];
    assert!(rounded["mean_kl"].as_f64().unwrap() > of("mean_kl"));
    assert!(compare(&[]).ok().contains("same likeliest token"));

    let lines =
        "{\"question\": \"the cat\", \"choices\": [\"sat\", \"xyz\"], \"answer\": 0}\n".repeat(3);
    let file = fixture.write("q.jsonl", lines);
    let choice = ["eval", "choice", "--model", model, "--file", &file];
    let objects = windlass(&[&choice[..], &["--json"]].concat(), &[], "").json();
    assert_eq!(objects[0]["questions"], 3);
    let accuracy = objects[0]["accuracy"].as_f64().unwrap();
    assert!(accuracy == 0.0 || accuracy == 1.0);
    assert!(
        windlass(&choice, &[], "")
            .ok()
            .contains("accuracy per byte")
    );
}

/// A file is rounded by importances the same whether it is written at once or in two steps, and not as without them.
#[test]
fn conversion_rounds_by_importance() {
    let model = Fixture::new();
    let file = |name: &str| model.file(name).display().to_string();
    let run = |arguments: &[&str]| windlass(arguments, &[], "").ok();
    let (text, matrix) = (model.write("text.txt", TEXT.repeat(9)), file("matrix.gguf"));
    let (name, once, twice) = (model.name(), file("once.gguf"), file("twice.gguf"));
    let (whole, plain) = (file("whole.gguf"), file("plain.gguf"));
    run(&["imatrix", "-m", name, "-f", &text, "-o", &matrix]);
    let mix = [
        "-t",
        "Q4_0",
        "--output-tensor-type",
        "Q8_0",
        "--tensor-type",
        "attn_[kv]=Q5_1",
    ];
    let by_importance = [&mix[..], &["--imatrix", &matrix]].concat();
    run(&[&["convert", name, &once], &by_importance[..]].concat());
    run(&["convert", name, &whole, "-t", "F32"]);
    run(&[&["quantize", &whole, &twice], &by_importance[..]].concat());
    run(&[&["convert", name, &plain], &mix[..]].concat());
    let open = |path: &str| File::open(Path::new(path)).unwrap();
    let (once, twice, plain) = (open(&once), open(&twice), open(&plain));
    let mut otherwise = 0;
    for info in twice.tensors() {
        let bytes = twice.bytes(&info.name).unwrap();
        assert_eq!(once.tensor(&info.name).unwrap(), info);
        assert!(once.bytes(&info.name).unwrap() == bytes, "{}", info.name);
        otherwise += usize::from(plain.bytes(&info.name).unwrap() != bytes);
    }
    assert!(otherwise > 4, "{otherwise} tensors are rounded otherwise");
    let kind = |name: &str| once.tensor(name).unwrap().block_type.name();
    assert_eq!(kind("blk.1.attn_v.weight"), "Q5_1");
    assert_eq!(kind("output.weight"), "Q8_0");
    let entries = once.metadata().get_u32("quantize.imatrix.entries_count");
    assert_eq!(entries.unwrap(), Some(14));
    assert!(!plain.metadata().contains("quantize.imatrix.entries_count"));

    let folder = file("folder");
    for (name, arguments, code, said) in [
        (
            "no type",
            &["convert", name, "x.gguf", "--pure"][..],
            2,
            "--type",
        ),
        (
            "a folder",
            &["convert", &whole, &folder, "-t", "F32", "--pure"],
            2,
            "--pure for the folder",
        ),
        (
            "a folder to quantize",
            &["quantize", name, "x.gguf", "-t", "Q8_0"],
            1,
            "windlass convert",
        ),
    ] {
        refuse(name, arguments, code, &[said]);
    }
}

/// A folder of packed weights says what it holds.
#[test]
fn packed_folders_are_inspected() {
    let model = Fixture::new();
    let folder = model.file("kept").display().to_string();
    let pack = [
        "--load-in",
        "q4g64",
        "--save-packed",
        &folder,
        "--max-tokens",
        "2",
    ];
    windlass(
        &[&["generate", "-m", model.name()], &pack[..]].concat(),
        &[],
        "",
    )
    .ok();
    let found = windlass(&["inspect", &folder, "--json"], &[], "").json();
    assert_eq!(found[0]["format"], "packed weights");
    assert_eq!(found[0]["architecture"], "llama");
    assert_eq!(found[0]["types"][0]["type"], "u4/64z");
    assert_eq!(found[0]["run"]["layers"], 2);
    let told = windlass(&["inspect", &folder], &[], "").ok();
    assert!(
        told.contains("model.layers.0.mlp.gate_proj.weight"),
        "{told}"
    );
    refuse(
        "packed",
        &["convert", &folder, "x.gguf"],
        1,
        &["--save-packed"],
    );
}

#[test]
fn info_names_the_kernels() {
    let info = windlass(&["info", "--json"], &[("WINDLASS_KERNELS", "scalar")], "").json();
    assert_eq!(info[0]["kernels"], "scalar");
    assert_eq!(info[0]["packed_products"], "scalar");
    assert!(info[0]["threads"].as_u64().unwrap() > 0);
    if info[0]["memory_available_bytes"].as_u64() > Some(1 << 30) {
        assert!(info[0]["read_bytes_per_second"].as_f64().unwrap() > 1e8);
        assert!(info[0]["read_streams"].as_u64().unwrap() > 0);
    }
    assert!(windlass(&["info"], &[], "").ok().contains("kernels"));
}

/// A test of a model for each combination of lists, in llama-bench's order.
#[test]
fn a_model_is_measured_in_lists() {
    let model = Fixture::new();
    let bench = |flags: &str| {
        let flags: Vec<&str> = flags.split(' ').collect();
        windlass(
            &[&["bench", "-m", model.name()], &flags[..]].concat(),
            &[],
            "",
        )
    };
    let found = bench("-p 9,0 -n 2,3 -d 0,5 -t 2,1 -r 2 --json")
        .json()
        .remove(0);
    let rows = found["tests"].as_array().unwrap();
    let of = |row: &Value| format!("{} {}", row["threads"], row["test"].as_str().unwrap());
    let names: Vec<String> = rows.iter().map(of).collect();
    let tests = ["pp9", "tg2", "tg3", "pp9 @ d5", "tg2 @ d5", "tg3 @ d5"];
    let wanted = [2, 1].map(|threads| tests.map(|test| format!("{threads} {test}")));
    assert_eq!(names, wanted.concat());
    for row in rows {
        assert_eq!(row["runs"].as_array().unwrap().len(), 2);
        assert!(row["tokens_per_second"].as_f64() > Some(0.0), "{row}");
    }
    let ceilings = found["ceilings"].as_array().unwrap();
    let threads: Vec<&Value> = ceilings.iter().map(|one| &one["threads"]).collect();
    assert_eq!(threads, [2, 1]);
    let told = bench("-p 8 -n 0 -d 4 --threads 1 -r 1").ok();
    assert!(told.contains("| 1 | pp8 @ d4 |"), "{told}");
    for (flags, said) in [
        ("-t 1,0", "this machine has"),
        ("-t 1 --threads 1", "cannot be used with"),
        ("-p 1,x", "invalid value 'x'"),
    ] {
        let flags: Vec<&str> = flags.split(' ').collect();
        let arguments = [&["bench", "-m", model.name()], &flags[..]].concat();
        refuse("bench", &arguments, 2, &[said]);
    }
}

/// What is not about one model is measured without `--model`; alone, the verb asks for it.
#[test]
fn kernels_are_measured_without_a_model() {
    let found = windlass(
        &[
            "bench", "kernels", "--only", "rope", "--dtype", "f32", "--json",
        ],
        &[],
        "",
    );
    let found = found.json().remove(0);
    let rows = found["kernels"].as_array().unwrap();
    assert!(
        !rows.is_empty() && found["fma_gflops"].as_f64() > Some(0.0),
        "{found}"
    );
    refuse("bench", &["bench"], 2, &["--model"]);
}

/// The verbs whose help is kept under `tests/snapshots`; `WINDLASS_UPDATE_SNAPSHOTS=1` writes the files anew.
const HELP: &[&[&str]] = &[
    &["quickstart"],
    &["train"],
    &["finetune"],
    &["data", "show"],
    &["adapter"],
    &["adapter", "add"],
    &["adapter", "merge"],
    &["launch"],
    &["checkpoint"],
    &["checkpoint", "export"],
    &["checkpoint", "verify"],
    &["checkpoint", "inspect"],
    &["bench"],
    &["bench", "train"],
    &["bench", "kernels"],
    &["bench", "serve"],
    &["generate"],
    &["chat"],
    &["serve"],
    &["tokenize"],
    &["eval"],
    &["eval", "perplexity"],
    &["eval", "choice"],
    &["eval", "logits"],
    &["imatrix"],
    &["config"],
    &["config", "check"],
    &["estimate"],
    &["info"],
    &["inspect"],
    &["quantize"],
    &["convert"],
    &["io"],
    &["io", "bench"],
];

#[test]
fn help_is_as_it_was() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let update = std::env::var_os("WINDLASS_UPDATE_SNAPSHOTS").is_some_and(|value| value == "1");
    for verb in HELP {
        let file = folder.join(format!("help-{}.txt", verb.join("-")));
        let help = windlass(&[*verb, &["--help"]].concat(), &[], "").ok();
        if update {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&file, &help).unwrap();
        }
        let known = fs::read_to_string(&file).unwrap_or_default();
        assert!(
            help == known,
            "{} has changed; if that is right, set WINDLASS_UPDATE_SNAPSHOTS=1:\n{help}",
            file.display()
        );
    }
}
