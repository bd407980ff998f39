//! Rotary position embedding, in place.

use crate::pool::{Pool, SharedMut};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

/// What [`rope`] rotates and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Elements from one row (token) to the next.
    pub stride: usize,
    /// Heads of a row, one after another.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Leading elements of a head that are rotated; the others stay.
    pub rotary: usize,
    /// Pairs are `(2i, 2i + 1)` if set, else `(i, i + rotary / 2)`.
    pub interleaved: bool,
    /// Rotate back: the gradient.
    pub inverse: bool,
}

/// Rotates pair `i` of every head of row `t` by the angle of `(positions[t], i)`, in place:
/// `(a, b) → (a cos - b sin, b cos + a sin)`; by the opposite angle if `shape.inverse`.
///
/// # Shapes
/// `x`: row `t`, head `h` at `x[t * stride + h * head_dim..]`, `positions.len()` rows, of which the last may end after
/// its heads; `cos`, `sin`: `[max_position, rotary / 2]`.
///
/// # Panics
/// When `x` is too short, `rotary` is odd or larger than `head_dim`, the tables differ in length, or a position lies
/// beyond them.
///
/// # Source
/// Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.
#[track_caller]
pub fn rope<E: Element>(
    pool: &Pool,
    x: &mut [E],
    shape: &Rope,
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
) {
    let Rope {
        stride,
        heads,
        head_dim,
        rotary,
        ..
    } = *shape;
    let (rows, width, pairs) = (positions.len(), heads * head_dim, rotary / 2);
    assert!(
        rotary.is_multiple_of(2) && rotary <= head_dim,
        "cannot rotate {rotary} of {head_dim} dimensions in pairs"
    );
    assert!(
        width <= stride || rows <= 1,
        "rows of {heads} x {head_dim} overlap at stride {stride}"
    );
    assert_len("sin", sin.len(), cos.len());
    if rows == 0 || pairs == 0 || heads == 0 {
        return;
    }
    let end = (rows - 1) * stride + width;
    assert!(
        x.len() >= end,
        "x has {} elements, {rows} rows at stride {stride} have {end}",
        x.len()
    );
    let known = cos.len() / pairs;
    if !pool.is_dry() {
        let last = *positions.iter().max().expect("there are rows") as usize;
        assert!(
            last < known,
            "position {last} lies beyond the {known} positions of the rotary table"
        );
    }
    let chunk = reference::rope::<E>;
    let x = SharedMut::new(x);
    let tasks = Tasks::rows(rows, width);
    pool.run(tasks.count(), |task, _| {
        let rows = tasks.part(task);
        let len = (rows.len() - 1) * stride + width;
        // SAFETY: the pool's level is supported, tasks have disjoint rows.
        unsafe {
            chunk(
                x.slice(rows.start * stride, len),
                shape,
                cos,
                sin,
                &positions[rows],
            )
        }
    });
}
