//! Adapters made of differences: what full fine-tuning changed, or what packing lost (LoftQ).
//!
//! Matrices are compared as files hold them, since that is what PEFT's adapters speak of: a fused module is one matrix.

use super::low_rank::{low_rank, multiplied};
use super::{Factors, PREFIX, file_tensor, plain, write_adapter};
use crate::InferError;
use crate::loaded::{LoadedModel, find_folder};
use std::path::Path;
use windlass_model::{Adapter, AdapterConfig, DecoderConfig, decoder};
use windlass_store::Loader;
use windlass_store::safetensors::Tensors;
use windlass_tensor::kernels::packed;
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, Layout, Packed, ParamId, Tensor, Weight, Weights,
};

/// What a new adapter says of the differences that it was made of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extracted {
    /// Modules that are adapted.
    pub modules: usize,
    /// Norm of the differences of their matrices.
    pub change: f64,
    /// Norm of what the adapter leaves of them.
    pub rest: f64,
    /// Tensors without an adapter that differ too: nothing says how.
    pub others: Vec<String>,
}

impl LoadedModel {
    /// Writes the adapter by which `tuned` differs from this model, as near as its ranks allow.
    ///
    /// # Errors
    /// Models of other shapes; modules that do not exist; whatever hinders writing.
    pub fn extract_adapter(
        &self,
        tuned: &LoadedModel,
        config: &AdapterConfig,
        folder: &Path,
    ) -> Result<Extracted, InferError> {
        let map = self.config.naming.file_tensors(&self.model);
        let other = tuned.config.naming.file_tensors(&tuned.model);
        let differs = |(a, b): (&FileTensor, &FileTensor)| (&a.name, a.shape) != (&b.name, b.shape);
        let wrong = map.iter().zip(&other).find(|pair| differs(*pair));
        if wrong.is_some() || map.len() != other.len() {
            let problem = match wrong {
                Some((a, b)) => format!(
                    "the models do not fit: {} {} against {} {}",
                    a.name, a.shape, b.name, b.shape
                ),
                None => format!("{} tensors against {}", map.len(), other.len()),
            };
            return Err(InferError::Adapter {
                path: tuned.folder.clone(),
                problem,
                hint: "an adapter is the difference of two versions of one model".into(),
            });
        }
        let adapter = self.declared(config)?;
        let (mut told, mut tensors) = (Extracted::default(), Factors::new());
        for (file, other) in map.iter().zip(&other) {
            let change = difference(&tuned.file_values(other)?, &self.file_values(file)?);
            match matrix_of(&adapter, file) {
                Some(module) => {
                    let cpu = self.store.cpu();
                    let made = factors(cpu, file, &change, (config, module), &mut tensors)?;
                    told.modules += 1;
                    told.change += norm_squared(&change);
                    told.rest += norm_squared(&difference(&change, &made));
                }
                None if change.iter().any(|&v| v != 0.0) => told.others.push(file.name.clone()),
                None => {}
            }
        }
        (told.change, told.rest) = (told.change.sqrt(), told.rest.sqrt());
        write_adapter(folder, config, &tensors)?;
        Ok(told)
    }

    /// Writes an adapter that makes up for what packing has taken from the matrices of the Hugging Face folder `given`,
    /// from which this model was opened. With more than one of `iterations`, what is packed is what the adapter leaves, and
    /// so on in turn: this model's matrices change then.
    ///
    /// # Source
    /// Li et al. 2023, "LoftQ".
    ///
    /// # Errors
    /// A folder without these matrices in plain numbers; matrices that are not packed.
    pub fn loftq(
        &mut self,
        given: &Path,
        config: &AdapterConfig,
        iterations: usize,
        folder: &Path,
    ) -> Result<Extracted, InferError> {
        let refuse = |problem: &str| {
            InferError::Adapter {
            path: given.to_owned(),
            problem: problem.into(),
            hint: "LoftQ starts from plain weights that are packed as they are loaded: a Hugging Face folder that is not quantized, with --method qlora".into(),
        }
        };
        if config.use_dora || !config.modules_to_save.is_empty() {
            return Err(refuse(
                "DoRA and modules that are saved whole have no place in LoftQ",
            ));
        }
        if !given.is_dir() {
            return Err(refuse("is not a folder"));
        }
        let original = find_folder(given, &mut Vec::new())?;
        if DecoderConfig::load_quantized(&original)?.1.is_some() {
            return Err(refuse("is quantized already"));
        }
        let tensors = Tensors::open(&original)?;
        let (cpu, naming) = (self.store.cpu().clone(), self.config.naming);
        let (units, map) = (
            self.model.units().to_vec(),
            naming.file_tensors(&self.model),
        );
        let mut loader = Loader::new(&cpu, &tensors, &units, &map, |name| naming.bare_name(name));
        let adapter = self.declared(config)?;
        let (mut told, mut made) = (Extracted::default(), Factors::new());
        let mut packed: Vec<(ParamId, Packed)> = Vec::new();
        for file in &map {
            let Some(module) = matrix_of(&adapter, file) else {
                continue;
            };
            let layouts = self.layouts(file)?;
            let layouts = layouts.ok_or_else(|| refuse(&format!("{module} is not packed")))?;
            let whole = |id: ParamId| 0..units[id.unit].params[id.slot].shape.len();
            let mut plain = |id| Ok(loader.read(id, whole(id), DType::F32)?.to_f32());
            let want = self.joined(file, &mut plain)?;
            let error = difference(&want, &self.file_values(file)?);
            told.change += norm_squared(&error);
            told.modules += 1;
            let mut out = Factors::new();
            let mut near = factors(&cpu, file, &error, (config, module), &mut out)?;
            let mut rest = difference(&error, &near);
            for _ in 1..iterations {
                let again = self.packed_again(file, &difference(&want, &near), &layouts);
                let error = difference(&want, &again.0);
                out.clear();
                near = factors(&cpu, file, &error, (config, module), &mut out)?;
                rest = difference(&error, &near);
                packed.retain(|(id, _)| !file.parts.contains(id));
                packed.extend(again.1);
            }
            told.rest += norm_squared(&rest);
            made.append(&mut out);
        }
        self.replace(packed);
        (told.change, told.rest) = (told.change.sqrt(), told.rest.sqrt());
        write_adapter(folder, config, &made)?;
        Ok(told)
    }

    /// How the parts of a tensor are packed; `None` where one is not.
    fn layouts(&self, file: &FileTensor) -> Result<Option<Vec<packed::Layout>>, InferError> {
        let mut layouts = Vec::new();
        for id in &file.parts {
            match self.store.gather(id.unit)?.at(id.slot).weight {
                Weight::Packed(packed) => layouts.push(*packed.matrix().layout()),
                Weight::Dense(_) => return Ok(None),
            }
        }
        Ok(Some(layouts))
    }

    /// The elements of a tensor after its parts were packed, and the packed parts.
    fn packed_again(
        &self,
        file: &FileTensor,
        values: &[f32],
        layouts: &[packed::Layout],
    ) -> (Vec<f32>, Vec<(ParamId, Packed)>) {
        let cpu = self.store.cpu();
        let shape = |id: &ParamId| self.model.units()[id.unit].params[id.slot].shape;
        let rows: Vec<usize> = file.parts.iter().map(|id| shape(id)[0]).collect();
        let (mut parts, mut numbers) = (Vec::new(), Vec::new());
        let split = file.split(values, &rows);
        for ((id, values), &layout) in file.parts.iter().zip(split).zip(layouts) {
            let tensor = Tensor::from_slice(cpu, &values, shape(id), Category::Workspace);
            let new = Packed::quantize(cpu, layout, &tensor);
            let plain = new.unpack_rows(cpu, 0..shape(id)[0], DType::F32);
            numbers.push(plain.to_f32());
            parts.push((*id, new));
        }
        let numbers: Vec<&[f32]> = numbers.iter().map(Vec::as_slice).collect();
        (file.join(&numbers, &rows), parts)
    }

    /// The adapter that settings declare on this kind of model.
    fn declared(&self, config: &AdapterConfig) -> Result<Adapter, InferError> {
        Ok(decoder(&self.config).adapt(self.config.naming, config)?)
    }

    /// The elements of a tensor as files have it.
    fn file_values(&self, file: &FileTensor) -> Result<Vec<f32>, InferError> {
        let cpu = self.store.cpu();
        let mut of = |id: ParamId| {
            let weight = self.store.gather(id.unit)?.at(id.slot).weight.clone();
            Ok(plain(cpu, weight, DType::F32).to_f32())
        };
        self.joined(file, &mut of)
    }

    /// Puts packed matrices in the place of others.
    fn replace(&mut self, packed: Vec<(ParamId, Packed)>) {
        if packed.is_empty() {
            return;
        }
        let cpu = self.store.cpu().clone();
        let empty = windlass_store::Store::new(&cpu, &[], Vec::new());
        let mut weights: Vec<Weights> = std::mem::replace(&mut self.store, empty).into_weights();
        for (id, new) in packed {
            let old = weights[id.unit].iter_mut().nth(id.slot);
            *old.expect("a parameter of the unit") = Weight::Packed(new);
        }
        self.store = windlass_store::Store::new(&cpu, self.model.units(), weights);
    }
}

/// The module whose matrix a tensor is, where it is adapted.
fn matrix_of<'f>(adapter: &Adapter, file: &'f FileTensor) -> Option<&'f str> {
    let module = file.name.strip_suffix(".weight")?;
    adapter
        .modules
        .iter()
        .any(|m| m == module)
        .then_some(module)
}

fn difference(a: &[f32], b: &[f32]) -> Vec<f32> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn norm_squared(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// The factors of a module's change, to `tensors`; returns what they make of it, in the order of the file.
fn factors(
    cpu: &Cpu,
    file: &FileTensor,
    change: &[f32],
    (config, module): (&AdapterConfig, &str),
    tensors: &mut Factors,
) -> Result<Vec<f32>, InferError> {
    let transposed = file.layout == Layout::Transposed;
    let [rows, cols] = [file.shape[0], file.shape[1]];
    let ([n, k], matrix) = match transposed {
        true => ([cols, rows], turned(change, [rows, cols])),
        false => ([rows, cols], change.to_vec()),
    };
    let (rank, scale) = config.rank_and_scale(module)?;
    let (mut b, a) = low_rank(cpu, &matrix, [n, k], rank);
    let made = multiplied(cpu, &b, &a, [n, k]);
    b.iter_mut()
        .for_each(|v| *v = (f64::from(*v) / scale) as f32);
    let mut put = |kind: &str, shape: [usize; 2], values: Vec<f32>| {
        let name = format!("{PREFIX}{module}.{kind}.weight");
        tensors.push((file_tensor(name, &shape), values));
    };
    put("lora_A", [rank, k], a);
    put("lora_B", [n, rank], b);
    Ok(match transposed {
        true => turned(&made, [n, k]),
        false => made,
    })
}

/// The transpose of a matrix.
fn turned(values: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    let of = |at: usize| values[at % rows * cols + at / rows];
    (0..values.len()).map(of).collect()
}
