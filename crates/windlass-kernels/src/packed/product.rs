//! `y = x Wᵀ` for packed matrices and quantized activations.

use super::activations::{Activations, BLOCK, Tiles};
use super::finish::{Sums, finish, finisher};
use super::matrix::PackedMatrix;
use super::{PANEL, STEP, reference};
use crate::Element;
use crate::activation::Activation;
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
    /// What the result is multiplied with, in place of a residual.
    pub gate: Option<Gate<'a, E>>,
    /// The result, `[M, N]`.
    pub out: &'a mut [E],
}

impl<'a, E> Product<'a, E> {
    /// `x Wᵀ`.
    pub fn of(matrix: &'a PackedMatrix, out: &'a mut [E]) -> Product<'a, E> {
        Product {
            matrix,
            bias: None,
            residual: None,
            gate: None,
            out,
        }
    }

    /// # Panics
    /// When shapes do not fit `m` rows of `x`.
    #[track_caller]
    fn check(&self, x: &Activations, m: usize) {
        let (n, k) = (self.matrix.rows(), self.matrix.cols());
        assert_eq!(
            x.cols(),
            k,
            "columns of activations against a matrix [{n}, {k}]"
        );
        assert_eq!(
            self.out.len(),
            m * n,
            "the result of {m} rows and a matrix [{n}, {k}]"
        );
        let fits = |bias: Option<&[E]>| bias.is_none_or(|b| b.len() == n);
        assert!(fits(self.bias), "a bias against a matrix [{n}, {k}]");
        assert!(
            self.residual.is_none_or(|r| r.len() == m * n),
            "a residual against {m} rows and a matrix [{n}, {k}]"
        );
        if let Some(gate) = &self.gate {
            assert_eq!(
                (
                    [gate.matrix.rows(), gate.matrix.cols()],
                    gate.matrix.layout()
                ),
                ([n, k], self.matrix.layout()),
                "a gate beside a matrix [{n}, {k}]"
            );
            assert!(
                fits(gate.bias),
                "the gate's bias against a matrix [{n}, {k}]"
            );
            assert!(self.residual.is_none(), "a residual beside a gate");
        }
    }
}

/// A second product of the same activations, to which an activation function is applied.
///
/// The results of both are rounded to `E` before, so every bit is that of [`crate::activation::gated`] on two products.
#[derive(Clone, Copy)]
pub struct Gate<'a, E> {
    /// The function.
    pub activation: Activation,
    /// The matrix, of the other's shape and layout.
    pub matrix: &'a PackedMatrix,
    /// Added to every row, `[N]`.
    pub bias: Option<&'a [E]>,
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

/// Few rows wait for memory, and threads for the last task.
const FEW: Cut = Cut {
    panels: 8,
    rows: VECTORS.rows,
};

impl Cut {
    /// For vectors.
    fn vectors(rows: usize) -> Cut {
        if rows <= BLOCK { FEW } else { VECTORS }
    }

    /// Panels of `matrices` matrices in place of one.
    fn among(self, matrices: usize) -> Cut {
        Cut {
            panels: self.panels / matrices,
            ..self
        }
    }

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

pub(super) struct Job<'a, E> {
    pub matrix: &'a PackedMatrix,
    /// The rows of activations that tiles multiply, where they do.
    tiles: Option<Tiles<'a>>,
    pub bias: Option<&'a [E]>,
    pub residual: Option<&'a [E]>,
    pub gate: Option<Gate<'a, E>>,
    pub out: SharedMut<'a, E>,
    /// Rows of the activations, the first of which is the first of the result.
    pub rows: Range<usize>,
    cut: Cut,
    /// Where the sums of integers start, where all rows are those of one tile: found once, not in every task.
    starts: Vec<i32>,
    /// Number of the first task.
    first: usize,
}

impl<'a, E: Element> Job<'a, E> {
    /// Where a panel's columns of a row begin in the result.
    #[inline(always)]
    pub fn at(&self, row: usize, panel: usize) -> usize {
        (row - self.rows.start) * self.matrix.rows() + panel * PANEL
    }

    /// What is read after panels of the first or the second matrix: the same of the gate, or those that follow.
    #[cfg(target_arch = "x86_64")]
    fn next(&self, matrix: usize, panels: Range<usize>) -> usize {
        match self.gate {
            Some(gate) if matrix == 0 => gate.matrix.address(panels.start),
            _ => self.matrix.address(panels.end),
        }
    }

    /// The matrices, that of the gate last.
    fn matrices(&self) -> impl Iterator<Item = &'a PackedMatrix> {
        std::iter::once(self.matrix).chain(self.gate.map(|gate| gate.matrix))
    }
}

/// Multiplies the same activations with several matrices in one run of the pool.
///
/// Sums are rounded to `E` once, after bias and residual have been added; where there is a [`Gate`], so is each factor.
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
        product.check(x, m);
        let n = product.matrix.rows();
        let tiles = x.tiles(pool, &rows, product.matrix.layout());
        let cut = match tiles {
            Some(_) => Cut::tiles(m, n.div_ceil(PANEL), pool.threads()),
            None => Cut::vectors(m),
        };
        let cut = cut.among(1 + usize::from(product.gate.is_some()));
        jobs.push(Job {
            matrix: product.matrix,
            tiles,
            bias: product.bias,
            residual: product.residual,
            gate: product.gate,
            out: SharedMut::new(product.out),
            starts: starts_of_all(pool.level(), x, &rows, product.matrix, tiles.is_some()),
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
            let sums = job.matrices().map(|matrix| {
                std::array::from_fn(|lane| match panel * PANEL + lane {
                    n if n < matrix.rows() => reference::dot(matrix, n, x, row),
                    _ => 0.0,
                })
            });
            let sums: Vec<[f32; PANEL]> = sums.collect();
            finish(
                job,
                panel..panel + 1,
                row..row + 1,
                Sums::of(&sums, 1, job.gate.is_some()),
            );
        }
    }
}

/// [`Job::starts`], empty where there are several tiles of rows, or other kernels.
fn starts_of_all(
    level: Level,
    x: &Activations,
    rows: &Range<usize>,
    matrix: &PackedMatrix,
    on_tiles: bool,
) -> Vec<i32> {
    #[cfg(target_arch = "x86_64")]
    if level != Level::Scalar && !on_tiles && !rows.is_empty() {
        let kernel = super::kernel::choose(level, matrix.layout(), rows.len());
        if rows.len() <= kernel.rows {
            let mut starts = vec![0; starts_len(matrix, kernel.rows)];
            starts_at(&kernel, x, rows.start, matrix, &mut starts);
            return starts;
        }
    }
    let _ = (level, x, rows, matrix, on_tiles);
    Vec::new()
}

/// Starts of a tile of so many rows.
#[cfg(target_arch = "x86_64")]
fn starts_len(matrix: &PackedMatrix, rows: usize) -> usize {
    matrix.units().steps() * matrix.layout().parts().len() * rows
}

#[cfg(target_arch = "x86_64")]
fn starts_at(
    kernel: &super::kernel::Kernel,
    x: &Activations,
    row: usize,
    matrix: &PackedMatrix,
    starts: &mut [i32],
) {
    let scales = &x.scales()[x.cell(row, 0)..];
    kernel.starts(matrix.layout(), scales, (x.height(), x.block()), starts);
}

/// Panels times rows of the largest tile.
const TILE: usize = 16;

/// The sums of a tile. Each is a line: one that crosses lines could not be read before it has been written to the cache.
#[repr(align(64))]
struct Space([[f32; PANEL]; TILE]);

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
    let finish = finisher::<E>(level);
    let mut sums = [const { Space([[0f32; PANEL]; TILE]) }; 2];
    let starts = worker.scratch::<f32>(match job.starts.is_empty() {
        true => starts_len(job.matrix, TILE),
        false => 0,
    });
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
        let starts = match job.starts.is_empty() {
            true => {
                starts_at(&kernel, x, row, job.matrix, starts);
                &*starts
            }
            false => &job.starts,
        };
        for panel in panels.clone().step_by(kernel.panels) {
            for (at, matrix) in job.matrices().enumerate() {
                let next = job.next(at, panel..panel + kernel.panels);
                // Tiles at an edge compute their last panel or row again, and drop it; a tile's rows are in one block, for
                // both numbers are powers of two.
                let panels: [*const u8; TILE] = std::array::from_fn(|p| {
                    let panel = panel + p.min(kernel.panels - 1);
                    matrix.panel(panel.min(panels.end - 1)).as_ptr()
                });
                let tile = Tile {
                    layout,
                    units,
                    panels: &panels[..kernel.panels],
                    ahead: next.wrapping_sub(matrix.address(panel)),
                    quants: quants.as_ptr(),
                    scales: scales.as_ptr(),
                    height: x.height(),
                    block: x.block(),
                    starts: starts.as_ptr(),
                    out: sums[at].0.as_mut_ptr().cast(),
                };
                // SAFETY: `choose` saw the features; panels and rows are as long as the layout says (activations are padded
                // to whole units), and `starts` and `sums` hold the tile's.
                unsafe { (kernel.run)(&tile) };
            }
            let tile_rows = row..rows.end.min(row + kernel.rows);
            let tile_panels = panel..panels.end.min(panel + kernel.panels);
            let [Space(sums), Space(gates)] = &sums;
            let pitch = kernel.rows;
            // SAFETY: the level's features are there.
            unsafe { finish(job, tile_panels, tile_rows, Sums { sums, gates, pitch }) };
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
    let finish = finisher::<E>(level);
    let kernel = super::amx::choose(job.matrix.layout());
    let blocks = rows.len().div_ceil(ROWS);
    let work_panels: Vec<&[u8]> = job
        .matrices()
        .flat_map(|matrix| panels.clone().map(|panel| matrix.panel(panel)))
        .collect();
    let len = blocks * work_panels.len() * ROWS * PANEL;
    let (space, sums) = worker.scratch2::<f32, f32>(Space::LEN, len);
    let work = Work {
        layout: job.matrix.layout(),
        units: job.matrix.units(),
        panels: &work_panels,
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
        let sums = sums.as_chunks::<PANEL>().0.chunks(work_panels.len() * ROWS);
        for (sums, first) in sums.zip(rows.clone().step_by(ROWS)) {
            let rows = first..rows.end.min(first + ROWS);
            finish(
                job,
                panels.clone(),
                rows,
                Sums::of(sums, ROWS, job.gate.is_some()),
            );
        }
    }
}
