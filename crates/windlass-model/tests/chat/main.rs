//! Chat templates against what `transformers` makes of them; `expected.py` writes what is expected.

use serde_json::{Value, json};
use std::path::Path;
use windlass_model::chat::message;
use windlass_model::{ChatError, ChatOptions, ChatTemplate, LocalTime, Tokenizer};

const EXPECTED: &str = include_str!("expected.json");

const NOW: LocalTime = LocalTime {
    year: 2026,
    month: 11,
    day: 21,
    hour: 9,
    minute: 5,
    second: 7,
};

fn tokens() -> Vec<(String, String)> {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    tokens
        .map(|(name, token)| (name.into(), token.into()))
        .to_vec()
}

/// The source of a template: beside this file, or in the test data.
fn source(name: &str) -> Option<String> {
    if name == "minimind" {
        let data = std::env::var_os("WINDLASS_TEST_DATA")?;
        let folder = Path::new(&data).join("tokenizers/minimind");
        return Tokenizer::load(&folder).unwrap().chat_template(false);
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chat/templates");
    Some(std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap())
}

fn check(case: &Value, conversation: &Value) {
    let name = case["template"].as_str().unwrap();
    let Some(source) = source(name) else {
        println!("skipped {name}: set WINDLASS_TEST_DATA");
        return;
    };
    let template = ChatTemplate::new(&source, tokens()).unwrap();
    let options = ChatOptions {
        add_generation_prompt: conversation["add_generation_prompt"] == true,
        tools: conversation["tools"].as_array().cloned(),
        now: Some(NOW),
        variables: conversation["variables"]
            .as_object()
            .cloned()
            .unwrap_or_default(),
    };
    let rendered = template.render(conversation["messages"].as_array().unwrap(), &options);
    let name = format!("{name}, {}", case["conversation"]);
    match (rendered, case["text"].as_str(), case["refused"].as_str()) {
        (Ok(text), Some(expected), _) => {
            let differs = text.lines().zip(expected.lines()).find(|(a, b)| a != b);
            assert!(text == expected, "{name}: {differs:#?} in\n{text}");
        }
        (Err(ChatError::Refused { message }), _, Some(expected)) => assert_eq!(message, expected),
        (Err(ChatError::Failed { .. }), None, None) => {}
        (other, ..) => panic!("{name}: {other:?}"),
    }
}

#[test]
fn templates_render_as_in_python() {
    let expected: Value = serde_json::from_str(EXPECTED).unwrap();
    let cases = expected["cases"].as_array().unwrap();
    assert!(cases.len() >= 90);
    for case in cases {
        let conversation = case["conversation"].as_str().unwrap();
        check(case, &expected["conversations"][conversation]);
    }
}

#[test]
fn bad_templates_are_errors() {
    let render = |source: &str, now| {
        let options = ChatOptions {
            now,
            ..Default::default()
        };
        ChatTemplate::new(source, tokens())?.render(&[message("user", "hi")], &options)
    };
    for (source, expected) in [
        ("{% for m in messages %}{{ m.role }}", "not valid"),
        ("{%}", "not valid"),
        ("{{ messages[0].nothing.more }}", "failed"),
        ("{{ unknown_function() }}", "failed"),
        (
            "{% for a in range(10000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
            "failed",
        ),
        ("{{ strftime_now('%Y') }}", "asks for the date"),
        (
            "{{ raise_exception('no ' ~ messages[0].role) }}",
            "refuses this conversation: no user",
        ),
    ] {
        let error = render(source, None).expect_err(source);
        assert!(error.to_string().contains(expected), "{source}: {error}");
        assert!(error.hint().is_some());
    }
    let error = render("{{ strftime_now('%Q') }}", Some(NOW)).unwrap_err();
    assert!(error.to_string().contains("%Q"), "{error}");
}

#[test]
fn seconds_are_dates() {
    for (seconds, year, month, day, hour) in [
        (0, 1970, 1, 1, 0),
        (951_782_400, 2000, 2, 29, 0),
        (1_795_251_907, 2026, 11, 21, 9),
        (-1, 1969, 12, 31, 23),
        (4_107_542_399, 2100, 2, 28, 23),
    ] {
        let time = LocalTime::from_unix(seconds);
        assert_eq!(
            (time.year, time.month, time.day, time.hour),
            (year, month, day, hour)
        );
    }
}

#[test]
fn folders_bring_templates_and_tokens() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let tokenizers = Path::new(&data).join("tokenizers");
    let minimind = Tokenizer::load(&tokenizers.join("minimind")).unwrap();
    let template = ChatTemplate::of(&minimind, false).unwrap().unwrap();
    let options = ChatOptions {
        add_generation_prompt: true,
        ..Default::default()
    };
    let text = template.render(&[message("user", "hi")], &options).unwrap();
    assert!(
        text.starts_with("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"),
        "{text}"
    );
    let (vocabulary, _) = minimind.to_gguf(6400).unwrap();
    let built = Tokenizer::from_gguf(&vocabulary).unwrap();
    let again = ChatTemplate::of(&built, false).unwrap().unwrap();
    assert_eq!(again.source(), template.source());
    let token = |tokenizer: &Tokenizer, wanted: &str| {
        let mut tokens = tokenizer.special_tokens().into_iter();
        tokens
            .find(|(name, _)| name == wanted)
            .map(|(_, token)| token)
    };
    for name in ["bos_token", "eos_token", "pad_token"] {
        assert!(token(&minimind, name).is_some(), "{name}");
        assert_eq!(token(&minimind, name), token(&built, name), "{name}");
    }
    let gpt2 = Tokenizer::load(&tokenizers.join("gpt2")).unwrap();
    assert!(ChatTemplate::of(&gpt2, false).unwrap().is_none());

    // Named templates, and one in a file of its own, which comes first.
    let folder = tempfile::tempdir().unwrap();
    minimind.save(folder.path()).unwrap();
    let named = json!({ "eos_token": { "content": "<|im_end|>" }, "chat_template": [
        { "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools" } ] });
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        named.to_string(),
    )
    .unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(tokenizer.chat_template(false).as_deref(), Some("plain"));
    assert_eq!(tokenizer.chat_template(true).as_deref(), Some("tools"));
    assert_eq!(
        tokenizer.special_tokens(),
        [("eos_token".to_owned(), "<|im_end|>".to_owned())]
    );
    std::fs::write(folder.path().join("chat_template.jinja"), "file").unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(tokenizer.chat_template(true).as_deref(), Some("file"));
}
