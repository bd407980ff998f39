//! The product of two panels and many rows of activations, by AMX tiles of bytes.
//!
//! Weights mostly have a scale of their own for every 32 columns, so that is where a sum of integers ends: a tile product
//! has half the depth that a tile could have, or a quarter with scales of 16 columns, and each of its sums becomes a number,
//! is scaled and added. These vector instructions are the limit: three for 16 sums, at two a cycle, where the tiles need
//! half a cycle. So the design spares everything else:
//! - codes are unpacked once for all rows of a task, as many columns at a time as stay in the first cache beside the rest;
//! - eight rows by two panels are sums of a group in 16 registers; only whole groups are multiplied by the scales of the
//!   activations and added to the sums in memory;
//! - tiles store their sums into a ring, which vectors read two pairs of steps later: the tiles' latency is hidden, and no
//!   load waits for a store.
//!
//! The operations on numbers and their order are those of the vector kernel, so every bit of the results is, too.

#![cfg(target_arch = "x86_64")]

use std::arch::asm;
use std::arch::x86_64::*;

use super::activations::{BLOCK, BOTH, StepScales};
use super::kernel::{body, scales};
use super::lanes::{Lanes, Vnni};
use super::layout::{Codes, Layout, Min, Units};
use super::planes::{Names, Planes, Unpack};
use super::{GROUP_STEPS, PANEL, STEP, UNIT_STEPS};
use crate::tiles::Config;

/// Rows of a tile of activations.
pub(super) const ROWS: usize = BLOCK;
/// Panels of a product.
pub(super) const PANELS: usize = 2;
/// Units that are unpacked at a time.
const SPAN_UNITS: usize = 2;
/// Steps of them.
const SPAN: usize = SPAN_UNITS * UNIT_STEPS;
/// Pairs of sums that are on their way from tiles to vectors.
const LAG: usize = 2;
/// Places for pairs of sums; one is written while another is read.
const RING: usize = 4;

/// What is unpacked and on its way; "pairs" are two steps, or the two halves of one.
#[repr(C, align(64))]
pub(super) struct Space {
    /// Codes of a step as tiles take them: four columns of 16 rows, eight times.
    codes: [[[u8; STEP * PANEL]; PANELS]; SPAN],
    /// Of each step, or half step.
    scales: [[Scales; PANELS]; 2 * SPAN],
    ring: [[Sums; 2]; RING],
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

/// What tiles store.
type Sums = [[[i32; PANEL]; ROWS]; PANELS];

/// Two panels and blocks of eight rows.
pub(super) struct Work<'a> {
    pub layout: &'a Layout,
    pub units: &'a Units,
    /// First byte of each panel.
    pub panels: [*const u8; PANELS],
    /// Quants of the first block and step.
    pub quants: *const i8,
    /// Scales of the first block and step.
    pub scales: *const StepScales,
    /// Steps from a block to the next.
    pub steps: usize,
    pub blocks: usize,
    pub space: *mut Space,
    /// `[blocks, PANELS, ROWS, 16]`.
    pub sums: *mut f32,
}

/// A function and the tiles it works with.
pub(super) struct Kernel {
    /// Must be entered before.
    pub config: &'static Config,
    /// # Safety
    /// The CPU has AMX with byte products and AVX-512 with VNNI; the tiles are configured; pointers are valid for the
    /// panels and blocks of the layout, for the scratch memory (initialized) and for the result.
    pub run: unsafe fn(&Work<'_>),
}

/// Tiles 0 to 3 are sums, 4 and 5 rows of activations, 6 and 7 codes of a panel.
const fn config(columns: usize) -> Config {
    let sums = (ROWS as u8, 64);
    let activations = (ROWS as u8, columns as u16);
    let codes = (columns as u8 / 4, 64);
    Config::new([
        sums,
        sums,
        sums,
        sums,
        activations,
        activations,
        codes,
        codes,
    ])
}
static STEPS: Config = config(STEP);
static HALF_STEPS: Config = config(STEP / 2);

impl Kernel {
    /// The kernel for a layout.
    pub fn choose(layout: &Layout) -> Kernel {
        let half_steps = layout.sub() == STEP / 2;
        Kernel {
            config: if half_steps { &HALF_STEPS } else { &STEPS },
            run: body!(layout.codes, half_steps, run),
        }
    }
}

/// # Safety
/// As [`Kernel::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")]
unsafe fn run<U: Unpack, const HALF_STEPS: bool>(work: &Work<'_>) {
    let mut first = 0;
    for unit in (0..work.units.len()).step_by(SPAN_UNITS) {
        // SAFETY: as the caller promised.
        unsafe {
            let steps = unpack::<U, HALF_STEPS>(work, unit);
            multiply::<HALF_STEPS>(work, first, steps);
            first += steps;
        }
    }
}

/// Unpacks the units from number `from` on, and says how many steps they have.
///
/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn unpack<U: Unpack, const HALF_STEPS: bool>(work: &Work<'_>, from: usize) -> usize {
    let mut steps = 0;
    // SAFETY: as the caller promised; units lie in the panels, and there is room for the steps of a span.
    unsafe {
        let space = &mut *work.space;
        let table = match work.layout.codes {
            Codes::Table(table) => Vnni::table(table),
            _ => Vnni::splat(0),
        };
        for index in from..(from + SPAN_UNITS).min(work.units.len()) {
            let (unit, start) = work.units.at(index);
            for step in 0..unit.steps {
                for (p, panel) in work.panels.iter().enumerate() {
                    let base = panel.add(start);
                    let codes = U::unpack::<Vnni>(base.add(unit.planes + step * U::BYTES), table);
                    let to = space.codes[steps][p].as_mut_ptr();
                    for (row, codes) in codes.into_iter().enumerate() {
                        _mm512_store_si512(to.add(row * 64).cast(), codes);
                    }
                    let mut scale = |to: usize, half: usize| {
                        let (scale, min) = scales::<Vnni>(work.layout, &unit, base, 0, step, half);
                        let to = &mut space.scales[to][p];
                        _mm512_store_ps(to.scale.as_mut_ptr(), scale);
                        _mm512_store_ps(to.min.as_mut_ptr(), min);
                    };
                    if HALF_STEPS {
                        scale(2 * steps, 0);
                        scale(2 * steps + 1, 1);
                    } else {
                        scale(steps, BOTH);
                    }
                }
                steps += 1;
            }
        }
    }
    steps
}

/// Adds the products of the unpacked steps, the first of which is step `first` of the rows, to all sums.
///
/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn multiply<const HALF_STEPS: bool>(work: &Work<'_>, first: usize, steps: usize) {
    let per_pair = if HALF_STEPS { 1 } else { 2 };
    let pairs = steps.div_ceil(per_pair);
    // Where the tiles are: block, pair, place in the ring.
    let mut tiles = (0, 0, 0);
    // SAFETY: as the caller promised. A pair's second step may be one that the panels do not have: activations are padded
    // to whole units, codes are left from before, and the sums are not used.
    unsafe {
        let space = work.space;
        let cell =
            |block: usize, pair: usize| (block * work.steps + first + pair * per_pair) * ROWS;
        let mut advance = || {
            let (block, pair, place) = tiles;
            if block < work.blocks {
                let a = work.quants.add(cell(block, pair) * STEP);
                let b = &raw const (*space).codes[pair * per_pair];
                tile_pair::<HALF_STEPS>(a, b.cast(), (&raw mut (*space).ring[place]).cast());
                let last = pair + 1 == pairs;
                tiles = match last {
                    true => (block + 1, 0, (place + 1) % RING),
                    false => (block, pair + 1, (place + 1) % RING),
                };
            }
        };
        for _ in 0..LAG {
            advance();
        }
        let with_min = work.layout.min != Min::Without;
        let zero = _mm512_set1_ps(work.layout.zero() as f32);
        let mut place = 0;
        for block in 0..work.blocks {
            let out = work.sums.add(block * PANELS * ROWS * PANEL);
            if first == 0 {
                store(out, &[[_mm512_setzero_ps(); ROWS]; PANELS]);
            }
            for group in (0..pairs).step_by(GROUP_STEPS / per_pair) {
                let mut sums = [[_mm512_setzero_ps(); ROWS]; PANELS];
                for pair in group..pairs.min(group + GROUP_STEPS / per_pair) {
                    advance();
                    let a = work.scales.add(cell(block, pair));
                    let [one, two] = &(*space).ring[place];
                    let [w_one, w_two] = &(*space).scales.as_chunks::<2>().0[pair];
                    if HALF_STEPS {
                        scaled::<0>(one, w_one, a, zero, with_min, &mut sums);
                        scaled::<1>(two, w_two, a, zero, with_min, &mut sums);
                    } else {
                        scaled::<BOTH>(one, w_one, a, zero, with_min, &mut sums);
                        if 2 * pair + 1 < steps {
                            scaled::<BOTH>(two, w_two, a.add(ROWS), zero, with_min, &mut sums);
                        }
                    }
                    place = (place + 1) % RING;
                }
                add_group(out, &sums, work.scales.add(cell(block, group)));
            }
        }
    }
}

/// Two sums of eight rows and two panels each, `[2, PANELS, ROWS, 16]`: of two steps, or of the halves of one.
///
/// # Safety
/// The tiles are configured for it; `a` and `b` are the first step's.
#[inline(always)]
unsafe fn tile_pair<const HALF_STEPS: bool>(a: *const i8, b: *const u8, sums: *mut i32) {
    let (next_a, next_b) = match HALF_STEPS {
        true => (STEP / 2, STEP / 2 * PANEL),
        false => (STEP * ROWS, STEP * PANEL * PANELS),
    };
    // SAFETY: as the caller promised.
    unsafe {
        asm!(
            "tileloadd tmm4, [{a} + {row}*1]",
            "tileloadd tmm6, [{b} + {wide}*1]",
            "tilezero tmm0",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {wide}*1 + 512]",
            "tilezero tmm1",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{next_a} + {row}*1]",
            "tileloadd tmm6, [{next_b} + {wide}*1]",
            "tilezero tmm2",
            "tdpbsud tmm2, tmm5, tmm6",
            "tileloadd tmm7, [{next_b} + {wide}*1 + 512]",
            "tilezero tmm3",
            "tdpbsud tmm3, tmm5, tmm7",
            "tilestored [{sums} + {wide}*1], tmm0",
            "tilestored [{sums} + {wide}*1 + 512], tmm1",
            "tilestored [{sums} + {wide}*1 + 1024], tmm2",
            "tilestored [{sums} + {wide}*1 + 1536], tmm3",
            a = in(reg) a, b = in(reg) b, next_a = in(reg) a.add(next_a), next_b = in(reg) b.add(next_b),
            sums = in(reg) sums, row = in(reg) STEP, wide = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags)
        );
    }
}

/// Scales the sums of a step, or of half of one, by the weights' scales and adds them to those of their group.
///
/// The zero is subtracted, or the minimum added, for all codes at once. Integers stay below 2^24, where numbers are exact.
///
/// # Safety
/// AVX-512; `a` are the sums of the eight rows.
#[inline(always)]
unsafe fn scaled<const HALF: usize>(
    tiles: &Sums,
    weights: &[Scales; PANELS],
    a: *const StepScales,
    zero: __m512,
    with_min: bool,
    sums: &mut [[__m512; ROWS]; PANELS],
) {
    // SAFETY: as the caller promised.
    unsafe {
        let [w0, w1] = weights;
        let scale = [w0, w1].map(|w| _mm512_load_ps(w.scale.as_ptr()));
        let min = [w0, w1].map(|w| _mm512_load_ps(w.min.as_ptr()));
        // Written out: a loop would keep the sums in memory.
        macro_rules! rows {
            ($do:ident: $($m:literal)*) => {$({
                let quants = _mm512_set1_ps((*a.add($m)).sums[HALF]);
                $do!(0 $m quants);
                $do!(1 $m quants);
            })*};
        }
        macro_rules! number {
            ($p:literal $m:literal) => {
                _mm512_cvtepi32_ps(_mm512_load_si512(tiles[$p][$m].as_ptr().cast()))
            };
        }
        if with_min {
            macro_rules! offset {
                ($p:literal $m:literal $quants:ident) => {{
                    let sum = _mm512_fmadd_ps(number!($p $m), scale[$p], sums[$p][$m]);
                    sums[$p][$m] = _mm512_fmadd_ps(min[$p], $quants, sum);
                }};
            }
            rows!(offset: 0 1 2 3 4 5 6 7);
        } else {
            macro_rules! symmetric {
                ($p:literal $m:literal $quants:ident) => {{
                    let whole = _mm512_fnmadd_ps(zero, $quants, number!($p $m));
                    sums[$p][$m] = _mm512_fmadd_ps(whole, scale[$p], sums[$p][$m]);
                }};
            }
            rows!(symmetric: 0 1 2 3 4 5 6 7);
        }
    }
}

/// Adds the sums of a group, multiplied by the scales of the eight rows.
///
/// # Safety
/// AVX-512; `to` has a block's sums, `a` are the scales of the eight rows.
#[inline(always)]
unsafe fn add_group(to: *mut f32, sums: &[[__m512; ROWS]; PANELS], a: *const StepScales) {
    for (i, sum) in sums.iter().flatten().enumerate() {
        // SAFETY: as the caller promised.
        unsafe {
            let (to, scale) = (to.add(i * PANEL), _mm512_set1_ps((*a.add(i % ROWS)).scale));
            _mm512_store_ps(to, _mm512_fmadd_ps(*sum, scale, _mm512_load_ps(to)));
        }
    }
}

/// # Safety
/// AVX-512; `to` has room for a block's sums.
#[inline(always)]
unsafe fn store(to: *mut f32, sums: &[[__m512; ROWS]; PANELS]) {
    for (i, sum) in sums.iter().flatten().enumerate() {
        // SAFETY: as the caller promised.
        unsafe { _mm512_store_ps(to.add(i * PANEL), *sum) }
    }
}
