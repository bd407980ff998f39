//! Adapters beside a model: requests name them, batches mix them, the model stays as it is.
//!
//! An [`Overlay`] is complete in itself and never changes: it is loaded on any thread while the model computes, and goes
//! when the last request that names it has ended.

use super::AdapterFolder;
use crate::InferError;
use crate::loaded::LoadedModel;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use windlass_model::{DecoderConfig, Tokens, decoder};
use windlass_store::Loader;
use windlass_tensor::kernels::memory::Memory;
use windlass_tensor::kernels::pool::Pool;
use windlass_tensor::{Category, Cpu, DType, Lora, ParamId, Tape, Tensor, UnitOverlay, Weights};

/// An adapter that requests can be computed with.
#[derive(Debug)]
pub struct Overlay {
    /// The chat template (Jinja) that it was trained with, where its folder has one.
    pub chat_template: Option<String>,
    /// No other overlay of this process has it.
    id: u64,
    units: Vec<Arc<UnitOverlay>>,
}

impl Overlay {
    /// Its number, above 0: an overlay that is loaded again gets another one.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of its values.
    pub fn bytes(&self) -> usize {
        self.units.iter().map(|unit| unit.bytes()).sum()
    }
}

/// What loads overlays for a model, on any thread.
#[derive(Clone)]
pub struct OverlayLoader {
    config: DecoderConfig,
    dtype: DType,
    memory: Memory,
    base: Vec<Weights>,
}

impl LoadedModel {
    /// What loads overlays for this model; it shares the weights.
    ///
    /// # Errors
    /// As the store gathers weights.
    ///
    /// # Panics
    /// When the model has an adapter of its own.
    #[track_caller]
    pub fn overlay_loader(&self) -> Result<OverlayLoader, InferError> {
        assert!(self.adapter.is_none(), "overlays on an adapted model");
        let units = 0..self.model.units().len();
        let base: Result<Vec<Weights>, InferError> = units
            .map(|unit| Ok(self.store.gather(unit)?.clone()))
            .collect();
        Ok(OverlayLoader {
            config: self.config.clone(),
            dtype: self.dtype,
            memory: self.store.cpu().memory.clone(),
            base: base?,
        })
    }

    /// As [`LoadedModel::run`], runs of rows computed with overlays.
    pub(crate) fn run_over(
        &self,
        batch: &Tokens,
        head: bool,
        overlays: &[(Range<usize>, Arc<Overlay>)],
    ) -> Tensor {
        self.run_on(batch, head, |unit| {
            let of_unit = |(rows, overlay): &(Range<usize>, Arc<Overlay>)| {
                (rows.clone(), overlay.units[unit].clone())
            };
            Tape::inference(self.store.cpu()).with_overlays(overlays.iter().map(of_unit).collect())
        })
    }

    /// Whether an overlay was made for a model of this shape.
    pub(crate) fn fits(&self, overlay: &Overlay) -> bool {
        overlay.units.len() == self.model.units().len()
    }
}

impl OverlayLoader {
    /// Loads the adapter of a folder.
    ///
    /// # Errors
    /// As [`AdapterFolder::open`]; an adapter for another model, tensor by tensor; one that replaces whole modules.
    pub fn load(&self, folder: &Path) -> Result<Overlay, InferError> {
        static LOADED: AtomicU64 = AtomicU64::new(1);
        let asked = folder;
        let folder = AdapterFolder::open(asked)?;
        let template = [asked, &folder.path].map(|place| place.join("chat_template.jinja"));
        if !folder.config.modules_to_save.is_empty() {
            return Err(InferError::Adapter {
                path: folder.path.clone(),
                problem: format!(
                    "modules_to_save replaces {}, which all requests share",
                    folder.config.modules_to_save.join(", ")
                ),
                hint: "merge it into a model of its own: windlass adapter merge".into(),
            });
        }
        // Declared as a model that has the adapter, of which only the adapter's parameters are ever allocated.
        let mut model = decoder(&self.config);
        let adapter = model.adapt(self.config.naming, &folder.config)?;
        folder.check(&adapter)?;
        let cpu = Cpu {
            pool: Arc::new(Pool::new(1)),
            memory: self.memory.clone(),
        };
        let own = match self.dtype {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let specs = model.units();
        let mut loader = Loader::new(&cpu, &folder.tensors, specs, &adapter.tensors, |_| None);
        let mut units = Vec::with_capacity(specs.len());
        for (unit, (spec, base)) in specs.iter().zip(&self.base).enumerate() {
            let first = base.len();
            let mut weights = Vec::new();
            for (slot, param) in spec.params.iter().enumerate().skip(first) {
                let values = loader.read(ParamId { unit, slot }, 0..param.shape.len(), own)?;
                let values = values.reshape(param.shape);
                // Factors are multiplied with activations; magnitudes, which are vectors, are not.
                weights.push(match param.shape[..].len() > 1 {
                    true => values.cast(&cpu, self.dtype, Category::Weights).into(),
                    false => values.into(),
                });
            }
            let links = spec.adapters.iter().map(|&(slot, lora)| {
                let own = Lora {
                    a: lora.a - first,
                    b: lora.b - first,
                    magnitude: lora.magnitude.map(|slot| slot - first),
                    ..lora
                };
                (slot, own)
            });
            let weights = Weights::new(weights);
            let overlay = UnitOverlay::new(&cpu, links, weights, base, self.dtype);
            units.push(Arc::new(overlay));
        }
        let id = LOADED.fetch_add(1, Ordering::Relaxed);
        Ok(Overlay {
            chat_template: template
                .into_iter()
                .find_map(|file| std::fs::read_to_string(file).ok()),
            id,
            units,
        })
    }
}
