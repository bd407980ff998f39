//! Vector bodies of the optimizer updates.
//!
//! SAFETY (all functions): the callers in `optim` check the lengths; the CPU has the features of `S`.

use half::bf16;

use super::rule::{AdagradFactors, AdamFactors, Factors, LionFactors, SgdFactors};
use super::{LambFactors, MuonFactors};
use crate::simd::{Simd, SimdElement};
use crate::stream::{Fold, Step, Width, fold, prefetch, stream};

/// The streams of an update.
struct Streams<F> {
    p: *mut f32,
    g: *const f32,
    m: *mut f32,
    v: *mut f32,
    f: F,
}

/// Split masters.
pub(super) struct Halves(pub *mut bf16, pub *mut i16);

/// Elements fetched ahead: half a page, which the hardware's own fetching stops at the end of.
pub(super) const AHEAD: usize = 512;

impl<F> Streams<F> {
    /// Asks for what is read some steps later.
    #[inline(always)]
    fn fetch(&self, i: usize) {
        for from in [self.p.cast_const(), self.g, self.m, self.v] {
            prefetch(from.wrapping_add(i + AHEAD).cast());
        }
    }
}

/// Makes the bodies of updates that a [`Step`] over their streams describes.
macro_rules! updates {
    ($($name:ident = $variant:ident;)*) => {$(
        #[inline(always)]
        pub(super) unsafe fn $name<S: Simd>(
            f: &Factors<f32>,
            p: &mut [f32],
            g: &[f32],
            m: &mut [f32],
            v: &mut [f32],
        ) -> [f64; 2] {
            let Factors::$variant(f) = *f else {
                unreachable!("the kernel is chosen by the factors");
            };
            let len = p.len();
            let (p, g, m, v) = (p.as_mut_ptr(), g.as_ptr(), m.as_mut_ptr(), v.as_mut_ptr());
            unsafe { stream::<S>(len, Streams { p, g, m, v, f }) };
            [0.0; 2]
        }
    )*};
}

updates! {
    adam = Adam;
    adagrad = Adagrad;
    lion = Lion;
    lamb_apply = LambApply;
    muon = Muon;
}

/// Adam on vectors: the new value and moments.
#[inline(always)]
unsafe fn adam_step<S: Simd>(f: &AdamFactors<f32>, p: S, g: S, m: S, v: S) -> [S; 3] {
    unsafe {
        let g = p.fma(S::splat(f.l2), g * S::splat(f.grad_scale));
        let m = (g - m).fma(S::splat(f.one_minus_beta1), m);
        let v = (g * g).fma(S::splat(f.one_minus_beta2), v * S::splat(f.beta2));
        let denominator = v.sqrt().fma(S::splat(f.correction), S::splat(f.eps));
        let p = (m / denominator).fnma(S::splat(f.step_size), p * S::splat(f.decay));
        [p, m, v]
    }
}

impl Step for Streams<AdamFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        unsafe {
            let p: S = width.load(self.p.add(i).cast_const());
            let g: S = width.load(self.g.add(i));
            let m: S = width.load(self.m.add(i).cast_const());
            let v: S = width.load(self.v.add(i).cast_const());
            let [p, m, v] = adam_step(&self.f, p, g, m, v);
            width.store(self.m.add(i), m);
            width.store(self.v.add(i), v);
            width.store(self.p.add(i), p);
        }
    }
}

/// Adam on split masters: the common case, without copies.
struct AdamSplit<G> {
    p: Halves,
    g: *const G,
    m: *mut f32,
    v: *mut f32,
    f: AdamFactors<f32>,
}

impl<G: SimdElement> Step for AdamSplit<G> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        prefetch(self.p.0.wrapping_add(i + 2 * AHEAD).cast());
        prefetch(self.p.1.wrapping_add(i + 2 * AHEAD).cast());
        prefetch(self.g.wrapping_add(i + AHEAD).cast());
        prefetch(self.m.wrapping_add(i + AHEAD).cast());
        prefetch(self.v.wrapping_add(i + AHEAD).cast());
        unsafe {
            let p: S = width.load_split(self.p.0.add(i), self.p.1.add(i));
            let g: S = width.load(self.g.add(i));
            let m: S = width.load(self.m.add(i).cast_const());
            let v: S = width.load(self.v.add(i).cast_const());
            let [p, m, v] = adam_step(&self.f, p, g, m, v);
            width.store(self.m.add(i), m);
            width.store(self.v.add(i), v);
            width.store_split(self.p.0.add(i), self.p.1.add(i), p);
        }
    }
}

#[inline(always)]
unsafe fn adam_split<S: Simd, G: SimdElement>(
    f: &Factors<f32>,
    high: &mut [bf16],
    low: &mut [i16],
    g: &[G],
    m: &mut [f32],
    v: &mut [f32],
) {
    let Factors::Adam(f) = *f else {
        unreachable!("the kernel is chosen by the factors");
    };
    let op = AdamSplit {
        p: Halves(high.as_mut_ptr(), low.as_mut_ptr()),
        g: g.as_ptr(),
        m: m.as_mut_ptr(),
        v: v.as_mut_ptr(),
        f,
    };
    unsafe { stream::<S>(high.len(), op) }
}

#[inline(always)]
pub(super) unsafe fn adam_split_f32<S: Simd>(
    f: &Factors<f32>,
    high: &mut [bf16],
    low: &mut [i16],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    unsafe { adam_split::<S, f32>(f, high, low, g, m, v) }
}

#[inline(always)]
pub(super) unsafe fn adam_split_bf16<S: Simd>(
    f: &Factors<f32>,
    high: &mut [bf16],
    low: &mut [i16],
    g: &[bf16],
    m: &mut [f32],
    v: &mut [f32],
) {
    unsafe { adam_split::<S, bf16>(f, high, low, g, m, v) }
}

impl Step for Streams<AdagradFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        let f = &self.f;
        unsafe {
            let p: S = width.load(self.p.add(i).cast_const());
            let g = width.load::<S, f32>(self.g.add(i)) * S::splat(f.grad_scale);
            let g = p.fma(S::splat(f.l2), g);
            let s: S = width.load(self.m.add(i).cast_const());
            let s = g.fma(g, s);
            let p = (g / (s.sqrt() + S::splat(f.eps))).fnma(S::splat(f.lr), p);
            width.store(self.m.add(i), s);
            width.store(self.p.add(i), p);
        }
    }
}

impl Step for Streams<LionFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        let f = &self.f;
        unsafe {
            let g = width.load::<S, f32>(self.g.add(i)) * S::splat(f.grad_scale);
            let m: S = width.load(self.m.add(i).cast_const());
            let c = (g - m).fma(S::splat(f.one_minus_beta1), m);
            // Zero and NaN are their own sign.
            let sign = S::select(S::splat(0.0).lt(c.abs()), S::splat(1.0).with_sign_of(c), c);
            let p: S = width.load(self.p.add(i).cast_const());
            let p = sign.fnma(S::splat(f.lr), p * S::splat(f.decay));
            width.store(self.p.add(i), p);
            width.store(self.m.add(i), (g - m).fma(S::splat(f.one_minus_beta2), m));
        }
    }
}

/// SGD; without a buffer where `m` is null.
impl Step for Streams<SgdFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        let f = &self.f;
        unsafe {
            let p: S = width.load(self.p.add(i).cast_const());
            let g = width.load::<S, f32>(self.g.add(i)) * S::splat(f.grad_scale);
            let g = p.fma(S::splat(f.weight_decay), g);
            let mut direction = g;
            if !self.m.is_null() {
                if !f.first {
                    let held: S = width.load(self.m.add(i).cast_const());
                    let held = held * S::splat(f.momentum);
                    direction = g.fma(S::splat(f.one_minus_dampening), held);
                }
                width.store(self.m.add(i), direction);
            }
            if f.nesterov {
                direction = direction.fma(S::splat(f.momentum), g);
            }
            width.store(self.p.add(i), direction.fnma(S::splat(f.lr), p));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn sgd<S: Simd>(
    f: &Factors<f32>,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) -> [f64; 2] {
    let Factors::Sgd(f) = *f else {
        unreachable!("the kernel is chosen by the factors");
    };
    let len = p.len();
    let buffer = if m.is_empty() {
        std::ptr::null_mut()
    } else {
        m.as_mut_ptr()
    };
    let streams = Streams {
        p: p.as_mut_ptr(),
        g: g.as_ptr(),
        m: buffer,
        v: v.as_mut_ptr(),
        f,
    };
    unsafe { stream::<S>(len, streams) };
    [0.0; 2]
}

/// LAMB's update before the trust ratio.
#[inline(always)]
unsafe fn lamb_update<S: Simd>(f: &LambFactors<f32>, p: S, m: S, v: S) -> S {
    unsafe {
        let denominator = v.sqrt().fma(S::splat(f.correction2), S::splat(f.eps));
        let ratio = m * S::splat(f.correction1) / denominator;
        p.fma(S::splat(f.weight_decay), ratio)
    }
}

impl Fold<2> for Streams<LambFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, held: [S; 2]) -> [S; 2] {
        self.fetch(i);
        let f = &self.f;
        unsafe {
            let p: S = width.load(self.p.add(i).cast_const());
            let g = width.load::<S, f32>(self.g.add(i)) * S::splat(f.grad_scale);
            let m: S = width.load(self.m.add(i).cast_const());
            let v: S = width.load(self.v.add(i).cast_const());
            let m = (g - m).fma(S::splat(f.one_minus_beta1), m);
            let v = (g * g).fma(S::splat(f.one_minus_beta2), v * S::splat(f.beta2));
            width.store(self.m.add(i), m);
            width.store(self.v.add(i), v);
            let update = lamb_update(f, p, m, v);
            [p.fma(p, held[0]), update.fma(update, held[1])]
        }
    }
}

#[inline(always)]
pub(super) unsafe fn lamb_moments<S: Simd>(
    f: &Factors<f32>,
    p: &mut [f32],
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) -> [f64; 2] {
    let Factors::LambMoments(f) = *f else {
        unreachable!("the kernel is chosen by the factors");
    };
    let len = p.len();
    let (p, g, m, v) = (p.as_mut_ptr(), g.as_ptr(), m.as_mut_ptr(), v.as_mut_ptr());
    let sums = unsafe { fold::<S, 2, _>(len, Streams { p, g, m, v, f }) };
    sums.map(|sum| sum.sum() as f64)
}

impl Step for Streams<LambFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        unsafe {
            let p: S = width.load(self.p.add(i).cast_const());
            let m: S = width.load(self.m.add(i).cast_const());
            let v: S = width.load(self.v.add(i).cast_const());
            let update = lamb_update(&self.f, p, m, v);
            width.store(self.p.add(i), update.fnma(S::splat(self.f.step_size), p));
        }
    }
}

impl Step for Streams<MuonFactors<f32>> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        self.fetch(i);
        let f = &self.f;
        unsafe {
            let g = width.load::<S, f32>(self.g.add(i)) * S::splat(f.grad_scale);
            let m: S = width.load(self.m.add(i).cast_const());
            let m = (g - m).fma(S::splat(f.one_minus_momentum), m);
            width.store(self.m.add(i), m);
            width.store(self.p.add(i), (m - g).fma(S::splat(f.ahead), g));
        }
    }
}
