//! A row as 8-bit integers.

use super::super::{GROUP_STEPS, STEP, UNIT, UNIT_STEPS};
use super::StepScales;
use crate::Element;
use crate::dispatch::{Level, kernels};
use crate::simd::{Simd, SimdElement};

/// Rounds a row, its columns in another order where there is one, to row `m` of a block: quants `[steps, height, 32]` of `i8`,
/// scales `[steps, height]`. Columns that the last unit lacks are zero.
///
/// # Safety
/// The level is supported.
pub(super) unsafe fn round_row<E: Element>(
    level: Level,
    row: &[E],
    order: Option<&[u32]>,
    q: &mut [[u8; STEP]],
    s: &mut [StepScales],
    (m, height): (usize, usize),
) {
    let round = rounder::<E>(level);
    let q = q.chunks_mut(UNIT_STEPS * height);
    let units = q.zip(s.chunks_mut(UNIT_STEPS * height));
    for (unit, (q, s)) in units.enumerate() {
        let columns = unit * UNIT..row.len().min((unit + 1) * UNIT);
        let mut ordered;
        let x = match order {
            None => &row[columns],
            Some(order) => {
                let order = &order[columns];
                ordered = [E::from_f64(0.0); UNIT];
                for (to, &from) in ordered.iter_mut().zip(order) {
                    *to = row[from as usize];
                }
                &ordered[..order.len()]
            }
        };
        // SAFETY: the caller's promise.
        unsafe { round(x, q, s, m, height) };
    }
}

kernels! {
    /// Rounds a unit of a row, or the columns that there are of it, to row `m` of a block: quants `[8, height, 32]` of `i8`, scales
    /// `[8, height]`. Every operation is exact or rounded once, so all levels give the same bits.
    fn rounder<E>(
        x: &[E], q: &mut [[u8; STEP]], s: &mut [StepScales], m: usize, height: usize,
    ) -> () {
        scalar: round, simd: round_simd
    }
}

/// The scale of a unit and its inverse, 0 where all quants are zero.
#[inline(always)]
fn scale(largest: f32, finite: bool) -> (f32, f32) {
    let scale = largest / 127.0;
    match finite {
        false => (f32::NAN, 0.0),
        // A scale below the normal numbers has no inverse: such a unit counts as zero.
        true if scale < f32::MIN_POSITIVE => (0.0, 0.0),
        true => (scale, 127.0 / largest),
    }
}

fn round<E: Element>(x: &[E], q: &mut [[u8; STEP]], s: &mut [StepScales], m: usize, height: usize) {
    let mut unit = [0f32; UNIT];
    for (to, x) in unit.iter_mut().zip(x) {
        *to = x.to_f64() as f32;
    }
    let finite = unit.iter().all(|x| x.is_finite());
    let largest = unit.iter().fold(0f32, |most, x| most.max(x.abs()));
    let (scale, inverse) = scale(largest, finite);
    for (step, x) in unit.chunks(STEP).enumerate() {
        let q = &mut q[step * height + m];
        for (q, x) in q.iter_mut().zip(x) {
            *q = (if inverse == 0.0 { 0.0 } else { x * inverse }).round_ties_even() as i8 as u8;
        }
        let sum = |half: &[u8]| half.iter().map(|&q| f32::from(q as i8)).sum::<f32>();
        let (first, second) = q.split_at(STEP / 2);
        let sums = [sum(first), sum(first) + sum(second)];
        set(&mut s[step * height + m], scale, sums);
    }
    sum_groups(s, m, height);
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn round_simd<S: Simd, E: SimdElement>(
    x: &[E],
    q: &mut [[u8; STEP]],
    s: &mut [StepScales],
    m: usize,
    height: usize,
) {
    // SAFETY: loads are inside `x`; a step has 32 quants.
    unsafe {
        let load = |at: usize| match x.len().saturating_sub(at) {
            0 => S::splat(0.0),
            n if n < S::LANES => E::load_vector_partial(x.as_ptr().add(at), n),
            _ => E::load_vector(x.as_ptr().add(at)),
        };
        let zero = S::splat(0.0);
        let (mut largest, mut zeros) = (zero, zero);
        for at in (0..x.len()).step_by(S::LANES) {
            let x: S = load(at);
            largest = x.abs().max(largest);
            // Zero times what is not finite is no number.
            zeros = x.fma(zero, zeros);
        }
        let (scale, inverse) = scale(largest.hmax(), zeros.all_finite());
        for step in 0..UNIT_STEPS {
            let q = &mut q[step * height + m];
            let mut sums = [0f32; 2];
            if inverse == 0.0 {
                q.fill(0);
            } else {
                for (half, sum) in sums.iter_mut().enumerate() {
                    let mut total = zero;
                    for at in (half * STEP / 2..(half + 1) * STEP / 2).step_by(S::LANES) {
                        let rounded = (load(step * STEP + at) * S::splat(inverse)).round();
                        rounded.store_i8(q.as_mut_ptr().add(at).cast());
                        total = total + rounded;
                    }
                    *sum = total.sum();
                }
                sums[1] += sums[0];
            }
            set(&mut s[step * height + m], scale, sums);
        }
    }
    sum_groups(s, m, height);
}

/// Sets what belongs to a step: the sums of its first half and of all of it. That of its group follows from those of all its steps.
#[inline(always)]
fn set(s: &mut StepScales, scale: f32, [first, both]: [f32; 2]) {
    let sums = [first, both, 0.0];
    *s = StepScales { scale, sums };
}

/// The sums of groups, from those of steps.
#[inline(always)]
fn sum_groups(s: &mut [StepScales], m: usize, height: usize) {
    for s in s.chunks_mut(GROUP_STEPS * height) {
        let group = s.iter().skip(m).step_by(height).map(|s| s.sums[1]).sum();
        for s in s.iter_mut().skip(m).step_by(height) {
            s.sums[2] = group;
        }
    }
}
