//! Blocks put together: the inverse of taking them apart.

use half::f16;

use super::BlockType;
use super::codes::{Codes, small_float};

impl Codes {
    /// Writes the block. `d` and `dmin` must be what their type can store; see [`Codes::decode`], which undoes this.
    ///
    /// # Panics
    /// If `out` is not one block, or of another type than the value was made for.
    #[track_caller]
    pub fn encode(&self, block_type: BlockType, out: &mut [u8]) {
        use BlockType::*;
        assert_eq!(out.len(), block_type.bytes(), "bytes of a {block_type}");
        assert_eq!(
            self.len,
            block_type.elements(),
            "elements of a {block_type}"
        );
        match block_type {
            Q4_0 | IQ4_NL => {
                put_half(out, 0, self.d);
                put_nibbles(&mut out[2..], &self.q);
            }
            Q4_1 => {
                put_half(out, 0, self.d);
                put_half(out, 2, -self.dmin);
                put_nibbles(&mut out[4..], &self.q);
            }
            Q5_0 => {
                put_half(out, 0, self.d);
                put_fifth_bits(&mut out[2..6], &self.q);
                put_nibbles(&mut out[6..], &self.q);
            }
            Q5_1 => {
                put_half(out, 0, self.d);
                put_half(out, 2, -self.dmin);
                put_fifth_bits(&mut out[4..8], &self.q);
                put_nibbles(&mut out[8..], &self.q);
            }
            Q8_0 => {
                put_half(out, 0, self.d);
                for (byte, q) in out[2..].iter_mut().zip(&self.q) {
                    *byte = q ^ 0x80;
                }
            }
            Q2_K => self.put_q2_k(out),
            Q3_K => self.put_q3_k(out),
            Q4_K | Q5_K => self.put_q45_k(out),
            Q6_K => self.put_q6_k(out),
            IQ4_XS => self.put_iq4_xs(out),
            MXFP4 => {
                out[0] = exponent(self.d);
                put_nibbles(&mut out[1..], &self.q);
            }
            NVFP4 => {
                for (byte, &scale) in out[..4].iter_mut().zip(&self.scales) {
                    *byte = to_small_float(scale);
                }
                let parts = out[4..].chunks_exact_mut(8);
                parts
                    .zip(self.q.chunks_exact(16))
                    .for_each(|(out, q)| put_nibbles(out, q));
            }
            TQ1_0 => self.put_tq1_0(out),
            TQ2_0 => {
                put_half(out, 64, self.d);
                put_crumbs(&mut out[..64], &self.q);
            }
            Q1_0 => {
                put_half(out, 0, self.d);
                put_dense(&mut out[2..], &self.q, 1);
            }
            Q2_0 => {
                put_half(out, 0, self.d);
                put_dense(&mut out[2..], &self.q, 2);
            }
            _ => unreachable!("{block_type} has no codes"),
        }
    }

    fn put_q2_k(&self, out: &mut [u8]) {
        put_half(out, 80, self.d);
        put_half(out, 82, self.dmin);
        for (j, pair) in out[..16].iter_mut().enumerate() {
            *pair = self.scales[j] as u8 | self.mins[j] << 4;
        }
        put_crumbs(&mut out[16..80], &self.q);
    }

    fn put_q3_k(&self, out: &mut [u8]) {
        out.fill(0);
        put_half(out, 108, self.d);
        for (j, &scale) in self.scales.iter().enumerate() {
            let scale = (scale + 32) as u8;
            out[96 + j % 8] |= (scale & 15) << (4 * (j / 8));
            out[104 + j % 4] |= (scale >> 4) << (2 * (j / 4));
        }
        put_crumbs(&mut out[32..96], &self.q);
        for (b, q) in self.q.chunks_exact(32).enumerate() {
            for (mask, &q) in out[..32].iter_mut().zip(q) {
                *mask |= (q >> 2) << b;
            }
        }
    }

    fn put_q45_k(&self, out: &mut [u8]) {
        out.fill(0);
        put_half(out, 0, self.d);
        put_half(out, 2, self.dmin);
        let s = &mut out[4..16];
        for j in 0..8 {
            let (scale, min) = (self.scales[j] as u8, self.mins[j]);
            match j {
                0..4 => {
                    s[j] |= scale;
                    s[j + 4] |= min;
                }
                _ => {
                    s[j + 4] = scale & 15 | min << 4;
                    s[j - 4] |= scale >> 4 << 6;
                    s[j] |= min >> 4 << 6;
                }
            }
        }
        if out.len() == BlockType::Q5_K.bytes() {
            for (b, q) in self.q.chunks_exact(32).enumerate() {
                for (high, &q) in out[16..48].iter_mut().zip(q) {
                    *high |= (q >> 4) << b;
                }
            }
        }
        let start = out.len() - 128;
        let parts = out[start..].chunks_exact_mut(32);
        parts
            .zip(self.q.chunks_exact(64))
            .for_each(|(out, q)| put_nibbles(out, q));
    }

    fn put_q6_k(&self, out: &mut [u8]) {
        out.fill(0);
        put_half(out, 208, self.d);
        for (byte, &scale) in out[192..208].iter_mut().zip(&self.scales) {
            *byte = scale as i8 as u8;
        }
        for (part, q) in self.q.chunks_exact(32).enumerate() {
            let (n, r) = (part / 4, part % 4);
            for (l, &q) in q.iter().enumerate() {
                out[64 * n + 32 * (r % 2) + l] |= (q & 15) << (4 * (r / 2));
                out[128 + 32 * n + l] |= (q >> 4) << (2 * r);
            }
        }
    }

    fn put_iq4_xs(&self, out: &mut [u8]) {
        out.fill(0);
        put_half(out, 0, self.d);
        let mut high = 0u16;
        for j in 0..8 {
            let scale = (self.scales[j] + 32) as u8;
            out[4 + j / 2] |= (scale & 15) << (4 * (j % 2));
            high |= u16::from(scale >> 4) << (2 * j);
        }
        out[2..4].copy_from_slice(&high.to_le_bytes());
        let parts = out[8..].chunks_exact_mut(16);
        parts
            .zip(self.q.chunks_exact(32))
            .for_each(|(out, q)| put_nibbles(out, q));
    }

    fn put_tq1_0(&self, out: &mut [u8]) {
        put_half(out, 52, self.d);
        let mut q = &self.q[..];
        for (range, digits) in [(0..32, 5), (32..48, 5), (48..52, 4)] {
            let width = range.len();
            let (part, rest) = q.split_at(width * digits);
            for (l, byte) in out[range].iter_mut().enumerate() {
                let number = (0..5).fold(0u16, |number, n| {
                    let digit = if n < digits { part[n * width + l] } else { 0 };
                    number * 3 + u16::from(digit)
                });
                // Rounded up, so that multiplying by three yields the digits from the top.
                *byte = (number * 256).div_ceil(243) as u8;
            }
            q = rest;
        }
    }
}

fn put_half(out: &mut [u8], at: usize, value: f32) {
    out[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

fn put_nibbles(out: &mut [u8], q: &[u8]) {
    let width = out.len();
    for (l, byte) in out.iter_mut().enumerate() {
        *byte = q[l] & 15 | q[width + l] << 4;
    }
}

fn put_fifth_bits(out: &mut [u8], q: &[u8]) {
    for (byte, q) in out.iter_mut().zip(q.chunks_exact(8)) {
        *byte = (0..8).fold(0, |bits, i| bits | (q[i] >> 4) << i);
    }
}

fn put_crumbs(out: &mut [u8], q: &[u8]) {
    for (out, q) in out.chunks_exact_mut(32).zip(q.chunks_exact(128)) {
        for (l, byte) in out.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |bits, part| bits | (q[32 * part + l] & 3) << (2 * part));
        }
    }
}

/// Codes of `bits` bits in order, the lowest bits first.
fn put_dense(out: &mut [u8], q: &[u8], bits: usize) {
    for (byte, q) in out.iter_mut().zip(q.chunks_exact(8 / bits)) {
        let put = |byte, (i, q): (usize, &u8)| byte | q << (bits * i);
        *byte = q.iter().enumerate().fold(0, put);
    }
}

/// The exponent whose halved power of two is `d`.
fn exponent(d: f32) -> u8 {
    match d.to_bits() {
        0x0020_0000 => 0,
        0x0040_0000 => 1,
        bits => (bits >> 23) as u8 + 1,
    }
}

/// The byte of a scale of `NVFP4`: the nearest, with zero bits where the value is exact.
pub(super) fn to_small_float(scale: i32) -> u8 {
    let distance = |byte: &u8| small_float(*byte).abs_diff(scale);
    (0..=0xff).min_by_key(distance).unwrap_or(0)
}
