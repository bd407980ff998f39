//! `y = x Wᵀ` for packed matrices and quantized activations.

use super::activations::{Activations, Tiles};
use super::matrix::PackedMatrix;
use super::{PANEL, STEP, reference};
use crate::dispatch::{Level, kernels};
use crate::pool::{Pool, SharedMut, Worker};
use crate::simd::{Simd, SimdElement};
use crate::stream::prefetch;
use crate::{DType, Element};
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

impl Cut {
    /// For tiles: a unit of a panel is unpacked once for all of a task's rows, and their tiles are read once for all of its
    /// panels, from a cache that other cores share. So tasks are as large as leaves some for each thread.
    fn tiles(rows: usize, panels: usize, threads: usize) -> Cut {
        const ROWS: usize = 512;
        let each = panels * rows.div_ceil(ROWS) / (4 * threads);
        Cut {
            panels: each.clamp(4, 32) / 4 * 4,
            rows: ROWS,
        }
    }
}

/// Panels times rows of the largest tile.
const TILE: usize = 16;

/// The sums of a tile. Each is a line: one that crosses lines could not be read before it has been written to the cache.
#[repr(align(64))]
struct Sums([[f32; PANEL]; TILE]);

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
        return "AMX tiles from 9 rows on, AVX-512 VNNI below";
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
    /// The rows of activations that tiles multiply, where they do.
    tiles: Option<Tiles<'a>>,
    bias: Option<&'a [E]>,
    residual: Option<&'a [E]>,
    out: SharedMut<'a, E>,
    /// Rows of the activations, the first of which is the first of the result.
    rows: Range<usize>,
    cut: Cut,
    /// Number of the first task.
    first: usize,
}

impl<E: Element> Job<'_, E> {
    /// Where a panel's columns of a row begin in the result.
    #[inline(always)]
    fn at(&self, row: usize, panel: usize) -> usize {
        (row - self.rows.start) * self.matrix.rows() + panel * PANEL
    }
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
        assert!(
            rows.end <= x.rows() && x.is_group(&rows),
            "rows {rows:?} of {} are no group",
            x.rows()
        );
        let (n, k) = (product.matrix.rows(), product.matrix.cols());
        let tiles = x.tiles(pool, &rows, product.matrix.layout());
        let cut = match tiles {
            Some(_) => Cut::tiles(m, n.div_ceil(PANEL), pool.threads()),
            None => VECTORS,
        };
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
            tiles,
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
        if let Some(tiles) = job.tiles {
            return run_amx(level, worker, (x, tiles), job, panels, rows);
        }
        if level != Level::Scalar {
            let kernels = |rows| super::kernel::choose(level, layout, rows);
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
            finish(job, panel..panel + 1, row..row + 1, &[sums], 1);
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
    let finish = finisher::<E>(level);
    let mut sums = Sums([[0f32; PANEL]; TILE]);
    let starts = worker.scratch::<f32>(units.steps() * layout.parts().len() * TILE);
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
            let tile_panels = panel..panels.end.min(panel + kernel.panels);
            // SAFETY: the level's features are there.
            unsafe { finish(job, tile_panels, tile_rows, &sums.0, kernel.rows) };
        }
        row += kernel.rows;
    }
}

#[cfg(target_arch = "x86_64")]
fn run_amx<E: Element>(
    level: Level,
    worker: &mut Worker,
    (x, tiles): (&Activations, Tiles<'_>),
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
) {
    use super::amx::{ROWS, Space, TILES, Work};
    let (matrix, finish) = (job.matrix, finisher::<E>(level));
    let kernel = super::amx::choose(matrix.layout());
    let blocks = rows.len().div_ceil(ROWS);
    let len = blocks * panels.len() * ROWS * PANEL;
    let (space, sums) = worker.scratch2::<f32, f32>(Space::LEN, len);
    let work = Work {
        matrix,
        panels: panels.clone(),
        tiles,
        first: rows.start / ROWS,
        blocks,
        scales: x.scales()[x.cell(rows.start, 0)..].as_ptr(),
        block: x.block(),
        space: space.as_mut_ptr().cast(),
        sums: sums.as_mut_ptr(),
    };
    // SAFETY: `uses_tiles` saw the features; panels and rows are as long as the layout says (activations are padded to whole
    // units and tiles), `space` and `sums` have the sizes that the kernel asks for.
    unsafe {
        TILES.enter();
        kernel(&work);
        crate::tiles::leave();
        let sums = sums.as_chunks::<PANEL>().0.chunks(panels.len() * ROWS);
        for (sums, first) in sums.zip(rows.clone().step_by(ROWS)) {
            let rows = first..rows.end.min(first + ROWS);
            finish(job, panels.clone(), rows, sums, ROWS);
        }
    }
}

kernels! {
    /// Adds bias and residual to sums `[panels, pitch, 16]` and writes these rows of the result.
    fn finisher<E>(
        job: &Job<'_, E>, panels: Range<usize>, rows: Range<usize>, sums: &[[f32; PANEL]], pitch: usize,
    ) -> () {
        scalar: finish, simd: finish_simd
    }
}

fn finish<E: Element>(
    job: &Job<'_, E>,
    panels: Range<usize>,
    rows: Range<usize>,
    sums: &[[f32; PANEL]],
    pitch: usize,
) {
    for (m, row) in rows.enumerate() {
        for (p, panel) in panels.clone().enumerate() {
            let at = job.at(row, panel);
            let len = PANEL.min(job.matrix.rows() - panel * PANEL);
            // SAFETY: a task has its own rows and panels.
            let out = unsafe { job.out.slice(at, len) };
            for (column, out) in out.iter_mut().enumerate() {
                let mut sum = sums[p * pitch + m][column];
                if let Some(bias) = job.bias {
                    sum += bias[panel * PANEL + column].to_f64() as f32;
                }
                if let Some(residual) = job.residual {
                    sum += residual[at + column].to_f64() as f32;
                }
                *out = E::from_f64(f64::from(sum));
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
    sums: &[[f32; PANEL]],
    pitch: usize,
) {
    let first = panels.start * PANEL;
    let columns = job.matrix.rows().min(panels.end * PANEL) - first;
    assert!(sums.len() >= (panels.len() - 1) * pitch + rows.len());
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
            let sums = sums.as_ptr().add(m);
            let mut column = 0;
            while column < columns {
                let n = (columns - column).min(S::LANES);
                let sums = sums.add(column / PANEL * pitch).cast::<f32>();
                prefetch(sums.wrapping_add(AHEAD * PANEL).cast());
                let mut sum = S::load(sums.add(column % PANEL));
                if let Some(bias) = job.bias {
                    sum = sum + load::<S, E>(bias.as_ptr().add(first + column), n);
                }
                if let Some(residual) = job.residual {
                    sum = sum + load::<S, E>(residual.as_ptr().add(at + column), n);
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
