//! The pass over stored values, gradients and moments: an update is computed on tiles in `f32`, which are the storage
//! itself where that is `f32`, else a copy in the first cache.

use std::ops::Range;

use half::{bf16, f16};

use super::rule::Factors;
use super::state::{BLOCK, Grad, Moment, Values};
use super::{convert, vector};
use crate::cast::{narrow_chunk, widen_chunk};
use crate::dispatch::{Level, vector_kernels};

/// Elements of a tile: whole blocks of 8-bit codes; the copies fill a sixth of the first cache.
const TILE: usize = 2 * BLOCK;

/// One step on `p`, `g` and up to two moments, in `f32`; sums of squares for LAMB.
type Update = unsafe fn(&Factors<f32>, &mut [f32], &[f32], &mut [f32], &mut [f32]) -> [f64; 2];

vector_kernels! {
    fn adam(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::adam }
    fn adam_split_f32(f: &Factors<f32>, high: &mut [bf16], low: &mut [i16], g: &[f32], m: &mut [f32], v: &mut [f32]) -> () { vector::adam_split_f32 }
    fn adam_split_bf16(f: &Factors<f32>, high: &mut [bf16], low: &mut [i16], g: &[bf16], m: &mut [f32], v: &mut [f32]) -> () { vector::adam_split_bf16 }
    fn adagrad(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::adagrad }
    fn lion(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::lion }
    fn sgd(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::sgd }
    fn lamb_moments(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::lamb_moments }
    fn lamb_apply(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::lamb_apply }
    fn muon(f: &Factors<f32>, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) -> [f64; 2] { vector::muon }
    fn join(high: &[bf16], low: &[i16], to: &mut [f32]) -> () { convert::join }
    fn split(from: &[f32], high: &mut [bf16], low: &mut [i16]) -> () { convert::split }
    fn decode_signed(codes: &[u8], scale: f32, to: &mut [f32]) -> () { convert::decode_signed }
    fn decode_unsigned(codes: &[u8], scale: f32, to: &mut [f32]) -> () { convert::decode_unsigned }
    fn encode_signed(from: &[f32], codes: &mut [u8]) -> f32 { convert::encode_signed }
    fn encode_unsigned(from: &[f32], codes: &mut [u8]) -> f32 { convert::encode_unsigned }
}

/// One step of Adam on split masters with a gradient in `G`.
type AdamSplit<G> = unsafe fn(&Factors<f32>, &mut [bf16], &mut [i16], &[G], &mut [f32], &mut [f32]);
/// Values of the codes of a block times its scale.
type Decode = unsafe fn(&[u8], f32, &mut [f32]);
/// Codes of the values of a block; returns its scale.
type Encode = unsafe fn(&[f32], &mut [u8]) -> f32;

/// The functions of a level, for one kind of update.
pub(super) struct Kernels {
    update: Update,
    /// Where the update is Adam.
    adam_split: Option<(AdamSplit<f32>, AdamSplit<bf16>)>,
    join: unsafe fn(&[bf16], &[i16], &mut [f32]),
    split: unsafe fn(&[f32], &mut [bf16], &mut [i16]),
    widen_half: unsafe fn(&[f16], &mut [f32]),
    halve: unsafe fn(&[f32], &mut [f16]),
    widen: unsafe fn(&[bf16], &mut [f32]),
    narrow: unsafe fn(&[f32], &mut [bf16]),
    /// Of first and second moments.
    decode: [Decode; 2],
    encode: [Encode; 2],
}

impl Kernels {
    /// `None` at the scalar level.
    pub fn choose(level: Level, factors: &Factors<f32>) -> Option<Kernels> {
        let update = match factors {
            Factors::Adam(_) => adam(level),
            Factors::Adagrad(_) => adagrad(level),
            Factors::Lion(_) => lion(level),
            Factors::Sgd(_) => sgd(level),
            Factors::LambMoments(_) => lamb_moments(level),
            Factors::LambApply(_) => lamb_apply(level),
            Factors::Muon(_) => muon(level),
        };
        let adam_split = match factors {
            Factors::Adam(_) => adam_split_f32(level).zip(adam_split_bf16(level)),
            _ => None,
        };
        Some(Kernels {
            update: update?,
            adam_split,
            join: join(level)?,
            split: split(level)?,
            widen_half: widen_chunk::<f16>(level),
            halve: narrow_chunk::<f16>(level),
            widen: widen_chunk::<bf16>(level),
            narrow: narrow_chunk::<bf16>(level),
            decode: [decode_signed(level)?, decode_unsigned(level)?],
            encode: [encode_signed(level)?, encode_unsigned(level)?],
        })
    }

    /// Updates all elements, whose numbers agree.
    ///
    /// # Safety
    /// The CPU supports the level that was chosen for.
    pub unsafe fn run(
        &self,
        factors: &Factors<f32>,
        values: &mut Values<'_>,
        mut grad: Option<&mut Grad<'_>>,
        moments: &mut [Moment<'_>],
    ) -> [f64; 2] {
        // SAFETY: the caller's promise.
        if unsafe { self.run_split(factors, values, &mut grad, moments) } {
            return [0.0; 2];
        }
        let len = values.len();
        let plain = matches!(values, Values::F32(_))
            && matches!(grad, None | Some(Grad::F32(_)))
            && moments.iter().all(|m| matches!(m, Moment::F32(_)))
            && !matches!(factors, Factors::LambMoments(_));
        let tile = if plain { len } else { TILE };
        let mut copies = [[0.0; TILE]; 4];
        let [p_copy, g_copy, states @ ..] = &mut copies;
        let [m_copy, v_copy] = states;
        let mut sums = [0.0; 2];
        let mut start = 0;
        while start < len {
            let at = start..(start + tile).min(len);
            start = at.end;
            // SAFETY (all): the caller's promise; the lengths agree.
            unsafe {
                let [first, second] = split_moments(moments);
                let m = self.open_moment(0, first, &at, m_copy);
                let v = self.open_moment(1, second, &at, v_copy);
                let g = self.open_grad(grad.as_deref(), &at, g_copy);
                let p = self.open_values(values, &at, p_copy);
                let sum = (self.update)(factors, p, g, m, v);
                (sums[0], sums[1]) = (sums[0] + sum[0], sums[1] + sum[1]);
                if factors.writes_values() {
                    self.close_values(values, &at, p_copy);
                }
                if factors.writes_moments() {
                    for (i, moment) in moments.iter_mut().enumerate() {
                        self.close_moment(i, moment, &at, [&*m_copy, &*v_copy][i]);
                    }
                }
            }
            match grad.as_deref_mut() {
                Some(Grad::TakeF32(g)) => g[at].fill(0.0),
                Some(Grad::TakeBf16(g)) => g[at].fill(bf16::ZERO),
                Some(Grad::TakeF16(g)) => g[at].fill(f16::ZERO),
                _ => {}
            }
        }
        sums
    }

    /// Runs the case that training meets most, split masters with `f32` moments, without copies; `false` where it is
    /// another case.
    ///
    /// # Safety
    /// As [`Kernels::run`], for all below.
    unsafe fn run_split(
        &self,
        factors: &Factors<f32>,
        values: &mut Values<'_>,
        grad: &mut Option<&mut Grad<'_>>,
        moments: &mut [Moment<'_>],
    ) -> bool {
        let (Some((wide, narrow)), Values::Split { high, low }) = (self.adam_split, values) else {
            return false;
        };
        let ([Moment::F32(m), Moment::F32(v)], Some(grad)) = (moments, grad) else {
            return false;
        };
        let tile = match grad {
            Grad::F32(_) | Grad::Bf16(_) => high.len(),
            // Cleared while it is in the first cache.
            Grad::TakeF32(_) | Grad::TakeBf16(_) => TILE,
            Grad::F16(_) | Grad::TakeF16(_) | Grad::F64(_) => return false,
        };
        let mut start = 0;
        while start < high.len() {
            let at = start..(start + tile).min(high.len());
            start = at.end;
            let (high, low) = (&mut high[at.clone()], &mut low[at.clone()]);
            let (m, v) = (&mut m[at.clone()], &mut v[at.clone()]);
            // SAFETY (all): the caller's promise; the lengths agree.
            match grad {
                Grad::F32(g) => unsafe { wide(factors, high, low, &g[at], m, v) },
                Grad::Bf16(g) => unsafe { narrow(factors, high, low, &g[at], m, v) },
                Grad::TakeF32(g) => {
                    unsafe { wide(factors, high, low, &g[at.clone()], m, v) };
                    g[at].fill(0.0);
                }
                Grad::TakeBf16(g) => {
                    unsafe { narrow(factors, high, low, &g[at.clone()], m, v) };
                    g[at].fill(bf16::ZERO);
                }
                Grad::F16(_) | Grad::TakeF16(_) | Grad::F64(_) => unreachable!("refused above"),
            }
        }
        true
    }

    #[inline(always)]
    unsafe fn open_values<'a>(
        &self,
        values: &'a mut Values<'_>,
        at: &Range<usize>,
        copy: &'a mut [f32; TILE],
    ) -> &'a mut [f32] {
        match values {
            Values::F32(p) => &mut p[at.clone()],
            Values::Half { master, .. } => &mut master[at.clone()],
            Values::Split { high, low } => {
                let copy = &mut copy[..at.len()];
                // SAFETY: the caller's promise.
                unsafe { (self.join)(&high[at.clone()], &low[at.clone()], copy) };
                copy
            }
            Values::F64(_) => unreachable!("refused for single precision"),
        }
    }

    #[inline(always)]
    unsafe fn close_values(&self, values: &mut Values<'_>, at: &Range<usize>, copy: &[f32; TILE]) {
        // SAFETY (both): the caller's promise.
        match values {
            Values::Split { high, low } => unsafe {
                let (high, low) = (&mut high[at.clone()], &mut low[at.clone()]);
                (self.split)(&copy[..at.len()], high, low);
            },
            Values::Half { low, master } => unsafe {
                (self.halve)(&master[at.clone()], &mut low[at.clone()]);
            },
            Values::F32(_) | Values::F64(_) => {}
        }
    }

    #[inline(always)]
    unsafe fn open_grad<'a>(
        &self,
        grad: Option<&'a Grad<'_>>,
        at: &Range<usize>,
        copy: &'a mut [f32; TILE],
    ) -> &'a [f32] {
        let Some(grad) = grad else { return &[] };
        let wide = match grad {
            Grad::F32(g) => return &g[at.clone()],
            Grad::TakeF32(g) => return &g[at.clone()],
            _ => &mut copy[..at.len()],
        };
        // SAFETY (all): the caller's promise.
        match grad {
            Grad::Bf16(g) => unsafe { (self.widen)(&g[at.clone()], wide) },
            Grad::TakeBf16(g) => unsafe { (self.widen)(&g[at.clone()], wide) },
            Grad::F16(g) => unsafe { (self.widen_half)(&g[at.clone()], wide) },
            Grad::TakeF16(g) => unsafe { (self.widen_half)(&g[at.clone()], wide) },
            Grad::F32(_) | Grad::TakeF32(_) | Grad::F64(_) => {
                unreachable!("read where they lie, or refused for single precision")
            }
        }
        wide
    }

    #[inline(always)]
    unsafe fn open_moment<'a>(
        &self,
        index: usize,
        moment: Option<&'a mut Moment<'_>>,
        at: &Range<usize>,
        copy: &'a mut [f32; TILE],
    ) -> &'a mut [f32] {
        let copy = match moment {
            None => return &mut [],
            Some(Moment::F32(m)) => return &mut m[at.clone()],
            _ => &mut copy[..at.len()],
        };
        match moment {
            None | Some(Moment::F32(_)) => {}
            // SAFETY (both): the caller's promise.
            Some(Moment::Bf16(m)) => unsafe { (self.widen)(&m[at.clone()], copy) },
            Some(Moment::Q8 { codes, scales }) => {
                let blocks = codes[at.clone()].chunks(BLOCK).zip(copy.chunks_mut(BLOCK));
                for ((codes, copy), &scale) in blocks.zip(&scales[at.start / BLOCK..]) {
                    unsafe { (self.decode[index])(codes, scale, copy) };
                }
            }
            Some(Moment::F64(_)) => unreachable!("refused for single precision"),
        }
        copy
    }

    #[inline(always)]
    unsafe fn close_moment(
        &self,
        index: usize,
        moment: &mut Moment<'_>,
        at: &Range<usize>,
        copy: &[f32; TILE],
    ) {
        match moment {
            Moment::F32(_) | Moment::F64(_) => {}
            // SAFETY (both): the caller's promise.
            Moment::Bf16(m) => unsafe { (self.narrow)(&copy[..at.len()], &mut m[at.clone()]) },
            Moment::Q8 { codes, scales } => {
                let copies = copy[..at.len()].chunks(BLOCK);
                let blocks = codes[at.clone()].chunks_mut(BLOCK).zip(copies);
                for ((codes, copy), scale) in blocks.zip(&mut scales[at.start / BLOCK..]) {
                    *scale = unsafe { (self.encode[index])(copy, codes) };
                }
            }
        }
    }
}

/// The first and the second moment.
fn split_moments<'a, 'b>(moments: &'a mut [Moment<'b>]) -> [Option<&'a mut Moment<'b>>; 2] {
    let mut moments = moments.iter_mut();
    [moments.next(), moments.next()]
}
