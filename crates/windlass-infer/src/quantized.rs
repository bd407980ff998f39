//! Checkpoints whose matrices are quantized already: GPTQ, AWQ and compressed-tensors, packed as they are read.
//!
//! Codes, scales and zeros become those of a packed matrix, number for number: nothing is rounded again but scales that are
//! no `f16`. Where groups are made of inputs that are not neighbors, inputs are put in the order of their groups, and the
//! packed matrix knows that order.

mod config;
mod stored;

pub use config::{Gptq, Quantization, Scheme};

use crate::InferError;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use stored::{Place, Stored};
use windlass_model::Naming;
use windlass_store::safetensors::{Dtype, Tensors, View};
use windlass_tensor::{Cpu, FileTensor, Layout, Packed, UnitSpec, f16};

/// What a module's tensors are called, after its name.
const PARTS: [&str; 10] = [
    "weight",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
];

/// The quantized matrices of a checkpoint.
pub(crate) struct Checkpoint<'a> {
    tensors: &'a Tensors,
    quantization: Quantization,
    naming: Naming,
    /// The last order of columns: matrices with the same input have the same, and share it.
    order: RefCell<Option<Arc<[u32]>>>,
}

/// A matrix in the file: the names of its tensors, outputs and inputs.
struct Module {
    names: [String; PARTS.len()],
    outputs: usize,
    inputs: usize,
}

impl Module {
    /// The name of one of [`PARTS`].
    fn name(&self, part: &str) -> &str {
        let index = PARTS.iter().position(|other| *other == part);
        &self.names[index.expect("a part of a module")]
    }
}

impl<'a> Checkpoint<'a> {
    /// The matrices of `tensors`.
    pub fn new(tensors: &'a Tensors, quantization: Quantization, naming: Naming) -> Self {
        Checkpoint {
            tensors,
            quantization,
            naming,
            order: RefCell::new(None),
        }
    }

    /// The name of the module whose quantized matrix stands for a tensor.
    fn module<'f>(&self, file: &'f FileTensor) -> Option<&'f str> {
        let name = file.name.strip_suffix(".weight")?;
        let here = |name: &&str| match self.quantization {
            Quantization::Gptq(_) | Quantization::Awq { .. } => {
                self.tensors.contains(&format!("{name}.qweight"))
            }
            Quantization::CompressedTensors { .. } => {
                let weight = self.tensors.get(&format!("{name}.weight")).map(|v| v.dtype);
                self.tensors.contains(&format!("{name}.weight_packed"))
                    || matches!(weight, Ok(Dtype::I8))
            }
        };
        let names = [Some(name), self.naming.bare_name(name)];
        names.into_iter().flatten().find(here)
    }

    /// Whether a tensor is stored as a quantized matrix.
    pub fn has(&self, file: &FileTensor) -> bool {
        self.module(file).is_some()
    }

    /// The quantized matrices of a unit, by slot.
    ///
    /// # Errors
    /// Tensors that are missing, damaged or of a shape or type that the configuration does not lead to; groups that no
    /// order of the inputs makes blocks of.
    pub fn read(
        &self,
        cpu: &Cpu,
        unit: &UnitSpec,
        map: &[FileTensor],
    ) -> Result<Vec<(usize, Packed)>, InferError> {
        let mut packed = Vec::new();
        for file in map {
            let Some(name) = self.module(file) else {
                continue;
            };
            let shape = |part: usize| unit.params[file.parts[part].slot].shape.to_vec();
            let rows: Vec<usize> = (0..file.parts.len()).map(|part| shape(part)[0]).collect();
            let [_, inputs] = shape(0)[..] else {
                let problem = "is quantized where the model has a vector";
                return Err(self.refuse(&file.name, problem));
            };
            let module = Module {
                names: PARTS.map(|part| format!("{name}.{part}")),
                outputs: rows.iter().sum(),
                inputs,
            };
            let stored = match &self.quantization {
                Quantization::Gptq(gptq) => self.gptq(gptq, &module)?,
                _ if file.layout == Layout::Transposed => {
                    let problem = "is quantized, and stored transposed by this architecture";
                    return Err(self.refuse(&file.name, problem));
                }
                Quantization::Awq { group } => self.awq(*group, &module)?,
                Quantization::CompressedTensors { schemes } => {
                    self.compressed_tensors(schemes, &module)?
                }
            };
            let Some(mut arranged) = stored.arrange() else {
                let problem = "has groups that are not blocks of 32 inputs, in whatever order";
                return Err(self.refuse(&file.name, problem));
            };
            arranged.order = arranged.order.map(|order| self.share(order));
            let mut outputs = vec![Vec::new(); rows.len()];
            for (part, row) in file.order(&rows) {
                outputs[part].push(row as u32);
            }
            for (part, outputs) in file.parts.iter().zip(outputs) {
                packed.push((part.slot, stored.pack(cpu, &arranged, &outputs)));
            }
        }
        Ok(packed)
    }

    fn share(&self, order: Arc<[u32]>) -> Arc<[u32]> {
        let mut last = self.order.borrow_mut();
        match &*last {
            Some(last) if *last == order => last.clone(),
            _ => last.insert(order).clone(),
        }
    }

    /// The names of the tensors that quantized matrices are made of, and of biases of zeros beside them, which some programs
    /// write to models without biases.
    ///
    /// # Errors
    /// A bias that cannot be read.
    pub fn tensors_of(&self, map: &[FileTensor]) -> Result<BTreeSet<String>, InferError> {
        let mut names = BTreeSet::new();
        for module in map.iter().filter_map(|file| self.module(file)) {
            names.extend(PARTS.map(|part| format!("{module}.{part}")));
            let bias = format!("{module}.bias");
            if self.tensors.contains(&bias) {
                let view = self.tensors.get(&bias)?;
                let mut values = vec![0f32; view.elements()];
                view.read_into(0..view.rows(), &mut values)?;
                if values.iter().all(|&value| value == 0.0) {
                    names.insert(bias);
                }
            }
        }
        Ok(names)
    }

    fn refuse(&self, tensor: &str, problem: impl std::fmt::Display) -> InferError {
        InferError::NoModel {
            path: self.tensors.path().to_owned(),
            problem: format!("tensor {tensor} {problem}"),
            hint: "the file is damaged or does not belong to its configuration; or load the unquantized model \
                   with --load-in q4"
                .to_owned(),
        }
    }

    /// A tensor of a type.
    fn typed<'n>(&'n self, name: &'n str, dtype: Dtype) -> Result<View<'n>, InferError> {
        let view = self.tensors.get(name)?;
        if view.dtype != dtype {
            let problem = format!("is {} where {dtype} is expected", view.dtype);
            return Err(self.refuse(name, problem));
        }
        Ok(view)
    }

    /// The bytes of a tensor of 32-bit words, or of signed bytes.
    fn codes<'n>(
        &'n self,
        name: &'n str,
        dtype: Dtype,
        shape: [usize; 2],
    ) -> Result<&'n [u8], InferError> {
        let view = self.typed(name, dtype)?;
        view.expect_shape(&shape)?;
        Ok(view.bytes)
    }

    /// Scales, as `f16`.
    fn scales(&self, view: &View<'_>, name: &str) -> Result<Vec<f16>, InferError> {
        let mut values = vec![0f32; view.elements()];
        view.read_into(0..view.rows(), &mut values)?;
        let scales: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
        match scales.iter().position(|scale| !scale.is_finite()) {
            Some(at) => {
                let problem = format!("has the scale {}, which no f16 holds", values[at]);
                Err(self.refuse(name, problem))
            }
            None => Ok(scales),
        }
    }

    /// The group of each input: what the tensor `name` says where there is one, or neighbors.
    fn groups(
        &self,
        name: &str,
        inputs: usize,
        count: usize,
        group: Option<usize>,
    ) -> Result<Vec<u32>, InferError> {
        if self.tensors.contains(name) {
            let view = self.typed(name, Dtype::I32)?;
            let words = view.bytes.as_chunks::<4>().0.iter();
            let groups: Vec<i32> = words.map(|word| i32::from_le_bytes(*word)).collect();
            // Nothing, or -1 everywhere, stands for neighbors.
            if groups.iter().any(|&group| group != -1) {
                view.expect_shape(&[inputs])?;
                let known =
                    |group: i32| u32::try_from(group).ok().filter(|&g| (g as usize) < count);
                let checked: Option<Vec<u32>> = groups.into_iter().map(known).collect();
                let problem = format!("names a group that is none of the {count} with a scale");
                return checked.ok_or_else(|| self.refuse(name, problem));
            }
        }
        let group = group.unwrap_or(inputs);
        if inputs.div_ceil(group) != count {
            let problem =
                format!("is missing: {count} scales for {inputs} inputs are not one for {group}");
            return Err(self.refuse(name, problem));
        }
        Ok((0..inputs).map(|input| (input / group) as u32).collect())
    }

    /// Words of a run of codes.
    fn words(&self, name: &str, codes: usize, bits: usize) -> Result<usize, InferError> {
        if (codes * bits).is_multiple_of(32) {
            return Ok(codes * bits / 32);
        }
        let problem = format!("packs {codes} codes of {bits} bits, which do not fill 32-bit words");
        Err(self.refuse(name, problem))
    }

    fn gptq<'n>(&'n self, settings: &Gptq, module: &'n Module) -> Result<Stored<'n>, InferError> {
        let (outputs, inputs) = (module.outputs, module.inputs);
        let [codes, zeros, scales, g_idx] =
            ["qweight", "qzeros", "scales", "g_idx"].map(|part| module.name(part));
        let bits = match settings.dynamic {
            false => settings.bits,
            true => {
                let rows = self.typed(codes, Dtype::I32)?.rows();
                let fits = |bits: &usize| inputs * bits == 32 * rows;
                let bits = [2, 3, 4, 8].into_iter().find(fits);
                bits.ok_or_else(|| {
                    self.refuse(codes, format!("has {rows} words for {inputs} inputs"))
                })?
            }
        };
        let words = self.words(codes, inputs, bits)?;
        let bytes = self.codes(codes, Dtype::I32, [words, outputs])?;
        let view = self.tensors.get(scales)?;
        let count = view.rows();
        view.expect_shape(&[count, outputs])?;
        let words = self.words(zeros, outputs, bits)?;
        let zeros_bytes = self.codes(zeros, Dtype::I32, [count, words])?;
        if settings.desc_act && !self.tensors.contains(g_idx) {
            return Err(self.refuse(g_idx, "is missing, which desc_act needs"));
        }
        let group = match settings.dynamic {
            false => settings.group,
            true => Some(inputs / count.clamp(1, inputs)),
        };
        let groups = self.groups(g_idx, inputs, count, group)?;
        let (middle, mask) = (1u8 << (bits - 1), ((1u16 << bits) - 1) as u8);
        let stored = Place::Along { words };
        let stored = (0..count * outputs)
            .map(|at| stored.code(zeros_bytes, bits, at / outputs, at % outputs));
        let more = u8::from(settings.less_one);
        let values: Vec<u8> = stored.map(|zero| zero.wrapping_add(more) & mask).collect();
        let off = if settings.less_one {
            middle.wrapping_add(1)
        } else {
            middle - 1
        };
        if settings.sym && values.iter().all(|&zero| zero == off & mask) {
            let format = if settings.less_one { "gptq_v2" } else { "gptq" };
            let problem = format!(
                "has zeros of {off} where symmetric codes have {middle}: checkpoint_format seems to be {format}"
            );
            return Err(self.refuse(zeros, problem));
        }
        Ok(Stored {
            bits,
            inputs,
            place: Place::Down { outputs },
            bytes,
            groups,
            scales: self.scales(&view, scales)?,
            zeros: uneven(values, middle),
            scale_steps: [outputs, 1],
        })
    }

    fn awq<'n>(
        &'n self,
        group: Option<usize>,
        module: &'n Module,
    ) -> Result<Stored<'n>, InferError> {
        let (outputs, inputs) = (module.outputs, module.inputs);
        let [codes, zeros, scales] = ["qweight", "qzeros", "scales"].map(|part| module.name(part));
        let words = self.words(codes, outputs, 4)?;
        let bytes = self.codes(codes, Dtype::I32, [inputs, words])?;
        let view = self.tensors.get(scales)?;
        let count = view.rows();
        view.expect_shape(&[count, outputs])?;
        let zeros = self.codes(zeros, Dtype::I32, [count, words])?;
        let place = Place::Across { outputs };
        let values = (0..count * outputs)
            .map(|at| place.code(zeros, 4, at % outputs, at / outputs))
            .collect();
        Ok(Stored {
            bits: 4,
            inputs,
            place,
            bytes,
            groups: self.groups(module.name("g_idx"), inputs, count, group)?,
            scales: self.scales(&view, scales)?,
            zeros: uneven(values, 8),
            scale_steps: [outputs, 1],
        })
    }

    fn compressed_tensors<'n>(
        &'n self,
        schemes: &[Scheme],
        module: &'n Module,
    ) -> Result<Stored<'n>, InferError> {
        let (outputs, inputs) = (module.outputs, module.inputs);
        let [codes, scales, zeros, shape, g_idx] = [
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_shape",
            "weight_g_idx",
        ]
        .map(|part| module.name(part));
        let packed = self.tensors.contains(codes);
        let codes = if packed { codes } else { module.name("weight") };
        if self.tensors.contains(shape) {
            let view = self.typed(shape, Dtype::I64)?;
            let sizes = [outputs as u64, inputs as u64].map(u64::to_le_bytes);
            if view.bytes != sizes.as_flattened() {
                let problem = format!("is not the model's [{outputs}, {inputs}]");
                return Err(self.refuse(shape, problem));
            }
        }
        let view = self.tensors.get(scales)?;
        let single = view.elements() == 1;
        let count = if single { 1 } else { view.row_len() };
        if !single {
            view.expect_shape(&[outputs, count])?;
        }
        let width = self.tensors.get(codes)?.row_len();
        let fits = |scheme: &&Scheme| {
            let words = inputs.div_ceil(32 / scheme.bits);
            scheme.packed == packed && width == if packed { words } else { inputs }
        };
        let grouped =
            |scheme: &&Scheme| scheme.group.map_or(1, |group| inputs.div_ceil(group)) == count;
        let Some(scheme) = schemes.iter().filter(fits).find(grouped) else {
            let problem = format!(
                "of {width} columns, with {count} scales a row, is of no group of config_groups"
            );
            return Err(self.refuse(codes, problem));
        };
        let bits = scheme.bits;
        let (place, dtype) = match packed {
            true => (Place::Along { words: width }, Dtype::I32),
            false => (Place::Bytes { inputs }, Dtype::I8),
        };
        let bytes = self.codes(codes, dtype, [outputs, width])?;
        let values = match self.tensors.contains(zeros) {
            true => Some(self.signed_zeros(zeros, bits, [outputs, count], single)?),
            false => None,
        };
        Ok(Stored {
            bits,
            inputs,
            place,
            bytes,
            groups: self.groups(g_idx, inputs, count, scheme.group)?,
            scales: self.scales(&view, scales)?,
            zeros: values.and_then(|values| uneven(values, 1 << (bits - 1))),
            scale_steps: if single && outputs > 1 {
                [0, 0]
            } else {
                [1, count]
            },
        })
    }

    /// Zeros of signed codes, counted from the lowest code: bytes like the scales, or packed down the outputs.
    fn signed_zeros(
        &self,
        name: &str,
        bits: usize,
        [outputs, count]: [usize; 2],
        single: bool,
    ) -> Result<Vec<u8>, InferError> {
        let view = self.tensors.get(name)?;
        if view.dtype == Dtype::I32 && !single {
            let words = outputs.div_ceil(32 / bits);
            let bytes = self.codes(name, Dtype::I32, [words, count])?;
            let place = Place::Down { outputs: count };
            let zeros =
                (0..outputs * count).map(|at| place.code(bytes, bits, at % count, at / count));
            return Ok(zeros.collect());
        }
        let view = self.typed(name, Dtype::I8)?;
        match single {
            true if view.elements() == 1 => {}
            _ => view.expect_shape(&[outputs, count])?,
        }
        let middle = 1i16 << (bits - 1);
        let zero = |&byte: &u8| u8::try_from(i16::from(byte as i8) + middle).ok();
        let zeros: Option<Vec<u8>> = view.bytes.iter().map(zero).collect();
        zeros.ok_or_else(|| self.refuse(name, format!("has a zero outside of {bits} bits")))
    }
}

/// Zeros, unless all are the middle code.
fn uneven(zeros: Vec<u8>, middle: u8) -> Option<Vec<u8>> {
    zeros.iter().any(|&zero| zero != middle).then_some(zeros)
}
