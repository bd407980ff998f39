//! Adapters beside a model: requests name them, batches mix them, the model stays as it is.
//!
//! An [`Overlay`] is complete in itself and never changes: it is loaded on any thread while the model computes, and goes
//! when the last request that names it has ended.

use crate::InferError;
use crate::loaded::LoadedModel;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use windlass_model::{DecoderConfig, Tokens};
use windlass_tensor::kernels::memory::Memory;
use windlass_tensor::kernels::pool::Pool;
use windlass_tensor::{Category, Cpu, DType, Lora, Tape, Tensor, UnitOverlay, Weight, Weights};

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
        Ok(OverlayLoader {
            config: self.config.clone(),
            dtype: self.dtype,
            memory: self.store.cpu().memory.clone(),
            base: self.weights()?,
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
    /// Loads the adapter of a folder or GGUF file.
    ///
    /// # Errors
    /// As [`LoadedModel::add_adapter`]; an adapter that replaces whole modules.
    pub fn load(&self, path: &Path) -> Result<Overlay, InferError> {
        static LOADED: AtomicU64 = AtomicU64::new(1);
        let cpu = Cpu {
            pool: Arc::new(Pool::new(1)),
            memory: self.memory.clone(),
        };
        // A model that has the adapter, of which the adapter's parameters are all that stays.
        let (config, base) = (self.config.clone(), self.base.clone());
        let mut model = LoadedModel::bare(&cpu, config, base, self.dtype, path);
        model.add_adapter(path)?;
        let config = model.adapter.map(|adapter| adapter.config);
        let saved = config.map_or(Vec::new(), |config| config.modules_to_save);
        if !saved.is_empty() {
            return Err(InferError::Adapter {
                path: path.to_owned(),
                problem: format!(
                    "modules_to_save replaces {}, which all requests share",
                    saved.join(", ")
                ),
                hint: "merge it into a model of its own: windlass adapter merge".into(),
            });
        }
        let mut units = Vec::new();
        let specs = model.model.units();
        let weights = model.store.into_weights();
        for ((spec, base), all) in specs.iter().zip(&self.base).zip(weights) {
            let first = base.len();
            // Factors are multiplied with activations; magnitudes, which are vectors, are not.
            let own = all.iter().skip(first).map(|weight| match weight {
                Weight::Dense(values) if weight.shape()[..].len() > 1 => {
                    values.cast(&cpu, self.dtype, Category::Weights).into()
                }
                other => other.clone(),
            });
            let weights = Weights::new(own.collect());
            let links = spec.adapters.iter().map(|&(slot, lora)| {
                let own = Lora {
                    a: lora.a - first,
                    b: lora.b - first,
                    magnitude: lora.magnitude.map(|slot| slot - first),
                    ..lora
                };
                (slot, own)
            });
            let overlay = UnitOverlay::new(&cpu, links, weights, base, self.dtype);
            units.push(Arc::new(overlay));
        }
        let id = LOADED.fetch_add(1, Ordering::Relaxed);
        Ok(Overlay {
            chat_template: ["", "best", "last"].iter().find_map(|of_run| {
                let file = path.join(of_run).join("chat_template.jinja");
                std::fs::read_to_string(file).ok()
            }),
            id,
            units,
        })
    }
}
