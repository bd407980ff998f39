//! llama2.c files against the same model as a Hugging Face folder, and against the scores' own encoder.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use windlass_store::atomic::RealDisk;
use windlass_store::llama2c::{Model, Tokenizer, convert};
use windlass_store::safetensors::Tensors;

fn data() -> Option<PathBuf> {
    let data = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from);
    if data.is_none() {
        println!("skipped: set WINDLASS_TEST_DATA");
    }
    data
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn both_versions_convert_to_the_known_hugging_face_folder() {
    let Some(data) = data() else { return };
    let stories = data.join("models/stories260K");
    let expected = Tensors::open(&stories.join("hf")).unwrap();
    for name in ["stories260K.bin", "stories260K_v1.bin"] {
        let folder = tempfile::tempdir().unwrap();
        convert(
            &RealDisk,
            &stories.join(name),
            &stories.join("tok512.bin"),
            folder.path(),
        )
        .unwrap();
        let ours = Tensors::open(folder.path()).unwrap();
        assert!(ours.names().eq(expected.names()), "{name}");
        for tensor in expected.names() {
            let (a, b) = (ours.get(tensor).unwrap(), expected.get(tensor).unwrap());
            assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}: {tensor}");
            assert!(a.bytes == b.bytes, "{name}: {tensor} differs");
        }
        let known = json(&stories.join("hf/config.json"));
        for (key, value) in json(&folder.path().join("config.json"))
            .as_object()
            .unwrap()
        {
            assert_eq!(value, &known[key], "{key}");
        }
        tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    }
}

#[test]
fn damaged_weights_are_refused_in_words() {
    /// A version 0 file of two layers with its own output layer.
    fn sound() -> Vec<u8> {
        let header = [8i32, 12, 2, 2, 1, -5, 4];
        let floats = 5 * 8 + 2 * (8 + 64 + 32 + 32 + 64 + 8 + 3 * 96) + 8 + 2 * 4 * 2 + 5 * 8;
        let mut bytes: Vec<u8> = header.iter().flat_map(|v| v.to_le_bytes()).collect();
        bytes.extend((0..floats).flat_map(|i| (i as f32).to_le_bytes()));
        bytes
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bin");
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Model::open(&path)
    };
    let model = open(&sound()).unwrap();
    assert!(!model.config().tie_word_embeddings && model.config().vocab_size == 5);
    let last = model.specs().len() - 1;
    assert_eq!(model.specs()[last].name, "lm_head.weight");
    assert_eq!(
        model.read(last).last(),
        Some(&((sound().len() - 28) as f32 / 4.0 - 1.0))
    );
    // The first head of the first query weight: rows 0 1 2 3 (pairs) become 0 2 1 3 (halves).
    let q = model
        .specs()
        .iter()
        .position(|s| s.name == "model.layers.0.self_attn.q_proj.weight")
        .unwrap();
    let first: Vec<f32> = model.read(q).chunks(8).take(4).map(|row| row[0]).collect();
    assert_eq!(
        first
            .iter()
            .map(|v| (v - first[0]) / 8.0)
            .collect::<Vec<_>>(),
        [0.0, 2.0, 1.0, 3.0]
    );

    let check = |change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut bytes = sound();
        change(&mut bytes);
        let error = open(&bytes).map(drop).expect_err(expected);
        assert!(
            error.to_string().contains(expected),
            "'{error}' does not say '{expected}'"
        );
        assert!(error.hint().is_some());
    };
    let set = |i: usize, value: i32| {
        move |b: &mut Vec<u8>| b[i * 4..i * 4 + 4].copy_from_slice(&value.to_le_bytes())
    };
    check(&|b| b.clear(), "0 bytes are too few");
    check(&|b| b.truncate(27), "27 bytes are too few");
    check(&|b| b.truncate(400), "400 bytes, but its header asks for");
    check(&|b| b.push(0), "cut short, or no llama2.c model");
    check(&set(0, 0), "dim is 0");
    check(&set(2, -1), "n_layers is -1");
    check(&set(3, 3), "do not fit together");
    check(&set(4, 3), "do not fit together");
    check(&set(5, i32::MIN), "its header asks for");
    check(
        &|b| [0, 1, 2, 5, 6].iter().for_each(|&i| set(i, 0x7fff_fff0)(b)),
        "more than fits an address",
    );
    check(
        &|b| {
            set(0, 0x616b_3432)(b);
            set(1, 2)(b)
        },
        "export version 2",
    );
}

/// The encoder of `run.c`: characters or bytes, then always the adjacent pair whose union scores best, leftmost first.
fn encode_by_score(pieces: &HashMap<String, (u32, f32)>, text: &str) -> Vec<u32> {
    let mut parts: Vec<String> = Vec::new();
    for c in format!(" {text}").replace(' ', "\u{2581}").chars() {
        match pieces.contains_key(c.to_string().as_str()) {
            true => parts.push(c.to_string()),
            false => parts.extend(c.to_string().bytes().map(|b| format!("<0x{b:02X}>"))),
        }
    }
    loop {
        let mut best: Option<(f32, usize)> = None;
        for i in 1..parts.len() {
            let union = format!("{}{}", parts[i - 1], parts[i]);
            if let Some((_, score)) = pieces.get(&union)
                && best.is_none_or(|(b, _)| *score > b)
            {
                best = Some((*score, i));
            }
        }
        let Some((_, i)) = best else { break };
        let right = parts.remove(i);
        parts[i - 1].push_str(&right);
    }
    parts.iter().map(|part| pieces[part].0).collect()
}

/// The pieces of a `tokenizer.bin`, parsed here again.
fn scores(path: &Path) -> HashMap<String, (u32, f32)> {
    let bytes = fs::read(path).unwrap();
    let (mut at, mut pieces) = (4, HashMap::new());
    while at < bytes.len() {
        let score = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap()) as usize;
        let piece = std::str::from_utf8(&bytes[at + 8..at + 8 + length])
            .unwrap()
            .replace(' ', "\u{2581}");
        pieces.insert(piece, (pieces.len() as u32, score));
        at += 8 + length;
    }
    pieces
}

fn load(tokenizer: &Tokenizer) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_bytes(tokenizer.to_json().to_string()).unwrap()
}

#[test]
fn the_converted_vocabulary_encodes_and_decodes_as_known() {
    let Some(data) = data() else { return };
    let bin = data.join("models/stories260K/tok512.bin");
    let tokenizer = load(&Tokenizer::open(&bin).unwrap());
    let ids_of = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();

    let golden = json(&data.join("models/stories260K/golden_greedy_200.json"));
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let text = golden["text"].as_str().unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    assert_eq!(ids_of(text), ids);

    let pieces = scores(&bin);
    let texts: Vec<String> =
        serde_json::from_value(json(&data.join("models/bitllama2/nll_texts.json"))).unwrap();
    let known = json(&data.join("models/bitllama2/golden_nll_tinystories_val12.json"));
    let mut predicted = 0;
    for text in &texts {
        let ids = ids_of(text);
        assert_eq!(ids[1..], encode_by_score(&pieces, text), "{text}");
        assert_eq!(&tokenizer.decode(&ids, true).unwrap(), text);
        // The known answer was computed on the first 256 tokens of each text.
        predicted += ids.len().min(256) - 1;
    }
    assert_eq!(Value::from(predicted), known["stories260K"]["tokens"]);

    let mut runner = proptest::test_runner::TestRunner::default();
    let alphabet =
        "[ a-zA-Z.,\"'\n\t\u{e9}\u{4e2d}\u{1f600}]{1,60}|( ?(the|and|aaa|Lily|was|She)){1,12}";
    runner
        .run(&alphabet, |text: String| {
            let ids = ids_of(&text);
            prop_assert_eq!(&ids[1..], &encode_by_score(&pieces, &text)[..]);
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
            Ok(())
        })
        .unwrap();
}

/// The vocabulary of Llama 2, whose `tokenizer.json` was made by others from the same SentencePiece model.
#[test]
fn the_llama_2_vocabulary_converts_to_its_published_tokenizer() {
    let Some(data) = data() else { return };
    let folder = data.join("tokenizers/llama2");
    let ours = Tokenizer::open(&folder.join("tokenizer.bin")).unwrap();
    let published = json(&folder.join("tokenizer.json"));
    assert_eq!(
        ours.to_json()["model"]["vocab"],
        published["model"]["vocab"]
    );
    let (ours, theirs) = (
        load(&ours),
        tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap(),
    );
    let corpus = fs::read_dir(data.join("corpora"))
        .unwrap()
        .flat_map(|e| fs::read_dir(e.unwrap().path()).unwrap());
    let mut lines = 0;
    for file in corpus.map(|e| e.unwrap().path()).filter(|p| p.is_file()) {
        let text = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
        for line in text.lines().filter(|l| l.len() > 20).take(200) {
            let (a, b) = (
                ours.encode(line, true).unwrap(),
                theirs.encode(line, true).unwrap(),
            );
            assert_eq!(a.get_ids(), b.get_ids(), "{}: {line}", file.display());
            lines += 1;
        }
    }
    assert!(lines > 500, "{lines} lines");
}

#[test]
fn damaged_vocabularies_are_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.bin");
    let sound: Vec<String> = ["<unk>", "\n<s>\n", "\n</s>\n"]
        .map(str::to_owned)
        .into_iter()
        .chain((0..=255).map(|b| format!("<0x{b:02X}>")))
        .chain([" a", "b"].map(str::to_owned))
        .collect();
    let encode = |pieces: &[String]| {
        let mut bytes = 7i32.to_le_bytes().to_vec();
        for piece in pieces {
            bytes.extend(0f32.to_le_bytes());
            bytes.extend((piece.len() as i32).to_le_bytes());
            bytes.extend(piece.as_bytes());
        }
        bytes
    };
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Tokenizer::open(&path)
    };
    assert_eq!(open(&encode(&sound)).unwrap().len(), 261);
    let check = |bytes: &[u8], expected: &str| {
        let error = open(bytes).map(drop).expect_err(expected);
        assert!(
            error.to_string().contains(expected),
            "'{error}' does not say '{expected}'"
        );
    };
    let bytes = encode(&sound);
    check(b"", "it is empty");
    check(&bytes[..bytes.len() - 1], "token 260");
    check(&bytes[..bytes.len() - 4], "cut short in token 260");
    let mut negative = bytes.clone();
    negative[8..12].copy_from_slice(&(-1i32).to_le_bytes());
    check(&negative, "claims 4294967295 bytes");
    let mut binary = bytes.clone();
    *binary.last_mut().unwrap() = 0xff;
    check(&binary, "invalid utf-8");
    check(
        &encode(&[&sound[..], &["b".to_owned()]].concat()),
        "tokens 260 and 261 are both 'b'",
    );
    check(&encode(&sound[..100]), "no token <0x61>");
}
