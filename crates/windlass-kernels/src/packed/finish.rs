//! What becomes of a product's sums: bias, residual, gate, and the result.

use super::PANEL;
use super::product::Job;
use crate::activation::activated;
use crate::dispatch::kernels;
use crate::simd::{Simd, SimdElement};
use crate::stream::prefetch;
use crate::{DType, Element, reference};
use std::ops::Range;

/// Sums `[panels, pitch, 16]`, of which a row may use the first of each panel's.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub sums: &'a [[f32; PANEL]],
    /// Those of the gate, where there is one.
    pub gates: &'a [[f32; PANEL]],
    pub pitch: usize,
}

impl<'a> Sums<'a> {
    /// All of them, or the first half and, of the gate, the second.
    pub fn of(all: &'a [[f32; PANEL]], pitch: usize, gated: bool) -> Sums<'a> {
        let (sums, gates) = all.split_at(if gated { all.len() / 2 } else { all.len() });
        Sums { sums, gates, pitch }
    }
}

kernels! {
    /// Adds bias and residual to sums, applies the gate, and writes these rows of the result.
    pub(super) fn finisher<E>(
        job: &Job<'_, E>, panels: Range<usize>, rows: Range<usize>, sums: Sums<'_>,
    ) -> () {
        scalar: finish, simd: finish_simd
    }
}

pub(super) fn finish<E: Element>(
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
    sums: Sums<'_>,
) {
    let pitch = sums.pitch;
    for (m, row) in rows.enumerate() {
        for (p, panel) in panels.clone().enumerate() {
            let at = job.at(row, panel);
            let len = PANEL.min(job.matrix.rows() - panel * PANEL);
            // SAFETY: a task has its own rows and panels.
            let out = unsafe { job.out.slice(at, len) };
            for (column, out) in out.iter_mut().enumerate() {
                let biased = |sums: &[[f32; PANEL]], bias: Option<&[E]>| {
                    let mut sum = sums[p * pitch + m][column];
                    if let Some(bias) = bias {
                        sum += bias[panel * PANEL + column].to_f64() as f32;
                    }
                    sum
                };
                let mut sum = biased(sums.sums, job.bias);
                if let Some(residual) = job.residual {
                    sum += residual[at + column].to_f64() as f32;
                }
                *out = E::from_f64(f64::from(sum));
                if let Some(gate) = job.gate {
                    let x = E::from_f64(f64::from(biased(sums.gates, gate.bias)));
                    let up = *out;
                    reference::gated(gate.activation, &[x], &[up], std::slice::from_mut(out));
                }
            }
        }
    }
}

/// Rows before which the sums are asked for, and the result: stores wait for lines that other cores or the memory have.
const AHEAD: usize = 2;
/// Rows from which no line of a result is still in a near cache when it is read again: it is written past them, for which no
/// line is read before.
const STREAMED: usize = 64;
/// Panels from which the fence that this takes costs less than it gains.
const FENCED: usize = 4;

/// # Safety
/// The CPU has the features of `S`.
#[inline(always)]
unsafe fn finish_simd<S: Simd, E: SimdElement>(
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
    sums: Sums<'_>,
) {
    let first = panels.start * PANEL;
    let columns = job.matrix.rows().min(panels.end * PANEL) - first;
    let needed = (panels.len() - 1) * sums.pitch + rows.len();
    assert!(sums.sums.len() >= needed && (job.gate.is_none() || sums.gates.len() >= needed));
    let aligned = |bytes: usize| bytes.is_multiple_of(S::LANES * size_of::<f32>());
    // SAFETY: a task has its own rows and panels.
    let start = unsafe { job.out.slice(job.at(rows.start, panels.start), columns) };
    let streamed = job.rows.len() >= STREAMED
        && panels.len() >= FENCED
        && E::DTYPE == DType::F32
        && aligned(start.as_ptr().addr())
        && aligned(job.matrix.rows() * size_of::<f32>());
    for (m, row) in rows.enumerate() {
        let at = job.at(row, panels.start);
        // SAFETY: a task has its own rows and panels; bias and residual have the shapes of the result, and the sums were counted.
        unsafe {
            let out = job.out.slice(at, columns).as_mut_ptr();
            let mut column = 0;
            while column < columns {
                let n = (columns - column).min(S::LANES);
                let biased = |of: &[[f32; PANEL]], bias: Option<&[E]>| {
                    let sums = of
                        .as_ptr()
                        .add(m + column / PANEL * sums.pitch)
                        .cast::<f32>();
                    prefetch(sums.wrapping_add(AHEAD * PANEL).cast());
                    let sum = S::load(sums.add(column % PANEL));
                    match bias {
                        Some(bias) => sum + load::<S, E>(bias.as_ptr().add(first + column), n),
                        None => sum,
                    }
                };
                let mut sum: S = biased(sums.sums, job.bias);
                if let Some(residual) = job.residual {
                    sum = sum + load::<S, E>(residual.as_ptr().add(at + column), n);
                }
                if let Some(gate) = job.gate {
                    let gated: S = round::<S, E>(biased(sums.gates, gate.bias));
                    sum = activated(gate.activation, gated) * round::<S, E>(sum);
                }
                let to = out.add(column);
                if streamed {
                    // There is no partial one: the matrix has a multiple of rows.
                    sum.stream(to.cast());
                } else {
                    prefetch(out.wrapping_add(AHEAD * job.matrix.rows() + column).cast());
                    match n == S::LANES {
                        true => E::store_vector(to, sum),
                        false => E::store_vector_partial(to, sum, n),
                    }
                }
                column += S::LANES;
            }
        }
    }
    if streamed {
        S::fence();
    }
}

/// The numbers as `E` holds them.
///
/// # Safety
/// As [`finish_simd`].
#[inline(always)]
unsafe fn round<S: Simd, E: SimdElement>(x: S) -> S {
    if E::DTYPE == DType::F32 {
        return x;
    }
    let mut held = [E::from_f64(0.0); PANEL];
    // SAFETY: there is room for a vector.
    unsafe {
        E::store_vector(held.as_mut_ptr(), x);
        E::load_vector(held.as_ptr())
    }
}

/// # Safety
/// As [`finish_simd`]; there are `n` elements.
#[inline(always)]
unsafe fn load<S: Simd, E: SimdElement>(from: *const E, n: usize) -> S {
    // SAFETY: the caller's promise.
    unsafe {
        match n == S::LANES {
            true => E::load_vector(from),
            false => E::load_vector_partial(from, n),
        }
    }
}
