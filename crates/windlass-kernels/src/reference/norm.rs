//! Normalization over the last dimension: formulas as in [`crate::norm`].

use crate::{Element, Float};

/// `y = x * inv_rms * (offset + w)`, `inv_rms = 1 / sqrt(mean(x²) + eps)`; rows of `w.len()`.
pub fn rms_norm<E: Element>(
    x: &[E],
    w: &[E],
    offset: f32,
    eps: f32,
    y: &mut [E],
    inv_rms: &mut [E::Acc],
) {
    let cols = w.len();
    let (offset, eps, n) = (
        E::Acc::of(offset as f64),
        E::Acc::of(eps as f64),
        E::Acc::of(cols as f64),
    );
    for ((x, y), inv_rms) in x
        .chunks_exact(cols)
        .zip(y.chunks_exact_mut(cols))
        .zip(inv_rms)
    {
        let squares: E::Acc = x.iter().map(|x| x.load() * x.load()).sum();
        *inv_rms = E::Acc::ONE / (squares / n + eps).sqrt();
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = E::store(x.load() * *inv_rms * (offset + w.load()));
        }
    }
}

/// The input's gradient of [`rms_norm`], added to `dx` if `accumulate`.
///
/// With `g = dy * (offset + w)`: `dx = inv_rms * (g - x * inv_rms² * mean(g x))`.
pub fn rms_norm_dx<E: Element>(
    x: &[E],
    w: &[E],
    offset: f32,
    inv_rms: &[E::Acc],
    dy: &[E],
    dx: &mut [E],
    accumulate: bool,
) {
    let cols = w.len();
    let (offset, n) = (E::Acc::of(offset as f64), E::Acc::of(cols as f64));
    let rows = x
        .chunks_exact(cols)
        .zip(dy.chunks_exact(cols))
        .zip(dx.chunks_exact_mut(cols))
        .zip(inv_rms);
    for (((x, dy), dx), &inv_rms) in rows {
        let g = |c: usize| dy[c].load() * (offset + w[c].load());
        let mean: E::Acc = (0..cols).map(|c| g(c) * x[c].load()).sum::<E::Acc>() / n;
        for (c, dx) in dx.iter_mut().enumerate() {
            let d = inv_rms * (g(c) - x[c].load() * (inv_rms * inv_rms * mean));
            *dx = E::store(if accumulate { dx.load() + d } else { d });
        }
    }
}

/// The weight's gradient of [`rms_norm`] for columns `start..start + dw.len()`, rows in order:
/// `dw[c] += Σ_r dy[r, c] x[r, c] inv_rms[r]`.
pub fn rms_norm_dw<E: Element>(
    x: &[E],
    cols: usize,
    start: usize,
    inv_rms: &[E::Acc],
    dy: &[E],
    dw: &mut [E::Acc],
) {
    for (r, &inv_rms) in inv_rms.iter().enumerate() {
        for (c, dw) in dw.iter_mut().enumerate() {
            let i = r * cols + start + c;
            *dw += dy[i].load() * (x[i].load() * inv_rms);
        }
    }
}

/// `y = (x - mean) * inv_std * w + b`, `inv_std = 1 / sqrt(mean((x - mean)²) + eps)`; rows of `w.len()`.
pub fn layer_norm<E: Element>(
    x: &[E],
    w: &[E],
    b: Option<&[E]>,
    eps: f32,
    y: &mut [E],
    mean: &mut [E::Acc],
    inv_std: &mut [E::Acc],
) {
    let cols = w.len();
    let (eps, n) = (E::Acc::of(eps as f64), E::Acc::of(cols as f64));
    let rows = x
        .chunks_exact(cols)
        .zip(y.chunks_exact_mut(cols))
        .zip(mean)
        .zip(inv_std);
    for (((x, y), mean), inv_std) in rows {
        *mean = x.iter().map(|x| x.load()).sum::<E::Acc>() / n;
        let squares: E::Acc = x
            .iter()
            .map(|x| (x.load() - *mean) * (x.load() - *mean))
            .sum();
        *inv_std = E::Acc::ONE / (squares / n + eps).sqrt();
        for c in 0..cols {
            let b = b.map_or(E::Acc::ZERO, |b| b[c].load());
            y[c] = E::store((x[c].load() - *mean) * *inv_std * w[c].load() + b);
        }
    }
}

/// The input's gradient of [`layer_norm`], added to `dx` if `accumulate`.
///
/// With `g = dy * w` and `h = (x - mean) * inv_std`: `dx = inv_std * (g - mean(g) - h * mean(g h))`.
pub fn layer_norm_dx<E: Element>(
    x: &[E],
    w: &[E],
    mean: &[E::Acc],
    inv_std: &[E::Acc],
    dy: &[E],
    dx: &mut [E],
    accumulate: bool,
) {
    let cols = w.len();
    let n = E::Acc::of(cols as f64);
    let rows = x
        .chunks_exact(cols)
        .zip(dy.chunks_exact(cols))
        .zip(dx.chunks_exact_mut(cols));
    for (((x, dy), dx), (&mean, &inv_std)) in rows.zip(mean.iter().zip(inv_std)) {
        let g = |c: usize| dy[c].load() * w[c].load();
        let h = |c: usize| (x[c].load() - mean) * inv_std;
        let mean_g = (0..cols).map(g).sum::<E::Acc>() / n;
        let mean_gh = (0..cols).map(|c| g(c) * h(c)).sum::<E::Acc>() / n;
        for (c, dx) in dx.iter_mut().enumerate() {
            let d = inv_std * (g(c) - mean_g - h(c) * mean_gh);
            *dx = E::store(if accumulate { dx.load() + d } else { d });
        }
    }
}

/// The gradients of weight and bias of [`layer_norm`] for columns `start..start + dw.len()`, rows in order:
/// `dw[c] += Σ_r dy[r, c] h[r, c]`, `db[c] += Σ_r dy[r, c]`.
pub fn layer_norm_dw<E: Element>(
    x: &[E],
    cols: usize,
    start: usize,
    mean: &[E::Acc],
    inv_std: &[E::Acc],
    dy: &[E],
    dw: &mut [E::Acc],
    mut db: Option<&mut [E::Acc]>,
) {
    for (r, (&mean, &inv_std)) in mean.iter().zip(inv_std).enumerate() {
        for c in 0..dw.len() {
            let i = r * cols + start + c;
            dw[c] += dy[i].load() * ((x[i].load() - mean) * inv_std);
            if let Some(db) = &mut db {
                db[c] += dy[i].load();
            }
        }
    }
}
