//! Between files and weights: the tensors of a file are cut into parameters, and joined again.

use crate::atomic::RealDisk;
use crate::error::Result;
use crate::safetensors::{Dtype, Options, Spec, Tensors, write_folder};
use std::path::Path;
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, ParamId, Tensor, UnitSpec, Weight, Weights, each_dtype,
};

/// Reads the parameters of `units` from a file or folder of safetensors, converted to `dtype`.
///
/// `bare` gives the other name that a tensor may have in the file. Returns the weights and the names in the file that no
/// parameter asked for.
///
/// # Errors
/// A missing tensor (with the nearest name), another shape, a damaged file.
pub fn load_weights(
    cpu: &Cpu,
    tensors: &Tensors,
    units: &[UnitSpec],
    map: &[FileTensor],
    bare: impl for<'n> Fn(&'n str) -> Option<&'n str>,
    dtype: DType,
) -> Result<(Vec<Weights>, Vec<String>)> {
    let mut weights: Vec<Vec<Option<Weight>>> =
        units.iter().map(|u| vec![None; u.params.len()]).collect();
    let mut used = std::collections::BTreeSet::new();
    for file in map {
        let name = match bare(&file.name) {
            Some(other) if !tensors.contains(&file.name) && tensors.contains(other) => other,
            _ => &file.name,
        };
        used.insert(name);
        let view = tensors.get(name)?;
        view.expect_shape(&file.shape)?;
        each_dtype!(dtype, E => {
            let mut elements = vec![<E as Default>::default(); file.shape.len()];
            view.read_into(0..view.rows(), &mut elements)?;
            let rows = rows_of(units, &file.parts);
            for (id, part) in file.parts.iter().zip(file.split(&elements, &rows)) {
                let shape = units[id.unit].params[id.slot].shape;
                weights[id.unit][id.slot] = Some(Tensor::from_slice::<E>(cpu, &part, shape, Category::Weights).into());
            }
        });
    }
    let unused = tensors
        .names()
        .filter(|name| !used.contains(name))
        .map(String::from)
        .collect();
    let complete = |unit: Vec<Option<Weight>>| {
        unit.into_iter()
            .map(|w| w.expect("a file tensor for each parameter"))
    };
    Ok((
        weights
            .into_iter()
            .map(|unit| Weights::new(complete(unit).collect()))
            .collect(),
        unused,
    ))
}

fn rows_of(units: &[UnitSpec], parts: &[ParamId]) -> Vec<usize> {
    parts
        .iter()
        .map(|id| units[id.unit].params[id.slot].shape[0])
        .collect()
}

/// Writes parameters as a folder of safetensors (sharded beyond `options.max_shard_bytes`), in the file's names and
/// layouts. `values` gives the elements of a parameter in `f32`.
///
/// # Errors
/// The operating system's refusal to write; what was there before is untouched then.
pub fn save_weights(
    folder: &Path,
    units: &[UnitSpec],
    map: &[FileTensor],
    dtype: DType,
    options: &Options,
    mut values: impl FnMut(ParamId) -> Vec<f32>,
) -> Result<()> {
    let kind = match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F64 => Dtype::F64,
    };
    let specs: Vec<Spec> = map
        .iter()
        .map(|t| Spec::new(t.name.clone(), kind, t.shape.to_vec()))
        .collect();
    write_folder(&RealDisk, folder, &specs, options, |index, writer| {
        let file = &map[index];
        let parts: Vec<Vec<f32>> = file.parts.iter().map(|id| values(*id)).collect();
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        writer.values(&file.join(&parts, &rows_of(units, &file.parts)))
    })?;
    Ok(())
}

/// The elements of a dense weight in `f32`.
///
/// # Panics
/// On a packed weight.
#[track_caller]
pub fn elements(weight: &Weight) -> Vec<f32> {
    weight.dense().to_f32()
}
