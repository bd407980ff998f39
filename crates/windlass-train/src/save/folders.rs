//! What is trained as folders of other people's programs: a Hugging Face folder, or an adapter as PEFT has it.

use super::{FileTensors, Units, config_json};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::together::together;
use std::path::Path;
use windlass_model::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, Adapter, DecoderConfig, Tokenizer, Tokens,
};
use windlass_store::atomic::{RealDisk, write_atomic};
use windlass_store::safetensors::{Options, TensorWriter, write_file, write_folder};
use windlass_tensor::FileTensor;

/// Writes the model alone as a Hugging Face folder, from the first rank. Collective.
///
/// # Errors
/// Whatever hinders writing.
pub(crate) fn save_model(
    folder: &Path,
    engine: &Engine<Tokens>,
    config: &DecoderConfig,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let map = config.naming.file_tensors(engine.model());
    let dtype = engine.store().dtype();
    by_the_first(engine, map, "write a model", &mut |files, fill| {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        write_folder(&RealDisk, folder, &files.specs, &Options::default(), fill)?;
        let text = serde_json::to_vec_pretty(&config_json(config, dtype)).expect("a JSON value");
        write_atomic(&RealDisk, &folder.join("config.json"), &text)?;
        Ok(tokenizer.save(folder)?)
    })
}

/// Writes an adapter's folder, as PEFT does, from the first rank. Collective.
///
/// # Errors
/// Whatever hinders writing.
pub(crate) fn save_adapter(
    folder: &Path,
    engine: &Engine<Tokens>,
    adapter: &Adapter,
) -> Result<()> {
    let map = adapter.tensors.clone();
    by_the_first(engine, map, "write an adapter", &mut |files, fill| {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let metadata = Options::default().metadata;
        let path = folder.join(ADAPTER_FILE);
        write_file(&RealDisk, &path, &files.specs, &metadata, fill)?;
        let text = serde_json::to_vec_pretty(&adapter.config.to_json()).expect("a JSON value");
        Ok(write_atomic(
            &RealDisk,
            &folder.join(ADAPTER_CONFIG_FILE),
            &text,
        )?)
    })
}

/// What gives the elements of a file's tensor.
type Fill<'a> = &'a mut dyn FnMut(usize, &mut TensorWriter) -> windlass_store::Result<()>;

/// Lets the first rank write files of tensors, which all ranks gather; what hinders it is told to all.
fn by_the_first(
    engine: &Engine<Tokens>,
    map: Vec<FileTensor>,
    what: &'static str,
    write: &mut dyn FnMut(&FileTensors, Fill<'_>) -> Result<()>,
) -> Result<()> {
    let store = engine.store();
    store.cpu().memory.trim();
    let files = FileTensors::new(engine, map);
    let mut units = Units::new(store);
    let written = match store.group().rank() {
        0 => write(&files, &mut |index, out| {
            files.write(index, &mut units, out)
        }),
        _ => Ok(()),
    };
    units.finish()?;
    together(store.group(), what, written.as_ref().err())?;
    written
}
