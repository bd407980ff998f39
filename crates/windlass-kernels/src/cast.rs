//! Conversion between storage types.

use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut};
use crate::simd::{Simd, SimdElement};
use crate::stream::{Step, Width, stream};
use crate::tasks::{Tasks, assert_len};
use crate::{DType, Element, reference};

kernels! {
    pub(crate) fn widen_chunk<E>(x: &[E], y: &mut [f32]) -> () { scalar: widen, simd: convert }
    pub(crate) fn narrow_chunk<E>(x: &[f32], y: &mut [E]) -> () { scalar: narrow, simd: convert_back }
}

/// `y = x` in another type, rounded to nearest even (from `f64` to `bf16` by way of `f32`).
///
/// # Panics
/// When the lengths differ.
#[track_caller]
pub fn cast<X: Element, Y: Element>(pool: &Pool, x: &[X], y: &mut [Y]) {
    assert_len("y", y.len(), x.len());
    let y = SharedMut::new(y);
    let tasks = Tasks::elements(x.len());
    let (widen, narrow) = (
        widen_chunk::<X>(pool.level()),
        narrow_chunk::<Y>(pool.level()),
    );
    pool.run(tasks.count(), |task, _| {
        let at = tasks.part(task);
        let x = &x[at.clone()];
        // SAFETY: tasks are disjoint.
        let y = unsafe { y.part(at) };
        match (X::DTYPE, Y::DTYPE) {
            // SAFETY: `DTYPE` identifies the sealed type, so this is a slice of `f32`; the pool's level is supported.
            (_, DType::F32) => unsafe {
                widen(
                    x,
                    std::slice::from_raw_parts_mut(y.as_mut_ptr().cast(), y.len()),
                );
            },
            // SAFETY: as above.
            (DType::F32, _) => unsafe {
                narrow(std::slice::from_raw_parts(x.as_ptr().cast(), x.len()), y)
            },
            _ => reference::cast(x, y),
        }
    });
}

fn widen<E: Element>(x: &[E], y: &mut [f32]) {
    reference::cast(x, y);
}

fn narrow<E: Element>(x: &[f32], y: &mut [E]) {
    reference::cast(x, y);
}

/// `y = x`.
struct Convert<X, Y>(*const X, *mut Y);

impl<X: SimdElement, Y: SimdElement> Step for Convert<X, Y> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        // SAFETY: the caller's promise.
        unsafe { width.store(self.1.add(i), width.load::<S, X>(self.0.add(i))) }
    }
}

/// # Safety
/// The CPU has the features of `S`; the lengths agree.
#[inline(always)]
unsafe fn convert<S: Simd, E: SimdElement>(x: &[E], y: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { stream::<S>(x.len(), Convert(x.as_ptr(), y.as_mut_ptr())) }
}

/// # Safety
/// The CPU has the features of `S`; the lengths agree.
#[inline(always)]
unsafe fn convert_back<S: Simd, E: SimdElement>(x: &[f32], y: &mut [E]) {
    // SAFETY: the caller's promise.
    unsafe { stream::<S>(x.len(), Convert(x.as_ptr(), y.as_mut_ptr())) }
}
