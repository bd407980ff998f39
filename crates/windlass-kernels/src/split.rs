//! An exact `f32` in two halves: the `bf16` that the model computes with, and a 16-bit remainder.
//!
//! A bf16 parameter needs an f32 master copy to learn from small steps. Kept this way the master costs two bytes beside
//! the two of the parameter, and the parameter never has to be written twice.

use half::bf16;

/// Splits the bits of `master` so that [`join`] gives them back; exact for every bit pattern.
///
/// `hi` is `master` rounded to the nearest `bf16`, halves away from zero; `lo = bits(master) - (bits(hi) << 16)`.
/// A finite `master` beyond the largest `bf16` has an infinite `hi`, and still joins exactly.
#[inline(always)]
pub fn split(master: f32) -> (bf16, i16) {
    let bits = master.to_bits();
    (
        bf16::from_bits((bits.wrapping_add(0x8000) >> 16) as u16),
        bits as i16,
    )
}

/// The number that [`split`] took apart.
#[inline(always)]
pub fn join(hi: bf16, lo: i16) -> f32 {
    f32::from_bits(((hi.to_bits() as u32) << 16).wrapping_add(lo as i32 as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Element;
    use proptest::prelude::*;

    fn check(master: f32) {
        let (hi, lo) = split(master);
        assert_eq!(
            join(hi, lo).to_bits(),
            master.to_bits(),
            "{master:e} = {hi} and {lo}"
        );
        if master.is_finite() && hi.is_finite() {
            let nearest = (bf16::store(master).load() as f64 - master as f64).abs();
            assert_eq!(
                (hi.load() as f64 - master as f64).abs(),
                nearest,
                "{hi} is not the nearest to {master:e}"
            );
        }
    }

    #[test]
    fn halves_of_edge_cases_join_exactly() {
        for high in 0..=u16::MAX as u32 {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let master = f32::from_bits((high << 16) | low);
                let (hi, lo) = split(master);
                assert_eq!(join(hi, lo).to_bits(), master.to_bits());
                if !master.is_nan() {
                    check(master);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn halves_join_exactly(bits in any::<u32>()) {
            check(f32::from_bits(bits));
        }
    }
}
