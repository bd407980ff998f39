//! Sums over whole buffers, in `f64`, in blocks of a fixed size that are added in order.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::simd::{Simd, SimdElement};
use crate::stream::{Fold, Width, fold};
use crate::tasks::{Tasks, assert_len};
use crate::{Element, reference};

kernels! {
    fn sum_squares_chunk<E>(x: &[E]) -> f64 { scalar: reference::sum_squares, simd: sum_squares_vector }
    fn dot_chunk<E>(x: &[E], y: &[E]) -> f64 { scalar: reference::dot, simd: dot_vector }
    fn count_nonfinite_chunk<E>(x: &[E]) -> usize { scalar: reference::count_nonfinite, simd: count_nonfinite_vector }
}

/// Elements of a block; its sum does not depend on the number of threads, nor does the order of the blocks.
const BLOCK: usize = 64 * 1024;

/// Computes one number a block and returns their sum in order; 0 on a dry pool.
fn sum_of_blocks(
    pool: &Pool,
    len: usize,
    block: impl Fn(std::ops::Range<usize>) -> f64 + Sync,
) -> f64 {
    let tasks = Tasks::blocks(len, BLOCK);
    let mut sums = vec![0.0; tasks.count()];
    let view = SharedMut::new(&mut sums);
    // SAFETY: one element a task.
    pool.run(tasks.count(), |task, _| unsafe {
        view.slice(task, 1)[0] = block(tasks.part(task))
    });
    sums.iter().sum()
}

/// `Σ x²`; 0 on a dry pool. Products and runs of [`RUN`] of them are in the arithmetic type, their sums in `f64`.
pub fn sum_squares<E: Element>(pool: &Pool, x: &[E]) -> f64 {
    let chunk = sum_squares_chunk::<E>(pool.level());
    // SAFETY: the pool's level is supported.
    sum_of_blocks(pool, x.len(), |at| unsafe { chunk(&x[at]) })
}

/// `Σ x y`; 0 on a dry pool. Precision as in [`sum_squares`].
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn dot<E: Element>(pool: &Pool, x: &[E], y: &[E]) -> f64 {
    assert_len("y", y.len(), x.len());
    let chunk = dot_chunk::<E>(pool.level());
    // SAFETY: the pool's level is supported.
    sum_of_blocks(pool, x.len(), |at| unsafe { chunk(&x[at.clone()], &y[at]) })
}

/// How many elements are infinite or NaN; 0 on a dry pool.
pub fn count_nonfinite<E: Element>(pool: &Pool, x: &[E]) -> usize {
    let chunk = count_nonfinite_chunk::<E>(pool.level());
    // SAFETY: the pool's level is supported. A block's count is small enough for `f64`, and so is any sum of them.
    sum_of_blocks(pool, x.len(), |at| unsafe { chunk(&x[at]) as f64 }) as usize
}

/// Products summed in `f32` lanes before they are added in `f64`.
pub const RUN: usize = 1024;

/// Streams that a block is read in: one alone would not use all the memory bandwidth of a core.
const STREAMS: usize = 4;

/// `Σ x y`, in each of the streams.
struct Dot<E> {
    x: *const E,
    y: *const E,
    /// Elements from a stream to the next.
    apart: usize,
}

impl<E: SimdElement> Fold<1> for Dot<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [mut sum]: [S; 1]) -> [S; 1] {
        let mut stream = 0;
        while stream < STREAMS {
            let at = stream * self.apart + i;
            // SAFETY: the caller's promise.
            let (x, y): (S, S) =
                unsafe { (width.load(self.x.add(at)), width.load(self.y.add(at))) };
            sum = x.fma(y, sum);
            stream += 1;
        }
        [sum]
    }
}

/// # Safety
/// The CPU has the features of `S`; the lengths agree.
#[inline(always)]
unsafe fn dot_vector<S: Simd, E: SimdElement>(x: &[E], y: &[E]) -> f64 {
    let apart = x.len() / STREAMS;
    let mut total = 0.0;
    let mut i = 0;
    while i < apart {
        let run = (apart - i).min(RUN / STREAMS);
        // SAFETY: the features are the caller's promise; the last stream ends within the slices.
        let [sum] = unsafe {
            fold::<S, 1, _>(
                run,
                Dot {
                    x: x.as_ptr().add(i),
                    y: y.as_ptr().add(i),
                    apart,
                },
            )
        };
        total += sum.sum() as f64;
        i += run;
    }
    let rest = STREAMS * apart;
    total + reference::dot(&x[rest..], &y[rest..])
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn sum_squares_vector<S: Simd, E: SimdElement>(x: &[E]) -> f64 {
    // SAFETY: the caller's promise.
    unsafe { dot_vector::<S, E>(x, x) }
}

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn count_nonfinite_vector<S: Simd, E: SimdElement>(x: &[E]) -> usize {
    let mut count = 0;
    let mut vectors = x.chunks_exact(S::LANES);
    for lanes in &mut vectors {
        // SAFETY: the features are the caller's promise.
        if !unsafe { E::load_vector::<S>(lanes.as_ptr()) }.all_finite() {
            count += reference::count_nonfinite(lanes);
        }
    }
    count + reference::count_nonfinite(vectors.remainder())
}
