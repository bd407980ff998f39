//! Matrix products beside the machine's ceilings, measured in the same run.
//!
//! `cargo run --release -p windlass-kernels --example gemm_bench [threads] [layout] [filter]`: GFLOP/s (best and median
//! of alternating rounds) and the part of the f32 FMA peak, or GB/s for products of few rows.

use std::time::Instant;

use half::bf16;
use windlass_kernels::Element;
use windlass_kernels::gemm::{Epilogue, Layout, Mat, gemm, gemm_bytes, gemm_flops};
use windlass_kernels::pool::Pool;
use windlass_kernels::roofline;

const MANY: [(usize, usize, usize); 9] = [
    (1024, 1024, 1024),
    (2048, 768, 768),
    (2048, 2304, 768),
    (2048, 3072, 768),
    (2048, 768, 3072),
    (2048, 2048, 2048),
    (768, 768, 2048),
    (2048, 32000, 768),
    (512, 768, 50257),
];
const FEW: [(usize, usize, usize); 5] = [
    (1, 2304, 768),
    (1, 4096, 4096),
    (4, 4096, 4096),
    (8, 4096, 4096),
    (1, 50257, 768),
];

struct Times(Vec<f64>);

impl Times {
    fn best(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }
    fn median(&mut self) -> f64 {
        self.0.sort_by(f64::total_cmp);
        self.0[self.0.len() / 2]
    }
}

/// Operands on huge pages, as the memory pool gives them.
fn operand<E: Element>(len: usize) -> Vec<E> {
    let mut data = Vec::with_capacity(len);
    let start = (data.as_ptr() as usize).next_multiple_of(4096);
    let bytes = (data.as_ptr() as usize + len * size_of::<E>()).saturating_sub(start);
    // SAFETY: whole pages of the allocation, and only advice.
    unsafe { libc::madvise(start as *mut _, bytes, libc::MADV_HUGEPAGE) };
    data.extend((0..len).map(|i| E::from_f64((i * 2654435761 % 1000) as f64 / 500.0 - 1.0)));
    data
}

fn measure<E: Element>(pool: &Pool, layout: Layout, (m, n, k): (usize, usize, usize)) -> Times {
    let (a, b): (Vec<E>, Vec<E>) = (operand(m * k), operand(n * k));
    let mut c = vec![E::default(); m * n];
    let a = Mat {
        data: &a[..],
        stride: if layout == Layout::Tn { m } else { k },
    };
    let b = Mat {
        data: &b[..],
        stride: if layout == Layout::Nt { k } else { n },
    };
    let mut times = Vec::new();
    let rounds = (4e10 / gemm_flops(m, n, k) as f64).clamp(5.0, 60.0) as usize;
    for _ in 0..rounds {
        let start = Instant::now();
        gemm(pool, layout, m, n, k, a, b, &mut c, n, Epilogue::default());
        times.push(start.elapsed().as_secs_f64());
    }
    Times(times)
}

fn report<E: Element>(pool: &Pool, layout: Layout, size: (usize, usize, usize), bandwidth: f64) {
    let before = roofline::fma_peak(pool, 3);
    let mut times = measure::<E>(pool, layout, size);
    let peak = roofline::fma_peak(pool, 3).max(before);
    let (m, n, k) = size;
    let flops = gemm_flops(m, n, k) as f64;
    let line = format!("{:>4} {layout:?} {m:>5} x {n:>5} x {k:>5}", E::DTYPE.name());
    if m <= 8 {
        let bytes = gemm_bytes::<E, E>(m, n, k) as f64;
        let (best, median) = (bytes / times.best() / 1e9, bytes / times.median() / 1e9);
        println!(
            "{line}: {best:7.2} GB/s best {median:7.2} median, read bandwidth {:.2}",
            bandwidth / 1e9
        );
    } else {
        let (best, median) = (flops / times.best() / 1e9, flops / times.median() / 1e9);
        println!(
            "{line}: {best:7.1} GFLOP/s best {median:7.1} median, peak {:7.1}: {:.0} %",
            peak / 1e9,
            1e11 * best / peak
        );
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = arguments.first().and_then(|t| t.parse().ok()).unwrap_or(2);
    let pool = Pool::new(threads);
    let data = vec![1f32; 1 << 26];
    let bandwidth = roofline::read_bandwidth(&pool, &data, 5);
    println!(
        "{threads} threads, level {}, read bandwidth {:.2} GB/s",
        pool.level(),
        bandwidth / 1e9
    );
    if let Some(peak) = roofline::amx_peak(&pool, 5) {
        println!("bf16 tile peak {:.1} GFLOP/s", peak / 1e9);
    }
    let layouts = [("nt", Layout::Nt), ("nn", Layout::Nn), ("tn", Layout::Tn)];
    let filter = arguments.get(2).map(String::as_str).unwrap_or_default();
    for (name, layout) in layouts {
        if arguments
            .get(1)
            .is_some_and(|only| only != name && only != "all")
        {
            continue;
        }
        for size in MANY.into_iter().chain(FEW) {
            if format!("{}x{}x{}", size.0, size.1, size.2).contains(filter) {
                report::<f32>(&pool, layout, size, bandwidth);
                report::<bf16>(&pool, layout, size, bandwidth);
            }
        }
    }
}
