//! A block taken apart: codes, scales and minimums as they are stored, in one form for all types.

use half::f16;

use super::BlockType;

/// Elements of the longest block.
pub const MAX_ELEMENTS: usize = 256;

/// What a code stands for before it is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// The code itself, less this: even steps.
    Less(u8),
    /// The code's place in a table.
    Table(&'static [i8; 16]),
}

impl Levels {
    /// The level of a code.
    pub fn of(self, code: u8) -> f32 {
        match self {
            Levels::Less(zero) => f32::from(i16::from(code) - i16::from(zero)),
            Levels::Table(table) => f32::from(table[usize::from(code & 15)]),
        }
    }
}

/// The uneven levels of `IQ4_NL` and `IQ4_XS`.
pub const UNEVEN: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];
/// The levels of a 4-bit float with two bits of exponent and one of mantissa, doubled.
pub const FLOAT4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
/// The levels of a sign bit.
pub const SIGN: [i8; 16] = [-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// One block of any scaled type: element `i`, of sub-block `j = i / sub_len`, is
///
/// ```text
/// d * scales[j] * levels.of(q[i]) - dmin * mins[j]
/// ```
///
/// in `f32`, from left to right; `d * scales[j]` and `dmin * mins[j]` are exact. The fields are what the file stores;
/// only `Q4_1` and `Q5_1`, whose minimum has a sign of its own, have it negated in `dmin`.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// Elements of the block.
    pub len: usize,
    /// Elements that share a scale and a minimum.
    pub sub_len: usize,
    /// What codes stand for.
    pub levels: Levels,
    /// Whether the type has minimums.
    pub has_min: bool,
    /// The block's scale: an `f16` widened, but in `MXFP4` (a power of two) and `NVFP4` (always 2^-10).
    pub d: f32,
    /// The block's scale of minimums, an `f16` widened; 0 in types without.
    pub dmin: f32,
    /// The sub-blocks' scales: 1 in types without. They fit `i8`, but in `NVFP4`.
    pub scales: [i32; 16],
    /// The sub-blocks' minimums: 0 in types without.
    pub mins: [u8; 16],
    /// The codes; the first `len` count.
    pub q: [u8; MAX_ELEMENTS],
}

impl BlockType {
    /// How its blocks are taken apart: elements of a sub-block, levels, whether there are minimums. `None` for plain
    /// numbers and codebooks.
    pub const fn scheme(self) -> Option<(usize, Levels, bool)> {
        use BlockType::*;
        Some(match self {
            Q4_0 => (32, Levels::Less(8), false),
            Q4_1 => (32, Levels::Less(0), true),
            Q5_0 => (32, Levels::Less(16), false),
            Q5_1 => (32, Levels::Less(0), true),
            Q8_0 => (32, Levels::Less(128), false),
            Q2_K => (16, Levels::Less(0), true),
            Q3_K => (16, Levels::Less(4), false),
            Q4_K | Q5_K => (32, Levels::Less(0), true),
            Q6_K => (16, Levels::Less(32), false),
            IQ4_NL | IQ4_XS => (32, Levels::Table(&UNEVEN), false),
            MXFP4 => (32, Levels::Table(&FLOAT4), false),
            NVFP4 => (16, Levels::Table(&FLOAT4), false),
            TQ1_0 | TQ2_0 => (256, Levels::Less(1), false),
            Q1_0 => (128, Levels::Table(&SIGN), false),
            Q2_0 => (64, Levels::Less(1), false),
            _ => return None,
        })
    }
}

/// Takes a block apart.
///
/// # Panics
/// For plain numbers and codebooks, and if `block` is not one block.
#[track_caller]
pub fn codes(block_type: BlockType, block: &[u8]) -> Codes {
    let mut codes = Codes::new(block_type);
    codes.decode(block_type, block);
    codes
}

impl Codes {
    /// A block of zeros.
    ///
    /// # Panics
    /// For plain numbers and codebooks.
    #[track_caller]
    pub fn new(block_type: BlockType) -> Self {
        let Some((sub_len, levels, has_min)) = block_type.scheme() else {
            panic!("{block_type} has no codes with scales");
        };
        Codes {
            len: block_type.elements(),
            sub_len,
            levels,
            has_min,
            d: 0.0,
            dmin: 0.0,
            scales: [1; 16],
            mins: [0; 16],
            q: [0; MAX_ELEMENTS],
        }
    }

    /// The elements' values, in `f32`.
    ///
    /// # Panics
    /// If `out` has not the block's length.
    #[track_caller]
    pub fn values(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.len, "values and elements of the block");
        let parts = out
            .chunks_mut(self.sub_len)
            .zip(self.q.chunks(self.sub_len));
        for (j, (out, q)) in parts.enumerate() {
            let scale = self.d * self.scales[j] as f32;
            let min = self.dmin * f32::from(self.mins[j]);
            match self.levels {
                Levels::Less(zero) => {
                    let zero = i16::from(zero);
                    for (out, &q) in out.iter_mut().zip(q) {
                        *out = scale * f32::from(i16::from(q) - zero) - min;
                    }
                }
                Levels::Table(table) => {
                    for (out, &q) in out.iter_mut().zip(q) {
                        *out = scale * f32::from(table[usize::from(q & 15)]) - min;
                    }
                }
            }
        }
    }

    /// Replaces the block by that of `bytes`; for many blocks of one type.
    ///
    /// # Panics
    /// If `bytes` is not one block, or of another type than the value was made for.
    #[track_caller]
    pub fn decode(&mut self, block_type: BlockType, bytes: &[u8]) {
        use BlockType::*;
        assert_eq!(bytes.len(), block_type.bytes(), "bytes of a {block_type}");
        assert_eq!(
            self.len,
            block_type.elements(),
            "elements of a {block_type}"
        );
        match block_type {
            Q4_0 | IQ4_NL => {
                self.d = half(bytes, 0);
                nibbles(&bytes[2..], &mut self.q);
            }
            Q4_1 => {
                self.affine(bytes);
                nibbles(&bytes[4..], &mut self.q);
            }
            Q5_0 => {
                self.d = half(bytes, 0);
                nibbles(&bytes[6..], &mut self.q);
                fifth_bits(&bytes[2..6], &mut self.q);
            }
            Q5_1 => {
                self.affine(bytes);
                nibbles(&bytes[8..], &mut self.q);
                fifth_bits(&bytes[4..8], &mut self.q);
            }
            Q8_0 => {
                self.d = half(bytes, 0);
                for (q, &byte) in self.q.iter_mut().zip(&bytes[2..]) {
                    *q = byte ^ 0x80;
                }
            }
            Q2_K => self.q2_k(bytes),
            Q3_K => self.q3_k(bytes),
            Q4_K | Q5_K => self.q45_k(bytes),
            Q6_K => self.q6_k(bytes),
            IQ4_XS => self.iq4_xs(bytes),
            MXFP4 => {
                self.d = power_of_two(bytes[0]);
                nibbles(&bytes[1..], &mut self.q);
            }
            NVFP4 => self.nvfp4(bytes),
            TQ1_0 => self.tq1_0(bytes),
            TQ2_0 => {
                self.d = half(bytes, 64);
                crumbs(&bytes[..64], &mut self.q);
            }
            Q1_0 => {
                self.d = half(bytes, 0);
                for (i, q) in self.q[..128].iter_mut().enumerate() {
                    *q = bytes[2 + i / 8] >> (i % 8) & 1;
                }
            }
            Q2_0 => {
                self.d = half(bytes, 0);
                for (i, q) in self.q[..64].iter_mut().enumerate() {
                    *q = bytes[2 + i / 4] >> (2 * (i % 4)) & 3;
                }
            }
            _ => unreachable!("{block_type} has no codes"),
        }
    }

    /// Scale and minimum of a whole block.
    fn affine(&mut self, bytes: &[u8]) {
        (self.d, self.dmin) = (half(bytes, 0), -half(bytes, 2));
        self.mins[0] = 1;
    }

    fn q2_k(&mut self, bytes: &[u8]) {
        (self.d, self.dmin) = (half(bytes, 80), half(bytes, 82));
        for (j, &pair) in bytes[..16].iter().enumerate() {
            (self.scales[j], self.mins[j]) = (i32::from(pair & 15), pair >> 4);
        }
        crumbs(&bytes[16..80], &mut self.q);
    }

    fn q3_k(&mut self, bytes: &[u8]) {
        self.d = half(bytes, 108);
        let s = &bytes[96..108];
        for (j, scale) in self.scales.iter_mut().enumerate() {
            let low = s[j % 8] >> (4 * (j / 8)) & 15;
            let high = s[8 + j % 4] >> (2 * (j / 4)) & 3;
            *scale = i32::from(low | high << 4) - 32;
        }
        crumbs(&bytes[32..96], &mut self.q);
        for (b, q) in self.q.chunks_exact_mut(32).enumerate() {
            for (q, &mask) in q.iter_mut().zip(&bytes[..32]) {
                *q |= (mask >> b & 1) << 2;
            }
        }
    }

    fn q45_k(&mut self, bytes: &[u8]) {
        (self.d, self.dmin) = (half(bytes, 0), half(bytes, 2));
        let s = &bytes[4..16];
        for j in 0..8 {
            let (scale, min) = match j {
                0..4 => (s[j] & 63, s[j + 4] & 63),
                _ => (
                    s[j + 4] & 15 | s[j - 4] >> 6 << 4,
                    s[j + 4] >> 4 | s[j] >> 6 << 4,
                ),
            };
            (self.scales[j], self.mins[j]) = (i32::from(scale), min);
        }
        let low = &bytes[bytes.len() - 128..];
        let pairs = low.chunks_exact(32).zip(self.q.chunks_exact_mut(64));
        for (bytes, q) in pairs {
            nibbles(bytes, q);
        }
        if bytes.len() == BlockType::Q5_K.bytes() {
            for (b, q) in self.q.chunks_exact_mut(32).enumerate() {
                for (q, &high) in q.iter_mut().zip(&bytes[16..48]) {
                    *q |= (high >> b & 1) << 4;
                }
            }
        }
    }

    fn q6_k(&mut self, bytes: &[u8]) {
        self.d = half(bytes, 208);
        for (scale, &byte) in self.scales.iter_mut().zip(&bytes[192..208]) {
            *scale = i32::from(byte as i8);
        }
        for (part, q) in self.q.chunks_exact_mut(32).enumerate() {
            let (n, r) = (part / 4, part % 4);
            let low = &bytes[64 * n + 32 * (r % 2)..];
            let high = &bytes[128 + 32 * n..];
            for ((q, &low), &high) in q.iter_mut().zip(low).zip(high) {
                *q = low >> (4 * (r / 2)) & 15 | (high >> (2 * r) & 3) << 4;
            }
        }
    }

    fn iq4_xs(&mut self, bytes: &[u8]) {
        self.d = half(bytes, 0);
        let high = u16::from_le_bytes([bytes[2], bytes[3]]);
        for j in 0..8 {
            let low = i32::from(bytes[4 + j / 2] >> (4 * (j % 2)) & 15);
            self.scales[j] = (low | i32::from(high >> (2 * j) & 3) << 4) - 32;
        }
        let parts = bytes[8..].chunks_exact(16);
        for (bytes, q) in parts.zip(self.q.chunks_exact_mut(32)) {
            nibbles(bytes, q);
        }
    }

    fn nvfp4(&mut self, bytes: &[u8]) {
        self.d = 1.0 / 1024.0;
        for (scale, &byte) in self.scales.iter_mut().zip(&bytes[..4]) {
            *scale = small_float(byte);
        }
        let parts = bytes[4..].chunks_exact(8);
        for (bytes, q) in parts.zip(self.q.chunks_exact_mut(16)) {
            nibbles(bytes, q);
        }
    }

    fn tq1_0(&mut self, bytes: &[u8]) {
        self.d = half(bytes, 52);
        let mut q = &mut self.q[..];
        for (bytes, digits) in [(&bytes[..32], 5), (&bytes[32..48], 5), (&bytes[48..52], 4)] {
            let (part, rest) = q.split_at_mut(bytes.len() * digits);
            for (n, q) in part.chunks_exact_mut(bytes.len()).enumerate() {
                let shift = 3u8.pow(n as u32);
                for (q, &byte) in q.iter_mut().zip(bytes) {
                    // The byte is a fraction of 243ths in 256ths: its next digit is the whole part of its triple.
                    *q = ((u16::from(byte.wrapping_mul(shift)) * 3) >> 8) as u8;
                }
            }
            q = rest;
        }
    }
}

/// The `f16` at a byte offset, widened.
fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Codes of 4 bits: the low halves of all bytes, then the high ones.
fn nibbles(bytes: &[u8], q: &mut [u8]) {
    let (low, high) = q.split_at_mut(bytes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The fifth bits of 32 codes, a bit each.
fn fifth_bits(bits: &[u8], q: &mut [u8]) {
    for (i, q) in q[..32].iter_mut().enumerate() {
        *q |= (bits[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// Codes of 2 bits: of each 32 bytes the lowest two bits, then the next.
fn crumbs(bytes: &[u8], q: &mut [u8; MAX_ELEMENTS]) {
    for (part, q) in q.chunks_exact_mut(32).enumerate() {
        let bytes = &bytes[32 * (part / 4)..];
        for (q, &byte) in q.iter_mut().zip(bytes) {
            *q = byte >> (2 * (part % 4)) & 3;
        }
    }
}

/// `2^(e - 128)`: half the scale that the exponent `e` means, since [`FLOAT4`] is doubled.
pub(super) fn power_of_two(e: u8) -> f32 {
    match e {
        0 | 1 => f32::from_bits(0x0020_0000 << e),
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

/// An 8-bit float without sign (4 bits of exponent, 3 of mantissa), halved since [`FLOAT4`] is doubled, in 1024ths.
pub(super) fn small_float(byte: u8) -> i32 {
    if byte == 0x7f {
        return 0;
    }
    let (exponent, mantissa) = (byte >> 3 & 15, i32::from(byte & 7));
    match exponent {
        0 => mantissa,
        _ => (8 + mantissa) << (exponent - 1),
    }
}
