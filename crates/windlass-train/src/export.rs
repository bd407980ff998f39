//! A checkpoint's master values as a Hugging Face folder in `f32`: what DeepSpeed's `zero_to_fp32.py` is for.

use crate::error::{Error, Result};
use crate::save::{Progress, STATE_FILE, config_json, optimizer_file};
use std::path::Path;
use windlass_model::{DecoderConfig, Tokenizer, decoder};
use windlass_store::atomic::{RealDisk, write_atomic};
use windlass_store::checkpoint::CheckpointDir;
use windlass_store::safetensors::{Dtype, Options, Spec, Tensors, write_folder};
use windlass_store::{Loader, partition};
use windlass_tensor::kernels::split;
use windlass_tensor::{Cpu, DType, ParamId, bf16};

/// What a checkpoint is, without its tensors.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct CheckpointSummary {
    /// Optimizer steps.
    pub step: u64,
    /// Tokens trained on.
    pub tokens_seen: u64,
    /// Ranks that saved it.
    pub ranks: usize,
    /// Storage type of the weights.
    pub dtype: String,
    /// The update rule with its constants.
    pub optimizer: crate::Optimizer,
    /// Architecture.
    pub model_type: String,
    /// Parameters.
    pub parameters: usize,
}

/// Reads what a checkpoint of a run is.
///
/// # Errors
/// Missing or damaged files.
pub fn summary(checkpoint: &CheckpointDir) -> Result<CheckpointSummary> {
    let progress: Progress = checkpoint.json(STATE_FILE)?;
    let config = DecoderConfig::load(checkpoint.path())?;
    Ok(CheckpointSummary {
        step: checkpoint.step(),
        tokens_seen: progress.tokens_seen,
        ranks: progress.ranks,
        dtype: progress.dtype,
        optimizer: progress.optimizer,
        parameters: decoder(&config).num_params(),
        model_type: config.model_type.to_string(),
    })
}

/// Writes the master values of a checkpoint, in `f32`, with configuration and tokenizer, a tensor at a time.
///
/// # Errors
/// Missing or damaged files; whatever hinders writing.
pub fn export(checkpoint: &CheckpointDir, out: &Path) -> Result<()> {
    let ranks = checkpoint.json::<Progress>(STATE_FILE)?.ranks;
    let config = DecoderConfig::load(checkpoint.path())?;
    let tokenizer = Tokenizer::load(checkpoint.path())?;
    let (cpu, model) = (Cpu::new(1), decoder(&config));
    let map = config.naming.file_tensors(&model);
    let weights = checkpoint.weights()?;
    let mut loader = Loader::new(&cpu, &weights, model.units(), &map, |name| {
        config.naming.bare_name(name)
    });
    let states = (0..ranks).map(|rank| checkpoint.tensors(&optimizer_file(rank, ranks)));
    let states = states.collect::<windlass_store::Result<Vec<Tensors>>>()?;
    std::fs::create_dir_all(out).map_err(|e| Error::io("create", out, e))?;
    let spec = |t: &windlass_tensor::FileTensor| Spec::new(&t.name, Dtype::F32, t.shape.to_vec());
    let specs: Vec<Spec> = map.iter().map(spec).collect();
    let param = |id: &ParamId| &model.units()[id.unit].params[id.slot];
    write_folder(
        &RealDisk,
        out,
        &specs,
        &Options::default(),
        |index, file| {
            let parts = map[index].parts.iter().map(|id| {
                let spec = param(id);
                let values = loader.read(*id, 0..spec.shape.len(), DType::F32)?;
                masters(&states, &spec.name, values.to_f32())
            });
            let parts = parts.collect::<windlass_store::Result<Vec<Vec<f32>>>>()?;
            let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
            let rows: Vec<usize> = map[index]
                .parts
                .iter()
                .map(|id| param(id).shape[0])
                .collect();
            file.values(&map[index].join(&parts, &rows))
        },
    )?;
    let json = serde_json::to_vec_pretty(&config_json(&config, DType::F32)).expect("a JSON value");
    write_atomic(&RealDisk, &out.join("config.json"), &json)?;
    Ok(tokenizer.save(out)?)
}

/// The masters of a parameter whose weights are `values`: themselves, or with what the ranks keep beside them.
fn masters(
    states: &[Tensors],
    name: &str,
    mut values: Vec<f32>,
) -> windlass_store::Result<Vec<f32>> {
    let shards = partition(values.len(), states.len());
    for (state, shard) in states.iter().zip(shards) {
        let (low, master) = (format!("{name}.low"), format!("{name}.master"));
        if state.contains(&low) {
            let halves = state.get(&low)?.bytes.chunks_exact(2);
            for (value, b) in values[shard].iter_mut().zip(halves) {
                let high = bf16::from_bits((value.to_bits() >> 16) as u16);
                *value = split::join(high, i16::from_le_bytes([b[0], b[1]]));
            }
        } else if state.contains(&master) {
            let bytes = state.get(&master)?.bytes.chunks_exact(4);
            for (value, b) in values[shard].iter_mut().zip(bytes) {
                *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
    Ok(values)
}
