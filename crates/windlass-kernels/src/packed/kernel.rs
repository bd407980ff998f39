//! The product of panels and rows of activations, one body for all formats and instruction sets.

#![cfg(target_arch = "x86_64")]

use super::activations::{BLOCK, BOTH, StepScales};
use super::lanes::{Avx2, Lanes, Vnni};
use super::layout::{Codes, Layout, Min, Scale, Unit, Units};
use super::planes::{Names, Planes, Unpack};
use super::{GROUP_STEPS, PANEL, STEP, UNIT_STEPS};
use crate::dispatch::Level;
use std::ops::Range;

/// What a tile computes: the sums of `panels x rows` of activations, to `out [panels, rows, 16]`.
pub(super) struct Tile<'a> {
    pub layout: &'a Layout,
    pub units: &'a Units,
    /// First byte of each panel.
    pub panels: &'a [*const u8],
    /// Bytes from a panel to the one that is read after it.
    pub ahead: usize,
    /// Quants of the first row and step.
    pub quants: *const i8,
    /// Scales of the first row and step.
    pub scales: *const StepScales,
    /// Rows that lie between a step and the next.
    pub height: usize,
    /// Rows of all steps: what lies between a block and the next.
    pub block: usize,
    /// Where the integer sums start, as [`Kernel::starts`] made them.
    pub starts: *const i32,
    pub out: *mut f32,
}

/// A kernel for tiles of a number of panels and rows.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub panels: usize,
    pub rows: usize,
    /// What its products subtract from every byte.
    less: i32,
    start: Start,
    /// # Safety
    /// The CPU has the level's features; pointers are valid for panels and rows of the layout and for the result.
    pub run: unsafe fn(&Tile<'_>),
}

impl Kernel {
    /// Where the sums of integers start so that codes count from the layout's zero: `[steps (, halves), rows]`, for the rows
    /// from `scales` on, whose blocks of `block` steps of rows are `height` high.
    pub fn starts(
        &self,
        layout: &Layout,
        scales: &[StepScales],
        (height, block): (usize, usize),
        starts: &mut [i32],
    ) {
        let factor = (self.less - layout.zero()) as f32;
        for (at, scales) in (0..self.rows).step_by(BLOCK).zip(scales.chunks(block)) {
            let starts = starts.chunks_exact_mut(layout.halves().len() * self.rows);
            for (starts, scales) in starts.zip(scales.chunks(height)) {
                // SAFETY: the kernel was chosen for a CPU with its features.
                unsafe {
                    (self.start)(
                        factor,
                        layout.halves(),
                        scales,
                        &mut starts[at..],
                        self.rows,
                    )
                };
            }
        }
    }
}

/// Of `(factor, halves, scales, starts, pitch)`: the starts of a step of rows in a block, `pitch` from a half to the next.
type Start = unsafe fn(f32, Range<usize>, &[StepScales], &mut [i32], usize);

#[inline(always)]
fn start<const M: usize>(
    factor: f32,
    halves: Range<usize>,
    scales: &[StepScales],
    starts: &mut [i32],
    pitch: usize,
) {
    let Some(scales) = scales.first_chunk::<M>() else {
        return;
    };
    for (starts, half) in starts.chunks_mut(pitch).zip(halves) {
        let starts = starts.first_chunk_mut::<M>().expect("a start of each row");
        for (start, scales) in starts.iter_mut().zip(scales) {
            // SAFETY: both are whole and their product is below 2^24.
            *start = unsafe { (factor * scales.sums[half]).to_int_unchecked() };
        }
    }
}

/// The kernel for a number of rows, at a level with vectors.
pub(super) fn choose(level: Level, codes: Codes, half_steps: bool, rows: usize) -> Kernel {
    match level {
        Level::Avx512 | Level::Amx if has_vnni() => match rows {
            ..=1 => vnni::<4, 1>(codes, half_steps),
            2 => vnni::<4, 2>(codes, half_steps),
            3..=4 => vnni::<2, 4>(codes, half_steps),
            5..=8 => vnni::<2, 8>(codes, half_steps),
            // Two blocks: a sum waits five cycles for the one before it, and two begin in each.
            _ => vnni::<1, 16>(codes, half_steps),
        },
        _ => match rows {
            ..=1 => avx2::<4, 1>(codes, half_steps),
            2 => avx2::<4, 2>(codes, half_steps),
            _ => avx2::<1, 4>(codes, half_steps),
        },
    }
}

/// Whether AVX-512 has its byte products.
pub(super) fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

/// Scale and minimum of the lanes for half `half` of step `step` (`BOTH`: for all of it).
///
/// # Safety
/// `base` is the unit's first byte; `lane` the first row.
#[inline(always)]
pub(super) unsafe fn scales<L: Lanes>(
    layout: &Layout,
    unit: &Unit,
    base: *const u8,
    lane: usize,
    step: usize,
    half: usize,
) -> (L::F, L::F) {
    // SAFETY: offsets are those of the layout.
    unsafe {
        let head = step >> unit.group_shift;
        let sub = match half {
            BOTH => step,
            half => 2 * step + half,
        };
        let halves = |at: usize| L::halves(base.add(at + 2 * (head * PANEL + lane)));
        let scale = match layout.scale {
            Scale::Half { .. } => halves(0),
            Scale::Exponent => L::exponents(base.add(head * PANEL + lane)),
            Scale::Super { .. } => L::mul(
                halves(0),
                L::signed(base.add(unit.sub_scales + sub * PANEL + lane)),
            ),
        };
        let none = L::zero();
        let min = match layout.min {
            Min::Without => none,
            Min::Half => halves(unit.mins),
            Min::Zero => {
                let code = L::unsigned(base.add(unit.mins + head * PANEL + lane));
                L::fnma(scale, code, none)
            }
            Min::Super => {
                let sub = L::unsigned(base.add(unit.sub_mins + sub * PANEL + lane));
                L::fnma(halves(unit.mins), sub, none)
            }
        };
        (scale, min)
    }
}

/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn tile<L: Lanes, U: Unpack, const HALF_STEPS: bool, const P: usize, const M: usize>(
    work: &Tile<'_>,
) {
    // SAFETY: as the caller promised.
    unsafe {
        let table = match work.layout.codes {
            Codes::Table(table) => L::table(table),
            _ => L::splat(0),
        };
        for lane in (0..PANEL).step_by(L::N) {
            for row in 0..P * M {
                L::store(L::zero(), work.out.add(row * PANEL + lane));
            }
            for index in 0..work.units.len() {
                let (unit, start) = work.units.at(index);
                // The next unit, or the first one of the panel that follows.
                let next = match index + 1 < work.units.len() {
                    true => start + unit.bytes,
                    false => work.ahead,
                };
                for first in (0..unit.steps).step_by(GROUP_STEPS) {
                    let steps = first..unit.steps.min(first + GROUP_STEPS);
                    let at = index * UNIT_STEPS + first;
                    for p in 0..P {
                        let panel = *work.panels.get_unchecked(p);
                        // Few rows wait for memory, many find the panel in a cache.
                        if P > 1 && lane == 0 {
                            let part = unit.bytes / unit.steps;
                            let from = panel.wrapping_add(next + first * part);
                            prefetch(from, steps.len() * part);
                        }
                        let base = panel.add(start);
                        let mut sums = [L::zero(); M];
                        for step in steps.clone() {
                            let codes = base.add(unit.planes + step * U::BYTES + 4 * lane);
                            let codes = U::unpack::<L>(codes, table);
                            let at = index * UNIT_STEPS + step;
                            if HALF_STEPS {
                                let w = scales::<L>(work.layout, &unit, base, lane, step, 0);
                                add::<L, U, 0, M>(work, at, &codes, w, &mut sums);
                                let w = scales::<L>(work.layout, &unit, base, lane, step, 1);
                                add::<L, U, 1, M>(work, at, &codes, w, &mut sums);
                            } else {
                                let w = scales::<L>(work.layout, &unit, base, lane, step, BOTH);
                                add::<L, U, BOTH, M>(work, at, &codes, w, &mut sums);
                            }
                        }
                        let a = work.scales.add(at * work.height);
                        for (m, sum) in sums.iter().enumerate() {
                            let out = work.out.add((p * M + m) * PANEL + lane);
                            let scale = L::broadcast(&(*a.add(cell(work, m))).scale);
                            L::store(L::fma(*sum, scale, L::load(out)), out);
                        }
                    }
                }
            }
        }
    }
}

/// Where row `m` of a tile lies from its first one, in rows.
#[inline(always)]
fn cell(work: &Tile<'_>, m: usize) -> usize {
    m / BLOCK * work.block + m % BLOCK
}

/// The quants of a step in a tile's one or two blocks, each address in a register of its own: the compiler would make them of
/// a base and an index that others share, and a product that reads its operand by an index is two operations.
#[inline(always)]
fn quants(work: &Tile<'_>, step: usize) -> [*const i8; 2] {
    [0, work.block].map(|at| {
        let mut address = work.quants.wrapping_add((step * work.height + at) * STEP);
        // SAFETY: nothing is done.
        unsafe {
            std::arch::asm!("/* {0} */", inout(reg) address, options(pure, readonly, nostack, preserves_flags));
        }
        address
    })
}

/// Asks for the next `bytes` bytes, which need not exist.
#[inline(always)]
fn prefetch(from: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for at in (0..bytes).step_by(64) {
        // SAFETY: prefetching reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at).cast()) }
    }
}

/// Adds a step, or half of one, to the sums of all rows, which lack the scale of the activations.
///
/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn add<L: Lanes, U: Unpack, const HALF: usize, const M: usize>(
    work: &Tile<'_>,
    step: usize,
    codes: &[L::I; 8],
    (scale, min): (L::F, L::F),
    sums: &mut [L::F; M],
) {
    // SAFETY: as the caller promised.
    unsafe {
        let quants = quants(work, step);
        let a = work.scales.add(step * work.height);
        let starts = work.starts.add(match HALF {
            BOTH => step * M,
            half => (2 * step + half) * M,
        });
        let mut products = [L::splat(0); M];
        // Written out: loops would keep their sums in memory. Rows go side by side, for a chain of sums has a latency.
        macro_rules! all {
            ($do:ident) => { all!($do: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
            ($do:ident: $($m:literal)*) => {$( if $m < M { $do!($m); } )*};
        }
        #[rustfmt::skip]
        macro_rules! start { ($m:literal) => { products[$m] = L::splat(*starts.add($m)) } }
        all!(start);
        macro_rules! column {
            ($j:literal) => {{
                macro_rules! multiply {
                    ($m:literal) => {{
                        let a = quants[$m / BLOCK].add($m % BLOCK * STEP + 4 * $j);
                        products[$m] = match U::WIDE {
                            true => L::dot_wide(products[$m], codes[$j], a),
                            false => L::dot(products[$m], codes[$j], a),
                        };
                    }};
                }
                all!(multiply);
            }};
        }
        if HALF != 1 {
            column!(0);
            column!(1);
            column!(2);
            column!(3);
        }
        if HALF != 0 {
            column!(4);
            column!(5);
            column!(6);
            column!(7);
        }
        macro_rules! scaled {
            ($m:literal) => {
                sums[$m] = L::fma(L::number(products[$m]), scale, sums[$m])
            };
        }
        all!(scaled);
        if work.layout.min != Min::Without {
            macro_rules! offset {
                ($m:literal) => {
                    sums[$m] = L::fma(
                        min,
                        L::broadcast(&(*a.add(cell(work, $m))).sums[HALF]),
                        sums[$m],
                    )
                };
            }
            all!(offset);
        }
    }
}

/// The function for a layout: `$run::<Unpack, HALF_STEPS, $more>`.
macro_rules! body {
    ($codes:expr, $half_steps:expr, $run:ident $(, $more:tt)*) => {
        match ($codes, $half_steps) {
            (Codes::U2, false) => $run::<Planes<2, 0>, false $(, $more)*>,
            (Codes::U2, true) => $run::<Planes<2, 0>, true $(, $more)*>,
            (Codes::U3, false) => $run::<Planes<2, 1>, false $(, $more)*>,
            (Codes::U3, true) => $run::<Planes<2, 1>, true $(, $more)*>,
            (Codes::U4, false) => $run::<Planes<4, 0>, false $(, $more)*>,
            (Codes::U5, false) => $run::<Planes<4, 1>, false $(, $more)*>,
            (Codes::U6, true) => $run::<Planes<4, 2>, true $(, $more)*>,
            (Codes::U8, false) => $run::<Planes<8, 0>, false $(, $more)*>,
            (Codes::Table(_), false) => $run::<Names, false $(, $more)*>,
            (codes, _) => unreachable!("{codes:?}: layouts were checked when they were packed"),
        }
    };
}
pub(super) use body;

macro_rules! level {
    ($name:ident, $lanes:ty, $features:literal) => {
        fn $name<const P: usize, const M: usize>(codes: Codes, half_steps: bool) -> Kernel {
            #[target_feature(enable = $features)]
            unsafe fn run<U: Unpack, const HALF_STEPS: bool, const P: usize, const M: usize>(
                work: &Tile<'_>,
            ) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { tile::<$lanes, U, HALF_STEPS, P, M>(work) }
            }
            let run: unsafe fn(&Tile<'_>) = body!(codes, half_steps, run, P, M);
            #[target_feature(enable = $features)]
            unsafe fn starts<const M: usize>(
                factor: f32,
                halves: Range<usize>,
                scales: &[StepScales],
                out: &mut [i32],
                pitch: usize,
            ) {
                match M {
                    BLOCK.. => start::<BLOCK>(factor, halves, scales, out, pitch),
                    _ => start::<M>(factor, halves, scales, out, pitch),
                }
            }
            let wide = matches!(codes, Codes::U8 | Codes::Table(_));
            Kernel {
                panels: P,
                rows: M,
                start: starts::<M>,
                less: if wide && <$lanes>::SIGNED { 128 } else { 0 },
                run,
            }
        }
    };
}

level!(avx2, Avx2, "avx2,fma,f16c");
level!(
    vnni,
    Vnni,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma"
);
