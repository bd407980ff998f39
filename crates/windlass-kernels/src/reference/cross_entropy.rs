//! Cross entropy of logit rows: formula as in [`crate::cross_entropy`].

use super::softmax::max_and_sum;
use crate::cross_entropy::IGNORED;
use crate::{Element, Float};

/// `loss = ln Σ e^z - z[target]` with `z = softcap tanh(logits / softcap)`, or the logits themselves; and the gradient
/// `(softmax(z) - onehot(target)) (1 - tanh²) scale`. `logits` hold `z` afterwards.
pub fn cross_entropy_rows<E: Element>(
    logits: &mut [E::Acc],
    cols: usize,
    softcap: Option<f32>,
    targets: &[i64],
    loss: &mut [E::Acc],
    mut dlogits: Option<(&mut [E], f32)>,
) {
    let cap = softcap.map(|cap| E::Acc::of(cap as f64));
    for (r, &target) in targets.iter().enumerate() {
        let mut d = dlogits
            .as_mut()
            .map(|(d, scale)| (&mut d[r * cols..][..cols], E::Acc::of(*scale as f64)));
        if target == IGNORED {
            loss[r] = E::Acc::ZERO;
            if let Some((d, _)) = d {
                d.fill(E::default());
            }
            continue;
        }
        let z = &mut logits[r * cols..][..cols];
        if let Some(cap) = cap {
            z.iter_mut().for_each(|z| *z = (*z / cap).tanh() * cap);
        }
        let (max, sum) = max_and_sum(z);
        loss[r] = sum.ln() - (z[target as usize] - max);
        if let Some((d, scale)) = &mut d {
            for (c, (d, &z)) in d.iter_mut().zip(&*z).enumerate() {
                let hit = if c == target as usize {
                    E::Acc::ONE
                } else {
                    E::Acc::ZERO
                };
                let slope = cap.map_or(E::Acc::ONE, |cap| E::Acc::ONE - (z / cap) * (z / cap));
                *d = E::store(((z - max).exp() / sum - hit) * slope * *scale);
            }
        }
    }
}
