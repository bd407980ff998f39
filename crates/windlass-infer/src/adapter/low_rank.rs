//! The product of two thin matrices that is nearest to a matrix.
//!
//! Subspace iteration from random rows, then the eigenvectors of a small matrix. The same numbers on every run; no full
//! decomposition is made, which would take minutes where this takes a second.
//!
//! # Source
//! Halko, Martinsson and Tropp 2011, "Finding structure with randomness".

use windlass_tensor::kernels::gemm::{Epilogue, Layout, Mat, gemm};
use windlass_tensor::{Cpu, Rng};

/// Directions that are followed beside those that are asked for.
const MORE: usize = 12;
/// Products with the matrix and its transpose.
const ROUNDS: usize = 8;

/// `B [n, rank]` and `A [rank, k]` with `B A` nearest to `matrix [n, k]`, each of them with the root of the singular values.
/// Directions that the matrix does not have are zero.
///
/// # Panics
/// When the matrix does not have the shape.
#[track_caller]
pub fn low_rank(
    cpu: &Cpu,
    matrix: &[f32],
    [n, k]: [usize; 2],
    rank: usize,
) -> (Vec<f32>, Vec<f32>) {
    assert_eq!(matrix.len(), n * k, "elements of a matrix [{n}, {k}]");
    let l = (rank + MORE).min(n).min(k);
    let (mut b, mut a) = (vec![0f32; n * rank], vec![0f32; rank * k]);
    if l == 0 || matrix.iter().all(|&v| v == 0.0) {
        return (b, a);
    }
    let mut right = vec![0f32; l * k];
    Rng::new(0x10_4a).fill_normal(&mut right, 0.0, 1.0);
    let mut left = vec![0f32; l * n];
    for round in 0..ROUNDS {
        if round > 0 {
            orthonormalize(&mut right, k);
        }
        product(cpu, Layout::Nt, [l, n, k], &right, matrix, &mut left);
        orthonormalize(&mut left, n);
        product(cpu, Layout::Nn, [l, k, n], &left, matrix, &mut right);
    }
    // The matrix is `leftᵀ right`, as far as these directions go.
    let gram = (0..l * l).map(|at| dot(&right[at / l * k..][..k], &right[at % l * k..][..k]));
    let (values, vectors) = eigen(gram.collect(), l);
    let mut order: Vec<usize> = (0..l).collect();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    let least = values[order[0]].max(0.0) * 1e-13;
    for (at, &i) in order.iter().take(rank).enumerate() {
        if values[i] <= least {
            break;
        }
        let root = values[i].sqrt().sqrt();
        let weights = || (0..l).map(|j| vectors[j * l + i]);
        for column in 0..k {
            let sum: f64 = weights()
                .enumerate()
                .map(|(j, w)| w * f64::from(right[j * k + column]))
                .sum();
            a[at * k + column] = (sum / root) as f32;
        }
        for row in 0..n {
            let sum: f64 = weights()
                .enumerate()
                .map(|(j, w)| w * f64::from(left[j * n + row]))
                .sum();
            b[row * rank + at] = (sum * root) as f32;
        }
    }
    (b, a)
}

/// `B A` with `B [n, r]` and `A [r, k]`.
pub(super) fn multiplied(cpu: &Cpu, b: &[f32], a: &[f32], [n, k]: [usize; 2]) -> Vec<f32> {
    let mut out = vec![0f32; n * k];
    product(cpu, Layout::Nn, [n, k, a.len() / k], b, a, &mut out);
    out
}

/// `x y`, or `x yᵀ`, of matrices without gaps; `[m, n, k]` as [`gemm`] counts them.
fn product(
    cpu: &Cpu,
    layout: Layout,
    [m, n, k]: [usize; 3],
    x: &[f32],
    y: &[f32],
    out: &mut [f32],
) {
    let stride = if layout == Layout::Nt { k } else { n };
    let (a, b) = (Mat { data: x, stride: k }, Mat { data: y, stride });
    gemm(
        &cpu.pool,
        layout,
        m,
        n,
        k,
        a,
        b,
        out,
        n,
        Epilogue::default(),
    );
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    let pairs = x.iter().zip(y);
    pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Makes rows orthogonal and of length 1; what depends on the rows before becomes zero.
fn orthonormalize(rows: &mut [f32], width: usize) {
    for at in 0..rows.len() / width {
        let (before, rest) = rows.split_at_mut(at * width);
        let row = &mut rest[..width];
        let length = dot(row, row).sqrt();
        // Twice is enough (Kahan).
        for _ in 0..2 {
            for other in before.chunks(width) {
                let along = dot(row, other) as f32;
                row.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
            }
        }
        let left = dot(row, row).sqrt();
        let gain = if left > 1e-6 * length {
            1.0 / left
        } else {
            0.0
        };
        row.iter_mut()
            .for_each(|v| *v = (f64::from(*v) * gain) as f32);
    }
}

/// Eigenvalues and eigenvectors (columns) of a symmetric matrix, by Jacobi's rotations.
fn eigen(mut m: Vec<f64>, n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; n * n];
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    let size: f64 = m.iter().map(|v| v * v).sum();
    for _ in 0..64 {
        let off: f64 = (0..n * n)
            .filter(|at| at / n != at % n)
            .map(|at| m[at] * m[at])
            .sum();
        if off <= 1e-28 * size {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let between = m[p * n + q];
                if between == 0.0 {
                    continue;
                }
                let theta = (m[q * n + q] - m[p * n + p]) / (2.0 * between);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                rotate(&mut m, &mut vectors, n, (p, q), (c, t * c));
            }
        }
    }
    ((0..n).map(|i| m[i * n + i]).collect(), vectors)
}

/// Turns the plane of axes `p` and `q`.
fn rotate(
    m: &mut [f64],
    vectors: &mut [f64],
    n: usize,
    (p, q): (usize, usize),
    (c, s): (f64, f64),
) {
    for i in 0..n {
        let (x, y) = (m[i * n + p], m[i * n + q]);
        (m[i * n + p], m[i * n + q]) = (c * x - s * y, s * x + c * y);
    }
    for i in 0..n {
        let (x, y) = (m[p * n + i], m[q * n + i]);
        (m[p * n + i], m[q * n + i]) = (c * x - s * y, s * x + c * y);
        let (x, y) = (vectors[i * n + p], vectors[i * n + q]);
        (vectors[i * n + p], vectors[i * n + q]) = (c * x - s * y, s * x + c * y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix of a known spectrum: the error is that of the directions that are left out.
    #[test]
    fn the_nearest_product_is_found() {
        let cpu = Cpu::new(2);
        for (n, k, spectrum, rank) in [
            (40, 30, vec![5.0, 3.0, 1.0, 0.1], 2),
            (33, 70, vec![2.0, 2.0, 1.0], 3),
            (64, 64, (0..64).map(|i| 0.9f32.powi(i)).collect(), 16),
            (5, 9, vec![1.0, 0.5], 7),
        ] {
            let mut rng = Rng::new(7);
            let mut axes = |width: usize| {
                let mut rows = vec![0f32; spectrum.len() * width];
                rng.fill_normal(&mut rows, 0.0, 1.0);
                orthonormalize(&mut rows, width);
                rows
            };
            let (u, v) = (axes(n), axes(k));
            let element = |at: usize| -> f32 {
                let terms = spectrum.iter().enumerate();
                terms
                    .map(|(i, s)| s * u[i * n + at / k] * v[i * k + at % k])
                    .sum()
            };
            let matrix: Vec<f32> = (0..n * k).map(element).collect();
            let (b, a) = low_rank(&cpu, &matrix, [n, k], rank);
            let near = multiplied(&cpu, &b, &a, [n, k]);
            let error: Vec<f32> = matrix.iter().zip(&near).map(|(m, n)| m - n).collect();
            let rest: f32 = spectrum.iter().skip(rank).map(|s| s * s).sum();
            let (error, rest) = (dot(&error, &error).sqrt(), f64::from(rest).sqrt());
            assert!(
                (error - rest).abs() < 1e-3 * rest + 1e-5,
                "[{n}, {k}]: error {error:.6} for {rest:.6}"
            );
        }
    }
}
