//! Whatever stops a save, what was there before is still there, or what came after is there whole.

mod faulty;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use faulty::{Fault, FaultyDisk};
use windlass_store::atomic::{Disk, write_atomic};
use windlass_store::safetensors::{Dtype, Options, Spec, Tensors, write_folder};
use windlass_store::{Error, Result};

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
    for fault in [Fault::Killed, Fault::PowerLoss] {
        let mut operations = 0;
        while !run(fault, operations, plenty).0 {
            operations += 1;
        }
    }
    for fault in [Fault::Full, Fault::Killed, Fault::PowerLoss] {
        for bytes in (0..40).map(|i| written * i / 40).chain([written - 1]) {
            assert!(
                !run(fault, plenty, bytes).0,
                "{bytes} bytes should not suffice for {written}"
            );
        }
    }
    assert!(runs > 120);
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
