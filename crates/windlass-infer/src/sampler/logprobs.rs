//! Log-probabilities of tokens by the model itself, before all settings.

/// How likely a token was.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// The likeliest tokens, as many as were asked for, with theirs; of equals the lower id first.
    pub top: Vec<(u32, f64)>,
}

use super::weights::{best, sum, weigh};

/// `log softmax(logits)` of a token and of the `top` likeliest ones. Where the logits are no distribution, all are NaN.
///
/// # Panics
/// When the token has no logit.
#[track_caller]
pub fn token_logprobs(logits: &[f32], token: u32, top: usize) -> TokenLogprobs {
    let mut weights = Vec::new();
    let norm = best(logits).map_or(f64::NAN, |(_, largest)| {
        weigh(logits, largest, 1.0, &mut weights);
        f64::from(largest) + sum(&weights).ln()
    });
    let logprob = |id: u32| f64::from(logits[id as usize]) - norm;
    TokenLogprobs {
        token,
        logprob: logprob(token),
        top: likeliest(logits, top)
            .into_iter()
            .map(|id| (id, logprob(id)))
            .collect(),
    }
}

/// The `count` greatest logits' ids, in descending order, of equals the lower id first.
fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    let mut found: Vec<u32> = Vec::with_capacity(count + 1);
    if count == 0 {
        return found;
    }
    let mut floor = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if found.len() == count && logit <= floor {
            continue;
        }
        let place = found.partition_point(|&other| logits[other as usize] >= logit);
        found.insert(place, id as u32);
        found.truncate(count);
        if let (true, Some(&last)) = (found.len() == count, found.last()) {
            floor = logits[last as usize];
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_a_full_sort() {
        let mut rng = windlass_tensor::Rng::new(5);
        for count in [1, 2, 7, 100, 1000] {
            // Few values, so that many are equal.
            let logits: Vec<f32> = (0..count).map(|_| rng.below(50) as f32 / 8.0).collect();
            let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
            let mut ids: Vec<u32> = (0..count).collect();
            ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            for top in [0, 1, 5, 20, 2000] {
                let token = rng.below(u64::from(count)) as u32;
                let got = token_logprobs(&logits, token, top);
                let expected = |id: u32| f64::from(logits[id as usize]) - sum.ln();
                assert!((got.logprob - expected(token)).abs() < 1e-6);
                let order: Vec<u32> = got.top.iter().map(|&(id, _)| id).collect();
                assert_eq!(order, ids[..top.min(ids.len())], "{top} of {count}");
                assert!(
                    got.top
                        .iter()
                        .all(|&(id, p)| (p - expected(id)).abs() < 1e-6)
                );
            }
        }
    }
}
