//! Rotary position embedding, in place.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::simd::{Simd, SimdElement};
use crate::stream::{Step, Width, stream};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

kernels! {
    fn rope_chunk<E>(x: &mut [E], shape: &Rope, cos: &[f32], sin: &[f32], positions: &[u32]) -> () { scalar: reference::rope, simd: rope_vector }
}

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
    let chunk = rope_chunk::<E>(pool.level());
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

/// Rotates `(low, high)` by an angle of cosine `cos` and sine `sign * sin`.
struct Rotate<E> {
    low: *mut E,
    high: *mut E,
    cos: *const f32,
    sin: *const f32,
    sign: f32,
}

impl<E: SimdElement> Step for Rotate<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        // SAFETY: the caller's promise.
        unsafe {
            let (a, b): (S, S) = (
                width.load(self.low.add(i).cast_const()),
                width.load(self.high.add(i).cast_const()),
            );
            let cos: S = width.load(self.cos.add(i));
            let sin = width.load::<S, f32>(self.sin.add(i)) * S::splat(self.sign);
            width.store(self.low.add(i), b.fnma(sin, a * cos));
            width.store(self.high.add(i), a.fma(sin, b * cos));
        }
    }
}

/// # Safety
/// The CPU has the features of `S`; lengths were checked by [`rope`].
#[inline(always)]
unsafe fn rope_vector<S: Simd, E: SimdElement>(
    x: &mut [E],
    shape: &Rope,
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
) {
    if shape.interleaved {
        // Neighbors in a vector would have to be exchanged; few models ask for it.
        return reference::rope(x, shape, cos, sin, positions);
    }
    let pairs = shape.rotary / 2;
    let sign = if shape.inverse { -1.0 } else { 1.0 };
    for (r, &position) in positions.iter().enumerate() {
        let angles = position as usize * pairs;
        for h in 0..shape.heads {
            // SAFETY: the lengths were checked, and positions lie in the tables.
            unsafe {
                let low = x.as_mut_ptr().add(r * shape.stride + h * shape.head_dim);
                let (cos, sin) = (cos.as_ptr().add(angles), sin.as_ptr().add(angles));
                stream::<S>(
                    pairs,
                    Rotate {
                        low,
                        high: low.add(pairs),
                        cos,
                        sin,
                        sign,
                    },
                );
            }
        }
    }
}
