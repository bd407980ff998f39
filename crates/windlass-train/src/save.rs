//! A training run at rest: a Hugging Face folder, the optimizer's state, and where the run stands.

mod folders;

pub(crate) use folders::{save_adapter, save_model};

use crate::background::Pending;
use crate::data::{Packing, SamplerState};
use crate::engine::{Engine, EngineState};
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::plan::StepShape;
use crate::preference::Preference;
use crate::together::{exchange, together};
use crate::trainer::{Best, TrainOptions};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use windlass_model::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, Adapter, DecoderConfig, Tokenizer, decoder,
};
use windlass_store::checkpoint::{CheckpointDir, Checkpoints, Writer};
use windlass_store::safetensors::{Dtype, Options, Spec, TensorWriter, Tensors};
use windlass_store::{ArrayKind, Gathered, Home, Loader, StateEntry, Store};
use windlass_tensor::{
    Cpu, DType, FileTensor, Layout, ParamId, UnitSpec, Weight, Weights, each_dtype,
};

/// Where the run stands.
pub(crate) const STATE_FILE: &str = "trainer_state.json";

/// Where a run stands, with the settings that decide what comes next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Progress {
    #[serde(flatten)]
    pub(crate) engine: EngineState,
    pub(crate) tokens_seen: u64,
    pub(crate) sampler: SamplerState,
    pub(crate) dtype: String,
    pub(crate) optimizer: Optimizer,
    pub(crate) shape: StepShape,
    /// Ranks that saved, each its own optimizer state.
    #[serde(default = "one")]
    pub(crate) ranks: usize,
    pub(crate) packing: Packing,
    #[serde(default)]
    pub(crate) best: Best,
    #[serde(default)]
    pub(crate) preference: Option<Preference>,
}

fn one() -> usize {
    1
}

impl Progress {
    /// Whether a run with `options` continues this one.
    pub(crate) fn check(&self, options: &TrainOptions, ranks: usize) -> Result<()> {
        // How a step's sequences are shared out may change; which ones they are may not.
        let batch = |shape: StepShape, ranks: usize| {
            let sequences = shape.micro_batch * shape.gradient_accumulation_steps * ranks;
            format!("{sequences} sequences of {} tokens a step", shape.seq_len)
        };
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
                batch(self.shape, self.ranks),
                batch(options.shape, ranks),
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
pub(crate) fn config_json(config: &DecoderConfig, dtype: DType) -> Value {
    let mut json = config.json.clone();
    let name = match dtype {
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
        DType::F32 | DType::F64 => "float32",
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

/// Gathers the units of a store in order, each once, whoever needs which: gathering is collective, and a rank writes
/// some of the tensors only.
struct Units<'s> {
    store: &'s Store,
    next: usize,
    last: Option<(usize, Gathered<'s>)>,
}

impl<'s> Units<'s> {
    fn new(store: &'s Store) -> Self {
        Units {
            store,
            next: 0,
            last: None,
        }
    }

    /// A unit's weights; units must be asked for in order.
    fn at(&mut self, unit: usize) -> windlass_store::Result<&Weights> {
        while self.next <= unit {
            self.last = None;
            self.last = Some((self.next, self.store.gather(self.next)?));
            self.next += 1;
        }
        match &self.last {
            Some((at, weights)) if *at == unit => Ok(weights),
            _ => unreachable!("units are written in order"),
        }
    }

    /// Takes part in gathering what is left.
    fn finish(mut self) -> windlass_store::Result<()> {
        match self.store.units().len() {
            0 => Ok(()),
            units => self.at(units - 1).map(|_| ()),
        }
    }
}

/// The tensors of the file format in the order of their units.
struct FileTensors {
    map: Vec<FileTensor>,
    specs: Vec<Spec>,
    units: Vec<UnitSpec>,
}

impl FileTensors {
    fn new<B>(engine: &Engine<B>, mut map: Vec<FileTensor>) -> Self {
        map.sort_by_key(|t| t.parts[0].unit);
        let kind = |t: &FileTensor| match engine.store().dtype_of(t.parts[0]) {
            Some(DType::Bf16) => Dtype::BF16,
            Some(DType::F16) => Dtype::F16,
            Some(DType::F64) => Dtype::F64,
            _ => Dtype::F32,
        };
        let spec = |t: &FileTensor| Spec::new(t.name.clone(), kind(t), t.shape.to_vec());
        FileTensors {
            specs: map.iter().map(spec).collect(),
            map,
            units: engine.model().units().to_vec(),
        }
    }

    /// Writes the elements of a file's tensor.
    fn write(
        &self,
        index: usize,
        units: &mut Units<'_>,
        out: &mut TensorWriter,
    ) -> windlass_store::Result<()> {
        let file = &self.map[index];
        let weights = units.at(file.parts[0].unit)?;
        if let (Layout::Rows, [id]) = (file.layout, file.parts.as_slice())
            && let Weight::Dense(tensor) = weights.at(id.slot).weight
        {
            // As it lies in memory: nothing is converted or moved about.
            return each_dtype!(tensor.dtype(), E => out.values(tensor.as_slice::<E>()));
        }
        let part = |id: &ParamId| windlass_store::elements(weights.at(id.slot).weight);
        let parts: Vec<Vec<f32>> = file.parts.iter().map(part).collect();
        let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let rows = |id: &ParamId| self.units[id.unit].params[id.slot].shape[0];
        let rows: Vec<usize> = file.parts.iter().map(rows).collect();
        out.values(&file.join(&parts, &rows))
    }

    /// Which tensors each rank writes: those of every `ranks`-th unit.
    fn shards(&self, ranks: usize) -> Vec<Vec<usize>> {
        let of = |rank| {
            let mine = |i: &usize| self.map[*i].parts[0].unit % ranks == rank;
            (0..self.map.len()).filter(mine).collect::<Vec<_>>()
        };
        (0..ranks).map(of).filter(|s| !s.is_empty()).collect()
    }
}

/// The files of what is saved as weights.
pub(crate) struct WeightFiles {
    map: Vec<FileTensor>,
    /// The one file they go to; those of a Hugging Face folder when `None`.
    single: Option<&'static str>,
}

impl From<Vec<FileTensor>> for WeightFiles {
    fn from(map: Vec<FileTensor>) -> Self {
        WeightFiles { map, single: None }
    }
}

impl WeightFiles {
    /// An adapter's file.
    pub(crate) fn adapter(adapter: &Adapter) -> Self {
        WeightFiles {
            map: adapter.tensors.clone(),
            single: Some(ADAPTER_FILE),
        }
    }
}

/// Where a checkpoint goes: among others, under a name or called after its step.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) checkpoints: &'a Checkpoints,
    pub(crate) name: Option<&'a str>,
}

impl Place<'_> {
    fn begin(self, step: u64) -> windlass_store::Result<Writer> {
        match self.name {
            Some(name) => self.checkpoints.begin_named(name, step),
            None => self.checkpoints.begin(step),
        }
    }

    fn join(self, step: u64) -> Writer {
        match self.name {
            Some(name) => self.checkpoints.join_named(name, step),
            None => self.checkpoints.join(step),
        }
    }

    fn path(self, step: u64) -> PathBuf {
        match self.name {
            Some(name) => self.checkpoints.dir().join(name),
            None => self.checkpoints.path(step),
        }
    }
}

/// A checkpoint that was written, or waits in memory for it.
pub(crate) enum Saved {
    Here(CheckpointDir),
    Underway(Pending),
}

/// Writes a checkpoint, or copies it into memory where that is the engine's way: each rank its part of the weights, in
/// the layout of `map`, and its optimizer state, and the first rank what `head` writes. Collective.
pub(crate) fn together_save<B>(
    place: Place<'_>,
    engine: &Engine<B>,
    files: WeightFiles,
    keep: Option<NonZeroUsize>,
    head: &mut dyn FnMut(&mut Writer) -> Result<()>,
) -> Result<Saved> {
    let (group, step) = (engine.store().group(), engine.global_steps());
    let first = group.rank() == 0;
    let begun = match first {
        true => place.begin(step).map(Some),
        false => Ok(None),
    };
    together(group, "begin a checkpoint", begun.as_ref().err())?;
    let mut writer = match begun? {
        Some(writer) => writer,
        None => place.join(step),
    };
    let background = engine.options().async_checkpoints;
    let memory = &engine.store().cpu().memory;
    match background {
        true => writer.hold(memory),
        // What is written is put together where the activations were.
        false => memory.trim(),
    }
    let written = write_part(&mut writer, engine, files);
    let written = written.and_then(|()| match first {
        true => head(&mut writer),
        false => Ok(()),
    });
    if background {
        let start = |()| Pending::start(writer, place.path(step), keep, group);
        let pending = written.and_then(start);
        together(group, "write a checkpoint", pending.as_ref().err())?;
        return pending.map(Saved::Underway);
    }
    together(group, "write a checkpoint", written.as_ref().err())?;
    written?;
    if !first {
        exchange(group, "checkpoint files", &writer.leave())?;
        together(group, "commit a checkpoint", None::<&Error>)?;
        return Ok(Saved::Here(CheckpointDir::open(&place.path(step))?));
    }
    let committed = exchange(group, "checkpoint files", &[]).and_then(|lists| {
        for list in lists.iter().filter(|list| !list.is_empty()) {
            writer.adopt(list)?;
        }
        Ok(writer.commit(keep)?)
    });
    together(group, "commit a checkpoint", committed.as_ref().err())?;
    Ok(Saved::Here(committed?))
}

/// Bytes of the tensors that this rank writes of a checkpoint in the layout of `map`.
pub(crate) fn written_bytes<B>(engine: &Engine<B>, map: Vec<FileTensor>) -> usize {
    let store = engine.store();
    let (rank, ranks) = (store.group().rank(), store.group().size());
    let files = FileTensors::new(engine, map);
    let shards = files.shards(ranks);
    let mine = shards.get(rank).into_iter().flatten();
    let weights: usize = mine.map(|&i| files.specs[i].bytes()).sum();
    let state = store.state();
    weights + state.iter().map(|e| state_spec(e).bytes()).sum::<usize>()
}

/// Writes this rank's part of the weights and its optimizer state.
fn write_part<B>(
    writer: &mut Writer,
    engine: &Engine<B>,
    WeightFiles { map, single }: WeightFiles,
) -> Result<()> {
    let store = engine.store();
    let (rank, ranks) = (store.group().rank(), store.group().size());
    let files = FileTensors::new(engine, map);
    let mut units = Units::new(store);
    let mut fill = |index: usize, out: &mut TensorWriter| files.write(index, &mut units, out);
    let written = match (single, ranks) {
        (Some(name), _) if rank == 0 => {
            writer.tensors(name, &files.specs, &Options::default().metadata, &mut fill)
        }
        (Some(_), _) => Ok(()),
        (None, 1) => writer.weights(&files.specs, &Options::default(), &mut fill),
        (None, _) => write_shard(writer, &files, (rank, ranks), &mut fill),
    };
    // Other ranks wait for this one's part in gathering, whatever happened to its disk.
    units.finish()?;
    written?;
    let entries: Vec<StateEntry> = store.state();
    let entries: Vec<&StateEntry> = entries.iter().filter(|e| !e.range.is_empty()).collect();
    let specs: Vec<Spec> = entries.iter().map(|e| state_spec(e)).collect();
    let name = optimizer_file(rank, ranks);
    writer.tensors(&name, &specs, &Default::default(), |index, out| {
        store.read_state(entries[index], &mut |bytes| out.bytes(bytes))
    })?;
    Ok(())
}

/// Writes one rank's file of weights, if it has one, and on the first rank the index over all.
fn write_shard(
    writer: &mut Writer,
    files: &FileTensors,
    (rank, ranks): (usize, usize),
    fill: &mut dyn FnMut(usize, &mut TensorWriter) -> windlass_store::Result<()>,
) -> windlass_store::Result<()> {
    let shards = files.shards(ranks);
    let metadata = Options::default().metadata;
    if rank < shards.len() {
        writer.weights_shard(&files.specs, &shards, rank, &metadata, fill)?;
    }
    match rank {
        0 => writer.weights_index(&files.specs, &shards),
        _ => Ok(()),
    }
}

/// Writes what there is once.
pub(crate) fn write_head(
    writer: &mut Writer,
    (config, adapter): (&DecoderConfig, Option<&Adapter>),
    tokenizer: &Tokenizer,
    progress: &Progress,
    dtype: DType,
) -> Result<()> {
    for (name, content) in tokenizer.files() {
        writer.bytes(name, content)?;
    }
    match adapter {
        Some(adapter) => writer.json(ADAPTER_CONFIG_FILE, &adapter.config.to_json())?,
        None => writer.json("config.json", &config_json(config, dtype))?,
    }
    writer.json(STATE_FILE, progress)?;
    Ok(())
}

/// The file of a rank's optimizer state.
pub(crate) fn optimizer_file(rank: usize, ranks: usize) -> String {
    match ranks {
        1 => "optimizer.safetensors".into(),
        _ => format!("optimizer-{:05}-of-{ranks:05}.safetensors", rank + 1),
    }
}

fn state_spec(entry: &StateEntry) -> Spec {
    let dtype = match entry.kind {
        ArrayKind::Low => Dtype::I16,
        ArrayKind::Master | ArrayKind::Moment | ArrayKind::Scales => Dtype::F32,
        ArrayKind::MomentBf16 => Dtype::BF16,
        ArrayKind::Codes => Dtype::U8,
    };
    let len = entry.kind.at(entry.range.clone()).len();
    Spec::new(entry.name.clone(), dtype, vec![len])
}

/// Reads the optimizer state of a checkpoint, saved by any number of ranks, into a store whose weights are the
/// checkpoint's.
pub(crate) fn load_optimizer(
    checkpoint: &CheckpointDir,
    ranks: usize,
    store: &mut Store,
) -> Result<()> {
    let files = (0..ranks).map(|rank| checkpoint.tensors(&optimizer_file(rank, ranks)));
    let files = files.collect::<windlass_store::Result<Vec<_>>>()?;
    let lens: Vec<Vec<usize>> = store
        .units()
        .map(|unit| unit.params.iter().map(|p| p.shape.len()).collect())
        .collect();
    for entry in store.state() {
        let shards = windlass_store::partition(lens[entry.id.unit][entry.id.slot], ranks);
        for (file, shard) in files.iter().zip(shards) {
            if shard.is_empty() {
                continue;
            }
            let view = file.get(&entry.name)?;
            view.expect_shape(&[entry.kind.at(shard.clone()).len()])?;
            store.write_state(&entry, shard, view.bytes)?;
        }
    }
    Ok(())
}

/// Reads the weights of a Hugging Face folder (or checkpoint) into a rank's store: of what is partitioned, only the
/// rank's part. Returns the names of tensors that the
/// model has no use for.
///
/// # Errors
/// Missing or damaged files, other shapes than the configuration says.
pub fn load_model(
    cpu: &Cpu,
    home: Home,
    folder: &Path,
    config: &DecoderConfig,
    dtype: DType,
) -> Result<(Store, Vec<String>)> {
    let model = decoder(config);
    let map = config.naming.file_tensors(&model);
    let tensors = Tensors::open(folder)?;
    let naming = config.naming;
    let mut loader = Loader::new(cpu, &tensors, model.units(), &map, |name| {
        naming.bare_name(name)
    });
    let store = Store::build(cpu, home, model.units(), |id, _, range| {
        loader.read(id, range, dtype)
    })?;
    let unused = loader.unused();
    Ok((store, unused))
}
