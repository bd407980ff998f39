//! `f32` to blocks.
//!
//! The types of 32 elements, the ternary ones and `MXFP4` follow the format's reference to the bit; with importances,
//! and in the types of 256 elements, scales are searched ([`super::search`]) and the result is ours.

use half::{bf16, f16};

use super::codes::{Codes, FLOAT4, power_of_two};
use super::encode::to_small_float;
use super::search::{
    FLOAT4_LEVELS, Range, UNEVEN_LEVELS, Weighted, Window, affine, code, extreme, inverse,
    symmetric, table_sums, tabled,
};
use super::super_block::{WithMin, WithoutMin};
use super::{BlockType, MAX_ELEMENTS};
use crate::dispatch::Level;
use crate::pool::{Pool, SharedMut};
use crate::tasks::Tasks;

/// Magnitudes from here on are beyond every type's range.
const BEYOND: f32 = 1e15;

/// Quantizes one row. `importance` says how much the error of each element counts, as in the columns of an importance
/// matrix; types without a search pass over it. Infinite numbers, and those beyond a
/// type's range, make infinite scales ([`super::first_bad_block`]); `NVFP4` knows none and saturates.
///
/// # Panics
/// If the type is not written ([`BlockType::is_writable`]), the row is no whole number of blocks, or `importance` or
/// `out` have other lengths.
#[track_caller]
pub fn quantize(block_type: BlockType, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    quantize_at(Level::current(), block_type, row, importance, out);
}

#[track_caller]
fn quantize_at(
    level: Level,
    block_type: BlockType,
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    assert!(block_type.is_writable(), "{block_type} is not written");
    assert_eq!(
        Some(out.len()),
        block_type.size_of(row.len()),
        "bytes and those of {} elements in {block_type}",
        row.len()
    );
    if let Some(importance) = importance {
        assert_eq!(importance.len(), row.len(), "importances and elements");
    }
    macro_rules! plain {
        ($t:ty, $convert:expr) => {{
            for (out, &x) in out.chunks_exact_mut(size_of::<$t>()).zip(row) {
                out.copy_from_slice(&<$t>::to_le_bytes($convert(x)));
            }
        }};
    }
    match block_type {
        BlockType::F32 => plain!(f32, |x| x),
        BlockType::F16 => plain!(f16, f16::from_f32),
        BlockType::BF16 => plain!(bf16, bf16::from_f32),
        BlockType::F64 => plain!(f64, f64::from),
        _ => blocks(level, block_type, row, importance, out),
    }
}

/// The same code at the width of the machine's vectors: its sums have lanes of their own, so its results are the same.
fn blocks(
    level: Level,
    block_type: BlockType,
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    #[cfg(target_arch = "x86_64")]
    if level >= Level::Avx2 {
        // SAFETY: the level is supported, by the promise of its pool.
        return unsafe { blocks_avx2(block_type, row, importance, out) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = level;
    blocks_at_any(block_type, row, importance, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn blocks_avx2(block_type: BlockType, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    blocks_at_any(block_type, row, importance, out);
}

#[inline(always)]
fn blocks_at_any(block_type: BlockType, row: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let width = block_type.elements();
    let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len().max(1) as f32;
    let blocks = row
        .chunks_exact(width)
        .zip(out.chunks_exact_mut(block_type.bytes()));
    for (i, (x, out)) in blocks.enumerate() {
        let importance = importance.map(|v| &v[i * width..(i + 1) * width]);
        let mut codes = Codes::new(block_type);
        quantize_block(block_type, x, importance, mean, &mut codes);
        codes.encode(block_type, out);
    }
}

/// Quantizes rows of `row_len` elements by all threads of a pool; one importance for each column.
///
/// # Panics
/// As [`quantize`], for each row.
#[track_caller]
pub fn quantize_all(
    pool: &Pool,
    block_type: BlockType,
    values: &[f32],
    row_len: usize,
    importance: Option<&[f32]>,
    out: &mut [u8],
) {
    let row_bytes = block_type.size_of(row_len);
    let Some(row_bytes) = row_bytes.filter(|_| row_len > 0) else {
        panic!("rows of {row_len} elements in {block_type}");
    };
    let rows = values.len() / row_len;
    assert_eq!(values.len(), rows * row_len, "elements and whole rows");
    assert_eq!(
        out.len(),
        rows * row_bytes,
        "bytes and those of {rows} rows"
    );
    let tasks = Tasks::rows(rows, row_len);
    let out = SharedMut::new(out);
    pool.run(tasks.count(), |task, _| {
        for row in tasks.part(task) {
            // SAFETY: each task writes its own rows alone.
            let out = unsafe { out.slice(row * row_bytes, row_bytes) };
            quantize_at(
                pool.level(),
                block_type,
                &values[row * row_len..][..row_len],
                importance,
                out,
            );
        }
    });
}

#[inline(always)]
fn quantize_block(
    block_type: BlockType,
    x: &[f32],
    importance: Option<&[f32]>,
    mean: f32,
    codes: &mut Codes,
) {
    use BlockType::*;
    // No f16 scale holds such numbers, and squares pass f32: an infinite scale says so.
    if !x.iter().all(|x| x.abs() < BEYOND) {
        codes.d = match block_type {
            MXFP4 => power_of_two(255),
            _ => f32::INFINITY,
        };
        return;
    }
    let mut weights = [0f32; MAX_ELEMENTS];
    let w = &mut weights[..x.len()];
    weigh(x, importance, mean, w);
    let data = Weighted { x, w };
    match block_type {
        Q4_0 | Q5_0 if importance.is_some() => searched_symmetric(data, codes),
        Q4_1 if importance.is_some() => searched_affine(data, 15.0, codes),
        Q5_1 if importance.is_some() => searched_affine(data, 31.0, codes),
        Q4_0 => reference_symmetric(x, 8.0, codes),
        Q5_0 => reference_symmetric(x, 16.0, codes),
        Q4_1 => reference_affine(x, 15.0, codes),
        Q5_1 => reference_affine(x, 31.0, codes),
        Q8_0 => rounded(x, 127.0, 128, codes),
        TQ1_0 | TQ2_0 => rounded(x, 1.0, 1, codes),
        IQ4_NL => iq4_nl(data, codes),
        MXFP4 => mxfp4(x, codes),
        NVFP4 => nvfp4(data, codes),
        Q1_0 => q1_0(x, codes),
        Q2_0 => q2_0(data, codes),
        Q2_K => {
            let spec = WithMin {
                top: 3.0,
                scale_top: 15.0,
                window: Window {
                    first: -0.5,
                    step: 0.1,
                    count: 16,
                },
            };
            spec.quantize(data, codes);
        }
        Q4_K | Q5_K => {
            let spec = WithMin {
                top: if block_type == Q4_K { 15.0 } else { 31.0 },
                scale_top: 63.0,
                window: Window {
                    first: -1.0,
                    step: 0.1,
                    count: 21,
                },
            };
            spec.quantize(data, codes);
        }
        Q3_K | IQ4_XS => WithoutMin {
            scales: (-32.0, 31.0),
        }
        .quantize(data, codes),
        Q6_K => WithoutMin {
            scales: (-128.0, 127.0),
        }
        .quantize(data, codes),
        _ => unreachable!("{block_type} is not written in blocks"),
    }
}

/// How much the error of each element counts.
#[inline(always)]
fn weigh(x: &[f32], importance: Option<&[f32]>, mean: f32, w: &mut [f32]) {
    // Small numbers matter too where large ones are: errors count by the square root of both.
    let own = 2.0 * x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    let base = if x.len() == MAX_ELEMENTS { own } else { mean };
    for (i, (w, x)) in w.iter_mut().zip(x).enumerate() {
        *w = importance.map_or(1.0, |v| v[i]) * (base + x * x).sqrt();
    }
    // A block without any weight is quantized all the same.
    if w.iter().all(|w| w.is_nan() || *w <= 0.0) {
        w.fill(1.0);
    }
}

/// `d` takes the extreme to the lowest code; codes are rounded up from the middle.
#[inline(always)]
fn reference_symmetric(x: &[f32], zero: f32, codes: &mut Codes) {
    codes.d = extreme(x) / -zero;
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(x) {
        *q = ((x * by + (zero + 0.5)) as u8).min(2 * zero as u8 - 1);
    }
}

/// `d` takes the span to all codes.
#[inline(always)]
fn reference_affine(x: &[f32], top: f32, codes: &mut Codes) {
    let low = x.iter().fold(f32::INFINITY, |m, &x| m.min(x));
    let high = x.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
    codes.d = (high - low) / top;
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(x) {
        *q = (((x - low) * by + 0.5) as u8).min(top as u8);
    }
    (codes.dmin, codes.mins[0]) = (-low, 1);
}

/// `d` takes the largest magnitude to `top`; codes are rounded to the nearest, ties away from zero.
#[inline(always)]
fn rounded(x: &[f32], top: f32, zero: i16, codes: &mut Codes) {
    codes.d = extreme(x).abs() / top;
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(x) {
        *q = ((x * by).round() as i16 + zero) as u8;
    }
}

fn half(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

#[inline(always)]
fn searched_symmetric(data: Weighted, codes: &mut Codes) {
    let super::Levels::Less(zero) = codes.levels else {
        unreachable!("even codes")
    };
    let range = Range {
        low: -f32::from(zero),
        high: f32::from(zero) - 1.0,
    };
    codes.d = half(symmetric(data, range));
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(data.x) {
        *q = (code(x * by, range) + f32::from(zero)) as u8;
    }
}

#[inline(always)]
fn searched_affine(data: Weighted, top: f32, codes: &mut Codes) {
    let window = Window {
        first: -0.9,
        step: 0.05,
        count: 37,
    };
    let (scale, min) = affine(data, top, window, true);
    (codes.d, codes.dmin, codes.mins[0]) = (half(scale), half(min), 1);
    let range = Range {
        low: 0.0,
        high: top,
    };
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(data.x) {
        *q = code((x + codes.dmin) * by, range) as u8;
    }
}

#[inline(always)]
fn iq4_nl(data: Weighted, codes: &mut Codes) {
    codes.d = half(tabled(data, &UNEVEN_LEVELS));
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(data.x) {
        *q = UNEVEN_LEVELS.code(x * by);
    }
}

/// The exponent of the largest magnitude, less two: its level lies between 4 and 8, of which 6 is there.
#[inline(always)]
fn mxfp4(x: &[f32], codes: &mut Codes) {
    let largest = extreme(x).abs();
    let exponent = match largest > 0.0 {
        true => (f64::from(largest).log2() as f32).floor() - 2.0 + 127.0,
        false => 0.0,
    };
    codes.d = power_of_two(exponent as u8);
    for (q, x) in codes.q.iter_mut().zip(x) {
        let distance = |level: i8| (codes.d * f32::from(level) - x).abs();
        let nearer = |best: usize, i: usize| match distance(FLOAT4[i]) < distance(FLOAT4[best]) {
            true => i,
            false => best,
        };
        *q = (1..16).fold(0, nearer) as u8;
    }
}

/// The 8-bit scale that takes the largest magnitude to level 12, or the best of those around it.
#[inline(always)]
fn nvfp4(data: Weighted, codes: &mut Codes) {
    codes.d = 1.0 / 1024.0;
    for j in 0..4 {
        let range = 16 * j..16 * (j + 1);
        let data = Weighted {
            x: &data.x[range.clone()],
            w: &data.w[range.clone()],
        };
        let exact = extreme(data.x).abs() / 12.0 / codes.d;
        let middle = to_small_float(exact as i32).min(0x7e);
        let error = |byte: &u8| {
            let scale = codes.d * super::codes::small_float(*byte) as f32;
            table_sums(data, &FLOAT4_LEVELS, scale)[2]
        };
        let bytes = middle.saturating_sub(2)..=(middle + 2).min(0x7e);
        let best = bytes
            .min_by(|a, b| error(a).total_cmp(&error(b)))
            .unwrap_or(middle);
        codes.scales[j] = super::codes::small_float(best);
        let by = inverse(codes.d * codes.scales[j] as f32);
        for (q, x) in codes.q[range].iter_mut().zip(data.x) {
            *q = FLOAT4_LEVELS.code(x * by);
        }
    }
}

/// The mean magnitude, with the sign of each.
#[inline(always)]
fn q1_0(x: &[f32], codes: &mut Codes) {
    codes.d = x.iter().map(|x| x.abs()).sum::<f32>() / x.len() as f32;
    for (q, x) in codes.q.iter_mut().zip(x) {
        *q = u8::from(*x >= 0.0);
    }
}

#[inline(always)]
fn q2_0(data: Weighted, codes: &mut Codes) {
    // Levels are -1, 0, 1, 2, and a scale may have either sign.
    let range = Range {
        low: -1.0,
        high: 2.0,
    };
    codes.d = half(symmetric(data, range));
    let by = inverse(codes.d);
    for (q, x) in codes.q.iter_mut().zip(data.x) {
        *q = (code(x * by, range) + 1.0) as u8;
    }
}
