//! `windlass finetune` and `windlass adapter` from outside: what bad input is told, and adapters that go from form to form.

use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use windlass::model::{DecoderConfig, Tokenizer, decoder};
use windlass::store::{Store, elements, save_weights};
use windlass::tensor::{Cpu, DType, ParamId};

const TEXT: &str = "the cat sat on the mat and the dog sat on the log while the rat ran. ";

/// A tiny model of random weights with a context of 48 tokens, in `folder`.
fn model(folder: &Path, hidden_size: usize) {
    model_of(folder, hidden_size, false);
}

fn model_of(folder: &Path, hidden_size: usize, tied: bool) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": hidden_size, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.2, "tie_word_embeddings": tied,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::load(folder).unwrap();
    let model = decoder(&config);
    let store = Store::init(&Cpu::new(1), model.units(), DType::F32, 3);
    let map = config.naming.file_tensors(&model);
    let read = |id: ParamId| elements(store.gather(id.unit).unwrap().at(id.slot).weight);
    let metadata = Default::default();
    save_weights(folder, model.units(), &map, DType::F32, &metadata, read).unwrap();
    let tokenizer = Tokenizer::train([TEXT; 20].iter(), 290, "<|end|>").unwrap();
    tokenizer.save(folder).unwrap();
}

/// A folder with a model and samples.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        model(&place.path("model"), 32);
        let sample = json!({"prompt": "the cat", "completion": " sat on the mat"});
        let samples = vec![sample.to_string(); 12].join("\n");
        place.write("data.jsonl", &samples);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// Runs the binary in the folder: exit code, stdout, stderr.
    fn run(&self, arguments: &str) -> (Option<i32>, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
        command
            .current_dir(self.0.path())
            .args(arguments.split_whitespace());
        command
            .env_remove("WINDLASS_KERNELS")
            .env("HF_HUB_OFFLINE", "1");
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    #[track_caller]
    fn ok(&self, arguments: &str) -> (String, String) {
        let (code, out, said) = self.run(arguments);
        assert_eq!(code, Some(0), "{arguments}: {said}");
        (out, said)
    }
}

/// Each line: samples, flags, exit code, and words of the message.
#[test]
fn bad_input_is_told_what_is_wrong() {
    let place = Place::new();
    model(&place.path("wider"), 64);
    place.ok("finetune --model model --data data.jsonl --steps 1 --out tuned");
    let good = r#"{"prompt": "the cat", "completion": " sat"}"#;
    let chat = r#"{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}"#;
    let empty = r#"{"prompt": "the dog", "completion": ""}"#;
    let long = format!(
        "{{\"prompt\": \"the rat\", \"completion\": \"{}\"}}",
        TEXT.repeat(9)
    );
    let plain_template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    place.write("unmarked.jinja", plain_template);
    let cases: &[(&[&str], &str, i32, &[&str])] = &[
        (
            &[good],
            "--target q_project",
            1,
            &[
                "q_project",
                "matches no module",
                "nearest: q_proj",
                "down_proj",
            ],
        ),
        (
            &[chat],
            "--learn assistant --template unmarked.jinja",
            1,
            &["{% generation %}"],
        ),
        (
            &[good, &long],
            "--long refuse",
            1,
            &["line 2", "tokens", "at most 48", "--long"],
        ),
        (&[good, empty, empty], "", 1, &["2 of 3", "line 2"]),
        (&[good, "{"], "", 1, &["line 2", "not JSON", "mend it"]),
        (
            &[good, chat],
            "",
            1,
            &["several forms", "line 2", "one form"],
        ),
        (
            &[good, good, good, good],
            "--lr 1e30 --steps 20 --dtype f32 --batch 1",
            1,
            &["the loss of step", "learning rate"],
        ),
        (
            &[good],
            "--max-length 49",
            2,
            &["--max-length 49", "48 tokens"],
        ),
        (
            &[good],
            "--init loftq",
            1,
            &["is not packed", "--method qlora"],
        ),
        (&[good], "--loftq-iterations 2", 2, &["--init loftq"]),
    ];
    let check = |at: usize, arguments: &str, code: i32, words: &[&str]| {
        let (found, _, said) = place.run(arguments);
        assert_eq!(found, Some(code), "case {at}: {said}");
        for word in words.iter().chain(&["hint: "]) {
            assert!(said.contains(word), "case {at}: {word:?} in {said}");
        }
    };
    for (at, (samples, flags, code, words)) in cases.iter().enumerate() {
        place.write("bad.jsonl", &samples.join("\n"));
        let steps = if flags.contains("--steps") {
            ""
        } else {
            "--steps 1"
        };
        let arguments = format!(
            "finetune --model model --data bad.jsonl {steps} --held-out 0 --out bad{at} {flags}"
        );
        check(at, &arguments, *code, words);
    }
    // An adapter for another base, shape by shape.
    let other = ["q_proj.lora_A.weight", "the model needs [16, 64]", "model"];
    let arguments = "generate --model wider --adapter tuned --prompt the --max-tokens 1";
    check(cases.len(), arguments, 1, &other);
    let arguments = "generate --model model --adapter tuned@half --prompt the";
    let (code, _, said) = place.run(arguments);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("half is no weight"), "{said}");
    // A folder of the user's that has the name of a merge's own.
    let arguments = "adapter merge --model model --adapter tuned --out merged.gguf";
    fs::create_dir(place.path("merged.merging")).unwrap();
    place.write("merged.merging/notes", "mine");
    check(
        cases.len() + 1,
        arguments,
        1,
        &["merged.merging is in the way"],
    );
    assert!(place.path("merged.merging/notes").is_file());
    assert!(!place.path("merged.gguf").exists());
    fs::remove_dir_all(place.path("merged.merging")).unwrap();
    place.ok(arguments);
    assert!(place.path("merged.gguf").is_file() && !place.path("merged.merging").exists());
}

/// Headings say everything of a conversation: tools, calls and results.
#[test]
fn a_plain_template_shows_tools() {
    let place = Place::new();
    let call =
        json!({"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}});
    let sample = json!({
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "rain?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "no"},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    });
    place.write("tools.jsonl", &sample.to_string());
    let show = "data show --model model --data tools.jsonl --template plain --learn assistant";
    let (out, _) = place.ok(show);
    let mut rest = out.as_str();
    for word in [
        "### Tools:",
        "\"weather\"",
        "be kind",
        "### Instruction:",
        "rain?",
        "### Response:",
        "⟦",
        "\"Lima\"",
        "<|end|>",
        "⟧",
        "### Result:",
        "sunny",
        "⟦no<|end|>",
    ] {
        let (_, after) = rest
            .split_once(word)
            .unwrap_or_else(|| panic!("{word} in {out}"));
        rest = after;
    }
}

/// Full fine-tuning becomes an adapter; PEFT's folder becomes a GGUF file and comes back; all compute the same.
#[test]
fn adapters_go_from_form_to_form() {
    let place = Place::new();
    let run = "finetune --model model --data data.jsonl --steps 6 --dtype f32 --held-out 0";
    place.ok(&format!("{run} --method full --lr 3e-3 --out full"));
    let (out, said) =
        place.ok("adapter extract --base model --model full/last --rank 32 --out extracted");
    assert!(out.contains("14 modules, rank 32"), "{out}");
    assert!(
        out.contains(" 0.0") && said.contains("get no adapter"),
        "{out} {said}"
    );
    place.ok(&format!("{run} --lr 1e-2 --rank 4 --out tuned"));
    place.ok("adapter convert --model model --adapter tuned --out tuned.gguf");
    place.ok("adapter convert --model model --adapter tuned.gguf --out again");
    let text =
        |folder: &str| fs::read(place.path(folder).join("adapter_model.safetensors")).unwrap();
    assert_eq!(text("tuned/last"), text("again"));
    let measured = |adapter: &str| {
        let arguments =
            format!("eval perplexity --model model {adapter} --json --file the.txt --dtype f32");
        let report: serde_json::Value = serde_json::from_str(&place.ok(&arguments).0).unwrap();
        report["loss"].as_f64().unwrap()
    };
    place.write("the.txt", &TEXT.repeat(3));
    let (plain, folder) = (measured(""), measured("--adapter tuned"));
    assert_ne!(plain, folder);
    assert_eq!(folder, measured("--adapter tuned.gguf"));
    // Several at once are their sum.
    place.ok(&format!(
        "{run} --lr 1e-2 --rank 2 --target q_proj,up_proj --seed 5 --out other"
    ));
    place.ok("adapter add tuned other --weights 1,0.5 --out sum");
    let sum = measured("--adapter sum");
    assert_ne!(sum, folder);
    assert_eq!(sum, measured("--adapter tuned --adapter other@0.5"));
    // What packing takes is less with LoftQ, and with every turn.
    let mut left = Vec::new();
    for turns in [1, 3] {
        let (_, said) = place.ok(&format!(
            "{run} --method qlora --init loftq --rank 8 --loftq-iterations {turns} --out loft{turns}"
        ));
        let (_, rest) = said.split_once("the adapter leaves ").expect(&said);
        let rest: f64 = rest.split_once(" %").unwrap().0.parse().unwrap();
        assert!((10.0..85.0).contains(&rest), "{said}");
        left.push(rest);
        let base = ["--model model --load-in q4", "--model loft3/base"][usize::from(turns > 1)];
        assert!(said.contains(base), "{said}");
        place.ok(&format!(
            "generate {base} --adapter loft{turns} --prompt the --max-tokens 2"
        ));
    }
    assert!(left[1] < left[0], "{left:?}");
}

/// A table that is the head too is trained and saved whole as one, and the adapter is the merged model.
#[test]
fn a_table_that_is_the_head_is_trained_as_one() {
    let place = Place::new();
    model_of(&place.path("tied"), 32, true);
    place.write("the.txt", &TEXT.repeat(3));
    let measured = |model: &str| {
        let arguments =
            format!("eval perplexity --model {model} --json --file the.txt --dtype f32");
        let report: serde_json::Value = serde_json::from_str(&place.ok(&arguments).0).unwrap();
        report["loss"].as_f64().unwrap()
    };
    for flags in [
        "--modules-to-save embed_tokens",
        "--modules-to-save lm_head --method qlora",
    ] {
        let (_, said) = place.ok(&format!(
            "finetune --model tied --data data.jsonl --steps 4 --lr 1e-2 --rank 2 --dtype f32 --held-out 0 --out tuned {flags}"
        ));
        let packed = if flags.contains("qlora") {
            " --load-in q4"
        } else {
            ""
        };
        // The table once, 300 x 32, and 2 x 512 in each of two layers.
        assert!(said.contains("trainable params: 11,648 "), "{said}");
        let config = fs::read_to_string(place.path("tuned/last/adapter_config.json")).unwrap();
        assert!(config.contains("\"ensure_weight_tying\": true"), "{config}");
        let (told, _) = place.ok("adapter inspect tuned");
        assert!(told.contains("parameters  11648"), "{told}");
        let adapted = measured(&format!("tied{packed} --adapter tuned"));
        assert_ne!(adapted, measured(&format!("tied{packed}")));
        place.ok("adapter merge --model tied --adapter tuned --out merged");
        let merged = measured("merged");
        let bound = if packed.is_empty() { 1e-5 } else { 0.1 };
        assert!(
            (merged - adapted).abs() < bound * adapted,
            "{flags}: {merged} for {adapted}"
        );
        fs::remove_dir_all(place.path("tuned")).unwrap();
    }
}
