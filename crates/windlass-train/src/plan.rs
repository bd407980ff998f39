//! What a run will need, before it starts.

use crate::data::Batch;
use crate::engine::{Engine, EngineOptions};
use crate::save::written_bytes;
use crate::trainer::to_tokens;
use windlass_comm::{Group, Traffic};
use windlass_model::{DecoderConfig, Model, Tokens, decoder};
use windlass_store::checkpoint::HELD_BLOCK;
use windlass_store::{Home, Placement, Store};
use windlass_tensor::kernels::memory::Usage;
use windlass_tensor::{Category, Cpu, DType, FileTensor, ParamSpec};

/// The size of a training run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// Parameters of the model.
    pub parameters: usize,
    /// Memory at its highest, by category.
    pub memory: Usage,
    /// Tokens of one optimizer step, on all ranks.
    pub tokens_per_step: usize,
    /// Bytes that one rank sends in a step.
    pub sent_per_step: usize,
    /// Calls and bytes of a step by collective.
    pub collectives: [(&'static str, u64, u64); 6],
}

/// Sequences that a step computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StepShape {
    /// Sequences of one forward pass.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Forward passes of a step.
    pub gradient_accumulation_steps: usize,
}

/// Replays one training step on a machine that allocates and does not compute: every allocation of the real step is
/// made, in its order and size, and no page of it is touched.
///
/// What rests on a disk included: buffers on their way there are held for as long on a fast disk as on a slow one. The
/// plan is as exact as the step is regular: experts are taken to be chosen evenly in sum, documents to be packed
/// whole. A mixture of experts takes more, up to 30 % where it was measured: choices are uneven and change from batch to
/// batch, which leaves free blocks of other sizes.
pub fn plan(
    config: &DecoderConfig,
    dtype: DType,
    options: EngineOptions,
    shape: StepShape,
) -> Plan {
    plan_rank(config, dtype, options, shape, Placement::default(), 1)
}

/// As [`plan`], of the first of several ranks, which has the largest part of everything.
pub fn plan_rank(
    config: &DecoderConfig,
    dtype: DType,
    options: EngineOptions,
    shape: StepShape,
    placement: Placement,
    ranks: usize,
) -> Plan {
    const PURE: &str = "a machine that computes nothing cannot fail";
    let cpu = Cpu::dry();
    let model = decoder(config);
    let group = match ranks {
        1 => Group::solo(),
        _ => Group::dry(0, ranks),
    };
    let fill = |_, param: &ParamSpec, range| Ok(param.fill_range(&cpu, 0, dtype, range));
    let store = Store::build(&cpu, Home::on(group, placement), model.units(), fill).expect(PURE);
    let map = config.naming.file_tensors(&model);
    plan_batch(
        (model, store, map),
        config,
        dtype,
        options,
        (shape, blank(shape)),
    )
}

/// As [`plan`], of a model whose weights are in a store on a machine that computes nothing. `map` says what a checkpoint holds,
/// and the batch is the largest there will be.
///
/// # Panics
/// When the store is on a machine that computes.
pub fn plan_batch(
    (model, store, map): (Model<Tokens>, Store, Vec<FileTensor>),
    config: &DecoderConfig,
    dtype: DType,
    options: EngineOptions,
    (shape, batch): (StepShape, Batch),
) -> Plan {
    const PURE: &str = "a machine that computes nothing cannot fail";
    let cpu = store.cpu().clone();
    assert!(
        cpu.pool.is_dry(),
        "a plan is made on a machine that computes nothing"
    );
    let (parameters, ranks) = (model.num_params(), store.group().size());
    let background = options.async_checkpoints;
    let options = EngineOptions {
        gradient_accumulation_steps: shape.gradient_accumulation_steps,
        async_checkpoints: false,
        ..options
    };
    let mut engine = Engine::initialize(model, store, options).expect(PURE);
    let mut traffic = Traffic::default();
    // The first forward pass of a step finds no gradients and the second one meets them beside its activations; in the
    // second step both find the blocks of the first one free. Nothing is new after that.
    let blocks = match background {
        true => written_bytes(&engine, map).div_ceil(HELD_BLOCK),
        false => 0,
    };
    let hold = || -> Vec<_> {
        let block = |_| cpu.memory.alloc(HELD_BLOCK, Category::Workspace);
        (0..blocks).map(block).collect()
    };
    // The blocks that checkpoints will wait in are there from the start.
    let mut held = hold();
    held.clear();
    for _ in 0..2 {
        let before = engine.store().group().traffic();
        for _ in 0..shape.gradient_accumulation_steps {
            let batch = to_tokens(batch.clone(), config, dtype, 1.0, 1);
            let loss = engine.forward(batch).expect(PURE);
            engine.backward(loss).expect(PURE);
        }
        engine.step_at(0.0).expect(PURE);
        traffic = engine.store().group().traffic().since(&before);
        if held.is_empty() {
            // A checkpoint waits in memory while the next steps are taken.
            held = hold();
        }
    }
    let memory = cpu.memory.peak();
    let sequences = shape.micro_batch * shape.gradient_accumulation_steps * ranks;
    Plan {
        parameters,
        memory,
        tokens_per_step: sequences * batch.ids.len() / batch.sequences.max(1),
        sent_per_step: (traffic.total().bytes - traffic.control.bytes) as usize,
        collectives: traffic
            .kinds()
            .map(|(name, volume)| (name, volume.calls, volume.bytes)),
    }
}

/// Seconds of one training step at a shape, the better of two after a first one, on weights of its own.
pub fn measure_step(
    cpu: &Cpu,
    config: &DecoderConfig,
    dtype: DType,
    options: EngineOptions,
    shape: StepShape,
) -> f64 {
    let model = decoder(config);
    let store = Store::init(cpu, model.units(), dtype, 0);
    let mut engine = Engine::initialize(model, store, options).expect("nothing can fail in memory");
    let times = (0..3).map(|_| {
        let start = std::time::Instant::now();
        for _ in 0..shape.gradient_accumulation_steps {
            let batch = to_tokens(blank(shape), config, dtype, 1.0, 1);
            let loss = engine.forward(batch).expect("nothing can fail in memory");
            engine.backward(loss).expect("nothing can fail in memory");
        }
        // Nothing here is learned: a step that is refused for its numbers has taken its time all the same.
        let _ = engine.step_at(0.0);
        start.elapsed().as_secs_f64()
    });
    times.skip(1).fold(f64::INFINITY, f64::min)
}

/// A batch of a shape, all zeros.
fn blank(shape: StepShape) -> Batch {
    let tokens = shape.micro_batch * shape.seq_len;
    Batch {
        ids: vec![0; tokens],
        targets: vec![0; tokens],
        positions: Vec::new(),
        segments: vec![shape.seq_len; shape.micro_batch],
        sequences: shape.micro_batch,
        labels: Vec::new(),
    }
}
