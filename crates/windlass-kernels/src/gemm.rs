//! Matrix products: `C = op(A) op(B)`, with what usually follows them.
//!
//! Operands are packed into slivers that a micro-kernel multiplies in registers; the layouts differ in packing only.
//! `f16` and `bf16` are widened to `f32` while they are packed; `bf16` is multiplied in pairs where a CPU does that at
//! twice the rate, or by AMX tiles. Few rows (a decode step) stream B once instead of sharing a packed copy.
//!
//! What holds for the bits of a result, at one level and storage type: they depend on one row of A, one column of B and
//! the epilogue's operands; not on the number of threads, on other rows or columns, on the layout, nor on strides. On
//! `f32` products (all but AMX and pairs) AVX2 and AVX-512 give the same bits: sums are fused multiply-adds in order
//! inside blocks of 384, and the blocks' sums are added in order.
//!
//! A B that is packed ([`gemm_packed`]) is unpacked a block at a time, where it would be copied anyway; the bits are those
//! of the same product with all of it unpacked.
//!
//! There is no batched product and no product of mixed operand types.

use crate::Element;
use crate::dispatch::Level;
use crate::packed::{PackedMatrix, Unpack};
use crate::pool::{Pool, SharedMut};
use std::ops::Range;

mod amx;
mod blocking;
mod finish;
mod kernel;
mod lanes;
mod micro;
pub mod reference;

use blocking::Right;
use kernel::{Kernel, Source};

/// Which operands are read transposed; all are row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `A[m, k] B[n, k]ᵀ`: a linear layer, B being its weight.
    Nt,
    /// `A[m, k] B[k, n]`: a linear layer's gradient by its input.
    Nn,
    /// `A[k, m]ᵀ B[k, n]`: a linear layer's gradient by its weight; `k` counts tokens.
    Tn,
}

/// A row-major matrix: row `r` starts at `data[r * stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a, E> {
    /// The elements.
    pub data: &'a [E],
    /// Elements between the starts of two rows.
    pub stride: usize,
}

/// What is added to the sums before they are rounded, in this order.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<'a, E> {
    /// Adds what C holds.
    pub accumulate: bool,
    /// `[n]`, added to every row.
    pub bias: Option<&'a [E]>,
    /// `[m, n]`.
    pub residual: Option<Mat<'a, E>>,
}

impl<E> Default for Epilogue<'_, E> {
    fn default() -> Self {
        Epilogue {
            accumulate: false,
            bias: None,
            residual: None,
        }
    }
}

/// Floating-point operations of a product: `2 m n k`.
pub fn gemm_flops(m: usize, n: usize, k: usize) -> u64 {
    2 * m as u64 * n as u64 * k as u64
}

/// Which micro-kernel multiplies at this pool's level; for reports.
pub fn gemm_kernel_name<E: Element>(pool: &Pool) -> &'static str {
    kernel::select(E::DTYPE, pool.level()).map_or("scalar reference", |kernel| kernel.name)
}

/// Bytes a product has to move: both operands read and C written once.
pub fn gemm_bytes<E: Element, C: Element>(m: usize, n: usize, k: usize) -> u64 {
    ((m * k + n * k) * E::DTYPE.size() + m * n * C::DTYPE.size()) as u64
}

/// `C[m, n] = op(A) op(B) (+ C) (+ bias[n]) (+ residual[m, n])`, summed in `E::Acc` and rounded once.
///
/// # Shapes
/// As [`Layout`] says; C's row `r` starts at `c[r * c_stride]`. Elements between rows are not touched.
///
/// # Panics
/// When an operand is too short or a stride is smaller than its row.
#[track_caller]
pub fn gemm<E: Element, C: Element<Acc = E::Acc>>(
    pool: &Pool,
    layout: Layout,
    m: usize,
    n: usize,
    k: usize,
    a: Mat<E>,
    b: Mat<E>,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    let kernel = kernel::select(E::DTYPE, pool.level());
    gemm_with(pool, kernel, layout, (m, n, k), a, b, c, c_stride, epilogue);
}

/// `C[m, cols] = A[m, rows] B (+ C) (+ bias) (+ residual)` with a packed `B [rows, cols]`: a linear layer's gradient by its
/// input, with the bits that [`gemm`] gives ([`Layout::Nn`]) with all of B in `E`.
///
/// # Panics
/// As [`gemm`].
#[track_caller]
pub fn gemm_packed<E: Element, C: Element<Acc = E::Acc>>(
    pool: &Pool,
    m: usize,
    a: Mat<E>,
    b: &PackedMatrix,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    let (k, n) = (b.rows(), b.cols());
    if m == 0 {
        return;
    }
    let Some(kernel) = kernel::select(E::DTYPE, pool.level()) else {
        let mut data = vec![E::from_f64(0.0); k * n];
        b.unpack_rows(pool, 0..k, &mut data);
        let b = Mat {
            data: &data,
            stride: n,
        };
        return gemm(pool, Layout::Nn, m, n, k, a, b, c, c_stride, epilogue);
    };
    assert_operands((m, n), (a, m, k), c, c_stride, &epilogue);
    // SAFETY: the pool's level is supported.
    let unpack = unsafe { Unpack::<E>::new(b, pool.level()) };
    let read = |steps: Range<usize>, columns: Range<usize>, room: &mut [f32], out: *mut u8| {
        // SAFETY: `out` has room for the block, any bytes are an `E`, and it is aligned as all scratch memory.
        let out =
            unsafe { std::slice::from_raw_parts_mut(out.cast::<E>(), steps.len() * columns.len()) };
        unpack.block(steps, columns, room, out);
    };
    let b = Right::Packed {
        read: &read,
        size: size_of::<E>(),
    };
    run(
        pool,
        kernel,
        (m, n, k),
        source(a, true),
        b,
        c,
        c_stride,
        epilogue,
    );
}

/// [`gemm`] by a given kernel, or by the reference.
#[track_caller]
fn gemm_with<E: Element, C: Element<Acc = E::Acc>>(
    pool: &Pool,
    kernel: Option<&Kernel>,
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    a: Mat<E>,
    b: Mat<E>,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    let (a_rows, a_columns) = if layout == Layout::Tn { (k, m) } else { (m, k) };
    let (b_rows, b_columns) = if layout == Layout::Nt { (n, k) } else { (k, n) };
    assert_fits("B", b.data.len(), b.stride, b_rows, b_columns);
    assert_operands((m, n), (a, a_rows, a_columns), c, c_stride, &epilogue);
    let Some(kernel) = kernel else {
        return by_reference(pool, layout, (m, n, k), a, b, c, c_stride, epilogue);
    };
    let a = source(a, layout != Layout::Tn);
    let b = Right::Plain(source(b, layout == Layout::Nt));
    run(pool, kernel, (m, n, k), a, b, c, c_stride, epilogue);
}

/// Checks all operands but B.
#[track_caller]
fn assert_operands<E, C>(
    (m, n): (usize, usize),
    (a, a_rows, a_columns): (Mat<E>, usize, usize),
    c: &[C],
    c_stride: usize,
    epilogue: &Epilogue<E>,
) {
    assert_fits("A", a.data.len(), a.stride, a_rows, a_columns);
    assert_fits("C", c.len(), c_stride, m, n);
    if let Some(bias) = epilogue.bias {
        assert!(
            bias.len() == n,
            "bias has {} elements, C has {n} columns",
            bias.len()
        );
    }
    if let Some(residual) = &epilogue.residual {
        assert_fits("residual", residual.data.len(), residual.stride, m, n);
    }
}

/// A matrix as packing sees it.
fn source<E>(mat: Mat<E>, k_contiguous: bool) -> Source {
    Source {
        data: mat.data.as_ptr().cast(),
        stride: mat.stride * size_of::<E>(),
        size: size_of::<E>(),
        k_contiguous,
    }
}

/// Runs a kernel on checked operands.
fn run<E: Element, C: Element<Acc = E::Acc>>(
    pool: &Pool,
    kernel: &Kernel,
    (m, n, k): (usize, usize, usize),
    a: Source,
    b: Right<'_>,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    if m == 0 || n == 0 {
        return;
    }
    let level = if pool.level() == Level::Avx2 {
        Level::Avx2
    } else {
        Level::Avx512
    };
    let problem = blocking::Problem {
        kernel,
        m,
        n,
        k,
        a,
        b,
        target: finish::Target {
            c: c.as_mut_ptr().cast(),
            c_stride,
            accumulate: epilogue.accumulate,
            bias: epilogue
                .bias
                .map_or(std::ptr::null(), |bias| bias.as_ptr().cast()),
            residual: epilogue
                .residual
                .map_or(std::ptr::null(), |r| r.data.as_ptr().cast()),
            residual_stride: epilogue.residual.map_or(0, |r| r.stride),
            finish: finish::select(E::DTYPE, C::DTYPE, level),
        },
    };
    blocking::run(pool, &problem);
}

/// The reference on fixed blocks of rows.
fn by_reference<E: Element, C: Element<Acc = E::Acc>>(
    pool: &Pool,
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    a: Mat<E>,
    b: Mat<E>,
    c: &mut [C],
    c_stride: usize,
    epilogue: Epilogue<E>,
) {
    const ROWS: usize = 8;
    let c = SharedMut::new(c);
    pool.run(m.div_ceil(ROWS), |task, _| {
        let first = task * ROWS;
        let rows = ROWS.min(m - first);
        let a_start = if layout == Layout::Tn {
            first
        } else {
            first * a.stride
        };
        let a = Mat {
            data: a.data.get(a_start..).unwrap_or_default(),
            stride: a.stride,
        };
        let residual = epilogue.residual.map(|r| Mat {
            data: &r.data[first * r.stride..],
            stride: r.stride,
        });
        // SAFETY: every task has its own rows of C.
        let c = unsafe { c.slice(first * c_stride, (rows - 1) * c_stride + n) };
        reference::gemm(
            layout,
            (rows, n, k),
            a,
            b,
            c,
            c_stride,
            Epilogue {
                residual,
                ..epilogue
            },
        );
    });
}

/// Refuses a matrix of `len` elements that cannot hold `rows x columns`.
#[track_caller]
fn assert_fits(name: &str, len: usize, stride: usize, rows: usize, columns: usize) {
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(
        rows == 1 || stride >= columns,
        "{name}: stride {stride} is smaller than its row of {columns}"
    );
    let need = (rows - 1) * stride + columns;
    assert!(
        len >= need,
        "{name}: {rows} x {columns} with stride {stride} needs {need} elements, got {len}"
    );
}

#[cfg(test)]
mod tests;
