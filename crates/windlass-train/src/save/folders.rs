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
use windlass_store::safetensors::{Options, write_file, write_folder};

/// Writes the model alone as a Hugging Face folder.
///
/// # Errors
/// Whatever hinders writing.
pub(crate) fn save_model(
    folder: &Path,
    engine: &Engine<Tokens>,
    config: &DecoderConfig,
    tokenizer: &Tokenizer,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let dtype = engine.store().dtype();
    let files = FileTensors::new(engine, config.naming.file_tensors(engine.model()));
    let mut units = Units::new(engine.store());
    write_folder(
        &RealDisk,
        folder,
        &files.specs,
        &Options::default(),
        |index, out| files.write(index, &mut units, out),
    )?;
    let text = serde_json::to_vec_pretty(&config_json(config, dtype)).expect("a JSON value");
    write_atomic(&RealDisk, &folder.join("config.json"), &text)?;
    Ok(tokenizer.save(folder)?)
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
    let store = engine.store();
    let files = FileTensors::new(engine, adapter.tensors.clone());
    let mut units = Units::new(store);
    let mut write = || -> Result<()> {
        std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
        let metadata = Options::default().metadata;
        let path = folder.join(ADAPTER_FILE);
        write_file(&RealDisk, &path, &files.specs, &metadata, |index, out| {
            files.write(index, &mut units, out)
        })?;
        let text = serde_json::to_vec_pretty(&adapter.config.to_json()).expect("a JSON value");
        Ok(write_atomic(
            &RealDisk,
            &folder.join(ADAPTER_CONFIG_FILE),
            &text,
        )?)
    };
    let written = match store.group().rank() {
        0 => write(),
        _ => Ok(()),
    };
    units.finish()?;
    together(store.group(), "write an adapter", written.as_ref().err())?;
    written
}
