//! What is done with tiles: products that begin while those before them are scaled.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::super::activations::{BLOCK, BOTH, GROUP, StepScales};
use super::super::{GROUP_STEPS, PANEL};
use super::{ROWS, Scales, TILE_BYTES, WIDE, bytes, whole};
use crate::stream::prefetch;

/// What is summed before the scale of the activations counts: half a unit or, of bytes, all of it, so four tiles of rows.
#[derive(Clone, Copy)]
pub(super) struct Item {
    /// Codes.
    pub codes: *const u8,
    /// Scales of the first part.
    pub weights: *const Scales,
    /// Rows of a tile of the item that follows in the next rows.
    pub ahead: *const u8,
    /// Scales of the first step of the first eight rows and of the others.
    pub scales: [*const StepScales; 2],
    /// The sums of all items before.
    pub from: *const f32,
    /// Where they go.
    pub sums: *mut f32,
    /// Sums of quants, and the sub-minimums they are multiplied with.
    pub offsets: *const u8,
    pub mins: *const [u8; TILE_BYTES],
}

impl Item {
    /// What belongs to a row and a step.
    #[inline(always)]
    fn quants(&self, row: usize, step: usize) -> *const StepScales {
        self.scales[row / BLOCK].wrapping_add(step * BLOCK + row % BLOCK)
    }

    /// Asks for some of the rows ahead, and of the sums.
    #[inline(always)]
    fn prefetch(&self, rows: Range<usize>) {
        for row in rows {
            prefetch(self.ahead.wrapping_add(row * WIDE));
            prefetch(self.sums.wrapping_add(row * PANEL).cast());
        }
    }
}

/// Loads four tiles of rows.
///
/// # Safety
/// The tiles are configured; the rows can be read.
#[inline(always)]
pub(super) unsafe fn load_rows(rows: *const u8) {
    // SAFETY: as the caller promised. No compiler uses tiles, so they stay as they are until the products of the panels.
    unsafe {
        asm!(
            "tileloadd tmm4, [{rows} + {wide}*1]",
            "tileloadd tmm5, [{rows} + {wide}*1 + 1024]",
            "tileloadd tmm6, [{rows} + {wide}*1 + 2048]",
            "tileloadd tmm7, [{rows} + {wide}*1 + 3072]",
            rows = in(reg) rows, wide = in(reg) WIDE,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Does something for each row of a tile. Written out: loops would keep the sums in memory.
macro_rules! rows {
    ($do:ident $with:tt) => { rows!($do $with 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    ($do:ident $with:tt $($m:literal)*) => {$( $do!($m $with); )*};
}

/// Adds the sums of a row, times the scale of the activations, to those before.
macro_rules! add {
    ($m:literal ($sums:ident $item:ident)) => {
        let scale = _mm512_set1_ps((*$item.quants($m, 0)).scale);
        let from = _mm512_load_ps($item.from.add($m * PANEL));
        _mm512_store_ps(
            $item.sums.add($m * PANEL),
            _mm512_fmadd_ps($sums[$m], scale, from),
        );
    };
}

/// Begins the products of an item while those of the one before are scaled and added to its sums.
///
/// # Safety
/// As [`super::Kernel`]; `before` was begun by the last call with this ring, or its sums are not used.
#[inline(always)]
pub(super) unsafe fn overlap<const SPAN: usize, const MIN: bool>(
    next: &Item,
    before: &Item,
    ring: *mut f32,
) {
    // SAFETY: as the caller promised.
    unsafe {
        if whole(SPAN) {
            overlap_whole::<MIN>(next, before, ring);
        } else if bytes(SPAN) {
            overlap_groups::<MIN>(next, before, ring);
        } else {
            overlap_parts::<MIN>(next, before, ring);
        }
    }
}

/// [`overlap`] for parts of half a unit.
///
/// # Safety
/// As [`overlap`].
#[inline(always)]
unsafe fn overlap_parts<const MIN: bool>(next: &Item, before: &Item, ring: *mut f32) {
    // SAFETY: as the caller promised; the sums of a part lie in the ring at its place.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); ROWS];
        macro_rules! scaled {
            ($m:literal ($from:ident $scale:ident)) => {
                sums[$m] = _mm512_fmadd_ps(_mm512_load_ps($from.add($m * PANEL)), $scale, sums[$m])
            };
        }
        macro_rules! offset {
            ($m:literal ($part:ident $min:ident)) => {
                let of = _mm512_set1_ps((*before.quants($m, $part)).sum(BOTH));
                sums[$m] = _mm512_fmadd_ps($min, of, sums[$m])
            };
        }
        macro_rules! parts {
            ($($part:literal)*) => {$({
                // What was begun two parts ago is done.
                store::<{ $part % 2 }>(ring.add(($part + 2) % GROUP_STEPS * ROWS * PANEL));
                begin::<$part>(next);
                next.prefetch($part * ROWS / GROUP_STEPS..($part + 1) * ROWS / GROUP_STEPS);
                let (from, part) = (ring.add($part * ROWS * PANEL), $part);
                let weights = before.weights.add($part).cast::<f32>();
                let scale = _mm512_load_ps(weights);
                rows!(scaled(from scale));
                if MIN {
                    let min = _mm512_load_ps(weights.add(PANEL));
                    rows!(offset(part min));
                }
            })*};
        }
        parts!(0 1 2 3);
        rows!(add(sums before));
    }
}

/// [`overlap`] for the two groups of a unit, each a part.
///
/// # Safety
/// As [`overlap`].
#[inline(always)]
unsafe fn overlap_groups<const MIN: bool>(next: &Item, before: &Item, ring: *mut f32) {
    // SAFETY: as the caller promised; the sums of a group lie in the ring at its place.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); ROWS];
        macro_rules! scaled {
            ($m:literal ($from:ident $scale:ident $min:ident $step:ident)) => {
                let sum = _mm512_cvtepi32_ps(_mm512_load_si512($from.add($m * PANEL).cast()));
                sums[$m] = _mm512_fmadd_ps(sum, $scale, sums[$m]);
                if MIN {
                    let of = _mm512_set1_ps((*before.quants($m, $step)).sum(GROUP));
                    sums[$m] = _mm512_fmadd_ps($min, of, sums[$m]);
                }
            };
        }
        macro_rules! group {
            ($group:literal) => {{
                clear::<$group>();
                // Codes that have a minimum beside them are unsigned.
                begin_bytes::<MIN, $group, { 2 * $group }, $group>(next);
                store::<{ 1 - $group }>(ring.add((1 - $group) * ROWS * PANEL));
                next.prefetch($group * ROWS / 2..($group + 1) * ROWS / 2);
                let (from, step) = (ring.add($group * ROWS * PANEL), $group * GROUP_STEPS);
                let weights = before.weights.add($group).cast::<f32>();
                let (scale, min) = (_mm512_load_ps(weights), _mm512_load_ps(weights.add(PANEL)));
                rows!(scaled(from scale min step));
            }};
        }
        group!(0);
        group!(1);
        rows!(add(sums before));
    }
}

/// [`overlap`] for a unit that is one part, of which the ring has the sums of upper bytes, those of lower ones and what
/// sub-minimums make.
///
/// # Safety
/// As [`overlap`].
#[inline(always)]
unsafe fn overlap_whole<const MIN: bool>(next: &Item, before: &Item, ring: *mut f32) {
    // SAFETY: as the caller promised.
    unsafe {
        let [upper, lower, offsets] = [0, 1, 2].map(|at| ring.add(at * ROWS * PANEL));
        let mut sums = [_mm512_setzero_ps(); ROWS];
        macro_rules! scaled {
            ($m:literal ($scale:ident $min:ident)) => {
                let upper = _mm512_load_si512(upper.add($m * PANEL).cast());
                let lower = _mm512_load_si512(lower.add($m * PANEL).cast());
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(upper), lower);
                sums[$m] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), $scale);
                if MIN {
                    let offset = _mm512_load_ps(offsets.add($m * PANEL));
                    sums[$m] = _mm512_fnmadd_ps($min, offset, sums[$m]);
                }
                add!($m (sums before));
            };
        }
        clear::<0>();
        begin_bytes::<false, 0, 0, 0>(next);
        begin_bytes::<false, 1, 2, 0>(next);
        store::<1>(lower);
        next.prefetch(0..ROWS);
        let weights = before.weights.cast::<f32>();
        let (scale, min) = (_mm512_load_ps(weights), _mm512_load_ps(weights.add(PANEL)));
        rows!(scaled(scale min));
        clear::<1>();
        begin_bytes::<true, 0, 4, 1>(next);
        begin_bytes::<true, 1, 6, 1>(next);
        store::<0>(upper);
        if MIN {
            asm!(
                "tileloadd tmm2, [{offsets} + {wide}*1]",
                "tileloadd tmm3, [{mins} + {wide}*1]",
                "tilezero tmm0",
                "tdpbf16ps tmm0, tmm2, tmm3",
                offsets = in(reg) next.offsets, mins = in(reg) next.mins, wide = in(reg) WIDE,
                out("tmm0") _, out("tmm2") _, out("tmm3") _,
                options(nostack, preserves_flags, readonly)
            );
            store::<0>(offsets);
        }
    }
}

/// Begins the product of a part, in one of two tiles in turn.
///
/// # Safety
/// As [`super::Kernel`]; the rows are loaded.
#[inline(always)]
unsafe fn begin<const PART: usize>(item: &Item) {
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tileloadd tmm{b}, [{codes} + {wide}*1]",
            "tilezero tmm{c}",
            "tdpbf16ps tmm{c}, tmm{a}, tmm{b}",
            codes = in(reg) item.codes.add(PART * TILE_BYTES), wide = in(reg) WIDE,
            a = const 4 + PART, b = const 2 + PART % 2, c = const PART % 2,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Begins sums.
///
/// # Safety
/// The tiles are configured.
#[inline(always)]
unsafe fn clear<const C: usize>() {
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tilezero tmm{c}",
            c = const C,
            out("tmm0") _, out("tmm1") _,
            options(nostack, preserves_flags, nomem)
        );
    }
}

/// Adds the products of a group of bytes, signed or not, from tile `CODES` of the item on, to tile `C`.
///
/// # Safety
/// As [`super::Kernel`]; the rows are loaded.
#[inline(always)]
unsafe fn begin_bytes<
    const UNSIGNED: bool,
    const GROUP: usize,
    const CODES: usize,
    const C: usize,
>(
    item: &Item,
) {
    macro_rules! products {
        ($multiply:literal) => {
            asm!(
                "tileloadd tmm2, [{codes} + {wide}*1]",
                "tileloadd tmm3, [{codes} + {wide}*1 + 1024]",
                concat!($multiply, " tmm{c}, tmm{a}, tmm2"),
                concat!($multiply, " tmm{c}, tmm{b}, tmm3"),
                codes = in(reg) item.codes.add(CODES * TILE_BYTES), wide = in(reg) WIDE,
                a = const 4 + 2 * GROUP, b = const 5 + 2 * GROUP, c = const C,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, preserves_flags, readonly)
            )
        };
    }
    // SAFETY: as the caller promised.
    unsafe {
        if UNSIGNED {
            products!("tdpbsud");
        } else {
            products!("tdpbssd");
        }
    }
}

/// Stores a tile of sums.
///
/// # Safety
/// The tiles are configured; there is room for 16 rows.
#[inline(always)]
unsafe fn store<const C: usize>(to: *mut f32) {
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tilestored [{to} + {wide}*1], tmm{c}",
            to = in(reg) to, wide = in(reg) WIDE, c = const C,
            options(nostack, preserves_flags)
        );
    }
}
