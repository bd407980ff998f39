//! Ids against published ones, and of two tokenizers against each other.

use crate::container::{data, vocabulary};
use std::path::{Path, PathBuf};
use windlass_model::Tokenizer;

/// Texts with their ids, as llama.cpp keeps them beside a vocabulary; without a token that begins a text.
fn check_published(data: &Path, name: &str, texts: usize) {
    let path = data.join(format!("tokenizers/ggml-vocab/ggml-vocab-{name}.gguf"));
    let tokenizer = Tokenizer::from_gguf(&vocabulary(&path)).unwrap();
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", path.display())).unwrap();
    let (inputs, outputs) = (read("inp"), read("out"));
    let mut inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    assert_eq!(inputs.pop(), Some(""), "{name}");
    let outputs: Vec<&str> = outputs.lines().collect();
    assert_eq!((inputs.len(), outputs.len()), (texts, texts), "{name}");
    for (text, ids) in inputs.iter().zip(outputs) {
        let expected: Vec<u32> = ids
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        assert_eq!(
            tokenizer.encode(text, false).unwrap(),
            expected,
            "{name}: {text:?}"
        );
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), *text, "{name}");
    }
}

#[test]
fn published_ids_are_met() {
    let Some(data) = data() else { return };
    for name in ["gpt-2", "llama-spm", "phi-3"] {
        check_published(&data, name, 46);
    }
}

/// English, Chinese and code, cut to a length that keeps the test short.
pub fn corpora(data: &Path) -> Vec<String> {
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(path).unwrap();
        text[..text.floor_char_boundary(200_000)].to_owned()
    };
    let code = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/tokenizer.rs");
    let corpora = data.join("corpora");
    vec![
        read(corpora.join("tinyshakespeare/input.txt")),
        read(corpora.join("wikitext-2/wiki.test.raw")),
        read(corpora.join("zh/hongloumeng.txt")),
        read(code),
    ]
}

/// Two tokenizers give the same ids for paragraphs and for whole texts, control tokens in them read as text.
pub fn check_same(name: &str, one: &Tokenizer, other: &Tokenizer, texts: &[String]) {
    for text in texts {
        for text in text.lines().chain([text.as_str()]) {
            let ids = one.encode_with(text, true, false).unwrap();
            let start = &text[..text.floor_char_boundary(80)];
            assert!(
                ids == other.encode_with(text, true, false).unwrap(),
                "{name}: {start:?}"
            );
        }
    }
}

#[test]
fn vocabularies_agree_with_the_definitions_they_came_from() {
    let Some(data) = data() else { return };
    let texts = corpora(&data);
    for (file, folder) in [("gpt-2", "gpt2"), ("llama-spm", "llama2")] {
        let path = data.join(format!("tokenizers/ggml-vocab/ggml-vocab-{file}.gguf"));
        let built = Tokenizer::from_gguf(&vocabulary(&path)).unwrap();
        let published = Tokenizer::load(&data.join("tokenizers").join(folder)).unwrap();
        check_same(file, &built, &published, &texts);
        // What would be saved is the same tokenizer again.
        let folder = tempfile::tempdir().unwrap();
        built.save(folder.path()).unwrap();
        let saved = Tokenizer::load(folder.path()).unwrap();
        check_same(file, &built, &saved, &texts);
        assert_eq!((saved.bos(), saved.eos()[0]), (built.bos(), built.eos()[0]));
    }
}

#[test]
fn sentencepiece_models_are_read() {
    let Some(data) = data() else { return };
    let texts = corpora(&data);
    let tokenizers = data.join("tokenizers");
    let path = tokenizers.join("ggml-vocab/ggml-vocab-llama-spm.gguf");
    let built = Tokenizer::from_gguf(&vocabulary(&path)).unwrap();
    let read = Tokenizer::load(&tokenizers.join("llama2/tokenizer.model")).unwrap();
    check_same("llama2", &built, &read, &texts);
    for (name, size) in [
        ("tokenizer.model.v1", 32_000),
        ("mistral_instruct_tokenizer_240323.model.v3", 32_768),
    ] {
        let tokenizer = Tokenizer::load(&tokenizers.join("mistral").join(name)).unwrap();
        assert_eq!(tokenizer.vocab_size(), size, "{name}");
        assert_eq!(
            (tokenizer.bos(), tokenizer.eos()),
            (Some(1), &[2][..]),
            "{name}"
        );
        // Code is left out: a mark of a space in a text comes back as a space.
        for text in &texts[..3] {
            let ids = tokenizer.encode_with(text, true, false).unwrap();
            assert!(tokenizer.decode(&ids, true).unwrap() == *text, "{name}");
        }
    }
    let broken = tempfile::tempdir().unwrap();
    let content = std::fs::read(tokenizers.join("llama2/tokenizer.model")).unwrap();
    for (cut, expected) in [
        (1000, "inside a field"),
        (0, "tokens is empty"),
        (4, "inside a field"),
    ] {
        let path = broken.path().join("tokenizer.model");
        std::fs::write(&path, &content[..cut]).unwrap();
        let error = Tokenizer::load(broken.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
