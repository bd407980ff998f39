//! Vocabularies small enough to reason about, and vocabularies that contradict themselves.

use windlass_model::Tokenizer;
use windlass_model::tokenizer::{GgufVocabulary, TokenType};

fn strings(tokens: &[&str]) -> Vec<String> {
    tokens.iter().map(|token| (*token).to_owned()).collect()
}

/// SentencePiece BPE over a few letters, with all byte tokens from id 3 on.
fn letters() -> GgufVocabulary {
    let mut tokens = strings(&["<unk>", "<s>", "</s>"]);
    let mut types = vec![TokenType::Unknown, TokenType::Control, TokenType::Control];
    for byte in 0..256 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(TokenType::Byte);
    }
    let mut scores = vec![0.0; tokens.len()];
    let pieces = [
        ("▁", -9.0),
        ("a", -9.0),
        ("b", -9.0),
        ("ab", -1.0),
        ("ba", -1.0),
        ("▁a", -2.0),
    ];
    for (token, score) in pieces {
        tokens.push(token.to_owned());
        types.push(TokenType::Normal);
        scores.push(score);
    }
    tokens.push("<x>".into());
    types.push(TokenType::UserDefined);
    scores.push(0.0);
    GgufVocabulary {
        model: "llama".into(),
        tokens,
        scores,
        token_types: types,
        ..Default::default()
    }
}

/// Byte-level BPE over two letters and a mark.
fn bytes() -> GgufVocabulary {
    GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: strings(&[
            "a",
            "b",
            "Ġ",
            "ab",
            "Ġa",
            "<|im_end|>",
            "<two words>",
            "<",
            "|",
        ]),
        token_types: [1, 1, 1, 1, 1, 3, 4, 1, 1]
            .map(TokenType::from_number)
            .to_vec(),
        merges: strings(&["a b", "Ġ a"]),
        eos: Some(5),
        ..Default::default()
    }
}

/// A trie and its replacements with one rule: `A` becomes `a`.
fn charsmap() -> Vec<u8> {
    let mut trie = vec![0_u32; 768];
    trie[0] = 256 << 10;
    trie[256 ^ 0x41] = 0x41 | 1 << 8 | ((256 ^ 0x41) ^ 512) << 10;
    trie[512] = 1 << 31;
    let units = trie.iter().flat_map(|unit| unit.to_le_bytes());
    let length = (trie.len() as u32 * 4).to_le_bytes();
    length.into_iter().chain(units).chain(*b"a\0").collect()
}

fn unigram() -> GgufVocabulary {
    GgufVocabulary {
        model: "t5".into(),
        tokens: strings(&["<pad>", "</s>", "<unk>", "▁", "▁a", "b", "▁ab"]),
        scores: vec![0.0, 0.0, 0.0, -4.0, -1.0, -2.0, -2.5],
        token_types: [3, 3, 2, 1, 1, 1, 1].map(TokenType::from_number).to_vec(),
        remove_extra_whitespaces: Some(true),
        precompiled_charsmap: charsmap(),
        ..Default::default()
    }
}

fn word_pieces() -> GgufVocabulary {
    GgufVocabulary {
        model: "bert".into(),
        tokens: strings(&[
            "[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hello", "▁wor", "ld", "▁,", "▁!", "▁中",
        ]),
        token_types: [3, 3, 3, 3, 1, 1, 1, 1, 1, 1]
            .map(TokenType::from_number)
            .to_vec(),
        bos: Some(2),
        separator: Some(3),
        unknown: Some(1),
        ..Default::default()
    }
}

/// Ids of a text with what belongs around it, control tokens in it being those tokens or text.
fn check(vocabulary: &GgufVocabulary, text: &str, marked: &[u32], unmarked: &[u32]) {
    let tokenizer = Tokenizer::from_gguf(vocabulary).unwrap();
    let name = &vocabulary.model;
    let ids = |marks| tokenizer.encode_with(text, true, marks).unwrap();
    assert_eq!(ids(true), marked, "{name}: {text:?}");
    assert_eq!(ids(false), unmarked, "{name}: {text:?} as text");
    let folder = tempfile::tempdir().unwrap();
    tokenizer.save(folder.path()).unwrap();
    let saved = Tokenizer::load(folder.path()).unwrap();
    // A saved pipeline of the library is taken apart into the same arrays.
    if vocabulary.model != "llama" {
        let (again, notes) = saved.to_gguf(vocabulary.tokens.len()).unwrap();
        assert_eq!((&again.tokens, notes.len()), (&vocabulary.tokens, 0));
        let built = Tokenizer::from_gguf(&again).unwrap();
        assert_eq!(
            built.encode(text, true).unwrap(),
            marked,
            "{name}: again, {text:?}"
        );
    }
    assert_eq!(
        saved.encode(text, true).unwrap(),
        marked,
        "{name}: saved, {text:?}"
    );
}

#[test]
fn ids_follow_from_the_vocabulary() {
    // Of equal scores the left pair merges first, and a space comes before a text and after a mark.
    check(&letters(), "aba", &[1, 259, 262, 260], &[1, 259, 262, 260]);
    check(
        &letters(),
        "a<x>a",
        &[1, 264, 265, 264],
        &[1, 264, 265, 264],
    );
    let bytes_of = |text: &str| {
        text.bytes()
            .map(|byte| u32::from(byte) + 3)
            .collect::<Vec<_>>()
    };
    let unmarked = [vec![1, 264], bytes_of("</s>")].concat();
    check(&letters(), "a</s>", &[1, 264, 2], &unmarked);
    check(
        &letters(),
        "中",
        &[vec![1, 259], bytes_of("中")].concat(),
        &[vec![1, 259], bytes_of("中")].concat(),
    );
    check(&bytes(), "ab a<two words>b", &[3, 4, 6, 1], &[3, 4, 6, 1]);
    check(&bytes(), "a<|im_end|>", &[0, 5], &[0, 7, 8, 8]);
    check(
        &unigram(),
        "  A   b  ab ",
        &[4, 3, 5, 6, 1],
        &[4, 3, 5, 6, 1],
    );
    check(
        &word_pieces(),
        "Hello, WÖRLD! 中中 xyz",
        &[2, 4, 7, 5, 6, 8, 9, 9, 1, 3],
        &[2, 4, 7, 5, 6, 8, 9, 9, 1, 3],
    );
}

#[test]
fn ends_are_those_of_the_file_and_of_convention() {
    let mut vocabulary = bytes();
    vocabulary
        .tokens
        .extend(strings(&["<|return|>", "<|call|>", "<|end|>", "</s>"]));
    vocabulary.token_types.extend([TokenType::Control; 4]);
    vocabulary.eos = Some(12);
    vocabulary.padding = Some(99);
    let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap();
    assert_eq!(tokenizer.eos(), [12, 5, 9, 10]);
    assert_eq!((tokenizer.bos(), tokenizer.pad()), (None, None));
    assert!(tokenizer.notes()[0].contains("padding_token_id is 99"));
}

#[test]
fn bytes_stream_as_whole_characters() {
    let tokenizer = Tokenizer::from_gguf(&letters()).unwrap();
    let text = "ab 🙂中 ba";
    let ids = tokenizer.encode(text, true).unwrap();
    let mut stream = tokenizer.stream(true);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    pieces.push(stream.finish().unwrap());
    assert_eq!(pieces.concat(), text);
    assert!(
        pieces.iter().all(|piece| !piece.contains('\u{fffd}')),
        "{pieces:?}"
    );
}

/// A change to a sound vocabulary, and what the message must say.
type Damage = (
    fn() -> GgufVocabulary,
    fn(&mut GgufVocabulary),
    &'static str,
);

#[test]
fn contradictions_are_refused_by_name() {
    let cases: &[Damage] = &[
        (letters, |v| v.tokens.clear(), "tokens is empty"),
        (letters, |v| v.scores.truncate(5), "scores has 5 entries"),
        (letters, |v| v.scores.clear(), "scores is missing"),
        (letters, |v| v.scores[7] = f32::NAN, "scores[7] is NaN"),
        (
            letters,
            |v| v.token_types.truncate(1),
            "token_type has 1 entries",
        ),
        (
            letters,
            |v| v.tokens[9] = "a".into(),
            "\"a\" twice, as 9 and as 260",
        ),
        (
            letters,
            |v| (v.tokens[9], v.token_types[0]) = ("q".into(), TokenType::Normal),
            "byte tokens",
        ),
        (
            letters,
            |v| v.model = "plamo2".into(),
            "\"plamo2\", which is not supported",
        ),
        (
            bytes,
            |v| v.pre = Some("gpt-9".into()),
            "\"gpt-9\", which is not known",
        ),
        (bytes, |v| v.merges.clear(), "merges is missing"),
        (
            bytes,
            |v| v.merges[1] = "ab".into(),
            "merges[1], \"ab\", is no pair",
        ),
        (bytes, |v| v.merges[0] = "b a".into(), "no token"),
        (bytes, |v| v.add_bos = Some(true), "no bos_token_id"),
        (unigram, |v| v.scores.clear(), "scores is missing"),
        (
            unigram,
            |v| v.scores[4] = f32::INFINITY,
            "scores[4] is infinite",
        ),
        (unigram, |v| v.precompiled_charsmap.truncate(3), "too short"),
        (
            unigram,
            |v| v.precompiled_charsmap.truncate(1000),
            "wrong length",
        ),
        (
            unigram,
            |v| v.precompiled_charsmap[6] = 0xFF,
            "outside itself",
        ),
        (
            unigram,
            |v| v.precompiled_charsmap[4 + 2048] = 9,
            "replacement outside",
        ),
        (
            word_pieces,
            |v| v.unknown = Some(1000),
            "unknown_token_id is missing",
        ),
    ];
    for (sound, damage, expected) in cases {
        let mut vocabulary = sound();
        assert!(Tokenizer::from_gguf(&vocabulary).is_ok());
        damage(&mut vocabulary);
        let error = Tokenizer::from_gguf(&vocabulary).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}: {expected}");
        assert!(error.hint().is_some(), "{error}");
    }
}

/// Small numbers that look random, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

/// A SentencePiece model with the pieces of a vocabulary, each a message of text, score and type, and its settings.
fn sentencepiece_model(vocabulary: &GgufVocabulary) -> Vec<u8> {
    let field = |number: u8, content: &[u8]| {
        let length = [content.len() as u8 | 0x80, (content.len() >> 7) as u8];
        [&[number << 3 | 2], &length[..], content].concat()
    };
    let mut model = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let mut piece = field(1, token.as_bytes());
        piece.push(2 << 3 | 5);
        piece.extend(vocabulary.scores[id].to_le_bytes());
        piece.extend([3 << 3, vocabulary.token_types[id] as u8]);
        model.extend(field(1, &piece));
    }
    let unigram = u8::from(vocabulary.model == "t5");
    let unknown = vocabulary.token_types.iter();
    let unknown = unknown.take_while(|kind| **kind != TokenType::Unknown);
    model.extend(field(
        2,
        &[3 << 3, 2 - unigram, 0xC0, 2, unknown.count() as u8],
    ));
    let table = field(2, &vocabulary.precompiled_charsmap);
    model.extend(field(3, &[&table[..], &[4 << 3, unigram]].concat()));
    model
}

/// A file with other bits, without its end, with a run of its bytes elsewhere, or with a length that is no number.
fn damaged(sound: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut file = sound.to_vec();
    for _ in 0..=numbers.next(3) {
        let at = numbers.next(file.len());
        match numbers.next(8) {
            0 => file.truncate(at + 1),
            1 => drop(file.splice(at..=at, [0xFF; 9])),
            2 => drop(file.splice(at..=at, [0xFF; 10])),
            3 => {
                let end = file.len().min(at + 1 + numbers.next(40));
                let (run, to) = (file[at..end].to_vec(), numbers.next(file.len()));
                drop(file.splice(to..to, run));
            }
            _ => file[at] ^= 1 << numbers.next(8),
        }
    }
    file
}

#[test]
fn damaged_bytes_are_refused_or_harmless() {
    let mut numbers = Numbers(7);
    let texts = ["aab A  ba", "中 <x>\u{2581}", "[CLS] wor\u{301}ld"];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let sound = [letters(), unigram()].map(|vocabulary| sentencepiece_model(&vocabulary));
    for (sound, text, ids) in [
        (&sound[0], "aba", &[1, 259, 262, 260][..]),
        (&sound[1], "A  b", &[1, 4, 3, 5]),
    ] {
        std::fs::write(&path, sound).unwrap();
        let read = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(read.encode(text, true).unwrap(), ids);
    }
    let (mut built, mut refused) = (0, 0);
    for _ in 0..800 {
        let model = |index: usize, numbers: &mut Numbers| {
            let bytes = damaged(&sound[index], numbers);
            let vocabulary = GgufVocabulary::from_sentencepiece(&path, &bytes)?;
            Tokenizer::from_gguf(&vocabulary)
        };
        let mut unigram = unigram();
        let at = numbers.next(unigram.precompiled_charsmap.len());
        unigram.precompiled_charsmap[at] ^= 1 << numbers.next(8);
        for tokenizer in [
            model(0, &mut numbers),
            model(1, &mut numbers),
            Tokenizer::from_gguf(&unigram),
        ] {
            let tokenizer = match tokenizer {
                Ok(tokenizer) => tokenizer,
                Err(error) => {
                    refused += 1;
                    assert!(error.hint().is_some(), "{error}");
                    continue;
                }
            };
            built += 1;
            for text in texts {
                let ids = tokenizer.encode(text, true).unwrap();
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
                tokenizer.decode(&ids, false).unwrap();
            }
        }
    }
    let told = format!("{built} of the damaged ones could be built, {refused} not");
    assert!(built > 200 && refused > 200, "{told}");
}
