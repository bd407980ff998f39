//! The specification of a packed product, in plain code.

use super::activations::{Activations, GROUP};
use super::layout::{Codes, Layout, Min, Scale, sum_steps};
use super::matrix::PackedMatrix;
use super::unit::{RowUnit, exponent};
use super::{GROUP_STEPS, STEP, UNIT, UNIT_STEPS};
use half::f16;
use std::ops::Range;

/// One element of a product: row `n` of the matrix times row `row` of activations.
///
/// For each sum in order: it is multiplied by the scale of the activations and added, rounded once. Where scales are whole
/// numbers times one for a unit (sub-scales, or what [`align`] makes of the scales of an aligned layout) it is one of a unit:
/// the integer sum of codes, less the layout's zero, times whole numbers times activations, times that scale; less the
/// unit's minimum times the integer sum of sub-minimums times activations, rounded once. Of another layout it is one of
/// [`sum_steps`]: for each part in order (32 columns or 128, as the scales of the weights allow) the integer sum of codes,
/// less the zero, times activations is multiplied by the scale of the weights and added, rounded once; then the minimum
/// times the sum of the activations.
pub(super) fn dot(matrix: &PackedMatrix, n: usize, x: &Activations, row: usize) -> f32 {
    let layout = matrix.layout();
    let mut unit = RowUnit::ZERO;
    let mut total = 0f32;
    for first in (0..matrix.steps()).step_by(sum_steps(layout.kind())) {
        matrix.row_unit(n, first / UNIT_STEPS, &mut unit);
        let steps = first..matrix.steps().min(first + sum_steps(layout.kind()));
        let sum = match layout.kind() {
            UNIT.. => whole_sum(layout, &unit, x, row, steps),
            _ => sum(layout, &unit, x, row, steps),
        };
        total = sum.mul_add(x.step(row, first).1.scale, total);
    }
    total
}

/// The products of some columns of a step.
fn products(layout: &Layout, codes: &[u8], quants: &[i8]) -> i32 {
    let products = codes.iter().zip(quants);
    products
        .map(|(&code, &quant)| value(layout, code) * i32::from(quant))
        .sum()
}

/// The sum of parts.
fn sum(layout: &Layout, unit: &RowUnit, x: &Activations, row: usize, steps: Range<usize>) -> f32 {
    let (mut sum, mut whole) = (0f32, 0i32);
    let part = layout.parts().start;
    for step in steps {
        let at = step % UNIT_STEPS;
        let (quants, a) = x.step(row, step);
        whole += products(layout, &unit.codes[at * STEP..], quants);
        if part == GROUP && (step + 1) % GROUP_STEPS != 0 {
            continue;
        }
        let (scale, min) = scales(layout, unit, at * STEP);
        sum = (whole as f32).mul_add(scale, sum);
        if let Some(min) = min {
            sum = min.mul_add(a.sum(part), sum);
        }
        whole = 0;
    }
    sum
}

/// The sum of a unit whose scales are whole numbers times one.
fn whole_sum(
    layout: &Layout,
    unit: &RowUnit,
    x: &Activations,
    row: usize,
    steps: Range<usize>,
) -> f32 {
    let half = |bits| f16::from_bits(bits).to_f32();
    let columns = layout.sub().min(STEP);
    let (factors, scale) = if layout.aligned() {
        let some = (0..steps.len()).map(|at| scales(layout, unit, at * STEP).0);
        let mut all = [0f32; UNIT_STEPS];
        all.iter_mut().zip(some).for_each(|(to, scale)| *to = scale);
        let (factors, power) = align(all);
        (factors.to_vec(), power)
    } else {
        let factors = unit.sub_scales.map(i32::from);
        (factors.to_vec(), half(unit.scales[0]))
    };
    let (mut whole, mut offset) = (0i32, 0i32);
    for (at, step) in steps.enumerate() {
        let (quants, _) = x.step(row, step);
        let codes = unit.codes[at * STEP..][..STEP].chunks(columns);
        for (part, (codes, quants)) in codes.zip(quants.chunks(columns)).enumerate() {
            let sub = at * STEP / columns + part;
            whole += factors[sub] * products(layout, codes, quants);
            let quants: i32 = quants.iter().map(|&quant| i32::from(quant)).sum();
            offset += i32::from(unit.sub_mins[sub]) * quants;
        }
    }
    let sum = whole as f32 * scale;
    match layout.min {
        Min::Super => (-half(unit.mins[0])).mul_add(offset as f32, sum),
        _ => sum,
    }
}

/// Scales as whole numbers below 2^12 times the same power of two. An `f16` has eleven bits: the largest scale and those of half
/// of it and more are exact; others lose no more than half of the unit.
pub(super) fn align(scales: [f32; UNIT_STEPS]) -> ([i32; UNIT_STEPS], f32) {
    const MANTISSA: u32 = f32::MANTISSA_DIGITS - 1;
    // The smallest `f16`: scales that are all zero need some power, too.
    let smallest = 2f32.powi(-24).to_bits();
    let magnitudes = scales.map(|scale| scale.to_bits() & !(1 << 31));
    let largest = magnitudes.into_iter().fold(0, u32::max);
    let exponent = (largest >> MANTISSA << MANTISSA).max(smallest);
    let power = exponent - (11 << MANTISSA);
    let inverse = f32::from_bits((254 << MANTISSA) - power);
    let power = f32::from_bits(largest).mul_add(0.0, f32::from_bits(power));
    let factors = scales.map(|scale| match power.is_nan() {
        // The product is not a number, whatever it is multiplied by.
        true => 0,
        false => (scale * inverse).round_ties_even() as i32,
    });
    (factors, power)
}

fn value(layout: &Layout, code: u8) -> i32 {
    match layout.codes {
        Codes::Table(table) => i32::from(table[usize::from(code)]),
        _ => i32::from(code) - layout.zero(),
    }
}

/// Scale, and minimum where there is one, at column `k` of a unit without sub-scales.
fn scales(layout: &Layout, unit: &RowUnit, k: usize) -> (f32, Option<f32>) {
    let half = |bits| f16::from_bits(bits).to_f32();
    let head = k / layout.block();
    let scale = match layout.scale {
        Scale::Exponent => exponent(unit.scales[head] as u8),
        _ => half(unit.scales[head]),
    };
    let min = match layout.min {
        Min::Without | Min::Super => None,
        Min::Half => Some(half(unit.mins[head])),
        Min::Zero => Some(-scale * f32::from(unit.mins[head])),
    };
    (scale, min)
}
