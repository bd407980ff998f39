//! The other endpoints, and what every response has.

use crate::house::{CONTEXT, House, NAME, model};
use serde_json::{Value, json};
use windlass_infer::engine::EngineOptions;
use windlass_serve::{ServeError, ServerOptions};

#[test]
fn small_endpoints_answer() {
    let house = House::new();
    assert_eq!(house.get("/health").json(), json!({ "status": "ok" }));
    assert!(house.get("/version").json()["version"].is_string());
    let models = house.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], NAME);
    assert_eq!(
        house.get(&format!("/v1/models/{NAME}")).json(),
        models["data"][0]
    );
    assert_eq!(
        house.get("/v1/models/other").json()["error"]["code"],
        "model_not_found"
    );
    assert_eq!(house.get("/nowhere").status, 404);
    assert_eq!(house.get("/v1/chat/completions").status, 405);
    let page = house.get("/");
    assert!(page.text().contains("<title>Windlass</title>"));
    // Everything is in the one file.
    assert!(!page.text().contains("src=\"") && !page.text().contains("https://"));
    let document = house.get("/openapi.json").json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{id}", NAME);
            let answer = house.client().ask(&method.to_uppercase(), &path, "{}");
            assert!(
                answer.status != 404 && answer.status != 405,
                "{method} {path}"
            );
            assert!(answer.header("x-request-id").starts_with("req_"));
            // No page of another site may read this.
            assert_eq!(answer.header("access-control-allow-origin"), "");
        }
    }
}

#[test]
fn tokens_go_in_and_out() {
    let house = House::new();
    let tokens = house.ok(
        "/tokenize",
        &json!({ "prompt": "the dog <|end|>", "return_token_strs": true }),
    );
    let joined: String = tokens["token_strs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(joined, "the dog <|end|>");
    assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
    assert_eq!(tokens["max_model_len"], CONTEXT);
    let text = house.ok(
        "/detokenize",
        &json!({ "model": NAME, "tokens": tokens["tokens"] }),
    );
    assert_eq!(text["prompt"], "the dog <|end|>");
    let messages = json!([{ "role": "system", "content": "x" }, { "role": "user", "content": [{ "type": "text", "text": "y" }] }]);
    let prompt = house.ok("/apply-template", &json!({ "messages": messages }));
    assert_eq!(prompt["prompt"], "<system>x\n<user>y\n<assistant>");
    let counted = house.ok("/tokenize", &json!({ "messages": messages }));
    let alone = house.ok("/tokenize", &json!({ "prompt": prompt["prompt"] }));
    assert_eq!(counted["tokens"], alone["tokens"]);
}

#[test]
fn embeddings_have_length_one() {
    let house = House::new();
    let path = "/v1/embeddings";
    let vector = |value: &Value| -> Vec<f64> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    let both = house.ok(
        path,
        &json!({ "model": NAME, "input": ["the cat", "the dog sat"] }),
    );
    let first = vector(&both["data"][0]["embedding"]);
    assert_eq!(first.len(), 32);
    assert!((first.iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-5);
    let alone = house.ok(path, &json!({ "model": NAME, "input": "the dog sat" }));
    assert_eq!(alone["data"][0]["embedding"], both["data"][1]["embedding"]);
    assert_ne!(both["data"][0]["embedding"], both["data"][1]["embedding"]);
    let coded = house.ok(
        path,
        &json!({ "model": NAME, "input": "the cat", "encoding_format": "base64", "dimensions": 8 }),
    );
    use base64::Engine as _;
    let bytes = base64::prelude::BASE64_STANDARD
        .decode(coded["data"][0]["embedding"].as_str().unwrap())
        .unwrap();
    let short: Vec<f32> = bytes
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let length: f64 = first[..8].iter().map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!(short.len(), 8);
    for (short, long) in short.iter().zip(&first) {
        assert!((f64::from(*short) - long / length).abs() < 1e-5);
    }
    house.refused(
        path,
        &json!({ "model": NAME, "input": "x", "dimensions": 33 }),
        400,
        json!("dimensions"),
        "from 1 to 32",
    );
    house.refused(
        path,
        &json!({ "model": NAME, "input": [] }),
        400,
        json!("input"),
        "empty",
    );
    house.refused(
        path,
        &json!({ "model": NAME, "input": [999] }),
        400,
        json!("input"),
        "999 is no token",
    );
}

#[test]
fn keys_are_asked_for() {
    let options = ServerOptions {
        api_keys: vec!["secret-1".into(), "secret-2".into()],
        ..ServerOptions::default()
    };
    let house = House::with(options, EngineOptions::default());
    for (header, status) in [
        ("X: y", 401),
        ("Authorization: Bearer secret-1", 200),
        ("authorization: bearer secret-2", 200),
        ("x-api-key: secret-2", 200),
        ("Authorization: Bearer secret-", 401),
        ("Authorization: Bearer", 401),
        ("Authorization: Basic secret-1", 401),
        ("x-api-key: ", 401),
    ] {
        let mut client = house.client();
        client.headers.push(header.into());
        let answer = client.ask("GET", "/v1/models", "");
        assert_eq!(answer.status, status, "{header}");
        if status == 401 {
            assert_eq!(answer.json()["error"]["type"], "authentication_error");
        }
        assert_eq!(client.ask("GET", "/metrics", "").status, status);
    }
    assert_eq!(house.get("/health").status, 200);
    assert_eq!(house.get("/").status, 200);
    let anthropic = house.post("/v1/messages", &json!({}));
    assert_eq!(
        (anthropic.status, &anthropic.json()["type"]),
        (401, &json!("error"))
    );
}

#[test]
fn requests_come_before_the_model() {
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let house = House::loading(ServerOptions::default(), move || {
        wait.recv().unwrap();
        Ok(windlass_serve::Served {
            name: NAME.into(),
            model: model(),
            template: None,
            tool_template: None,
            adapters: Vec::new(),
            engine: EngineOptions::default(),
        })
    });
    for path in ["/health", "/v1/models"] {
        let answer = house.get(path);
        assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
        assert_eq!(answer.json()["error"]["message"], "Loading model");
    }
    assert_eq!(
        house
            .post("/v1/completions", &json!({ "model": NAME, "prompt": "x" }))
            .status,
        503
    );
    go.send(()).unwrap();
    while house.get("/health").status != 200 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    house.ok("/v1/completions", &json!({ "model": NAME, "prompt": "x" }));
    let body = json!({ "model": NAME, "messages": [{ "role": "user", "content": "x" }] });
    house.refused(
        "/v1/chat/completions",
        &body,
        400,
        Value::Null,
        "no chat template",
    );
}

#[test]
fn a_model_that_cannot_be_loaded_ends_the_server() {
    let house = House::loading(ServerOptions::default(), || {
        Err(ServeError::Engine {
            reason: "no weights".into(),
        })
    });
    let error = house.join().unwrap_err();
    assert!(matches!(error, ServeError::Load(_)));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = windlass_serve::Server::bind(ServerOptions {
        port,
        ..ServerOptions::default()
    });
    let error = error.map(|_| ()).unwrap_err();
    assert!(error.hint().unwrap().contains("--port"), "{error}");
}

fn joined(events: &[Value], kind: &str, field: &str) -> String {
    let parts = events.iter().filter(|event| event["type"] == kind);
    parts
        .map(|event| event.pointer(field).unwrap().as_str().unwrap())
        .collect()
}

#[test]
fn anthropic_messages_answer() {
    let house = House::new();
    let body = json!({
        "model": NAME, "max_tokens": 9, "temperature": 0, "ignore_eos": true, "system": [{ "type": "text", "text": "x" }],
        "messages": [
            { "role": "user", "content": "the cat" },
            { "role": "assistant", "content": [{ "type": "text", "text": "sat" }, { "type": "tool_use", "id": "t", "name": "f", "input": { "a": 1 } }] },
            { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t", "content": [{ "type": "text", "text": "on" }] }, { "type": "text", "text": "mat", "cache_control": { "type": "ephemeral" } }] },
        ],
    });
    let whole = house.ok("/v1/messages", &body);
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("max_tokens"))
    );
    assert_eq!(whole["usage"]["output_tokens"], 9);
    let mut count = body.clone();
    for name in ["max_tokens", "temperature", "ignore_eos"] {
        count.as_object_mut().unwrap().remove(name);
    }
    assert_eq!(
        house.ok("/v1/messages/count_tokens", &count)["input_tokens"],
        whole["usage"]["input_tokens"]
    );
    let events = house.stream("/v1/messages", &body);
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(
        kinds[kinds.len() - 3..],
        ["content_block_stop", "message_delta", "message_stop"]
    );
    assert_eq!(
        joined(&events, "content_block_delta", "/delta/text"),
        whole["content"][0]["text"]
    );
    let end = &events[events.len() - 2];
    assert_eq!(
        (&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]),
        (&json!("max_tokens"), &json!(9))
    );

    // An answer that has begun goes on.
    let begun = json!({ "model": NAME, "max_tokens": 3, "messages": [{ "role": "user", "content": "a" }, { "role": "assistant", "content": "the" }] });
    house.ok("/v1/messages", &begun);
    for (body, kind, part) in [
        (
            json!({ "model": NAME, "messages": [] }),
            "invalid_request_error",
            "max_tokens",
        ),
        (
            json!({ "model": "other", "max_tokens": 1, "messages": [] }),
            "not_found_error",
            "other",
        ),
        (
            json!({ "model": NAME, "max_tokens": 1, "messages": [{ "role": "user", "content": [{ "type": "image" }] }] }),
            "invalid_request_error",
            "messages[0].content[0].type",
        ),
        (
            json!({ "model": NAME, "max_tokens": 1, "thinking": { "type": "enabled", "budget_tokens": 1024 }, "messages": [{ "role": "user", "content": "x" }] }),
            "invalid_request_error",
            "thinking.type",
        ),
    ] {
        let answer = house.post("/v1/messages", &body).json();
        assert_eq!(
            (&answer["type"], &answer["error"]["type"]),
            (&json!("error"), &json!(kind))
        );
        assert!(
            answer["error"]["message"].as_str().unwrap().contains(part),
            "{answer}"
        );
    }
}

#[test]
fn responses_answer() {
    let house = House::new();
    let body = json!({
        "model": NAME, "instructions": "x", "max_output_tokens": 9, "temperature": 0,
        "input": [
            { "role": "user", "content": [{ "type": "input_text", "text": "the cat" }] },
            { "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c", "output": "sat" },
        ],
    });
    let whole = house.ok("/v1/responses", &body);
    assert_eq!(
        (&whole["object"], &whole["instructions"]),
        (&json!("response"), &json!("x"))
    );
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["role"]),
        (&json!("message"), &json!("assistant"))
    );
    let events = house.stream("/v1/responses", &body);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added"
        ]
    );
    let text = joined(&events, "response.output_text.delta", "/delta");
    assert_eq!(text, item["content"][0]["text"].as_str().unwrap());
    let last = &events.last().unwrap()["response"];
    assert_eq!(last["output"][0]["content"], item["content"]);
    assert_eq!(
        last["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
    assert_eq!(last["status"], whole["status"]);
    house.refused(
        "/v1/responses",
        &json!({ "model": NAME, "input": "x", "previous_response_id": "r" }),
        400,
        json!("previous_response_id"),
        "nothing is stored",
    );
    house.refused(
        "/v1/responses",
        &json!({ "model": NAME, "input": [] }),
        400,
        json!("input"),
        "not empty",
    );
    house.refused(
        "/v1/responses",
        &json!({ "model": NAME, "input": "x", "tools": [{ "type": "web_search" }] }),
        400,
        json!("tools[0].type"),
        "web_search",
    );
}
