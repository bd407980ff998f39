//! Vector bodies of normalization. Rows are read once from memory; the later passes over a row hit the first cache.
//!
//! SAFETY (all functions): the callers in `norm` check the lengths; the CPU has the features of `S`.

use crate::simd::{Simd, SimdElement};
use crate::stream::{Column, Fold, Step, Width, columns, fold, stream};

/// `Σ x²`.
struct Squares<E>(*const E);

impl<E: SimdElement> Fold<1> for Squares<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        let x: S = unsafe { width.load(self.0.add(i)) };
        [x.fma(x, sum)]
    }
}

/// `y = x * inv_rms * (offset + w)`.
struct RmsScale<E> {
    x: *const E,
    w: *const E,
    y: *mut E,
    offset: f32,
    inv_rms: f32,
}

impl<E: SimdElement> Step for RmsScale<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (x, w): (S, S) = (width.load(self.x.add(i)), width.load(self.w.add(i)));
            width.store(
                self.y.add(i),
                x * S::splat(self.inv_rms) * (S::splat(self.offset) + w),
            );
        }
    }
}

#[inline(always)]
pub(super) unsafe fn rms_norm<S: Simd, E: SimdElement>(
    x: &[E],
    w: &[E],
    offset: f32,
    eps: f32,
    y: &mut [E],
    inv_rms: &mut [f32],
) {
    let cols = w.len();
    for (r, held) in inv_rms.iter_mut().enumerate() {
        unsafe {
            let (x, y) = (x.as_ptr().add(r * cols), y.as_mut_ptr().add(r * cols));
            let [squares] = fold::<S, 1, _>(cols, Squares(x));
            let inv_rms = 1.0 / (squares.sum() / cols as f32 + eps).sqrt();
            *held = inv_rms;
            stream::<S>(
                cols,
                RmsScale {
                    x,
                    w: w.as_ptr(),
                    y,
                    offset,
                    inv_rms,
                },
            );
        }
    }
}

/// `Σ dy (offset + w) x`.
struct RmsDot<E> {
    x: *const E,
    w: *const E,
    dy: *const E,
    offset: f32,
}

impl<E: SimdElement> Fold<1> for RmsDot<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        unsafe {
            let (x, w): (S, S) = (width.load(self.x.add(i)), width.load(self.w.add(i)));
            let g = width.load::<S, E>(self.dy.add(i)) * (S::splat(self.offset) + w);
            [g.fma(x, sum)]
        }
    }
}

/// `dx = inv_rms * (dy * (offset + w) - x * factor)`, added if `accumulate`.
struct RmsDx<E> {
    of: RmsDot<E>,
    dx: *mut E,
    inv_rms: f32,
    factor: f32,
    accumulate: bool,
}

impl<E: SimdElement> Step for RmsDx<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (x, w): (S, S) = (width.load(self.of.x.add(i)), width.load(self.of.w.add(i)));
            let g = width.load::<S, E>(self.of.dy.add(i)) * (S::splat(self.of.offset) + w);
            let mut d = S::splat(self.inv_rms) * x.fnma(S::splat(self.factor), g);
            if self.accumulate {
                d = width.load::<S, E>(self.dx.add(i).cast_const()) + d;
            }
            width.store(self.dx.add(i), d);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn rms_norm_dx<S: Simd, E: SimdElement>(
    x: &[E],
    w: &[E],
    offset: f32,
    inv_rms: &[f32],
    dy: &[E],
    dx: &mut [E],
    accumulate: bool,
) {
    let cols = w.len();
    for (r, &inv_rms) in inv_rms.iter().enumerate() {
        unsafe {
            let at = |p: *const E| p.add(r * cols);
            let of = || RmsDot {
                x: at(x.as_ptr()),
                w: w.as_ptr(),
                dy: at(dy.as_ptr()),
                offset,
            };
            let [dot] = fold::<S, 1, _>(cols, of());
            let factor = inv_rms * inv_rms * (dot.sum() / cols as f32);
            let dx = dx.as_mut_ptr().add(r * cols);
            stream::<S>(
                cols,
                RmsDx {
                    of: of(),
                    dx,
                    inv_rms,
                    factor,
                    accumulate,
                },
            );
        }
    }
}

/// `dw += dy * (x * inv_rms)`.
struct RmsDw<E> {
    x: *const E,
    dy: *const E,
    cols: usize,
    inv_rms: *const f32,
}

impl<E: SimdElement> Column<1> for RmsDw<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, r: usize, c: usize, width: W, [dw]: [S; 1]) -> [S; 1] {
        unsafe {
            let i = r * self.cols + c;
            let (x, dy): (S, S) = (width.load(self.x.add(i)), width.load(self.dy.add(i)));
            [dy.fma(x * S::splat(*self.inv_rms.add(r)), dw)]
        }
    }
    #[inline(always)]
    fn address(&self, r: usize, c: usize) -> [*const u8; 2] {
        let i = r * self.cols + c;
        [
            self.x.wrapping_add(i).cast(),
            self.dy.wrapping_add(i).cast(),
        ]
    }
}

#[inline(always)]
pub(super) unsafe fn rms_norm_dw<S: Simd, E: SimdElement>(
    x: &[E],
    cols: usize,
    start: usize,
    inv_rms: &[f32],
    dy: &[E],
    dw: &mut [f32],
) {
    unsafe {
        let (x, dy) = (x.as_ptr().add(start), dy.as_ptr().add(start));
        let op = RmsDw {
            x,
            dy,
            cols,
            inv_rms: inv_rms.as_ptr(),
        };
        columns::<S, 1>(inv_rms.len(), dw.len(), [dw.as_mut_ptr()], op);
    }
}

/// `Σ x`.
struct Sum<E>(*const E);

impl<E: SimdElement> Fold<1> for Sum<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        [sum + unsafe { width.load(self.0.add(i)) }]
    }
}

/// `Σ (x - mean)²`.
struct Deviations<E>(*const E, f32);

impl<E: SimdElement> Fold<1> for Deviations<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum]: [S; 1]) -> [S; 1] {
        unsafe {
            let d: S = width.load::<S, E>(self.0.add(i)) - S::splat(self.1);
            [d.fma(d, sum)]
        }
    }
}

/// `y = (x - mean) * inv_std * w + b`.
struct LayerScale<E> {
    x: *const E,
    w: *const E,
    b: Option<*const E>,
    y: *mut E,
    mean: f32,
    inv_std: f32,
}

impl<E: SimdElement> Step for LayerScale<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (x, w): (S, S) = (width.load(self.x.add(i)), width.load(self.w.add(i)));
            let h = (x - S::splat(self.mean)) * S::splat(self.inv_std);
            let y = match self.b {
                Some(b) => h.fma(w, width.load(b.add(i))),
                None => h * w,
            };
            width.store(self.y.add(i), y);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn layer_norm<S: Simd, E: SimdElement>(
    x: &[E],
    w: &[E],
    b: Option<&[E]>,
    eps: f32,
    y: &mut [E],
    means: &mut [f32],
    inv_stds: &mut [f32],
) {
    let cols = w.len();
    for (r, (held_mean, held_inv_std)) in means.iter_mut().zip(inv_stds).enumerate() {
        unsafe {
            let (x, y) = (x.as_ptr().add(r * cols), y.as_mut_ptr().add(r * cols));
            let [sum] = fold::<S, 1, _>(cols, Sum(x));
            let mean = sum.sum() / cols as f32;
            let [squares] = fold::<S, 1, _>(cols, Deviations(x, mean));
            let inv_std = 1.0 / (squares.sum() / cols as f32 + eps).sqrt();
            (*held_mean, *held_inv_std) = (mean, inv_std);
            stream::<S>(
                cols,
                LayerScale {
                    x,
                    w: w.as_ptr(),
                    b: b.map(<[E]>::as_ptr),
                    y,
                    mean,
                    inv_std,
                },
            );
        }
    }
}

/// `Σ g` and `Σ g h`.
struct LayerDots<E> {
    x: *const E,
    w: *const E,
    dy: *const E,
    mean: f32,
    inv_std: f32,
}

impl<E: SimdElement> LayerDots<E> {
    /// `g` and `h` of the vector at `i`.
    #[inline(always)]
    unsafe fn load<S: Simd, W: Width>(&self, i: usize, width: W) -> (S, S) {
        unsafe {
            let (x, w): (S, S) = (width.load(self.x.add(i)), width.load(self.w.add(i)));
            (
                width.load::<S, E>(self.dy.add(i)) * w,
                (x - S::splat(self.mean)) * S::splat(self.inv_std),
            )
        }
    }
}

impl<E: SimdElement> Fold<2> for LayerDots<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W, [sum, dot]: [S; 2]) -> [S; 2] {
        let (g, h): (S, S) = unsafe { self.load(i, width) };
        [sum + g, g.fma(h, dot)]
    }
}

/// `dx = inv_std * (g - mean_g - h * mean_gh)`, added if `accumulate`.
struct LayerDx<E> {
    of: LayerDots<E>,
    dx: *mut E,
    mean_g: f32,
    mean_gh: f32,
    accumulate: bool,
}

impl<E: SimdElement> Step for LayerDx<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, i: usize, width: W) {
        unsafe {
            let (g, h): (S, S) = self.of.load(i, width);
            let d = h.fnma(S::splat(self.mean_gh), g - S::splat(self.mean_g));
            let mut d = S::splat(self.of.inv_std) * d;
            if self.accumulate {
                d = width.load::<S, E>(self.dx.add(i).cast_const()) + d;
            }
            width.store(self.dx.add(i), d);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn layer_norm_dx<S: Simd, E: SimdElement>(
    x: &[E],
    w: &[E],
    mean: &[f32],
    inv_std: &[f32],
    dy: &[E],
    dx: &mut [E],
    accumulate: bool,
) {
    let cols = w.len();
    for (r, (&mean, &inv_std)) in mean.iter().zip(inv_std).enumerate() {
        unsafe {
            let at = |p: *const E| p.add(r * cols);
            let of = || LayerDots {
                x: at(x.as_ptr()),
                w: w.as_ptr(),
                dy: at(dy.as_ptr()),
                mean,
                inv_std,
            };
            let [sum, dot] = fold::<S, 2, _>(cols, of());
            let (mean_g, mean_gh) = (sum.sum() / cols as f32, dot.sum() / cols as f32);
            let dx = dx.as_mut_ptr().add(r * cols);
            stream::<S>(
                cols,
                LayerDx {
                    of: of(),
                    dx,
                    mean_g,
                    mean_gh,
                    accumulate,
                },
            );
        }
    }
}

/// `dw += dy * h`, `db += dy`.
struct LayerDw<E> {
    x: *const E,
    dy: *const E,
    cols: usize,
    mean: *const f32,
    inv_std: *const f32,
}

impl<E: SimdElement> LayerDw<E> {
    #[inline(always)]
    unsafe fn load<S: Simd, W: Width>(&self, r: usize, c: usize, width: W) -> (S, S) {
        unsafe {
            let i = r * self.cols + c;
            let (x, dy): (S, S) = (width.load(self.x.add(i)), width.load(self.dy.add(i)));
            (
                dy,
                (x - S::splat(*self.mean.add(r))) * S::splat(*self.inv_std.add(r)),
            )
        }
    }
    #[inline(always)]
    fn address(&self, r: usize, c: usize) -> [*const u8; 2] {
        let i = r * self.cols + c;
        [
            self.x.wrapping_add(i).cast(),
            self.dy.wrapping_add(i).cast(),
        ]
    }
}

impl<E: SimdElement> Column<1> for LayerDw<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(&self, r: usize, c: usize, width: W, [dw]: [S; 1]) -> [S; 1] {
        let (dy, h): (S, S) = unsafe { self.load(r, c, width) };
        [dy.fma(h, dw)]
    }
    #[inline(always)]
    fn address(&self, r: usize, c: usize) -> [*const u8; 2] {
        self.address(r, c)
    }
}

impl<E: SimdElement> Column<2> for LayerDw<E> {
    #[inline(always)]
    unsafe fn step<S: Simd, W: Width>(
        &self,
        r: usize,
        c: usize,
        width: W,
        [dw, db]: [S; 2],
    ) -> [S; 2] {
        let (dy, h): (S, S) = unsafe { self.load(r, c, width) };
        [dy.fma(h, dw), db + dy]
    }
    #[inline(always)]
    fn address(&self, r: usize, c: usize) -> [*const u8; 2] {
        self.address(r, c)
    }
}

#[inline(always)]
pub(super) unsafe fn layer_norm_dw<S: Simd, E: SimdElement>(
    x: &[E],
    cols: usize,
    start: usize,
    mean: &[f32],
    inv_std: &[f32],
    dy: &[E],
    dw: &mut [f32],
    db: Option<&mut [f32]>,
) {
    unsafe {
        let (x, dy) = (x.as_ptr().add(start), dy.as_ptr().add(start));
        let op = LayerDw {
            x,
            dy,
            cols,
            mean: mean.as_ptr(),
            inv_std: inv_std.as_ptr(),
        };
        match db {
            Some(db) => {
                columns::<S, 2>(mean.len(), dw.len(), [dw.as_mut_ptr(), db.as_mut_ptr()], op)
            }
            None => columns::<S, 1>(mean.len(), dw.len(), [dw.as_mut_ptr()], op),
        }
    }
}
