//! Requests that are wrong in thousands of ways: the client's fault, each time.

use crate::house::{House, NAME};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};
use std::io::{Read, Write};
use windlass_infer::engine::EngineOptions;
use windlass_serve::ServerOptions;

const PATHS: [&str; 11] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
];

const NAMES: [&str; 44] = [
    "model",
    "messages",
    "prompt",
    "input",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tools",
    "tool_choice",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "echo",
    "suffix",
    "dimensions",
    "encoding_format",
    "system",
    "instructions",
    "text",
    "tokens",
    "stop_token_ids",
    "metadata",
    "store",
    "user",
    "presence_penalty",
    "unheard_of",
    "max_output_tokens",
    "stop_sequences",
    "chat_template_kwargs",
    "lora_name",
    "lora_path",
];

const INNER: [&str; 14] = [
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "parameters",
    "arguments",
    "json_schema",
    "schema",
    "include_usage",
    "tool_calls",
    "input_schema",
    "5",
];

/// Any JSON, with words that mean something.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop::sample::select(
            &[
                "user",
                "assistant",
                "tool",
                "text",
                "function",
                "auto",
                "required",
                "object",
                "json_schema",
                "the cat",
                NAME
            ][..]
        )
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(&INNER[..]), inner), 0..4).prop_map(
                |pairs| {
                    let pairs = pairs
                        .into_iter()
                        .map(|(name, value)| (name.to_owned(), value));
                    Value::Object(pairs.collect::<Map<_, _>>())
                }
            ),
        ]
    })
}

#[test]
fn what_is_malformed_is_the_clients_fault() {
    let engine = EngineOptions {
        // Some requests are answered.
        context: Some(48),
        ..EngineOptions::default()
    };
    let place = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        adapter_folder: Some(place.path().to_owned()),
        ..ServerOptions::default()
    };
    let house = House::with(options, engine);
    let fields = prop::collection::vec((prop::sample::select(&NAMES[..]), value()), 0..6);
    let strategy = (prop::sample::select(&PATHS[..]), any::<bool>(), fields);
    let config = Config {
        // With those of schemathesis in the check of the clients more than ten thousand.
        cases: 8000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let run = runner.run(&strategy, |(path, valid, fields)| {
        // Half of the requests would be answered without the fields that follow.
        let mut body = match (valid, path) {
            (false, _) => json!({}),
            (_, "/v1/completions") => json!({ "model": NAME, "prompt": "x", "max_tokens": 2 }),
            (_, "/v1/embeddings") => json!({ "model": NAME, "input": "x" }),
            (_, "/v1/responses") => json!({ "model": NAME, "input": "x", "max_output_tokens": 2 }),
            (_, "/tokenize") => json!({ "prompt": "x" }),
            (_, "/detokenize") => json!({ "tokens": [1] }),
            (_, "/apply-template" | "/v1/messages/count_tokens") => json!({ "messages": [{ "role": "user", "content": "x" }] }),
            _ => json!({ "model": NAME, "messages": [{ "role": "user", "content": "x" }], "max_tokens": 2 }),
        };
        for (name, value) in fields {
            body[name] = value;
        }
        let answer = house.post(path, &body);
        prop_assert!(answer.status == 200 || (400..500).contains(&answer.status), "{} {}: {} {}", path, body, answer.status, answer.text());
        if answer.status != 200 {
            let message = answer.json()["error"]["message"].clone();
            prop_assert!(message.as_str().is_some_and(|m| !m.is_empty()));
        }
        Ok(())
    });
    run.unwrap();
    house.until("num_requests_running", 0.0);
    house.ok(
        "/v1/completions",
        &json!({ "model": NAME, "prompt": "the cat" }),
    );
}

#[test]
fn bytes_that_are_no_request_are_refused() {
    let options = ServerOptions {
        max_body: 10_000,
        header_timeout: std::time::Duration::from_millis(300),
        ..ServerOptions::default()
    };
    let house = House::with(options, EngineOptions::default());
    let path = "/v1/completions";
    for (body, status) in [
        ("", 400),
        ("{", 400),
        ("[]", 400),
        ("null", 400),
        ("{\"model\": \"\\ud800\"}", 400),
        (&"[".repeat(5000), 400),
        (
            &format!("{{\"model\": {}1{}}}", "[".repeat(200), "]".repeat(200)),
            400,
        ),
        (&"x".repeat(20_000), 413),
    ] {
        let answer = house.client().ask("POST", path, body);
        assert_eq!(answer.status, status, "{}", &body[..body.len().min(40)]);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let mut plain = house.client();
    plain.headers = vec!["Content-Type: text/plain".into()];
    assert_eq!(plain.ask("POST", path, "{}").status, 415);
    let mut many = house.client();
    many.headers
        .extend((0..200).map(|index| format!("x-{index}: y")));
    assert_eq!(many.ask("GET", "/health", "").status, 431);
    let mut runner = TestRunner::new(Config {
        cases: 200,
        failure_persistence: None,
        ..Config::default()
    });
    let bytes = prop::collection::vec(any::<u8>(), 1..200);
    let run = runner.run(&bytes, |bytes| {
        let mut connection = house.client().connect();
        connection.write_all(&bytes).unwrap();
        let _ = connection.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        prop_assert!(
            answer.is_empty() || text.starts_with("HTTP/1.1 4"),
            "{}",
            text
        );
        Ok(())
    });
    run.unwrap();
    assert_eq!(house.get("/health").status, 200);
}

/// Every field that is not understood is named.
#[test]
fn refusals_name_the_field() {
    let house = House::new();
    let chat =
        json!({ "model": NAME, "messages": [{ "role": "user", "content": "x" }], "max_tokens": 1 });
    for (path, name, value, param) in [
        ("/v1/chat/completions", "unheard_of", json!(1), "unheard_of"),
        (
            "/v1/chat/completions",
            "temperature",
            json!(3),
            "temperature",
        ),
        (
            "/v1/chat/completions",
            "temperature",
            json!("1"),
            "temperature",
        ),
        (
            "/v1/chat/completions",
            "top_logprobs",
            json!(3),
            "top_logprobs",
        ),
        ("/v1/chat/completions", "n", json!(0), "n"),
        ("/v1/chat/completions", "stop", json!([""]), "stop"),
        (
            "/v1/chat/completions",
            "logit_bias",
            json!({ "999": 1 }),
            "logit_bias",
        ),
        (
            "/v1/chat/completions",
            "logit_bias",
            json!({ "9": 101 }),
            "logit_bias.9",
        ),
        (
            "/v1/chat/completions",
            "stream_options",
            json!({ "include_usage": true }),
            "stream_options",
        ),
        ("/v1/chat/completions", "store", json!(true), "store"),
        ("/v1/chat/completions", "functions", json!([]), "functions"),
        (
            "/v1/chat/completions",
            "modalities",
            json!(["audio"]),
            "modalities",
        ),
        ("/v1/chat/completions", "messages", json!([]), "messages"),
        (
            "/v1/chat/completions",
            "messages",
            json!([{ "role": "king", "content": "x" }]),
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url" }] }]),
            "messages[0].content[0].type",
        ),
        ("/v1/completions", "suffix", json!("x"), "suffix"),
        ("/v1/completions", "best_of", json!(0), "best_of"),
        ("/v1/completions", "prompt", json!([[]]), "prompt"),
    ] {
        let mut body = match path {
            "/v1/completions" => json!({ "model": NAME, "prompt": "x", "max_tokens": 1 }),
            _ => chat.clone(),
        };
        body[name] = value;
        house.refused(path, &body, 400, json!(param), "");
    }
    let mut fine = chat;
    for (name, value) in [
        ("user", json!("u")),
        ("metadata", json!({ "a": "b" })),
        ("store", json!(false)),
        ("service_tier", json!("auto")),
        ("temperature", Value::Null),
        ("unheard_of", Value::Null),
        ("modalities", json!(["text"])),
    ] {
        fine[name] = value;
    }
    house.ok("/v1/chat/completions", &fine);
}
