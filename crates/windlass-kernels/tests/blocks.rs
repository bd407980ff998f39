//! Block types: what is taken apart goes together again, and what is quantized stays near.

use windlass_kernels::blocks::{
    BlockType, Codes, codes, dequantize, dequantize_all, first_bad_block, quantize, quantize_all,
};
use windlass_kernels::dispatch::Level;
use windlass_kernels::pool::Pool;

/// Reproducible bytes without a pattern (a linear congruential generator's upper bits).
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

fn scaled() -> impl Iterator<Item = BlockType> {
    BlockType::ALL
        .iter()
        .copied()
        .filter(|kind| kind.scheme().is_some())
}

/// Puts finite scales where random bytes may have infinite ones.
fn with_scales(kind: BlockType, block: &mut [u8]) {
    for bytes in block.chunks_exact_mut(kind.bytes()) {
        while first_bad_block(kind, bytes).is_some() {
            bytes
                .iter_mut()
                .for_each(|byte| *byte = byte.wrapping_add(37));
        }
    }
}

#[test]
fn names_and_ids_are_each_once() {
    for &kind in BlockType::ALL {
        assert_eq!(BlockType::from_id(kind.id()), Ok(kind));
        assert_eq!(
            BlockType::from_name(&kind.name().to_lowercase()),
            Some(kind)
        );
        assert_eq!(kind.size_of(3 * kind.elements()), Some(3 * kind.bytes()));
        let odd = kind.size_of(kind.elements() + 1);
        assert_eq!(odd.is_none(), kind.elements() > 1, "{kind}");
        assert_eq!(
            kind.size_of(usize::MAX / kind.elements() * kind.elements())
                .is_none(),
            kind.bytes() > kind.elements()
        );
    }
    assert!(
        BlockType::from_id(4)
            .unwrap_err()
            .to_string()
            .contains("Q4_2")
    );
    assert_eq!(BlockType::from_name("Q4_K_M"), None);
}

#[test]
fn blocks_are_put_together_as_they_were() {
    for kind in scaled() {
        let mut bytes = noise(u64::from(kind.id()), 64 * kind.bytes());
        with_scales(kind, &mut bytes);
        for block in bytes.chunks_exact(kind.bytes()) {
            let parts = codes(kind, block);
            let mut again = vec![0xa5; kind.bytes()];
            parts.encode(kind, &mut again);
            // Two types have several bytes for one meaning.
            let exact = !matches!(kind, BlockType::TQ1_0 | BlockType::NVFP4);
            assert!(!exact || again == block, "{kind}");
            assert_eq!(codes(kind, &again), parts, "{kind}");
            let bound = match kind {
                BlockType::NVFP4 => 1 << 18,
                _ => 1 << 7,
            };
            assert!(
                parts.scales.iter().all(|s| (-bound..bound).contains(s)),
                "{kind}"
            );
        }
    }
}

#[test]
fn values_are_those_of_the_parts() {
    let pool = Pool::new(3);
    for kind in scaled() {
        let blocks = 200;
        let mut bytes = noise(7 + u64::from(kind.id()), blocks * kind.bytes());
        with_scales(kind, &mut bytes);
        let mut values = vec![0.0; blocks * kind.elements()];
        dequantize(kind, &bytes, &mut values);
        let mut parallel = vec![0.0; values.len()];
        dequantize_all(&pool, kind, &bytes, &mut parallel);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&parallel), "{kind}");
        for (block, values) in bytes
            .chunks_exact(kind.bytes())
            .zip(values.chunks_exact(kind.elements()))
        {
            let parts: Codes = codes(kind, block);
            for (i, value) in values.iter().enumerate() {
                let j = i / parts.sub_len;
                let scale = parts.d * parts.scales[j] as f32;
                let min = parts.dmin * f32::from(parts.mins[j]);
                assert_eq!(
                    *value,
                    scale * parts.levels.of(parts.q[i]) - min,
                    "{kind} element {i}"
                );
                assert!(parts.has_min || min == 0.0);
            }
        }
    }
}

/// Root of the mean squared error of `values` in `kind`.
fn error(kind: BlockType, values: &[f32], importance: Option<&[f32]>) -> f64 {
    let mut bytes = vec![0; kind.size_of(values.len()).unwrap()];
    quantize(kind, values, importance, &mut bytes);
    let mut back = vec![0.0; values.len()];
    dequantize(kind, &bytes, &mut back);
    let square = |(i, (x, y)): (usize, (&f32, &f32))| {
        let weight = importance.map_or(1.0, |v| f64::from(v[i]));
        weight * f64::from(x - y).powi(2)
    };
    let sum: f64 = values.iter().zip(&back).enumerate().map(square).sum();
    (sum / values.len() as f64).sqrt()
}

#[test]
fn errors_are_bounded() {
    use BlockType::*;
    // llama.cpp's own input and bounds (tests/test-quantize-fns.cpp), which divide by the count once more.
    let count = 32 * 128;
    let wave: Vec<f32> = (0..count).map(|i| 0.1 + 2.0 * (i as f32).cos()).collect();
    for kind in BlockType::ALL
        .iter()
        .copied()
        .filter(|kind| kind.is_writable())
    {
        let bound = match kind {
            F32 | F64 => 0.0,
            TQ1_0 | TQ2_0 => 0.01,
            Q1_0 => 0.025,
            Q2_K | Q2_0 => 0.0075,
            Q3_K => 0.0040,
            MXFP4 | NVFP4 => 0.0030,
            _ => 0.002,
        };
        let found = error(kind, &wave, None) / (count as f64).sqrt();
        assert!(found <= bound, "{kind}: {found} beyond {bound}");
    }
}

/// About normal: the sum of bytes.
fn bell(seed: u64, count: usize) -> Vec<f32> {
    let bytes = noise(seed, 12 * count);
    let sum = |b: &[u8]| b.iter().map(|b| f32::from(*b) - 127.5).sum::<f32>() / 4000.0;
    bytes.chunks(12).map(sum).collect()
}

#[test]
fn more_bits_mean_less_error() {
    use BlockType::*;
    let values = bell(1, 64 * 256);
    let errors = [TQ2_0, Q1_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0, F16]
        .map(|kind| error(kind, &values, None));
    assert!(errors.is_sorted_by(|a, b| a > b), "{errors:?}");
    for (worse, better) in [
        (Q4_0, Q4_K),
        (Q4_0, IQ4_NL),
        (Q5_0, Q5_K),
        (Q4_0, Q4_1),
        (MXFP4, NVFP4),
    ] {
        let (worse_error, better_error) =
            (error(worse, &values, None), error(better, &values, None));
        assert!(
            better_error < worse_error,
            "{better} {better_error}, {worse} {worse_error}"
        );
    }
}

#[test]
fn importance_moves_the_error() {
    let values = bell(2, 16 * 256);
    let importance: Vec<f32> = (0..values.len())
        .map(|i| if i % 7 == 0 { 30.0 } else { 0.1 })
        .collect();
    for kind in scaled().filter(|kind| kind.is_writable()) {
        let mut bytes = vec![0; kind.size_of(values.len()).unwrap()];
        quantize(kind, &values, None, &mut bytes);
        let mut plain = vec![0.0; values.len()];
        dequantize(kind, &bytes, &mut plain);
        let square = |(i, (x, y)): (usize, (&f32, &f32))| {
            f64::from(importance[i]) * f64::from(x - y).powi(2)
        };
        let sum: f64 = values.iter().zip(&plain).enumerate().map(square).sum();
        let without = (sum / values.len() as f64).sqrt();
        let with = error(kind, &values, Some(&importance));
        use BlockType::*;
        let searched = !matches!(kind, Q8_0 | TQ1_0 | TQ2_0 | MXFP4 | Q1_0);
        assert!(
            if searched {
                with < without
            } else {
                with == without
            },
            "{kind}: {with}, without {without}"
        );
    }
}

#[test]
fn extremes_do_not_break_the_search() {
    let cases: [&dyn Fn(usize) -> f32; 9] = [
        &|_| 0.0,
        &|_| 1.0,
        &|_| -3.5,
        &|i| if i == 77 { 1.0 } else { 0.0 },
        &|i| (i as f32 - 128.0) * 1e-30,
        &|i| (i as f32 - 128.0) * 1e30,
        &|i| {
            if i % 2 == 0 {
                f32::INFINITY
            } else {
                f32::NEG_INFINITY
            }
        },
        &|_| f32::NAN,
        &|i| if i == 3 { f32::NAN } else { i as f32 },
    ];
    for kind in BlockType::ALL
        .iter()
        .copied()
        .filter(|kind| kind.is_writable())
    {
        for (case, value) in cases.iter().enumerate() {
            let values: Vec<f32> = (0..256).map(value).collect();
            for importance in [None, Some([0.0; 256]), Some([f32::INFINITY; 256])] {
                let mut bytes = vec![0; kind.size_of(256).unwrap()];
                quantize(
                    kind,
                    &values,
                    importance.as_ref().map(|v| &v[..]),
                    &mut bytes,
                );
                let mut back = vec![0.0; 256];
                dequantize(kind, &bytes, &mut back);
                if case < 3 && importance.is_none() {
                    let near = |(x, y): (&f32, &f32)| (x - y).abs() <= 0.25 * x.abs();
                    assert!(
                        values.iter().zip(&back).all(near),
                        "{kind} case {case}: {back:?}"
                    );
                }
                // What no f16 scale can hold is not passed off as zeros.
                let scaled = kind.scheme().is_some() && kind != BlockType::NVFP4;
                if case >= 5 && scaled {
                    assert_eq!(first_bad_block(kind, &bytes), Some(0), "{kind}");
                }
            }
        }
    }
}

#[test]
fn threads_and_levels_do_not_change_bytes() {
    let values = bell(3, 40 * 512);
    let importance: Vec<f32> = bell(4, 512).iter().map(|v| v.abs()).collect();
    for kind in BlockType::ALL
        .iter()
        .copied()
        .filter(|kind| kind.is_writable())
    {
        for importance in [None, Some(&importance[..])] {
            let run = |pool: Pool| {
                let mut bytes = vec![0; kind.size_of(values.len()).unwrap()];
                quantize_all(&pool, kind, &values, 512, importance, &mut bytes);
                bytes
            };
            let scalar = run(Pool::with_level(1, Level::Scalar));
            for &level in Level::supported() {
                for threads in [1, 2, 5] {
                    let found = run(Pool::with_level(threads, level));
                    assert!(found == scalar, "{kind} at {level} with {threads} threads");
                }
            }
        }
    }
}
