//! What this machine can do at most: the ceilings that benchmarks hold kernels against.
//!
//! Everything is measured when asked, on the pool given: shared machines change from minute to minute, so a ceiling
//! belongs to the same run as the figure it is compared with.

use std::arch::x86_64::*;
use std::time::Instant;

use crate::dispatch::Level;
use crate::pool::{Pool, SharedMut};

/// How long a run of a peak takes at least.
const MILLISECONDS: f64 = 10.0;

/// Floating-point operations a second of fused multiply-adds on registers, all threads of the pool together, at its
/// level (scalar counts as one lane); the best of `repeats` runs.
pub fn fma_peak(pool: &Pool, repeats: usize) -> f64 {
    let (chunk, lanes): (unsafe fn(usize) -> f32, usize) = match pool.level() {
        Level::Scalar => (fma_scalar, 1),
        Level::Avx2 => (fma_avx2, 8),
        Level::Avx512 | Level::Amx => (fma_avx512, 16),
    };
    peak(pool, repeats, (2 * CHAINS * lanes) as f64, |rounds| {
        // SAFETY: the pool's level is supported.
        std::hint::black_box(unsafe { chunk(rounds) });
    })
}

/// Integer operations a second of byte products (two a product and sum) on registers, all threads together, with the
/// widest instructions of the pool's level; `None` for the scalar one. With tiles that is twice what packed products could
/// reach, which multiply their whole numbers as `bf16`: see [`amx_peak`].
pub fn int8_peak(pool: &Pool, repeats: usize) -> Option<f64> {
    if crate::packed::uses_tiles(pool.level()) {
        // SAFETY: the pool's level is supported.
        return Some(peak(
            pool,
            repeats,
            4.0 * 2.0 * 16.0 * 16.0 * 64.0,
            |rounds| unsafe { crate::tiles::spin_bytes(rounds) },
        ));
    }
    let (chunk, lanes): (unsafe fn(usize) -> i32, usize) = match pool.level() {
        Level::Scalar => return None,
        Level::Avx512 | Level::Amx if is_x86_feature_detected!("avx512vnni") => (bytes_vnni, 64),
        _ => (bytes_avx2, 32),
    };
    Some(peak(pool, repeats, (2 * CHAINS * lanes) as f64, |rounds| {
        // SAFETY: the pool's level and the feature are supported.
        std::hint::black_box(unsafe { chunk(rounds) });
    }))
}

/// Floating-point operations a second of `bf16` tile products on registers; `None` below [`Level::Amx`].
pub fn amx_peak(pool: &Pool, repeats: usize) -> Option<f64> {
    if pool.level() != Level::Amx {
        return None;
    }
    // SAFETY: the pool's level is supported.
    Some(peak(
        pool,
        repeats,
        4.0 * 2.0 * 16.0 * 16.0 * 32.0,
        |rounds| unsafe { crate::tiles::spin_bf16(rounds) },
    ))
}

/// Bytes a second read from `data` by all threads together, each in four streams; the best of `repeats` passes.
///
/// `data` should be several times the last-level cache.
pub fn read_bandwidth(pool: &Pool, data: &[f32], repeats: usize) -> f64 {
    const CHUNK: usize = 1 << 18;
    let tasks = data.len() / CHUNK;
    assert!(
        tasks > 0,
        "read_bandwidth needs at least {CHUNK} elements, got {}",
        data.len()
    );
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        pool.run(tasks, |task, _| {
            let part = &data[task * CHUNK..(task + 1) * CHUNK];
            std::hint::black_box(sum_four_streams(part));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (tasks * CHUNK * size_of::<f32>()) as f64 / best
}

/// Bytes a second read from `data` when each thread follows some streams at once, as packed products do; the best of
/// `repeats` passes. One stream leaves bandwidth unused where the hardware fetches ahead within a page only.
///
/// # Panics
/// When there are no streams, or `data` is too short for them.
#[track_caller]
pub fn stream_bandwidth(pool: &Pool, data: &[f32], streams: usize, repeats: usize) -> f64 {
    /// Elements of a stream in one task: 128 KiB.
    const CHUNK: usize = 1 << 15;
    let tasks = data.len() / (CHUNK * streams);
    assert!(
        streams > 0 && tasks > 0,
        "{streams} streams over {} elements",
        data.len()
    );
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        pool.run(tasks, |task, _| {
            let part = &data[task * CHUNK * streams..][..CHUNK * streams];
            let mut sums = [0f32; 16];
            for i in (0..CHUNK).step_by(16) {
                for stream in part.chunks_exact(CHUNK) {
                    let line = &stream[i..i + 16];
                    sums.iter_mut().zip(line).for_each(|(s, x)| *s += x);
                }
            }
            std::hint::black_box(sums);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    (tasks * CHUNK * streams * size_of::<f32>()) as f64 / best
}

/// Bytes a second written to `data` by all threads together; the best of `repeats` passes.
pub fn write_bandwidth(pool: &Pool, data: &mut [f32], repeats: usize) -> f64 {
    const CHUNK: usize = 1 << 18;
    let bytes = size_of_val(data) as f64;
    let len = data.len();
    let view = SharedMut::new(data);
    let mut best = f64::INFINITY;
    for pass in 0..repeats {
        let start = Instant::now();
        pool.run(len.div_ceil(CHUNK), |task, _| {
            let first = task * CHUNK;
            // SAFETY: every task has its own chunk.
            unsafe { view.slice(first, CHUNK.min(len - first)) }.fill(pass as f32);
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    bytes / best
}

fn sum_four_streams(data: &[f32]) -> f32 {
    let quarter = data.len() / 4;
    let mut sums = [[0f32; 16]; 4];
    for i in (0..quarter / 16 * 16).step_by(16) {
        for (stream, sums) in sums.iter_mut().enumerate() {
            let part = &data[stream * quarter + i..][..16];
            sums.iter_mut().zip(part).for_each(|(s, x)| *s += x);
        }
    }
    sums.iter().flatten().sum()
}

/// Runs `chunk(rounds)` on every thread at once, rounds grown until a run takes about [`MILLISECONDS`].
fn peak(pool: &Pool, repeats: usize, work_per_round: f64, chunk: impl Fn(usize) + Sync) -> f64 {
    let time = |rounds: usize| {
        let start = Instant::now();
        pool.run(pool.threads(), |_, _| chunk(rounds));
        start.elapsed().as_secs_f64()
    };
    let mut rounds = 1000;
    while time(rounds) * 1e3 < MILLISECONDS {
        rounds *= 2;
    }
    let best = (0..repeats)
        .map(|_| time(rounds))
        .fold(f64::INFINITY, f64::min);
    work_per_round * rounds as f64 * pool.threads() as f64 / best
}

/// Independent chains: enough to cover the latency of two units.
const CHAINS: usize = 12;

unsafe fn fma_scalar(rounds: usize) -> f32 {
    let (x, y) = (
        std::hint::black_box(0.999f32),
        std::hint::black_box(0.001f32),
    );
    let mut c = [1f32; CHAINS];
    for _ in 0..rounds {
        // Opaque, so that the chains are not vectorized.
        c.iter_mut()
            .for_each(|c| *c = std::hint::black_box(*c * x + y));
    }
    c.iter().sum()
}

#[target_feature(enable = "avx2,fma")]
unsafe fn fma_avx2(rounds: usize) -> f32 {
    let (x, y) = (
        _mm256_set1_ps(std::hint::black_box(0.999)),
        _mm256_set1_ps(std::hint::black_box(0.001)),
    );
    let mut c = [x; CHAINS];
    for _ in 0..rounds {
        c.iter_mut().for_each(|c| *c = _mm256_fmadd_ps(*c, x, y));
    }
    c.iter().map(|c| _mm256_cvtss_f32(*c)).sum()
}

#[target_feature(enable = "avx512f")]
unsafe fn fma_avx512(rounds: usize) -> f32 {
    let (x, y) = (
        _mm512_set1_ps(std::hint::black_box(0.999)),
        _mm512_set1_ps(std::hint::black_box(0.001)),
    );
    let mut c = [x; CHAINS];
    for _ in 0..rounds {
        c.iter_mut().for_each(|c| *c = _mm512_fmadd_ps(*c, x, y));
    }
    c.iter().map(|c| _mm512_cvtss_f32(*c)).sum()
}

#[target_feature(enable = "avx2")]
unsafe fn bytes_avx2(rounds: usize) -> i32 {
    let (x, ones) = (
        _mm256_set1_epi8(std::hint::black_box(3)),
        _mm256_set1_epi16(1),
    );
    let mut c = [x; CHAINS];
    for _ in 0..rounds {
        c.iter_mut().for_each(|c| {
            let pairs = _mm256_maddubs_epi16(*c, x);
            *c = _mm256_add_epi32(*c, _mm256_madd_epi16(pairs, ones));
        });
    }
    c.iter()
        .map(|c| _mm256_cvtsi256_si32(*c))
        .fold(0, i32::wrapping_add)
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn bytes_vnni(rounds: usize) -> i32 {
    let x = _mm512_set1_epi8(std::hint::black_box(3));
    let mut c = [x; CHAINS];
    for _ in 0..rounds {
        c.iter_mut()
            .for_each(|c| *c = _mm512_dpbusd_epi32(*c, x, x));
    }
    c.iter()
        .map(|c| _mm512_cvtsi512_si32(*c))
        .fold(0, i32::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_measured() {
        for &level in Level::supported() {
            let pool = Pool::with_level(2, level);
            let peak = fma_peak(&pool, 1);
            assert!(peak > 1e7, "{level}: {peak:e} operations a second");
            assert_eq!(amx_peak(&pool, 1).is_some(), level == Level::Amx);
            let bytes = int8_peak(&pool, 1);
            assert_eq!(bytes.is_some(), level != Level::Scalar);
            assert!(bytes.is_none_or(|peak| peak > 1e8), "{level}: {bytes:?}");
        }
        let mut data = vec![1f32; 1 << 20];
        let pool = Pool::new(2);
        assert!(read_bandwidth(&pool, &data, 1) > 1e6);
        for streams in [1, 4, 12] {
            assert!(stream_bandwidth(&pool, &data, streams, 1) > 1e6);
        }
        assert!(write_bandwidth(&pool, &mut data, 1) > 1e6);
    }
}
