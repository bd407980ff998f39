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
//! sums are stored two products after they were begun, and read two later. Where weights have a scale for 128 columns, a
//! tile sums all of them, and is stored and scaled once.
//!
//! The operations on numbers and their order are those of the vector kernel, so every bit of the results is, too.

#![cfg(target_arch = "x86_64")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{BLOCK, BOTH, GROUP, StepScales, TILE, Tiles};
use super::kernel::{body, scales};
use super::lanes::{Lanes, Vnni};
use super::layout::{Codes, Layout, Min, Unit};
use super::matrix::PackedMatrix;
use super::planes::{Names, Planes, Unpack};
use super::{GROUP_STEPS, PANEL, STEP, UNIT_STEPS};
use crate::tiles::Config;

/// Rows of a tile.
pub(super) const ROWS: usize = TILE;
/// Panels that are unpacked at a time: what fills two thirds of the first cache.
const PANELS: usize = 4;
/// Bytes from a row of a tile in memory to the next.
const WIDE: usize = 64;

/// Sums of a tile.
type Sums = [[f32; PANEL]; ROWS];

/// What is unpacked and on its way. Parts are steps, or halves of steps where weights have a scale for 16 columns.
#[repr(C, align(64))]
pub(super) struct Space {
    /// Codes as tiles take them: two columns of 16 rows, 16 times.
    codes: [[[[u16; 2 * PANEL]; STEP / 2]; UNIT_STEPS]; PANELS],
    scales: [[Scales; 2 * UNIT_STEPS]; PANELS],
    /// Sums of the parts of a group.
    ring: [Sums; 2 * GROUP_STEPS],
    /// Where the first item ends one that never was.
    nowhere: Sums,
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
    pub matrix: &'a PackedMatrix,
    pub panels: Range<usize>,
    pub tiles: Tiles<'a>,
    /// The first block.
    pub first: usize,
    pub blocks: usize,
    /// Scales of its first step.
    pub scales: *const StepScales,
    /// Scales from eight rows to the next eight.
    pub block: usize,
    pub space: *mut Space,
    /// `[blocks, panels, 16, 16]`, zeros.
    pub sums: *mut f32,
}

/// A function and the tiles it works with.
pub(super) struct Kernel {
    /// Must be entered before.
    pub config: &'static Config,
    /// # Safety
    /// The CPU has AMX with `bf16` products and AVX-512 with VNNI; the tiles are configured; pointers are valid for the
    /// panels and blocks of the layout, for the scratch memory (initialized) and for the result.
    pub run: unsafe fn(&Work<'_>),
}

/// Tiles 0 and 1 are sums, 2 and 3 codes of a panel, 4 to 7 rows of activations.
const fn config(columns: usize) -> Config {
    let sums = (ROWS as u8, WIDE as u16);
    let codes = (columns as u8 / 2, WIDE as u16);
    let rows = (ROWS as u8, 2 * columns as u16);
    Config::new([sums, sums, sums, codes, rows, rows, rows, rows])
}
static STEPS: Config = config(STEP);
static HALF_STEPS: Config = config(STEP / 2);

impl Kernel {
    /// The kernel for a layout.
    pub fn choose(layout: &Layout) -> Kernel {
        let span = layout.span();
        Kernel {
            config: if span < STEP { &HALF_STEPS } else { &STEPS },
            run: match layout.min {
                Min::Without => body!(layout.codes, span, run, false),
                _ => body!(layout.codes, span, run, true),
            },
        }
    }
}

/// `i - zero` for each code below 32, as `bf16`.
fn numbers(layout: &Layout) -> [u16; 32] {
    std::array::from_fn(|i| ((i as f32 - layout.zero() as f32).to_bits() >> 16) as u16)
}

/// The lower bytes of words as `bf16`, less the zero.
///
/// # Safety
/// AVX-512.
#[inline(always)]
unsafe fn numbered(words: __m512i, zero: __m512) -> __m512i {
    // SAFETY: the caller's promise.
    unsafe {
        let byte = _mm512_set1_epi32(0xff);
        let low = _mm512_and_si512(words, byte);
        let high = _mm512_and_si512(_mm512_srli_epi32::<16>(words), byte);
        let low = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(low), zero));
        let high = _mm512_castps_si512(_mm512_sub_ps(_mm512_cvtepi32_ps(high), zero));
        // Whole numbers of eight bits: the lower half of each is zero.
        _mm512_or_si512(_mm512_srli_epi32::<16>(low), high)
    }
}

/// # Safety
/// As [`Kernel::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn run<U: Unpack, const SPAN: usize, const MIN: bool>(work: &Work<'_>) {
    let units = work.matrix.units();
    for index in 0..units.len() {
        let (unit, start) = units.at(index);
        for first in work.panels.clone().step_by(PANELS) {
            let panels = first..work.panels.end.min(first + PANELS);
            // SAFETY: as the caller promised; units lie in the panels.
            unsafe {
                for (p, panel) in panels.clone().enumerate() {
                    let base = work.matrix.panel(panel).as_ptr().add(start);
                    unpack::<U, SPAN>(work, p, &unit, base);
                }
                multiply::<SPAN, MIN>(work, index, unit.steps.div_ceil(GROUP_STEPS), panels);
            }
        }
    }
}

/// Unpacks a unit of a panel, and zeros up to a whole group.
///
/// # Safety
/// As [`Kernel::run`]; `base` is the unit's first byte.
#[inline(always)]
unsafe fn unpack<U: Unpack, const SPAN: usize>(
    work: &Work<'_>,
    panel: usize,
    unit: &Unit,
    base: *const u8,
) {
    // SAFETY: as the caller promised, and there is room for the steps of a unit.
    unsafe {
        let layout = work.matrix.layout();
        let (codes, to) = (
            &raw mut (*work.space).codes[panel],
            &raw mut (*work.space).scales[panel],
        );
        let table = match layout.codes {
            Codes::Table(table) => Vnni::table(table),
            _ => Vnni::splat(0),
        };
        let numbers = _mm512_loadu_si512(numbers(layout).as_ptr().cast());
        let zero = _mm512_set1_ps(layout.zero() as f32);
        for step in 0..unit.steps {
            let bytes = U::unpack::<Vnni>(base.add(unit.planes + step * U::BYTES), table);
            for (four, &bytes) in bytes.iter().enumerate() {
                // Every other column: activations have theirs in the same order.
                let odd = _mm512_srli_epi16::<8>(bytes);
                let (even, odd) = match U::BITS <= 5 {
                    true => (
                        _mm512_permutexvar_epi16(bytes, numbers),
                        _mm512_permutexvar_epi16(odd, numbers),
                    ),
                    false => (numbered(bytes, zero), numbered(odd, zero)),
                };
                let to = (&raw mut (*codes)[step][2 * four]).cast::<__m512i>();
                _mm512_store_si512(to, even);
                _mm512_store_si512(to.add(1), odd);
            }
            for part in layout.parts() {
                let at = match part {
                    GROUP => step / GROUP_STEPS,
                    BOTH => step,
                    half => 2 * step + half,
                };
                let (scale, min) = scales::<Vnni>(layout, unit, base, 0, step, part);
                let to = (&raw mut (*to)[at]).cast::<f32>();
                _mm512_store_ps(to, scale);
                _mm512_store_ps(to.add(PANEL), min);
            }
        }
        // Groups of columns with one scale are whole.
        let parts = STEP.div_ceil(SPAN);
        for step in unit.steps..unit.steps.next_multiple_of(GROUP_STEPS) {
            (&raw mut (*codes)[step]).write_bytes(0, 1);
            (&raw mut (*to)[parts * step]).write_bytes(0, parts);
        }
    }
}

/// A group of a panel and a block of rows.
#[derive(Clone, Copy)]
struct Item {
    /// Quants of the rows' first step.
    rows: *const u16,
    /// Codes of the first step.
    codes: *const u16,
    /// Scales of the first part.
    weights: *const Scales,
    /// Rows of a step of the group that follows.
    ahead: *const u16,
    /// Scales of the first step of the first eight rows and of the others.
    scales: [*const StepScales; 2],
    sums: *mut f32,
}

/// Items whose products have begun.
struct Queue {
    /// The two last ones, the very last second.
    begun: [Item; 2],
    /// Whose turn it is of the three tiles of sums.
    turn: usize,
    ring: *mut f32,
}

impl Queue {
    /// Begins an item, and ends the one before; where one sum is all there is of an item, the one before that: a tile can be
    /// stored once its products are done, and be read some time later.
    ///
    /// # Safety
    /// As [`overlap`].
    #[inline(always)]
    unsafe fn begin<const SPAN: usize, const MIN: bool>(&mut self, next: Item) {
        let before = if SPAN > STEP {
            &self.begun[0]
        } else {
            &self.begun[1]
        };
        // SAFETY: the caller's promise.
        unsafe {
            match self.turn {
                0 => overlap::<SPAN, MIN, 0>(&next, before, self.ring),
                1 => overlap::<SPAN, MIN, 1>(&next, before, self.ring),
                _ => overlap::<SPAN, MIN, 2>(&next, before, self.ring),
            }
        }
        self.begun = [self.begun[1], next];
        self.turn = (self.turn + GROUP_STEPS * STEP / SPAN) % 3;
    }
}

/// Adds the products of unit `index`, the panels of which are unpacked, to the sums of all blocks.
///
/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn multiply<const SPAN: usize, const MIN: bool>(
    work: &Work<'_>,
    index: usize,
    groups: usize,
    panels: Range<usize>,
) {
    // SAFETY: as the caller promised; activations are padded to whole units.
    unsafe {
        let space = work.space;
        let ring = (&raw mut (*space).ring).cast::<f32>();
        let codes = (&raw const (*space).codes).cast::<u16>();
        let weights = (&raw const (*space).scales).cast::<Scales>();
        let parts = GROUP_STEPS * STEP / SPAN;
        let item = |block: usize, group: usize, p: usize| {
            let step = index * UNIT_STEPS + group * GROUP_STEPS;
            let scales = |half: usize| {
                let block = (2 * block + half) * work.block;
                work.scales.add(block + step * BLOCK)
            };
            let panel = panels.start - work.panels.start + p;
            let (after, first) = match group + 1 < groups {
                true => (block, GROUP_STEPS * (group + 1)),
                false => (block + 1, 0),
            };
            Item {
                ahead: work.tiles.step(index, work.first + after, first + p),
                rows: work
                    .tiles
                    .step(index, work.first + block, group * GROUP_STEPS),
                codes: codes.add((p * UNIT_STEPS + group * GROUP_STEPS) * STEP * PANEL),
                weights: weights.add(p * 2 * UNIT_STEPS + group * parts),
                scales: [scales(0), scales(1)],
                sums: work
                    .sums
                    .add((block * work.panels.len() + panel) * ROWS * PANEL),
            }
        };
        let nowhere = Item {
            sums: (&raw mut (*space).nowhere).cast(),
            ..item(0, 0, 0)
        };
        let mut queue = Queue {
            begun: [nowhere; 2],
            turn: 0,
            ring,
        };
        for block in 0..work.blocks {
            for group in 0..groups {
                let first = group * GROUP_STEPS;
                if SPAN >= STEP {
                    load_rows(work.tiles.step(index, work.first + block, first));
                }
                for p in 0..panels.len() {
                    queue.begin::<SPAN, MIN>(item(block, group, p));
                }
            }
        }
        // What is begun now is not ended.
        queue.begin::<SPAN, MIN>(nowhere);
        if SPAN > STEP {
            queue.begin::<SPAN, MIN>(nowhere);
        }
    }
}

/// Loads the rows of four steps.
///
/// # Safety
/// The tiles are configured; four steps can be read.
#[inline(always)]
unsafe fn load_rows(rows: *const u16) {
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

/// Begins the products of an item while those of one before are scaled and added to its sums.
///
/// # Safety
/// As [`Kernel::run`]; `before` was begun by the last call with this ring (where an item is one sum, by the one before the
/// last), or its sums are not used.
#[inline(always)]
unsafe fn overlap<const SPAN: usize, const MIN: bool, const TURN: usize>(
    next: &Item,
    before: &Item,
    ring: *mut f32,
) {
    // Written out: loops would keep the sums in memory.
    macro_rules! all {
        ($do:ident $with:tt) => { all!($do $with 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
        ($do:ident $with:tt $($m:literal)*) => {$( $do!($m $with); )*};
    }
    // SAFETY: as the caller promised; the sums of a part lie in the ring at its place.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); ROWS];
        let quants = |m: usize, step: usize| before.scales[m / BLOCK].add(step * BLOCK + m % BLOCK);
        macro_rules! scaled {
            ($m:literal ($from:ident $scale:ident)) => {
                sums[$m] = _mm512_fmadd_ps(_mm512_load_ps($from.add($m * PANEL)), $scale, sums[$m])
            };
        }
        macro_rules! offset {
            ($m:literal ($step:ident $part:ident $min:ident)) => {
                let of = _mm512_set1_ps((*quants($m, $step)).sum($part));
                sums[$m] = _mm512_fmadd_ps($min, of, sums[$m])
            };
        }
        // Adds a sum of the ring: part `$part`, which is `$kind` of step `$step`.
        macro_rules! end {
            ($at:expr, $part:literal, $kind:expr, $step:expr) => {{
                let (step, kind) = ($step, $kind);
                let from = ring.add($at * ROWS * PANEL);
                let weights = before.weights.add($part).cast::<f32>();
                let scale = _mm512_load_ps(weights);
                all!(scaled(from scale));
                if MIN {
                    let min = _mm512_load_ps(weights.add(PANEL));
                    all!(offset(step kind min));
                }
            }};
        }
        macro_rules! ahead {
            ($part:literal of $parts:literal) => {
                for line in $part * ROWS / $parts..($part + 1) * ROWS / $parts {
                    _mm_prefetch::<_MM_HINT_T0>(next.ahead.wrapping_add(line * STEP).cast());
                }
            };
        }
        macro_rules! part {
            ($part:literal of $parts:literal) => {{
                begin::<SPAN, $part, TURN>(next);
                // What was begun two parts ago is done.
                store::<TURN, { ($part + 1) % 3 }>(
                    ring.add(($part + $parts - 2) % $parts * ROWS * PANEL),
                );
                ahead!($part of $parts);
                match $parts {
                    8 => end!($part, $part, $part % 2, $part / 2),
                    _ => end!($part, $part, BOTH, $part),
                }
            }};
        }
        if SPAN > STEP {
            begin::<SPAN, 0, TURN>(next);
            store::<TURN, 2>(ring.add((TURN + 2) % 3 * ROWS * PANEL));
            ahead!(0 of 2);
            end!((TURN + 1) % 3, 0, GROUP, 0);
            begin::<SPAN, 1, TURN>(next);
            begin::<SPAN, 2, TURN>(next);
            ahead!(1 of 2);
            begin::<SPAN, 3, TURN>(next);
        } else if SPAN == STEP {
            part!(0 of 4);
            part!(1 of 4);
            part!(2 of 4);
            part!(3 of 4);
        } else {
            part!(0 of 8);
            part!(1 of 8);
            part!(2 of 8);
            part!(3 of 8);
            part!(4 of 8);
            part!(5 of 8);
            part!(6 of 8);
            part!(7 of 8);
        }
        macro_rules! add {
            ($m:literal ()) => {
                let to = before.sums.add($m * PANEL);
                let scale = _mm512_set1_ps((*quants($m, 0)).scale);
                _mm512_store_ps(to, _mm512_fmadd_ps(sums[$m], scale, _mm512_load_ps(to)));
            };
        }
        all!(add());
    }
}

/// Begins a product: number `AT` of an item, which has three tiles of sums in turn.
///
/// # Safety
/// As [`Kernel::run`]; the rows of whole steps are loaded.
#[inline(always)]
unsafe fn begin<const SPAN: usize, const AT: usize, const TURN: usize>(item: &Item) {
    // SAFETY: as the caller promised.
    unsafe {
        if SPAN <= STEP || AT == 0 {
            asm!(
                "tilezero tmm{c}",
                c = const (TURN + AT) % 3,
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
                options(nostack, preserves_flags, nomem)
            );
        }
        if SPAN < STEP {
            asm!(
                "tileloadd tmm3, [{codes} + {wide}*1]",
                "tileloadd tmm{a}, [{rows} + {wide}*1]",
                "tdpbf16ps tmm{c}, tmm{a}, tmm3",
                codes = in(reg) item.codes.add(AT * STEP / 2 * PANEL),
                rows = in(reg) item.rows.add(AT / 2 * ROWS * STEP + AT % 2 * STEP / 2), wide = in(reg) WIDE,
                a = const 4 + AT % 2, c = const (TURN + AT) % 3,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                options(nostack, preserves_flags, readonly)
            );
        } else {
            asm!(
                "tileloadd tmm3, [{codes} + {wide}*1]",
                "tdpbf16ps tmm{c}, tmm{a}, tmm3",
                codes = in(reg) item.codes.add(AT * STEP * PANEL), wide = in(reg) WIDE,
                a = const 4 + AT, c = const (TURN + if SPAN > STEP { 0 } else { AT }) % 3,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, preserves_flags, readonly)
            );
        }
    }
}

/// Stores a tile of sums: the one `C` after that whose turn it is.
///
/// # Safety
/// The tiles are configured; there is room for 16 rows.
#[inline(always)]
unsafe fn store<const TURN: usize, const C: usize>(to: *mut f32) {
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tilestored [{to} + {wide}*1], tmm{c}",
            to = in(reg) to, wide = in(reg) WIDE, c = const (TURN + C) % 3,
            options(nostack, preserves_flags)
        );
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
