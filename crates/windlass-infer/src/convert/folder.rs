//! GGUF files as Hugging Face folders.

use super::{config_path, dtype_name, specs_of};
use crate::InferError;
use crate::gguf::{check, config, tokenizer};
use serde_json::{Value as Json, json};
use std::path::Path;
use windlass_model::gguf::{folder_config, place};
use windlass_model::{DecoderConfig, Tokenizer, decoder};
use windlass_store::Error as StoreError;
use windlass_store::atomic::{Disk, write_atomic};
use windlass_store::gguf::{BlockType, File};
use windlass_store::safetensors::{Dtype, Options, write_folder};
use windlass_tensor::kernels::blocks::dequantize;
use windlass_tensor::{ParamId, ParamSpec};

/// The type of a folder's weights that keeps every bit of a file's.
pub fn folder_dtype(file: &File) -> Dtype {
    let largest = file.tensors().max_by_key(|info| info.elements());
    match largest.map(|info| info.block_type) {
        Some(BlockType::BF16) => Dtype::BF16,
        Some(BlockType::F16) => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// Writes a GGUF file's model as a Hugging Face folder: weights in `dtype`, configuration, tokenizer and chat template.
/// `progress` is told the tensor and how many elements are done. Returns what the user should know.
///
/// # Errors
/// A file that is damaged or no model; whatever hinders writing.
pub fn write_hugging_face(
    file: &File,
    disk: &dyn Disk,
    out: &Path,
    dtype: Dtype,
    mut progress: impl FnMut(&str, usize),
) -> Result<Vec<String>, InferError> {
    let (config, mut notes) = config(file, file.path())?;
    let tokenizer = tokenizer(file.metadata(), &config)?;
    if let Some(tokenizer) = &tokenizer {
        notes.extend(tokenizer.notes().iter().cloned());
    }
    let model = decoder(&config);
    let map = config.naming.file_tensors(&model);
    let param = |id: &ParamId| &model.units()[id.unit].params[id.slot];
    for spec in model.units().iter().flat_map(|unit| &unit.params) {
        let place = place(&config, &spec.name, spec.shape[0]);
        let info = file.tensor(&place.tensor)?;
        check(file.path(), info, &place, &spec.shape)?;
    }
    let specs = specs_of(&map, dtype);
    let mut done = 0;
    write_folder(disk, out, &specs, &Options::default(), |index, writer| {
        let tensor = &map[index];
        let values = tensor
            .parts
            .iter()
            .map(|id| values(file, &config, param(id)));
        let values = values.collect::<Result<Vec<Vec<f32>>, StoreError>>()?;
        let parts: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
        let rows: Vec<usize> = tensor.parts.iter().map(|id| param(id).shape[0]).collect();
        done += tensor.shape.len();
        progress(&tensor.name, done);
        writer.values(&tensor.join(&parts, &rows))
    })?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.save(out)?;
    }
    let json = described(&config, tokenizer.as_ref(), dtype);
    let text = serde_json::to_vec_pretty(&json).expect("a JSON value");
    write_atomic(disk, &config_path(out), &text)?;
    Ok(notes)
}

/// The `config.json` of the folder.
pub(crate) fn described(
    config: &DecoderConfig,
    tokenizer: Option<&Tokenizer>,
    dtype: Dtype,
) -> Json {
    let mut json = folder_config(config.json.clone());
    json["torch_dtype"] = dtype_name(dtype).into();
    let ids = tokenizer.map(|t| (t.bos(), t.eos(), t.pad()));
    let (bos, eos, pad) = ids.unwrap_or((None, &[], None));
    json["bos_token_id"] = json!(bos);
    json["pad_token_id"] = json!(pad);
    json["eos_token_id"] = match eos {
        [] => Json::Null,
        [one] => json!(one),
        several => json!(several),
    };
    json
}

/// The elements of a parameter.
fn values(file: &File, config: &DecoderConfig, spec: &ParamSpec) -> Result<Vec<f32>, StoreError> {
    let rows = spec.shape[0];
    let place = place(config, &spec.name, rows);
    let info = file.tensor(&place.tensor)?;
    let bytes = file.bytes(&place.tensor)?;
    let mut out = vec![0f32; spec.shape.len()];
    // The elements of a vector are in rows of the file that may hold others.
    let cols = out.len() / rows;
    if spec.shape.to_vec().len() == 1 {
        let mut all = vec![0f32; info.elements()];
        dequantize(info.block_type, bytes, &mut all);
        for (row, out) in out.iter_mut().enumerate() {
            *out = all[place.row(row, rows)] - place.offset;
        }
    } else {
        let size = info.byte_size() / info.rows();
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            let at = place.row(row, rows);
            dequantize(info.block_type, &bytes[at * size..][..size], out);
        }
    }
    file.release(&place.tensor)?;
    Ok(out)
}
