//! Attention beside the machine's ceilings, measured in the same run.
//!
//! `cargo run --release -p windlass-kernels --example attention_bench [threads..]`: milliseconds, GFLOP/s and the part
//! of the f32 FMA peak (medians of alternating rounds) of the forward and the backward pass; GB/s of keys and values
//! for a single query. Causal work counts visible pairs only; the backward pass counts as 2.5 forward passes.

use std::time::Instant;

use half::bf16;
use windlass_kernels::attention::{AttentionShape, Rows, Segment, attention, attention_backward};
use windlass_kernels::memory::{Buffer, Category, Memory};
use windlass_kernels::pool::Pool;
use windlass_kernels::{Element, Float, roofline};

const ROUNDS: usize = 15;

struct Case {
    name: &'static str,
    shape: AttentionShape,
    segments: Vec<Segment>,
}

fn cases() -> Vec<Case> {
    let case = |name, heads, kv_heads, head_dim: usize, segments| {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (softcap, window) = (None, None);
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale,
            softcap,
            window,
        };
        Case {
            name,
            shape,
            segments,
        }
    };
    let last = Segment {
        q_start: 0,
        q_len: 1,
        kv_start: 0,
        kv_len: 16384,
    };
    let four = (0..4).map(|i| Segment::whole(i * 512, 512)).collect();
    let long = || vec![Segment::whole(0, 2048)];
    vec![
        case("4 x 512, 12/12 heads of 64", 12, 12, 64, four),
        case("1 x 2048, 32/4 heads of 64", 32, 4, 64, long()),
        case("1 x 2048, 16/8 heads of 128", 16, 8, 128, long()),
        case("1 of 16384, 12/12 heads of 64", 12, 12, 64, vec![last]),
        case("1 of 16384, 32/8 heads of 128", 32, 8, 128, vec![last]),
    ]
}

fn operand<E: Element>(memory: &Memory, len: usize) -> Buffer {
    let mut buffer = memory.alloc(len * size_of::<E>(), Category::Activations);
    for (i, x) in buffer.as_mut_slice::<E>().iter_mut().enumerate() {
        *x = E::from_f64((i * 2654435761 % 1000) as f64 / 500.0 - 1.0);
    }
    buffer
}

fn median(mut xs: Vec<f64>) -> f64 {
    xs.sort_by(f64::total_cmp);
    xs[xs.len() / 2]
}

/// Runs `pass` between measurements of the peak; prints one line.
fn report(pool: &Pool, name: &str, flops: f64, bytes: Option<f64>, mut pass: impl FnMut()) {
    pass();
    let (mut times, mut parts) = (Vec::new(), Vec::new());
    let mut before = roofline::fma_peak(pool, 1);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        pass();
        let time = start.elapsed().as_secs_f64();
        let after = roofline::fma_peak(pool, 1);
        parts.push(flops / time / (0.5 * (before + after)));
        times.push(time);
        before = after;
    }
    let (time, part) = (median(times), median(parts));
    print!(
        "{name}: {:>8.2} ms, {:>6.1} GFLOP/s",
        time * 1e3,
        flops / time / 1e9
    );
    match bytes {
        None => println!(", {:.0} % of the FMA peak", part * 100.0),
        Some(bytes) => println!(", {:.1} GB/s", bytes / time / 1e9),
    }
}

fn bench<E: Element>(pool: &Pool, case: &Case) {
    let Case {
        shape, segments, ..
    } = case;
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
    let (width, kv_width) = (
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    let memory = Memory::new();
    let queries = || operand::<E>(&memory, tokens * width);
    let keys = || operand::<E>(&memory, kv_tokens * kv_width);
    let (q, k, v, dout) = (queries(), keys(), keys(), queries());
    let (mut out, mut dq, mut dk, mut dv) = (queries(), queries(), keys(), keys());
    let mut lse = vec![E::Acc::ZERO; tokens * shape.heads];
    let q = Rows::new(q.as_slice(), width);
    let (k, v) = (
        Rows::new(k.as_slice(), kv_width),
        Rows::new(v.as_slice(), kv_width),
    );
    let flops = shape.flops(segments);
    let name = format!(
        "{} {:<4} {} threads",
        case.name,
        E::DTYPE.name(),
        pool.threads()
    );
    let single = tokens == 1;
    let bytes = single.then_some((2 * kv_tokens * kv_width * size_of::<E>()) as f64);
    let out = out.as_mut_slice::<E>();
    report(pool, &format!("{name} fwd"), flops, bytes, || {
        attention(pool, shape, segments, q, k, v, out, &mut lse);
    });
    if !single {
        let (dq, dk, dv) = (dq.as_mut_slice(), dk.as_mut_slice(), dv.as_mut_slice());
        report(pool, &format!("{name} bwd"), 2.5 * flops, None, || {
            let dout = dout.as_slice();
            attention_backward(pool, shape, segments, q, k, v, out, &lse, dout, dq, dk, dv);
        });
    }
}

fn main() {
    let mut threads: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|x| x.parse().ok())
        .collect();
    if threads.is_empty() {
        threads = vec![1, 2];
    }
    for threads in threads {
        let pool = Pool::new(threads);
        let data = operand::<f32>(&Memory::new(), 1 << 28);
        println!(
            "{}, {threads} threads: FMA peak {:.1} GFLOP/s, reads {:.1} GB/s",
            pool.level(),
            roofline::fma_peak(&pool, 5) / 1e9,
            roofline::read_bandwidth(&pool, data.as_slice(), 3) / 1e9,
        );
        drop(data);
        for case in cases() {
            bench::<f32>(&pool, &case);
            bench::<bf16>(&pool, &case);
        }
    }
}
