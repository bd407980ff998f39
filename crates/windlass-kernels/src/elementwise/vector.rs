//! Vector bodies of the element by element operations and of row sums.
//!
//! SAFETY (all functions): the callers check the lengths; the CPU has the features of `S`.

use crate::simd::{Simd, SimdElement};
use crate::stream::{Column, Step, Width, columns, stream};

/// `y = a + b`, or `y = a b` if `PRODUCT`.
struct Binary<E, const PRODUCT: bool>(*const E, *const E, *mut E);

impl<E: SimdElement, const PRODUCT: bool> Step for Binary<E, PRODUCT> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (a, b): (S, S) = (width.load(self.0.add(i)), width.load(self.1.add(i)));
            width.store(self.2.add(i), if PRODUCT { a * b } else { a + b });
        }
    }
}

#[inline(always)]
pub(super) unsafe fn add<S: Simd, E: SimdElement>(a: &[E], b: &[E], y: &mut [E]) {
    unsafe {
        stream::<S>(
            a.len(),
            Binary::<E, false>(a.as_ptr(), b.as_ptr(), y.as_mut_ptr()),
        )
    }
}

#[inline(always)]
pub(super) unsafe fn mul<S: Simd, E: SimdElement>(a: &[E], b: &[E], y: &mut [E]) {
    unsafe {
        stream::<S>(
            a.len(),
            Binary::<E, true>(a.as_ptr(), b.as_ptr(), y.as_mut_ptr()),
        )
    }
}

/// `y = a x`.
struct Scale<E>(f32, *const E, *mut E);

impl<E: SimdElement> Step for Scale<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe { width.store(self.2.add(i), S::splat(self.0) * width.load(self.1.add(i))) }
    }
}

#[inline(always)]
pub(crate) unsafe fn scale<S: Simd, E: SimdElement>(a: f32, x: &[E], y: &mut [E]) {
    unsafe { stream::<S>(x.len(), Scale(a, x.as_ptr(), y.as_mut_ptr())) }
}

#[inline(always)]
pub(super) unsafe fn scale_in_place<S: Simd, E: SimdElement>(a: f32, x: &mut [E]) {
    unsafe { stream::<S>(x.len(), Scale(a, x.as_ptr(), x.as_mut_ptr())) }
}

/// `y += a x`.
struct Axpy<X, Y>(f32, *const X, *mut Y);

impl<X: SimdElement, Y: SimdElement> Step for Axpy<X, Y> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (x, y): (S, S) = (
                width.load(self.1.add(i)),
                width.load(self.2.add(i).cast_const()),
            );
            width.store(self.2.add(i), x.fma(S::splat(self.0), y));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn axpy<S: Simd, E: SimdElement>(a: f32, x: &[E], y: &mut [E]) {
    unsafe { stream::<S>(x.len(), Axpy(a, x.as_ptr(), y.as_mut_ptr())) }
}

/// As [`axpy`], into the arithmetic type.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd, E: SimdElement>(a: f32, x: &[E], y: &mut [f32]) {
    unsafe { stream::<S>(x.len(), Axpy(a, x.as_ptr(), y.as_mut_ptr())) }
}

/// `sum += x`.
struct ColumnSum<E> {
    x: *const E,
    cols: usize,
}

impl<E: SimdElement> Column<1> for ColumnSum<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(
        &self,
        r: usize,
        c: usize,
        width: W,
        [sum]: [S; 1],
    ) -> [S; 1] {
        [sum + unsafe { width.load(self.x.add(r * self.cols + c)) }]
    }
    #[inline(always)]
    fn address(&self, r: usize, c: usize) -> [*const u8; 2] {
        [self.x.wrapping_add(r * self.cols + c).cast(); 2]
    }
}

#[inline(always)]
pub(super) unsafe fn sum_rows<S: Simd, E: SimdElement>(
    x: &[E],
    cols: usize,
    start: usize,
    sums: &mut [f32],
) {
    unsafe {
        let op = ColumnSum {
            x: x.as_ptr().add(start.min(x.len())),
            cols,
        };
        columns::<S, 1>(x.len() / cols, sums.len(), [sums.as_mut_ptr()], op);
    }
}
