//! What a GGUF file holds.

use super::{Entry, Run, Summary, Tensor};
use anyhow::Result;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use windlass::store::gguf::{Array, File, Metadata, Value as Stored};

/// Values of an array that are shown; the rest is there with `--key`.
const SHOWN: usize = 8;

/// The summary, and all metadata in full.
pub fn read(path: &Path) -> Result<(Summary, BTreeMap<String, Value>)> {
    let file = File::open(path)?;
    let tensor = |info: &windlass::store::gguf::TensorInfo| Tensor {
        name: info.name.clone(),
        shape: info.shape.clone(),
        kind: info.block_type.name().to_owned(),
        bytes: info.byte_size(),
    };
    let metadata = file.metadata();
    let format = format!("GGUF {}", file.version());
    let tensors = file.tensors().map(tensor).collect();
    let mut summary = Summary::new(format, file.parts().len(), tensors, to_run(metadata));
    let text = |key: &str| metadata.get_str(key).ok().flatten().map(str::to_owned);
    summary.architecture = text("general.architecture");
    summary.name = text("general.name");
    let entry = |(key, value): (&str, &Stored)| Entry {
        key: key.to_owned(),
        kind: value.describe(),
        value: shown(value),
    };
    summary.metadata = metadata.iter().map(entry).collect();
    let full = metadata
        .iter()
        .map(|(key, value)| (key.to_owned(), whole(value)));
    Ok((summary, full.collect()))
}

/// What the architecture's keys say of keys and values; `None` where they do not say.
fn to_run(metadata: &Metadata) -> Option<Run> {
    let architecture = metadata.get_str("general.architecture").ok()??;
    let get = |name: &str| {
        let key = format!("{architecture}.{name}");
        metadata.get::<usize>(&key).ok().flatten()
    };
    let layers = get("block_count")?;
    let context = get("context_length")?;
    let heads = get("attention.head_count")?;
    let width = get("embedding_length")?.checked_div(heads)?;
    let keys = get("attention.key_length").unwrap_or(width);
    let values = get("attention.value_length").unwrap_or(width);
    let key = format!("{architecture}.attention.head_count_kv");
    // One number, or one for each layer.
    let kv_heads: usize = match metadata.get::<Vec<usize>>(&key) {
        Ok(Some(each)) => each.iter().sum(),
        _ => get("attention.head_count_kv")
            .unwrap_or(heads)
            .checked_mul(layers)?,
    };
    let elements = kv_heads.checked_mul(keys.checked_add(values)?)?;
    elements.checked_mul(2)?.checked_mul(context)?;
    Some(Run::new(layers, context, elements))
}

/// A value, of a long array the beginning.
fn shown(value: &Stored) -> Value {
    match value {
        Stored::Array(array) if array.len() > SHOWN => json!({
            "values": array.len(),
            "first": list(array, SHOWN),
        }),
        other => whole(other),
    }
}

fn whole(value: &Stored) -> Value {
    match value {
        Stored::U8(v) => json!(v),
        Stored::I8(v) => json!(v),
        Stored::U16(v) => json!(v),
        Stored::I16(v) => json!(v),
        Stored::U32(v) => json!(v),
        Stored::I32(v) => json!(v),
        // As it is written by hand: 1e-5, not its digits in f64.
        Stored::F32(v) => v
            .to_string()
            .parse::<f64>()
            .map_or(Value::Null, |v| json!(v)),
        Stored::F64(v) => json!(v),
        Stored::Bool(v) => json!(v),
        Stored::String(v) => json!(v),
        Stored::U64(v) => json!(v),
        Stored::I64(v) => json!(v),
        Stored::Array(array) => list(array, array.len()),
    }
}

fn list(array: &Array, count: usize) -> Value {
    let values = (0..count).filter_map(|i| array.get(i));
    values.map(|value| whole(&value)).collect()
}
