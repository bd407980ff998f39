//! Models kept as they are in memory: a folder of configuration, tokenizer and packed weights, which opens at once.

use crate::gguf::tokenizer;
use crate::loaded::{kept, tokenizer_of};
use crate::{InferError, LoadIn, LoadedModel, vocabulary};
use std::path::Path;
use windlass_model::{DecoderConfig, decoder};
use windlass_store::atomic::{Disk, write_atomic};
use windlass_store::gguf::{File, Metadata, Writer};
use windlass_store::packed::{self, FILE_NAME, PackedFile};
use windlass_tensor::{Category, Cpu, DType, Weight, Weights};

/// The tokenizer of a model that came from a GGUF file: what a `tokenizer.json` cannot say to the letter.
const VOCABULARY: &str = "tokenizer.gguf";

impl LoadedModel {
    /// Writes the model to a folder as it is in memory: [`LoadedModel::open`] maps it, and gives the same bits. The folder
    /// is made; an earlier one of this kind is replaced, weights last, so a folder without them was not finished.
    ///
    /// # Errors
    /// [`InferError::NoModel`] where nothing is packed, or the folder holds another kind of model; whatever hinders
    /// writing.
    pub fn save_packed(&self, disk: &dyn Disk, folder: &Path) -> Result<(), InferError> {
        let refuse = |problem: &str, hint: &str| {
            Err(InferError::NoModel {
                path: folder.to_owned(),
                problem: problem.into(),
                hint: hint.into(),
            })
        };
        if !self.is_packed()? {
            return refuse(
                "would hold plain weights, which open as fast from their own folder",
                "pack them while loading: --load-in q4 or q8",
            );
        }
        let weights = folder.join(FILE_NAME);
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| windlass_store::Error::Io {
                action,
                path,
                source,
            }
        };
        if weights.exists() {
            if folder.canonicalize().ok() == self.folder.canonicalize().ok() {
                return refuse(
                    "is the folder that the model comes from",
                    "name another one",
                );
            }
            disk.remove_file(&weights).map_err(io("remove", &weights))?;
        } else if folder.join("config.json").exists() || folder.is_file() {
            return refuse("is not a folder of packed weights", "name a new folder");
        }
        disk.create_dir(folder).map_err(io("create", folder))?;
        let config = serde_json::to_vec_pretty(&self.config.json).expect("a JSON value");
        write_atomic(disk, &folder.join("config.json"), &config)?;
        if let Some(tokenizer) = &self.tokenizer {
            match tokenizer.vocabulary() {
                None => tokenizer.save(folder)?,
                Some(words) => {
                    let mut keys = Metadata::new();
                    keys.insert("general.type", "vocab");
                    if let Some(name) = &words.model_name {
                        keys.insert("general.name", name.as_str());
                    }
                    vocabulary::write(words, &mut keys);
                    Writer::create(disk, &folder.join(VOCABULARY), &keys, &[])?.finish()?;
                }
            }
        }
        let mut gathered = Vec::new();
        for unit in 0..self.model.units().len() {
            gathered.push(self.store.gather(unit)?);
        }
        let units = self.model.units().iter().zip(&gathered);
        let named = units.flat_map(|(unit, weights)| {
            let names = unit.params.iter().map(|param| param.name.as_str());
            names.zip(weights.iter())
        });
        let named: Vec<(&str, &Weight)> = named.collect();
        packed::write(disk, &weights, self.dtype, &named)?;
        Ok(())
    }

    /// Opens a folder of [`LoadedModel::save_packed`].
    pub(crate) fn open_packed(
        cpu: &Cpu,
        folder: &Path,
        dtype: Option<DType>,
        load_in: LoadIn,
        mut notes: Vec<String>,
    ) -> Result<Self, InferError> {
        let config = DecoderConfig::load(folder)?;
        let file = PackedFile::open(&folder.join(FILE_NAME))?;
        notes.extend(config.notes.iter().cloned());
        if matches!(load_in, LoadIn::Packed(_)) {
            notes.push("the folder's weights keep their bits: --load-in changes nothing".into());
        }
        let vocabulary = folder.join(VOCABULARY);
        let tokenizer = match vocabulary.is_file() {
            true => tokenizer(File::open(&vocabulary)?.metadata(), &config)?,
            false => tokenizer_of(folder, &config)?,
        };
        let dtype = dtype.unwrap_or(file.dtype());
        let model = decoder(&config);
        let mut weights = Vec::new();
        for unit in model.units() {
            let unit = unit.params.iter().map(|param| {
                let weight = file.weight(cpu, &param.name, param.shape)?;
                Ok(match weight {
                    Weight::Packed(packed) => kept(cpu, packed, load_in, dtype),
                    Weight::Dense(tensor) if tensor.dtype() != dtype => {
                        tensor.cast(cpu, dtype, Category::Weights).into()
                    }
                    other => other,
                })
            });
            let unit: Result<Vec<Weight>, InferError> = unit.collect();
            weights.push(Weights::new(unit?));
        }
        Ok(Self::assemble(
            cpu, config, model, weights, tokenizer, dtype, notes, folder,
        ))
    }
}
