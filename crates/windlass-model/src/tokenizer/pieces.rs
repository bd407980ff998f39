//! Where a long text can be cut so that its pieces have the same tokens as the whole.

use std::collections::BTreeSet;

use serde_json::Value;

/// The last place in `text` where it can be cut for a [splittable](super::Tokenizer::splittable) tokenizer.
///
/// Either between a letter or digit and the space or line break after it, or between a letter and the single line
/// break before it. There, the word patterns of byte-level tokenizers always begin a new word.
pub fn split_point(text: &str) -> Option<usize> {
    let mut chars = text.char_indices().rev();
    let (mut at, mut after) = chars.next()?;
    let (mut middle_at, mut middle) = chars.next()?;
    if middle.is_alphanumeric() && matches!(after, ' ' | '\n') {
        return Some(at);
    }
    for (index, before) in chars {
        if middle == '\n' && after.is_alphabetic() && !before.is_whitespace() {
            return Some(at);
        }
        if before.is_alphanumeric() && matches!(middle, ' ' | '\n') {
            return Some(middle_at);
        }
        (at, after) = (middle_at, middle);
        (middle_at, middle) = (index, before);
    }
    None
}

/// Whether words of the tokenizer never cross a [`split_point`].
pub(super) fn is_splittable(definition: &Value) -> bool {
    let steps = |value: &Value, list: &str| -> Vec<Value> {
        match (&value["type"], &value[list]) {
            (Value::Null, _) => Vec::new(),
            (Value::String(kind), Value::Array(steps)) if kind == "Sequence" => steps.clone(),
            _ => vec![value.clone()],
        }
    };
    let normalizers = steps(&definition["normalizer"], "normalizers");
    let harmless = normalizers.iter().all(|step| step["type"] == "NFC");
    let words = steps(&definition["pre_tokenizer"], "pretokenizers");
    let kinds: BTreeSet<_> = words
        .iter()
        .filter_map(|step| step["type"].as_str())
        .collect();
    let known = kinds
        .iter()
        .all(|kind| ["ByteLevel", "Split", "Digits"].contains(kind));
    let separates = words.iter().any(|step| {
        let pattern = step["pattern"]["Regex"].as_str();
        (step["type"] == "ByteLevel" && step["use_regex"] != false)
            || pattern.is_some_and(|pattern| pattern.contains("\\p{L}"))
    });
    let spaced = words.iter().any(|step| {
        let pattern = step["pattern"]["Regex"].as_str();
        pattern.is_some_and(|pattern| pattern.contains("(?: "))
    });
    let prefixed = words.iter().any(|step| step["add_prefix_space"] == true);
    let added = definition["added_tokens"].as_array();
    let greedy = added.into_iter().flatten().any(|token| {
        let content = token["content"].as_str().unwrap_or_default();
        token["lstrip"] == true || token["rstrip"] == true || content.contains([' ', '\n'])
    });
    harmless && known && separates && !spaced && !prefixed && !greedy && kinds.contains("ByteLevel")
}
