use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;
use windlass_tensor::Category;
use windlass_tensor::kernels::memory::Memory;

use super::ring::{Advance, advance};
use super::*;

const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Threads];

fn options(block_size: usize, queue_depth: usize, threads: usize) -> AioOptions {
    AioOptions {
        block_size,
        queue_depth,
        threads,
        ..AioOptions::default()
    }
}

/// Every way of moving bytes that tests go through.
fn ways() -> Vec<(Backend, AioOptions)> {
    let mut ways = Vec::new();
    for backend in BACKENDS {
        ways.push((backend, AioOptions::default()));
        ways.push((backend, options(4096, 3, 1)));
        ways.push((backend, options(65536, 2, 3)));
        ways.push((
            backend,
            AioOptions {
                single_submit: true,
                overlap_events: false,
                ..options(16384, 4, 1)
            },
        ));
    }
    ways
}

/// A file in a folder of its own.
fn file(backend: Backend, options: AioOptions) -> (tempfile::TempDir, SwapFile) {
    let dir = tempfile::tempdir().expect("a folder");
    let file = SwapFile::create(dir.path(), "moments", options, Some(backend)).expect("a file");
    assert_eq!(file.backend(), backend);
    (dir, file)
}

fn filled(memory: &Memory, bytes: usize, seed: usize) -> Buffer {
    let mut buffer = memory.alloc(bytes, Category::Optimizer);
    for (i, byte) in buffer.block_mut()[..bytes].iter_mut().enumerate() {
        *byte = byte_at(seed, i);
    }
    buffer
}

fn byte_at(seed: usize, i: usize) -> u8 {
    ((i + 1).wrapping_mul(2654435761).wrapping_add(seed * 977) >> 11) as u8
}

#[track_caller]
fn same(buffer: &Buffer, seed: usize, offset: usize, what: &str) {
    let bytes = &buffer.block()[..buffer.bytes()];
    let wrong = (0..bytes.len()).find(|&i| bytes[i] != byte_at(seed, offset + i));
    assert_eq!(wrong, None, "{what}: first wrong byte of {}", bytes.len());
}

/// Reads and writes the file's bytes behind its back.
fn behind(file: &SwapFile) -> std::fs::File {
    let path = format!("/proc/self/fd/{}", file.file.as_fd().as_raw_fd());
    let open = OpenOptions::new().read(true).write(true).open(path);
    open.expect("the file once more")
}

const MIB: usize = 1 << 20;

#[test]
fn bytes_come_back_whatever_their_number() {
    let memory = Memory::new();
    let sizes = [
        0,
        1,
        100,
        4095,
        4096,
        4097,
        5000,
        70_001,
        131_072,
        1_000_003,
        3 * MIB,
        5 * MIB + 7,
    ];
    for (backend, options) in ways() {
        let what = format!("{backend:?} {options:?}");
        let (dir, file) = file(backend, options);
        let left = std::fs::read_dir(dir.path()).expect("the folder").count();
        assert_eq!(left, 0, "{what}: the file has no name");
        let regions: Vec<Region> = sizes
            .iter()
            .map(|&bytes| file.reserve(bytes).expect("space"))
            .collect();
        // All writes, then all reads, are under way at once; then everything is overwritten, in the other order.
        for round in 0..2 {
            let mut writes = Vec::new();
            for (i, region) in regions.iter().enumerate() {
                let i = if round == 0 { i } else { sizes.len() - 1 - i };
                let region = if round == 0 { region } else { &regions[i] };
                writes.push(file.write(region, filled(&memory, sizes[i], i + 100 * round)));
            }
            let reads: Vec<_> = regions
                .iter()
                .map(|region| file.read(region, memory.alloc(region.bytes(), Category::Optimizer)))
                .collect();
            for (i, read) in reads.into_iter().enumerate() {
                same(&read.wait().expect("a read"), i + 100 * round, 0, &what);
            }
            assert!(
                writes.iter().all(Writing::is_done),
                "{what}: older ones first"
            );
            for write in writes {
                write.wait().expect("a write");
            }
        }
        let stats = file.stats();
        let all: u64 = sizes.iter().map(|&b| b.next_multiple_of(4096) as u64).sum();
        assert_eq!(
            (stats.bytes_read, stats.bytes_written),
            (2 * all, 2 * all),
            "{what}"
        );
        assert!(
            stats.busy_seconds > 0.0 && stats.waited_seconds > 0.0,
            "{what}: {stats:?}"
        );
    }
}

#[test]
fn parts_of_a_region_move_alone_and_in_order() {
    let memory = Memory::new();
    for (backend, options) in ways() {
        let what = format!("{backend:?} {options:?}");
        let (_dir, file) = file(backend, options);
        let bytes = 2 * MIB + 1234;
        let region = file.reserve(bytes).expect("space");
        let fresh = file.read(&region, memory.alloc(bytes, Category::Optimizer));
        let fresh = fresh.wait().expect("a region not yet written");
        assert!(
            fresh.block()[..bytes].iter().all(|&b| b == 0),
            "{what}: zeros"
        );
        drop(file.write(&region, filled(&memory, bytes, 1)));
        // Each reads what the one before it wrote, without waiting, and overlaps its neighbors.
        let mut reads = Vec::new();
        for seed in 2..40 {
            let offset = seed * 4096 * 5;
            drop(file.write_at(&region, offset, filled(&memory, 40_960, seed)));
            let part = memory.alloc(20_000, Category::Optimizer);
            reads.push((seed, file.read_at(&region, offset, part)));
        }
        for (seed, read) in reads {
            same(&read.wait().expect("a read"), seed, 0, &what);
        }
        let tail = memory.alloc(1234, Category::Optimizer);
        let tail = file.read_at(&region, 2 * MIB, tail).wait().expect("a read");
        same(&tail, 1, 2 * MIB, &what);
        let end = file.write_at(&region, 2 * MIB, filled(&memory, 1234, 9));
        same(&end.wait().expect("a write"), 9, 0, &what);
    }
}

#[test]
fn damage_on_the_disk_is_found_and_named() {
    let memory = Memory::new();
    for backend in BACKENDS {
        let (_dir, mut file) = file(backend, options(65536, 4, 1));
        let regions = [0, 1].map(|_| file.reserve(MIB).expect("space"));
        for (seed, region) in regions.iter().enumerate() {
            let write = file.write(region, filled(&memory, MIB, seed));
            write.wait().expect("a write");
        }
        let at = (MIB + 700_001) as u64;
        let disk = behind(&file);
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at).expect("a byte");
        disk.write_all_at(&[byte[0] ^ 16], at)
            .expect("another byte");
        disk.sync_all().expect("on the disk");
        // The checksums outlive a change of options.
        file.retune(options(4096, 2, 2)).expect("other options");
        let read = |region, offset, bytes| {
            let buffer = memory.alloc(bytes, Category::Optimizer);
            file.read_at(region, offset, buffer).wait()
        };
        same(&read(&regions[0], 0, MIB).expect("sound"), 0, 0, "sound");
        let error = read(&regions[1], 0, MIB).err().expect("damage");
        let message = error.to_string();
        assert!(matches!(error, Error::Corrupt { .. }), "{message}");
        let offset = format!("offset {}", at / 4096 * 4096);
        assert!(
            message.contains("moments") && message.contains(&offset),
            "{message}"
        );
        assert!(error.hint().is_some_and(|hint| hint.contains("smartctl")));
        let before = read(&regions[1], 0, 700_001 / 4096 * 4096).expect("sound up to it");
        same(&before, 1, 0, "before");
        // Writing again heals it.
        drop(file.write(&regions[1], filled(&memory, MIB, 5)));
        same(&read(&regions[1], 0, MIB).expect("healed"), 5, 0, "healed");
        // A file cut short is an error of the disk, not a wait without end.
        disk.set_len(at).expect("cut");
        let error = read(&regions[1], 0, MIB).err().expect("a short file");
        assert!(error.to_string().contains("cannot read"), "{error}");
        assert!(error.hint().is_some(), "{error}");
        same(
            &read(&regions[0], 0, MIB).expect("sound"),
            0,
            0,
            "what is left",
        );
        drop(regions);
    }
    assert_eq!(
        memory.now().in_use(),
        0,
        "failed requests give their memory back"
    );
}

#[test]
fn a_full_disk_is_found_when_space_is_reserved() {
    let (_dir, file) = file(Backend::Threads, AioOptions::default());
    let free = free_bytes(Path::new("/proc/self")).expect("a file system");
    assert_eq!(free, 0, "proc has no space");
    let error = file.reserve(1 << 60).expect_err("more than any disk");
    let message = error.to_string();
    assert!(
        message.contains("moments") && message.contains("are missing"),
        "{message}"
    );
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("free disk space"))
    );
    let region = file.reserve(5000).expect("what fits still fits");
    let memory = Memory::new();
    let write = file.write(&region, filled(&memory, 5000, 3));
    same(&write.wait().expect("a write"), 3, 0, "afterwards");
}

#[test]
fn nothing_is_lost_when_handles_and_files_are_dropped_in_flight() {
    let memory = Memory::new();
    for (backend, options) in ways() {
        let (_dir, file) = file(backend, options);
        let region = file.reserve(8 * MIB).expect("space");
        let mut kept = Vec::new();
        for seed in 0..6 {
            drop(file.write(&region, filled(&memory, 8 * MIB, seed)));
            let read = file.read(&region, memory.alloc(8 * MIB, Category::Optimizer));
            if seed % 2 == 0 {
                kept.push((seed, read));
            }
        }
        drop(file);
        for (seed, read) in kept {
            assert!(read.is_done(), "the file waited");
            same(&read.wait().expect("a read"), seed, 0, "kept");
        }
        assert_eq!(
            memory.now().in_use(),
            0,
            "{backend:?}: all memory came back"
        );
    }
}

#[test]
fn options_out_of_range_and_missing_folders_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    for (options, key) in [
        (options(0, 8, 1), "aio.block_size is 0"),
        (options(1000, 8, 1), "aio.block_size is 1000"),
        (options(4096, 0, 1), "aio.queue_depth is 0"),
        (options(4096, 8, 0), "aio.intra_op_parallelism is 0"),
        (options(4096, 8, 65), "aio.intra_op_parallelism is 65"),
    ] {
        let error = SwapFile::create(dir.path(), "x", options, None)
            .err()
            .expect(key);
        assert!(error.to_string().contains(key), "{error}");
        assert!(error.hint().is_some(), "{key}");
    }
    let missing = dir.path().join("missing");
    let error = SwapFile::create(&missing, "x", AioOptions::default(), None).err();
    let error = error.expect("no folder");
    assert!(error.to_string().contains("missing/x"), "{error}");
    assert!(error.hint().is_some(), "{error}");
    // Memory as a disk: whether it takes O_DIRECT depends on the kernel; if not, that is said.
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        let file = SwapFile::create(shm, "x", AioOptions::default(), None).expect("a file");
        assert_eq!(
            file.is_direct(),
            file.note().is_none_or(|n| !n.contains("O_DIRECT"))
        );
    }
}

#[test]
fn transfers_done_in_part_go_on() {
    let len = 16384;
    for (moved, answer, next) in [
        (0, Ok(len), Advance::Done(Ok(()))),
        (4096, Ok(len - 4096), Advance::Done(Ok(()))),
        (0, Ok(4096), Advance::Rest(4096)),
        (4096, Ok(5000), Advance::Rest(8192)),
        (0, Ok(100), Advance::Done(Err(Errno::IO))),
        (8192, Ok(0), Advance::Done(Err(Errno::IO))),
        (4096, Err(Errno::INTR), Advance::Rest(4096)),
        (4096, Err(Errno::AGAIN), Advance::Rest(4096)),
        (4096, Err(Errno::NOSPC), Advance::Done(Err(Errno::NOSPC))),
        (0, Err(Errno::IO), Advance::Done(Err(Errno::IO))),
    ] {
        assert_eq!(advance(moved, len, answer), next, "{moved} {answer:?}");
    }
}
