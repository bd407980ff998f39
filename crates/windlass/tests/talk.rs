//! `windlass chat` and `windlass tokenize` from outside.

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use windlass::model::{DecoderConfig, Tokenizer, decoder};
use windlass::store::{Store, elements, save_weights};
use windlass::tensor::{Cpu, DType};

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
                        {% if mood %}({{ mood }}){% endif %}{% if add_generation_prompt %}<assistant>{% endif %}";
const TEXT: &str = "the cat sat on the mat and the dog sat on the log while the rat ran. ";

/// A folder with a tiny model of random weights that has seen a few words, and a chat template.
fn model() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.5, "tie_word_embeddings": false,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::load(folder).unwrap();
    let model = decoder(&config);
    let store = Store::init(&Cpu::new(1), model.units(), DType::F32, 3);
    let map = config.naming.file_tensors(&model);
    let read =
        |id: windlass::tensor::ParamId| elements(store.gather(id.unit).unwrap().at(id.slot).weight);
    save_weights(
        folder,
        model.units(),
        &map,
        DType::F32,
        &Default::default(),
        read,
    )
    .unwrap();
    let tokenizer = Tokenizer::train([TEXT; 20].iter(), 290, "<|end|>").unwrap();
    tokenizer.save(folder).unwrap();
    fs::write(folder.join("chat_template.jinja"), TEMPLATE).unwrap();
    place
}

struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn start(arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command
        .args(arguments)
        .env_remove("WINDLASS_KERNELS")
        .env("HF_HUB_OFFLINE", "1");
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    pipes.stderr(Stdio::piped()).spawn().unwrap()
}

fn run(arguments: &[&str], stdin: &str) -> Run {
    let mut child = start(arguments);
    // A run that fails before it reads closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

#[track_caller]
fn ok(arguments: &[&str], stdin: &str) -> Run {
    let run = run(arguments, stdin);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    run
}

#[track_caller]
fn refuse(arguments: &[&str], stdin: &str, code: i32, expected: &[&str]) {
    let run = run(arguments, stdin);
    assert_eq!(run.code, Some(code), "{arguments:?}: {}", run.stderr);
    for part in expected.iter().chain(&["hint: "]) {
        assert!(
            run.stderr.contains(part),
            "{arguments:?}: {part:?} in {}",
            run.stderr
        );
    }
}

fn chat<'a>(model: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let model = model.to_str().unwrap();
    let start = [
        "chat",
        "--model",
        model,
        "--greedy",
        "--max-tokens",
        "9",
        "--threads",
        "1",
    ];
    [&start, more].concat()
}

#[test]
fn a_conversation_reads_nothing_twice_and_says_the_same() {
    let model = model();
    let talk = ok(&chat(model.path(), &[]), "the cat\nthe dog \\\nsat\n");
    let name = model.path().to_str().unwrap();
    let generate = |prompt: &str| {
        let flags = [
            "generate",
            "--model",
            name,
            "--greedy",
            "--max-tokens",
            "9",
            "-p",
            prompt,
        ];
        ok(&flags, "").stdout
    };
    let first = generate("<user>the cat\n<assistant>");
    let answer = first.strip_suffix('\n').unwrap();
    let prompt = format!("<user>the cat\n<assistant>{answer}\n<user>the dog \nsat\n<assistant>");
    assert_eq!(talk.stdout, format!("{first}{}", generate(&prompt)));
    let read: Vec<[usize; 2]> = talk
        .stderr
        .lines()
        .filter_map(|line| line.split_once("; ")?.1.split_once(" tokens read"))
        .map(|(numbers, _)| {
            let (read, of) = numbers.split_once(" of ").unwrap();
            [read.parse().unwrap(), of.parse().unwrap()]
        })
        .collect();
    assert_eq!(read.len(), 2, "{}", talk.stderr);
    assert_eq!(read[0][0], read[0][1]);
    assert!(read[1][0] + read[0][1] <= read[1][1], "{read:?}");
}

#[test]
fn commands_change_the_conversation() {
    let model = model();
    let file = model.path().join("talk.json");
    let file = file.to_str().unwrap();
    let read = || -> Vec<Value> {
        let text = fs::read_to_string(file).unwrap();
        serde_json::from_str::<Vec<Value>>(&text).unwrap()
    };
    let roles = |messages: &[Value]| {
        let roles = messages
            .iter()
            .map(|message| message["role"].as_str().unwrap().to_owned());
        roles.collect::<Vec<_>>().join(" ")
    };
    let first = format!("/system Be a cat.\n\"\"\"\n/sat\non\n\"\"\"\n//mat\n/save {file}\n");
    ok(&chat(model.path(), &[]), &first);
    let saved = read();
    assert_eq!(roles(&saved), "system user assistant user assistant");
    assert_eq!(saved[0]["content"], "Be a cat.");
    assert_eq!(
        (&saved[1]["content"], &saved[3]["content"]),
        (&json!("/sat\non"), &json!("/mat"))
    );

    // Going on from a file is going on.
    let on = ok(&chat(model.path(), &["--load", file]), "ran\n").stdout;
    let again = ok(&chat(model.path(), &[]), &format!("/load {file}\nran\n")).stdout;
    assert_eq!(on, again);
    let anew = format!("/reset\nran\n/system\n/save {file}\n/exit\nnever read\n");
    ok(&chat(model.path(), &["--load", file]), &anew);
    assert_eq!(roles(&read()), "user assistant");
    let system = ok(
        &chat(model.path(), &["--system", "x"]),
        &format!("/save {file}\n"),
    );
    assert_eq!(
        (roles(&read()).as_str(), system.stdout.as_str()),
        ("system", "")
    );

    let moody = ok(&chat(model.path(), &["--set", "mood=\"sad\""]), "ran\n").stdout;
    assert_eq!(
        moody,
        ok(&chat(model.path(), &["--set", "mood=sad"]), "ran\n").stdout
    );
    assert_ne!(moody, ok(&chat(model.path(), &[]), "ran\n").stdout);
}

/// A conversation goes on with other adapters, and with none: the answers are those of such a model.
#[test]
fn a_conversation_changes_its_adapter() {
    let model = model();
    let path = |name: &str| model.path().join(name).to_str().unwrap().to_owned();
    let sample = json!({"prompt": "the cat", "completion": " ran ran ran"});
    fs::write(path("data.jsonl"), vec![sample.to_string(); 4].join("\n")).unwrap();
    let tuned = |seed: &str, name: &str| {
        let (base, data, out) = (path(""), path("data.jsonl"), path(name));
        let start = ["finetune", "--model", &base, "--data", &data, "--out", &out];
        let flags = [
            "--steps",
            "3",
            "--lr",
            "1e-1",
            "--held-out",
            "0",
            "--seed",
            seed,
        ];
        ok(&[&start[..], &flags].concat(), "");
        out
    };
    let (one, two) = (tuned("1", "one"), tuned("2", "two"));
    let said = |adapters: &[&str], input: &str| {
        let flags: Vec<&str> = adapters.iter().flat_map(|&a| ["--adapter", a]).collect();
        ok(&chat(model.path(), &flags), input).stdout
    };
    let both = [one.as_str(), two.as_str()];
    assert_ne!(said(&[], "the cat\n"), said(&both, "the cat\n"));
    for (name, adapters) in [
        ("all", &both[..]),
        ("one", &both[..1]),
        ("two", &both[1..]),
        ("none", &[]),
    ] {
        let chosen = said(&both, &format!("/adapter {name}\nthe cat\n"));
        assert_eq!(chosen, said(adapters, "the cat\n"), "{name}");
    }
    let wrong = "/adapter three\n";
    refuse(
        &chat(model.path(), &["--adapter", &one]),
        wrong,
        2,
        &["three", "all, none"],
    );
}

#[test]
fn an_answer_can_be_interrupted() {
    let model = model();
    let name = model.path().to_str().unwrap();
    let mut child = start(&["chat", "--model", name, "--greedy", "--max-tokens", "8000"]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdin.write_all(b"the cat\n").unwrap();
    let mut begin = [0; 8];
    stdout.read_exact(&mut begin).unwrap();
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    let stopped = stderr.find(|line| line.as_ref().is_ok_and(|line| line.starts_with('[')));
    let stopped = stopped.unwrap().unwrap();
    assert!(stopped.ends_with("; stopped]"), "{stopped}");
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn conversations_that_cannot_be_are_refused() {
    let model = model();
    let path = model.path();
    let write = |name: &str, content: &str| {
        fs::write(path.join(name), content).unwrap();
        path.join(name).display().to_string()
    };
    let list = write("list.json", "[1]");
    let broken = write("broken.jinja", "{% for %}");
    let stern = write("stern.jinja", "{{ raise_exception('not today') }}");
    refuse(
        &chat(path, &["--load", &list]),
        "",
        1,
        &["list.json is no JSON list of messages"],
    );
    refuse(
        &chat(path, &["--tools", &list]),
        "",
        1,
        &["no JSON list of tools"],
    );
    refuse(
        &chat(path, &["--template", &broken]),
        "",
        1,
        &["template is not valid"],
    );
    refuse(
        &chat(path, &["--template", &stern]),
        "hi\n",
        1,
        &["not today"],
    );
    refuse(&chat(path, &["--set", "mood"]), "", 2, &["--set mood"]);
    refuse(&chat(path, &["--context", "99999"]), "", 2, &["16384"]);
    refuse(
        &chat(path, &["--context", "8"]),
        "the cat sat on the mat\n",
        1,
        &["context is 8", "/reset"],
    );
    refuse(
        &chat(path, &[]),
        "/sytem x\n",
        2,
        &["/sytem is no command", "/help"],
    );
    refuse(
        &chat(path, &[]),
        "/load nowhere.json\n",
        1,
        &["nowhere.json"],
    );
    fs::remove_file(path.join("chat_template.jinja")).unwrap();
    refuse(
        &chat(path, &[]),
        "",
        1,
        &["has no chat template", "--template FILE"],
    );
    let own = write("own.jinja", TEMPLATE);
    ok(&chat(path, &["--template", &own]), "the cat\n");
}

#[test]
fn tokens_are_shown_and_read() {
    let model = model();
    let name = model.path().to_str().unwrap();
    let tokenize =
        |more: &[&str], stdin: &str| ok(&[&["tokenize", "--model", name], more].concat(), stdin);
    let tokenizer = Tokenizer::load(model.path()).unwrap();
    let ids = tokenizer.encode("the <|end|>cat", true).unwrap();
    let words: Vec<String> = ids.iter().map(u32::to_string).collect();
    let words = words.join(" ");
    let report: Value =
        serde_json::from_str(&tokenize(&["--json", "the <|end|>cat"], "").stdout).unwrap();
    assert_eq!(report["ids"], json!(ids));
    assert_eq!(
        (&report["count"], &report["tokens"][1]),
        (&json!(ids.len()), &json!("Ġ"))
    );
    let file = model.path().join("text");
    fs::write(&file, "the <|end|>cat").unwrap();
    for (arguments, stdin) in [
        (&["--ids", "the <|end|>cat"][..], ""),
        (&["--ids"], "the <|end|>cat\n"),
        (&["--ids", "--file", file.to_str().unwrap()], ""),
    ] {
        assert_eq!(tokenize(arguments, stdin).stdout, format!("{words}\n"));
    }
    assert_eq!(
        tokenize(&["--count", "the <|end|>cat"], "").stdout,
        format!("{}\n", ids.len())
    );
    assert_eq!(
        tokenize(&["--decode", &words], "").stdout,
        "the <|end|>cat\n"
    );
    let literal = tokenizer.encode_with("<|end|>", true, false).unwrap();
    assert!(literal.len() > 1);
    assert_eq!(
        tokenize(&["--count", "--literal", "<|end|>"], "").stdout,
        format!("{}\n", literal.len())
    );
    let shown = tokenize(&["the\n"], "");
    assert_eq!(
        shown.stdout.lines().count(),
        tokenizer.encode("the\n", true).unwrap().len()
    );
    assert!(shown.stderr.ends_with("tokens, 4 characters, 4 bytes\n"));

    let messages = r#"[{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]"#;
    for (text, expected) in [
        ("the cat", "<user>the cat\n<assistant>"),
        (messages, "<system>x\n<user>y\n<assistant>"),
    ] {
        let report: Value =
            serde_json::from_str(&tokenize(&["--chat", "--json", text], "").stdout).unwrap();
        assert_eq!(report["text"], expected);
    }
    let refuse = |more: &[&str], code, expected: &[&str]| {
        refuse(
            &[&["tokenize", "--model", name], more].concat(),
            "",
            code,
            expected,
        )
    };
    refuse(&["--decode", "1 999"], 2, &["999 is no token id"]);
    refuse(&["--file", "nowhere"], 1, &["nowhere"]);
    if let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") {
        let path = Path::new(&data).join("tokenizers/ggml-vocab/ggml-vocab-llama-spm.gguf");
        let flags = [
            "tokenize",
            "--model",
            path.to_str().unwrap(),
            "--ids",
            "--bare",
            "Hello",
        ];
        assert_eq!(ok(&flags, "").stdout, "15043\n");
    }
}
