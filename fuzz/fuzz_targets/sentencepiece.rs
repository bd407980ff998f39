//! Any bytes as a `tokenizer.model`: refused in words, or it encodes and decodes any text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use windlass_model::Tokenizer;
use windlass_model::tokenizer::GgufVocabulary;

const TEXTS: [&str; 3] = ["aab  ba", "中 <x>\u{2581}", " \n<0x0A> wor\u{301}ld"];

fuzz_target!(|file: &[u8]| {
    let vocabulary = GgufVocabulary::from_sentencepiece(Path::new("tokenizer.model"), file);
    match vocabulary.and_then(|vocabulary| Tokenizer::from_gguf(&vocabulary)) {
        Err(error) => assert!(!error.to_string().is_empty() && error.hint().is_some()),
        Ok(tokenizer) => {
            for text in TEXTS.into_iter().chain(std::str::from_utf8(file)) {
                let ids = tokenizer.encode(text, true).expect("ids");
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                tokenizer.decode(&ids, false).expect("a text");
            }
        }
    }
});
