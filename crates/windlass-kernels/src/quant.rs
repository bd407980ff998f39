//! Integer blocks with scales: quantize and unpack.

use crate::Element;
use crate::pool::{Pool, SharedMut};

/// Elements that share a scale.
pub const GROUP: usize = 32;

/// Rows of 8-bit integers, a scale for each group of [`GROUP`] elements of a row; the last group may be short.
#[derive(Debug)]
pub struct Q8Blocks {
    cols: usize,
    quants: Vec<i8>,
    scales: Vec<f32>,
}

impl Q8Blocks {
    /// Quantizes a row-major matrix: `scale = max|w| / 127`, `q = round(w / scale)`.
    ///
    /// # Panics
    /// When the length is not a multiple of `cols`.
    #[track_caller]
    pub fn quantize<E: Element>(pool: &Pool, matrix: &[E], cols: usize) -> Self {
        assert!(
            cols > 0 && matrix.len().is_multiple_of(cols),
            "{} elements in rows of {cols}",
            matrix.len()
        );
        let (rows, groups) = (matrix.len() / cols, cols.div_ceil(GROUP));
        let (mut quants, mut scales) = (vec![0i8; matrix.len()], vec![0f32; rows * groups]);
        let (q, s) = (SharedMut::new(&mut quants), SharedMut::new(&mut scales));
        pool.run(rows, |row, _| {
            // SAFETY: each task touches its own row alone.
            let (q, s) = unsafe { (q.slice(row * cols, cols), s.slice(row * groups, groups)) };
            for ((w, q), s) in matrix[row * cols..]
                .chunks(GROUP)
                .zip(q.chunks_mut(GROUP))
                .zip(s)
            {
                let largest = w[..q.len()]
                    .iter()
                    .fold(0.0, |m: f64, w| m.max(w.to_f64().abs()));
                *s = (largest / 127.0) as f32;
                let inverse = if *s > 0.0 { 1.0 / *s } else { 0.0 };
                for (w, q) in w.iter().zip(q) {
                    *q = (w.to_f64() as f32 * inverse).round_ties_even() as i8;
                }
            }
        });
        Q8Blocks {
            cols,
            quants,
            scales,
        }
    }

    /// Writes rows `range` as plain elements.
    ///
    /// # Panics
    /// When `out` does not hold exactly these rows.
    #[track_caller]
    pub fn unpack_rows<E: Element>(
        &self,
        pool: &Pool,
        range: std::ops::Range<usize>,
        out: &mut [E],
    ) {
        let (cols, groups) = (self.cols, self.cols.div_ceil(GROUP));
        assert_eq!(
            out.len(),
            range.len() * cols,
            "elements of {} rows of {cols}",
            range.len()
        );
        let out = SharedMut::new(out);
        pool.run(range.len(), |task, _| {
            let row = range.start + task;
            // SAFETY: each task writes its own row alone.
            let out = unsafe { out.slice(task * cols, cols) };
            let quants = self.quants[row * cols..(row + 1) * cols].chunks(GROUP);
            for ((out, q), &s) in out
                .chunks_mut(GROUP)
                .zip(quants)
                .zip(&self.scales[row * groups..])
            {
                for (out, &q) in out.iter_mut().zip(q) {
                    *out = E::from_f64((q as f32 * s) as f64);
                }
            }
        });
    }

    /// Bytes of the quants and scales.
    pub fn bytes(&self) -> usize {
        self.quants.len() + 4 * self.scales.len()
    }
}
