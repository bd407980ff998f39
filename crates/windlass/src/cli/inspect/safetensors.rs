//! What safetensors files and files of packed weights hold, with the configuration beside them.

use super::{Entry, Run, Summary, Tensor};
use crate::cli::read_text;
use anyhow::{Context, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use windlass::store::packed::{FILE_NAME, PackedFile};
use windlass::store::safetensors::Tensors;

/// The summary, and all metadata in full: the file's own and that of `config.json`.
pub fn read(path: &Path) -> Result<(Summary, BTreeMap<String, Value>)> {
    let packed = path.join(FILE_NAME);
    if packed.is_file() || path.file_name().is_some_and(|name| name == FILE_NAME) {
        let file = if packed.is_file() { &packed } else { path };
        let tensor = |(name, shape, kind, bytes): (&str, &[usize], String, usize)| Tensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind,
            bytes,
        };
        let weights = PackedFile::open(file)?;
        let tensors = weights.forms().map(tensor).collect();
        return described(path, "packed weights", 1, tensors, &BTreeMap::new());
    }
    let weights = Tensors::open(path)?;
    let mut tensors = Vec::new();
    for name in weights.names() {
        let view = weights.get(name)?;
        tensors.push(Tensor {
            name: name.to_owned(),
            shape: view.shape.to_vec(),
            kind: view.dtype.to_string(),
            bytes: view.bytes.len(),
        });
    }
    let files = weights.files().len();
    described(path, "safetensors", files, tensors, weights.metadata())
}

/// Tensors and their own metadata, with the configuration beside them.
fn described(
    path: &Path,
    format: &str,
    files: usize,
    tensors: Vec<Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<(Summary, BTreeMap<String, Value>)> {
    let config = config(path)?;
    let mut summary = Summary::new(format.to_owned(), files, tensors, to_run(&config));
    let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
    summary.architecture = text("model_type");
    summary.name = text("_name_or_path");
    let mut full = BTreeMap::new();
    for (key, value) in metadata {
        full.insert(key.clone(), Value::String(value.clone()));
    }
    full.extend(config);
    let entry = |(key, value): (&String, &Value)| Entry {
        key: key.clone(),
        kind: kind(value).to_owned(),
        value: value.clone(),
    };
    summary.metadata = full.iter().map(entry).collect();
    Ok((summary, full))
}

/// The `config.json` of the folder; empty if there is none.
fn config(path: &Path) -> Result<Map<String, Value>> {
    let folder = if path.is_dir() {
        path
    } else {
        path.parent().unwrap_or(path)
    };
    let file = folder.join("config.json");
    if !file.exists() {
        return Ok(Map::new());
    }
    let text = read_text(&file)?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a configuration", file.display()))
}

/// What the configuration says of keys and values; `None` where it does not say.
fn to_run(config: &Map<String, Value>) -> Option<Run> {
    let get = |names: &[&str]| {
        let found = names.iter().find_map(|name| config.get(*name)?.as_u64());
        found.and_then(|value| usize::try_from(value).ok())
    };
    let layers = get(&["num_hidden_layers", "n_layer"])?;
    let context = get(&["max_position_embeddings", "n_positions"])?;
    let heads = get(&["num_attention_heads", "n_head"])?;
    let width = get(&["hidden_size", "n_embd"])?.checked_div(heads)?;
    let kv_heads = get(&["num_key_value_heads"]).unwrap_or(heads);
    let head = get(&["head_dim"]).unwrap_or(width);
    let elements = [2, kv_heads, head]
        .into_iter()
        .try_fold(layers, usize::checked_mul)?;
    elements.checked_mul(2)?.checked_mul(context)?;
    Some(Run::new(layers, context, elements))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}
