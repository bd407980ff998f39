//! Ranks as threads: the numbers, their bits, what is counted, and what happens when a rank does not do its part.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use windlass_comm::{Datum, Error, Group, Real, Volume, balanced};

const SIZES: [usize; 5] = [1, 2, 3, 4, 7];
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs one thread per rank and returns what they return.
fn world<R: Send>(size: usize, timeout: Duration, run: impl Fn(Group) -> R + Sync) -> Vec<R> {
    let groups = Group::local(size, timeout);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|group| scope.spawn(|| run(group)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A number that depends on rank and place and has digits that rounding loses.
fn mixed(rank: usize, at: usize) -> u64 {
    let mut bits = (rank as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    bits ^= (at as u64).wrapping_mul(0xD1B5_4A32_D192_ED03);
    bits ^= bits >> 29;
    bits = bits.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits ^ bits >> 32
}

/// A real number between about -1000 and 1000, of varied magnitude.
fn real(rank: usize, at: usize) -> f64 {
    let bits = mixed(rank, at);
    let scale = [1e-4, 1e-2, 1.0, 1e3][(bits % 4) as usize];
    ((bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * scale
}

/// Ways to cut `length` elements for `size` ranks: even, uneven with empty ones, all on the last, with gaps.
fn cuts(length: usize, size: usize) -> Vec<Vec<Range<usize>>> {
    let from_bounds = |bound: &dyn Fn(usize) -> usize| {
        let shards = (0..size).map(|rank| bound(rank)..bound(rank + 1));
        shards.collect::<Vec<_>>()
    };
    let gaps = balanced(length, size).into_iter();
    vec![
        balanced(length, size),
        from_bounds(&|rank| rank * rank * length / (size * size)),
        from_bounds(&|rank| if rank == size { length } else { 0 }),
        from_bounds(&|rank| if rank == 0 { 0 } else { length }),
        gaps.map(|shard| (shard.start + shard.end) / 2..shard.end)
            .collect(),
    ]
}

const LENGTHS: [usize; 5] = [0, 1, 5, 1000, 9001];

fn check_data<T: Datum + PartialEq + std::fmt::Debug>(value: impl Fn(usize, usize) -> T + Sync) {
    for size in SIZES {
        world(size, PATIENCE, |group| {
            let rank = group.rank();
            for length in LENGTHS {
                for shards in cuts(length, size) {
                    let mut data: Vec<T> = (0..length).map(|at| value(rank + 50, at)).collect();
                    let own = shards[rank].clone();
                    own.for_each(|at| data[at] = value(rank, at));
                    let before = data.clone();
                    group.all_gather("gather", &shards, &mut data).unwrap();
                    for at in 0..length {
                        let owner = shards.iter().position(|shard| shard.contains(&at));
                        let expected = owner.map_or(before[at], |owner| value(owner, at));
                        assert_eq!(data[at], expected, "{size} ranks, {shards:?} at {at}");
                    }
                }
                for root in 0..size {
                    let mut data: Vec<T> = (0..length).map(|at| value(rank, at)).collect();
                    group.broadcast("spread", root, &mut data).unwrap();
                    let expected: Vec<T> = (0..length).map(|at| value(root, at)).collect();
                    assert_eq!(data, expected);
                }
                let count = |from: usize, to: usize| (from * 3 + to * 5) % 4 * length / 8;
                let send_counts: Vec<usize> = (0..size).map(|to| count(rank, to)).collect();
                let recv_counts: Vec<usize> = (0..size).map(|from| count(from, rank)).collect();
                let piece = |from: usize, to: usize| {
                    let value = &value;
                    (0..count(from, to)).map(move |at| value(from * size + to, at))
                };
                let send: Vec<T> = (0..size).flat_map(|to| piece(rank, to)).collect();
                let expected: Vec<T> = (0..size).flat_map(|from| piece(from, rank)).collect();
                let mut recv = vec![T::default(); expected.len()];
                group
                    .all_to_all("swap", &send, &send_counts, &mut recv, &recv_counts)
                    .unwrap();
                assert_eq!(recv, expected);
            }
            let all = group
                .collect("few", &[value(rank, 0), value(rank, 1)])
                .unwrap();
            let expected = (0..size).flat_map(|rank| [value(rank, 0), value(rank, 1)]);
            assert_eq!(all, expected.collect::<Vec<T>>());
        });
    }
}

#[test]
fn every_type_arrives_as_sent() {
    check_data(|rank, at| real(rank, at) as f32);
    check_data(real);
    check_data(|rank, at| bf16::from_f64(real(rank, at)));
    check_data(|rank, at| f16::from_f64(real(rank, at)));
    check_data(|rank, at| mixed(rank, at) as u8);
    check_data(|rank, at| mixed(rank, at) as i8);
    check_data(|rank, at| mixed(rank, at) as i16);
    check_data(|rank, at| mixed(rank, at) as i32);
    check_data(|rank, at| mixed(rank, at) as i64);
    check_data(|rank, at| mixed(rank, at) as u32);
    check_data(mixed);
}

/// Sums against a loop over single numbers, bit by bit.
fn check_sums<T: Real>(
    value: impl Fn(usize, usize) -> T + Sync,
    start: impl Fn(usize) -> T::Sum + Sync,
    plus: impl Fn(T::Sum, T::Sum) -> T::Sum + Sync,
    widen: impl Fn(T) -> T::Sum + Sync,
    bits: impl Fn(T::Sum) -> u64 + Sync,
) {
    for size in SIZES {
        world(size, PATIENCE, |group| {
            let rank = group.rank();
            for length in LENGTHS {
                let data: Vec<T> = (0..length).map(|at| value(rank, at)).collect();
                let sum = |at: usize| {
                    (1..size).fold(widen(value(0, at)), |sum, rank| {
                        plus(sum, widen(value(rank, at)))
                    })
                };
                for shards in cuts(length, size) {
                    for accumulate in [false, true] {
                        let shard = shards[rank].clone();
                        let mut out: Vec<T::Sum> = shard.clone().map(&start).collect();
                        group
                            .reduce_scatter("reduce", &shards, &data, &mut out, accumulate)
                            .unwrap();
                        for (out, at) in out.iter().zip(shard) {
                            let expected = match accumulate {
                                true => plus(start(at), sum(at)),
                                false => sum(at),
                            };
                            assert_eq!(bits(*out), bits(expected), "{size} ranks, at {at}");
                        }
                    }
                }
            }
        });
    }
}

#[test]
fn sums_are_those_of_a_loop_in_rank_order() {
    let f32_bits = |value: f32| u64::from(value.to_bits());
    let start = |at: usize| real(99, at) as f32;
    let plus = |a: f32, b: f32| a + b;
    check_sums(|r, at| real(r, at) as f32, start, plus, |v| v, f32_bits);
    check_sums(real, |at| real(99, at), |a, b| a + b, |v| v, f64::to_bits);
    let value = |r, at| bf16::from_f64(real(r, at));
    check_sums(value, start, plus, bf16::to_f32, f32_bits);
    let value = |r, at| f16::from_f64(real(r, at));
    check_sums(value, start, plus, f16::to_f32, f32_bits);
}

#[test]
fn all_reduce_gives_all_ranks_the_same_bits() {
    for size in SIZES {
        for length in LENGTHS.into_iter().chain([2, 3, 40_000]) {
            let results = world(size, PATIENCE, |group| {
                let rank = group.rank();
                let mut single: Vec<f32> = (0..length).map(|at| real(rank, at) as f32).collect();
                let mut double: Vec<f64> = (0..length).map(|at| real(rank, at)).collect();
                group.all_reduce("single", &mut single).unwrap();
                group.all_reduce("double", &mut double).unwrap();
                (single, double)
            });
            for (single, double) in results {
                for at in 0..length {
                    let sum = (1..size).fold(real(0, at) as f32, |s, r| s + real(r, at) as f32);
                    assert_eq!(single[at].to_bits(), sum.to_bits());
                    let sum = (1..size).fold(real(0, at), |sum, rank| sum + real(rank, at));
                    assert_eq!(double[at].to_bits(), sum.to_bits());
                }
            }
        }
    }
}

#[test]
fn bytes_sent_are_those_of_the_theory() {
    let alone = Group::solo();
    assert_eq!(
        (alone.rank(), alone.size(), alone.transport()),
        (0, 1, "solo")
    );
    for size in SIZES {
        let mut sums = world(size, PATIENCE, |group| {
            let (rank, others) = (group.rank(), group.size() as u64 - 1);
            let shards = cuts(1000, size).swap_remove(1);
            let own = shards[rank].len() as u64;
            group
                .all_gather("a", &shards, &mut [0u16; 1000].map(|_| bf16::ONE))
                .unwrap();
            let mut out = vec![0.0; own as usize];
            let ones = vec![bf16::ONE; 1000];
            group
                .reduce_scatter("r", &shards, &ones, &mut out, true)
                .unwrap();
            let before = group.traffic();
            group.all_reduce("s", &mut [0.0f32; 1001]).unwrap();
            group.broadcast("b", size - 1, &mut [0u8; 30]).unwrap();
            let counts = vec![3; size];
            let send = vec![1i64; 3 * size];
            group
                .all_to_all("t", &send, &counts, &mut send.clone(), &counts)
                .unwrap();
            group.barrier("b").unwrap();
            group.agree("all", 7).unwrap();
            let traffic = group.traffic();
            let is = |volume: Volume, calls, bytes| {
                assert_eq!((volume.calls, volume.bytes), (calls, bytes), "{traffic:?}");
                assert!(volume.seconds >= 0.0);
            };
            is(traffic.all_gather, 1, own * 2 * others);
            is(traffic.reduce_scatter, 1, (1000 - own) * 2);
            let part = balanced(1001, size)[rank].len() as u64;
            is(traffic.all_reduce, 1, (1001 - part) * 4 + part * 4 * others);
            let root = if rank == size - 1 { others } else { 0 };
            is(traffic.broadcast, 1, 30 * root);
            is(traffic.all_to_all, 1, 3 * 8 * others);
            is(traffic.control, 2, 8 * others);
            is(traffic.since(&before).all_gather, 0, 0);
            is(
                traffic.since(&before).all_reduce,
                1,
                traffic.all_reduce.bytes,
            );
            let kinds = traffic.kinds().map(|(_, volume)| volume.bytes);
            is(traffic.total(), 7, kinds.iter().sum());
            [
                traffic.all_gather,
                traffic.reduce_scatter,
                traffic.all_reduce,
            ]
            .map(|v| v.bytes)
        });
        let all = sums.iter_mut().fold([0; 3], |sum, rank| {
            std::array::from_fn(|kind| sum[kind] + rank[kind])
        });
        let others = size as u64 - 1;
        assert_eq!(all, [2000 * others, 2000 * others, 2 * 4004 * others]);
    }
}

#[test]
fn different_calls_are_named_instead_of_hanging() {
    type Act = fn(&Group) -> windlass_comm::Result<()>;
    let cases: [(Act, &str, &str); 6] = [
        (
            |group| group.barrier(if group.rank() == 1 { "b" } else { "a" }),
            "barrier 'a'",
            "barrier 'b'",
        ),
        (
            |group| match group.rank() {
                1 => group.all_reduce("x", &mut [0.0f32; 5]),
                _ => group.broadcast("x", 0, &mut [0.0f32; 5]),
            },
            "broadcast 'x' of 5 f32 from rank 0",
            "all-reduce 'x' of 5 f32",
        ),
        (
            |group| group.all_reduce("x", &mut vec![0.0f32; 5 + group.rank() % 2]),
            "of 5 f32",
            "all-reduce 'x' of 6 f32",
        ),
        (
            |group| match group.rank() {
                1 => group.all_reduce("x", &mut [0.0f32; 5]),
                _ => group.all_reduce("x", &mut [0.0f64; 5]),
            },
            "of 5 f64",
            "all-reduce 'x' of 5 f32",
        ),
        (
            |group| {
                let cut = if group.rank() == 1 { 2 } else { 1 };
                group.all_gather("x", &[0..cut, cut..4, 4..4], &mut [0u8; 4])
            },
            "shards [0..1, 1..4, 4..4]",
            "all-gather 'x' of u8 shards [0..2, 2..4, 4..4]",
        ),
        (
            |group| {
                let send = if group.rank() == 1 { [2, 1, 1] } else { [1; 3] };
                let values = vec![0u8; send.iter().sum()];
                group.all_to_all("x", &values, &send, &mut [0; 3], &[1; 3])
            },
            "sending [1, 1, 1] and receiving [1, 1, 1]",
            "all-to-all 'x' of u8 sending [2, 1, 1] and receiving [1, 1, 1]",
        ),
    ];
    for (act, here, there) in cases {
        let start = Instant::now();
        let errors = world(3, PATIENCE, |group| act(&group).unwrap_err());
        assert!(start.elapsed() < PATIENCE / 2);
        for error in errors {
            let text = error.to_string();
            let mismatch = matches!(error, Error::Mismatch { .. });
            // A rank may also find that another one has left, having been told.
            assert!(mismatch && error.hint().is_some(), "{text}");
            // The pair is that of the first two to differ, in the order of their arrival.
            let named =
                ["is in", "in"].map(|verb| text.contains(&format!("rank 1 {verb} {there}")));
            assert!(text.contains(here) && named.contains(&true), "{text}");
        }
    }
}

#[test]
fn a_late_rank_is_named_by_all_that_wait() {
    let gave_up = AtomicUsize::new(0);
    let errors = world(4, Duration::from_millis(300), |group| {
        group.barrier("start").unwrap();
        while group.rank() == 2 && gave_up.load(SeqCst) < 3 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let shards = balanced(9, 4);
        let result = group.all_gather("gather layers.3", &shards, &mut [0.0f32; 9]);
        gave_up.fetch_add(1, SeqCst);
        // Nothing is of use after a failure.
        assert_eq!(group.barrier("after"), result);
        result.unwrap_err()
    });
    let text = "all-gather 'gather layers.3': rank 2 did not arrive within 300ms";
    for error in errors {
        assert_eq!(error.to_string(), text);
        assert!(error.hint().is_some());
    }
}

#[test]
fn a_rank_that_is_gone_is_named_at_once() {
    for panics in [false, true] {
        let start = Instant::now();
        let groups = Group::local(3, PATIENCE);
        let errors: Vec<Option<Error>> = std::thread::scope(|scope| {
            let ranks = groups.into_iter().map(|group| {
                scope.spawn(move || {
                    group.barrier("start").unwrap();
                    match group.rank() {
                        1 if panics => panic!("on purpose"),
                        1 => None,
                        // The last collective of a rank that leaves is whole for the others.
                        _ => group.all_reduce("sum layers.3", &mut [0.0f32; 9]).err(),
                    }
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let end = |rank: ScopedJoinHandle<'_, Option<Error>>| rank.join().unwrap_or(None);
            ranks.into_iter().map(end).collect()
        });
        assert!(start.elapsed() < PATIENCE / 2);
        let how = match panics {
            true => "its thread panicked",
            false => "it has left the group",
        };
        let text = format!("all-reduce 'sum layers.3': rank 1 is gone ({how})");
        for rank in [0, 2] {
            assert_eq!(errors[rank].as_ref().unwrap().to_string(), text);
        }
    }
}

#[test]
fn an_abort_ends_what_the_others_wait_in() {
    let start = Instant::now();
    let errors = world(4, PATIENCE, |group| {
        if group.rank() == 3 {
            group.abort("disk full");
        }
        let first = group.broadcast("weights", 0, &mut [0u8; 3]);
        assert_eq!(group.barrier("after"), first);
        first.unwrap_err()
    });
    assert!(start.elapsed() < PATIENCE / 2);
    for error in errors {
        assert_eq!(error.to_string(), "rank 3 stopped the job: disk full");
    }
}

#[test]
fn ranks_that_disagree_are_named() {
    for (differ, text) in [
        (&[][..], None),
        (
            &[2],
            Some("ranks disagree on the model: rank 2 differs from rank 0"),
        ),
        (
            &[1, 3],
            Some("ranks disagree on the model: ranks 1, 3 differ from rank 0"),
        ),
    ] {
        world(4, PATIENCE, |group| {
            let hash = if differ.contains(&group.rank()) { 8 } else { 7 };
            let error = group.agree("the model", hash).err();
            assert_eq!(error.map(|error| error.to_string()).as_deref(), text);
            // They still hear each other.
            group.barrier("after").unwrap();
        });
    }
}

#[test]
fn more_ranks_than_cores_make_progress() {
    let sums = world(16, PATIENCE, |group| {
        let mut data = [group.rank() as f32; 33];
        for _ in 0..200 {
            group.all_reduce("sum", &mut data).unwrap();
            data.iter_mut().for_each(|value| *value /= 16.0);
        }
        data[32]
    });
    assert_eq!(sums, [7.5; 16]);
}

#[test]
#[should_panic(expected = "shard 1 is 3..9, after 4, of 8")]
fn shards_must_ascend_inside_the_data() {
    let group = Group::local(2, PATIENCE).swap_remove(0);
    let _ = group.all_gather("x", &[0..4, 3..9], &mut [0u8; 8]);
}
