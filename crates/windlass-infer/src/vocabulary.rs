//! The tokenizer's part of a GGUF file's metadata: `tokenizer.ggml.*` and `tokenizer.chat_template`; and tokenizers
//! without their models.

use crate::InferError;
use crate::loaded::find_folder;
use std::path::Path;
use windlass_model::tokenizer::{GgufVocabulary, TokenType};
use windlass_model::{Tokenizer, TokenizerError};
use windlass_store::gguf::{Array, File, Metadata, Value, is_gguf};

const PREFIX: &str = "tokenizer.ggml.";

/// Loads a tokenizer alone: of a GGUF file, of whatever [`Tokenizer::load`] reads, or of the folder of a model or its
/// checkpoints.
///
/// # Errors
/// A path without a tokenizer, or with one that is damaged.
pub fn open_tokenizer(path: &Path) -> Result<Tokenizer, InferError> {
    if is_gguf(path) {
        let file = File::open(path)?;
        return Ok(Tokenizer::from_gguf(&read(file.metadata())?)?);
    }
    match Tokenizer::load(path) {
        Err(TokenizerError::Missing { .. }) if path.is_dir() => {
            Ok(Tokenizer::load(&find_folder(path, &mut Vec::new())?)?)
        }
        other => Ok(other?),
    }
}

/// Takes the vocabulary out of a file's metadata. What it means is checked when a tokenizer is built of it.
///
/// # Errors
/// Keys that are missing (`model`, `tokens`) or of the wrong kind.
pub fn read(metadata: &Metadata) -> Result<GgufVocabulary, InferError> {
    let key = |name: &str| format!("{PREFIX}{name}");
    let flag = |name: &str| metadata.get_bool(&key(name));
    let texts = |name: &str| metadata.get_strings(&key(name));
    let id = |name: &str| -> Result<Option<u32>, InferError> {
        let id: Option<i64> = metadata.get(&key(&format!("{name}_token_id")))?;
        // A negative id means none; the tokenizer says so of all that lie outside the vocabulary.
        Ok(id.map(|id| u32::try_from(id).unwrap_or(u32::MAX)))
    };
    let types: Option<Vec<i32>> = metadata.get(&key("token_type"))?;
    let table = match metadata.value(&key("precompiled_charsmap")) {
        Some(Value::Array(Array::I8(bytes))) => bytes.iter().map(|&byte| byte as u8).collect(),
        _ => metadata
            .get::<Vec<u8>>(&key("precompiled_charsmap"))?
            .unwrap_or_default(),
    };
    Ok(GgufVocabulary {
        model: metadata.require::<&str>(&key("model"))?.to_owned(),
        pre: metadata.get_str(&key("pre"))?.map(str::to_owned),
        tokens: metadata.require::<&[String]>(&key("tokens"))?.to_vec(),
        scores: metadata.get(&key("scores"))?.unwrap_or_default(),
        token_types: types
            .unwrap_or_default()
            .into_iter()
            .map(TokenType::from_number)
            .collect(),
        merges: texts("merges")?.unwrap_or_default().to_vec(),
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unknown: id("unknown")?,
        separator: id("seperator")?,
        padding: id("padding")?,
        mask: id("mask")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
        remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
        precompiled_charsmap: table,
        lowercase: flag("normalizer.lowercase")?,
        strip_accents: flag("normalizer.strip_accents")?,
        chat_template: metadata
            .get_str("tokenizer.chat_template")?
            .map(str::to_owned),
        model_name: metadata.get_str("general.name")?.map(str::to_owned),
    })
}

/// Puts a vocabulary into the metadata of a file to be written; `general.name` is the writer's own.
pub fn write(vocabulary: &GgufVocabulary, metadata: &mut Metadata) {
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            metadata.insert(format!("{PREFIX}{name}"), value);
        }
    };
    let list = |is_empty: bool, value: Value| (!is_empty).then_some(value);
    set("model", Some(vocabulary.model.as_str().into()));
    set("pre", vocabulary.pre.as_deref().map(Value::from));
    set("tokens", Some(vocabulary.tokens.clone().into()));
    set(
        "scores",
        list(
            vocabulary.scores.is_empty(),
            vocabulary.scores.clone().into(),
        ),
    );
    let types: Vec<i32> = vocabulary
        .token_types
        .iter()
        .map(|&kind| kind as i32)
        .collect();
    set("token_type", list(types.is_empty(), types.into()));
    set(
        "merges",
        list(
            vocabulary.merges.is_empty(),
            vocabulary.merges.clone().into(),
        ),
    );
    for (name, id) in [
        ("bos", vocabulary.bos),
        ("eos", vocabulary.eos),
        ("eot", vocabulary.eot),
        ("eom", vocabulary.eom),
        ("unknown", vocabulary.unknown),
        ("seperator", vocabulary.separator),
        ("padding", vocabulary.padding),
        ("mask", vocabulary.mask),
    ] {
        set(&format!("{name}_token_id"), id.map(Value::from));
    }
    for (name, flag) in [
        ("add_bos_token", vocabulary.add_bos),
        ("add_eos_token", vocabulary.add_eos),
        ("add_space_prefix", vocabulary.add_space_prefix),
        (
            "remove_extra_whitespaces",
            vocabulary.remove_extra_whitespaces,
        ),
        ("normalizer.lowercase", vocabulary.lowercase),
        ("normalizer.strip_accents", vocabulary.strip_accents),
    ] {
        set(name, flag.map(Value::from));
    }
    let table = &vocabulary.precompiled_charsmap;
    set(
        "precompiled_charsmap",
        list(table.is_empty(), table.clone().into()),
    );
    if let Some(template) = &vocabulary.chat_template {
        metadata.insert("tokenizer.chat_template", template.as_str());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_survive_a_file() {
        let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
            println!("skipped: set WINDLASS_TEST_DATA");
            return;
        };
        for name in ["gpt-2", "llama-spm", "phi-3"] {
            let path =
                Path::new(&data).join(format!("tokenizers/ggml-vocab/ggml-vocab-{name}.gguf"));
            let file = File::open(&path).unwrap();
            let mut vocabulary = read(file.metadata()).unwrap();
            assert!(Tokenizer::from_gguf(&vocabulary).is_ok(), "{name}");
            let mut metadata = Metadata::new();
            write(&vocabulary, &mut metadata);
            vocabulary.model_name = None;
            assert_eq!(read(&metadata).unwrap(), vocabulary, "{name}");
            for (key, value) in metadata.iter() {
                assert_eq!(file.metadata().value(key), Some(value), "{name}: {key}");
            }
        }
        assert!(read(&Metadata::new()).is_err());
    }
}
