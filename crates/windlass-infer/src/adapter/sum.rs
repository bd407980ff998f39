//! Several adapters at once: what they add to the weights adds up.
//!
//! Factors are put side by side, so the sum is one adapter whose product is the weighted sum of theirs; nothing else in a model
//! knows that there were several.

use crate::InferError;
use crate::loaded::LoadedModel;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use windlass_model::{Adapter, AdapterConfig, Targets, decoder};
use windlass_store::Store;
use windlass_tensor::{Category, Lora, ParamId, Tensor, Weights};

/// One of several adapters, on a model of its own that shares the weights.
struct Part<'a> {
    path: &'a Path,
    weight: f64,
    model: LoadedModel,
}

impl LoadedModel {
    /// Applies several adapters, folders or GGUF files, each with how much of it counts: what they add to the weights is
    /// added up. Modules that one of them has whole are taken from it.
    ///
    /// # Errors
    /// As [`LoadedModel::add_adapter`]; what does not add up: DoRA beside others or in part, a module that one adapter has
    /// whole and another changes, or of which only a part counts.
    ///
    /// # Panics
    /// When the model has an adapter already.
    #[track_caller]
    pub fn add_adapters(&mut self, adapters: &[(PathBuf, f64)]) -> Result<(), InferError> {
        match adapters {
            [] => return Ok(()),
            [(path, weight)] if *weight == 1.0 => return self.add_adapter(path),
            _ => {}
        }
        let mut parts = Vec::with_capacity(adapters.len());
        for (path, weight) in adapters {
            let mut model = self.beside()?;
            model.add_adapter(path)?;
            let part = Part {
                path,
                weight: *weight,
                model,
            };
            part.adds_up(&parts)?;
            parts.push(part);
        }
        let config = together(&parts)?;
        let adapter = self.model.adapt(self.config.naming, &config)?;
        let cpu = self.store.cpu().clone();
        self.extend(adapter, &mut |id, param, dtype| {
            let found = parts.iter().filter_map(|part| part.values(id, &param.name));
            let found: Vec<Values> = found.collect::<Result<_, _>>()?;
            let values = side_by_side(&found);
            if values.is_empty() {
                return Ok(None);
            }
            let values = Tensor::from_slice(&cpu, &values, param.shape, Category::Weights);
            Ok(Some(values.cast(&cpu, dtype, Category::Weights)))
        })
    }

    /// The model once more, with adapters; it shares the weights.
    ///
    /// # Errors
    /// As [`LoadedModel::add_adapters`].
    ///
    /// # Panics
    /// When the model has an adapter already.
    #[track_caller]
    pub fn with_adapters(&self, adapters: &[(PathBuf, f64)]) -> Result<LoadedModel, InferError> {
        let mut model = self.beside()?;
        model.tokenizer = self.tokenizer.clone();
        model.add_adapters(adapters)?;
        Ok(model)
    }

    /// The model once more without its tokenizer; it shares the weights.
    fn beside(&self) -> Result<LoadedModel, InferError> {
        assert!(self.adapter.is_none(), "a model is adapted once");
        let model = decoder(&self.config);
        let units = 0..model.units().len();
        let weights: Result<Vec<Weights>, InferError> = units
            .map(|unit| Ok(self.store.gather(unit)?.clone()))
            .collect();
        Ok(LoadedModel {
            config: self.config.clone(),
            store: Store::new(self.store.cpu(), model.units(), weights?),
            model,
            tokenizer: None,
            dtype: self.dtype,
            kv_type: self.kv_type,
            notes: Vec::new(),
            folder: self.folder.clone(),
            adapter: None,
        })
    }
}

/// What an adapter gives a parameter.
enum Values {
    /// All of it: `A`, whose rows are followed by those of others, or a module that is saved whole.
    Rows(Vec<f32>),
    /// `B`, of so many columns, beside which those of others stand.
    Columns(Vec<f32>, usize),
}

/// The rows or columns of several adapters.
fn side_by_side(found: &[Values]) -> Vec<f32> {
    let rows = found.iter().find_map(|values| match values {
        Values::Columns(values, r) => Some(values.len() / r),
        Values::Rows(_) => None,
    });
    let of = |values: &Values, row: usize| match values {
        Values::Rows(values) => values.clone(),
        Values::Columns(values, r) => values[row * r..(row + 1) * r].to_vec(),
    };
    (0..rows.unwrap_or(1))
        .flat_map(|row| found.iter().flat_map(move |values| of(values, row)))
        .collect()
}

impl Part<'_> {
    fn adapter(&self) -> &Adapter {
        self.model.adapter.as_ref().expect("an adapter, just added")
    }

    /// The modules that it has whole, by their names in its file.
    fn whole(&self) -> impl Iterator<Item = &str> {
        let names = self.adapter().tensors.iter().map(|t| t.name.as_str());
        names.filter(|name| !name.contains(".lora_"))
    }

    fn refuse(&self, problem: String) -> InferError {
        InferError::Adapter {
            path: self.path.to_owned(),
            problem,
            hint: "merge one of them into a model of its own (windlass adapter merge) and give the others for that".into(),
        }
    }

    /// Checks that it can be added to others.
    fn adds_up(&self, others: &[Part<'_>]) -> Result<(), InferError> {
        let config = &self.adapter().config;
        let dora = config.use_dora || others.iter().any(|part| part.adapter().config.use_dora);
        if dora && (self.weight != 1.0 || !others.is_empty()) {
            let problem = "DoRA's magnitudes replace norms: it stands alone, and counts whole";
            return Err(self.refuse(problem.into()));
        }
        if let Some(name) = self.whole().next().filter(|_| self.weight != 1.0) {
            let problem = format!("has {name} whole, of which no part can be taken: it counts 1");
            return Err(self.refuse(problem));
        }
        for other in others {
            for (one, two) in [(self, other), (other, self)] {
                let changed = |name: &&str| {
                    let has = |t: &&str| t == name;
                    let adapted = |m: &String| module_of(name) == m;
                    two.whole().any(|t| has(&t)) || two.adapter().modules.iter().any(adapted)
                };
                if let Some(name) = one.whole().find(changed) {
                    let problem = format!(
                        "{name} is whole in {}, and {} has another",
                        one.path.display(),
                        two.path.display()
                    );
                    return Err(self.refuse(problem));
                }
            }
        }
        Ok(())
    }

    /// What it gives a parameter of the sum; `None` where it has no say.
    fn values(&self, id: ParamId, name: &str) -> Option<Result<Values, InferError>> {
        let spec = &self.model.model.units()[id.unit];
        let slot = spec.params.iter().position(|param| param.name == name)?;
        if !spec.params[slot].trained {
            return None;
        }
        let values = match self.model.store.gather(id.unit) {
            Ok(weights) => weights.at(slot).weight.dense().to_f32(),
            Err(error) => return Some(Err(error.into())),
        };
        let links = || spec.adapters.iter().map(|(_, lora)| lora);
        if links().any(|lora| lora.b == slot) {
            return Some(Ok(Values::Columns(values, spec.params[slot].shape[1])));
        }
        let gain = links()
            .find(|lora| lora.a == slot)
            .map(|lora: &Lora| lora.scale);
        let gain = gain.map_or(1.0, |scale| scale * self.weight) as f32;
        Some(Ok(Values::Rows(values.iter().map(|v| v * gain).collect())))
    }
}

/// A module's name, of that of its tensor in an adapter's file.
fn module_of(tensor: &str) -> &str {
    let name = tensor.strip_prefix("base_model.model.").unwrap_or(tensor);
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The settings of the sum: the ranks of a module add up, and its factors have their scales in them.
fn together(parts: &[Part<'_>]) -> Result<AdapterConfig, InferError> {
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    let mut config = AdapterConfig {
        file: "the adapters".into(),
        ..AdapterConfig::default()
    };
    for part in parts {
        let own = &part.adapter().config;
        for module in &part.adapter().modules {
            *ranks.entry(module.clone()).or_default() += own.rank_and_scale(module)?.0;
        }
        config
            .modules_to_save
            .extend(own.modules_to_save.iter().cloned());
        config.ensure_weight_tying |= own.ensure_weight_tying;
        config.fan_in_fan_out |= own.fan_in_fan_out;
        config.base_model_name_or_path = config
            .base_model_name_or_path
            .or_else(|| own.base_model_name_or_path.clone());
    }
    config.r = ranks.values().copied().max().unwrap_or(1);
    config.lora_alpha = config.r as f64;
    let others = ranks.iter().filter(|(_, r)| **r != config.r);
    let exact = |name: &str| name.replace('.', "\\.");
    config.rank_pattern = others.map(|(name, r)| (exact(name), *r)).collect();
    let alphas = config.rank_pattern.iter();
    config.alpha_pattern = alphas.map(|(name, r)| (name.clone(), *r as f64)).collect();
    config.target_modules = Targets::Names(ranks.into_keys().collect());
    Ok(config)
}
