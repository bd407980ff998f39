//! Byte-level BPE: which name of `tokenizer.ggml.pre` stands for a tokenizer's word patterns.

use serde_json::Value;

use super::super::{TokenizerError, pre};
use super::{Draft, cannot};

/// The steps of a sequence, or the one step.
pub(super) fn steps(value: &Value, list: &str) -> Vec<Value> {
    match (&value["type"], &value[list]) {
        (Value::Null, _) => Vec::new(),
        (Value::String(kind), Value::Array(steps)) if kind == "Sequence" => steps.clone(),
        _ => vec![value.clone()],
    }
}

/// Completes a draft of byte-level BPE: merges and the name of the patterns.
pub(super) fn byte_level(definition: &Value, draft: &mut Draft) -> Result<(), TokenizerError> {
    let model = &definition["model"];
    for suffix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[suffix].as_str().is_some_and(|text| !text.is_empty()) {
            return Err(cannot(format!("its model has a {suffix}")));
        }
    }
    let patterns = patterns(&definition["pre_tokenizer"])?;
    let composes = composes(&definition["normalizer"])?;
    let ignore_merges = model["ignore_merges"] == true;
    let fits = |row: &&pre::Pre| {
        let own = row.patterns.iter().map(|pattern| plain(pattern));
        own.eq(patterns.iter().map(|pattern| plain(pattern))) && row.ignore_merges == ignore_merges
    };
    let rows: Vec<_> = pre::TABLE.iter().filter(fits).collect();
    let exact = rows.iter().find(|row| row.composes == composes);
    let Some(row) = exact.or(rows.first()) else {
        return Err(cannot(format!(
            "no name of tokenizer.ggml.pre stands for its word patterns (ignore_merges {ignore_merges}): {}",
            patterns.join(" then ")
        )));
    };
    if exact.is_none() {
        let change = if composes {
            "is not composed"
        } else {
            "is composed"
        };
        draft.notes.push(format!(
            "text {change} (NFC) by tokenizer.ggml.pre {:?}, other than by the tokenizer: \
             decomposed letters get other tokens",
            row.names[0]
        ));
    }
    draft.vocabulary.model = "gpt2".into();
    draft.vocabulary.pre = Some(row.names[0].into());
    draft.vocabulary.merges = merges(model)
        .map(|merge| merge.map(|(left, right)| format!("{left} {right}")))
        .collect::<Result<_, _>>()?;
    Ok(())
}

/// The merges of a BPE model: pairs, or pairs joined by a space.
pub(super) fn merges(model: &Value) -> impl Iterator<Item = Result<(&str, &str), TokenizerError>> {
    let merges = model["merges"].as_array().into_iter().flatten();
    merges.map(|merge| {
        let pair = match merge {
            Value::String(joined) => joined.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => {
                    Some((left.as_str(), right.as_str()))
                }
                _ => None,
            },
            _ => None,
        };
        let pair = pair.filter(|(left, right)| !left.contains(' ') && !right.contains(' '));
        pair.ok_or_else(|| {
            cannot(format!(
                "its merge {merge} is no pair of tokens without spaces"
            ))
        })
    })
}

/// The patterns that cut a text into words, one after another.
fn patterns(pre_tokenizer: &Value) -> Result<Vec<String>, TokenizerError> {
    let mut patterns = Vec::new();
    for step in steps(pre_tokenizer, "pretokenizers") {
        let pattern = match step["type"].as_str() {
            Some("ByteLevel") if step["add_prefix_space"] == true => {
                return Err(cannot("its ByteLevel puts a space before a text"));
            }
            Some("ByteLevel") if step["use_regex"] == false => continue,
            Some("ByteLevel") => pre::GPT2,
            Some("Digits") if step["individual_digits"] == true => pre::DIGIT,
            Some("Digits") => r"\p{N}+",
            Some("Punctuation") if step["behavior"] == "Contiguous" => pre::PUNCTUATION,
            Some("Split") => {
                let keeps_all = match step["behavior"].as_str() {
                    Some("Isolated") => step["invert"] != true,
                    Some("Removed") => step["invert"] == true,
                    _ => false,
                };
                let pattern = step["pattern"]["Regex"].as_str();
                pattern
                    .filter(|_| keeps_all)
                    .ok_or_else(|| cannot(format!("its pre-tokenizer splits by {step}")))?
            }
            _ => return Err(cannot(format!("its pre-tokenizer has the step {step}"))),
        };
        patterns.push(pattern.to_owned());
    }
    Ok(patterns)
}

/// Whether the normalizer composes letters (NFC), which is all that it may do.
fn composes(normalizer: &Value) -> Result<bool, TokenizerError> {
    let steps = steps(normalizer, "normalizers");
    match steps.iter().find(|step| step["type"] != "NFC") {
        Some(step) => Err(cannot(format!("its normalizer has the step {step}"))),
        None => Ok(!steps.is_empty()),
    }
}

/// A pattern with its escaped characters written out, so that two spellings of one pattern are equal.
fn plain(pattern: &str) -> String {
    let mut text = String::new();
    let mut rest = pattern;
    while let Some(at) = rest.find(r"\u") {
        let tail = &rest[at + 2..];
        let (digits, length) = match tail.strip_prefix('{').and_then(|tail| tail.split_once('}')) {
            Some((digits, _)) => (digits, digits.len() + 2),
            None => (tail.get(..4).unwrap_or(""), 4),
        };
        let code = u32::from_str_radix(digits, 16)
            .ok()
            .and_then(char::from_u32);
        match code {
            Some(c) => {
                text += &rest[..at];
                text.push(c);
                rest = &tail[length..];
            }
            None => {
                text += &rest[..at + 2];
                rest = tail;
            }
        }
    }
    text + rest
}
