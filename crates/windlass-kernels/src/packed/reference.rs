//! The specification of a packed product, in plain code.

use super::activations::{Activations, BOTH, GROUP};
use super::layout::{Codes, Layout, Min, Scale};
use super::matrix::PackedMatrix;
use super::unit::{RowUnit, exponent};
use super::{GROUP_STEPS, STEP, UNIT_STEPS};
use half::f16;

/// One element of a product: row `n` of the matrix times row `row` of activations.
///
/// Of an aligned layout: the scales of the steps of a unit become [whole numbers times a power of two](align); the integer
/// sum of each step is multiplied by its whole number, the sum of these by the power of two. Of another layout:
/// for each part of a unit in order (16 columns, 32 or 128, as the scales of the weights allow): the integer sum of
/// codes, less the layout's zero, times activations is multiplied by the scale of the weights and added to the sum of its
/// unit, rounded once; then the minimum times the sum of the activations. For each unit in order: its sum is multiplied by
/// the scale of the activations and added, rounded once.
pub(super) fn dot(matrix: &PackedMatrix, n: usize, x: &Activations, row: usize) -> f32 {
    let layout = matrix.layout();
    let mut unit = RowUnit::ZERO;
    let (mut total, mut sum, mut products) = (0f32, 0f32, 0i32);
    let (mut factors, mut power, mut whole) = ([0; UNIT_STEPS], 0f32, 0i32);
    for step in 0..matrix.steps() {
        if step % UNIT_STEPS == 0 {
            matrix.row_unit(n, step / UNIT_STEPS, &mut unit);
        }
        let at = step % UNIT_STEPS;
        let (quants, a) = x.step(row, step);
        for part in layout.parts() {
            let columns = match part {
                BOTH | GROUP => 0..STEP,
                half => half * 16..half * 16 + 16,
            };
            for k in columns.clone() {
                products += value(layout, unit.codes[at * STEP + k]) * i32::from(quants[k]);
            }
            if part == GROUP && (step + 1) % GROUP_STEPS != 0 {
                continue;
            }
            if layout.aligned() {
                if at == 0 {
                    let mut some = [0f32; UNIT_STEPS];
                    let steps = UNIT_STEPS.min(matrix.steps() - step);
                    for (at, scale) in some[..steps].iter_mut().enumerate() {
                        *scale = scales(layout, &unit, at * STEP).0;
                    }
                    (factors, power) = align(some);
                    whole = 0;
                }
                whole += factors[at] * products;
                sum = whole as f32 * power;
                products = 0;
                continue;
            }
            let (scale, min) = scales(layout, &unit, at * STEP + columns.start);
            sum = (products as f32).mul_add(scale, sum);
            if let Some(min) = min {
                sum = min.mul_add(a.sum(part), sum);
            }
            products = 0;
        }
        if at + 1 == UNIT_STEPS || step + 1 == matrix.steps() {
            total = sum.mul_add(a.scale, total);
            sum = 0.0;
        }
    }
    total
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

/// Scale, and minimum where there is one, at column `k` of a unit.
fn scales(layout: &Layout, unit: &RowUnit, k: usize) -> (f32, Option<f32>) {
    let half = |bits| f16::from_bits(bits).to_f32();
    let (head, sub) = (k / layout.block(), k / layout.sub());
    let scale = match layout.scale {
        Scale::Half { .. } => half(unit.scales[head]),
        Scale::Exponent => exponent(unit.scales[head] as u8),
        Scale::Super { .. } => half(unit.scales[head]) * f32::from(unit.sub_scales[sub]),
    };
    let min = match layout.min {
        Min::Without => None,
        Min::Half => Some(half(unit.mins[head])),
        Min::Zero => Some(-scale * f32::from(unit.mins[head])),
        Min::Super => Some(-half(unit.mins[head]) * f32::from(unit.sub_mins[sub])),
    };
    (scale, min)
}
