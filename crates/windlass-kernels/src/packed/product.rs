//! `y = x Wᵀ` for packed matrices and quantized activations.

use super::activations::Activations;
use super::matrix::PackedMatrix;
use super::{PANEL, STEP, reference};
use crate::Element;
use crate::pool::{Pool, SharedMut};

/// One product of several that share their activations.
pub struct Product<'a, E> {
    /// The matrix `[N, K]`.
    pub matrix: &'a PackedMatrix,
    /// Added to every row, `[N]`.
    pub bias: Option<&'a [E]>,
    /// Added to the result, `[M, N]`.
    pub residual: Option<&'a [E]>,
    /// The result, `[M, N]`.
    pub out: &'a mut [E],
}

/// Panels of a task, 256 rows of the matrix: what is asked for at the end of a tile is read by the same core.
const TASK_PANELS: usize = 16;
/// Rows of activations of a task: they stay in the second cache while panels pass by.
const TASK_ROWS: usize = 128;
/// Panels times rows of the largest tile.
const TILE: usize = 16;

struct Job<'a, E> {
    matrix: &'a PackedMatrix,
    bias: Option<&'a [E]>,
    residual: Option<&'a [E]>,
    out: SharedMut<'a, E>,
    /// Number of the first task.
    first: usize,
}

/// Multiplies the same activations with several matrices in one run of the pool.
///
/// Sums are rounded to `E` once, after bias and residual have been added.
///
/// # Panics
/// When shapes do not fit.
#[track_caller]
pub fn multiply<E: Element>(pool: &Pool, x: &Activations, products: &mut [Product<'_, E>]) {
    let m = x.rows();
    let row_blocks = m.div_ceil(TASK_ROWS);
    let mut tasks = 0;
    let mut jobs = Vec::with_capacity(products.len());
    for product in products {
        let (n, k) = (product.matrix.rows(), product.matrix.cols());
        assert_eq!(
            x.cols(),
            k,
            "columns of activations against a matrix [{n}, {k}]"
        );
        assert_eq!(
            product.out.len(),
            m * n,
            "the result of {m} rows and a matrix [{n}, {k}]"
        );
        assert!(
            product.bias.is_none_or(|b| b.len() == n),
            "a bias against a matrix [{n}, {k}]"
        );
        assert!(
            product.residual.is_none_or(|r| r.len() == m * n),
            "a residual against {m} rows and a matrix [{n}, {k}]"
        );
        jobs.push(Job {
            matrix: product.matrix,
            bias: product.bias,
            residual: product.residual,
            out: SharedMut::new(product.out),
            first: tasks,
        });
        tasks += n.div_ceil(PANEL * TASK_PANELS) * row_blocks;
    }
    pool.run(tasks, |task, _| {
        let job = jobs.partition_point(|job| job.first <= task) - 1;
        let job = &jobs[job];
        let panels = job.matrix.rows().div_ceil(PANEL);
        let groups = panels.div_ceil(TASK_PANELS);
        let (block, group) = ((task - job.first) / groups, (task - job.first) % groups);
        let panels = group * TASK_PANELS..((group + 1) * TASK_PANELS).min(panels);
        let rows = block * TASK_ROWS..((block + 1) * TASK_ROWS).min(m);
        run_task(pool, x, job, panels, rows);
    });
}

fn run_task<E: Element>(
    pool: &Pool,
    x: &Activations,
    job: &Job<'_, E>,
    panels: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
) {
    #[cfg(target_arch = "x86_64")]
    if let Some(kernel) = super::kernel::choose(
        pool.level(),
        job.matrix.layout().codes,
        job.matrix.layout().sub() == 16,
        rows.len(),
    ) {
        return run_tiles(kernel, x, job, panels, rows);
    }
    let _ = pool;
    for panel in panels {
        for row in rows.clone() {
            let mut sums = [0f32; PANEL];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let n = panel * PANEL + lane;
                if n < job.matrix.rows() {
                    *sum = reference::dot(job.matrix, n, x, row);
                }
            }
            finish(job, panel, row, &sums);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn run_tiles<E: Element>(
    kernel: super::kernel::Kernel,
    x: &Activations,
    job: &Job<'_, E>,
    panels: std::ops::Range<usize>,
    rows: std::ops::Range<usize>,
) {
    use super::kernel::Tile;
    let last = |range: &std::ops::Range<usize>, at: usize| at.min(range.end - 1);
    let mut sums = [[0f32; PANEL]; TILE];
    for panel in panels.clone().step_by(kernel.panels) {
        // Tiles at an edge compute their last panel or row again, and drop it; a tile's rows are in one block, for both
        // numbers are powers of two.
        let mut at = [std::ptr::null(); TILE];
        for (p, at) in at[..kernel.panels].iter_mut().enumerate() {
            *at = job.matrix.panel(last(&panels, panel + p)).as_ptr();
        }
        for row in rows.clone().step_by(kernel.rows) {
            let cell = x.cell(row, 0);
            let tile = Tile {
                layout: job.matrix.layout(),
                units: job.matrix.units(),
                panels: &at[..kernel.panels],
                ahead: kernel.panels * job.matrix.units().bytes(),
                quants: x.quants()[cell * STEP..].as_ptr(),
                scales: x.scales()[cell..].as_ptr(),
                height: x.height(),
                out: sums.as_mut_ptr().cast(),
                zero: job.matrix.layout().zero(),
            };
            // SAFETY: `choose` saw the features; panels and rows are as long as the layout says (activations are padded to
            // whole units), and `sums` holds the tile.
            unsafe { (kernel.run)(&tile) };
            for p in 0..kernel.panels.min(panels.end - panel) {
                for m in 0..kernel.rows.min(rows.end - row) {
                    finish(job, panel + p, row + m, &sums[p * kernel.rows + m]);
                }
            }
        }
    }
}

/// Adds bias and residual and writes 16 elements of a row of the result.
#[inline]
fn finish<E: Element>(job: &Job<'_, E>, panel: usize, row: usize, sums: &[f32; PANEL]) {
    let n = job.matrix.rows();
    let start = panel * PANEL;
    let len = PANEL.min(n - start);
    let mut sums = *sums;
    // SAFETY: a task has its own rows and panels.
    let out = unsafe { job.out.slice(row * n + start, len) };
    for more in [
        job.bias.map(|bias| &bias[start..start + len]),
        job.residual.map(|r| &r[row * n + start..][..len]),
    ]
    .into_iter()
    .flatten()
    {
        match <&[E; PANEL]>::try_from(more) {
            Ok(more) => add(&mut sums, more),
            Err(_) => add(&mut sums, more),
        }
    }
    // A length that is known becomes vectors.
    match <&mut [E; PANEL]>::try_from(&mut *out) {
        Ok(out) => write(out, &sums),
        Err(_) => write(out, &sums),
    }
}

#[inline(always)]
fn write<E: Element>(out: &mut [E], sums: &[f32; PANEL]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = E::from_f64(f64::from(*sum));
    }
}

#[inline(always)]
fn add<E: Element>(sums: &mut [f32; PANEL], more: &[E]) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum += more.to_f64() as f32;
    }
}
