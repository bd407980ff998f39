//! How fast collectives are, beside plain copies by as many ranks.
//!
//! `speed 2 64`: two threads with 64 MB of f32 each; under `mpirun`, `speed mpi 64` (feature `mpi`). Medians of 15
//! rounds, as time and as bytes that a rank reads and writes in a second.

use std::time::{Duration, Instant};

use half::bf16;
use windlass_comm::{Group, balanced};

const ROUNDS: usize = 15;

/// The median time of a round that all ranks start together.
fn median(group: &Group, mut round: impl FnMut()) -> f64 {
    let mut seconds: Vec<f64> = (0..ROUNDS + 2)
        .map(|_| {
            group.barrier("start").unwrap();
            let start = Instant::now();
            round();
            group.barrier("end").unwrap();
            start.elapsed().as_secs_f64()
        })
        .skip(2)
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[ROUNDS / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let megabytes: usize = arguments.get(1).map_or(64, |text| text.parse().unwrap());
    let length = megabytes * 1_000_000 / 4;
    let patience = Duration::from_secs(60);
    if arguments.first().is_some_and(|first| first == "mpi") {
        measure(&over_mpi(patience), length);
        return;
    }
    let size = arguments.first().map_or(2, |text| text.parse().unwrap());
    std::thread::scope(|scope| {
        for group in Group::local(size, patience) {
            scope.spawn(move || measure(&group, length));
        }
    });
}

#[cfg(feature = "mpi")]
fn over_mpi(patience: Duration) -> Group {
    Group::mpi(patience).unwrap()
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(_: Duration) -> Group {
    panic!("built without the feature mpi")
}

fn measure(group: &Group, length: usize) {
    let shards = balanced(length, group.size());
    let shard = shards[group.rank()].len();
    if group.rank() == 0 {
        let megabytes = length * 4 / 1_000_000;
        println!(
            "{} {} ranks, {megabytes} MB of f32 a rank",
            group.size(),
            group.transport()
        );
    }
    let mut data = vec![1.0f32; length];
    let mut other = data.clone();
    let halves = vec![bf16::ONE; length];
    let mut out = vec![0.0f32; shard];
    let report = |name: &str, seconds: f64, bytes: usize| {
        if group.rank() == 0 {
            let rate = bytes as f64 / seconds / 1e9;
            println!("{name:<28} {:>8.2} ms {rate:>7.1} GB/s", seconds * 1e3);
        }
    };
    let seconds = median(group, || other.copy_from_slice(&data));
    report("copy", seconds, 8 * length);
    let seconds = median(group, || group.all_gather("g", &shards, &mut data).unwrap());
    report("all-gather f32", seconds, 8 * (length - shard));
    for accumulate in [false, true] {
        let name = if accumulate {
            "reduce-scatter += "
        } else {
            "reduce-scatter "
        };
        let reads = group.size() + usize::from(accumulate);
        let reduce = || group.reduce_scatter("r", &shards, &data, &mut out, accumulate);
        let mut reduce = reduce;
        let seconds = median(group, || reduce().unwrap());
        report(&format!("{name}f32"), seconds, 4 * shard * (reads + 1));
        let mut reduce = || group.reduce_scatter("r", &shards, &halves, &mut out, accumulate);
        let seconds = median(group, || reduce().unwrap());
        let bytes = shard * (2 * group.size() + 4 + 4 * usize::from(accumulate));
        report(&format!("{name}bf16"), seconds, bytes);
    }
    let seconds = median(group, || group.all_reduce("s", &mut data).unwrap());
    let bytes = 4 * shard * (group.size() + 1) + 8 * (length - shard);
    report("all-reduce f32", seconds, bytes);
    let seconds = median(group, || group.barrier("b").unwrap());
    report("barrier", seconds, 0);
}
