//! Stages of ZeRO over several ranks: the same bits in every stage, the bytes that theory asks for, and the memory that
//! each rank saves.

use std::time::Duration;
use windlass_comm::{Group, Traffic};
use windlass_model::{DecoderConfig, Goal, Tokens, decoder, preset_config};
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Home, Placement, Stage, Store, Tier, Wire, partition};
use windlass_tensor::kernels::memory::Category;
use windlass_tensor::kernels::optim::Storage;
use windlass_tensor::{Cpu, DType, ParamSpec, Rng};
use windlass_train::loss_scale::LossScale;
use windlass_train::{Engine, EngineOptions, Losses, Optimizer, StepShape, plan_rank};

const STAGES: [Stage; 4] = [
    Stage::Replicated,
    Stage::Optimizer,
    Stage::Gradients,
    Stage::Parameters,
];
const STEPS: usize = 3;
const SEQ: usize = 24;

/// A training job of the tests.
#[derive(Clone, Copy, Debug)]
struct Job {
    ranks: usize,
    accumulation: usize,
    dtype: DType,
    placement: Placement,
    optimizer: Optimizer,
    checkpointing: bool,
    moments: Storage,
    loss_scale: Option<LossScale>,
    sum_over_ranks: bool,
    /// Passes of a step, from the first one, that are made within `no_sync`.
    quiet: usize,
}

impl Job {
    fn new(ranks: usize, stage: Stage) -> Self {
        Job {
            ranks,
            accumulation: 1,
            dtype: DType::F32,
            placement: Placement {
                stage,
                persistence_threshold: 0,
                ..Default::default()
            },
            optimizer: Optimizer::ADAMW,
            checkpointing: false,
            moments: Storage::F32,
            loss_scale: None,
            sum_over_ranks: false,
            quiet: 0,
        }
    }
}

/// What a rank saw.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// Masters of all parameters after the last step.
    masters: Vec<Vec<f32>>,
    skipped: u64,
}

fn config() -> DecoderConfig {
    let text = preset_config("llama", "1m", 320).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (key, value) in [
        ("hidden_size", 48),
        ("intermediate_size", 72),
        ("num_hidden_layers", 2),
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("max_position_embeddings", 64),
    ] {
        json[key] = value.into();
    }
    if let Some(map) = json.as_object_mut() {
        map.remove("head_dim");
        map.insert("tie_word_embeddings".into(), false.into());
    }
    DecoderConfig::from_json("small", &json.to_string()).unwrap()
}

/// The batch with a number among all batches of all ranks and steps.
fn batch(number: usize, dtype: DType, batches: usize) -> Tokens {
    let mut rng = Rng::new(number as u64 + 1);
    let mut id = || (rng.next_u64() % 320) as u32;
    let ids: Vec<u32> = (0..SEQ).map(|_| id()).collect();
    let targets: Vec<i64> = (0..SEQ).map(|_| i64::from(id())).collect();
    let goal = Goal::Loss {
        targets: targets.into(),
        denominator: (SEQ * batches) as f64,
    };
    Tokens::new(ids, &[SEQ], goal, dtype)
}

/// One rank of a job.
fn rank(job: Job, group: Group) -> (Seen, Traffic, [usize; 3]) {
    let cpu = Cpu::new(1);
    let model = decoder(&config());
    let (rank, ranks) = (group.rank(), group.size());
    let mut home = Home::on(group, job.placement);
    if job.placement.needs_disk() {
        let name = format!("rank-{rank}");
        let swap = SwapFile::create(&std::env::temp_dir(), &name, AioOptions::default(), None);
        home.swap = Some(swap.unwrap());
    }
    let store = Store::build(&cpu, home, model.units(), |_, p, range| {
        Ok(p.fill_range(&cpu, 7, job.dtype, range))
    });
    let options = EngineOptions {
        optimizer: job.optimizer,
        gradient_clipping: Some(0.5),
        activation_checkpointing: job.checkpointing,
        gradient_accumulation_steps: job.accumulation,
        losses: Losses::Sum,
        moments: job.moments,
        min_8bit_size: 0,
        loss_scale: job.loss_scale,
        sum_over_ranks: job.sum_over_ranks,
        ..Default::default()
    };
    let mut engine = Engine::initialize(model, store.unwrap(), options).unwrap();
    let mut seen = Seen::default();
    let mut states = [0; 3];
    for step in 0..STEPS {
        let mut loss = 0.0;
        for micro in 0..job.accumulation {
            let number = (step * job.accumulation + micro) * ranks + rank;
            let batches = ranks * job.accumulation;
            let batch = batch(number, job.dtype, batches);
            if micro < job.quiet {
                let mut quiet = engine.no_sync().unwrap();
                let out = quiet.forward(batch).unwrap();
                loss += out.value();
                quiet.backward(out).unwrap();
                continue;
            }
            let out = engine.forward(batch).unwrap();
            loss += out.value();
            engine.backward(out).unwrap();
        }
        let all = engine.store().group().collect("loss", &[loss]).unwrap();
        seen.losses.push(all.iter().sum());
        if step + 1 == STEPS {
            let now = cpu.memory.now();
            let kinds = [Category::Weights, Category::Gradients, Category::Optimizer];
            states = kinds.map(|kind| now.of(kind));
        }
        seen.norms.push(engine.step_at(1e-2).unwrap().grad_norm);
    }
    seen.skipped = engine.skipped_steps();
    let traffic = engine.store().group().traffic();
    if let Some(io) = engine.store().io_stats() {
        assert!(io.bytes_read > 0 && io.bytes_written > 0, "{io:?}");
    }
    let ids: Vec<_> = engine.store().params().map(|(id, _)| id).collect();
    for id in ids {
        seen.masters.push(engine.store_mut().master(id).unwrap());
    }
    (seen, traffic, states)
}

/// All ranks of a job.
fn run(job: Job) -> Vec<(Seen, Traffic, [usize; 3])> {
    std::thread::scope(|scope| {
        let groups = Group::local(job.ranks, Duration::from_secs(60));
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|group| scope.spawn(move || rank(job, group)))
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn all_stages_give_the_same_bits() {
    for (ranks, accumulation) in [(1, 4), (2, 1), (2, 4), (3, 1), (4, 2), (7, 1)] {
        for dtype in [DType::F32, DType::Bf16] {
            let mut jobs = Vec::new();
            for stage in STAGES {
                let job = Job {
                    accumulation,
                    dtype,
                    ..Job::new(ranks, stage)
                };
                jobs.push(job);
                for parameters in [Tier::Memory, Tier::Nvme] {
                    let nvme = Placement {
                        parameters,
                        optimizer: Tier::Nvme,
                        sub_group: 9000,
                        swap_from: 500,
                        buffers: 2,
                        ..job.placement
                    };
                    let partitioned = stage >= Stage::Optimizer && parameters == Tier::Memory;
                    if partitioned || stage == Stage::Parameters {
                        jobs.push(Job {
                            placement: nvme,
                            ..job
                        });
                    }
                }
                // Layers run again from inputs in memory or on the disk, with the parameters there or not.
                for parameters in [Tier::Memory, Tier::Nvme] {
                    let tiered = Placement {
                        parameters,
                        activations: Tier::Nvme,
                        swap_from: 500,
                        ..job.placement
                    };
                    if tiered.is_consistent() {
                        jobs.push(Job {
                            checkpointing: true,
                            placement: tiered,
                            ..job
                        });
                    }
                }
                jobs.push(Job {
                    checkpointing: true,
                    placement: Placement {
                        bucket: 700,
                        persistence_threshold: 2000,
                        ..job.placement
                    },
                    ..job
                });
            }
            let want = run(jobs[0]).swap_remove(0).0;
            assert!(want.losses.iter().all(|l| l.is_finite()));
            assert!(want.norms[0] > 0.5, "clipping is at work: {:?}", want.norms);
            for job in jobs {
                for (index, (seen, ..)) in run(job).into_iter().enumerate() {
                    assert!(seen == want, "rank {index} of {job:?}");
                }
            }
        }
    }
}

/// Ways to reduce that round differently, or mean something else: close to the exact mean, or a multiple of it.
#[test]
fn other_reductions_give_what_they_promise() {
    let exact = Job {
        accumulation: 2,
        optimizer: SGD,
        ..Job::new(3, Stage::Optimizer)
    };
    let want = run(exact).swap_remove(0).0;
    let with = |change: &dyn Fn(&mut Job)| {
        let mut job = exact;
        change(&mut job);
        run(job).swap_remove(0).0
    };
    let once = with(&|job| job.placement.reduce_once = true);
    // The same order of sums, whether the last pass reduces or the step.
    for quiet in [1, 2] {
        assert!(with(&|job| job.quiet = quiet) == once, "{quiet} of 2");
    }
    let coarse = with(&|job| job.placement.wire = Wire::Bf16);
    for (seen, tolerance) in [(&once, 1e-6), (&coarse, 2e-2)] {
        assert!(seen.masters != want.masters, "it rounds in another way");
        for (a, b) in seen.norms.iter().zip(&want.norms) {
            assert!((a - b).abs() < tolerance * b, "norm {a} and {b}");
        }
    }
    let sum = with(&|job| job.sum_over_ranks = true);
    let ratio = sum.norms[0] / want.norms[0];
    assert!(
        (ratio - 3.0).abs() < 1e-12,
        "{ratio} times the mean over 3 ranks"
    );
}

/// In `f16` the loss is scaled; a scale that is too high makes every stage skip the same steps.
#[test]
fn half_precision_skips_the_same_steps_in_all_stages() {
    let jobs = STAGES.map(|stage| Job {
        dtype: DType::F16,
        optimizer: SGD,
        loss_scale: Some(LossScale::Dynamic {
            initial_scale_power: 24,
            loss_scale_window: 1,
            hysteresis: 1,
            consecutive_hysteresis: false,
            min_loss_scale: 1.0,
        }),
        ..Job::new(2, stage)
    });
    let want = run(jobs[0]).swap_remove(0).0;
    assert!(
        want.norms[0].is_infinite() || want.norms[0].is_nan(),
        "{want:?}"
    );
    assert_ne!(want.skipped, 0);
    for job in jobs {
        for (index, (seen, ..)) in run(job).into_iter().enumerate() {
            assert_eq!(seen.skipped, want.skipped);
            assert!(seen.masters == want.masters, "rank {index} of {job:?}");
            assert!(seen.losses == want.losses, "rank {index} of {job:?}");
        }
    }
}

/// Rules that look at whole parameters, and moments that are not stored in `f32`.
#[test]
fn all_optimizers_give_the_same_bits_in_all_stages() {
    let adam = |decoupled| Optimizer::Adam {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.1,
        decoupled,
        bias_correction: true,
    };
    let lamb = Optimizer::Lamb {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
        weight_decay: 0.1,
        bias_correction: true,
        min_coeff: 0.01,
        max_coeff: 10.0,
    };
    let muon = Optimizer::Muon {
        momentum: 0.95,
        weight_decay: 0.1,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-10,
        adam_lr_ratio: 0.1,
    };
    let adagrad = Optimizer::Adagrad {
        eps: 1e-10,
        weight_decay: 0.1,
    };
    for (optimizer, moments) in [
        (adam(false), Storage::F32),
        (adam(true), Storage::Bf16),
        (adam(true), Storage::Q8),
        (adagrad, Storage::F32),
        (lamb, Storage::F32),
        (lamb, Storage::Bf16),
        (muon, Storage::F32),
    ] {
        for (ranks, dtype) in [(3, DType::F32), (2, DType::Bf16)] {
            let jobs = STAGES.map(|stage| Job {
                optimizer,
                moments,
                dtype,
                ..Job::new(ranks, stage)
            });
            let want = run(jobs[0]).swap_remove(0).0;
            assert!(
                want.losses[STEPS - 1] < want.losses[0],
                "{optimizer:?} learns"
            );
            for job in jobs {
                for (index, (seen, ..)) in run(job).into_iter().enumerate() {
                    assert!(seen == want, "rank {index} of {job:?}");
                }
            }
        }
    }
}

#[test]
fn several_ranks_learn_what_one_does() {
    for (optimizer, tolerance) in [(Optimizer::ADAMW, 2e-3), (SGD, 1e-5)] {
        let one = Job {
            accumulation: 6,
            optimizer,
            ..Job::new(1, Stage::Replicated)
        };
        let want = run(one).swap_remove(0).0;
        for (ranks, accumulation) in [(2, 3), (3, 2), (6, 1)] {
            let job = Job {
                accumulation,
                optimizer,
                ..Job::new(ranks, Stage::Parameters)
            };
            let seen = run(job).swap_remove(0).0;
            for (a, b) in seen.losses.iter().zip(&want.losses) {
                assert!((a - b).abs() < 1e-5 * b, "{ranks} ranks: loss {a} and {b}");
            }
            for (a, b) in seen
                .masters
                .iter()
                .flatten()
                .zip(want.masters.iter().flatten())
            {
                let scale = 1e-2 + b.abs();
                assert!(
                    (a - b).abs() < tolerance * scale,
                    "{ranks} ranks: {a} and {b}"
                );
            }
        }
    }
}

const SGD: Optimizer = Optimizer::Sgd {
    momentum: 0.9,
    dampening: 0.0,
    nesterov: false,
    weight_decay: 0.0,
};

/// Elements of the model's parameters, with the rank's own part.
fn elements(ranks: usize, rank: usize) -> (usize, usize, usize) {
    let model = decoder(&config());
    let params = model.units().iter().flat_map(|unit| &unit.params);
    let lens: Vec<usize> = params.map(|p| p.shape.len()).collect();
    let own = lens.iter().map(|&len| partition(len, ranks)[rank].len());
    let head = model.units().last().unwrap();
    let head: usize = head.params.iter().map(|p| p.shape.len()).sum();
    (lens.iter().sum(), own.sum(), head)
}

/// Bytes sent are those of theory: reducing sends what others own, gathering sends one's own to all others.
#[test]
fn bytes_sent_are_those_of_theory() {
    for ranks in [2, 3, 4, 7] {
        for (accumulation, reduce_once, quiet) in [
            (1, false, 0),
            (4, false, 0),
            (4, true, 0),
            (4, false, 2),
            (4, false, 3),
            (4, false, 4),
        ] {
            for stage in STAGES {
                for wire in [Wire::Exact, Wire::Bf16] {
                    let mut job = Job {
                        accumulation,
                        dtype: DType::Bf16,
                        quiet,
                        ..Job::new(ranks, stage)
                    };
                    if (reduce_once || quiet > 0) && stage >= Stage::Gradients {
                        continue;
                    }
                    job.placement.reduce_once = reduce_once;
                    job.placement.wire = wire;
                    let mut total = 0;
                    for (index, (_, traffic, _)) in run(job).into_iter().enumerate() {
                        let (all, own, _) = elements(ranks, index);
                        let head_own: usize = head_own(ranks, index);
                        let sent = if wire == Wire::Bf16 { 2 } else { 4 };
                        // The pass after quiet ones takes their sums along; with no other pass, the step does.
                        let reduced = match reduce_once {
                            true => 1,
                            false => accumulation - quiet.min(accumulation - 1),
                        };
                        let reduce = sent * (all - own) * reduced;
                        // Stage 3 gathers each unit forward and backward; the last one, whose passes follow each
                        // other, once.
                        let gather = (ranks - 1)
                            * match stage {
                                Stage::Replicated => 4 * own,
                                Stage::Optimizer | Stage::Gradients => 2 * own,
                                Stage::Parameters => 2 * accumulation * (2 * own - head_own),
                            };
                        let wanted = STEPS * (reduce + gather);
                        let found = traffic.all_gather.bytes + traffic.reduce_scatter.bytes;
                        assert_eq!(found as usize, wanted, "rank {index} of {job:?}");
                        total += found as usize;
                    }
                    if stage == Stage::Replicated && wire == Wire::Exact && reduced_once(job) {
                        let (all, ..) = elements(ranks, 0);
                        assert_eq!(total, STEPS * 2 * all * (ranks - 1) * 4, "2Y(N-1)");
                    }
                }
            }
        }
    }
}

/// Sums of gradients kept in half the bytes: rounded once for each pass, alike in all stages, near the exact ones.
#[test]
fn gradients_kept_in_16_bits_give_the_same_bits_in_all_stages() {
    let adam = Optimizer::ADAMW;
    let lamb = Optimizer::Lamb {
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-6,
        weight_decay: 0.1,
        bias_correction: true,
        min_coeff: 0.01,
        max_coeff: 10.0,
    };
    for (ranks, kept, dtype, optimizer) in [
        (1, DType::Bf16, DType::F32, SGD),
        (2, DType::Bf16, DType::Bf16, adam),
        (3, DType::F16, DType::F16, lamb),
        (3, DType::Bf16, DType::F32, SGD),
    ] {
        let job = |stage, grad_accum| {
            let mut job = Job {
                accumulation: 3,
                dtype,
                optimizer,
                ..Job::new(ranks, stage)
            };
            job.placement.grad_accum = grad_accum;
            run(job)
        };
        let exact = job(Stage::Optimizer, DType::F32).swap_remove(0);
        let mut want = None;
        for stage in STAGES {
            for (rank, (seen, _, [_, gradients, _])) in job(stage, kept).into_iter().enumerate() {
                let want = want.get_or_insert_with(|| seen.clone());
                assert!(seen == *want, "rank {rank} of {ranks} in {stage:?}");
                assert!(seen.masters != exact.0.masters, "it rounds");
                for (a, b) in seen.norms.iter().zip(&exact.0.norms) {
                    assert!((a - b).abs() < 2e-2 * b, "norm {a} and {b}");
                }
                if rank == 0 && stage == Stage::Optimizer {
                    let ratio = gradients as f64 / exact.2[1] as f64;
                    assert!((0.45..0.6).contains(&ratio), "{ratio} of the memory");
                }
            }
        }
    }
}

/// Where ranks keep a part of the gradients each, every pass reduces them, and asking for less is refused in words.
#[test]
fn gradients_are_not_left_on_ranks_that_keep_a_part_of_them() {
    for stage in STAGES {
        let cpu = Cpu::new(1);
        let (model, job) = (decoder(&config()), Job::new(1, stage));
        let home = Home::on(Group::solo(), job.placement);
        let store = Store::build(&cpu, home, model.units(), |_, p, range| {
            Ok(p.fill_range(&cpu, 7, job.dtype, range))
        });
        let mut engine = Engine::initialize(model, store.unwrap(), Default::default()).unwrap();
        let refused = engine
            .no_sync()
            .err()
            .map(|error| (error.to_string(), error.hint()));
        assert_eq!(refused.is_some(), stage >= Stage::Gradients, "{refused:?}");
        if let Some((message, hint)) = refused {
            assert!(
                message.contains(&format!("stage {}", stage.number())),
                "{message}"
            );
            assert!(hint.unwrap().contains("stage 0 or 1"));
        }
    }
}

/// Parameters up to the threshold stay whole in stage 3: they are not gathered, and shared once after the update.
#[test]
fn persistent_parameters_are_gathered_never() {
    let (ranks, threshold) = (3, 2000);
    let mut job = Job::new(ranks, Stage::Parameters);
    job.placement.persistence_threshold = threshold;
    for (index, (_, traffic, _)) in run(job).into_iter().enumerate() {
        let own = |persistent: bool, units: &dyn Fn(usize) -> bool| -> usize {
            let model = decoder(&config());
            let units = model.units().iter().enumerate().filter(|(i, _)| units(*i));
            let params = units.flat_map(|(_, unit)| unit.params.iter());
            let lens = params.map(|p| p.shape.len());
            let lens = lens.filter(|len| (*len <= threshold) == persistent);
            lens.map(|len| partition(len, ranks)[index].len()).sum()
        };
        let head = decoder(&config()).layers().last().unwrap().0;
        let all = own(false, &|_| true);
        assert!(own(true, &|_| true) > 0, "there are some");
        let gathered = 2 * all - own(false, &|unit| unit == head);
        let wanted = STEPS * 4 * (ranks - 1) * (gathered + own(true, &|_| true));
        assert_eq!(traffic.all_gather.bytes as usize, wanted, "rank {index}");
    }
}

fn reduced_once(job: Job) -> bool {
    job.accumulation == 1 || job.placement.reduce_once
}

fn head_own(ranks: usize, rank: usize) -> usize {
    let model = decoder(&config());
    let (unit, _) = model.layers().last().unwrap();
    let params = model.units()[unit].params.iter();
    params
        .map(|p| partition(p.shape.len(), ranks)[rank].len())
        .sum()
}

/// Model states of a rank: 16 bytes a parameter in `bf16` with exact masters, of which weights take 2, gradients 4, and
/// masters and moments 10.
#[test]
fn memory_falls_with_the_stage() {
    for ranks in [1, 2, 4] {
        for stage in STAGES {
            let mut job = Job::new(ranks, stage);
            job.dtype = DType::Bf16;
            for (index, (_, _, states)) in run(job).into_iter().enumerate() {
                let (all, own, _) = elements(ranks, index);
                let part = |from: Stage| if stage >= from { own } else { all };
                // Gradients are reduced as they come: no stage keeps more than it updates.
                let wanted = [
                    2 * part(Stage::Parameters),
                    4 * part(Stage::Optimizer),
                    10 * part(Stage::Optimizer),
                ];
                for (kind, (found, wanted)) in states.into_iter().zip(wanted).enumerate() {
                    // Blocks of memory are rounded up, by 64 bytes at least for each of 20 tensors.
                    let slack = wanted / 16 + 20 * 128;
                    assert!(
                        (wanted..=wanted + slack).contains(&found),
                        "kind {kind} of rank {index} of {job:?}: {found} bytes, {wanted} in theory"
                    );
                }
            }
        }
    }
}

/// Inputs of layers that rest on the disk take the memory of a few, not of all layers; the losses are the same, and the
/// plan knows it.
#[test]
fn activations_on_the_disk_take_no_memory() {
    const LAYERS: usize = 16;
    let text = preset_config("llama", "1m", 320).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["num_hidden_layers"] = LAYERS.into();
    let config = DecoderConfig::from_json("deep", &json.to_string()).unwrap();
    let shape = StepShape {
        micro_batch: 2,
        seq_len: 128,
        gradient_accumulation_steps: 2,
    };
    let tokens = shape.micro_batch * shape.seq_len;
    let options = EngineOptions {
        activation_checkpointing: true,
        losses: Losses::Sum,
        gradient_accumulation_steps: 2,
        ..Default::default()
    };
    let [memory, nvme] = [Tier::Memory, Tier::Nvme].map(|activations| {
        let placement = Placement {
            activations,
            swap_from: 1 << 10,
            ..Default::default()
        };
        let cpu = Cpu::new(1);
        let mut home = Home::on(Group::solo(), placement);
        let folder = std::env::temp_dir();
        let swap = SwapFile::create(&folder, "inputs", AioOptions::default(), None);
        home.swap = Some(swap.unwrap());
        let model = decoder(&config);
        let fill = |_, p: &ParamSpec, range| Ok(p.fill_range(&cpu, 3, DType::F32, range));
        let store = Store::build(&cpu, home, model.units(), fill).unwrap();
        let mut engine = Engine::initialize(model, store, options).unwrap();
        let mut losses = Vec::new();
        for step in 0..STEPS {
            for micro in 0..2 {
                let ids = (0..tokens).map(|i| ((i * 7 + step + micro) % 320) as u32);
                let goal = Goal::Loss {
                    targets: (0..tokens).map(|i| (i % 320) as i64).collect(),
                    denominator: 2.0 * tokens as f64,
                };
                let batch = Tokens::new(ids.collect(), &[shape.seq_len; 2], goal, DType::F32);
                let loss = engine.forward(batch).unwrap();
                losses.push(loss.value().to_bits());
                engine.backward(loss).unwrap();
            }
            engine.step_at(1e-2).unwrap();
        }
        let taken = cpu.memory.peak().reserved;
        let plan = plan_rank(&config, DType::F32, options, shape, placement, 1);
        assert_eq!(plan.memory.reserved, taken, "{activations:?}");
        let written = engine.store().io_stats().unwrap().bytes_written as usize;
        (losses, taken, written)
    });
    assert_eq!(memory.0, nvme.0, "losses");
    let input = tokens * config.hidden_size * 4;
    // The first layer's input is the embedding's; the last one's is asked for at once.
    assert_eq!(nvme.2, STEPS * 2 * (LAYERS - 1) * input);
    assert_eq!(memory.2, 0);
    let saved = memory.1 - nvme.1;
    let least = (LAYERS - 6) * input;
    assert!(saved >= least, "{saved} bytes saved, {least} expected");
}
