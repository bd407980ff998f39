//! Any bytes as a vocabulary, as a table of characters and as a chat template: refused in words, or it encodes and
//! decodes any text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_model::tokenizer::{GgufVocabulary, TokenType};
use windlass_model::{ChatOptions, ChatTemplate, Tokenizer};

fuzz_target!(
    |input: (Vec<(String, u8, f32)>, Vec<String>, Vec<u8>, String, u8)| {
        let (tokens, merges, charsmap, text, choice) = input;
        let pres = [
            "gpt-2",
            "llama-bpe",
            "qwen2",
            "deepseek-v3",
            "falcon",
            "tekken",
            "default",
        ];
        let vocabulary = GgufVocabulary {
            model: ["llama", "gpt2", "bert", "t5"][usize::from(choice) % 4].into(),
            pre: Some(pres[usize::from(choice) % pres.len()].into()),
            scores: tokens.iter().map(|(_, _, score)| *score).collect(),
            token_types: tokens
                .iter()
                .map(|(_, kind, _)| TokenType::from_number((kind % 8).into()))
                .collect(),
            tokens: tokens.into_iter().map(|(token, ..)| token).collect(),
            merges,
            precompiled_charsmap: charsmap,
            unknown: Some(0),
            remove_extra_whitespaces: Some(choice > 127),
            ..Default::default()
        };
        if let Ok(tokenizer) = Tokenizer::from_gguf(&vocabulary)
            && let Ok(ids) = tokenizer.encode(&text, true)
        {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            let _ = tokenizer.decode(&ids, false);
        }
        if let Ok(template) = ChatTemplate::new(&text, Vec::new()) {
            let _ = template.render(&[], &ChatOptions::default());
        }
    }
);
