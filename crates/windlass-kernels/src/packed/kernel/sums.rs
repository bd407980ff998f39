//! What is done with the sums of integers of a tile's rows.

use super::super::activations::{BLOCK, BOTH, GROUP};
use super::super::lanes::Lanes;
use super::super::layout::{Min, Unit, WHOLE_32};
use super::super::planes::Unpack;
use super::super::{GROUP_STEPS, PANEL, STEP};
use super::Tile;

/// Where row `m` of a tile lies from its first one, in rows.
#[inline(always)]
pub(super) fn cell(work: &Tile<'_>, m: usize) -> usize {
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

/// Does something for each row of a tile. Written out: loops would keep their sums in memory.
macro_rules! rows {
    ($do:ident) => { rows!($do: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    ($do:ident: $($m:literal)*) => {$( if $m < M { $do!($m); } )*};
}

/// Where the sums of the part that begins in a step start.
///
/// # Safety
/// As [`super::Kernel::run`].
#[inline(always)]
pub(super) unsafe fn begin<L: Lanes, const PART: usize, const M: usize>(
    work: &Tile<'_>,
    step: usize,
) -> [L::I; M] {
    // SAFETY: as the caller promised.
    unsafe {
        let starts = work.starts.add(match PART {
            GROUP => step / GROUP_STEPS * M,
            BOTH => step * M,
            half => (2 * step + half) * M,
        });
        let mut products = [L::splat(0); M];
        #[rustfmt::skip]
        macro_rules! start { ($m:literal) => { products[$m] = L::splat(*starts.add($m)) } }
        rows!(start);
        products
    }
}

/// Adds the products of a step, or of half of one.
///
/// # Safety
/// As [`super::Kernel::run`].
#[inline(always)]
pub(super) unsafe fn multiply<L: Lanes, U: Unpack, const PART: usize, const M: usize>(
    work: &Tile<'_>,
    step: usize,
    codes: &[L::I; 8],
    products: &mut [L::I; M],
) {
    // SAFETY: as the caller promised.
    unsafe {
        let quants = quants(work, step);
        // Rows go side by side, for a chain of sums has a latency.
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
                rows!(multiply);
            }};
        }
        if PART != 1 {
            column!(0);
            column!(1);
            column!(2);
            column!(3);
        }
        if PART != 0 {
            column!(4);
            column!(5);
            column!(6);
            column!(7);
        }
    }
}

/// Adds a part of a step or more to the sums of all rows, which lack the scale of the activations.
///
/// # Safety
/// As [`super::Kernel::run`].
#[inline(always)]
pub(super) unsafe fn scale<L: Lanes, const PART: usize, const M: usize>(
    work: &Tile<'_>,
    step: usize,
    products: &[L::I; M],
    (scale, min): (L::F, L::F),
    sums: &mut [L::F; M],
) {
    // SAFETY: as the caller promised.
    unsafe {
        macro_rules! scaled {
            ($m:literal) => {
                sums[$m] = L::fma(L::number(products[$m]), scale, sums[$m])
            };
        }
        rows!(scaled);
        if work.layout.min != Min::Without {
            let a = work.scales.add(step * work.height);
            macro_rules! offset {
                ($m:literal) => {{
                    let sum = (*a.add(cell(work, $m))).sum(PART);
                    sums[$m] = L::fma(min, L::broadcast(&sum), sums[$m])
                }};
            }
            rows!(offset);
        }
    }
}

/// Adds the sums of a step or of half of one, each times the whole number of its lane: `WIDE`, where they may not have 16 bits.
///
/// # Safety
/// As [`super::Kernel::run`].
#[inline(always)]
pub(super) unsafe fn add_products<L: Lanes, const WIDE: bool, const M: usize>(
    products: &[L::I; M],
    factor: L::I,
    whole: &mut [L::I; M],
) {
    macro_rules! add {
        ($m:literal) => {
            whole[$m] = match WIDE {
                true => L::add_wide_product(whole[$m], products[$m], factor),
                false => L::add_product(whole[$m], products[$m], factor),
            }
        };
    }
    // SAFETY: as the caller promised.
    unsafe {
        rows!(add);
    }
}

/// Whole numbers times the scales of their lanes.
///
/// # Safety
/// As [`super::Kernel::run`].
#[inline(always)]
pub(super) unsafe fn scale_whole<L: Lanes, const M: usize>(
    whole: &[L::I; M],
    scale: L::F,
    sums: &mut [L::F; M],
) {
    #[rustfmt::skip]
    macro_rules! scaled { ($m:literal) => { sums[$m] = L::mul(L::number(whole[$m]), scale) } }
    // SAFETY: as the caller promised.
    unsafe {
        rows!(scaled);
    }
}

/// Subtracts the minimum of the unit that begins at step `at` times the sum of sub-minimums times quants, a whole number below
/// 2^24.
///
/// # Safety
/// As [`super::Kernel::run`]; `base` is the unit's first byte, and it has sub-minimums.
#[inline(always)]
pub(super) unsafe fn subtract_mins<L: Lanes, const SPAN: usize, const M: usize>(
    work: &Tile<'_>,
    unit: &Unit,
    (base, lane): (*const u8, usize),
    at: usize,
    sums: &mut [L::F; M],
) {
    // SAFETY: as the caller promised.
    unsafe {
        let mut offsets = [L::zero(); M];
        macro_rules! add {
            ($sub:expr, $step:expr, $part:expr) => {{
                let min = L::unsigned(base.add(unit.sub_mins + $sub * PANEL + lane));
                let a = work.scales.add((at + $step) * work.height);
                macro_rules! offset {
                    ($m:literal) => {{
                        let sum = (*a.add(cell(work, $m))).sum($part);
                        offsets[$m] = L::fma(min, L::broadcast(&sum), offsets[$m])
                    }};
                }
                rows!(offset);
            }};
        }
        for step in 0..unit.steps {
            if SPAN == WHOLE_32 {
                add!(step, step, BOTH);
            } else {
                add!(2 * step, step, 0);
                add!(2 * step + 1, step, 1);
            }
        }
        let min = L::halves(base.add(unit.mins + 2 * lane));
        #[rustfmt::skip]
        macro_rules! subtract { ($m:literal) => { sums[$m] = L::fnma(min, offsets[$m], sums[$m]) } }
        rows!(subtract);
    }
}
