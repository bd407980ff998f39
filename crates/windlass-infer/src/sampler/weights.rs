//! Passes over a whole row of scores. A vocabulary is large and a step reads many rows, so the loops are written for
//! vectors: lanes in a fixed order, no call and no branch inside. Bits do not depend on the machine.

use crate::InferError;

const LANES: usize = 16;

/// The lowest id with the greatest score, and that score.
pub(super) fn best(scores: &[f32]) -> Result<(u32, f32), InferError> {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let (whole, rest) = scores.as_chunks::<LANES>();
    let rest = rest.iter().enumerate();
    for chunk in whole {
        for (lane, &score) in chunk.iter().enumerate() {
            lanes[lane] = if score > lanes[lane] {
                score
            } else {
                lanes[lane]
            };
            bad[lane] |= score.is_nan() | (score == f32::INFINITY);
        }
    }
    for (lane, &score) in rest {
        lanes[lane] = if score > lanes[lane] {
            score
        } else {
            lanes[lane]
        };
        bad[lane] |= score.is_nan() | (score == f32::INFINITY);
    }
    if bad.contains(&true) {
        let wrong = |score: &&f32| score.is_nan() || **score == f32::INFINITY;
        let token = scores.iter().position(|score| wrong(&score));
        let token = token.expect("a lane has seen one");
        return Err(InferError::BadLogit {
            token: token as u32,
            value: scores[token],
        });
    }
    let most = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    match scores.iter().position(|&score| score == most) {
        Some(token) if most > f32::NEG_INFINITY => Ok((token as u32, most)),
        _ => Err(InferError::NoToken {
            vocabulary: scores.len(),
        }),
    }
}

/// Fills `weights` with `exp((score - best) * sharpness)`: 1 for the best score, 0 for −∞ and what is below `e^-87`.
pub(super) fn weigh(scores: &[f32], best: f32, sharpness: f64, weights: &mut Vec<f32>) {
    let best = f64::from(best);
    weights.clear();
    weights.extend(scores.iter().map(|&score| {
        let exponent = (f64::from(score) - best) * sharpness;
        exp(exponent as f32)
    }));
}

/// Their sum, in lanes.
pub(super) fn sum(weights: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = weights.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &weight) in chunk.iter().enumerate() {
            lanes[lane] += f64::from(weight);
        }
    }
    let rest = rest.iter().map(|&weight| f64::from(weight));
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}

/// `e^x` for `x <= 0` within two units in the last place, 0 below −87.
fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = x - power * LN2_HIGH - power * LN2_LOW;
    let mut poly = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        poly = poly * r + coefficient;
    }
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { poly * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_exponential() {
        let scores: Vec<f32> = (0..90_000).map(|at| -(at as f32) / 1000.0).collect();
        let mut weights = Vec::new();
        weigh(&scores, 0.0, 1.0, &mut weights);
        for (score, weight) in scores.iter().zip(&weights) {
            let expected = f64::from(*score).exp();
            let off = (f64::from(*weight) / expected - 1.0).abs();
            assert!(
                off < 3e-7 || *score < -87.0 && *weight == 0.0,
                "{score}: {weight}"
            );
        }
        let exact: f64 = weights.iter().map(|&w| f64::from(w)).sum();
        assert!((sum(&weights) / exact - 1.0).abs() < 1e-13);
        for (sharpness, scores) in [
            (f64::MAX, [0.0, f32::MAX, f32::MIN, f32::NEG_INFINITY]),
            (1e-300, [f32::NEG_INFINITY, 3.0, 3.0, 2.0]),
        ] {
            weigh(&scores, scores[1], sharpness, &mut weights);
            let expected: [f32; 4] = match sharpness > 1.0 {
                true => [0.0, 1.0, 0.0, 0.0],
                false => [0.0, 1.0, 1.0, 1.0],
            };
            assert_eq!(weights, expected, "{sharpness}");
        }
    }
}
