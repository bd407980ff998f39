//! SentencePiece-like models: BPE with byte fallback as scores, Unigram, and WordPiece.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::super::{TokenType, TokenizerError};
use super::words::{merges, steps};
use super::{Draft, SPACE, cannot};

/// Completes a draft of BPE with byte fallback: the order of the merges becomes scores.
pub(super) fn sentencepiece(definition: &Value, draft: &mut Draft) -> Result<(), TokenizerError> {
    let model = &definition["model"];
    let prefix = space_prefix(definition, draft)?;
    let vocabulary = &mut draft.vocabulary;
    vocabulary.model = "llama".into();
    vocabulary.pre = Some("default".into());
    vocabulary.add_space_prefix = Some(prefix);
    let unknown = model["unk_token"].as_str();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let kind = &mut vocabulary.token_types[id];
        if Some(token.as_str()) == unknown {
            *kind = TokenType::Unknown;
            vocabulary.unknown = Some(id as u32);
        } else if *kind == TokenType::Normal && is_byte(token) {
            *kind = TokenType::Byte;
        }
    }
    let ranks = ranks(model)?;
    check_merges(draft, model, &ranks)?;
    let vocabulary = &mut draft.vocabulary;
    let scored = vocabulary.tokens.iter().zip(&vocabulary.token_types);
    vocabulary.scores = scored
        .map(|(token, kind)| match (ranks.get(token.as_str()), kind) {
            (Some(&rank), _) => -(rank as f32),
            // Single characters are never made by a merge: their scores decide nothing.
            (None, TokenType::Normal) => -(ranks.len() as f32),
            (None, TokenType::Byte) => 0.0,
            (None, _) => -1000.0,
        })
        .collect();
    Ok(())
}

fn is_byte(token: &str) -> bool {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The tokens that merges make, numbered in the order of the merges.
fn ranks(model: &Value) -> Result<HashMap<String, usize>, TokenizerError> {
    let mut ranks = HashMap::new();
    for merge in merges(model) {
        let (left, right) = merge?;
        let next = ranks.len();
        ranks.entry([left, right].concat()).or_insert(next);
    }
    Ok(ranks)
}

/// Checks that merges say what scores say: all ways to make a token, one token after another.
fn check_merges(
    draft: &Draft,
    model: &Value,
    ranks: &HashMap<String, usize>,
) -> Result<(), TokenizerError> {
    let mut pairs = HashSet::new();
    let mut last = 0;
    for merge in merges(model) {
        let (left, right) = merge?;
        let rank = ranks[&[left, right].concat()];
        if rank < last {
            let why = "scores cannot say their order";
            return Err(cannot(format!(
                "its merge of {left:?} and {right:?} comes late: {why}"
            )));
        }
        last = rank;
        pairs.insert((left, right));
    }
    let vocabulary = &draft.vocabulary;
    let tokens = vocabulary.tokens.iter().zip(&vocabulary.token_types);
    let normal: HashSet<&str> = tokens
        .filter(|(_, kind)| **kind == TokenType::Normal)
        .map(|(token, _)| token.as_str())
        .collect();
    for token in &normal {
        for (at, _) in token.char_indices().skip(1) {
            let pair = token.split_at(at);
            if normal.contains(pair.0) && normal.contains(pair.1) && !pairs.contains(&pair) {
                let why = "scores would merge the two";
                return Err(cannot(format!(
                    "it has no merge of {:?} and {:?}: {why}",
                    pair.0, pair.1
                )));
            }
        }
    }
    Ok(())
}

/// Whether a text begins with a space; normalizer and pre-tokenizer may do nothing but mark spaces.
fn space_prefix(definition: &Value, draft: &mut Draft) -> Result<bool, TokenizerError> {
    let mut prefix = false;
    let normalizers = steps(&definition["normalizer"], "normalizers");
    let words = steps(&definition["pre_tokenizer"], "pretokenizers");
    for step in normalizers.iter().chain(&words) {
        match step["type"].as_str() {
            Some("Prepend") if step["prepend"] == SPACE => prefix = true,
            Some("Replace") if step["pattern"]["String"] == " " && step["content"] == SPACE => {}
            // There are no spaces any more where it looks for them.
            Some("Split") if step["pattern"]["String"] == " " && words.len() == 1 => {}
            Some("Metaspace") => prefix = metaspace(step, draft)?,
            _ => return Err(cannot(format!("it has the step {step}"))),
        }
    }
    Ok(prefix)
}

fn metaspace(step: &Value, draft: &mut Draft) -> Result<bool, TokenizerError> {
    let spans = |token: &String| token.chars().skip(1).any(|c| SPACE.contains(c));
    if step["split"] != false && draft.vocabulary.tokens.iter().any(spans) {
        return Err(cannot(
            "its Metaspace cuts at spaces where tokens span them",
        ));
    }
    let scheme = match (&step["prepend_scheme"], &step["add_prefix_space"]) {
        (Value::String(scheme), _) => scheme.as_str(),
        (_, Value::Bool(false)) => "never",
        _ => "always",
    };
    if scheme == "first" {
        draft.notes.push(
            "a space comes before the text after each special token, where the tokenizer puts one \
             only before the first text (prepend_scheme first): GGUF has no place for that"
                .into(),
        );
    }
    Ok(scheme != "never")
}

/// Completes a draft of Unigram.
pub(super) fn unigram(definition: &Value, draft: &mut Draft) -> Result<(), TokenizerError> {
    let model = &definition["model"];
    let vocabulary = &mut draft.vocabulary;
    vocabulary.model = "t5".into();
    vocabulary.pre = Some("default".into());
    let pieces = model["vocab"].as_array().map_or(&[][..], Vec::as_slice);
    vocabulary.scores = (0..vocabulary.tokens.len())
        .map(|id| {
            pieces
                .get(id)
                .and_then(|piece| piece[1].as_f64())
                .unwrap_or(-1000.0) as f32
        })
        .collect();
    let unknown = model["unk_id"].as_u64().map(|id| id as u32);
    let Some(unknown) = unknown.filter(|&id| (id as usize) < vocabulary.tokens.len()) else {
        return Err(cannot("its model has no unk_id"));
    };
    vocabulary.unknown = Some(unknown);
    vocabulary.token_types[unknown as usize] = TokenType::Unknown;
    if model["byte_fallback"] == true {
        for (token, kind) in vocabulary.tokens.iter().zip(&mut vocabulary.token_types) {
            if *kind == TokenType::Normal && is_byte(token) {
                *kind = TokenType::Byte;
            }
        }
    }
    let (mut prefix, mut several) = (false, true);
    let normalizers = steps(&definition["normalizer"], "normalizers");
    let words = steps(&definition["pre_tokenizer"], "pretokenizers");
    for step in normalizers.iter().chain(&words) {
        match step["type"].as_str() {
            Some("Precompiled") => {
                let table = step["precompiled_charsmap"].as_str().and_then(from_base64);
                draft.vocabulary.precompiled_charsmap =
                    table.ok_or_else(|| cannot("its precompiled_charsmap is no base64"))?;
            }
            Some("Prepend") if step["prepend"] == SPACE => prefix = true,
            Some("Strip" | "WhitespaceSplit") => several = false,
            Some("Replace") if step["pattern"]["Regex"] == " {2,}" => several = false,
            Some("Metaspace") => prefix |= step_prefix(step),
            _ => return Err(cannot(format!("it has the step {step}"))),
        }
    }
    draft.vocabulary.add_space_prefix = Some(prefix);
    draft.vocabulary.remove_extra_whitespaces = Some(!several);
    Ok(())
}

/// Whether a Metaspace step puts a space before a text.
fn step_prefix(step: &Value) -> bool {
    match (&step["prepend_scheme"], &step["add_prefix_space"]) {
        (Value::String(scheme), _) => scheme != "never",
        (_, Value::Bool(prefix)) => *prefix,
        _ => true,
    }
}

/// Completes a draft of WordPiece: the mark moves from inside words to their beginnings.
pub(super) fn word_piece(definition: &Value, draft: &mut Draft) -> Result<(), TokenizerError> {
    let (model, normalizer) = (&definition["model"], &definition["normalizer"]);
    if model["continuing_subword_prefix"] != "##" {
        return Err(cannot(
            "the continuing_subword_prefix of its model is not ##",
        ));
    }
    let cleans = normalizer["clean_text"] == true && normalizer["handle_chinese_chars"] == true;
    if normalizer["type"] != "BertNormalizer" || !cleans {
        return Err(cannot(
            "its normalizer is not BERT's with clean_text and handle_chinese_chars",
        ));
    }
    if definition["pre_tokenizer"]["type"] != "BertPreTokenizer" {
        return Err(cannot("its pre-tokenizer is not BERT's"));
    }
    let vocabulary = &mut draft.vocabulary;
    vocabulary.model = "bert".into();
    vocabulary.pre = Some("default".into());
    let lowercase = normalizer["lowercase"].as_bool().unwrap_or(true);
    vocabulary.lowercase = Some(lowercase);
    vocabulary.strip_accents = normalizer["strip_accents"].as_bool().or(Some(lowercase));
    let unknown = model["unk_token"].as_str().unwrap_or("[UNK]");
    let tokens = vocabulary.tokens.iter_mut().zip(&vocabulary.token_types);
    for (id, (token, kind)) in tokens.enumerate() {
        if token == unknown {
            vocabulary.unknown = Some(id as u32);
        } else if *kind == TokenType::Normal {
            *token = match token.strip_prefix("##") {
                Some(inside) => inside.to_owned(),
                None => format!("{SPACE}{token}"),
            };
        }
    }
    Ok(())
}

/// The bytes of base64 text, with or without padding.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0_u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    Some(bytes)
}
