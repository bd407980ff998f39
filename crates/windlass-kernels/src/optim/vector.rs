//! Vector bodies of the optimizer updates, written once for plain and split parameters.
//!
//! SAFETY (all functions): the callers in `optim` check the lengths; the CPU has the features of `S`.

use half::bf16;

use super::{AdamW, AdamWFactors, Lion, LionFactors, Sgd, SgdFactors};
use crate::simd::{Simd, SimdElement};
use crate::stream::{Step, Width, stream};

/// Parameters in memory.
trait Parameters {
    unsafe fn load<S: Simd, W: Width>(&self, i: usize, width: W) -> S;
    unsafe fn store<S: Simd, W: Width>(&self, i: usize, width: W, value: S);
}

struct Plain<E>(*mut E);

impl<E: SimdElement> Parameters for Plain<E> {
    #[inline(always)]
    unsafe fn load<S: Simd, W: Width>(&self, i: usize, width: W) -> S {
        unsafe { width.load(self.0.add(i).cast_const()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, W: Width>(&self, i: usize, width: W, value: S) {
        unsafe { width.store(self.0.add(i), value) }
    }
}

struct Split(*mut bf16, *mut i16);

impl Parameters for Split {
    #[inline(always)]
    unsafe fn load<S: Simd, W: Width>(&self, i: usize, width: W) -> S {
        unsafe { width.load_split(self.0.add(i), self.1.add(i)) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, W: Width>(&self, i: usize, width: W, value: S) {
        unsafe { width.store_split(self.0.add(i), self.1.add(i), value) }
    }
}

struct AdamWStep<P, G, M> {
    p: P,
    g: *const G,
    m: *mut M,
    v: *mut M,
    f: AdamWFactors<f32>,
}

impl<P: Parameters, G: SimdElement, M: SimdElement> Step for AdamWStep<P, G, M> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        let f = &self.f;
        unsafe {
            let g = width.load::<S, G>(self.g.add(i)) * S::splat(f.grad_scale);
            let (m, v): (S, S) = (
                width.load(self.m.add(i).cast_const()),
                width.load(self.v.add(i).cast_const()),
            );
            let m = (g - m).fma(S::splat(f.one_minus_beta1), m);
            let v = (g * g).fma(S::splat(f.one_minus_beta2), v * S::splat(f.beta2));
            let denominator = v.sqrt().fma(S::splat(f.correction), S::splat(f.eps));
            let p: S = self.p.load(i, width);
            let p = (m / denominator).fnma(S::splat(f.step_size), p * S::splat(f.decay));
            width.store(self.m.add(i), m);
            width.store(self.v.add(i), v);
            self.p.store(i, width, p);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn adamw<S: Simd, E: SimdElement>(
    p: &mut [E],
    g: &[E],
    m: &mut [E],
    v: &mut [E],
    rule: &AdamW,
) {
    let op = AdamWStep {
        p: Plain(p.as_mut_ptr()),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        v: v.as_mut_ptr(),
        f: rule.factors(),
    };
    unsafe { stream::<S>(p.len(), op) }
}

#[inline(always)]
pub(super) unsafe fn adamw_split<S: Simd, G: SimdElement>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    v: &mut [f32],
    rule: &AdamW,
) {
    let op = AdamWStep {
        p: Split(hi.as_mut_ptr(), lo.as_mut_ptr()),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        v: v.as_mut_ptr(),
        f: rule.factors(),
    };
    unsafe { stream::<S>(hi.len(), op) }
}

struct SgdStep<P, G, M> {
    p: P,
    g: *const G,
    buffer: Option<*mut M>,
    f: SgdFactors<f32>,
}

impl<P: Parameters, G: SimdElement, M: SimdElement> Step for SgdStep<P, G, M> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        let f = &self.f;
        unsafe {
            let p: S = self.p.load(i, width);
            let g = width.load::<S, G>(self.g.add(i)) * S::splat(f.grad_scale);
            let g = p.fma(S::splat(f.weight_decay), g);
            let mut direction = g;
            if let Some(buffer) = self.buffer {
                if !f.first {
                    let held =
                        width.load::<S, M>(buffer.add(i).cast_const()) * S::splat(f.momentum);
                    direction = g.fma(S::splat(f.one_minus_dampening), held);
                }
                width.store(buffer.add(i), direction);
            }
            if f.nesterov {
                direction = direction.fma(S::splat(f.momentum), g);
            }
            self.p.store(i, width, direction.fnma(S::splat(f.lr), p));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn sgd<S: Simd, E: SimdElement>(
    p: &mut [E],
    g: &[E],
    buffer: &mut [E],
    rule: &Sgd,
) {
    let op = SgdStep {
        p: Plain(p.as_mut_ptr()),
        g: g.as_ptr(),
        buffer: (!buffer.is_empty()).then_some(buffer.as_mut_ptr()),
        f: rule.factors(),
    };
    unsafe { stream::<S>(p.len(), op) }
}

#[inline(always)]
pub(super) unsafe fn sgd_split<S: Simd, G: SimdElement>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    buffer: &mut [f32],
    rule: &Sgd,
) {
    let op = SgdStep {
        p: Split(hi.as_mut_ptr(), lo.as_mut_ptr()),
        g: g.as_ptr(),
        buffer: (!buffer.is_empty()).then_some(buffer.as_mut_ptr()),
        f: rule.factors(),
    };
    unsafe { stream::<S>(hi.len(), op) }
}

struct LionStep<P, G, M> {
    p: P,
    g: *const G,
    m: *mut M,
    f: LionFactors<f32>,
}

impl<P: Parameters, G: SimdElement, M: SimdElement> Step for LionStep<P, G, M> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        let f = &self.f;
        unsafe {
            let g = width.load::<S, G>(self.g.add(i)) * S::splat(f.grad_scale);
            let m: S = width.load(self.m.add(i).cast_const());
            let c = (g - m).fma(S::splat(f.one_minus_beta1), m);
            // Zero and NaN are their own sign.
            let sign = S::select(S::splat(0.0).lt(c.abs()), S::splat(1.0).with_sign_of(c), c);
            let p: S = self.p.load(i, width);
            self.p
                .store(i, width, sign.fnma(S::splat(f.lr), p * S::splat(f.decay)));
            width.store(self.m.add(i), (g - m).fma(S::splat(f.one_minus_beta2), m));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn lion<S: Simd, E: SimdElement>(p: &mut [E], g: &[E], m: &mut [E], rule: &Lion) {
    let op = LionStep {
        p: Plain(p.as_mut_ptr()),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        f: rule.factors(),
    };
    unsafe { stream::<S>(p.len(), op) }
}

#[inline(always)]
pub(super) unsafe fn lion_split<S: Simd, G: SimdElement>(
    hi: &mut [bf16],
    lo: &mut [i16],
    g: &[G],
    m: &mut [f32],
    rule: &Lion,
) {
    let op = LionStep {
        p: Split(hi.as_mut_ptr(), lo.as_mut_ptr()),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        f: rule.factors(),
    };
    unsafe { stream::<S>(hi.len(), op) }
}
