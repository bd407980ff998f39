//! Adapters in GGUF files, as llama.cpp reads them: factors beside the names of the tensors they change, rows in the order
//! of these tensors, one `alpha` for all.

use crate::InferError;
use crate::convert::encode;
use crate::loaded::LoadedModel;
use std::collections::BTreeMap;
use std::path::Path;
use windlass_model::gguf::{Place, metadata, place};
use windlass_model::{AdapterConfig, Targets};
use windlass_store::atomic::Disk;
use windlass_store::gguf::{BlockType, File, Metadata, TensorInfo, Writer};
use windlass_tensor::kernels::blocks::dequantize;
use windlass_tensor::{Category, ParamId, Tensor};

/// What the factors are called behind the name of their tensor.
const A: &str = ".lora_a";
const B: &str = ".lora_b";

/// The factors of one tensor of a file: `A`, and the rows of `B` of each parameter that the tensor holds.
struct Pair {
    a: ParamId,
    scale: f64,
    parts: Vec<(Place, ParamId)>,
}

impl LoadedModel {
    /// Writes the adapter as a GGUF file with factors of a type, for this kind of model.
    ///
    /// # Errors
    /// What such files cannot say: DoRA, modules that are saved whole, adapted experts. Whatever hinders writing.
    ///
    /// # Panics
    /// When the model has no adapter.
    #[track_caller]
    pub fn save_adapter_gguf(
        &self,
        disk: &dyn Disk,
        out: &Path,
        block_type: BlockType,
    ) -> Result<(), InferError> {
        let adapter = self.adapter.as_ref().expect("a model with an adapter");
        let config = &adapter.config;
        if config.use_dora || !config.modules_to_save.is_empty() {
            let what = match config.use_dora {
                true => "DoRA's magnitudes",
                false => "modules that are saved whole",
            };
            return Err(self.unsaid(out, what));
        }
        let pairs = self.pairs(out)?;
        // One alpha serves all: `B` takes what differs from it.
        let usual = match config.use_rslora {
            true => config.lora_alpha / (config.r as f64).sqrt(),
            false => config.lora_alpha / config.r as f64,
        };
        // Readers take 0 for none.
        let alpha = if usual == 0.0 { 1.0 } else { usual } * config.r as f64;
        let mut keys = Metadata::new();
        keys.insert("general.architecture", metadata(&self.config)?.architecture);
        keys.insert("general.type", "adapter");
        keys.insert("adapter.type", "lora");
        keys.insert("adapter.lora.alpha", alpha as f32);
        if let Some(base) = &config.base_model_name_or_path {
            keys.insert("general.base_model.count", 1u32);
            keys.insert("general.base_model.0.name", base.as_str());
        }
        let shape = |id: ParamId| self.model.units()[id.unit].params[id.slot].shape.to_vec();
        let (mut infos, mut values) = (Vec::new(), Vec::new());
        for (name, pair) in &pairs {
            let a = shape(pair.a);
            let (r, rows) = (a[0], pair.parts.iter().map(|(_, b)| shape(*b)[0]));
            let mut b = vec![0f32; rows.sum::<usize>() * r];
            let gain = (pair.scale * r as f64 / alpha) as f32;
            for (place, id) in &pair.parts {
                let factor = self.factor(*id)?;
                let count = factor.len() / r;
                for (row, from) in factor.chunks(r).enumerate() {
                    let to = &mut b[place.row(row, count) * r..][..r];
                    to.iter_mut().zip(from).for_each(|(to, v)| *to = v * gain);
                }
            }
            let rows = b.len() / r;
            infos.push(TensorInfo::new(format!("{name}{A}"), a, block_type));
            values.push(self.factor(pair.a)?);
            infos.push(TensorInfo::new(format!("{name}{B}"), [rows, r], block_type));
            values.push(b);
        }
        let mut writer = Writer::create(disk, out, &keys, &infos)?;
        for (info, values) in infos.iter().zip(&values) {
            writer.write(&info.name, &encode(self.store.cpu(), info, values, None)?)?;
        }
        Ok(writer.finish()?)
    }

    fn factor(&self, id: ParamId) -> Result<Vec<f32>, InferError> {
        let weights = self.store.gather(id.unit)?;
        Ok(weights.at(id.slot).weight.dense().to_f32())
    }

    fn unsaid(&self, path: &Path, what: &str) -> InferError {
        InferError::Adapter {
            path: path.to_owned(),
            problem: format!("a GGUF adapter cannot hold {what}"),
            hint: "merge the adapter and convert the merged model instead".into(),
        }
    }

    /// The adapted tensors of a file of the model.
    fn pairs(&self, path: &Path) -> Result<BTreeMap<String, Pair>, InferError> {
        let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
        for (unit, spec) in self.model.units().iter().enumerate() {
            let id = |slot: usize| ParamId { unit, slot };
            for (slot, lora) in spec.adapters.iter() {
                let param = &spec.params[*slot];
                let place = place(&self.config, &param.name, param.shape[0]);
                if place.tensor.contains("_exps.") {
                    return Err(self.unsaid(path, "the adapters of experts"));
                }
                let pair = pairs.entry(place.tensor.clone()).or_insert(Pair {
                    a: id(lora.a),
                    scale: lora.scale,
                    parts: Vec::new(),
                });
                if pair.a != id(lora.a) {
                    let what = format!("several adapters of {}", place.tensor);
                    return Err(self.unsaid(path, &what));
                }
                pair.parts.push((place, id(lora.b)));
            }
        }
        Ok(pairs)
    }

    /// Applies the adapter of a GGUF file, without changing the weights of the model.
    ///
    /// # Errors
    /// A file that holds no adapter, or one for another model.
    pub(super) fn add_gguf_adapter(&mut self, path: &Path) -> Result<(), InferError> {
        let file = File::open(path)?;
        let refuse = |problem: String| {
            InferError::Adapter {
            path: path.to_owned(),
            problem,
            hint: "give an adapter for this model: convert_lora_to_gguf and windlass adapter convert make such files".into(),
        }
        };
        let keys = file.metadata();
        let kind = (keys.get_str("general.type")?, keys.get_str("adapter.type")?);
        if kind != (Some("adapter"), Some("lora")) {
            return Err(refuse("is no LoRA adapter".into()));
        }
        let own = metadata(&self.config)?.architecture;
        let other = keys.get_str("general.architecture")?;
        if let Some(other) = other.filter(|other| *other != own) {
            let problem = format!("is for the architecture {other}, the model's is {own}");
            return Err(refuse(problem));
        }
        let alpha = keys.get_f32("adapter.lora.alpha")?.map_or(0.0, f64::from);
        let holds = self.holds();
        let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
        for info in file.tensors() {
            let Some(tensor) = info.name.strip_suffix(A) else {
                let partner = info
                    .name
                    .strip_suffix(B)
                    .map(|tensor| format!("{tensor}{A}"));
                match partner.is_some_and(|a| file.contains(&a)) {
                    true => continue,
                    false => {
                        return Err(refuse(format!("{} has no place in an adapter", info.name)));
                    }
                }
            };
            check(&file, info, self, &holds).map_err(refuse)?;
            ranks.insert(tensor.to_owned(), info.rows());
        }
        let config = self.gguf_config(path, &ranks, &holds, alpha);
        let adapter = self.model.adapt(self.config.naming, &config)?;
        let mut sources: BTreeMap<ParamId, (String, Option<Place>)> = BTreeMap::new();
        for (unit, spec) in self.model.units().iter().enumerate() {
            for (slot, lora) in spec.adapters.iter() {
                let id = |slot: usize| ParamId { unit, slot };
                let param = &spec.params[*slot];
                let place = place(&self.config, &param.name, param.shape[0]);
                sources.insert(id(lora.a), (format!("{}{A}", place.tensor), None));
                sources.insert(id(lora.b), (format!("{}{B}", place.tensor), Some(place)));
            }
        }
        let cpu = self.store.cpu().clone();
        self.extend(adapter, &mut |id, param, dtype| {
            let Some((name, place)) = sources.get(&id) else {
                return Ok(None);
            };
            let info = file.tensor(name)?;
            let mut values = vec![0f32; info.elements()];
            dequantize(info.block_type, file.bytes(name)?, &mut values);
            if let Some(place) = place {
                let (rows, r) = (param.shape[0], param.shape[1]);
                let row = |row: usize| &values[place.row(row, rows) * r..][..r];
                values = (0..rows).flat_map(|n| row(n).to_vec()).collect();
            }
            let values = Tensor::from_slice(&cpu, &values, param.shape, Category::Weights);
            Ok(Some(values.cast(&cpu, dtype, Category::Weights)))
        })
    }

    /// The parameters that each tensor of a file of the model holds.
    fn holds(&self) -> BTreeMap<String, Vec<(ParamId, Place)>> {
        let mut holds: BTreeMap<String, Vec<(ParamId, Place)>> = BTreeMap::new();
        for (unit, spec) in self.model.units().iter().enumerate() {
            for (slot, param) in spec.params.iter().enumerate() {
                let place = place(&self.config, &param.name, param.shape[0]);
                let at = holds.entry(place.tensor.clone()).or_default();
                at.push((ParamId { unit, slot }, place));
            }
        }
        holds
    }

    /// The settings that PEFT would have for factors of some ranks.
    fn gguf_config(
        &self,
        path: &Path,
        ranks: &BTreeMap<String, usize>,
        holds: &BTreeMap<String, Vec<(ParamId, Place)>>,
        alpha: f64,
    ) -> AdapterConfig {
        let mut modules: Vec<(String, usize)> = Vec::new();
        for file in self.config.naming.file_tensors(&self.model) {
            let rank = ranks.iter().find(|(tensor, _)| {
                let parts = &holds[*tensor];
                parts.iter().any(|(id, _)| file.parts.contains(id))
            });
            if let (Some((_, rank)), Some(module)) = (rank, file.name.strip_suffix(".weight")) {
                modules.push((module.to_owned(), *rank));
            }
        }
        let usual = modules.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
        let exact = |name: &str| name.replace('.', "\\.");
        let others = modules.iter().filter(|(_, rank)| *rank != usual);
        let others: Vec<(String, usize)> = others.map(|(name, r)| (exact(name), *r)).collect();
        // Without an alpha the product counts as it is.
        let plain = alpha == 0.0;
        AdapterConfig {
            file: path.display().to_string(),
            r: usual,
            lora_alpha: if plain { usual as f64 } else { alpha },
            alpha_pattern: match plain {
                true => others.iter().map(|(n, r)| (n.clone(), *r as f64)).collect(),
                false => Vec::new(),
            },
            rank_pattern: others,
            target_modules: Targets::Names(modules.into_iter().map(|(name, _)| name).collect()),
            ..AdapterConfig::default()
        }
    }
}

/// Checks that a pair of factors fits its tensor.
fn check(
    file: &File,
    a: &TensorInfo,
    model: &LoadedModel,
    holds: &BTreeMap<String, Vec<(ParamId, Place)>>,
) -> Result<(), String> {
    let tensor = a.name.trim_end_matches(A);
    let parts = holds
        .get(tensor)
        .ok_or(format!("{tensor} has no place in the model"))?;
    let b = file
        .tensor(&format!("{tensor}{B}"))
        .map_err(|_| format!("{tensor}{B} is missing"))?;
    let shape = |id: &ParamId| model.model.units()[id.unit].params[id.slot].shape;
    let (first, rows) = (
        shape(&parts[0].0),
        parts.iter().map(|(id, _)| shape(id)[0]).sum::<usize>(),
    );
    if first.len() == first[0] || tensor.contains("_exps.") || tensor.starts_with("token_embd") {
        return Err(format!("{tensor} is no matrix that is adapted here"));
    }
    let fits = a.shape.len() == 2
        && b.shape.len() == 2
        && a.shape[1] == first[1]
        && b.shape == [rows, a.shape[0]];
    match fits {
        true => Ok(()),
        false => Err(format!(
            "{tensor}: factors {:?} and {:?} of a matrix [{rows}, {}]",
            a.shape, b.shape, first[1]
        )),
    }
}
