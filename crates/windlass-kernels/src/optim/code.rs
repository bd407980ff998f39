//! The dynamic 8-bit code of optimizer states: scalar functions and the tables that the vector forms share.
//!
//! A code's magnitude is a mantissa of which small exponents leave more bits: in decade `e` of 1..=7 (values up to
//! `10^(e-7)`) there are `2^e` codes without sign, `2^(e-1)` of each sign with one, evenly spaced over 0.1 to 1. With
//! `x = code + 1.5` without sign, `x = 2 |code - 127| + 1` with sign, `e` is the exponent of `x` and the value is
//! `10^(e-7) (0.9 x / 2^e - 0.8)`; `e = 0` is zero and `e = 8` is one. The largest code is one; minus one has none.
//!
//! # Source
//! Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.2; the order of codes is that of
//! bitsandbytes' `create_dynamic_map`. One thing is ours: a positive second moment never becomes zero, which would
//! leave the update without a denominator.

use super::state::BLOCK;

/// Which of the two maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// For first moments.
    Signed,
    /// For second moments.
    Unsigned,
}

/// Constants of a map.
pub(crate) struct Tables {
    /// By the decade `e`, filled up for vector lookups: `value = slope x + base`.
    pub slope: [f32; 16],
    pub base: [f32; 16],
    /// By the decade: the number of its first code, counted from the code of zero (1 without sign), which a magnitude's
    /// number is at least; `2 first - 1` it is at most. Between, it is the whole part of `first (steep magnitude + 8/9)`.
    pub first: [f32; 16],
    pub steep: [f32; 16],
    /// By the magnitude's power of two, plus 31: the decade of the smallest magnitude with it, and the magnitude from
    /// which on it is the next decade.
    pub decade: [f32; 32],
    pub next: [f32; 32],
}

const fn tables(signed: bool) -> Tables {
    let mut t = Tables {
        slope: [0.0; 16],
        base: [0.0; 16],
        first: [0.0; 16],
        steep: [0.0; 16],
        decade: [0.0; 32],
        next: [f32::INFINITY; 32],
    };
    // Codes of a decade: 2^e, or half as many of each sign.
    let share = if signed { 0.5 } else { 1.0 };
    // Where decades 1..=8 start. Whatever is positive and has no sign is in decade 1 at least.
    let mut from = [if signed { 0.275e-6 } else { f32::from_bits(1) }; 8];
    let (mut end, mut power) = (1e-6, 2.0);
    let mut e = 1;
    while e < 8 {
        let codes = power * share;
        t.slope[e] = (0.9 * end / power) as f32;
        t.base[e] = (-0.8 * end) as f32;
        t.first[e] = codes as f32;
        t.steep[e] = (1.0 / (0.9 * end)) as f32;
        // Half way from the decade's last value to the next decade's first, which has twice as many codes.
        let next = if e == 7 { 1.0 } else { 1.0 + 2.25 / codes };
        from[e] = (end * (next + 1.0 - 0.45 / codes) / 2.0) as f32;
        (end, power) = (end * 10.0, power * 2.0);
        e += 1;
    }
    t.base[8] = 1.0;
    t.first[8] = (256.0 * share) as f32;
    t.first[0] = if signed { 0.0 } else { 1.0 };
    let mut i = 0;
    while i < 32 {
        let low = if i == 0 {
            0.0
        } else {
            f32::from_bits((127 - 31 + i as u32) << 23)
        };
        let mut e = 0;
        while e < 8 && from[e] <= low {
            e += 1;
        }
        t.decade[i] = e as f32;
        if e < 8 {
            t.next[i] = from[e];
        }
        i += 1;
    }
    t
}

static SIGNED: Tables = tables(true);
static UNSIGNED: Tables = tables(false);

impl Code {
    /// The map of a rule's moment: the first has signs.
    pub fn of(index: usize) -> Code {
        if index == 0 {
            Code::Signed
        } else {
            Code::Unsigned
        }
    }

    pub fn tables(self) -> &'static Tables {
        match self {
            Code::Signed => &SIGNED,
            Code::Unsigned => &UNSIGNED,
        }
    }

    /// The value of a code, in -1..=1.
    pub fn decode(self, code: u8) -> f32 {
        let offset = code as f32 - 127.0;
        let x = match self {
            Code::Signed => 2.0 * offset.abs() + 1.0,
            Code::Unsigned => code as f32 + 1.5,
        };
        let e = (x.to_bits() >> 23) as usize - 127;
        let t = self.tables();
        let value = x.mul_add(t.slope[e], t.base[e]);
        if self == Code::Signed {
            value.copysign(offset)
        } else {
            value
        }
    }

    /// The code whose value is nearest.
    pub fn encode(self, value: f32) -> u8 {
        let (t, size) = (self.tables(), value.abs());
        let power = (size.to_bits() >> 23) as i32 - 127;
        let i = (power + 31).max(0) as usize;
        let e = t.decade[i] as usize + (size >= t.next[i]) as usize;
        let first = t.first[e];
        let number = size.mul_add(t.steep[e], 8.0 / 9.0).mul_add(first, -0.5);
        let number = number.round_ties_even().min(2.0 * first - 1.0).max(first);
        match self {
            Code::Signed => (127.0 + number.copysign(value)).max(0.0) as u8,
            Code::Unsigned => (number - 1.0) as u8,
        }
    }
}

/// The factor that brings the values of a block with this scale into -1..=1: 0 for scales that have no reciprocal.
#[inline(always)]
pub(crate) fn inverse(scale: f32) -> f32 {
    if scale >= f32::MIN_POSITIVE {
        1.0 / scale
    } else {
        0.0
    }
}

/// Writes the codes of one block and returns its scale; NaN where a value is not finite, so that none is hidden.
pub(crate) fn encode_block(code: Code, values: &[f32], codes: &mut [u8]) -> f32 {
    debug_assert!(values.len() == codes.len() && values.len() <= BLOCK);
    if values.iter().any(|v| !v.is_finite()) {
        codes.fill(0);
        return f32::NAN;
    }
    let scale = values.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
    let inverse = inverse(scale);
    for (c, v) in codes.iter_mut().zip(values) {
        *c = code.encode(v * inverse);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published map: decades of 0.1 to 1 cut evenly, centers, zero and one, sorted.
    fn published(signed: bool) -> Vec<f64> {
        let mut values = vec![0.0, 1.0];
        for i in 0..7 {
            let items = 1 << (i + !signed as usize);
            let decade = 10f64.powi(i as i32 - 6);
            for j in 0..items {
                let center = decade * (0.1 + 0.9 * (j as f64 + 0.5) / items as f64);
                values.push(center);
                if signed {
                    values.push(-center);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        values
    }

    #[test]
    fn codes_are_the_published_map_and_the_nearest() {
        for code in [Code::Signed, Code::Unsigned] {
            let map = published(code == Code::Signed);
            assert_eq!(map.len(), 256);
            for (c, &value) in map.iter().enumerate() {
                let got = code.decode(c as u8) as f64;
                let close = (got - value).abs() <= 2e-6 * value.abs();
                assert!(close, "{code:?} {c}: {got:e}, published {value:e}");
                assert_eq!(code.encode(value as f32), c as u8, "{code:?} {value:e}");
            }
            for i in 0..200_000 {
                let size = 10f64.powf(-(i as f64) / 25_000.0);
                for value in [size, -size] {
                    if value < 0.0 && code == Code::Unsigned {
                        continue;
                    }
                    let got = map[code.encode(value as f32) as usize];
                    let best = map.iter().map(|m| (m - value).abs()).fold(2.0, f64::min);
                    let kept = code == Code::Unsigned && value < map[1] && got == map[1];
                    let near = (got - value).abs() <= best * (1.0 + 1e-4) + 1e-7 * size;
                    assert!(kept || near, "{code:?} of {value:e} is {got:e}");
                }
            }
            assert_eq!(code.decode(code.encode(0.0)), 0.0);
            assert!(code == Code::Signed || code.encode(1e-45) == 1);
        }
    }
}
