//! How fast collectives between threads are, beside plain copies by as many threads.
//!
//! `cargo run --release -p windlass-comm --example speed -- [RANKS] [MEGABYTES]`; medians of 15 rounds, in seconds and
//! as bytes that a rank reads and writes in a second.

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
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| {
        arguments
            .next()
            .map_or(default, |text| text.parse().unwrap())
    };
    let (size, megabytes): (usize, usize) = (number(2), number(64));
    let length = megabytes * 1_000_000 / 4;
    println!("{size} ranks, {megabytes} MB of f32 a rank");
    std::thread::scope(|scope| {
        for group in Group::local(size, Duration::from_secs(60)) {
            scope.spawn(move || measure(&group, length));
        }
    });
}

fn measure(group: &Group, length: usize) {
    let shards = balanced(length, group.size());
    let shard = shards[group.rank()].len();
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
