//! Codes of few bits as bytes: a plane of low bits, and one of high bits.

#![cfg(target_arch = "x86_64")]

use super::lanes::Lanes;

/// The codes of a step, four columns in each vector.
pub(super) trait Unpack {
    /// Bytes of a step of a panel.
    const BYTES: usize;
    /// Bits of a code as it is unpacked.
    const BITS: usize;
    /// Whether codes may be 128 or more.
    const WIDE: bool = Self::BITS == 8;
    /// # Safety
    /// `at` is the step's first byte, moved on to the lanes.
    unsafe fn unpack<L: Lanes>(at: *const u8, table: L::I) -> [L::I; 8];
}

/// `LOW` and `HIGH` bits.
pub(super) struct Planes<const LOW: usize, const HIGH: usize>;
/// 4 bits that name an entry of a table.
pub(super) struct Names;

impl<const LOW: usize, const HIGH: usize> Unpack for Planes<LOW, HIGH> {
    const BYTES: usize = (LOW + HIGH) * 64;
    const BITS: usize = LOW + HIGH;

    #[inline(always)]
    unsafe fn unpack<L: Lanes>(at: *const u8, _: L::I) -> [L::I; 8] {
        // SAFETY: within the step.
        unsafe {
            let low = low_plane::<L, LOW>(at);
            let at = at.add(LOW * 64);
            match HIGH {
                0 => low,
                1 => high_bits::<L, LOW>(low, at),
                _ => high_pairs::<L>(low, at),
            }
        }
    }
}

impl Unpack for Names {
    const BYTES: usize = 256;
    const BITS: usize = 8;

    #[inline(always)]
    unsafe fn unpack<L: Lanes>(at: *const u8, table: L::I) -> [L::I; 8] {
        // SAFETY: within the step.
        unsafe { low_plane::<L, 4>(at).map(|codes| L::lookup(table, codes)) }
    }
}

#[inline(always)]
unsafe fn low_plane<L: Lanes, const LOW: usize>(at: *const u8) -> [L::I; 8] {
    // SAFETY: the plane has LOW rows of 64 bytes.
    unsafe {
        match LOW {
            2 => {
                let (a, b) = (L::bytes(at), L::bytes(at.add(64)));
                [
                    L::right::<0>(a, 3),
                    L::right::<0>(b, 3),
                    L::right::<2>(a, 3),
                    L::right::<2>(b, 3),
                    L::right::<4>(a, 3),
                    L::right::<4>(b, 3),
                    L::right::<6>(a, 3),
                    L::right::<6>(b, 3),
                ]
            }
            4 => {
                let v = [
                    L::bytes(at),
                    L::bytes(at.add(64)),
                    L::bytes(at.add(128)),
                    L::bytes(at.add(192)),
                ];
                [
                    L::right::<0>(v[0], 15),
                    L::right::<0>(v[1], 15),
                    L::right::<0>(v[2], 15),
                    L::right::<0>(v[3], 15),
                    L::right::<4>(v[0], 15),
                    L::right::<4>(v[1], 15),
                    L::right::<4>(v[2], 15),
                    L::right::<4>(v[3], 15),
                ]
            }
            _ => [
                L::bytes(at),
                L::bytes(at.add(64)),
                L::bytes(at.add(128)),
                L::bytes(at.add(192)),
                L::bytes(at.add(256)),
                L::bytes(at.add(320)),
                L::bytes(at.add(384)),
                L::bytes(at.add(448)),
            ],
        }
    }
}

/// Adds bit `LOW`: one row of 64 bytes, bit `j` for vector `j`.
#[inline(always)]
unsafe fn high_bits<L: Lanes, const LOW: usize>(low: [L::I; 8], at: *const u8) -> [L::I; 8] {
    // SAFETY: the plane has one row.
    unsafe {
        let v = L::bytes(at);
        let bit = 1 << LOW;
        let high = match LOW {
            2 => [
                L::left::<2>(v, bit),
                L::left::<1>(v, bit),
                L::right::<0>(v, bit),
                L::right::<1>(v, bit),
                L::right::<2>(v, bit),
                L::right::<3>(v, bit),
                L::right::<4>(v, bit),
                L::right::<5>(v, bit),
            ],
            _ => [
                L::left::<4>(v, bit),
                L::left::<3>(v, bit),
                L::left::<2>(v, bit),
                L::left::<1>(v, bit),
                L::right::<0>(v, bit),
                L::right::<1>(v, bit),
                L::right::<2>(v, bit),
                L::right::<3>(v, bit),
            ],
        };
        merge::<L>(low, high)
    }
}

/// Adds bits 4 and 5: two rows, vectors `2 i` and `2 i + 1` in bits `2 i`.
#[inline(always)]
unsafe fn high_pairs<L: Lanes>(low: [L::I; 8], at: *const u8) -> [L::I; 8] {
    // SAFETY: the plane has two rows.
    unsafe {
        let (a, b) = (L::bytes(at), L::bytes(at.add(64)));
        let high = [
            L::left::<4>(a, 0x30),
            L::left::<4>(b, 0x30),
            L::left::<2>(a, 0x30),
            L::left::<2>(b, 0x30),
            L::right::<0>(a, 0x30),
            L::right::<0>(b, 0x30),
            L::right::<2>(a, 0x30),
            L::right::<2>(b, 0x30),
        ];
        merge::<L>(low, high)
    }
}

#[inline(always)]
unsafe fn merge<L: Lanes>(low: [L::I; 8], high: [L::I; 8]) -> [L::I; 8] {
    // SAFETY: whoever holds vectors has the features.
    unsafe {
        [
            L::or(low[0], high[0]),
            L::or(low[1], high[1]),
            L::or(low[2], high[2]),
            L::or(low[3], high[3]),
            L::or(low[4], high[4]),
            L::or(low[5], high[5]),
            L::or(low[6], high[6]),
            L::or(low[7], high[7]),
        ]
    }
}
