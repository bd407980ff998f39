//! The trainer: resuming, accumulation, checkpoints, errors, the memory plan, threads, records.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use windlass_comm::Group;
use windlass_model::{DecoderConfig, Goal, Tokenizer, Tokens, decoder, preset_config};
use windlass_store::checkpoint::{CheckpointDir, Checkpoints};
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Home, Placement, Stage, Store, Tier};
use windlass_tensor::{Cpu, DType, ParamSpec, Rng, RouterStats};
use windlass_train::data::{
    Corpus, Packing, ReadOptions, Split, TokenFile, TokenizeOptions, tokenize,
};
use windlass_train::loss_scale::LossScale;
use windlass_train::schedule::{Decay, Schedule, Warmup};
use windlass_train::{
    End, Engine, EngineOptions, Error, Event, Losses, Optimizer, StepShape, TrainOptions, Trainer,
    load_model, plan_rank,
};

const ADAMW: Optimizer = Optimizer::ADAMW;
const SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.9,
    dampening: 0.0,
    nesterov: true,
    weight_decay: 0.1,
};
const PLAIN_SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.0,
    dampening: 0.0,
    nesterov: false,
    weight_decay: 0.0,
};
const LION: Optimizer = Optimizer::Lion {
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
};

/// A folder with data, removed in the end; a run in it for each name.
struct Bench {
    folder: PathBuf,
    config: DecoderConfig,
    /// Folder of the tokenizer.
    tokenizer: PathBuf,
    file: Arc<TokenFile>,
}

impl Bench {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("windlass-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let words = ["rope", "crank", "load", "lifts", "turns", "slow", "heavy"];
        let mut rng = Rng::new(7);
        let mut document = || {
            let word = |_| *rng.choose(&words);
            (0..40).map(word).collect::<Vec<_>>().join(" ")
        };
        let texts: Vec<String> = (0..12).map(|_| document()).collect();
        let text = folder.join("text.txt");
        std::fs::write(&text, texts.join("##")).unwrap();
        let tokenizer = Tokenizer::train(texts.iter(), 280, "<|endoftext|>").unwrap();
        tokenizer.save(&folder).unwrap();
        let options = ReadOptions {
            separator: Some("##".into()),
            ..Default::default()
        };
        let corpus = Corpus::open(&[text], options).unwrap();
        let file = tokenize(&corpus, &tokenizer, &tokenizing(&folder), &mut |_| ()).unwrap();
        Bench {
            config: tiny(tokenizer.vocab_size()),
            file: Arc::new(file.file),
            tokenizer: folder.clone(),
            folder,
        }
    }

    fn options(&self, out: &str, steps: u64) -> TrainOptions {
        TrainOptions {
            dtype: DType::F32,
            engine: EngineOptions::default(),
            shape: StepShape {
                micro_batch: 3,
                seq_len: 32,
                gradient_accumulation_steps: 2,
            },
            schedule: Schedule::new(2e-3, 0.1, Warmup::Steps(2), steps, Decay::Cosine)
                .unwrap()
                .into(),
            steps,
            packing: Packing::Documents,
            seed: 5,
            eval_every: Some(3),
            eval_sequences: None,
            save_every: None,
            save_after: None,
            keep: None,
            out: self.folder.join(out),
            monitor: Default::default(),
        }
    }

    /// A trainer on new weights, or on those of the latest checkpoint.
    fn trainer(
        &self,
        threads: usize,
        options: &TrainOptions,
        resume: bool,
    ) -> Result<Trainer, Error> {
        self.rank(&Cpu::new(threads), Home::alone(), options, resume)
    }

    /// As `trainer`, on one rank of several.
    fn rank(
        &self,
        cpu: &Cpu,
        home: Home,
        options: &TrainOptions,
        resume: bool,
    ) -> Result<Trainer, Error> {
        let checkpoint: Option<CheckpointDir> = resume.then(|| {
            let found = Checkpoints::open(&options.out).latest().unwrap().unwrap();
            assert_eq!(found.note, None);
            found.checkpoint
        });
        let store = match &checkpoint {
            Some(c) => {
                let config = DecoderConfig::load(c.path()).unwrap();
                load_model(cpu, home, c.path(), &config, options.dtype)?.0
            }
            None => Store::build(cpu, home, decoder(&self.config).units(), |_, p, range| {
                Ok(p.fill_range(cpu, 3, options.dtype, range))
            })?,
        };
        let split = Split::new(&self.file, 0.1, 1)?;
        Trainer::new(
            self.config.clone(),
            Tokenizer::load(&self.tokenizer).unwrap(),
            store,
            split.train,
            split.held_out,
            options.clone(),
            checkpoint.as_ref(),
        )
    }

    /// Trains on several ranks until `stop`, from new weights or from the latest checkpoint.
    fn train_ranks(&self, world: World, options: &TrainOptions, stop: u64, resume: bool) {
        let mut options = options.clone();
        options.shape.micro_batch = 1;
        options.shape.gradient_accumulation_steps = 12 / world.ranks;
        std::thread::scope(|scope| {
            for group in Group::local(world.ranks, Duration::from_secs(60)) {
                let options = &options;
                scope.spawn(move || {
                    let mut home = Home::on(group, world.placement);
                    if world.placement.optimizer == Tier::Nvme {
                        let folder = std::env::temp_dir();
                        let aio = AioOptions::default();
                        home.swap = Some(SwapFile::create(&folder, "test", aio, None).unwrap());
                    }
                    let mut trainer = self.rank(&Cpu::new(1), home, options, resume).unwrap();
                    let flag = AtomicBool::new(false);
                    let end = trainer.run(&flag, &mut |event| {
                        if matches!(event, Event::Step(s) if s.step == stop) {
                            flag.store(true, Ordering::Relaxed);
                        }
                    });
                    end.unwrap();
                });
            }
        });
    }

    /// Trains from new weights to the end, interrupted after the steps in `stops` and resumed by a new trainer.
    fn train(&self, threads: usize, options: &TrainOptions, stops: &[u64]) {
        for (attempt, stop) in stops.iter().copied().chain([u64::MAX]).enumerate() {
            let mut trainer = self.trainer(threads, options, attempt > 0).unwrap();
            let flag = AtomicBool::new(false);
            let end = trainer.run(&flag, &mut |event| {
                if matches!(event, Event::Step(s) if s.step == stop) {
                    flag.store(true, Ordering::Relaxed);
                }
            });
            let wanted = if stop == u64::MAX {
                End::Finished
            } else {
                End::Interrupted
            };
            assert_eq!(end.unwrap(), wanted);
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn tokenizing(folder: &Path) -> TokenizeOptions {
    TokenizeOptions {
        threads: 1,
        bos: false,
        folder: folder.join("tokens"),
    }
}

fn tiny(vocab_size: usize) -> DecoderConfig {
    let config = json!({
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": true,
    });
    DecoderConfig::from_json("tiny", &config.to_string()).unwrap()
}

/// The files of the checkpoint after `step`: weights, moments and low halves, and where the run stands.
fn state(out: &Path, step: u64) -> [Vec<u8>; 3] {
    let checkpoint = Checkpoints::open(out).get(step).unwrap();
    [
        "model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    .map(|name| checkpoint.bytes(name).unwrap())
}

/// The records of a run without its speed.
fn records(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        record.as_object_mut().unwrap().remove("tokens_per_second");
        record
    });
    records.collect()
}

#[test]
fn a_resumed_run_is_the_same_to_the_bit() {
    let bench = Bench::new("resume");
    for dtype in [DType::F32, DType::Bf16] {
        for (index, optimizer) in [ADAMW, SGD, PLAIN_SGD, LION].into_iter().enumerate() {
            let mut whole = bench.options(&format!("whole-{dtype}-{index}"), 9);
            whole.dtype = dtype;
            whole.engine.optimizer = optimizer;
            whole.engine.activation_checkpointing = index % 2 == 1;
            bench.train(2, &whole, &[]);
            let mut parts = whole.clone();
            parts.out = bench.folder.join(format!("parts-{dtype}-{index}"));
            bench.train(2, &parts, &[2, 5]);
            let middle: Value = serde_json::from_slice(&state(&parts.out, 5)[2]).unwrap();
            assert_ne!(middle["sampler"]["position"], 0, "stopped in an epoch");
            let last: Value = serde_json::from_slice(&state(&parts.out, 9)[2]).unwrap();
            assert_ne!(last["sampler"]["epoch"], 0, "more than an epoch");
            assert!(
                state(&whole.out, 9) == state(&parts.out, 9),
                "{dtype} {optimizer:?}: weights, moments or place differ"
            );
            assert_eq!(records(&whole.out), records(&parts.out));
            assert_eq!(records(&whole.out).len(), 9 + 3, "steps and evaluations");
        }
    }
}

/// Ranks and what they share out.
#[derive(Clone, Copy, Debug)]
struct World {
    ranks: usize,
    placement: Placement,
}

/// All bytes of a checkpoint's tensors, whatever files they lie in.
fn everything(out: &Path, step: u64, weights_only: bool) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = Checkpoints::open(out).get(step).unwrap();
    let weights = checkpoint.weights().unwrap();
    let mut all: BTreeMap<String, Vec<u8>> = weights
        .names()
        .map(|name| (name.to_string(), weights.get(name).unwrap().bytes.to_vec()))
        .collect();
    for file in checkpoint
        .files()
        .filter(|f| f.starts_with("optimizer") && !weights_only)
    {
        let state = checkpoint.tensors(file).unwrap();
        for name in state.names() {
            let bytes = all.entry(name.to_string()).or_default();
            bytes.extend_from_slice(state.get(name).unwrap().bytes);
        }
    }
    all
}

/// A run goes on at another number of ranks, in another stage and on another tier, without conversion: with as many
/// ranks to the bit, with others within rounding.
#[test]
fn a_run_resumes_on_any_ranks_in_any_stage() {
    let bench = Bench::new("reshard");
    let world = |ranks, stage, tier| World {
        ranks,
        placement: Placement {
            stage,
            persistence_threshold: 300,
            optimizer: tier,
            parameters: if stage == Stage::Parameters {
                tier
            } else {
                Tier::Memory
            },
            swap_from: 256,
            ..Placement::default()
        },
    };
    let whole = |ranks| world(ranks, Stage::Replicated, Tier::Memory);
    let mut wanted = BTreeMap::new();
    for dtype in [DType::F32, DType::Bf16] {
        let options = |name: String| {
            let mut options = bench.options(&name, 6);
            options.dtype = dtype;
            options.eval_every = None;
            options
        };
        for ranks in [1, 2, 3, 4] {
            let options = options(format!("{dtype}-{ranks}"));
            bench.train_ranks(whole(ranks), &options, u64::MAX, false);
            wanted.insert(ranks, everything(&options.out, 6, false));
        }
        let changes = [
            (whole(2), world(2, Stage::Parameters, Tier::Nvme)),
            (
                world(2, Stage::Parameters, Tier::Nvme),
                world(2, Stage::Optimizer, Tier::Memory),
            ),
            (
                world(4, Stage::Parameters, Tier::Memory),
                world(3, Stage::Gradients, Tier::Nvme),
            ),
            (whole(1), world(4, Stage::Parameters, Tier::Nvme)),
            (world(3, Stage::Gradients, Tier::Memory), whole(1)),
        ];
        for (index, (before, after)) in changes.into_iter().enumerate() {
            let options = options(format!("{dtype}-change-{index}"));
            bench.train_ranks(before, &options, 3, false);
            bench.train_ranks(after, &options, u64::MAX, true);
            let found = everything(&options.out, 6, false);
            let want = &wanted[&after.ranks];
            assert!(found.keys().eq(want.keys()), "{before:?} to {after:?}");
            if before.ranks == after.ranks {
                assert!(found == *want, "{before:?} to {after:?}");
                continue;
            }
            let tensors = everything(&options.out, 6, true);
            for (name, bytes) in &tensors {
                let scale = want[name].len().max(1) as f64;
                let numbers = |bytes: &[u8]| -> Vec<f64> {
                    match dtype {
                        DType::F32 => bytes
                            .chunks(4)
                            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).into())
                            .collect(),
                        _ => bytes
                            .chunks(2)
                            .map(|b| {
                                f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)
                                    .into()
                            })
                            .collect(),
                    }
                };
                let (found, wanted) = (numbers(bytes), numbers(&want[name]));
                let apart = found.iter().zip(wanted).map(|(a, b)| (a - b).abs());
                let mean = apart.sum::<f64>() / scale;
                assert!(
                    mean < 1e-4,
                    "{before:?} to {after:?}: {name} is {mean} apart"
                );
            }
        }
    }
}

/// In `f16` a loss scale that starts too high skips steps: they are tried again on the next data, and checkpoints stand
/// where the run stands.
#[test]
fn skipped_steps_are_neither_counted_nor_saved() {
    let bench = Bench::new("skipped");
    let mut options = bench.options("run", 5);
    options.dtype = DType::F16;
    options.engine.loss_scale = Some(LossScale::Dynamic {
        initial_scale_power: 26,
        loss_scale_window: 2,
        hysteresis: 1,
        consecutive_hysteresis: false,
        min_loss_scale: 1.0,
    });
    (options.save_every, options.eval_every) = (Some(1), Some(1));
    let mut trainer = bench.trainer(1, &options, false).unwrap();
    let (mut skipped, mut saved) = (0, 0);
    let end = trainer.run(&AtomicBool::new(false), &mut |event| match event {
        Event::Step(step) => skipped = step.skipped,
        Event::Saved(_) => saved += 1,
        _ => {}
    });
    assert_eq!(end.unwrap(), End::Finished);
    assert_eq!((trainer.engine().global_steps(), saved), (5, 5));
    assert!(skipped > 2, "{skipped} skipped");
    assert_eq!(
        Checkpoints::open(&options.out).steps().unwrap(),
        [1, 2, 3, 4, 5]
    );

    // Another rule is another run.
    options.steps = 6;
    options.engine.loss_scale = Some(LossScale::Static(128.0));
    let refused = bench.trainer(1, &options, true).err().unwrap();
    assert!(refused.to_string().contains("the loss scale"), "{refused}");
}

#[test]
fn threads_do_not_change_the_bits() {
    let bench = Bench::new("threads");
    for dtype in [DType::F32, DType::Bf16] {
        let states = [1, 2, 3].map(|threads| {
            let mut options = bench.options(&format!("{dtype}-{threads}"), 4);
            options.dtype = dtype;
            bench.train(threads, &options, &[]);
            state(&options.out, 4)
        });
        assert!(states[0] == states[1], "{dtype}: 1 and 2 threads");
        assert!(states[0] == states[2], "{dtype}: 1 and 3 threads");
    }
}

/// The sums over a step's tokens are cut differently, so the last bits are not the same: weights within a part of the
/// largest, losses within a part of themselves.
#[test]
fn a_step_is_the_same_however_it_is_cut_into_batches() {
    let bench = Bench::new("cut");
    for (dtype, weights_within, losses_within) in
        [(DType::F32, 1e-6, 1e-6), (DType::Bf16, 4e-3, 1e-4)]
    {
        let mut whole: Option<(Vec<f64>, Vec<f64>)> = None;
        for (micro_batch, parts) in [(8, 1), (4, 2), (1, 8)] {
            let mut options = bench.options(&format!("{dtype}-{micro_batch}"), 5);
            options.dtype = dtype;
            options.engine.optimizer = SGD;
            options.schedule = Schedule::new(0.2, 1.0, Warmup::Steps(0), 5, Decay::Constant)
                .unwrap()
                .into();
            options.shape.micro_batch = micro_batch;
            options.shape.gradient_accumulation_steps = parts;
            bench.train(2, &options, &[]);
            let weights = weights(&options.out, 5);
            let losses: Vec<f64> = records(&options.out)
                .iter()
                .filter_map(|r| r["loss"].as_f64())
                .collect();
            let whole = whole.get_or_insert_with(|| (weights.clone(), losses.clone()));
            let largest = whole.0.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
            let far = |a: &[f64], b: &[f64]| -> f64 {
                assert_eq!(a.len(), b.len());
                let far = a.iter().zip(b).map(|(a, b)| (a - b).abs());
                far.fold(0.0, f64::max)
            };
            let (w, l) = (
                far(&weights, &whole.0) / largest,
                far(&losses, &whole.1) / whole.1[0],
            );
            println!("{dtype} {parts} x {micro_batch}: weights {w:.1e}, losses {l:.1e}");
            assert!(
                w <= weights_within && l <= losses_within,
                "{dtype} {parts} x {micro_batch}"
            );
        }
    }
}

/// All weights of the checkpoint after `step`.
fn weights(out: &Path, step: u64) -> Vec<f64> {
    let checkpoint = Checkpoints::open(out).get(step).unwrap();
    let tensors = checkpoint.weights().unwrap();
    let config = DecoderConfig::load(checkpoint.path()).unwrap();
    let map = config.naming.file_tensors(&decoder(&config));
    let values = map.iter().flat_map(|tensor| {
        let view = tensors.get(&tensor.name).unwrap();
        let mut values = vec![0f64; view.elements()];
        view.read_into(0..view.rows(), &mut values).unwrap();
        values
    });
    values.collect()
}

#[test]
fn a_run_leaves_its_last_checkpoints_and_its_records() {
    let bench = Bench::new("keep");
    let mut options = bench.options("run", 5);
    options.save_every = Some(1);
    options.keep = NonZeroUsize::new(2);
    bench.train(2, &options, &[]);
    assert_eq!(Checkpoints::open(&options.out).steps().unwrap(), [4, 5]);
    let events = std::fs::read_dir(&options.out).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("tfevents")
    });
    assert_eq!(events.count(), 1, "event files");
    let steps: Vec<Value> = records(&options.out)
        .into_iter()
        .filter(|r| r["loss"].is_number())
        .collect();
    assert_eq!(steps.len(), 5);
    for (i, record) in steps.iter().enumerate() {
        assert_eq!(record["step"], i + 1);
        let keys = ["loss", "lr", "grad_norm", "tokens"];
        assert!(keys.iter().all(|key| record[key].as_f64() > Some(0.0)));
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let bench = Bench::new("nan");
    let mut options = bench.options("run", 5);
    options.schedule = Schedule::new(1e35, 1.0, Warmup::Steps(0), 5, Decay::Constant)
        .unwrap()
        .into();
    options.save_every = Some(1);
    let mut trainer = bench.trainer(2, &options, false).unwrap();
    let error = trainer
        .run(&AtomicBool::new(false), &mut |_| ())
        .unwrap_err();
    let last = Checkpoints::open(&options.out).latest().unwrap().unwrap();
    let Error::NonFinite {
        step, checkpoint, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(*step, last.checkpoint.step() + 1);
    assert_eq!(checkpoint.as_deref(), Some(last.checkpoint.path()));
    for said in [
        format!("step {step}"),
        last.checkpoint.path().display().to_string(),
    ] {
        assert!(error.to_string().contains(&said), "{error}");
    }
    assert!(error.hint().unwrap().contains("learning rate"));
    // What the trainer still holds is what it saved last.
    let copy = bench.folder.join("copy");
    trainer.save_model(&copy).unwrap();
    let saved = std::fs::read(copy.join("model.safetensors")).unwrap();
    assert!(
        saved == state(&options.out, *step - 1)[0],
        "weights changed"
    );
}

#[test]
fn mistakes_are_named_with_a_hint() {
    let bench = Bench::new("mistakes");
    let good = bench.options("run", 3);
    bench.train(1, &good, &[2]);
    let check = |resume: bool, said: &str, change: &dyn Fn(&mut TrainOptions)| {
        let mut options = good.clone();
        change(&mut options);
        let error = bench.trainer(1, &options, resume).err();
        let error = error.unwrap_or_else(|| panic!("accepted: {said}"));
        assert!(error.to_string().contains(said), "{error} against {said}");
        assert!(error.hint().is_some(), "{error}");
    };
    check(false, "65 tokens against a context of 64", &|o| {
        o.shape.seq_len = 65
    });
    check(true, "the storage type was F32 and is BF16", &|o| {
        o.dtype = DType::Bf16
    });
    check(true, "the optimizer was AdamW", &|o| {
        o.engine.optimizer = LION
    });
    check(true, "the batch was", &|o| o.shape.micro_batch = 4);
    check(true, "the batch was", &|o| o.shape.seq_len = 16);
    check(true, "the packing was Documents", &|o| {
        o.packing = Packing::Stream
    });
    check(true, "seed of the data order was 5 and is 6", &|o| {
        o.seed = 6
    });

    let small = Bench {
        folder: bench.folder.join("small"),
        config: tiny(270),
        tokenizer: bench.tokenizer.clone(),
        file: bench.file.clone(),
    };
    let error = small.trainer(1, &good, false).err().unwrap();
    assert!(error.to_string().contains("270"), "{error}");
    assert!(error.hint().is_some(), "{error}");

    let tokenizer = Tokenizer::load(&bench.tokenizer).unwrap();
    let empty = bench.folder.join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let error = Corpus::open(&[empty], ReadOptions::default())
        .and_then(|corpus| tokenize(&corpus, &tokenizer, &tokenizing(&bench.folder), &mut |_| ()))
        .unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
    assert!(error.hint().is_some(), "{error}");
}

/// Real steps on random tokens: bytes taken from the system. With experts, every step meets blocks of other sizes, and
/// it takes more of them until the bytes stay the same.
fn measured(
    config: &DecoderConfig,
    dtype: DType,
    options: EngineOptions,
    shape: StepShape,
    placement: Placement,
) -> usize {
    let cpu = Cpu::new(2);
    let model = decoder(config);
    let mut home = Home::on(Group::solo(), placement);
    let swap = SwapFile::create(&std::env::temp_dir(), "plan", AioOptions::default(), None);
    home.swap = Some(swap.unwrap());
    let fill = |_, p: &ParamSpec, range| Ok(p.fill_range(&cpu, 0, dtype, range));
    let store = Store::build(&cpu, home, model.units(), fill).unwrap();
    let mut engine = Engine::initialize(model, store, options).unwrap();
    let mut rng = Rng::new(1);
    let tokens = shape.micro_batch * shape.seq_len;
    let steps = if config.experts.is_some() { 30 } else { 3 };
    for _ in 0..steps {
        for _ in 0..shape.gradient_accumulation_steps {
            let mut id = |_| rng.next_u64() % config.vocab_size as u64;
            let ids: Vec<u32> = (0..tokens).map(&mut id).map(|i| i as u32).collect();
            let goal = Goal::Loss {
                targets: (0..tokens).map(&mut id).map(|i| i as i64).collect(),
                denominator: (tokens * shape.gradient_accumulation_steps) as f64,
            };
            let mut batch = Tokens::new(ids, &vec![shape.seq_len; shape.micro_batch], goal, dtype);
            let coefficient = config
                .experts
                .as_ref()
                .map_or(0.0, |e| e.router_aux_loss_coef);
            batch.router =
                (coefficient > 0.0).then(|| (Arc::new(RouterStats::default()), coefficient));
            let loss = engine.forward(batch).unwrap();
            engine.backward(loss).unwrap();
        }
        engine.step_at(1e-4).unwrap();
    }
    cpu.memory.peak().reserved
}

#[test]
fn the_plan_is_what_a_run_takes() {
    let cases = [
        ("llama", "1m", DType::F32, ADAMW, false, [4, 128, 1]),
        ("llama", "1m", DType::Bf16, SGD, false, [4, 128, 2]),
        ("llama", "3m", DType::Bf16, ADAMW, false, [4, 128, 1]),
        ("llama", "3m", DType::Bf16, LION, true, [4, 128, 1]),
        ("gpt2", "1m", DType::Bf16, ADAMW, true, [4, 128, 1]),
        ("gpt2", "3m", DType::F32, PLAIN_SGD, false, [2, 256, 1]),
        ("gemma2", "1m", DType::Bf16, ADAMW, false, [4, 128, 1]),
        ("olmo2", "1m", DType::F32, LION, false, [4, 128, 1]),
        ("mixtral", "1m", DType::Bf16, ADAMW, false, [4, 128, 1]),
        ("mixtral", "1m", DType::F32, ADAMW, true, [4, 128, 2]),
    ];
    let mut wrong = Vec::new();
    for (arch, size, dtype, optimizer, activation_checkpointing, [micro_batch, seq_len, parts]) in
        cases
    {
        let text = preset_config(arch, size, 2048).unwrap();
        let config = DecoderConfig::from_json(arch, &text).unwrap();
        let options = EngineOptions {
            optimizer,
            gradient_clipping: Some(1.0),
            activation_checkpointing,
            losses: Losses::Sum,
            ..Default::default()
        };
        let shape = StepShape {
            micro_batch,
            seq_len,
            gradient_accumulation_steps: parts,
        };
        for (optimizer_tier, parameter_tier) in [
            (Tier::Memory, Tier::Memory),
            (Tier::Nvme, Tier::Memory),
            (Tier::Nvme, Tier::Nvme),
        ] {
            if config.experts.is_some() && optimizer_tier == Tier::Nvme {
                continue;
            }
            let placement = Placement {
                stage: Stage::Parameters,
                optimizer: optimizer_tier,
                parameters: parameter_tier,
                swap_from: 1 << 13,
                ..Placement::default()
            };
            let plan = plan_rank(&config, dtype, options, shape, placement, 1);
            let planned = plan.memory.reserved;
            let taken = measured(&config, dtype, options, shape, placement);
            let ratio = planned as f64 / taken as f64;
            let case = format!(
                "{arch} {size} {dtype} {optimizer:?} {activation_checkpointing} {shape:?} \
                 {optimizer_tier:?} {parameter_tier:?}"
            );
            println!("{case}: planned {planned}, taken {taken}: {ratio:.3}");
            // The plan of a mixture of experts is too low, as its documentation says: 0.89 and 0.77 here.
            let least = if config.experts.is_some() { 0.7 } else { 0.95 };
            if !(least..=1.05).contains(&ratio) {
                wrong.push(format!("{case}: planned {planned}, taken {taken}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
