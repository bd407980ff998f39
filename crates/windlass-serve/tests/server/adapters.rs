//! Adapters as models: named, mixed in one batch, loaded and unloaded while others are answered.

use crate::client::{Client, read_answer};
use crate::house::{House, NAME, model};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use windlass_infer::engine::EngineOptions;
use windlass_infer::write_adapter;
use windlass_model::AdapterConfig;
use windlass_serve::ServerOptions;
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::BlockType;
use windlass_tensor::Rng;

const CHAT: &str = "/v1/chat/completions";
const LOAD: &str = "/v1/load_lora_adapter";
const UNLOAD: &str = "/v1/unload_lora_adapter";

/// A folder of adapters with random values, by the names of its subfolders.
fn folder(names: &[&str]) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    for (seed, name) in names.iter().enumerate() {
        let mut model = model();
        let config = AdapterConfig {
            r: 2 + seed,
            use_rslora: seed % 2 == 1,
            ..AdapterConfig::default()
        };
        model.new_adapter(&config, 0).unwrap();
        let mut rng = Rng::new(seed as u64);
        let tensors = model.adapter.unwrap().tensors.into_iter().map(|tensor| {
            let values = (0..tensor.shape.len()).map(|_| 0.2 * rng.normal() as f32);
            let values = values.collect();
            (tensor, values)
        });
        let folder = place.path().join(name);
        write_adapter(&folder, &config, &tensors.collect::<Vec<_>>()).unwrap();
    }
    place
}

fn served(place: &Path, names: &[&str]) -> House {
    let adapters = names
        .iter()
        .map(|&name| (name.to_owned(), place.join(name)));
    let adapters: Vec<(String, PathBuf)> = adapters.collect();
    House::adapted(adapters)
}

/// May load and unload.
fn open(place: &Path) -> House {
    let options = ServerOptions {
        adapter_folder: Some(place.to_owned()),
        ..ServerOptions::default()
    };
    House::with(options, EngineOptions::default())
}

/// Requests of every kind to a model, and what of their answers does not change.
fn asked(model: &str) -> Vec<(&'static str, Value, &'static str)> {
    let messages = json!([{ "role": "user", "content": "the cat" }]);
    vec![
        (
            CHAT,
            json!({ "model": model, "messages": messages, "max_tokens": 20, "temperature": 0.8,
                "seed": 3, "n": 2, "logprobs": true, "top_logprobs": 2, "ignore_eos": true }),
            "/choices",
        ),
        (
            "/v1/completions",
            json!({ "model": model, "prompt": "the cat sat on the mat and the dog", "max_tokens": 12,
                "temperature": 0, "echo": true, "logprobs": 2, "ignore_eos": true }),
            "/choices",
        ),
        (
            "/v1/embeddings",
            json!({ "model": model, "input": ["the cat", "the dog sat"] }),
            "/data",
        ),
        (
            "/v1/responses",
            json!({ "model": model, "input": "the rat", "max_output_tokens": 9, "temperature": 0 }),
            "/output/0/content/0/text",
        ),
        (
            "/v1/messages",
            json!({ "model": model, "messages": messages, "max_tokens": 9, "temperature": 0 }),
            "/content",
        ),
    ]
}

#[test]
fn mixed_answers_are_those_of_each_adapter_alone() {
    let place = folder(&["rhyme", "prose"]);
    let models = [NAME, "rhyme", "prose"];
    let answer = |client: Client, (path, body, part): &(&str, Value, &str)| {
        let answer = client.ask("POST", path, &body.to_string());
        assert_eq!(answer.status, 200, "{body}: {}", answer.text());
        let answer = answer.json();
        assert_eq!(answer["model"], body["model"]);
        let found = answer.pointer(part);
        found
            .unwrap_or_else(|| panic!("{part} of {answer}"))
            .clone()
    };
    let mut alone = Vec::new();
    for model in models {
        let own: &[&str] = if model == NAME { &[] } else { &[model] };
        let house = served(place.path(), own);
        alone.extend(
            asked(model)
                .iter()
                .map(|asked| answer(house.client(), asked)),
        );
    }
    let kinds = alone.len() / models.len();
    for kind in 0..2 {
        let of = |model: usize| &alone[model * kinds + kind];
        assert!(of(0) != of(1) && of(1) != of(2) && of(0) != of(2), "{kind}");
    }
    let house = served(place.path(), &models[1..]);
    let requests: Vec<_> = models.iter().flat_map(|model| asked(model)).collect();
    for round in 0..3 {
        let answers: Vec<Value> = std::thread::scope(|scope| {
            let answer = &answer;
            let asking = |asked| {
                let client = house.client();
                scope.spawn(move || answer(client, asked))
            };
            let threads: Vec<_> = requests.iter().map(asking).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        for ((asked, got), expected) in requests.iter().zip(&answers).zip(&alone) {
            assert_eq!(got, expected, "round {round}: {asked:?}");
        }
    }
    let listed = house.get("/v1/models").json();
    let cards = listed["data"].as_array().unwrap();
    let cards: Vec<_> = cards.iter().map(|c| (&c["id"], &c["parent"])).collect();
    let base = json!(NAME);
    assert_eq!(
        cards,
        [
            (&base, &Value::Null),
            (&json!("rhyme"), &base),
            (&json!("prose"), &base)
        ]
    );
    assert_eq!(house.get("/v1/models/prose").json()["parent"], NAME);
    let body = json!({ "model": "verse", "messages": [{ "role": "user", "content": "x" }] });
    house.refused(CHAT, &body, 404, json!("model"), "tiny/cat, rhyme, prose");
    assert_eq!(
        house.post(CHAT, &body).json()["error"]["code"],
        "model_not_found"
    );
    // Without the flag nothing can be loaded, and nobody is told that it could.
    assert_eq!(
        house
            .post(LOAD, &json!({ "lora_name": "a", "lora_path": "rhyme" }))
            .status,
        404
    );
    assert!(!house.get("/openapi.json").text().contains("lora"));
}

#[test]
fn adapters_come_and_go_while_others_are_answered() {
    let place = folder(&["rhyme", "prose"]);
    let broken = place.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    let lora = r#"{ "peft_type": "LORA" }"#;
    std::fs::write(broken.join("adapter_config.json"), lora).unwrap();
    std::fs::write(place.path().join("file"), "").unwrap();
    let mut prose = model();
    prose.add_adapter(&place.path().join("prose")).unwrap();
    let file = place.path().join("prose.gguf");
    prose
        .save_adapter_gguf(&RealDisk, &file, BlockType::F32)
        .unwrap();
    let house = open(place.path());
    let asked = |model: &str| {
        json!({ "model": model, "messages": [{ "role": "user", "content": "the cat sat" }],
            "max_tokens": 30, "temperature": 0, "ignore_eos": true })
    };
    let text = |model: &str| house.ok(CHAT, &asked(model))["choices"][0]["message"].clone();
    let load =
        |name: &str, path: &str| house.post(LOAD, &json!({ "lora_name": name, "lora_path": path }));
    let plain = text(NAME);
    house.refused(CHAT, &asked("x"), 404, json!("model"), "does not exist");
    let loaded = load("x", "rhyme");
    assert_eq!(
        (loaded.status, loaded.text().as_str()),
        (200, "Success: LoRA adapter 'x' added successfully.")
    );
    let rhyme = text("x");
    assert!(rhyme != plain && text(NAME) == plain);
    for (name, path, status, param, part) in [
        ("x", "prose", 400, "lora_name", "is there already"),
        (NAME, "prose", 400, "lora_name", "is there already"),
        ("", "prose", 400, "lora_name", "1 to 256"),
        ("a\nb", "prose", 400, "lora_name", "control"),
        ("y", "missing", 404, "lora_path", "no adapter"),
        ("y", "file", 404, "lora_path", "no adapter"),
        ("y", "broken", 400, "lora_path", "adapter_model.safetensors"),
        ("y", "..", 400, "lora_path", "not a path"),
        ("y", "", 400, "lora_path", "not a path"),
        ("y", "./prose", 400, "lora_path", "not a path"),
        ("y", "prose/", 400, "lora_path", "not a path"),
        ("y", "prose/../rhyme", 400, "lora_path", "not a path"),
        ("y", "/etc", 400, "lora_path", "not a path"),
        (
            "y",
            place.path().join("prose").to_str().unwrap(),
            400,
            "lora_path",
            "not a path",
        ),
    ] {
        let body = json!({ "lora_name": name, "lora_path": path });
        house.refused(LOAD, &body, status, json!(param), part);
        let text = house.post(LOAD, &body).text();
        assert!(!text.contains(place.path().to_str().unwrap()), "{text}");
    }
    house.refused(
        LOAD,
        &json!({ "lora_name": "y" }),
        400,
        json!("lora_path"),
        "missing",
    );
    let more = json!({ "lora_name": "y", "lora_path": "prose", "load_inplace": true });
    house.refused(LOAD, &more, 400, json!("load_inplace"), "not supported");
    for name in ["y", NAME] {
        house.refused(
            UNLOAD,
            &json!({ "lora_name": name }),
            404,
            json!("lora_name"),
            "no adapter",
        );
    }

    // A long answer goes on when its adapter is taken away, and another one comes under its name.
    let mut long = asked("x");
    long["stream"] = true.into();
    long["max_tokens"] = 450.into();
    long["n"] = 6.into();
    let mut connection = house.client().connect();
    let request = house.client().request("POST", CHAT, &long.to_string());
    connection.write_all(request.as_bytes()).unwrap();
    let mut connection = BufReader::new(connection);
    assert!(!connection.fill_buf().unwrap().is_empty());
    let unloaded = house.ok_text(UNLOAD, &json!({ "lora_name": "x" }));
    assert_eq!(unloaded, "Success: LoRA adapter 'x' removed successfully.");
    house.refused(CHAT, &asked("x"), 404, json!("model"), "does not exist");
    assert_eq!(load("x", "prose").status, 200);
    let prose = text("x");
    assert!(prose != rhyme && prose != plain);
    // The same as llama.cpp's kind of file.
    assert_eq!(load("y", "prose.gguf").status, 200);
    assert_eq!(text("y"), prose);
    house.ok_text(UNLOAD, &json!({ "lora_name": "y" }));
    let events = read_answer(connection).events();
    let finished = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    let finished = finished.filter(|choice| choice["finish_reason"] == "length");
    assert_eq!(finished.count(), 6);
    let spoken = events
        .iter()
        .flat_map(|event| event["choices"].as_array().unwrap());
    let spoken = spoken.filter(|choice| choice["index"] == 0);
    let spoken: String = spoken
        .filter_map(|c| c["delta"]["content"].as_str())
        .collect();
    assert!(spoken.starts_with(rhyme["content"].as_str().unwrap()));
    // Loaded again, it is what it was; keys and values of its namesake are not mistaken for its own.
    house.ok_text(UNLOAD, &json!({ "lora_name": "x" }));
    assert_eq!(load("x", "rhyme").status, 200);
    assert_eq!(text("x"), rhyme);
    assert!(house.get("/openapi.json").text().contains(UNLOAD));
}

/// The template that an adapter was trained with is the one its conversations are read by.
#[test]
fn an_adapter_brings_its_template() {
    let place = folder(&["rhyme", "prose"]);
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    std::fs::write(place.path().join("rhyme/chat_template.jinja"), template).unwrap();
    let house = served(place.path(), &["rhyme", "prose"]);
    let prompt = |model: &str| {
        let body = json!({ "model": model, "messages": [{ "role": "user", "content": "x" }] });
        house.ok("/apply-template", &body)["prompt"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(prompt("rhyme"), "[x]");
    assert_eq!(prompt("prose"), prompt(NAME));
    assert_ne!(prompt("prose"), "[x]");
}
