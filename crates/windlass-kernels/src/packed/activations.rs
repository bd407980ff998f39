//! Rows of activations as 8-bit integers with a scale for each step.

use super::STEP;
use crate::dispatch::Level;
use crate::memory::{Buffer, Category, Memory};
use crate::pool::{Pool, SharedMut};
use crate::{Element, tasks::Tasks};

/// Quantized rows: `x = scale * q` with `q` in -127..=127, and the sums that offsets and minimums need.
///
/// A scale is `max|x| / 127` over a step of 32 columns. A step with a NaN or an infinity has the scale NaN.
pub struct Activations {
    rows: usize,
    cols: usize,
    steps: usize,
    /// `[rows, steps, 32]` of `i8`.
    quants: Buffer,
    /// `[rows, steps]` of [`StepScales`].
    scales: Buffer,
}

/// What belongs to a step of a row. Of sums there are three: of the first half, of the second, of both.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct StepScales {
    /// Scale.
    pub scale: f32,
    /// Sums of quants.
    pub sums: [i32; 3],
    /// The same as numbers.
    pub numbers: [f32; 3],
    /// The same times the scale.
    pub scaled: [f32; 3],
}

/// Which of the three sums is that of a whole step.
pub(super) const BOTH: usize = 2;

impl Activations {
    /// Quantizes `x [rows, cols]`, padded with zeros to `steps` steps of 32 columns.
    ///
    /// # Panics
    /// When `x` is not made of whole rows.
    #[track_caller]
    pub fn quantize<E: Element>(pool: &Pool, memory: &Memory, x: &[E], cols: usize) -> Activations {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "{} elements in rows of {cols}",
            x.len()
        );
        // Every layout's rows end at a multiple of a unit at most.
        let steps = cols.next_multiple_of(super::UNIT) / STEP;
        let rows = x.len() / cols;
        let mut quants = memory.alloc(rows * steps * STEP, Category::Workspace);
        let mut scales = memory.alloc(rows * steps * size_of::<StepScales>(), Category::Workspace);
        let quantize = quantize_row(pool.level());
        {
            let q = SharedMut::new(quants.block_mut());
            let s = SharedMut::new(scales.block_mut());
            let tasks = Tasks::rows(rows, cols);
            pool.run(tasks.count(), |task, worker| {
                for row in tasks.part(task) {
                    let floats = worker.scratch::<f32>(steps * STEP);
                    for (to, from) in floats.iter_mut().zip(&x[row * cols..][..cols]) {
                        *to = E::to_f64(*from) as f32;
                    }
                    floats[cols..].fill(0.0);
                    let bytes = size_of::<StepScales>();
                    // SAFETY: a task writes its own rows; the block of scales is aligned and every bit pattern is valid.
                    unsafe {
                        let q = q.slice(row * steps * STEP, steps * STEP);
                        let s = s.slice(row * steps * bytes, steps * bytes);
                        let s = std::slice::from_raw_parts_mut(s.as_mut_ptr().cast(), steps);
                        quantize(floats, q, s);
                    }
                }
            });
        }
        Activations {
            rows,
            cols,
            steps,
            quants,
            scales,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    pub(super) fn row(&self, row: usize) -> Row<'_> {
        let quants = &self.quants.block()[row * self.steps * STEP..][..self.steps * STEP];
        let bytes = size_of::<StepScales>();
        let scales = &self.scales.block()[row * self.steps * bytes..][..self.steps * bytes];
        Row {
            // SAFETY: `i8` and `u8` have the same layout.
            quants: unsafe { std::slice::from_raw_parts(quants.as_ptr().cast(), quants.len()) },
            // SAFETY: written as such above; blocks are aligned to 64 and the size is a multiple of 4.
            scales: unsafe { std::slice::from_raw_parts(scales.as_ptr().cast(), self.steps) },
        }
    }
}

/// A row of activations.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub quants: &'a [i8],
    pub scales: &'a [StepScales],
}

type QuantizeRow = unsafe fn(&[f32], &mut [u8], &mut [StepScales]);

/// The same code compiled for each level: every operation is exact or rounded once, so all levels give the same bits.
fn quantize_row(level: Level) -> QuantizeRow {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(x: &[f32], q: &mut [u8], s: &mut [StepScales]) {
            quantize_steps(x, q, s);
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        unsafe fn avx512(x: &[f32], q: &mut [u8], s: &mut [StepScales]) {
            quantize_steps(x, q, s);
        }
        match level {
            Level::Scalar => quantize_steps,
            Level::Avx2 => avx2,
            Level::Avx512 | Level::Amx => avx512,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        quantize_steps
    }
}

#[inline(always)]
fn quantize_steps(x: &[f32], q: &mut [u8], s: &mut [StepScales]) {
    let steps = x.as_chunks::<STEP>().0.iter();
    for ((x, q), s) in steps.zip(q.as_chunks_mut::<STEP>().0).zip(s) {
        let mut largest = 0u32;
        for x in x {
            // Magnitudes of floats are ordered like their bits; NaN is above infinity.
            largest = largest.max(x.to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        let finite = largest < f32::INFINITY;
        let scale = if finite { largest / 127.0 } else { f32::NAN };
        // A scale below the normal numbers has no inverse: such a step counts as zero.
        let normal = finite && scale >= f32::MIN_POSITIVE;
        let inverse = if normal { 127.0 / largest } else { 0.0 };
        let mut ints = [0i32; STEP];
        for (int, x) in ints.iter_mut().zip(x) {
            let rounded = (x * inverse).round_ties_even();
            // SAFETY: at most 127 in magnitude, or NaN times zero, which is masked to zero before the cast.
            *int = unsafe { (if normal { rounded } else { 0.0 }).to_int_unchecked::<i32>() };
        }
        for (q, int) in q.iter_mut().zip(ints) {
            *q = int as i8 as u8;
        }
        let (first, second) = ints.split_at(STEP / 2);
        let halves = [first.iter().sum::<i32>(), second.iter().sum()];
        let sums = [halves[0], halves[1], halves[0] + halves[1]];
        let scale = if finite && !normal { 0.0 } else { scale };
        let numbers = sums.map(|sum| sum as f32);
        *s = StepScales {
            scale,
            sums,
            numbers,
            scaled: numbers.map(|sum| sum * scale),
        };
    }
}
