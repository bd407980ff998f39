//! Speed of attention, forward and backward, as a share of the machine's peak of fused multiply-adds.
//!
//! `cargo run --release -p windlass-kernels --example attention_bench`. Causal work counts the visible pairs only.

use std::hint::black_box;
use std::time::Instant;

use half::bf16;
use windlass_kernels::attention::{AttentionShape, Rows, Segment, attention, attention_backward};
use windlass_kernels::dispatch::Level;
use windlass_kernels::pool::Pool;
use windlass_kernels::{Element, Float};

/// Runs timed of each kind; the fastest and the median are shown.
const RUNS: usize = 15;

/// `f32` operations a second of one core that only multiplies and adds, at the level's vector width.
fn peak(level: Level) -> f64 {
    fn measure(chain: impl Fn(u32) -> f32, operations: f64) -> f64 {
        let timed = |_| {
            let start = Instant::now();
            black_box(chain(black_box(2_000_000)));
            operations * 2e6 / start.elapsed().as_secs_f64()
        };
        (0..7).map(timed).fold(0.0, f64::max)
    }
    match level {
        // SAFETY: the level is supported.
        Level::Avx512 | Level::Amx => measure(|n| unsafe { chain_avx512(n) }, 12.0 * 32.0),
        // SAFETY: as above.
        Level::Avx2 => measure(|n| unsafe { chain_avx2(n) }, 12.0 * 16.0),
        Level::Scalar => f64::NAN,
    }
}

#[target_feature(enable = "avx512f")]
fn chain_avx512(rounds: u32) -> f32 {
    use std::arch::x86_64::*;
    let (a, b) = (
        _mm512_set1_ps(black_box(0.999)),
        _mm512_set1_ps(black_box(0.001)),
    );
    let mut sums = [b; 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    let mut total = b;
    for sum in sums {
        total = _mm512_add_ps(total, sum);
    }
    _mm512_reduce_add_ps(total)
}

#[target_feature(enable = "avx2,fma")]
fn chain_avx2(rounds: u32) -> f32 {
    use std::arch::x86_64::*;
    let (a, b) = (
        _mm256_set1_ps(black_box(0.999)),
        _mm256_set1_ps(black_box(0.001)),
    );
    let mut sums = [b; 12];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    let mut total = b;
    for sum in sums {
        total = _mm256_add_ps(total, sum);
    }
    _mm256_cvtss_f32(total)
}

/// Seconds of the fastest and the median run.
fn time(mut run: impl FnMut()) -> (f64, f64) {
    run();
    let mut times: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[0], times[RUNS / 2])
}

fn bench<E: Element>(
    name: &str,
    shape: AttentionShape,
    segments: &[Segment],
    threads: usize,
    peak: f64,
) {
    let pool = Pool::new(threads);
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    let tokens = segments
        .iter()
        .map(|s| s.q_start + s.q_len)
        .max()
        .unwrap_or(0);
    let kv_tokens = segments
        .iter()
        .map(|s| s.kv_start + s.kv_len)
        .max()
        .unwrap_or(0);
    let noise = |len: usize| -> Vec<E> {
        (0..len)
            .map(|i| E::from_f64(((i * 7919) % 1013) as f64 / 506.5 - 1.0))
            .collect()
    };
    let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
    let (q, k, v) = (
        noise(tokens * width),
        noise(kv_tokens * kv_width),
        noise(kv_tokens * kv_width),
    );
    let dout = noise(tokens * width);
    let (mut out, mut lse) = (noise(tokens * width), vec![E::Acc::ZERO; tokens * heads]);
    let (mut dq, mut dk, mut dv) = (out.clone(), k.clone(), v.clone());
    let (q, k, v) = (
        Rows::new(&q, width),
        Rows::new(&k, kv_width),
        Rows::new(&v, kv_width),
    );
    let flops = shape.flops(segments);
    let show = |pass: &str, flops: f64, bytes: f64, (best, median): (f64, f64)| {
        let rate = flops / median / 1e9;
        let share = 100.0 * rate * 1e9 / (peak * threads as f64);
        let bandwidth = bytes / median / 1e9;
        println!(
            "{name:<26} {:<4} {threads} threads {pass} {:>8.3} ms (best {:>8.3}) {rate:>7.1} GFLOP/s {share:>5.1} % {bandwidth:>6.1} GB/s",
            E::DTYPE.name(),
            median * 1e3,
            best * 1e3,
        );
    };
    let bytes = (E::DTYPE.size() * (2 * tokens * width + 2 * kv_tokens * kv_width)) as f64;
    show(
        "fwd",
        flops,
        bytes,
        time(|| attention(&pool, &shape, segments, q, k, v, &mut out, &mut lse)),
    );
    if segments.iter().any(|s| s.q_len != s.kv_len) {
        return;
    }
    let run = || {
        attention_backward(
            &pool, &shape, segments, q, k, v, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
        )
    };
    show("bwd", 2.5 * flops, 2.0 * bytes, time(run));
}

fn main() {
    let level = Level::current();
    let peak = peak(level);
    println!(
        "level {level}, peak of one core {:.1} GFLOP/s (f32 FMA)",
        peak / 1e9
    );
    let shape = |heads, kv_heads, head_dim: usize| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        softcap: None,
        window: None,
    };
    let batch: Vec<Segment> = (0..4).map(|i| Segment::whole(i * 512, 512)).collect();
    let decode = [Segment {
        q_start: 0,
        q_len: 1,
        kv_start: 0,
        kv_len: 16384,
    }];
    let cases: [(&str, AttentionShape, &[Segment]); 5] = [
        ("4 x 512, 12 x 64", shape(12, 12, 64), &batch),
        (
            "1 x 2048, 32/4 x 64",
            shape(32, 4, 64),
            &[Segment::whole(0, 2048)],
        ),
        (
            "1 x 1024, 16/8 x 128",
            shape(16, 8, 128),
            &[Segment::whole(0, 1024)],
        ),
        ("1 of 16384, 12 x 64", shape(12, 12, 64), &decode),
        ("1 of 16384, 32/8 x 128", shape(32, 8, 128), &decode),
    ];
    for (name, shape, segments) in cases {
        for threads in [1, 2] {
            bench::<f32>(name, shape, segments, threads, peak);
            bench::<bf16>(name, shape, segments, threads, peak);
        }
    }
}
