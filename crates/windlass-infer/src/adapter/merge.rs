//! What an adapter makes of the weights it adapts.

use super::{computed, plain};
use crate::InferError;
use crate::convert::described;
use crate::loaded::LoadedModel;
use std::path::Path;
use windlass_store::atomic::{RealDisk, write_atomic};
use windlass_store::safetensors::{Dtype, Options, Spec, write_folder};
use windlass_tensor::kernels::elementwise::axpy;
use windlass_tensor::kernels::gemm::{Epilogue, Layout, Mat, gemm};
use windlass_tensor::{Cpu, DType, ParamId, Weights, row_norms};

impl LoadedModel {
    /// The elements of a parameter with `sign` times what its adapter adds to it, computed in `f32`; with DoRA's magnitudes
    /// in place of the row norms.
    ///
    /// # Errors
    /// As the store gathers weights.
    pub fn merged(&self, id: ParamId, sign: f32) -> Result<Vec<f32>, InferError> {
        let weights = self.store.gather(id.unit)?;
        Ok(merged(self.store.cpu(), &weights, id.slot, sign))
    }

    /// Writes the model with its adapter merged (`sign` 1), or taken out (`sign` -1), as a Hugging Face folder of a storage
    /// type, a tensor at a time. Without an adapter, it is the model as it is.
    ///
    /// # Errors
    /// Whatever hinders writing.
    pub fn save_merged(&self, folder: &Path, dtype: Dtype, sign: f32) -> Result<(), InferError> {
        let io = |source| windlass_store::Error::Io {
            action: "create",
            path: folder.to_owned(),
            source,
        };
        std::fs::create_dir_all(folder).map_err(io)?;
        let map = self.config.naming.file_tensors(&self.model);
        let specs: Vec<Spec> = map
            .iter()
            .map(|file| Spec::new(file.name.clone(), dtype, file.shape.to_vec()))
            .collect();
        write_folder(
            &RealDisk,
            folder,
            &specs,
            &Options::default(),
            |index, out| {
                let mut values = |id: ParamId| self.merged(id, sign);
                let joined = self.joined(&map[index], &mut values).map_err(inner)?;
                out.values(&joined)
            },
        )?;
        if let Some(tokenizer) = &self.tokenizer {
            tokenizer.save(folder)?;
        }
        let mut json = described(&self.config, self.tokenizer.as_ref(), dtype);
        if let Some(map) = json.as_object_mut() {
            map.shift_remove("quantization_config");
        }
        let text = serde_json::to_vec_pretty(&json).expect("a JSON value");
        Ok(write_atomic(&RealDisk, &folder.join("config.json"), &text)?)
    }
}

/// The store's own error; no other can come from weights in memory.
fn inner(error: InferError) -> windlass_store::Error {
    match error {
        InferError::Store(error) => error,
        other => unreachable!("gathering weights that lie in memory: {other}"),
    }
}

fn merged(cpu: &Cpu, weights: &Weights, slot: usize, sign: f32) -> Vec<f32> {
    let param = weights.at(slot);
    let mut values = plain(cpu, param.weight.clone(), DType::F32).to_f32();
    let Some((lora, _)) = param.lora else {
        return values;
    };
    let factor = |slot: usize| weights.at(slot).weight.dense().to_f32();
    let (a, b) = (factor(lora.a), factor(lora.b));
    let k = param.weight.shape()[1];
    let (n, r) = (values.len() / k, a.len() / k);
    let mut change = vec![0f32; values.len()];
    let (left, right) = (
        Mat {
            data: &b,
            stride: r,
        },
        Mat {
            data: &a,
            stride: k,
        },
    );
    let epilogue = Epilogue::default();
    gemm(
        &cpu.pool,
        Layout::Nn,
        n,
        k,
        r,
        left,
        right,
        &mut change,
        k,
        epilogue,
    );
    axpy(&cpu.pool, sign * lora.scale as f32, &change, &mut values);
    if let Some(slot) = lora.magnitude {
        let dtype = computed(param.weight);
        let norms = row_norms(cpu, param.weight, Some((lora, weights)), dtype);
        let magnitudes = factor(slot);
        for ((row, norm), magnitude) in values.chunks_mut(k).zip(norms).zip(magnitudes) {
            let gain = f64::from(magnitude) / norm;
            row.iter_mut()
                .for_each(|v| *v = (f64::from(*v) * gain) as f32);
        }
    }
    values
}
