//! Rotary position embedding: formula as in [`crate::rope`].

use crate::rope::Rope;
use crate::{Element, Float};

/// Rotates the first `shape.rotary` dimensions of every head of every row in place, one row a position.
pub fn rope<E: Element>(x: &mut [E], shape: &Rope, cos: &[f32], sin: &[f32], positions: &[u32]) {
    let pairs = shape.rotary / 2;
    for (r, &position) in positions.iter().enumerate() {
        for h in 0..shape.heads {
            let head = &mut x[r * shape.stride + h * shape.head_dim..][..shape.head_dim];
            for i in 0..pairs {
                let (a, b) = if shape.interleaved {
                    (2 * i, 2 * i + 1)
                } else {
                    (i, i + pairs)
                };
                let angle = position as usize * pairs + i;
                let c = E::Acc::of(cos[angle] as f64);
                let s = E::Acc::of(if shape.inverse {
                    -sin[angle]
                } else {
                    sin[angle]
                } as f64);
                let (xa, xb) = (head[a].load(), head[b].load());
                head[a] = E::store(xa * c - xb * s);
                head[b] = E::store(xb * c + xa * s);
            }
        }
    }
}
