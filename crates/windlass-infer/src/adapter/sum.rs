//! Several adapters at once: what they add to the weights adds up.
//!
//! Factors are put side by side, so the sum is one adapter whose product is the weighted sum of theirs; nothing else in a model
//! knows that there were several. They are added as files have them, on a model or without one.

use super::{AdapterFolder, Factors, PREFIX, file_tensor, write_adapter};
use crate::InferError;
use crate::loaded::LoadedModel;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use windlass_model::{AdapterConfig, Targets};
use windlass_tensor::{Category, FileTensor, ParamId, Tensor};

/// Adds up adapters' folders, each with how much of it counts, and writes their sum as one; returns its settings.
///
/// # Errors
/// As [`AdapterFolder::open`] and [`LoadedModel::add_adapters`]; whatever hinders writing.
pub fn write_sum(adapters: &[(PathBuf, f64)], out: &Path) -> Result<AdapterConfig, InferError> {
    let mut parts = Vec::with_capacity(adapters.len());
    for (path, weight) in adapters {
        let folder = AdapterFolder::open(path)?;
        parts.push(Part {
            path,
            weight: *weight,
            tensors: folder.values()?,
            config: folder.config,
        });
    }
    let (config, tensors) = sum(parts)?;
    write_adapter(out, &config, &tensors)?;
    Ok(config)
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
            let (config, tensors) = model.adapter_values()?;
            parts.push(Part {
                path,
                weight: *weight,
                config: config.clone(),
                tensors,
            });
        }
        let (config, tensors) = sum(parts)?;
        let named = tensors.into_iter().map(|(t, values)| (t.name, values));
        let tensors: BTreeMap<String, Vec<f32>> = named.collect();
        let adapter = self.model.adapt(self.config.naming, &config)?;
        let mut values: BTreeMap<ParamId, Vec<f32>> = BTreeMap::new();
        for file in &adapter.tensors {
            let rows = |id: &ParamId| self.model.units()[id.unit].params[id.slot].shape[0];
            let rows: Vec<usize> = file.parts.iter().map(rows).collect();
            let split = file.split(&tensors[&file.name], &rows);
            values.extend(file.parts.iter().copied().zip(split));
        }
        let cpu = self.store.cpu().clone();
        self.extend(adapter, &mut |id, param, dtype| {
            Ok(values.remove(&id).map(|values| {
                let values = Tensor::from_slice(&cpu, &values, param.shape, Category::Weights);
                values.cast(&cpu, dtype, Category::Weights)
            }))
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
        let (cpu, config) = (self.store.cpu(), self.config.clone());
        let model = Self::bare(cpu, config, self.weights()?, self.dtype, &self.folder);
        Ok(LoadedModel {
            kv_type: self.kv_type,
            ..model
        })
    }
}

/// One of several adapters, as its file has it.
struct Part<'a> {
    path: &'a Path,
    weight: f64,
    config: AdapterConfig,
    tensors: Factors,
}

impl Part<'_> {
    /// The tensors of factors, or those of modules that it has whole.
    fn names(&self, whole: bool) -> impl Iterator<Item = &str> {
        let names = self.tensors.iter().map(|(tensor, _)| tensor.name.as_str());
        names.filter(move |name| name.contains(".lora_") != whole)
    }

    /// The modules that have factors, by their names in the file.
    fn modules(&self) -> impl Iterator<Item = &str> {
        let module = |name| str::split_once(name, ".lora_").map(|(module, _)| module);
        self.names(false).filter_map(module)
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
        if self.config.use_dora {
            let problem = "DoRA's magnitudes replace norms: it stands alone, and counts whole";
            return Err(self.refuse(problem.into()));
        }
        if let Some(name) = self.names(true).next().filter(|_| self.weight != 1.0) {
            let problem = format!("has {name} whole, of which no part can be taken: it counts 1");
            return Err(self.refuse(problem));
        }
        for other in others {
            for (one, two) in [(self, other), (other, self)] {
                let changed = |name: &&str| {
                    let (module, _) = name.rsplit_once('.').unwrap_or((name, ""));
                    two.names(true).any(|t| t == *name) || two.modules().any(|m| m == module)
                };
                if let Some(name) = one.names(true).find(changed) {
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

    /// A module's `A`, `B`, rank and scale; `None` where it has none.
    fn factors(&self, module: &str) -> Result<Option<Pair<'_>>, InferError> {
        let find = |kind: &str| {
            let name = format!("{module}.{kind}.weight");
            self.tensors.iter().find(|(tensor, _)| tensor.name == name)
        };
        let pair = match (find("lora_A"), find("lora_B")) {
            (None, None) if !self.modules().any(|m| m == module) => return Ok(None),
            (Some((a, of_a)), Some((b, of_b))) => match (&a.shape[..], &b.shape[..]) {
                (&[rank, inputs], &[outputs, r]) if rank == r => Some(Pair {
                    a: of_a,
                    b: of_b,
                    rank,
                    shape: [outputs, inputs],
                    gain: (self.config.rank_and_scale(bare(module))?.1 * self.weight) as f32,
                }),
                _ => None,
            },
            _ => None,
        };
        let problem = || self.refuse(format!("{module} has no pair of factors"));
        pair.map(Some).ok_or_else(problem)
    }
}

/// A module's name in the model.
fn bare(module: &str) -> &str {
    module.strip_prefix(PREFIX).unwrap_or(module)
}

/// The factors of one module.
struct Pair<'a> {
    a: &'a [f32],
    b: &'a [f32],
    rank: usize,
    /// Of their product.
    shape: [usize; 2],
    /// What their product is multiplied with.
    gain: f32,
}

/// The adapter whose factors are those of all, side by side, with their scales in `A`.
fn sum(parts: Vec<Part<'_>>) -> Result<(AdapterConfig, Factors), InferError> {
    for (at, part) in parts.iter().enumerate() {
        part.adds_up(&parts[..at])?;
    }
    let modules: BTreeSet<&str> = parts.iter().flat_map(Part::modules).collect();
    let (mut ranks, mut tensors) = (Vec::new(), Factors::new());
    for module in modules {
        let mut pairs: Vec<Pair<'_>> = Vec::new();
        for part in &parts {
            let pair = part.factors(module)?;
            if pair
                .iter()
                .any(|pair| pairs.first().is_some_and(|p| p.shape != pair.shape))
            {
                return Err(part.refuse(format!("{module} has another shape than in others")));
            }
            pairs.extend(pair);
        }
        let rank = pairs.iter().map(|pair| pair.rank).sum();
        let [outputs, inputs] = pairs[0].shape;
        let a = pairs.iter().flat_map(|p| p.a.iter().map(|v| v * p.gain));
        let row = |row: usize| {
            pairs
                .iter()
                .flat_map(move |p| &p.b[row * p.rank..][..p.rank])
        };
        let mut put = |kind: &str, shape: [usize; 2], values: Vec<f32>| {
            let name = format!("{module}.{kind}.weight");
            tensors.push((file_tensor(name, &shape), values));
        };
        put("lora_A", [rank, inputs], a.collect());
        put(
            "lora_B",
            [outputs, rank],
            (0..outputs).flat_map(row).copied().collect(),
        );
        ranks.push((bare(module).to_owned(), rank));
    }
    let mut config = AdapterConfig {
        file: "the adapters".into(),
        r: ranks.iter().map(|(_, rank)| *rank).max().unwrap_or(1),
        ..AdapterConfig::default()
    };
    config.lora_alpha = config.r as f64;
    let others = ranks.iter().filter(|(_, r)| *r != config.r);
    let exact = |name: &str| name.replace('.', "\\.");
    config.rank_pattern = others.map(|(name, r)| (exact(name), *r)).collect();
    let alphas = config.rank_pattern.iter();
    config.alpha_pattern = alphas.map(|(name, r)| (name.clone(), *r as f64)).collect();
    config.target_modules = Targets::Names(ranks.into_iter().map(|(name, _)| name).collect());
    for part in parts {
        let own = part.config;
        config.modules_to_save.extend(own.modules_to_save);
        config.ensure_weight_tying |= own.ensure_weight_tying;
        config.fan_in_fan_out |= own.fan_in_fan_out;
        config.base_model_name_or_path = config
            .base_model_name_or_path
            .or(own.base_model_name_or_path);
        let whole = |(tensor, _): &(FileTensor, Vec<f32>)| !tensor.name.contains(".lora_");
        tensors.extend(part.tensors.into_iter().filter(whole));
    }
    Ok((config, tensors))
}
