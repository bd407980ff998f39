//! The product of panels and many rows of activations, by AMX tiles.
//!
//! Codes and quants are whole numbers that `bf16` holds exactly, and sums of their products stay below 2^24: tile products of
//! `bf16` give the very integers that products of bytes give, and give them as `f32`. Weights mostly have a scale for
//! 32 columns, where a sum of integers ends. A tile of bytes is deeper than that, so it would be half empty and take as
//! long, and its sums would have to be converted, by the units that multiply them with their scales: a tile product
//! occupies one of the two.
//!
//! What a product of 16 rows, a panel and 32 columns takes: 16 cycles of the tiles, 16 stores, 16 multiplications with the
//! weights' scales, and a quarter of as many loads, multiplications and stores for the scales of the activations. To
//! have all of it side by side, the products of an [`Item`] begin while those of the one before are scaled ([`overlap`]):
//! sums are stored two products after they were begun, and read two later.
//!
//! Where weights have a scale for 128 columns, tiles are of bytes: 128 columns are two products and one sum. Where scales are
//! whole numbers times one for 256 columns, a code times its whole number is two bytes, each in a tile: these columns are eight
//! products and two sums. Their sub-minimums are multiplied with the sums of the quants: whole numbers too, of two digits,
//! for which one product of `bf16` is enough.
//!
//! The operations on numbers and their order are those of the vector kernel, so every bit of the results is, too.

#![cfg(target_arch = "x86_64")]

mod overlap;
mod unpack;

use std::arch::x86_64::*;
use std::ops::Range;

use self::overlap::{Item, load_rows, overlap};
use self::unpack::unpack;
use super::activations::{BLOCK, StepScales, TILE, Tiles};
use super::kernel::body;
use super::layout::{ALIGNED, Codes, Layout, Min, Units, WHOLE_16, WHOLE_32, sum_steps};
use super::planes::{Names, Planes, Unpack};
use super::{GROUP_STEPS, PANEL, STEP, UNIT, UNIT_STEPS};
use crate::stream::prefetch;
use crate::tiles::Config;

/// Rows of a tile.
pub(super) const ROWS: usize = TILE;
/// Bytes of a tile.
const TILE_BYTES: usize = ROWS * WIDE;
/// Tiles of codes that are unpacked at a time: what fills two thirds of the first cache.
const CODES: usize = 32;
/// Bytes from a row of a tile in memory to the next.
const WIDE: usize = 64;

/// Sums of a tile.
#[repr(C, align(64))]
struct Sums([[f32; PANEL]; ROWS]);

/// What sums start from.
static ZEROS: Sums = Sums([[0.0; PANEL]; ROWS]);

/// What is unpacked and on its way. Parts are what has a scale of its own: a step, a group of them or a unit.
#[repr(C, align(64))]
pub(super) struct Space {
    /// Codes as tiles take them: of 16 rows, two columns of `bf16` or four of bytes, 16 times.
    codes: [[u8; TILE_BYTES]; CODES],
    /// Sub-minimums of 16 columns of panels, twice: times 256 and as they are.
    mins: [[u8; TILE_BYTES]; CODES / UNIT_STEPS],
    /// Of the parts of all panels.
    scales: [Scales; 4 * UNIT_STEPS],
    /// Sums of the parts of an item.
    ring: [Sums; GROUP_STEPS],
    /// Where the first item ends one that never was.
    nowhere: Sums,
}

/// [`Layout::byte_tiles`] for a kind.
const fn bytes(span: usize) -> bool {
    span > STEP
}

/// Whether scales are whole numbers times one for a unit.
const fn whole(span: usize) -> bool {
    span >= UNIT
}

/// Tiles of a unit of a panel.
const fn unit_tiles(span: usize) -> usize {
    if bytes(span) && !whole(span) {
        UNIT_STEPS / 2
    } else {
        UNIT_STEPS
    }
}

/// Parts of a unit.
const fn unit_parts(span: usize) -> usize {
    if whole(span) {
        1
    } else {
        UNIT_STEPS * STEP / span
    }
}

impl Space {
    /// Its size in elements of scratch memory.
    pub const LEN: usize = size_of::<Space>() / size_of::<f32>();
}

/// Scale and minimum of 16 rows of the matrix.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Scales {
    scale: [f32; PANEL],
    min: [f32; PANEL],
}

/// Panels and blocks of 16 rows.
pub(super) struct Work<'a> {
    pub layout: &'a Layout,
    pub units: &'a Units,
    /// Their bytes; of one matrix or of several.
    pub panels: &'a [&'a [u8]],
    pub tiles: Tiles<'a>,
    /// The first block.
    pub first: usize,
    pub blocks: usize,
    /// Scales of its first step.
    pub scales: *const StepScales,
    /// Scales from eight rows to the next eight.
    pub block: usize,
    pub space: *mut Space,
    /// `[blocks, panels, 16, 16]`.
    pub sums: *mut f32,
}

/// # Safety
/// The CPU has AMX with `bf16` products and AVX-512 with VNNI; the tiles are configured ([`TILES`]); pointers are valid for the
/// panels and blocks of the layout, for the scratch memory (initialized) and for the result.
pub(super) type Kernel = unsafe fn(&Work<'_>);

/// Tiles 0 and 1 are sums, 2 and 3 codes of a panel, 4 to 7 rows of activations.
pub(super) static TILES: Config = Config::new([(ROWS as u8, WIDE as u16); 8]);

/// The kernel for a layout.
pub(super) fn choose(layout: &Layout) -> Kernel {
    let span = layout.kind();
    // Codes that count from zero may be too large for signed bytes.
    let min = match whole(span) {
        true => layout.min == Min::Super,
        false => layout.min != Min::Without || layout.zero() == 0,
    };
    match min {
        true => body!(layout.codes, span, run, true),
        false => body!(layout.codes, span, run, false),
    }
}

/// # Safety
/// As [`Kernel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn run<U: Unpack, const SPAN: usize, const MIN: bool>(work: &Work<'_>) {
    let units = work.units;
    for index in 0..units.len() {
        let (unit, start) = units.at(index);
        let each = CODES / unit_tiles(SPAN);
        for first in (0..work.panels.len()).step_by(each) {
            let panels = first..work.panels.len().min(first + each);
            // SAFETY: as the caller promised; units lie in the panels.
            unsafe {
                for (p, panel) in work.panels[panels.clone()].iter().enumerate() {
                    let base = panel.as_ptr().add(start);
                    unpack::<U, SPAN, MIN>(work, p, &unit, base);
                }
                let items = unit.steps.div_ceil(sum_steps(SPAN));
                let ahead = match panels.end < work.panels.len() {
                    true => (panels.end, start),
                    false => (0, start + unit.bytes),
                };
                multiply::<SPAN, MIN>(work, index, items, panels, ahead);
            }
        }
    }
}

/// Adds the products of unit `index`, the panels of which are unpacked, to the sums of all blocks; asks for the units of those
/// that are unpacked next, from a panel on and from a byte of each.
///
/// # Safety
/// As [`Kernel`].
#[inline(always)]
unsafe fn multiply<const SPAN: usize, const MIN: bool>(
    work: &Work<'_>,
    index: usize,
    items: usize,
    panels: Range<usize>,
    (ahead, start): (usize, usize),
) {
    // SAFETY: as the caller promised; activations are padded to whole units.
    unsafe {
        let space = work.space;
        let ring = (&raw mut (*space).ring).cast::<f32>();
        let mins = (&raw const (*space).mins).cast::<[u8; TILE_BYTES]>();
        let codes = (&raw const (*space).codes).cast::<u8>();
        let weights = (&raw const (*space).scales).cast::<Scales>();
        let unit = unit_tiles(SPAN);
        // Of an item.
        let parts = unit_parts(SPAN) * sum_steps(SPAN) / UNIT_STEPS;
        let rows = |block: usize, tile: usize| work.tiles.tile(index, work.first + block, tile);
        let item = |block: usize, at: usize, p: usize| {
            let step = index * UNIT_STEPS + at * GROUP_STEPS;
            let scales = |half: usize| {
                let block = (2 * block + half) * work.block;
                work.scales.add(block + step * BLOCK)
            };
            let tile = block * work.panels.len() + panels.start + p;
            let sums = work.sums.add(tile * ROWS * PANEL);
            let (after, first) = match at + 1 < items {
                true => (block, 4 * (at + 1)),
                false => (block + 1, 0),
            };
            Item {
                ahead: rows(after, first + p % 4),
                codes: codes.add((p * unit + 4 * at) * TILE_BYTES),
                weights: weights.add(p * unit_parts(SPAN) + at * parts),
                scales: [scales(0), scales(1)],
                from: match index + at {
                    0 => ZEROS.0.as_ptr().cast(),
                    _ => sums,
                },
                sums,
                offsets: work.tiles.sums(index, work.first + block),
                mins: mins.wrapping_add(p),
            }
        };
        let mut last = Item {
            sums: (&raw mut (*space).nowhere).cast(),
            ..item(0, 0, 0)
        };
        let lines = work.units.at(index).0.bytes.div_ceil(64);
        for block in 0..work.blocks {
            for panel in work.panels[ahead..].iter().take(panels.len()) {
                let from = panel.as_ptr().wrapping_add(start);
                for line in (block..lines).step_by(work.blocks) {
                    prefetch(from.wrapping_add(64 * line));
                }
            }
            for at in 0..items {
                load_rows(rows(block, 4 * at));
                for p in 0..panels.len() {
                    let next = item(block, at, p);
                    overlap::<SPAN, MIN>(&next, &last, ring);
                    last = next;
                }
            }
        }
        // What is begun here again is not ended.
        overlap::<SPAN, MIN>(&last, &last, ring);
    }
}

/// The quants of two steps of eight rows, side by side.
pub(super) fn tile_bytes(quants: &[[i8; STEP]], to: &mut [[i8; 2 * STEP]; BLOCK]) {
    let (first, second) = quants.split_at(BLOCK);
    for ((to, first), second) in to.iter_mut().zip(first).zip(second) {
        to[..STEP].copy_from_slice(first);
        to[STEP..].copy_from_slice(second);
    }
}

/// The quants of a step of eight rows as `bf16`, in the order of codes: two columns of each four, then the others.
///
/// # Safety
/// AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn tile_rows(quants: &[[i8; STEP]], to: &mut [[u16; STEP]; BLOCK]) {
    let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
    ));
    let numbers = |bytes: __m128i| {
        let numbers = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
        _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(numbers))
    };
    for (quants, to) in quants.iter().zip(to) {
        // SAFETY: both are 32 elements.
        unsafe {
            let bytes = _mm256_shuffle_epi8(_mm256_loadu_si256(quants.as_ptr().cast()), order);
            let to = to.as_mut_ptr().cast::<__m256i>();
            _mm256_storeu_si256(to, numbers(_mm256_castsi256_si128(bytes)));
            _mm256_storeu_si256(to.add(1), numbers(_mm256_extracti128_si256::<1>(bytes)));
        }
    }
}

/// The sums of half steps of a row: the two digits of each to the base of 256, as `bf16`.
pub(super) fn sum_row(sums: &[i32; 2 * UNIT_STEPS], to: &mut [[u16; 2]; 2 * UNIT_STEPS]) {
    let number = |whole: i32| ((whole as f32).to_bits() >> 16) as u16;
    for (to, &sum) in to.iter_mut().zip(sums) {
        *to = [number(sum >> 8), number(sum & 0xff)];
    }
}
