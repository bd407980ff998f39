//! Between files and weights: the tensors of a file are cut into parameters, and joined again.

use crate::atomic::RealDisk;
use crate::error::Result;
use crate::safetensors::{Dtype, Options, Spec, Tensors, Value, View, write_folder};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use windlass_tensor::kernels::Element;
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, Layout, ParamId, Shape, Tensor, UnitSpec, Weight, Weights,
    each_dtype,
};

/// Reads parameters out of a file or folder of safetensors, converted to a storage type: whole, or the part that a rank
/// owns.
pub struct Loader<'a> {
    cpu: &'a Cpu,
    tensors: &'a Tensors,
    units: &'a [UnitSpec],
    map: &'a [FileTensor],
    /// For each parameter, the tensor of the file that holds it and its place there.
    places: BTreeMap<(usize, usize), (usize, usize)>,
    /// The name of each tensor in this file.
    names: Vec<&'a str>,
}

impl<'a> Loader<'a> {
    /// A loader of the parameters of `units`. `bare` gives the other name that a tensor may have in the file.
    pub fn new(
        cpu: &'a Cpu,
        tensors: &'a Tensors,
        units: &'a [UnitSpec],
        map: &'a [FileTensor],
        bare: impl for<'n> Fn(&'n str) -> Option<&'n str>,
    ) -> Self {
        let name = |file: &'a FileTensor| match bare(&file.name) {
            Some(other) if !tensors.contains(&file.name) && tensors.contains(other) => other,
            _ => &file.name,
        };
        let places = map.iter().enumerate().flat_map(|(index, file)| {
            let place = move |(part, id): (usize, &ParamId)| ((id.unit, id.slot), (index, part));
            file.parts.iter().enumerate().map(place)
        });
        Loader {
            cpu,
            tensors,
            units,
            map,
            places: places.collect(),
            names: map.iter().map(name).collect(),
        }
    }

    /// The elements `range` of a parameter, as a vector. Where the file holds them in order, no others are read.
    ///
    /// # Errors
    /// A missing tensor (with the nearest name), another shape, a damaged file.
    ///
    /// # Panics
    /// When no tensor of the map holds the parameter.
    #[track_caller]
    pub fn read(&mut self, id: ParamId, range: Range<usize>, dtype: DType) -> Result<Tensor> {
        let (index, part) = self.places[&(id.unit, id.slot)];
        let file = &self.map[index];
        let view = self.tensors.get(self.names[index])?;
        view.expect_shape(&file.shape)?;
        let rows = rows_of(self.units, &file.parts);
        let mut out = Tensor::empty(self.cpu, [range.len()], dtype, Category::Weights);
        each_dtype!(dtype, E => {
            let out = out.as_mut_slice::<E>();
            if file.layout == Layout::Rows {
                let cols = file.shape.len() / rows.iter().sum::<usize>().max(1);
                let start = rows[..part].iter().sum::<usize>() * cols;
                read_run(&view, start + range.start..start + range.end, out)?;
            } else {
                let mut elements = vec![<E as Default>::default(); file.shape.len()];
                view.read_into(0..view.rows(), &mut elements)?;
                out.copy_from_slice(&file.split(&elements, &rows)[part][range]);
            }
        });
        Ok(out)
    }

    /// The names in the file that no parameter asks for.
    pub fn unused(&self) -> Vec<String> {
        let used: BTreeSet<&str> = self.names.iter().copied().collect();
        let unused = self.tensors.names().filter(|name| !used.contains(name));
        unused.map(String::from).collect()
    }
}

/// Reads a run of a tensor's elements.
fn read_run<E: Element + Value>(view: &View<'_>, run: Range<usize>, out: &mut [E]) -> Result<()> {
    let count = view.rows();
    if run.is_empty() || count == 0 {
        return Ok(());
    }
    let cols = view.elements() / count;
    let (first, last) = (run.start / cols, run.end.div_ceil(cols));
    if run.start == first * cols && run.end == last * cols {
        return view.read_into(first..last, out);
    }
    let mut rows = vec![<E as Default>::default(); (last - first) * cols];
    view.read_into(first..last, &mut rows)?;
    out.copy_from_slice(&rows[run.start - first * cols..run.end - first * cols]);
    Ok(())
}

/// Reads all parameters of `units`, converted to `dtype`. Returns the weights and the names in the file that no
/// parameter asked for.
///
/// # Errors
/// As [`Loader::read`].
pub fn load_weights(
    cpu: &Cpu,
    tensors: &Tensors,
    units: &[UnitSpec],
    map: &[FileTensor],
    bare: impl for<'n> Fn(&'n str) -> Option<&'n str>,
    dtype: DType,
) -> Result<(Vec<Weights>, Vec<String>)> {
    let mut loader = Loader::new(cpu, tensors, units, map, bare);
    let mut read = |unit: usize, slot: usize, shape: &Shape| {
        let id = ParamId { unit, slot };
        let values = loader.read(id, 0..shape.len(), dtype)?;
        Ok(values.reshape(*shape).into())
    };
    let mut all = Vec::with_capacity(units.len());
    for (unit, spec) in units.iter().enumerate() {
        let params = spec.params.iter().enumerate();
        let weights: Result<Vec<Weight>> = params.map(|(s, p)| read(unit, s, &p.shape)).collect();
        all.push(Weights::new(weights?));
    }
    Ok((all, loader.unused()))
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
        DType::F16 => Dtype::F16,
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
