//! The product of panels and rows of activations, one body for all formats and instruction sets.

#![cfg(target_arch = "x86_64")]

mod sums;

use self::sums::{add_products, begin, cell, multiply, scale, scale_whole, subtract_mins};
use super::activations::{BLOCK, BOTH, GROUP, StepScales};
use super::lanes::{Avx2, Lanes, Vnni};
use super::layout::{
    ALIGNED, Codes, Layout, Min, Scale, Unit, Units, WHOLE_16, WHOLE_32, sum_steps,
};
use super::planes::{Names, Planes, Unpack};
use super::{GROUP_STEPS, PANEL, STEP, UNIT, UNIT_STEPS};
use crate::dispatch::Level;
use std::ops::Range;

/// What a tile computes: the sums of `panels x rows` of activations, to `out [panels, rows, 16]`.
pub(super) struct Tile<'a> {
    pub layout: &'a Layout,
    pub units: &'a Units,
    /// First byte of each panel.
    pub panels: &'a [*const u8],
    /// Bytes from a panel to the one that is read after it, wherever that is: a wrapped difference of addresses.
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
    /// Where the sums of integers start so that codes count from the layout's zero: `[parts, rows]`, for the rows from `scales`
    /// on, whose blocks of `block` steps of rows are `height` high.
    pub fn starts(
        &self,
        layout: &Layout,
        scales: &[StepScales],
        (height, block): (usize, usize),
        starts: &mut [i32],
    ) {
        let factor = (self.less - layout.zero()) as f32;
        let (parts, steps) = (layout.parts(), (layout.span() / STEP).max(1));
        for (at, scales) in (0..self.rows).step_by(BLOCK).zip(scales.chunks(block)) {
            let starts = starts.chunks_exact_mut(parts.len() * self.rows);
            for (starts, scales) in starts.zip(scales.chunks(height * steps)) {
                // SAFETY: the kernel was chosen for a CPU with its features.
                unsafe {
                    let starts = &mut starts[at..];
                    (self.start)(factor, parts.clone(), scales, starts, self.rows)
                };
            }
        }
    }
}

/// Of `(factor, parts, scales, starts, pitch)`: the starts of parts of a block's rows, `pitch` from a part to the next.
type Start = unsafe fn(f32, Range<usize>, &[StepScales], &mut [i32], usize);

#[inline(always)]
fn start<const M: usize>(
    factor: f32,
    parts: Range<usize>,
    scales: &[StepScales],
    starts: &mut [i32],
    pitch: usize,
) {
    let Some(scales) = scales.first_chunk::<M>() else {
        return;
    };
    for (starts, part) in starts.chunks_mut(pitch).zip(parts) {
        let starts = starts.first_chunk_mut::<M>().expect("a start of each row");
        for (start, scales) in starts.iter_mut().zip(scales) {
            // SAFETY: both are whole and their product is below 2^24.
            *start = unsafe { (factor * scales.sum(part)).to_int_unchecked() };
        }
    }
}

/// The kernel for a number of rows, at a level with vectors.
pub(super) fn choose(level: Level, layout: &Layout, rows: usize) -> Kernel {
    let (codes, span) = (layout.codes, layout.kind());
    match level {
        Level::Avx512 | Level::Amx if has_vnni() => match rows {
            ..=1 => vnni::<4, 1>(codes, span),
            2 => vnni::<4, 2>(codes, span),
            3..=4 => vnni::<2, 4>(codes, span),
            5..=8 => vnni::<2, 8>(codes, span),
            // Two blocks: a sum waits five cycles for the one before it, and two begin in each.
            _ => vnni::<1, 16>(codes, span),
        },
        _ => match rows {
            ..=1 => avx2::<4, 1>(codes, span),
            2 => avx2::<4, 2>(codes, span),
            _ => avx2::<1, 4>(codes, span),
        },
    }
}

/// Whether AVX-512 has its byte products.
pub(super) fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

/// Scale and minimum of the lanes for a part that begins in step `step`, of a layout without sub-scales.
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
) -> (L::F, L::F) {
    // SAFETY: offsets are those of the layout.
    unsafe {
        let head = step >> unit.group_shift;
        let halves = |at: usize| L::halves(base.add(at + 2 * (head * PANEL + lane)));
        let scale = match layout.scale {
            Scale::Exponent => L::exponents(base.add(head * PANEL + lane)),
            _ => halves(0),
        };
        let none = L::zero();
        let min = match layout.min {
            Min::Without | Min::Super => none,
            Min::Half => halves(unit.mins),
            Min::Zero => {
                let code = L::unsigned(base.add(unit.mins + head * PANEL + lane));
                L::fnma(scale, code, none)
            }
        };
        (scale, min)
    }
}

/// The scales of the lanes for the steps of a unit, as [`align`](super::reference::align) has them.
///
/// # Safety
/// `base` is the unit's first byte; `lane` the first row.
#[inline(always)]
pub(super) unsafe fn aligned<L: Lanes>(
    unit: &Unit,
    base: *const u8,
    lane: usize,
) -> ([L::I; UNIT_STEPS], L::F) {
    // SAFETY: offsets are those of the layout.
    unsafe {
        let mut scales = [L::zero(); UNIT_STEPS];
        let mut largest = L::zero();
        for (scale, step) in scales.iter_mut().zip(0..unit.steps) {
            let head = step >> unit.group_shift;
            *scale = L::halves(base.add(2 * (head * PANEL + lane)));
            largest = L::larger(largest, *scale);
        }
        let (power, inverse) = L::powers(largest);
        let mut factors = [L::splat(0); UNIT_STEPS];
        for (factor, scale) in factors.iter_mut().zip(scales) {
            *factor = L::nearest(L::mul(scale, inverse));
        }
        (factors, power)
    }
}

/// # Safety
/// As [`Kernel::run`].
#[inline(always)]
unsafe fn tile<L: Lanes, U: Unpack, const SPAN: usize, const P: usize, const M: usize>(
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
                for first in (0..unit.steps).step_by(sum_steps(SPAN)) {
                    let steps = first..unit.steps.min(first + sum_steps(SPAN));
                    for p in 0..P {
                        let panel = *work.panels.get_unchecked(p);
                        // Few rows wait for memory, many find the panel in a cache.
                        let ahead = (P > 1 && lane == 0).then(|| panel.wrapping_add(next));
                        let at = index * UNIT_STEPS;
                        let source = Source::<L> {
                            work,
                            unit: &unit,
                            base: panel.add(start),
                            ahead,
                            table,
                            lane,
                            at,
                        };
                        let sums = match SPAN >= UNIT {
                            true => source.whole_sum::<U, SPAN, M>(),
                            false => source.sum::<U, SPAN, M>(steps.clone()),
                        };
                        let a = work.scales.add((at + first) * work.height);
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

/// Where the sums of a tile's rows over steps of a unit come from.
struct Source<'a, L: Lanes> {
    work: &'a Tile<'a>,
    unit: &'a Unit,
    /// The unit's first byte.
    base: *const u8,
    /// That of the unit which is asked for meanwhile, if one is; it need not exist.
    ahead: Option<*const u8>,
    table: L::I,
    /// The first row of the panel.
    lane: usize,
    /// Where the unit begins, in steps.
    at: usize,
}

impl<L: Lanes> Source<'_, L> {
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn codes<U: Unpack>(&self, step: usize) -> [L::I; 8] {
        // SAFETY: as the caller promised.
        unsafe {
            let at = self.unit.planes + step * U::BYTES + 4 * self.lane;
            U::unpack::<L>(self.base.add(at), self.table)
        }
    }

    /// The products of a step, or of half of one.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn products<U: Unpack, const PART: usize, const M: usize>(
        &self,
        step: usize,
        codes: &[L::I; 8],
    ) -> [L::I; M] {
        // SAFETY: as the caller promised.
        unsafe {
            let mut products = begin::<L, PART, M>(self.work, self.at + step);
            multiply::<L, U, PART, M>(self.work, self.at + step, codes, &mut products);
            products
        }
    }

    /// Asks for as much as some steps take.
    #[inline(always)]
    fn prefetch(&self, steps: &Range<usize>) {
        if let Some(ahead) = self.ahead {
            let step = self.unit.bytes / self.unit.steps;
            prefetch(ahead.wrapping_add(steps.start * step), steps.len() * step);
        }
    }

    /// The sums of some steps of a unit, part by part; they lack the scale of the activations.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn sum<U: Unpack, const SPAN: usize, const M: usize>(
        &self,
        steps: Range<usize>,
    ) -> [L::F; M] {
        let Source { work, unit, at, .. } = *self;
        // SAFETY: the features are the caller's promise.
        let mut sums = unsafe { [L::zero(); M] };
        macro_rules! add {
            ($part:expr, $step:expr, $products:expr) => {{
                let weights = scales::<L>(work.layout, unit, self.base, self.lane, $step);
                scale::<L, $part, M>(work, at + $step, &$products, weights, &mut sums);
            }};
        }
        // SAFETY: as the caller promised.
        unsafe {
            for first in steps.clone().step_by(GROUP_STEPS) {
                let steps = first..steps.end.min(first + GROUP_STEPS);
                self.prefetch(&steps);
                if SPAN == STEP {
                    for step in steps {
                        let codes = self.codes::<U>(step);
                        add!(BOTH, step, self.products::<U, BOTH, M>(step, &codes));
                    }
                    continue;
                }
                let mut products = begin::<L, GROUP, M>(work, at + first);
                for step in steps {
                    let codes = self.codes::<U>(step);
                    multiply::<L, U, GROUP, M>(work, at + step, &codes, &mut products);
                }
                add!(GROUP, first, products);
            }
            sums
        }
    }

    /// The sums of a unit whose scales are whole numbers times one; they lack the scale of the activations.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn whole_sum<U: Unpack, const SPAN: usize, const M: usize>(&self) -> [L::F; M] {
        let Source {
            unit, base, lane, ..
        } = *self;
        // SAFETY: as the caller promised.
        unsafe {
            let (mut sums, mut whole) = ([L::zero(); M], [L::splat(0); M]);
            macro_rules! add {
                ($sub:expr, $products:expr) => {{
                    let factor = L::signed(base.add(unit.sub_scales + $sub * PANEL + lane));
                    add_products::<L, true, M>(&$products, factor, &mut whole);
                }};
            }
            let (factors, scale) = match SPAN {
                ALIGNED => aligned::<L>(unit, base, lane),
                _ => ([L::splat(0); UNIT_STEPS], L::halves(base.add(2 * lane))),
            };
            for first in (0..unit.steps).step_by(GROUP_STEPS) {
                let steps = first..unit.steps.min(first + GROUP_STEPS);
                self.prefetch(&steps);
                for step in steps {
                    let codes = self.codes::<U>(step);
                    if SPAN == WHOLE_16 {
                        add!(2 * step, self.products::<U, 0, M>(step, &codes));
                        add!(2 * step + 1, self.products::<U, 1, M>(step, &codes));
                        continue;
                    }
                    let products = self.products::<U, BOTH, M>(step, &codes);
                    if SPAN == WHOLE_32 {
                        add!(step, products);
                    } else {
                        let factor = *factors.get_unchecked(step);
                        add_products::<L, false, M>(&products, factor, &mut whole);
                    }
                }
            }
            scale_whole::<L, M>(&whole, scale, &mut sums);
            if SPAN > UNIT && self.work.layout.min != Min::Without {
                subtract_mins::<L, SPAN, M>(self.work, unit, (base, lane), self.at, &mut sums);
            }
            sums
        }
    }
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

/// The function for a layout: `$run::<Unpack, SPAN, $more>`.
macro_rules! body {
    ($codes:expr, $span:expr, $run:ident $(, $more:tt)*) => {
        match ($codes, $span) {
            (Codes::U2, WHOLE_16) => $run::<Planes<2, 0>, WHOLE_16 $(, $more)*>,
            (Codes::U2, 32) => $run::<Planes<2, 0>, 32 $(, $more)*>,
            (Codes::U2, _) => $run::<Planes<2, 0>, 128 $(, $more)*>,
            (Codes::U3, WHOLE_16) => $run::<Planes<2, 1>, WHOLE_16 $(, $more)*>,
            (Codes::U3, 32) => $run::<Planes<2, 1>, 32 $(, $more)*>,
            (Codes::U3, _) => $run::<Planes<2, 1>, 128 $(, $more)*>,
            (Codes::U4, 32) => $run::<Planes<4, 0>, 32 $(, $more)*>,
            (Codes::U4, 128) => $run::<Planes<4, 0>, 128 $(, $more)*>,
            (Codes::U4, ALIGNED) => $run::<Planes<4, 0>, ALIGNED $(, $more)*>,
            (Codes::U4, WHOLE_32) => $run::<Planes<4, 0>, WHOLE_32 $(, $more)*>,
            (Codes::U5, WHOLE_32) => $run::<Planes<4, 1>, WHOLE_32 $(, $more)*>,
            (Codes::Table(_), WHOLE_32) => $run::<Names, WHOLE_32 $(, $more)*>,
            (Codes::U5, 32) => $run::<Planes<4, 1>, 32 $(, $more)*>,
            (Codes::U5, 128) => $run::<Planes<4, 1>, 128 $(, $more)*>,
            (Codes::U6, _) => $run::<Planes<4, 2>, WHOLE_16 $(, $more)*>,
            (Codes::U8, 32) => $run::<Planes<8, 0>, 32 $(, $more)*>,
            (Codes::U8, 128) => $run::<Planes<8, 0>, 128 $(, $more)*>,
            (Codes::Table(_), 32) => $run::<Names, 32 $(, $more)*>,
            (Codes::Table(_), 128) => $run::<Names, 128 $(, $more)*>,
            (codes, _) => unreachable!("{codes:?}: layouts were checked when they were packed"),
        }
    };
}
pub(super) use body;

macro_rules! level {
    ($name:ident, $lanes:ty, $features:literal) => {
        fn $name<const P: usize, const M: usize>(codes: Codes, span: usize) -> Kernel {
            #[target_feature(enable = $features)]
            unsafe fn run<U: Unpack, const SPAN: usize, const P: usize, const M: usize>(
                work: &Tile<'_>,
            ) {
                // SAFETY: the features are enabled here; the rest is the caller's promise.
                unsafe { tile::<$lanes, U, SPAN, P, M>(work) }
            }
            let run: unsafe fn(&Tile<'_>) = body!(codes, span, run, P, M);
            #[target_feature(enable = $features)]
            unsafe fn starts<const M: usize>(
                factor: f32,
                parts: Range<usize>,
                scales: &[StepScales],
                out: &mut [i32],
                pitch: usize,
            ) {
                match M {
                    BLOCK.. => start::<BLOCK>(factor, parts, scales, out, pitch),
                    _ => start::<M>(factor, parts, scales, out, pitch),
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
