//! Block types: what is taken apart goes together again, and what is quantized stays near.

use windlass_kernels::blocks::{BlockType, Codes, codes, dequantize, dequantize_all};
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
        while windlass_kernels::blocks::first_bad_block(kind, bytes).is_some() {
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
