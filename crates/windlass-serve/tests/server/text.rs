//! Generated text: whole and streamed, with all that can be asked about it.

use crate::house::{CONTEXT, House, NAME};
use serde_json::{Value, json};
use windlass_infer::engine::EngineOptions;
use windlass_serve::ServerOptions;

fn chat(more: Value) -> Value {
    let mut body = json!({
        "model": NAME, "messages": [{ "role": "user", "content": "the cat" }],
        "temperature": 0, "max_tokens": 12, "ignore_eos": true,
    });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

/// The text of a choice, put together from a stream.
fn gather(events: &[Value], index: usize) -> (String, Value) {
    let mut text = String::new();
    let mut finish = Value::Null;
    for event in events {
        for choice in event["choices"].as_array().unwrap() {
            if choice["index"] == index {
                assert!(finish.is_null(), "after the end: {choice}");
                text += choice["delta"]["content"]
                    .as_str()
                    .or(choice["text"].as_str())
                    .unwrap_or("");
                finish = choice["finish_reason"].clone();
            }
        }
    }
    (text, finish)
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let house = House::new();
    let path = "/v1/chat/completions";
    for more in [
        json!({}),
        json!({ "temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 40, "min_p": 0.01 }),
        json!({ "seed": 6, "temperature": 1.5, "n": 3 }),
        json!({ "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2 }),
        json!({ "logit_bias": { "40": 100 } }),
        json!({ "chat_template_kwargs": { "mood": "sad" }, "max_completion_tokens": 7 }),
    ] {
        let whole = house.ok(path, &chat(more.clone()));
        assert_eq!(whole["object"], "chat.completion");
        let choices = whole["choices"].as_array().unwrap();
        let tokens = if more["max_completion_tokens"].is_null() {
            12
        } else {
            7
        };
        let usage = &whole["usage"];
        assert_eq!(
            usage["completion_tokens"],
            tokens * choices.len(),
            "{whole}"
        );
        let mut asked = chat(more.clone());
        asked["stream_options"] = json!({ "include_usage": true });
        let events = house.stream(path, &asked);
        let (last, chunks) = events.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        for name in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(last["usage"][name], usage[name]);
        }
        let first = &chunks[0]["choices"][0];
        assert_eq!(
            first["delta"],
            json!({ "role": "assistant", "content": "" })
        );
        for chunk in chunks {
            assert!(chunk["usage"].is_null() && chunk.get("usage").is_some());
            assert_eq!(
                (&chunk["id"], &chunk["model"]),
                (&chunks[0]["id"], &json!(NAME))
            );
        }
        for (index, choice) in choices.iter().enumerate() {
            let streamed = gather(chunks, index);
            assert_eq!(streamed.0, choice["message"]["content"].as_str().unwrap());
            assert_eq!(streamed.1, choice["finish_reason"]);
        }
    }
    let biased = house.ok(
        path,
        &chat(json!({ "logit_bias": { "40": 100 }, "logprobs": true })),
    );
    let entries = biased["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert!(
        entries
            .iter()
            .all(|entry| entry["token"] == entries[0]["token"])
    );
    let seeded = |seed: u64| house.ok(path, &chat(json!({ "temperature": 1.0, "seed": seed })));
    assert_eq!(text(&seeded(7)), text(&seeded(7)));
    assert_ne!(text(&seeded(7)), text(&seeded(8)));
}

#[test]
fn stop_strings_are_not_shown() {
    let house = House::new();
    let path = "/v1/chat/completions";
    let long = house.ok(
        path,
        &chat(json!({ "max_tokens": 40, "temperature": 1, "seed": 3 })),
    );
    let long = text(&long).to_owned();
    let letters: Vec<char> = long.chars().collect();
    let middle = letters.len() / 2;
    let stop: String = letters[middle..middle + 3].iter().collect();
    let expected = &long[..long.find(&stop).unwrap()];
    let asked = chat(
        json!({ "max_tokens": 40, "temperature": 1, "seed": 3, "stop": ["never that", stop] }),
    );
    let stopped = house.ok(path, &asked);
    assert_eq!(text(&stopped), expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let streamed = gather(&house.stream(path, &asked), 0);
    assert_eq!(streamed, (expected.to_owned(), json!("stop")));
    // Cutting an answer short ends its computation.
    house.until("num_requests_running", 0.0);
}

#[test]
fn log_probabilities_belong_to_the_text() {
    let house = House::new();
    let answer = house.ok(
        "/v1/chat/completions",
        &chat(json!({ "logprobs": true, "top_logprobs": 3 })),
    );
    let entries = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(entries.len(), 12);
    let mut bytes = Vec::new();
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the chosen one is the likeliest.
        assert_eq!(
            (&top[0]["token"], &top[0]["logprob"]),
            (&entry["token"], &entry["logprob"])
        );
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
        bytes.extend(
            entry["bytes"]
                .as_array()
                .unwrap()
                .iter()
                .map(|b| b.as_u64().unwrap() as u8),
        );
    }
    assert_eq!(String::from_utf8_lossy(&bytes), text(&answer));

    let path = "/v1/completions";
    let body = json!({ "model": NAME, "prompt": "the cat sat", "max_tokens": 4, "temperature": 0, "logprobs": 2, "echo": true, "ignore_eos": true });
    let echoed = house.ok(path, &body);
    let choice = &echoed["choices"][0];
    assert!(choice["text"].as_str().unwrap().starts_with("the cat sat"));
    let logprobs = &choice["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap();
    let prompt = echoed["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(tokens.len(), prompt + 4);
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    let joined: String = tokens[..prompt]
        .iter()
        .map(|t| t.as_str().unwrap())
        .collect();
    assert_eq!(joined, "the cat sat");
    assert_eq!(
        logprobs["text_offset"][1],
        tokens[0].as_str().unwrap().chars().count()
    );
    // The prompt scored by itself, and the answer scored as a prompt.
    let mut scored = body.clone();
    scored["max_tokens"] = json!(0);
    let scored = house.ok(path, &scored);
    assert_eq!(scored["choices"][0]["text"], "the cat sat");
    let all = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(
        scored["choices"][0]["logprobs"]["token_logprobs"]
            .as_array()
            .unwrap()[..],
        all[..prompt]
    );
}

#[test]
fn completions_continue_several_prompts() {
    let house = House::new();
    let path = "/v1/completions";
    let body = json!({ "model": NAME, "prompt": ["the cat", "the dog"], "n": 2, "max_tokens": 5, "seed": 1, "ignore_eos": true });
    let both = house.ok(path, &body);
    let texts: Vec<&str> = both["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts.len(), 4);
    let mut dog = body.clone();
    dog["prompt"] = json!("the dog");
    let alone = house.ok(path, &dog);
    assert_eq!(
        (texts[2], texts[3]),
        (
            alone["choices"][0]["text"].as_str().unwrap(),
            alone["choices"][1]["text"].as_str().unwrap()
        )
    );
    let events = house.stream(path, &body);
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(gather(&events, index).0, *text);
    }
    let ids = house.ok("/tokenize", &json!({ "prompt": "the dog" }))["tokens"].clone();
    dog["prompt"] = ids;
    assert_eq!(house.ok(path, &dog)["choices"], alone["choices"]);

    let best = house.ok(path, &json!({ "model": NAME, "prompt": "the cat", "best_of": 6, "n": 2, "max_tokens": 5, "seed": 1, "logprobs": 0, "ignore_eos": true }));
    let mean = |choice: &Value| {
        let values = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        values.iter().map(|v| v.as_f64().unwrap()).sum::<f64>() / values.len() as f64
    };
    let choices = best["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2);
    assert!(mean(&choices[0]) >= mean(&choices[1]));
    let all = house.ok(path, &json!({ "model": NAME, "prompt": "the cat", "n": 6, "max_tokens": 5, "seed": 1, "logprobs": 0, "ignore_eos": true }));
    let most = all["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(mean)
        .fold(f64::MIN, f64::max);
    assert_eq!(mean(&choices[0]), most);
}

#[test]
fn a_long_conversation_is_refused_and_a_long_answer_is_cut() {
    let house = House::new();
    let words = "the cat ".repeat(CONTEXT);
    let body = json!({ "model": NAME, "messages": [{ "role": "user", "content": words }] });
    let answer = house.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 400);
    let error = &answer.json()["error"];
    assert_eq!(error["type"], "exceed_context_size_error");
    assert_eq!(
        (&error["code"], &error["n_ctx"]),
        (&json!("context_length_exceeded"), &json!(CONTEXT))
    );
    assert!(error["n_prompt_tokens"].as_u64().unwrap() > CONTEXT as u64);
    let full = house.ok(
        "/v1/chat/completions",
        &chat(json!({ "max_tokens": 100_000 })),
    );
    assert_eq!(full["choices"][0]["finish_reason"], "length");
    assert_eq!(full["usage"]["total_tokens"], CONTEXT);
}

/// A second turn of a conversation computes only what is new.
#[test]
fn what_was_read_before_is_counted_as_cached() {
    let house = House::new();
    let words = "the dog sat on the log while the rat ran. ".repeat(8);
    let body = chat(json!({ "messages": [{ "role": "user", "content": words }] }));
    let first = house.ok("/v1/chat/completions", &body);
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let second = house.ok("/v1/chat/completions", &body);
    assert!(
        second["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
            > 16,
        "{second}"
    );
    assert_eq!(text(&first), text(&second));
}

/// Thoughts, which this template begins, come in a field of their own.
#[test]
fn thoughts_are_kept_apart() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n{# </think> #}";
    let house = House::with_template(ServerOptions::default(), EngineOptions::default(), template);
    let mut body = json!({
        "model": NAME, "messages": [{ "role": "user", "content": "the cat" }],
        "max_tokens": 12, "seed": 4, "ignore_eos": true,
    });
    let whole = house.ok("/v1/chat/completions", &body);
    let message = &whole["choices"][0]["message"];
    let thoughts = message["reasoning_content"].as_str().unwrap();
    assert!(!thoughts.is_empty());
    assert_eq!(message["content"], "");
    let details = &whole["usage"]["completion_tokens_details"];
    assert_eq!(details["reasoning_tokens"], 12);
    let chunks = house.stream("/v1/chat/completions", &body);
    let parts = chunks.iter().map(|chunk| {
        let delta = &chunk["choices"][0]["delta"];
        delta["reasoning_content"].as_str().unwrap_or("")
    });
    assert_eq!(parts.collect::<String>(), thoughts);
    body["reasoning_format"] = "none".into();
    let plain = house.ok("/v1/chat/completions", &body);
    let said = plain["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(said.trim(), thoughts);
}
