//! Adapters on loaded models: PEFT's folders read and written, new ones, and what is left when one is merged.
//!
//! A base stays as it was opened, packed or not; an adapter's own parameters are `f32`.

mod extract;
mod gguf;
mod low_rank;
mod merge;
mod overlay;
mod sum;

pub use overlay::{Overlay, OverlayLoader};

pub use extract::Extracted;
pub use low_rank::low_rank;
pub use sum::write_sum;

use crate::InferError;
use crate::loaded::LoadedModel;
use std::path::{Path, PathBuf};
use windlass_model::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, Adapter, AdapterConfig, DecoderConfig, decoder,
};
use windlass_store::atomic::{RealDisk, write_atomic};
use windlass_store::gguf::is_gguf;
use windlass_store::safetensors::{Dtype, Spec, Tensors, write_file};
use windlass_store::{Loader, Store, elements};
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, Layout, ParamId, ParamSpec, Tensor, Weight, Weights,
    row_norms,
};

/// Mismatches that a message lists.
const SHOWN: usize = 3;

/// What PEFT puts in front of a module's name.
const PREFIX: &str = "base_model.model.";

/// The tensors of an adapter's file, with their elements.
type Factors = Vec<(FileTensor, Vec<f32>)>;

/// An adapter at rest: a folder as PEFT writes it.
pub struct AdapterFolder {
    path: PathBuf,
    /// The settings.
    pub config: AdapterConfig,
    /// The tensors, as they are named in the file.
    pub tensors: Tensors,
}

impl AdapterFolder {
    /// Opens a folder with `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// Of a run's folder it is the best adapter, or the last one.
    ///
    /// # Errors
    /// Missing or damaged files; settings that are not supported.
    pub fn open(path: &Path) -> Result<Self, InferError> {
        let inner = ["best", "last"].map(|name| path.join(name));
        let has = |folder: &&PathBuf| folder.join(ADAPTER_CONFIG_FILE).is_file();
        let path = match inner.iter().find(has) {
            Some(inner) if !path.join(ADAPTER_CONFIG_FILE).is_file() => inner,
            _ => path,
        };
        let settings = path.join(ADAPTER_CONFIG_FILE);
        let refuse = |problem: String, hint: &str| InferError::Adapter {
            path: path.to_owned(),
            problem,
            hint: hint.into(),
        };
        if path.is_file() {
            let hint = "windlass adapter convert makes a folder of a GGUF adapter";
            return Err(refuse(
                "is a file, and here a folder is needed".into(),
                hint,
            ));
        }
        let text = std::fs::read_to_string(&settings).map_err(|error| {
            let hint =
                "an adapter is a folder with adapter_config.json and adapter_model.safetensors";
            refuse(
                format!("{ADAPTER_CONFIG_FILE} cannot be read: {error}"),
                hint,
            )
        })?;
        let config = AdapterConfig::from_json(&settings.display().to_string(), &text)?;
        let file = path.join(ADAPTER_FILE);
        if !file.is_file() {
            let old = path.join("adapter_model.bin").is_file();
            let hint = match old {
                true => {
                    "adapter_model.bin is a pickle, which can run code: save it again with safe_serialization=True"
                }
                false => "copy it beside adapter_config.json",
            };
            return Err(refuse(format!("no {ADAPTER_FILE}"), hint));
        }
        Ok(AdapterFolder {
            path: path.to_owned(),
            config,
            tensors: Tensors::open(&file)?,
        })
    }

    /// Reads all tensors.
    fn values(&self) -> Result<Factors, InferError> {
        let read = |name: &str| {
            let view = self.tensors.get(name)?;
            let mut values = vec![0f32; view.elements()];
            view.read_into(0..view.rows(), &mut values)?;
            Ok((file_tensor(name.to_owned(), view.shape), values))
        };
        self.tensors.names().map(read).collect()
    }

    /// What the file has twice, once as a table and once as the head that the table is, with different elements.
    fn untied(&self, adapter: &Adapter) -> Result<Option<String>, InferError> {
        for pair in adapter.tensors.windows(2) {
            let names = [&pair[0].name, &pair[1].name];
            if pair[0].parts == pair[1].parts && names.iter().all(|n| self.tensors.contains(n)) {
                let [one, other] = names;
                if self.tensors.get(one)?.bytes != self.tensors.get(other)?.bytes {
                    return Ok(Some(format!(
                        "{one} and {other} are one in the model and differ here"
                    )));
                }
            }
        }
        Ok(None)
    }

    /// Checks that the file has the tensors of an adapter, in their shapes, and no others.
    fn check(&self, adapter: &Adapter) -> Result<(), InferError> {
        let mut wrong = Vec::new();
        for want in &adapter.tensors {
            match self.tensors.contains(&want.name) {
                false => wrong.push(format!("{} is missing", want.name)),
                true => {
                    let view = self.tensors.get(&want.name)?;
                    let found = view.shape;
                    if found[..] != want.shape[..] {
                        let name = &want.name;
                        wrong.push(format!(
                            "{name} is {found:?}, the model needs {}",
                            want.shape
                        ));
                    }
                }
            }
        }
        wrong.extend(self.untied(adapter)?);
        let known = |name: &&str| !adapter.tensors.iter().any(|t| t.name == *name);
        let more = self.tensors.names().filter(known);
        wrong.extend(more.map(|name| format!("{name} has no place in the model")));
        if wrong.is_empty() {
            return Ok(());
        }
        let (count, more) = (wrong.len(), wrong.len() > SHOWN);
        wrong.truncate(SHOWN);
        let dots = if more { "; …" } else { "" };
        Err(InferError::Adapter {
            path: self.path.clone(),
            problem: format!(
                "does not fit the model: {count} tensors differ: {}{dots}",
                wrong.join("; ")
            ),
            hint: match &self.config.base_model_name_or_path {
                Some(base) => format!("it was made for {base}: give that model with --model"),
                None => "give the model that it was made for with --model".into(),
            },
        })
    }
}

impl LoadedModel {
    /// Applies the adapter of a folder or GGUF file, without changing the weights of the model.
    ///
    /// # Errors
    /// As [`AdapterFolder::open`]; an adapter for another model, tensor by tensor.
    ///
    /// # Panics
    /// When the model has an adapter already.
    pub fn add_adapter(&mut self, folder: &Path) -> Result<(), InferError> {
        if is_gguf(folder) {
            return self.add_gguf_adapter(folder);
        }
        let folder = AdapterFolder::open(folder)?;
        let adapter = self.model.adapt(self.config.naming, &folder.config)?;
        folder.check(&adapter)?;
        let (cpu, units) = (self.store.cpu().clone(), self.model.units().to_vec());
        let mut loader = Loader::new(&cpu, &folder.tensors, &units, &adapter.tensors, |_| None);
        self.extend(adapter.clone(), &mut |id, param, dtype| {
            let values = loader.read(id, 0..param.shape.len(), dtype)?;
            Ok(Some(values.reshape(param.shape)))
        })
    }

    /// Gives the model a new adapter to be trained: it changes nothing yet. `seed` fills it.
    ///
    /// # Errors
    /// Modules that do not exist or cannot be adapted.
    ///
    /// # Panics
    /// When the model has an adapter already.
    pub fn new_adapter(&mut self, config: &AdapterConfig, seed: u64) -> Result<(), InferError> {
        let adapter = self.model.adapt(self.config.naming, config)?;
        let first: Vec<usize> = self.store.units().map(|unit| unit.params.len()).collect();
        let cpu = self.store.cpu().clone();
        let magnitudes = adapter.magnitudes.clone();
        let bases = self.weights()?;
        self.extend(adapter, &mut |id, param, dtype| {
            if id.slot < first[id.unit] {
                return Ok(None);
            }
            let base = magnitudes.iter().find(|(m, _)| *m == id);
            Ok(Some(match base {
                // As B is zero, the norms are those of the weight alone.
                Some((_, base)) => {
                    let weight = bases[base.unit].at(base.slot).weight;
                    let norms = row_norms(&cpu, weight, None, computed(weight));
                    let norms: Vec<f32> = norms.iter().map(|&n| n as f32).collect();
                    let norms = Tensor::from_slice(&cpu, &norms, param.shape, Category::Weights);
                    norms.cast(&cpu, dtype, Category::Weights)
                }
                None => param.fill(&cpu, seed, dtype),
            }))
        })
    }

    /// The weights of all units, shared.
    fn weights(&self) -> Result<Vec<Weights>, InferError> {
        let units = 0..self.model.units().len();
        units
            .map(|unit| Ok(self.store.gather(unit)?.clone()))
            .collect()
    }

    /// A model of its weights, without a tokenizer.
    fn bare(
        cpu: &Cpu,
        config: DecoderConfig,
        weights: Vec<Weights>,
        dtype: DType,
        folder: &Path,
    ) -> Self {
        let model = decoder(&config);
        Self::assemble(cpu, config, model, weights, None, dtype, Vec::new(), folder)
    }

    /// Puts the parameters of an adapter into the store: what `value` gives; what it does not give stays, as plain elements
    /// where it is to be trained.
    fn extend(&mut self, adapter: Adapter, value: Value<'_>) -> Result<(), InferError> {
        let cpu = self.store.cpu().clone();
        let empty = Store::new(&cpu, &[], Vec::new());
        let base = std::mem::replace(&mut self.store, empty).into_weights();
        let own = match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let mut units = Vec::with_capacity(base.len());
        for (unit, (spec, base)) in self.model.units().iter().zip(base).enumerate() {
            let mut weights = Vec::with_capacity(spec.params.len());
            for (slot, param) in spec.params.iter().enumerate() {
                let id = ParamId { unit, slot };
                let old = (slot < base.len()).then(|| base.at(slot).weight.clone());
                weights.push(match (old, param.trained) {
                    (Some(old), false) => old,
                    (Some(old), true) => match value(id, param, self.dtype)? {
                        Some(new) => new.into(),
                        None => plain(&cpu, old, self.dtype).into(),
                    },
                    (None, _) => value(id, param, own)?
                        .expect("a value for a parameter of an adapter")
                        .into(),
                });
            }
            units.push(Weights::new(weights));
        }
        self.store = Store::new(&cpu, self.model.units(), units);
        self.adapter = Some(adapter);
        Ok(())
    }

    /// Writes the adapter as PEFT does.
    ///
    /// # Errors
    /// Whatever hinders writing.
    ///
    /// # Panics
    /// When the model has none.
    #[track_caller]
    pub fn save_adapter(&self, folder: &Path) -> Result<(), InferError> {
        let (config, tensors) = self.adapter_values()?;
        write_adapter(folder, config, &tensors)
    }

    /// The adapter's settings and tensors, as its file has them.
    #[track_caller]
    fn adapter_values(&self) -> Result<(&AdapterConfig, Factors), InferError> {
        let adapter = self.adapter.as_ref().expect("a model with an adapter");
        let mut of = |id: ParamId| Ok(elements(self.store.gather(id.unit)?.at(id.slot).weight));
        let values = adapter.tensors.iter();
        let values = values.map(|file| Ok((file.clone(), self.joined(file, &mut of)?)));
        let values: Result<Factors, InferError> = values.collect();
        Ok((&adapter.config, values?))
    }

    /// The elements of a file's tensor from those of its parts.
    fn joined(
        &self,
        file: &FileTensor,
        of: &mut dyn FnMut(ParamId) -> Result<Vec<f32>, InferError>,
    ) -> Result<Vec<f32>, InferError> {
        let parts: Result<Vec<Vec<f32>>, InferError> =
            file.parts.iter().map(|&id| of(id)).collect();
        let parts = parts?;
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let rows = |id: &ParamId| self.model.units()[id.unit].params[id.slot].shape[0];
        let rows: Vec<usize> = file.parts.iter().map(rows).collect();
        Ok(file.join(&parts, &rows))
    }
}

/// What gives the values of parameters, in a storage type; `None` keeps what there is.
type Value<'a> =
    &'a mut dyn FnMut(ParamId, &ParamSpec, DType) -> Result<Option<Tensor>, InferError>;

/// The storage type in which to compute with a weight.
fn computed(weight: &Weight) -> DType {
    match weight {
        Weight::Dense(tensor) => tensor.dtype(),
        Weight::Packed(_) => DType::F32,
    }
}

/// A weight as plain elements.
fn plain(cpu: &Cpu, weight: Weight, dtype: DType) -> Tensor {
    match weight {
        Weight::Dense(tensor) => tensor,
        Weight::Packed(packed) => packed.unpack_rows(cpu, 0..packed.shape()[0], dtype),
    }
}

/// A tensor of a file alone.
fn file_tensor(name: String, shape: &[usize]) -> FileTensor {
    FileTensor {
        name,
        shape: shape.into(),
        parts: Vec::new(),
        layout: Layout::Rows,
    }
}

/// Writes an adapter's folder.
///
/// # Errors
/// Whatever hinders writing.
pub fn write_adapter(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &[(FileTensor, Vec<f32>)],
) -> Result<(), InferError> {
    let io = |source| windlass_store::Error::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    };
    std::fs::create_dir_all(folder).map_err(io)?;
    let spec =
        |(t, _): &(FileTensor, Vec<f32>)| Spec::new(t.name.clone(), Dtype::F32, t.shape.to_vec());
    let specs: Vec<Spec> = tensors.iter().map(spec).collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    write_file(
        &RealDisk,
        &folder.join(ADAPTER_FILE),
        &specs,
        &metadata,
        |index, out| out.values(&tensors[index].1),
    )?;
    let text = serde_json::to_vec_pretty(&config.to_json()).expect("a JSON value");
    Ok(write_atomic(
        &RealDisk,
        &folder.join(ADAPTER_CONFIG_FILE),
        &text,
    )?)
}
