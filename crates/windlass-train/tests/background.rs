//! Checkpoints written beside training: the same bytes, errors at the next step, and the memory that was planned.

use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use windlass_comm::Group;
use windlass_model::{DecoderConfig, Goal, Tokens, decoder, preset_config};
use windlass_store::checkpoint::Checkpoints;
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Home, Placement, Stage, Store, Tier};
use windlass_tensor::{Cpu, DType};
use windlass_train::{Engine, EngineOptions, Result, StepShape, plan_rank};

const SHAPE: StepShape = StepShape {
    micro_batch: 2,
    seq_len: 64,
    gradient_accumulation_steps: 1,
};

fn config() -> DecoderConfig {
    let text = preset_config("llama", "3m", 2048).unwrap();
    DecoderConfig::from_json("small", &text).unwrap()
}

fn engine(group: Group, stage: Stage, dtype: DType, background: bool) -> Engine<Tokens> {
    let (cpu, model) = (Cpu::new(1), decoder(&config()));
    let placement = Placement {
        stage,
        persistence_threshold: 0,
        ..Default::default()
    };
    let store = Store::build(
        &cpu,
        Home::on(group, placement),
        model.units(),
        |_, p, range| Ok(p.fill_range(&cpu, 7, dtype, range)),
    );
    let options = EngineOptions {
        async_checkpoints: background,
        ..Default::default()
    };
    Engine::initialize(model, store.unwrap(), options).unwrap()
}

fn step(engine: &mut Engine<Tokens>) -> Result<()> {
    let (step, rank) = (engine.global_steps(), engine.store().group().rank());
    let tokens = SHAPE.micro_batch * SHAPE.seq_len;
    let id = |i: usize| (i * 31 + rank * 7 + step as usize) % 2048;
    let goal = Goal::Loss {
        targets: (1..=tokens).map(|i| id(i) as i64).collect(),
        denominator: tokens as f64,
    };
    let ids = (0..tokens).map(|i| id(i) as u32).collect();
    let lens = [SHAPE.seq_len; SHAPE.micro_batch];
    let loss = engine.forward(Tokens::new(ids, &lens, goal, engine.store().dtype()))?;
    engine.backward(loss)?;
    engine.step().map(drop)
}

/// `job` on every rank, what each returned.
fn ranks<T: Send>(count: usize, job: impl Fn(Group) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let groups = Group::local(count, Duration::from_secs(60));
        let ranks: Vec<_> = groups.into_iter().map(|g| scope.spawn(|| job(g))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// All files below a folder, by their path in it.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (name, path) = (PathBuf::from(entry.file_name()), entry.path());
        if path.is_dir() {
            let below = files(&path).into_iter();
            found.extend(below.map(|(file, bytes)| (name.join(file), bytes)));
        } else {
            found.insert(name, std::fs::read(path).unwrap());
        }
    }
    found
}

#[test]
fn the_bytes_are_those_of_a_save_that_is_waited_for() {
    for (count, stage, dtype) in [
        (1, Stage::Replicated, DType::F32),
        (2, Stage::Replicated, DType::Bf16),
        (3, Stage::Parameters, DType::Bf16),
        (2, Stage::Gradients, DType::F16),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dir = |background| folder.path().join(format!("background-{background}"));
        for background in [false, true] {
            ranks(count, |group| {
                let mut engine = engine(group, stage, dtype, background);
                for _ in 0..4 {
                    step(&mut engine).unwrap();
                    let state = json!({"step": engine.global_steps()});
                    let path = engine
                        .save_checkpoint(&dir(background), None, &state)
                        .unwrap();
                    let done = engine.last_checkpoint() == Some(&path);
                    assert!(background || done, "a save that is waited for is there");
                }
                engine.finish_checkpoint().unwrap();
                let last = engine.last_checkpoint().unwrap();
                assert!(last.join("manifest.json").exists(), "{}", last.display());
            });
        }
        let (direct, held) = (files(&dir(false)), files(&dir(true)));
        assert!(direct.len() > 12, "{:?}", direct.keys());
        assert!(direct == held, "{count} ranks, {stage:?}, {dtype}");
        // Loading waits for what is on its way, and finds it.
        ranks(count, |group| {
            let mut engine = engine(group, stage, dtype, true);
            assert!(engine.load_checkpoint(&dir(true), None).unwrap().is_some());
            step(&mut engine).unwrap();
            engine
                .save_checkpoint(&dir(true), None, &json!({}))
                .unwrap();
            let (path, _) = engine.load_checkpoint(&dir(true), None).unwrap().unwrap();
            assert_eq!(Some(path.as_path()), engine.last_checkpoint());
            assert_eq!(engine.global_steps(), 5);
        });
    }
}

/// What hinders the thread is told at a later step, on every rank, by the name of the file; the run can go on.
#[test]
fn errors_come_at_a_later_step_and_leave_the_checkpoint_before() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let messages = ranks(2, |group| {
        let mut engine = engine(group, Stage::Optimizer, DType::F32, true);
        step(&mut engine).unwrap();
        engine.save_checkpoint(dir, None, &json!({})).unwrap();
        engine.finish_checkpoint().unwrap();
        step(&mut engine).unwrap();
        let path = engine.save_checkpoint(dir, None, &json!({})).unwrap();
        // Something stands where the folder is to be.
        std::fs::create_dir_all(path.join("in the way")).unwrap();
        engine.store().group().barrier("in the way").unwrap();
        let mut failed = None;
        for _ in 0..500 {
            let steps = engine.global_steps();
            if let Err(error) = step(&mut engine) {
                assert_eq!(engine.global_steps(), steps, "the step was not taken");
                failed = Some(error.to_string());
                break;
            }
        }
        let latest = Checkpoints::open(dir).latest().unwrap().unwrap();
        assert_eq!(latest.checkpoint.step(), 1);
        // The same gradients serve the step that was refused.
        engine.step().unwrap();
        engine.save_checkpoint(dir, None, &json!({})).unwrap();
        engine.finish_checkpoint().unwrap();
        let latest = Checkpoints::open(dir).latest().unwrap().unwrap();
        assert_eq!(latest.checkpoint.step(), engine.global_steps());
        failed.expect("an error at a later step")
    });
    assert!(messages[0].contains("global_step2"), "{messages:?}");
    assert!(
        messages[1].contains("rank 0 could not commit a checkpoint")
            && messages[1].contains("global_step2"),
        "{messages:?}"
    );
}

/// An engine that goes before its checkpoint is written waits for it.
#[test]
fn a_lone_engine_does_not_leave_its_checkpoint_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = engine(Group::solo(), Stage::Replicated, DType::Bf16, true);
    step(&mut engine).unwrap();
    engine
        .save_checkpoint(folder.path(), None, &json!({}))
        .unwrap();
    drop(engine);
    let latest = Checkpoints::open(folder.path()).latest().unwrap().unwrap();
    assert_eq!((latest.checkpoint.step(), latest.note), (1, None));
}

#[test]
fn the_copy_in_memory_is_planned() {
    let folder = tempfile::tempdir().unwrap();
    for count in [1, 2] {
        let planned = |background| {
            let options = EngineOptions {
                async_checkpoints: background,
                ..Default::default()
            };
            let placement = Placement {
                stage: Stage::Optimizer,
                ..Default::default()
            };
            let plan = plan_rank(&config(), DType::Bf16, options, SHAPE, placement, count);
            plan.memory.reserved
        };
        let more = planned(true) - planned(false);
        let written: u64 = ranks(count, |group| {
            let first = group.rank() == 0;
            let mut engine = engine(group, Stage::Optimizer, DType::Bf16, true);
            let dir = folder.path().join(count.to_string());
            for _ in 0..3 {
                step(&mut engine).unwrap();
                engine.save_checkpoint(&dir, None, &json!({})).unwrap();
            }
            engine.finish_checkpoint().unwrap();
            let taken = engine.store().cpu().memory.peak().reserved as f64;
            let ratio = planned(true) as f64 / taken;
            assert!(
                !first || (0.95..=1.05).contains(&ratio),
                "{count} ranks: {ratio}"
            );
            let size = |path: &Path| std::fs::metadata(path).unwrap().len();
            let path = engine.last_checkpoint().unwrap();
            let all = files(path).into_keys().map(|file| size(&path.join(file)));
            all.sum::<u64>()
        })[0];
        let share = written as f64 / count as f64;
        assert!(more as f64 > 0.9 * share, "{more} bytes for {share}");
    }
}

#[test]
fn what_rests_on_a_disk_is_not_copied_into_memory() {
    let (cpu, model) = (Cpu::new(1), decoder(&config()));
    let swap = SwapFile::create(&std::env::temp_dir(), "test", AioOptions::default(), None);
    let home = Home {
        group: Group::solo(),
        placement: Placement {
            stage: Stage::Optimizer,
            optimizer: Tier::Nvme,
            ..Default::default()
        },
        swap: Some(swap.unwrap()),
    };
    let store = Store::build(&cpu, home, model.units(), |_, p, range| {
        Ok(p.fill_range(&cpu, 7, DType::F32, range))
    });
    let options = EngineOptions {
        async_checkpoints: true,
        ..Default::default()
    };
    let error = Engine::initialize(model, store.unwrap(), options)
        .err()
        .unwrap();
    assert!(error.to_string().contains("in the background"), "{error}");
}

/// Tags as in DeepSpeed: a name of their own, `global_step<N>` without one, and `latest`, which a load without a tag follows.
#[test]
fn checkpoints_are_saved_and_loaded_by_tag() {
    for background in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        ranks(2, |group| {
            let (stage, dtype) = (Stage::Gradients, DType::Bf16);
            let mut engine = engine(group, stage, dtype, background);
            assert_eq!(
                engine.load_checkpoint(dir, None).unwrap(),
                None,
                "nothing is there"
            );
            let save = |engine: &mut Engine<Tokens>, tag: Option<&str>| {
                step(engine).unwrap();
                let state = json!({"seen": engine.global_steps()});
                engine.save_checkpoint(dir, tag, &state).unwrap()
            };
            assert_eq!(save(&mut engine, None), dir.join("global_step1"));
            assert_eq!(save(&mut engine, Some("best")), dir.join("best"));
            save(&mut engine, None);
            // The name is used again.
            save(&mut engine, Some("best"));
            engine.finish_checkpoint().unwrap();
            let latest = std::fs::read_to_string(dir.join("latest")).unwrap();
            assert_eq!(latest, "best\n");
            for (tag, folder, steps) in [
                (Some("global_step1"), "global_step1", 1),
                (Some("global_step3"), "global_step3", 3),
                (Some("best"), "best", 4),
                (None, "best", 4),
            ] {
                let (path, state) = engine.load_checkpoint(dir, tag).unwrap().unwrap();
                assert_eq!((path, state), (dir.join(folder), json!({"seen": steps})));
                assert_eq!(engine.global_steps(), steps);
            }
            let missing = engine.load_checkpoint(dir, Some("worst")).unwrap_err();
            assert!(missing.to_string().contains("worst"), "{missing}");
            for tag in ["", "a/b", "..", ".hidden", "latest"] {
                let error = engine
                    .save_checkpoint(dir, Some(tag), &json!({}))
                    .unwrap_err();
                assert!(error.to_string().contains("name"), "{tag}: {error}");
            }
            let mine = format!("of rank {}", engine.store().group().rank());
            let error = engine
                .save_checkpoint(dir, Some(&mine), &json!({}))
                .unwrap_err();
            assert!(
                error.to_string().contains("the tag of the checkpoint"),
                "{error}"
            );
        });
        let names = Checkpoints::open(dir).names().unwrap();
        assert_eq!(names, ["global_step1", "global_step3", "best"]);
        let hidden = files(dir).into_keys().find(|file| file.starts_with("."));
        assert_eq!(hidden, None);
    }
}
