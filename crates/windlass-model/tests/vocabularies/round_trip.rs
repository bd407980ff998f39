//! Tokenizers taken apart into GGUF vocabularies and built again.

use crate::container::{data, vocabulary};
use crate::ids::{check_same, corpora};
use serde_json::{Value, json};
use std::path::Path;
use windlass_model::Tokenizer;
use windlass_model::tokenizer::{GgufVocabulary, TokenType};

/// What the message must say, and a change to a definition.
type Change = (&'static str, fn(&mut Value));

/// A tokenizer with a changed definition.
fn changed(folder: &Path, change: impl Fn(&mut Value)) -> Tokenizer {
    let content = std::fs::read(folder.join("tokenizer.json")).unwrap();
    let mut definition: Value = serde_json::from_slice(&content).unwrap();
    change(&mut definition);
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("tokenizer.json");
    std::fs::write(&file, definition.to_string()).unwrap();
    Tokenizer::load(&file).unwrap()
}

fn exported(tokenizer: &Tokenizer) -> GgufVocabulary {
    tokenizer.to_gguf(tokenizer.vocab_size()).unwrap().0
}

#[test]
fn published_tokenizers_survive() {
    let Some(data) = data() else { return };
    let texts = corpora(&data);
    let tokenizers = data.join("tokenizers");
    for (name, model, pre) in [
        ("gpt2", "gpt2", "gpt-2"),
        ("minimind", "gpt2", "gpt-2"),
        ("llama2", "llama", "default"),
    ] {
        let tokenizer = Tokenizer::load(&tokenizers.join(name)).unwrap();
        let (written, notes) = tokenizer.to_gguf(tokenizer.vocab_size() + 2).unwrap();
        assert_eq!(
            (written.model.as_str(), written.pre.as_deref()),
            (model, Some(pre))
        );
        assert_eq!(notes, Vec::<String>::new(), "{name}");
        assert_eq!(written.tokens.len(), tokenizer.vocab_size() + 2);
        assert_eq!(written.token_types.last(), Some(&TokenType::Unused));
        let built = Tokenizer::from_gguf(&written).unwrap();
        check_same(name, &tokenizer, &built, &texts);
        assert_eq!(built.eos()[0], tokenizer.eos()[0], "{name}");
        assert_eq!(written.chat_template.is_some(), name == "minimind");
        assert!(tokenizer.to_gguf(10).is_err());
    }
    // The arrays are those that llama.cpp's converter wrote, but for scores, where the order is the same.
    for (name, file) in [("gpt2", "gpt-2"), ("llama2", "llama-spm")] {
        let ours = exported(&Tokenizer::load(&tokenizers.join(name)).unwrap());
        let theirs = vocabulary(&tokenizers.join(format!("ggml-vocab/ggml-vocab-{file}.gguf")));
        assert!(ours.tokens == theirs.tokens, "{name}: tokens");
        assert!(ours.merges == theirs.merges, "{name}: merges");
        assert!(
            ours.token_types == theirs.token_types,
            "{name}: token_types"
        );
    }
}

#[test]
fn trained_tokenizers_survive() {
    let texts: Vec<String> = (0..300)
        .map(|i| format!("Ten {i} red balls, {} blue.\n", 7 * i))
        .collect();
    let tokenizer = Tokenizer::train(texts.iter(), 400, "<|end|>").unwrap();
    let written = exported(&tokenizer);
    assert_eq!(written.pre.as_deref(), Some("starcoder"));
    let built = Tokenizer::from_gguf(&written).unwrap();
    check_same("trained", &tokenizer, &built, &[texts.concat()]);
    assert_eq!(
        (built.bos(), built.eos()),
        (tokenizer.bos(), tokenizer.eos())
    );
}

#[test]
fn patterns_are_found_by_what_they_are() {
    let Some(data) = data() else { return };
    let folder = data.join("tokenizers/minimind");
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let split = |pattern: &str| {
        json!({ "type": "Split", "pattern": { "Regex": pattern },
        "behavior": "Isolated", "invert": false })
    };
    let sequence = |steps: Vec<Value>| json!({ "type": "Sequence", "pretokenizers": steps });
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen2 = llama3.replace(r"\p{N}{1,3}", r"\p{N}");
    let nfc = json!({ "type": "NFC" });
    let main = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
    let cases = [
        (json!(null), vec![split(llama3)], true, "llama-bpe", 0),
        (json!(null), vec![split(llama3)], false, "glm4", 0),
        (nfc.clone(), vec![split(&qwen2)], false, "qwen2", 0),
        (
            json!(null),
            vec![split(&qwen2)],
            false,
            "deepseek-r1-qwen",
            0,
        ),
        (nfc.clone(), vec![split(llama3)], true, "llama-bpe", 1),
        (
            json!(null),
            vec![
                split(r"\p{N}{1,3}"),
                split("[一-龥぀-ゟ゠-ヿ]+"),
                split(main),
            ],
            false,
            "deepseek-v3",
            0,
        ),
    ];
    for (normalizer, mut steps, ignore, name, notes) in cases {
        steps.push(bytes.clone());
        let tokenizer = changed(&folder, |definition| {
            definition["normalizer"] = normalizer.clone();
            definition["pre_tokenizer"] = sequence(steps.clone());
            definition["model"]["ignore_merges"] = ignore.into();
        });
        let (written, said) = tokenizer.to_gguf(6400).unwrap();
        assert_eq!((written.pre.as_deref(), said.len()), (Some(name), notes));
        let built = Tokenizer::from_gguf(&written).unwrap();
        if notes == 0 {
            check_same(name, &tokenizer, &built, &corpora(&data)[..1]);
        }
    }
    let refused: [Change; 5] = [
        ("\\w+", |d| {
            d["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\w+".into()
        }),
        ("ignore_merges true", |d| {
            d["model"]["ignore_merges"] = true.into()
        }),
        ("Lowercase", |d| {
            d["normalizer"] = json!({ "type": "Lowercase" })
        }),
        ("space before", |d| {
            d["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into()
        }),
        ("neither", |d| d["pre_tokenizer"] = json!(null)),
    ];
    for (expected, change) in refused {
        let tokenizer = changed(&folder, |definition| {
            definition["pre_tokenizer"] = sequence(vec![split(&qwen2), bytes.clone()]);
            change(definition);
        });
        let error = tokenizer.to_gguf(6400).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn merges_that_scores_cannot_say_are_refused() {
    let Some(data) = data() else { return };
    let folder = data.join("tokenizers/llama2");
    let refused: [Change; 3] = [
        ("it has no merge of \"e\" and \"r\"", |d| {
            d["model"]["merges"].as_array_mut().unwrap().remove(1);
        }),
        ("comes late", |d| {
            let merges = d["model"]["merges"].as_array_mut().unwrap();
            let many = merges.iter().rposition(|merge| merge == "th e").unwrap();
            let moved = merges.remove(many);
            merges.push(moved);
        }),
        ("NFKC", |d| d["normalizer"] = json!({ "type": "NFKC" })),
    ];
    for (expected, change) in refused {
        let tokenizer = changed(&folder, change);
        let error = tokenizer.to_gguf(32_000).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}
