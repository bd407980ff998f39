//! Packed products at the shapes of a 1.1B Llama: decode in GB/s, prefill in TOP/s.

use std::time::Instant;
use windlass_kernels::memory::Memory;
use windlass_kernels::packed::{Activations, Layout, PackedMatrix, Product, multiply};
use windlass_kernels::pool::Pool;

fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

fn main() {
    let threads: usize = std::env::args().nth(1).map_or(2, |s| s.parse().unwrap());
    let pool = Pool::new(threads);
    let memory = Memory::new();
    let peak = windlass_kernels::roofline::int8_peak(&pool, 10).unwrap_or(0.0);
    let fma = windlass_kernels::roofline::fma_peak(&pool, 10);
    println!(
        "M=peak {:.3} TOP/s int8, {:.1} GFLOP/s f32",
        peak / 1e12,
        fma / 1e9
    );
    for _ in 0..3 {
        let cpu = cpu_seconds();
        let start = Instant::now();
        let peak = windlass_kernels::roofline::int8_peak(&pool, 30).unwrap_or(0.0);
        println!(
            "M=peak {:.3} TOP/s int8; {:.0} % of the CPU",
            peak / 1e12,
            100.0 * (cpu_seconds() - cpu) / start.elapsed().as_secs_f64() / threads as f64
        );
    }
    for (name, layout) in [
        ("q4", Layout::q4(32)),
        ("q4 128", Layout::q4(128)),
        ("q8", Layout::q8()),
    ] {
        let (n, k) = (2048, 2048);
        let count = 100;
        let matrices: Vec<PackedMatrix> = (0..count)
            .map(|i| {
                PackedMatrix::pack(&pool, &memory, layout, [n, k], |row, unit, out| {
                    out.codes.fill((row * 31 + unit * 7 + i) as u8 & 15);
                    out.scales.fill(0x2000);
                })
            })
            .collect();
        let bytes: usize = matrices.iter().map(|m| m.bytes().len()).sum();
        for m in [1, 2, 4, 8, 16, 64, 512] {
            let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0f32; m * n];
            let reps = if m >= 16 { 40 } else { 4 };
            let used = if m >= 16 { 1 } else { count };
            let (mut best, mut busy) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..reps {
                let start = Instant::now();
                let cpu = cpu_seconds();
                for matrix in &matrices[..used] {
                    let x = Activations::quantize(&pool, &memory, &x, k);
                    multiply(
                        &pool,
                        &x,
                        &mut [Product {
                            matrix,
                            bias: None,
                            residual: None,
                            out: &mut y,
                        }],
                    );
                }
                best = best.min(start.elapsed().as_secs_f64());
                busy = busy.min((cpu_seconds() - cpu) / threads as f64);
            }
            let bytes = bytes as f64 * used as f64 / count as f64;
            println!(
                "{name:8} M={m:4}: {:7.2} GB/s {:7.3} TOP/s  {:.2} ms a matrix; by CPU time {:.2} GB/s {:.3} TOP/s",
                bytes / best / 1e9,
                2.0 * (m * n * k * used) as f64 / best / 1e12,
                best / used as f64 * 1e3,
                bytes / busy / 1e9,
                2.0 * (m * n * k * used) as f64 / busy / 1e12
            );
        }
    }
}
