//! AMX: matrix products of `bf16` on eight tile registers of 16 rows by 64 bytes.
//!
//! The intrinsics are unstable, `asm!` is not: one block holds a whole K loop, because the compiler keeps no tile from
//! one block to the next. Four tiles hold a 32 x 32 block of sums, two hold A (16 rows of 32 `bf16` each), two hold B
//! (16 pairs of 16 columns). Sums pass through a contiguous 4 KiB block: storing tiles to a C with a power-of-two
//! stride would hit one set of the L1 cache.
//!
//! Hardware rounds every addition to nearest even and takes denormals as zero.

use std::arch::asm;

use super::kernel::Source;
use super::lanes::{Lanes, Pairs16};
use super::micro::{self, PAIRS};
use crate::tiles::Config;
pub(super) use crate::tiles::leave;

/// Words of a tile row.
const ROW: usize = 16;

/// Whole tiles: every sum is over 32 steps.
static WHOLE: Config = Config::new([(16, 64); 8]);

/// Configures this thread's tiles.
///
/// # Safety
/// AMX can be used (see [`crate::dispatch::Level::Amx`]).
pub(super) unsafe fn enter() {
    // SAFETY: the caller's promise.
    unsafe { WHOLE.enter() }
}

/// Packs rows for tiles: for every 32 steps, `pitch` rows of 32 `bf16`; what is missing is zero.
///
/// # Safety
/// As [`super::kernel::Kernel::pack_a`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_a(src: Source, lanes: usize, depth: usize, dst: *mut f32, pitch: usize) {
    for (block, k) in (0..depth).step_by(2 * ROW).enumerate() {
        let left = (depth - k).min(2 * ROW);
        for first in (0..pitch).step_by(ROW) {
            let count = lanes.saturating_sub(first).min(ROW);
            // SAFETY: lanes `first..first + count` and steps `k..k + left` are in range; `dst` has whole tiles.
            unsafe {
                let src = src.skip_lanes(first).skip_k(k);
                let mut rows = [Pairs16::zero(); 16];
                if src.k_contiguous {
                    for (lane, row) in rows.iter_mut().take(count).enumerate() {
                        *row = Pairs16::load_pairs(src.at(lane, 0).cast(), left);
                    }
                } else {
                    for (pair, row) in rows.iter_mut().take(left.div_ceil(2)).enumerate() {
                        let low = Pairs16::load_widened(src.at(0, 2 * pair).cast(), count);
                        let high = if 2 * pair + 1 < left {
                            Pairs16::load_widened(src.at(0, 2 * pair + 1).cast(), count)
                        } else {
                            Pairs16::zero()
                        };
                        *row = Pairs16::pair(low, high);
                    }
                    Pairs16::transpose(&mut rows);
                }
                let tile = dst.add((block * pitch + first) * ROW);
                for (lane, row) in rows.iter().enumerate() {
                    Pairs16::store(tile.add(lane * ROW), *row);
                }
            }
        }
    }
}

/// Packs columns for tiles: `pitch` pairs of `bf16` for every two steps, padded with zeros to whole tiles.
///
/// # Safety
/// As [`super::kernel::Kernel::pack_b`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pack_b(src: Source, lanes: usize, depth: usize, dst: *mut f32, pitch: usize) {
    // SAFETY: as the caller promised; the padding belongs to the sliver.
    unsafe {
        micro::pack::<Pairs16, PAIRS>(src, lanes, depth, dst, pitch);
        let (used, padded) = (depth.div_ceil(2), depth.next_multiple_of(2 * ROW) / 2);
        dst.add(used * pitch)
            .write_bytes(0, (padded - used) * pitch);
    }
}

/// `sums[32, 32] (+)= A B`, or the upper 16 rows of it, over `words / 16` tile products, as one chain.
///
/// # Safety
/// Between [`enter`] and [`leave`]; the slivers hold `words`, `sums` 32 rows.
pub(super) unsafe fn multiply(
    rows: usize,
    words: usize,
    a: *const f32,
    b: *const f32,
    sums: *mut f32,
    first: bool,
    ahead: *const f32,
) {
    // SAFETY: as the caller promised.
    unsafe {
        match rows {
            16 => multiply16(words / ROW, a, b, sums, first),
            32 => multiply32(words / ROW, a, b, sums, first, ahead),
            _ => unreachable!("a sliver of {rows} rows: tiles have 16"),
        }
    }
}

/// Two by two tiles of sums.
unsafe fn multiply32(
    steps: usize,
    a: *const f32,
    b: *const f32,
    sums: *mut f32,
    first: bool,
    ahead: *const f32,
) {
    // SAFETY: as the caller promised; every address lies in the slivers or the sums.
    unsafe {
        asm!(
            "test {first:e}, {first:e}", "jnz 2f",
            "tileloadd tmm0, [{c} + {wide}*1]", "tileloadd tmm1, [{c} + {wide}*1 + 64]",
            "tileloadd tmm2, [{c} + {wide}*1 + 2048]", "tileloadd tmm3, [{c} + {wide}*1 + 2112]",
            "jmp 3f",
            "2:", "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "3:", "test {n}, {n}", "jz 5f",
            "4:",
            "tileloadd tmm4, [{a} + {narrow}*1]",
            "tileloadd tmm6, [{b} + {wide}*1]",
            "tileloadd tmm7, [{b} + {wide}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a} + {narrow}*1 + 1024]",
            "prefetcht1 [{ahead}]", "prefetcht1 [{ahead} + 64]", "prefetcht1 [{ahead} + 128]", "prefetcht1 [{ahead} + 192]",
            "prefetcht1 [{ahead} + 256]", "prefetcht1 [{ahead} + 320]", "prefetcht1 [{ahead} + 384]", "prefetcht1 [{ahead} + 448]",
            "add {ahead}, 512",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a}, 2048", "add {b}, 2048", "dec {n}", "jnz 4b",
            "5:",
            "tilestored [{c} + {wide}*1], tmm0", "tilestored [{c} + {wide}*1 + 64], tmm1",
            "tilestored [{c} + {wide}*1 + 2048], tmm2", "tilestored [{c} + {wide}*1 + 2112], tmm3",
            ahead = inout(reg) ahead => _,
            a = inout(reg) a => _, b = inout(reg) b => _, n = inout(reg) steps => _,
            c = in(reg) sums, first = in(reg) u32::from(first), wide = in(reg) 128usize, narrow = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// One by two tiles of sums.
unsafe fn multiply16(steps: usize, a: *const f32, b: *const f32, sums: *mut f32, first: bool) {
    // SAFETY: as the caller promised; every address lies in the slivers or the sums.
    unsafe {
        asm!(
            "test {first:e}, {first:e}", "jnz 2f",
            "tileloadd tmm0, [{c} + {wide}*1]", "tileloadd tmm1, [{c} + {wide}*1 + 64]",
            "jmp 3f",
            "2:", "tilezero tmm0", "tilezero tmm1",
            "3:", "test {n}, {n}", "jz 5f",
            "4:",
            "tileloadd tmm4, [{a} + {narrow}*1]",
            "tileloadd tmm6, [{b} + {wide}*1]",
            "tileloadd tmm7, [{b} + {wide}*1 + 64]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 1024", "add {b}, 2048", "dec {n}", "jnz 4b",
            "5:",
            "tilestored [{c} + {wide}*1], tmm0", "tilestored [{c} + {wide}*1 + 64], tmm1",
            a = inout(reg) a => _, b = inout(reg) b => _, n = inout(reg) steps => _,
            c = in(reg) sums, first = in(reg) u32::from(first), wide = in(reg) 128usize, narrow = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}
