//! `y = x Wᵀ` for packed matrices and quantized activations.

use super::activations::Activations;
use super::matrix::PackedMatrix;
use super::{PANEL, STEP, reference};
use crate::Element;
use crate::dispatch::Level;
use crate::pool::{Pool, SharedMut, Worker};
use std::ops::Range;

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

/// What a task computes: panels and rows of activations. No result depends on it.
#[derive(Clone, Copy)]
struct Cut {
    panels: usize,
    rows: usize,
}

/// 256 rows of the matrix, which stay in the second cache while blocks of activations pass by, and are read by the core that
/// asked for them at the end of a tile; rows of activations enough that reading them anew for other panels costs little.
const VECTORS: Cut = Cut {
    panels: 16,
    rows: 128,
};
/// With AMX, a panel is unpacked once for all of a task's rows; two pairs of panels of that many are work enough.
const TILES: Cut = Cut {
    panels: 4,
    rows: 256,
};
/// Panels times rows of the largest tile.
const TILE: usize = 16;

/// The sums of a tile. Each is a line: one that crosses lines could not be read before it has been written to the cache.
#[repr(align(64))]
struct Sums([[f32; PANEL]; TILE]);

/// Rows from which tiles are used. A panel's codes are unpacked to memory for them, which pays from the second block of
/// eight rows on; fewer rows wait for the panel's bytes in either way.
const TILE_ROWS: usize = 9;

/// Whether products of many rows run on AMX tiles.
pub(crate) fn uses_tiles(level: Level) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        level == Level::Amx && super::kernel::has_vnni()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        false
    }
}

/// The instructions that packed products use at a level, for people.
pub fn kernel_names(level: Level) -> &'static str {
    if uses_tiles(level) {
        return "AMX-INT8 tiles from 9 rows on, AVX-512 VNNI below";
    }
    match level {
        Level::Scalar => "scalar",
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx if super::kernel::has_vnni() => "AVX-512 VNNI",
        _ => "AVX2",
    }
}

struct Job<'a, E> {
    matrix: &'a PackedMatrix,
    bias: Option<&'a [E]>,
    residual: Option<&'a [E]>,
    out: SharedMut<'a, E>,
    /// Rows of the activations, the first of which is the first of the result.
    rows: Range<usize>,
    cut: Cut,
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
    multiply_some(pool, x, products.iter_mut().map(|p| (0..x.rows(), p)));
}

/// As [`multiply`], each product of some of the rows: a group that [`Activations::grouped`] has made, or any row alone.
///
/// # Panics
/// When shapes do not fit, or rows are no such group.
#[track_caller]
pub fn multiply_groups<E: Element>(
    pool: &Pool,
    x: &Activations,
    products: &mut [(Range<usize>, Product<'_, E>)],
) {
    multiply_some(
        pool,
        x,
        products.iter_mut().map(|(rows, p)| (rows.clone(), p)),
    );
}

#[track_caller]
fn multiply_some<'p, 'a: 'p, E: Element>(
    pool: &Pool,
    x: &Activations,
    products: impl Iterator<Item = (Range<usize>, &'p mut Product<'a, E>)>,
) {
    let mut tasks = 0;
    let mut jobs = Vec::new();
    for (rows, product) in products {
        let m = rows.len();
        let cut = match uses_tiles(pool.level()) && m >= TILE_ROWS {
            true => TILES,
            false => VECTORS,
        };
        assert!(
            rows.end <= x.rows() && x.is_group(&rows),
            "rows {rows:?} of {} are no group",
            x.rows()
        );
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
            rows,
            cut,
            first: tasks,
        });
        tasks += n.div_ceil(PANEL * cut.panels) * m.div_ceil(cut.rows);
    }
    pool.run(tasks, |task, worker| {
        let job = jobs.partition_point(|job| job.first <= task) - 1;
        let job = &jobs[job];
        let panels = job.matrix.rows().div_ceil(PANEL);
        let cut = job.cut;
        let groups = panels.div_ceil(cut.panels);
        let (block, group) = ((task - job.first) / groups, (task - job.first) % groups);
        let panels = group * cut.panels..((group + 1) * cut.panels).min(panels);
        let start = job.rows.start + block * cut.rows;
        let rows = start..(start + cut.rows).min(job.rows.end);
        run_task(pool, worker, x, job, panels, rows);
    });
}

fn run_task<E: Element>(
    pool: &Pool,
    worker: &mut Worker,
    x: &Activations,
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
) {
    #[cfg(target_arch = "x86_64")]
    {
        let (level, layout) = (pool.level(), job.matrix.layout());
        if uses_tiles(level) && rows.len() >= TILE_ROWS {
            return run_amx(level, worker, x, job, panels, rows);
        }
        let half_steps = layout.sub() == STEP / 2;
        if level != Level::Scalar {
            let kernels = |rows| super::kernel::choose(level, layout.codes, half_steps, rows);
            return run_tiles(level, kernels, worker, x, job, panels, rows);
        }
    }
    let _ = (pool, worker);
    for panel in panels {
        for row in rows.clone() {
            let mut sums = [0f32; PANEL];
            for (lane, sum) in sums.iter_mut().enumerate() {
                let n = panel * PANEL + lane;
                if n < job.matrix.rows() {
                    *sum = reference::dot(job.matrix, n, x, row);
                }
            }
            finish(job, panel, row..row + 1, &[sums]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn run_tiles<E: Element>(
    level: Level,
    kernels: impl Fn(usize) -> super::kernel::Kernel,
    worker: &mut Worker,
    x: &Activations,
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
) {
    use super::kernel::Tile;
    let (layout, units) = (job.matrix.layout(), job.matrix.units());
    let last = |range: &Range<usize>, at: usize| at.min(range.end - 1);
    let finish = finisher(level);
    let mut sums = Sums([[0f32; PANEL]; TILE]);
    let starts = worker.scratch::<f32>(units.steps() * layout.halves().len() * TILE);
    // SAFETY: the same size and alignment; all bit patterns are valid.
    let starts = unsafe { &mut *(std::ptr::from_mut(starts) as *mut [i32]) };
    // A block of rows stays in the first cache and panels pass by from the second: what a tile writes then lies beside what
    // the tile before it wrote.
    let mut row = rows.start;
    while row < rows.end {
        // What is left in the end may be few.
        let kernel = kernels(rows.end - row);
        let cell = x.cell(row, 0);
        let (quants, scales) = (&x.quants()[cell * STEP..], &x.scales()[cell..]);
        kernel.starts(layout, scales, (x.height(), x.block()), starts);
        for panel in panels.clone().step_by(kernel.panels) {
            // Tiles at an edge compute their last panel or row again, and drop it; a tile's rows are in one block, for both
            // numbers are powers of two.
            let mut at = [std::ptr::null(); TILE];
            for (p, at) in at[..kernel.panels].iter_mut().enumerate() {
                *at = job.matrix.panel(last(&panels, panel + p)).as_ptr();
            }
            let tile = Tile {
                layout,
                units,
                panels: &at[..kernel.panels],
                ahead: kernel.panels * units.bytes(),
                quants: quants.as_ptr(),
                scales: scales.as_ptr(),
                height: x.height(),
                block: x.block(),
                starts: starts.as_ptr(),
                out: sums.0.as_mut_ptr().cast(),
            };
            // SAFETY: `choose` saw the features; panels and rows are as long as the layout says (activations are padded to
            // whole units), and `starts` and `sums` hold the tile's.
            unsafe { (kernel.run)(&tile) };
            let tile_rows = row..rows.end.min(row + kernel.rows);
            for p in 0..kernel.panels.min(panels.end - panel) {
                // SAFETY: the level's features are there.
                unsafe {
                    finish(
                        job,
                        panel + p,
                        tile_rows.clone(),
                        &sums.0[p * kernel.rows..],
                    )
                };
            }
        }
        row += kernel.rows;
    }
}

#[cfg(target_arch = "x86_64")]
fn run_amx<E: Element>(
    level: Level,
    worker: &mut Worker,
    x: &Activations,
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
) {
    use super::amx::{Kernel, PANELS, ROWS, Space, Work};
    assert_eq!(x.height(), ROWS, "rows of a block of activations");
    let (matrix, finish) = (job.matrix, finisher(level));
    let kernel = Kernel::choose(matrix.layout());
    let blocks = rows.len().div_ceil(ROWS);
    let (space, sums) = worker.scratch2::<f32, f32>(Space::LEN, blocks * PANELS * ROWS * PANEL);
    let cell = x.cell(rows.start, 0);
    // SAFETY: `uses_tiles` saw the features; panels and rows are as long as the layout says (activations are padded to
    // whole units and blocks), `space` and `sums` have the sizes that the kernel asks for.
    unsafe {
        kernel.config.enter();
        for panel in panels.clone().step_by(PANELS) {
            let at = |p: usize| matrix.panel((panel + p).min(panels.end - 1)).as_ptr();
            (kernel.run)(&Work {
                layout: matrix.layout(),
                units: matrix.units(),
                panels: std::array::from_fn(at),
                quants: x.quants()[cell * STEP..].as_ptr(),
                scales: x.scales()[cell..].as_ptr(),
                steps: x.steps(),
                blocks,
                space: space.as_mut_ptr().cast(),
                sums: sums.as_mut_ptr(),
            });
            for (tile, sums) in sums.as_chunks::<PANEL>().0.chunks(ROWS).enumerate() {
                let (block, panel) = (tile / PANELS, panel + tile % PANELS);
                let first = rows.start + block * ROWS;
                if panel < panels.end {
                    finish(job, panel, first..rows.end, sums);
                }
            }
        }
        crate::tiles::leave();
    }
}

/// Of `(job, panel, rows, sums)`: adds bias and residual to a panel's sums and writes these rows of the result.
type Finish<E> = unsafe fn(&Job<'_, E>, usize, Range<usize>, &[[f32; PANEL]]);

/// The same code compiled for each level.
fn finisher<E: Element>(level: Level) -> Finish<E> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn avx2<E: Element>(
            job: &Job<'_, E>,
            panel: usize,
            rows: Range<usize>,
            sums: &[[f32; PANEL]],
        ) {
            finish(job, panel, rows, sums);
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c")]
        unsafe fn avx512<E: Element>(
            job: &Job<'_, E>,
            panel: usize,
            rows: Range<usize>,
            sums: &[[f32; PANEL]],
        ) {
            finish(job, panel, rows, sums);
        }
        match level {
            Level::Scalar => finish,
            Level::Avx2 => avx2,
            Level::Avx512 | Level::Amx => avx512,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        finish
    }
}

#[inline(always)]
fn finish<E: Element>(job: &Job<'_, E>, panel: usize, rows: Range<usize>, sums: &[[f32; PANEL]]) {
    let n = job.matrix.rows();
    let start = panel * PANEL;
    let len = PANEL.min(n - start);
    for (row, sums) in rows.zip(sums) {
        let row = row - job.rows.start;
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
