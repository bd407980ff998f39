//! Whatever stops a save, what was there before is still there, or what came after is there whole.

mod faulty;

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use faulty::{Fault, FaultyDisk};
use windlass_store::atomic::{Disk, write_atomic};
use windlass_store::checkpoint::{Checkpoints, Resume, Writer};
use windlass_store::safetensors::{Dtype, Options, Spec, Tensors, write_folder};
use windlass_store::{Error, Result};
use windlass_tensor::kernels::memory::Memory;

/// Runs `act` on disks failing after 0, 1, 2, ... operations and after many numbers of bytes, until it succeeds.
fn for_every_fault(
    act: impl Fn(&FaultyDisk) -> Result<()>,
    before: impl Fn(),
    check: impl Fn(Fault, bool),
) {
    let mut runs = 0;
    let mut run = |fault, operations, bytes| {
        before();
        let disk = FaultyDisk::new(fault, operations, bytes);
        let result = act(&disk);
        if fault == Fault::Full
            && let Err(error) = &result
        {
            assert!(matches!(error, Error::Io { .. }), "{error}");
            assert!(error.hint().unwrap().contains("free disk space"), "{error}");
        }
        disk.crash();
        check(fault, result.is_ok());
        runs += 1;
        (result.is_ok(), disk.left())
    };
    let plenty = 1 << 40;
    let (_, (_, left)) = run(Fault::Killed, plenty, plenty);
    let written = plenty - left;
    let power_losses = [1, 2, 4, 7].map(Fault::PowerLoss);
    for fault in [Fault::Killed].into_iter().chain(power_losses) {
        let mut operations = 0;
        while !run(fault, operations, plenty).0 {
            operations += 1;
        }
    }
    for fault in [Fault::Full, Fault::Killed, Fault::PowerLoss(7)] {
        for bytes in (0..40).map(|i| written * i / 40).chain([written - 1]) {
            assert!(
                !run(fault, plenty, bytes).0,
                "{bytes} bytes should not suffice for {written}"
            );
        }
    }
    assert!(runs > 130);
}

/// A disk that never fails, and takes no time to force anything onto it.
fn sound_disk() -> FaultyDisk {
    FaultyDisk::new(Fault::Killed, u64::MAX, u64::MAX)
}

fn temporaries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".tmp")).collect()
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.json");
    let (old, new) = (vec![b'o'; 3000], vec![b'n'; 5000]);
    for_every_fault(
        |disk| write_atomic(disk, &path, &new),
        || {
            for name in temporaries(folder.path()) {
                fs::remove_file(folder.path().join(name)).unwrap();
            }
            write_atomic(&sound_disk(), &path, &old).unwrap();
        },
        |fault, done| {
            let found = fs::read(&path).unwrap();
            assert!(
                found == new || (!done && found == old),
                "{fault:?}: {} bytes",
                found.len()
            );
            assert!(
                fault != Fault::Full || temporaries(folder.path()).is_empty(),
                "a full disk is not left fuller"
            );
        },
    );
}

#[test]
fn a_folder_of_weights_survives_a_failed_save() {
    let folder = tempfile::tempdir().unwrap();
    let specs: Vec<Spec> = (0..4)
        .map(|i| Spec::new(format!("t{i}"), Dtype::F32, [100]))
        .collect();
    let save = |disk: &dyn Disk, value: f32, max_shard_bytes: usize| {
        let options = Options {
            max_shard_bytes,
            metadata: BTreeMap::new(),
        };
        write_folder(disk, folder.path(), &specs, &options, |_, out| {
            out.values(&[value; 100])
        })
        .map(drop)
    };
    let read = || {
        let tensors = Tensors::open(folder.path()).unwrap();
        let mut values = [0f32; 400];
        for (i, part) in values.chunks_mut(100).enumerate() {
            tensors.read_into(&format!("t{i}"), 0..100, part).unwrap();
        }
        assert!(
            values.iter().all(|&v| v == values[0]),
            "old and new are mixed"
        );
        values[0]
    };
    // From one file to shards and back: at no moment do the two saves mix.
    for (old, new) in [(usize::MAX, 500), (500, usize::MAX)] {
        for_every_fault(
            |disk| save(disk, 2.0, new),
            || {
                fs::remove_dir_all(folder.path()).unwrap();
                save(&sound_disk(), 1.0, old).unwrap();
            },
            |fault, done| {
                let found = read();
                assert!(
                    found == 2.0 || (!done && found == 1.0),
                    "{fault:?}: {found}"
                );
            },
        );
    }
}

/// Saves a checkpoint with files of several kinds, all saying `step`: at once, or from memory by another thread.
fn save(checkpoints: &Checkpoints, step: u64, keep: Option<usize>) -> Result<()> {
    fill(checkpoints, checkpoints.begin(step)?, step, keep)
}

fn fill(
    checkpoints: &Checkpoints,
    mut writer: Writer,
    step: u64,
    keep: Option<usize>,
) -> Result<()> {
    let held = checkpoints.dir().ends_with("held");
    if held {
        writer.hold(&Memory::new());
    }
    let options = Options {
        max_shard_bytes: 500,
        ..Options::default()
    };
    let specs: Vec<Spec> = (0..3)
        .map(|i| Spec::new(format!("t{i}"), Dtype::F32, [100]))
        .collect();
    writer.weights(&specs, &options, |_, out| out.values(&[step as f32; 100]))?;
    let moments = [Spec::new("m", Dtype::F32, [50])];
    writer.tensors(
        "optimizer.safetensors",
        &moments,
        &BTreeMap::new(),
        |_, out| out.values(&[step as f32; 50]),
    )?;
    writer.json("state.json", &serde_json::json!({ "step": step }))?;
    writer.bytes("note.txt", b"free text")?;
    if held {
        let flush = move || writer.flush().map(|()| writer);
        writer = std::thread::spawn(flush).join().unwrap()?;
    }
    writer.commit(keep.and_then(NonZeroUsize::new)).map(drop)
}

/// The step and the note of the checkpoint to continue from, its content checked.
fn resume(dir: &Path) -> Option<(u64, Option<String>)> {
    let Resume { checkpoint, note } = Checkpoints::open(dir).latest().unwrap()?;
    let step = checkpoint.step();
    checkpoint.verify().unwrap();
    let state: serde_json::Value = checkpoint.json("state.json").unwrap();
    assert_eq!(state["step"], step);
    let mut values = [0f32; 100];
    let weights = checkpoint.weights().unwrap();
    weights.read_into("t2", 0..100, &mut values).unwrap();
    let moments = checkpoint.tensors("optimizer.safetensors").unwrap();
    moments.read_into("m", 0..50, &mut values[..50]).unwrap();
    assert!(values.iter().all(|&v| v == step as f32));
    Some((step, note))
}

#[test]
fn there_is_always_a_checkpoint_to_continue_from() {
    for kind in ["direct", "held"] {
        always_a_checkpoint(kind);
    }
}

fn always_a_checkpoint(kind: &str) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join(kind);
    let sound = Checkpoints::on(Arc::new(sound_disk()), &dir);
    let clear = || drop(fs::remove_dir_all(&dir));
    let after = |keep: usize| {
        save(&sound, 9, Some(keep)).unwrap();
        assert_eq!(resume(&dir), Some((9, None)));
        assert!(
            temporaries(&dir).is_empty(),
            "begin() removes what a killed run left"
        );
        assert!(sound.steps().unwrap().len() <= keep);
    };
    for_every_fault(
        |disk| save(&Checkpoints::on(Arc::new(disk.clone()), &dir), 3, Some(2)),
        || {
            clear();
            save(&sound, 1, None).unwrap();
            save(&sound, 2, None).unwrap();
        },
        |fault, done| {
            let (step, note) = resume(&dir).expect("there was a checkpoint before");
            assert!(step == 3 || (!done && step == 2), "{fault:?}: step {step}");
            assert_eq!(note, None, "`latest` is never missing or wrong");
            let steps = sound.steps().unwrap();
            assert!(
                steps.len() >= 2,
                "{fault:?}: pruned to {steps:?} before the new one was safe"
            );
            after(2);
        },
    );
    // The very first one: nothing, or the whole.
    for_every_fault(
        |disk| save(&Checkpoints::on(Arc::new(disk.clone()), &dir), 3, Some(1)),
        clear,
        |fault, done| {
            match resume(&dir) {
                None => assert!(!done, "{fault:?}"),
                Some((step, note)) => assert!(
                    step == 3 && (note.is_none() || !done),
                    "{fault:?}: {note:?}"
                ),
            }
            after(1);
        },
    );
}

/// A name that is used again: the old one or the new one is there under it, at every moment.
#[test]
fn a_name_is_taken_over_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("direct");
    let sound = Checkpoints::on(Arc::new(sound_disk()), &dir);
    let save = |checkpoints: &Checkpoints, step| {
        fill(
            checkpoints,
            checkpoints.begin_named("best", step)?,
            step,
            None,
        )
    };
    for_every_fault(
        |disk| save(&Checkpoints::on(Arc::new(disk.clone()), &dir), 2),
        || {
            drop(fs::remove_dir_all(&dir));
            save(&sound, 1).unwrap();
        },
        |fault, done| {
            let (step, note) = resume(&dir).expect("there was a checkpoint before");
            assert!(step == 2 || (!done && step == 1), "{fault:?}: step {step}");
            assert_eq!(note, None, "{fault:?}: `latest` finds it");
            save(&sound, 3).unwrap();
            assert_eq!(resume(&dir), Some((3, None)));
            assert_eq!(sound.names().unwrap(), ["best"]);
            assert!(temporaries(&dir).is_empty());
        },
    );
}

#[test]
fn a_damaged_checkpoint_is_passed_over_aloud() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let sound = Checkpoints::on(Arc::new(sound_disk()), dir);
    assert!(resume(dir).is_none(), "nothing was ever saved");
    type Damage<'a> = &'a dyn Fn(&Path);
    let edit = |path: &Path, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(path).unwrap();
        edit(&mut bytes);
        fs::write(path, bytes).unwrap();
    };
    let cases: [(&str, Damage); 8] = [
        ("latest is missing", &|_| {
            fs::remove_file(dir.join("latest")).unwrap()
        }),
        ("does not name a checkpoint", &|_| {
            fs::write(dir.join("latest"), "step-../..").unwrap()
        }),
        ("does not name a checkpoint", &|_| {
            fs::write(dir.join("latest"), [0xff, 0]).unwrap()
        }),
        ("state.json: No such file", &|step| {
            fs::remove_file(step.join("state.json")).unwrap()
        }),
        ("bytes, but", &|step| {
            edit(&step.join("optimizer.safetensors"), &|b| b.truncate(100))
        }),
        ("SHA-256 differs", &|step| {
            edit(&step.join("optimizer.safetensors"), &|b| b[150] ^= 1)
        }),
        ("manifest.json: EOF", &|step| {
            edit(&step.join("manifest.json"), &|b| b.truncate(60))
        }),
        ("No such file", &|step| fs::remove_dir_all(step).unwrap()),
    ];
    for (expected, damage) in cases {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            }
            .unwrap();
        }
        save(&sound, 1, None).unwrap();
        save(&sound, 2, None).unwrap();
        assert!(matches!(
            sound.begin(2),
            Err(Error::CheckpointExists { .. })
        ));
        damage(&dir.join("step-00000002"));
        let (step, note) = resume(dir).unwrap();
        let note = note.expect(expected);
        let whole = note.contains("latest");
        assert_eq!(step, if whole { 2 } else { 1 }, "{note}");
        assert!(
            note.contains(expected)
                && note.contains(&format!("continuing from step-0000000{step}")),
            "{note}"
        );
        if !whole {
            save(&sound, 2, Some(5)).unwrap();
            assert_eq!(
                resume(dir),
                Some((2, None)),
                "the damaged one can be saved anew"
            );
        }
    }
    // A newer layout is not mistaken for damage, and nothing usable is an error, not a fresh start.
    let manifest = dir.join("step-00000002/manifest.json");
    let newer = |b: &mut Vec<u8>| {
        *b = String::from_utf8(b.clone())
            .unwrap()
            .replace("\"version\": 1", "\"version\": 2")
            .into()
    };
    edit(&manifest, &newer);
    let (step, note) = resume(dir).unwrap();
    assert!(step == 1 && note.unwrap().contains("layout version 2"));
    fs::remove_dir_all(dir.join("step-00000001")).unwrap();
    let error = Checkpoints::open(dir).latest().unwrap_err();
    assert!(
        error.to_string().contains("no complete checkpoint"),
        "{error}"
    );
}
