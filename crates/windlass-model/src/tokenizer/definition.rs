//! The files of a Hugging Face tokenizer, made for a vocabulary that came without them.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::spm::SPACE;
use super::{COMPANIONS, Origin, TOKENIZER_FILE, TokenType, Tokenizer, pretty};

/// `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.
pub(super) fn files(tokenizer: &Tokenizer) -> Vec<(String, Vec<u8>)> {
    let definition = serde_json::to_value(&tokenizer.inner);
    let mut definition = definition.expect("a pipeline that was built can be written");
    let Some(origin) = tokenizer.origin.as_deref() else {
        return vec![(TOKENIZER_FILE.into(), pretty(&definition))];
    };
    if origin.spm.is_some() {
        add_merges(origin, &mut definition);
    }
    definition["post_processor"] = template(tokenizer, origin);
    let vocabulary = &origin.vocabulary;
    let token = |id: Option<u32>| id.map(|id| vocabulary.tokens[id as usize].as_str());
    let mut special = serde_json::Map::new();
    for (name, id) in [
        ("bos_token", vocabulary.bos),
        ("eos_token", vocabulary.eos),
        ("unk_token", vocabulary.unknown),
        ("sep_token", vocabulary.separator),
        ("pad_token", vocabulary.padding),
        ("mask_token", vocabulary.mask),
    ] {
        if let Some(token) = token(id) {
            special.insert(name.into(), token.into());
        }
    }
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "add_bos_token": !origin.around.0.is_empty(),
        "add_eos_token": !origin.around.1.is_empty(),
    });
    for (name, token) in &special {
        config[name] = token.clone();
    }
    if let Some(template) = &vocabulary.chat_template {
        config["chat_template"] = template.as_str().into();
    }
    vec![
        (TOKENIZER_FILE.into(), pretty(&definition)),
        (COMPANIONS[0].into(), pretty(&config)),
        (COMPANIONS[1].into(), pretty(&Value::Object(special))),
    ]
}

/// The tokens around a text as the library's template.
fn template(tokenizer: &Tokenizer, origin: &Origin) -> Value {
    let (before, after) = &origin.around;
    if before.is_empty() && after.is_empty() {
        return Value::Null;
    }
    let name = |id: &u32| tokenizer.token(*id).unwrap_or_default();
    let mark = |id: &u32, part: u32| json!({ "SpecialToken": { "id": name(id), "type_id": part } });
    let part = |letter: &str, part: u32| {
        let text = json!({ "Sequence": { "id": letter, "type_id": part } });
        let before = before.iter().map(|id| mark(id, part));
        let after = after.iter().map(|id| mark(id, part));
        before.chain([text]).chain(after).collect::<Vec<_>>()
    };
    let marks = before.iter().chain(after).map(|id| {
        let entry = json!({ "id": name(id), "ids": [id], "tokens": [name(id)] });
        (name(id), entry)
    });
    json!({
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": ([part("A", 0), part("B", 1)].concat()),
        "special_tokens": marks.collect::<serde_json::Map<_, _>>(),
    })
}

/// Scores as merges: every way to make a token of two, the best score first.
fn add_merges(origin: &Origin, definition: &mut Value) {
    let vocabulary = &origin.vocabulary;
    let merges_into = |id: u32| {
        !matches!(
            vocabulary.token_type(id),
            TokenType::Control | TokenType::Unknown | TokenType::Byte
        )
    };
    let tokens = (0..)
        .zip(&vocabulary.tokens)
        .filter(|(id, _)| merges_into(*id));
    let ids: HashMap<&str, u32> = tokens.map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, u32, u32, u32, &str, &str)> = Vec::new();
    for (&token, &id) in &ids {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&a), Some(&b)) = (ids.get(left), ids.get(right)) {
                let score = vocabulary.scores[id as usize] + 0.0;
                merges.push((score, id, a, b, left, right));
            }
        }
    }
    merges.sort_by(|x, y| {
        let by_score = y.0.total_cmp(&x.0);
        by_score.then((x.1, x.2, x.3).cmp(&(y.1, y.2, y.3)))
    });
    let pairs = merges.iter().map(|merge| json!([merge.4, merge.5]));
    definition["model"]["merges"] = pairs.collect();
    if let Some(unknown) = vocabulary.unknown {
        definition["model"]["unk_token"] = vocabulary.tokens[unknown as usize].as_str().into();
        definition["model"]["fuse_unk"] = true.into();
    }
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    definition["normalizer"] = match vocabulary.add_space_prefix.unwrap_or(true) {
        true => json!({
            "type": "Sequence",
            "normalizers": [{ "type": "Prepend", "prepend": SPACE }, spaces],
        }),
        false => spaces,
    };
}
