//! Low-rank adapters: a transformation of a declared model.
//!
//! The adapted weights stay as they are and where they are, in whatever representation; their units get more parameters, and
//! a linear op applies what its weight is linked with. So an adapted model is the same model, in training and in
//! inference. Names, patterns and files are those of PEFT, and they speak of the modules of Hugging Face files: where
//! such a module holds several of our projections, they share one `A` and divide the rows of `B` among them.

mod config;
mod select;

pub use config::{AdapterConfig, Targets};

use crate::config::ModelError;
use crate::model::Model;
use crate::names::Naming;
use select::Selection;
use windlass_tensor::{FileTensor, Init, Layout, Lora, ParamId, ParamSpec, UnitSpec};

/// The name of an adapter's settings in its folder.
pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
/// The name of an adapter's tensors in its folder.
pub const ADAPTER_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts in front of a module's name.
const PREFIX: &str = "base_model.model.";

/// What an adapted model has that it had not before.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The settings.
    pub config: AdapterConfig,
    /// The tensors of its file: parameters of adapters, then modules that are saved whole. A table that is the head too is
    /// there twice, under the names of both.
    pub tensors: Vec<FileTensor>,
    /// The modules that are adapted, by their names in files.
    pub modules: Vec<String>,
    /// DoRA's magnitudes, each with the weight whose row norms they begin as.
    pub magnitudes: Vec<(ParamId, ParamId)>,
}

impl<B> Model<B> {
    /// Gives the matrices that `config` chooses adapters, and freezes everything else but `modules_to_save`. `naming` says
    /// what the modules are called in files.
    ///
    /// # Errors
    /// A name that matches no module (with those that exist), a module that cannot be adapted.
    ///
    /// # Panics
    /// When the model is adapted already.
    #[track_caller]
    pub fn adapt(&mut self, naming: Naming, config: &AdapterConfig) -> Result<Adapter, ModelError> {
        let fresh = self.units().iter().all(|unit| unit.adapters.is_empty());
        assert!(fresh, "a model is adapted once");
        let files = naming.file_tensors(self);
        let selection = Selection::new(config, naming, &files)?;
        let mut config = config.clone();
        config.ensure_weight_tying &= selection.ties();
        let mut adapter = Adapter {
            config,
            tensors: Vec::new(),
            modules: Vec::new(),
            magnitudes: Vec::new(),
        };
        let units = self.units_mut();
        for param in units.iter_mut().flat_map(|unit| &mut unit.params) {
            param.trained = false;
        }
        let mut saved = Vec::new();
        for file in &files {
            let module = module(&file.name);
            if selection.saves(module) {
                for id in &file.parts {
                    units[id.unit].params[id.slot].trained = true;
                }
                let head = selection.tied_head(module);
                let head = head.map(|head| file.name.replacen(module, head, 1));
                for name in std::iter::once(file.name.clone()).chain(head) {
                    saved.push(FileTensor {
                        name: format!("{PREFIX}{name}"),
                        ..file.clone()
                    });
                }
            } else if selection.adapts(module) && is_matrix(file) {
                let unit = &mut units[file.parts[0].unit];
                Parameters::of(file, module, &selection).declare(unit, &mut adapter);
            }
        }
        adapter.tensors.append(&mut saved);
        Ok(adapter)
    }
}

/// One module's adapter, about to be declared.
struct Parameters<'a> {
    file: &'a FileTensor,
    module: &'a str,
    r: usize,
    scale: f64,
    config: &'a AdapterConfig,
}

impl<'a> Parameters<'a> {
    fn of(file: &'a FileTensor, module: &'a str, selection: &Selection<'a>) -> Self {
        let (r, scale) = selection.rank_and_scale(module);
        Parameters {
            file,
            module,
            r,
            scale,
            config: selection.config,
        }
    }

    fn declare(&self, unit: &mut UnitSpec, adapter: &mut Adapter) {
        let (at, r) = (self.file.parts[0].unit, self.r);
        let inputs = unit.params[self.file.parts[0].slot].shape[1];
        // As PEFT fills them: Kaiming's uniform with a = √5, or a normal of 1/r.
        let init = match self.config.gaussian {
            true => Init::Normal(1.0 / r as f32),
            false => Init::Uniform((inputs as f32).powf(-0.5)),
        };
        let a = push(unit, self.name("lora_A.weight", None), &[r, inputs], init);
        let (mut b, mut magnitudes) = (Vec::new(), Vec::new());
        let mut links = unit.adapters.to_vec();
        for (index, base) in self.file.parts.iter().enumerate() {
            let part = (self.file.parts.len() > 1).then_some(index);
            let rows = unit.params[base.slot].shape[0];
            let name = self.name("lora_B.weight", part);
            b.push(push(unit, name, &[rows, r], Init::Zeros));
            if self.config.use_dora {
                let name = self.name("lora_magnitude_vector", part);
                magnitudes.push(push(unit, name, &[rows], Init::Ones));
            }
            links.push((
                base.slot,
                Lora {
                    a,
                    b: b[index],
                    magnitude: magnitudes.get(index).copied(),
                    scale: self.scale,
                    dropout: self.config.lora_dropout,
                },
            ));
        }
        unit.adapters = links.into();
        let id = |slot: usize| ParamId { unit: at, slot };
        let ids = |slots: &[usize]| slots.iter().map(|&slot| id(slot)).collect::<Vec<_>>();
        let layout = match self.file.layout {
            // What a file transposes is the adapted matrix alone.
            Layout::Transposed => Layout::Rows,
            other => other,
        };
        let mut tensor = |suffix: &str, parts: Vec<ParamId>, layout: Layout| {
            let rows = |id: &ParamId| unit.params[id.slot].shape[0];
            let mut shape = unit.params[parts[0].slot].shape.to_vec();
            shape[0] = parts.iter().map(rows).sum();
            adapter.tensors.push(FileTensor {
                name: self.name(suffix, None),
                shape: shape.as_slice().into(),
                parts,
                layout,
            });
        };
        tensor("lora_A.weight", vec![id(a)], Layout::Rows);
        tensor("lora_B.weight", ids(&b), layout);
        if !magnitudes.is_empty() {
            tensor("lora_magnitude_vector", ids(&magnitudes), layout);
        }
        let bases = self.file.parts.iter().copied();
        adapter
            .magnitudes
            .extend(ids(&magnitudes).into_iter().zip(bases));
        adapter.modules.push(self.module.to_owned());
    }

    /// The name of a tensor, or of the part of it that belongs to one of the module's projections.
    fn name(&self, suffix: &str, part: Option<usize>) -> String {
        let name = format!("{PREFIX}{}.{suffix}", self.module);
        part.map_or(name.clone(), |part| format!("{name}.{part}"))
    }
}

fn push(unit: &mut UnitSpec, name: String, shape: &[usize], init: Init) -> usize {
    unit.params.push(ParamSpec {
        name,
        shape: shape.into(),
        init,
        decay: true,
        trained: true,
    });
    unit.params.len() - 1
}

/// A module's name: that of its tensor without the last word.
fn module(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// Whether a tensor is the matrix of a projection.
fn is_matrix(file: &FileTensor) -> bool {
    file.name.ends_with(".weight") && matches!(file.shape[..], [_, _])
}
