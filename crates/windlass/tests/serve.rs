//! `windlass serve` from outside: it starts, says where, answers, and ends as it should.

use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use windlass::infer::LoadedModel;
use windlass::model::{AdapterConfig, DecoderConfig, Tokenizer, decoder};
use windlass::store::{Store, elements, save_weights};
use windlass::tensor::{Cpu, DType, ParamId};

const TEXT: &str = "the cat sat on the mat and the dog sat on the log while the rat ran. ";

/// A folder with a tiny model of random weights that has seen a few words, and a chat template.
fn model() -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.5, "tie_word_embeddings": false,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let config = DecoderConfig::load(folder).unwrap();
    let model = decoder(&config);
    let store = Store::init(&Cpu::new(1), model.units(), DType::F32, 3);
    let map = config.naming.file_tensors(&model);
    let read = |id: ParamId| elements(store.gather(id.unit).unwrap().at(id.slot).weight);
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
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}";
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
    place
}

fn start(model: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_windlass"));
    command
        .args(["serve", "--threads", "1", "--model"])
        .arg(model);
    command
        .args(more)
        .env_remove("WINDLASS_KERNELS")
        .env_remove("WINDLASS_API_KEY");
    let pipes = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    pipes.env("HF_HUB_OFFLINE", "1").spawn().unwrap()
}

/// Sends a request; what comes back can be read from the connection.
fn ask(address: &str, key: &str, path: &str, body: &str) -> TcpStream {
    let mut connection = TcpStream::connect(address).unwrap();
    let length = body.len();
    let method = if body.is_empty() { "GET" } else { "POST" };
    write!(
        connection,
        "{method} {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    connection
}

fn rest(mut connection: impl Read) -> String {
    let mut text = String::new();
    connection.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_signal_lets_answers_finish_and_the_log_keeps_secrets() {
    let model = model();
    let keys = model.path().join("keys");
    fs::write(&keys, "\nkey-of-the-file\n\n").unwrap();
    let flags = [
        "--port",
        "0",
        "--log-json",
        "--served-name",
        "cat",
        "--api-key-file",
    ];
    let adapter = model.path().join("purr");
    let mut adapted = LoadedModel::open(&Cpu::new(1), model.path(), None).unwrap();
    adapted.new_adapter(&AdapterConfig::default(), 1).unwrap();
    adapted.save_adapter(&adapter).unwrap();
    let (adapter, folder) = (adapter.to_str().unwrap(), model.path().to_str().unwrap());
    let named = format!("hiss={adapter}");
    let more = [
        keys.to_str().unwrap(),
        "--adapter",
        adapter,
        "--adapter",
        &named,
        "--allow-adapter-loading",
        folder,
    ];
    let mut child = start(model.path(), &[&flags[..], &more].concat());
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let address = line
        .trim()
        .strip_prefix("http://")
        .unwrap_or_else(|| panic!("{line}"));
    assert!(rest(ask(address, "other", "/v1/models", "")).starts_with("HTTP/1.1 401"));
    let another = json!({ "lora_name": "growl", "lora_path": "purr" }).to_string();
    let path = "/v1/load_lora_adapter";
    assert!(rest(ask(address, "other", path, &another)).starts_with("HTTP/1.1 401"));
    assert!(rest(ask(address, "key-of-the-file", path, &another)).starts_with("HTTP/1.1 200"));
    let models = rest(ask(address, "key-of-the-file", "/v1/models", ""));
    for name in ["cat", "purr", "hiss", "growl"] {
        assert!(models.contains(&format!("\"id\":\"{name}\"")), "{models}");
    }
    let body = json!({
        "model": "purr", "messages": [{ "role": "user", "content": "meow-the-secret" }],
        "max_tokens": 600, "ignore_eos": true, "stream": true,
    });
    let answer = ask(
        address,
        "key-of-the-file",
        "/v1/chat/completions",
        &body.to_string(),
    );
    let mut answer = BufReader::new(answer);
    // The answer has begun.
    assert!(answer.fill_buf().unwrap().starts_with(b"HTTP/1.1 200"));
    let id = child.id().to_string();
    let killed = Command::new("kill").args(["-TERM", &id]).status().unwrap();
    assert!(killed.success());
    let text = rest(answer);
    assert!(text.contains("\"finish_reason\":\"length\""), "{text}");
    assert!(text.contains("data: [DONE]"));
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(
        log.contains("\"completion_tokens\":600") && log.contains("req_"),
        "{log}"
    );
    for secret in ["meow", "key-of-the-file"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let model = model();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let empty = model.path().join("empty");
    fs::write(&empty, "\n").unwrap();
    let empty = empty.to_str().unwrap();
    for (flags, code, part) in [
        (&["--port", &port][..], 1, "cannot listen on"),
        (&["--port", "0", "--max-queue", "0"], 2, "--max-queue 0"),
        (&["--port", "0", "--api-key", " "], 2, "an API key is empty"),
        (&["--port", "0", "--api-key-file", empty], 1, "holds no key"),
        (&["--port", "0", "--context", "99999"], 2, "--context 99999"),
        (&["--port", "0", "--template", "nowhere"], 1, "nowhere"),
        (
            &["--port", "0", "--adapter", "a/b", "--adapter", "b=c"],
            2,
            "the name b is taken",
        ),
        (&["--port", "0", "--adapter", "=a"], 2, "has no name"),
        (&["--port", "0", "--adapter", "a=nowhere"], 1, "nowhere"),
        (
            &["--port", "0", "--allow-adapter-loading", empty],
            2,
            "no such folder",
        ),
        (
            &["--port", "0", "--tokenizer", "nowhere"],
            1,
            "no tokenizer.json",
        ),
    ] {
        let output = start(model.path(), flags).wait_with_output().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {log}");
        assert!(
            log.contains(part) && log.contains("hint: "),
            "{flags:?}: {log}"
        );
    }
}
