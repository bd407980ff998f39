//! The tokenizer of a GGUF file, read from its metadata.

use crate::InferError;
use windlass_model::Tokenizer;
use windlass_model::tokenizer::{GgufVocabulary, TokenType};
use windlass_store::gguf::{Array, Metadata};

/// The tokenizer that the metadata describe; `None` without `tokenizer.ggml.model`.
///
/// # Errors
/// A key of another type than it should have, or a vocabulary that makes no tokenizer.
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Option<Tokenizer>, InferError> {
    let Some(vocabulary) = vocabulary(metadata)? else {
        return Ok(None);
    };
    Ok(Some(Tokenizer::from_gguf(&vocabulary)?))
}

/// The vocabulary of a file's metadata.
///
/// # Errors
/// A key of another type than it should have.
pub fn vocabulary(m: &Metadata) -> Result<Option<GgufVocabulary>, InferError> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let Some(model) = m.get_str(&key("model"))? else {
        return Ok(None);
    };
    // "none" and "no_vocab" stand for a model without a tokenizer.
    if ["none", "no_vocab"].contains(&model) {
        return Ok(None);
    }
    let strings = |name: &str| -> Result<Vec<String>, InferError> {
        Ok(m.get_strings(&key(name))?.unwrap_or_default().to_vec())
    };
    let id = |name: &str| m.get_u32(&key(&format!("{name}_token_id")));
    let scores = match m.get_array(&key("scores"))? {
        Some(Array::F32(scores)) => scores.clone(),
        _ => Vec::new(),
    };
    let token_types = match m.get_array(&key("token_type"))? {
        Some(Array::I32(types)) => types.iter().map(|&t| TokenType::from_number(t)).collect(),
        _ => Vec::new(),
    };
    let charsmap = match m.get_array(&key("precompiled_charsmap"))? {
        Some(Array::U8(bytes)) => bytes.clone(),
        Some(Array::I8(bytes)) => bytes.iter().map(|&byte| byte as u8).collect(),
        _ => Vec::new(),
    };
    Ok(Some(GgufVocabulary {
        model: model.to_owned(),
        pre: m.get_str(&key("pre"))?.map(String::from),
        tokens: strings("tokens")?,
        scores,
        token_types,
        merges: strings("merges")?,
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unknown: id("unknown")?,
        separator: id("seperator")?,
        padding: id("padding")?,
        mask: id("mask")?,
        add_bos: m.get_bool(&key("add_bos_token"))?,
        add_eos: m.get_bool(&key("add_eos_token"))?,
        add_space_prefix: m.get_bool(&key("add_space_prefix"))?,
        remove_extra_whitespaces: m.get_bool(&key("remove_extra_whitespaces"))?,
        precompiled_charsmap: charsmap,
        lowercase: m.get_bool(&key("normalizer.lowercase"))?,
        strip_accents: m.get_bool(&key("normalizer.strip_accents"))?,
        chat_template: m.get_str("tokenizer.chat_template")?.map(String::from),
        model_name: m.get_str("general.name")?.map(String::from),
    }))
}
