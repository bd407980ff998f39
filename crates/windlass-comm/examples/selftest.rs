//! Runs every collective and prints a hash of what each gave to all ranks: the same numbers, whoever carries them.
//!
//! `selftest local 4` runs four threads; under `mpirun`, `selftest mpi` runs the ranks of the job (feature `mpi`).
//! `… fault KIND RANK` lets one rank misbehave: `stall`, `die`, `leave`, `panic`, `abort`, `differ` or `disagree`.

use std::ops::Range;
use std::process::ExitCode;
use std::time::Duration;

use half::{bf16, f16};
use windlass_comm::{Datum, Group, Real, Result, balanced};

/// Long enough for a slow machine, short enough to see a fault.
const PATIENCE: Duration = Duration::from_secs(60);
const FAULT_PATIENCE: Duration = Duration::from_secs(3);

/// A fault and the rank that has it.
type Fault = Option<(String, usize)>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (transport, rest) = match words.as_slice() {
        ["local", size, rest @ ..] => (size.parse().ok(), rest),
        ["mpi", rest @ ..] => (None, rest),
        _ => panic!("selftest (local N | mpi) [fault KIND RANK]"),
    };
    let fault: Fault = match rest {
        ["fault", kind, rank] => Some((kind.to_string(), rank.parse().expect("a rank"))),
        _ => None,
    };
    let patience = if fault.is_some() {
        FAULT_PATIENCE
    } else {
        PATIENCE
    };
    let passed = match transport {
        Some(size) => std::thread::scope(|scope| {
            let ranks = Group::local(size, patience).into_iter();
            let start = |group| scope.spawn(|| run(group, &fault));
            let ranks: Vec<_> = ranks.map(start).collect();
            let ended = ranks.into_iter().map(|rank| rank.join().unwrap_or(false));
            ended.fold(true, |all, passed| all & passed)
        }),
        None => run(over_mpi(patience), &fault),
    };
    if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(feature = "mpi")]
fn over_mpi(patience: Duration) -> Group {
    Group::mpi(patience).unwrap()
}

#[cfg(not(feature = "mpi"))]
fn over_mpi(_: Duration) -> Group {
    panic!("built without the feature mpi")
}

/// One rank; false if a collective failed.
fn run(group: Group, fault: &Fault) -> bool {
    let rank = group.rank();
    let result = collectives(&group).and_then(|()| match fault {
        Some((kind, by)) => misbehave(&group, kind, *by == rank),
        None => Ok(()),
    });
    if let Err(error) = &result {
        // One piece is one write: the ranks of a job share stderr.
        let line = format!("rank {rank}: {error}\n");
        eprint!("{line}");
    }
    result.is_ok()
}

fn misbehave(group: &Group, kind: &str, me: bool) -> Result<()> {
    match kind {
        "stall" if me => std::thread::sleep(FAULT_PATIENCE * 3),
        "die" if me => std::process::abort(),
        "leave" if me => return Ok(()),
        "panic" if me => panic!("on purpose"),
        "abort" if me => group.abort("disk full"),
        "differ" if me => return group.broadcast("weights", 0, &mut [0u8; 3]),
        "disagree" => group.agree("the configuration", u64::from(me))?,
        _ => {}
    }
    group.all_reduce("sum layers.3", &mut [1.0f32; 100])
}

/// A number that depends on rank and place and has digits that rounding loses.
fn mixed(rank: usize, at: usize) -> u64 {
    let mut bits = (rank as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits ^= (at as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    bits ^= bits >> 29;
    bits = bits.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits ^ bits >> 32
}

fn real(rank: usize, at: usize) -> f64 {
    let bits = mixed(rank, at);
    let scale = [1e-4, 1e-2, 1.0, 1e3][(bits % 4) as usize];
    ((bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * scale
}

/// FNV-1a over the bits of numbers.
fn hash(bits: impl Iterator<Item = u64>) -> u64 {
    bits.fold(0xCBF2_9CE4_8422_2325, |hash, bits| {
        (hash ^ bits).wrapping_mul(0x0100_0000_01B3)
    })
}

/// Prints, on rank 0, what all ranks have.
fn report(group: &Group, name: &str, own: u64) -> Result<()> {
    let all = group.collect("report", &[own])?;
    if group.rank() == 0 {
        println!("{name:<24} {:016x}", hash(all.into_iter()));
    }
    Ok(())
}

/// Even, uneven with empty ones, and all on the last rank.
fn cuts(length: usize, size: usize) -> [Vec<Range<usize>>; 3] {
    let from_bounds = |bound: &dyn Fn(usize) -> usize| {
        let shards = (0..size).map(|rank| bound(rank)..bound(rank + 1));
        shards.collect::<Vec<_>>()
    };
    [
        balanced(length, size),
        from_bounds(&|rank| rank * rank * length / (size * size)),
        from_bounds(&|rank| if rank == size { length } else { 0 }),
    ]
}

/// Short ones, and one of several chunks.
const LENGTHS: [usize; 4] = [0, 1, 1000, 1_500_001];

fn collectives(group: &Group) -> Result<()> {
    data(group, "f64", real, f64::to_bits)?;
    data(
        group,
        "bf16",
        |r, at| bf16::from_f64(real(r, at)),
        |v| v.to_bits().into(),
    )?;
    data(group, "u8", |r, at| mixed(r, at) as u8, u64::from)?;
    let bits = |value: f32| u64::from(value.to_bits());
    sums(group, "f32", |r, at| real(r, at) as f32, bits)?;
    sums(group, "f64", real, f64::to_bits)?;
    sums(group, "bf16", |r, at| bf16::from_f64(real(r, at)), bits)?;
    sums(group, "f16", |r, at| f16::from_f64(real(r, at)), bits)?;
    let mut results = Vec::new();
    for length in LENGTHS {
        let mut data: Vec<f32> = (0..length)
            .map(|at| real(group.rank(), at) as f32)
            .collect();
        group.all_reduce("sum", &mut data)?;
        results.push(hash(data.into_iter().map(bits)));
    }
    group.agree("all-reduced values", hash(results.iter().copied()))?;
    report(group, "all_reduce", hash(results.into_iter()))?;
    let kinds = group.traffic().kinds();
    let sent = kinds
        .iter()
        .flat_map(|(_, volume)| [volume.calls, volume.bytes]);
    report(group, "traffic", hash(sent))
}

/// What moves data without looking at it.
fn data<T: Datum>(
    group: &Group,
    name: &str,
    value: impl Fn(usize, usize) -> T,
    bits: impl Fn(T) -> u64,
) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let mut hashes: [Vec<u64>; 3] = Default::default();
    let hash_of = |values: &[T]| hash(values.iter().map(|&value| bits(value)));
    let own = |length| -> Vec<T> { (0..length).map(|at| value(rank, at)).collect() };
    for length in LENGTHS {
        for shards in cuts(length, size) {
            let mut data = own(length);
            group.all_gather("gather", &shards, &mut data)?;
            hashes[0].push(hash_of(&data));
        }
        let mut data = own(length);
        group.broadcast("spread", size / 2, &mut data)?;
        hashes[1].push(hash_of(&data));
        let count = |from: usize, to: usize| (from * 3 + to * 5) % 4 * length / 8;
        let send_counts: Vec<usize> = (0..size).map(|to| count(rank, to)).collect();
        let recv_counts: Vec<usize> = (0..size).map(|from| count(from, rank)).collect();
        let send = own(send_counts.iter().sum());
        let mut recv = vec![T::default(); recv_counts.iter().sum()];
        group.all_to_all("swap", &send, &send_counts, &mut recv, &recv_counts)?;
        hashes[2].push(hash_of(&recv));
        group.barrier("between")?;
    }
    for (kind, hashes) in ["all_gather", "broadcast", "all_to_all"].iter().zip(hashes) {
        report(group, &format!("{kind} {name}"), hash(hashes.into_iter()))?;
    }
    Ok(())
}

/// Sums of shards, with and without what was there before.
fn sums<T: Real>(
    group: &Group,
    name: &str,
    value: impl Fn(usize, usize) -> T,
    bits: impl Fn(T::Sum) -> u64,
) -> Result<()> {
    let rank = group.rank();
    let mut hashes = Vec::new();
    for length in LENGTHS {
        let data: Vec<T> = (0..length).map(|at| value(rank, at)).collect();
        for shards in cuts(length, group.size()) {
            let mut out = vec![T::Sum::default(); shards[rank].len()];
            for accumulate in [false, true] {
                group.reduce_scatter("reduce", &shards, &data, &mut out, accumulate)?;
                hashes.push(hash(out.iter().map(|&sum| bits(sum))));
            }
        }
    }
    report(
        group,
        &format!("reduce_scatter {name}"),
        hash(hashes.into_iter()),
    )
}
