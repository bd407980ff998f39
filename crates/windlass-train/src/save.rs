//! A training run at rest: a Hugging Face folder, the optimizer's state, and where the run stands.

use crate::data::{Packing, SamplerState};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::plan::StepShape;
use crate::trainer::TrainOptions;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::Path;
use windlass_model::{DecoderConfig, Tokenizer, Tokens, decoder};
use windlass_store::checkpoint::{CheckpointDir, Checkpoints};
use windlass_store::safetensors::{Dtype, Options, Spec, Tensors};
use windlass_store::{Shard, Store, Values, load_weights, save_weights};
use windlass_tensor::{Cpu, DType, ParamId, UnitSpec};

/// Where the run stands.
pub(crate) const STATE_FILE: &str = "trainer_state.json";
/// Moments, and the low halves of the masters.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// Where a run stands, with the settings that decide what comes next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) step: u64,
    pub(crate) tokens_seen: u64,
    pub(crate) sampler: SamplerState,
    pub(crate) dtype: String,
    pub(crate) optimizer: Optimizer,
    pub(crate) shape: StepShape,
    pub(crate) packing: Packing,
}

impl Progress {
    /// Whether a run with `options` continues this one.
    pub(crate) fn check(&self, options: &TrainOptions) -> Result<()> {
        let pairs = [
            (
                "the storage type",
                self.dtype.clone(),
                options.dtype.name().to_string(),
            ),
            (
                "the optimizer",
                format!("{:?}", self.optimizer),
                format!("{:?}", options.engine.optimizer),
            ),
            (
                "the batch",
                format!("{:?}", self.shape),
                format!("{:?}", options.shape),
            ),
            (
                "the packing",
                format!("{:?}", self.packing),
                format!("{:?}", options.packing),
            ),
        ];
        match pairs.into_iter().find(|(_, saved, now)| saved != now) {
            Some((what, saved, now)) => Err(Error::Changed { what, saved, now }),
            None => Ok(()),
        }
    }
}

/// The `config.json` of a saved model: what was read, with the storage type as it is now.
fn config_json(config: &DecoderConfig, dtype: DType) -> Value {
    let mut json = config.json.clone();
    let name = if dtype == DType::Bf16 {
        "bfloat16"
    } else {
        "float32"
    };
    if let Some(map) = json.as_object_mut() {
        let key = if map.contains_key("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        map.insert(key.into(), json!(name));
    }
    json
}

/// Writes the model alone as a Hugging Face folder.
///
/// # Errors
/// Whatever hinders writing.
pub(crate) fn save_model(
    folder: &Path,
    engine: &Engine<Tokens>,
    config: &DecoderConfig,
    tokenizer: &Tokenizer,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let (units, store) = (engine.model().units(), engine.store());
    let dtype = storage_type(store);
    let map = config.naming.file_tensors(engine.model());
    save_weights(folder, units, &map, dtype, &Options::default(), |id| {
        values(store, id)
    })?;
    let text = serde_json::to_vec_pretty(&config_json(config, dtype)).expect("a JSON value");
    windlass_store::atomic::write_atomic(
        &windlass_store::atomic::RealDisk,
        &folder.join("config.json"),
        &text,
    )?;
    Ok(tokenizer.save(folder)?)
}

fn storage_type(store: &Store) -> DType {
    store.gather(0).at(0).weight.dense().dtype()
}

fn values(store: &Store, id: ParamId) -> Vec<f32> {
    windlass_store::elements(store.gather(id.unit).at(id.slot).weight)
}

/// Writes a checkpoint and makes it the latest.
pub(crate) fn save(
    checkpoints: &Checkpoints,
    engine: &mut Engine<Tokens>,
    config: &DecoderConfig,
    tokenizer: &Tokenizer,
    progress: &Progress,
    keep: Option<NonZeroUsize>,
) -> Result<CheckpointDir> {
    let mut writer = checkpoints.begin(progress.step)?;
    let dtype = storage_type(engine.store());
    let units: Vec<UnitSpec> = engine.model().units().to_vec();
    let map = config.naming.file_tensors(engine.model());
    let kind = if dtype == DType::Bf16 {
        Dtype::BF16
    } else {
        Dtype::F32
    };
    let specs: Vec<Spec> = map
        .iter()
        .map(|t| Spec::new(t.name.clone(), kind, t.shape.to_vec()))
        .collect();
    let rows = |id: &ParamId| units[id.unit].params[id.slot].shape[0];
    writer.weights(&specs, &Options::default(), |index, out| {
        let parts: Vec<Vec<f32>> = map[index]
            .parts
            .iter()
            .map(|id| values(engine.store(), *id))
            .collect();
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let rows: Vec<usize> = map[index].parts.iter().map(rows).collect();
        out.values(&map[index].join(&parts, &rows))
    })?;
    let shards: Vec<Shard<'_>> = engine.store_mut().update().collect();
    let entries: Vec<(usize, State)> = shards
        .iter()
        .enumerate()
        .flat_map(|(i, shard)| states(shard).map(move |state| (i, state)))
        .collect();
    let specs: Vec<Spec> = entries
        .iter()
        .map(|(i, state)| state.spec(&shards[*i]))
        .collect();
    writer.tensors(OPTIMIZER_FILE, &specs, &Default::default(), |index, out| {
        let (shard, state) = (&shards[entries[index].0], entries[index].1);
        match (state, &shard.values) {
            (State::Moment(n), _) => out.values(&*shard.moments[n]),
            (State::Low, Values::Split { low, .. }) => low.chunks(1 << 15).try_for_each(|low| {
                out.bytes(
                    &low.iter()
                        .flat_map(|v| v.to_le_bytes())
                        .collect::<Vec<u8>>(),
                )
            }),
            (State::Low, Values::F32(_)) => unreachable!("only split parameters have low halves"),
        }
    })?;
    drop(shards);
    for (name, content) in tokenizer.files() {
        writer.bytes(name, content)?;
    }
    writer.json("config.json", &config_json(config, dtype))?;
    writer.json(STATE_FILE, progress)?;
    Ok(writer.commit(keep)?)
}

/// A tensor of a parameter in the optimizer's file.
#[derive(Clone, Copy)]
enum State {
    Moment(usize),
    Low,
}

impl State {
    fn spec(self, shard: &Shard<'_>) -> Spec {
        let (suffix, dtype) = match self {
            State::Moment(n) => (format!("moment.{n}"), Dtype::F32),
            State::Low => ("low".into(), Dtype::I16),
        };
        Spec::new(
            format!("{}.{suffix}", shard.spec.name),
            dtype,
            shard.spec.shape.to_vec(),
        )
    }
}

fn states(shard: &Shard<'_>) -> impl Iterator<Item = State> + use<> {
    let low = matches!(shard.values, Values::Split { .. }).then_some(State::Low);
    (0..shard.moments.len()).map(State::Moment).chain(low)
}

/// Reads the moments and low halves of a checkpoint into a store whose weights are the checkpoint's.
pub(crate) fn load_optimizer(checkpoint: &CheckpointDir, store: &mut Store) -> Result<()> {
    let tensors = checkpoint.tensors(OPTIMIZER_FILE)?;
    for mut shard in store.update() {
        for state in states(&shard) {
            let spec = state.spec(&shard);
            let view = tensors.get(&spec.name)?;
            view.expect_shape(&spec.shape)?;
            match (state, &mut shard.values) {
                (State::Moment(n), _) => view.read_into(0..view.rows(), &mut *shard.moments[n])?,
                (State::Low, Values::Split { low, .. }) => {
                    low.iter_mut()
                        .zip(view.bytes.chunks_exact(2))
                        .for_each(|(v, b)| *v = i16::from_le_bytes([b[0], b[1]]));
                }
                (State::Low, Values::F32(_)) => {
                    unreachable!("only split parameters have low halves")
                }
            }
        }
    }
    Ok(())
}

/// Reads the weights of a Hugging Face folder (or checkpoint) into a store. Returns the names of tensors that the
/// model has no use for.
///
/// # Errors
/// Missing or damaged files, other shapes than the configuration says.
pub fn load_model(
    cpu: &Cpu,
    folder: &Path,
    config: &DecoderConfig,
    dtype: DType,
) -> Result<(Store, Vec<String>)> {
    let model = decoder(config);
    let map = config.naming.file_tensors(&model);
    let tensors = Tensors::open(folder)?;
    let naming = config.naming;
    let (weights, unused) = load_weights(
        cpu,
        &tensors,
        model.units(),
        &map,
        |name| naming.bare_name(name),
        dtype,
    )?;
    Ok((Store::new(cpu, model.units(), weights), unused))
}
