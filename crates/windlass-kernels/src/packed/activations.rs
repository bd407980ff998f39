//! Rows of activations as 8-bit integers with a scale for each unit.

mod rounding;

use self::rounding::round_row;
use super::layout::{Layout, Min};
use super::{STEP, UNIT, UNIT_STEPS};
use crate::memory::{Buffer, Category, Memory};
use crate::pool::{Pool, SharedMut};
use crate::{Element, tasks::Tasks};
use std::ops::Range;
use std::sync::OnceLock;

/// Quantized rows: `x = scale * q` with `q` in -127..=127, and the sums that offsets and minimums need.
///
/// A scale is `max|x| / 127` over a unit of 256 columns. A unit with a NaN or an infinity has the scale NaN. Rows are kept in
/// blocks of up to eight, step by step, so that a kernel finds those of a tile side by side.
pub struct Activations {
    rows: usize,
    cols: usize,
    steps: usize,
    /// Rows of a block: 1, 2, 4 or 8.
    height: usize,
    /// `[blocks, steps, height, 32]` of `i8`.
    quants: Buffer,
    /// `[blocks, steps, height]` of [`StepScales`].
    scales: Buffer,
    /// The quants once more, as tiles take them, from when they are first asked for: as `bf16`, as bytes, their sums. Where
    /// there are tiles, and rows enough for them.
    tiles: Option<[OnceLock<Buffer>; 3]>,
    memory: Memory,
}

/// Rows of the largest block.
pub(super) const BLOCK: usize = 8;
/// Rows from which tiles are used. A panel's codes are unpacked to memory for them; fewer rows wait for the panel's bytes
/// in either way.
const TILE_ROWS: usize = BLOCK + 1;
/// Rows of a tile.
pub(super) const TILE: usize = 2 * BLOCK;

/// Quants as tiles take them, `[units, blocks, tiles, 16, 64 bytes]`: a unit of all rows is one stream. A tile is a step of
/// `bf16` or two of bytes.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    rows: &'a [TileRow],
    /// Sums of half steps, `[units, blocks, 16, 16]`, each of two `bf16`; empty where no minimum needs them.
    sums: &'a [TileRow],
    blocks: usize,
    /// Tiles of a unit.
    unit: usize,
}

/// A row of a tile.
type TileRow = [u8; 64];

impl Tiles<'_> {
    /// The 16 rows of a tile of a unit in a block.
    #[inline(always)]
    pub fn tile(&self, unit: usize, block: usize, tile: usize) -> *const u8 {
        let row = ((unit * self.blocks + block) * self.unit + tile) * TILE;
        self.rows.as_ptr().wrapping_add(row).cast()
    }

    /// The sums of the 16 rows of a unit in a block.
    #[inline(always)]
    pub fn sums(&self, unit: usize, block: usize) -> *const u8 {
        let row = (unit * self.blocks + block) * TILE;
        self.sums.as_ptr().wrapping_add(row).cast()
    }
}

/// What belongs to a step of a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct StepScales {
    /// Scale of the step's unit.
    pub scale: f32,
    /// Sums of quants, whole numbers: of the step's first half, of the step, of its group.
    sums: [f32; 3],
}

/// The part that is a whole step; 0 and 1 are its halves.
pub(super) const BOTH: usize = 2;
/// The part that is a whole group.
pub(super) const GROUP: usize = 3;

impl StepScales {
    /// The sum of the quants of a part.
    #[inline(always)]
    pub fn sum(&self, part: usize) -> f32 {
        let [first, both, group] = self.sums;
        match part {
            0 => first,
            1 => both - first,
            BOTH => both,
            _ => group,
        }
    }
}

impl Activations {
    /// Quantizes `x [rows, cols]`, padded with zeros to whole units.
    ///
    /// # Panics
    /// When `x` is not made of whole rows.
    #[track_caller]
    pub fn quantize<E: Element>(pool: &Pool, memory: &Memory, x: &[E], cols: usize) -> Activations {
        Self::quantize_ordered(pool, memory, x, cols, None)
    }

    /// As [`Activations::quantize`], of rows whose columns are put in another order first: column `j` is column `order[j]`
    /// of `x`.
    ///
    /// # Panics
    /// As [`Activations::quantize`]; when `order` has not an entry below `cols` for each column.
    #[track_caller]
    pub fn quantize_ordered<E: Element>(
        pool: &Pool,
        memory: &Memory,
        x: &[E],
        cols: usize,
        order: Option<&[u32]>,
    ) -> Activations {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "{} elements in rows of {cols}",
            x.len()
        );
        assert!(
            order.is_none_or(|order| order.len() == cols),
            "an order of {} columns against rows of {cols}",
            order.map_or(0, <[u32]>::len)
        );
        // Every layout's rows end at a multiple of a unit at most.
        let steps = cols.next_multiple_of(UNIT) / STEP;
        let rows = x.len() / cols;
        let height = rows.next_power_of_two().min(BLOCK);
        let tiles = with_tiles(pool, rows);
        let whole = if tiles { TILE } else { height };
        let blocks = rows.div_ceil(whole) * (whole / height);
        let cells = steps * height;
        let mut quants = memory.alloc(blocks * cells * STEP, Category::Workspace);
        let bytes = cells * size_of::<StepScales>();
        let mut scales = memory.alloc(blocks * bytes, Category::Workspace);
        let level = pool.level();
        {
            let q = SharedMut::new(quants.block_mut());
            let s = SharedMut::new(scales.block_mut());
            let tasks = Tasks::rows(blocks, cols * height);
            pool.run(tasks.count(), |task, _| {
                for block in tasks.part(task) {
                    // SAFETY: a task writes its own blocks; that of scales is aligned and every bit pattern is valid.
                    let (q, s) = unsafe {
                        let s = s.slice(block * bytes, bytes).as_mut_ptr();
                        (
                            q.slice(block * cells * STEP, cells * STEP),
                            std::slice::from_raw_parts_mut(s.cast::<StepScales>(), cells),
                        )
                    };
                    let q = q.as_chunks_mut::<STEP>().0;
                    for m in 0..height {
                        // The rows that a last block lacks are its last one again.
                        let row = (block * height + m).min(rows - 1);
                        let row = &x[row * cols..][..cols];
                        // SAFETY: the pool's level is supported.
                        unsafe { round_row(level, row, order, q, s, (m, height)) };
                    }
                }
            });
        }
        Activations {
            rows,
            cols,
            steps,
            height,
            quants,
            scales,
            tiles: tiles.then(Default::default),
            memory: memory.clone(),
        }
    }

    /// The sums of the quants as tiles take them.
    fn tiled_sums(&self, pool: &Pool) -> Buffer {
        let blocks = self.quants.bytes() / (self.block() * STEP);
        let size = blocks * self.steps / UNIT_STEPS * BLOCK * size_of::<TileRow>();
        let mut tiles = self.memory.alloc(size, Category::Workspace);
        #[cfg(target_arch = "x86_64")]
        {
            let view = SharedMut::new(&mut tiles.block_mut()[..size]);
            let tasks = Tasks::rows(blocks, self.steps * BLOCK);
            pool.run(tasks.count(), |task, _| {
                for block in tasks.part(task) {
                    let scales = &self.scales()[block * self.block()..][..self.block()];
                    for (unit, scales) in scales.chunks(UNIT_STEPS * BLOCK).enumerate() {
                        let row = (unit * (blocks / 2) + block / 2) * TILE + block % 2 * BLOCK;
                        for m in 0..BLOCK {
                            let part =
                                |half: usize| scales[half / 2 * BLOCK + m].sum(half % 2) as i32;
                            // SAFETY: a task writes the rows of its own blocks, which are aligned.
                            unsafe {
                                let at = (row + m) * size_of::<TileRow>();
                                let to = view.slice(at, size_of::<TileRow>()).as_mut_ptr();
                                let sums = std::array::from_fn(part);
                                super::amx::sum_row(&sums, &mut *to.cast());
                            }
                        }
                    }
                }
            });
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = pool;
        tiles
    }

    /// The quants as tiles take them.
    fn tiled(&self, pool: &Pool, bytes: bool) -> Buffer {
        let blocks = self.quants.bytes() / (self.block() * STEP);
        // Steps of a tile.
        let deep = if bytes { 2 } else { 1 };
        let size = blocks * self.block() / deep * size_of::<TileRow>();
        let mut tiles = self.memory.alloc(size, Category::Workspace);
        #[cfg(target_arch = "x86_64")]
        {
            let view = SharedMut::new(&mut tiles.block_mut()[..size]);
            let quants = self.quants().as_chunks::<STEP>().0;
            let tasks = Tasks::rows(blocks, self.cols * BLOCK);
            pool.run(tasks.count(), |task, _| {
                for block in tasks.part(task) {
                    for step in (0..self.steps).step_by(deep) {
                        let (unit, tile) = (step / UNIT_STEPS, step % UNIT_STEPS / deep);
                        let tile = (unit * (blocks / 2) + block / 2) * (UNIT_STEPS / deep) + tile;
                        let row = tile * TILE + block % 2 * BLOCK;
                        let rows = &quants[(block * self.steps + step) * BLOCK..][..deep * BLOCK];
                        // SAFETY: a task writes the rows of its own blocks, which are aligned; tiles come with AVX-512.
                        unsafe {
                            let len = BLOCK * size_of::<TileRow>();
                            let to = view.slice(row * size_of::<TileRow>(), len).as_mut_ptr();
                            match bytes {
                                true => super::amx::tile_bytes(rows, &mut *to.cast()),
                                false => super::amx::tile_rows(rows, &mut *to.cast()),
                            }
                        }
                    }
                }
            });
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (pool, bytes);
        tiles
    }

    /// Groups of these rows side by side, to be multiplied with a matrix each by [`super::multiply_groups`]: rows keep the
    /// numbers that they were rounded to, and may be in several groups or in none. Also says which rows of the result are
    /// those of each group.
    ///
    /// # Panics
    /// When a group names a row that is not there.
    #[track_caller]
    pub fn grouped(
        self,
        pool: &Pool,
        memory: &Memory,
        groups: &[Vec<u32>],
    ) -> (Activations, Vec<Range<usize>>) {
        let largest = groups.iter().map(Vec::len).max().unwrap_or(0);
        let rows = groups.iter().flatten().map(|&row| row as usize + 1);
        let rows = rows.max().unwrap_or(0);
        assert!(rows <= self.rows, "row {rows} of {}", self.rows);
        if largest <= 1 {
            // A row alone is read where it is.
            let range =
                |group: &Vec<u32>| group.first().map_or(0..0, |&r| r as usize..r as usize + 1);
            return (self, groups.iter().map(range).collect());
        }
        // A group starts at a block; what its last block lacks is its last row again.
        let height = largest.next_power_of_two().min(BLOCK);
        let tiles = with_tiles(pool, largest);
        let whole = if tiles { TILE } else { height };
        let (mut from, mut ranges) = (Vec::new(), Vec::with_capacity(groups.len()));
        for group in groups {
            let start = from.len();
            from.extend_from_slice(group);
            ranges.push(start..from.len());
            if let Some(&last) = group.last() {
                from.resize(from.len().next_multiple_of(whole), last);
            }
        }
        let mut made = self.select(pool, memory, &from, height);
        made.tiles = tiles.then(Default::default);
        (made, ranges)
    }

    /// Some rows in blocks of `height`, which must divide their number.
    fn select(&self, pool: &Pool, memory: &Memory, from: &[u32], height: usize) -> Activations {
        let (rows, steps) = (from.len(), self.steps);
        let bytes = steps * height * size_of::<StepScales>();
        let mut quants = memory.alloc(rows * steps * STEP, Category::Workspace);
        let mut scales = memory.alloc(rows / height * bytes, Category::Workspace);
        {
            let q = SharedMut::new(quants.block_mut());
            let s = SharedMut::new(scales.block_mut());
            let (quants, scales) = (self.quants().as_chunks::<STEP>().0, self.scales());
            let tasks = Tasks::rows(rows / height, self.cols * height);
            pool.run(tasks.count(), |task, _| {
                for block in tasks.part(task) {
                    // SAFETY: as in `quantize_ordered`; `i8` and `u8` have the same layout.
                    let (q, s) = unsafe {
                        let cells = steps * height;
                        let q = q.slice(block * cells * STEP, cells * STEP).as_mut_ptr();
                        let s = s.slice(block * bytes, bytes).as_mut_ptr();
                        (
                            std::slice::from_raw_parts_mut(q.cast::<[i8; STEP]>(), cells),
                            std::slice::from_raw_parts_mut(s.cast::<StepScales>(), cells),
                        )
                    };
                    let from = &from[block * height..][..height];
                    for (step, (q, s)) in q.chunks_mut(height).zip(s.chunks_mut(height)).enumerate()
                    {
                        for ((&row, q), s) in from.iter().zip(q).zip(s) {
                            let cell = self.cell(row as usize, step);
                            (*q, *s) = (quants[cell], scales[cell]);
                        }
                    }
                }
            });
        }
        Activations {
            rows,
            height,
            quants,
            scales,
            cols: self.cols,
            steps,
            tiles: None,
            memory: memory.clone(),
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

    /// Rows of all steps of a block.
    pub(super) fn block(&self) -> usize {
        self.steps * self.height
    }

    /// Rows of a block.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    /// Whether a kernel finds these rows in blocks: they start at one that is high enough, or are no more than one row.
    pub(super) fn is_group(&self, rows: &Range<usize>) -> bool {
        let height = rows.len().next_power_of_two().min(BLOCK);
        let start = match self.tiles {
            Some(_) if rows.len() >= TILE_ROWS => TILE,
            _ => self.height,
        };
        height == 1 || rows.start.is_multiple_of(start) && height <= self.height
    }

    /// All rows as tiles take them for a layout, if these are to be multiplied by tiles.
    pub(super) fn tiles(
        &self,
        pool: &Pool,
        rows: &Range<usize>,
        layout: &Layout,
    ) -> Option<Tiles<'_>> {
        let [words, octets, sums] = self.tiles.as_ref().filter(|_| rows.len() >= TILE_ROWS)?;
        let bytes = layout.byte_tiles();
        let tiles = if bytes { octets } else { words };
        fn tile_rows(tiles: &Buffer) -> &[TileRow] {
            tiles.block()[..tiles.bytes()].as_chunks().0
        }
        let tiles = tile_rows(tiles.get_or_init(|| self.tiled(pool, bytes)));
        let unit = if bytes { UNIT_STEPS / 2 } else { UNIT_STEPS };
        Some(Tiles {
            rows: tiles,
            sums: match layout.min {
                Min::Super => tile_rows(sums.get_or_init(|| self.tiled_sums(pool))),
                _ => &[],
            },
            blocks: tiles.len() / (self.steps / UNIT_STEPS * unit * TILE),
            unit,
        })
    }

    /// The quants of all rows: step `s` of row `r` is at `cell(r, s) * 32`.
    pub(super) fn quants(&self) -> &[i8] {
        let bytes = &self.quants.block()[..self.quants.bytes()];
        // SAFETY: `i8` and `u8` have the same layout.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
    }

    /// The scales of all rows: step `s` of row `r` is at `cell(r, s)`.
    pub(super) fn scales(&self) -> &[StepScales] {
        let bytes = &self.scales.block()[..self.scales.bytes()];
        let len = bytes.len() / size_of::<StepScales>();
        // SAFETY: written as such above; blocks are aligned to 64 and the size is a multiple of 4.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), len) }
    }

    /// Where a step of a row lies.
    pub(super) fn cell(&self, row: usize, step: usize) -> usize {
        let (block, m) = (row / self.height, row % self.height);
        (block * self.steps + step) * self.height + m
    }

    /// The quants of a step of a row and its scales.
    pub(super) fn step(&self, row: usize, step: usize) -> (&[i8; STEP], &StepScales) {
        let cell = self.cell(row, step);
        (
            &self.quants().as_chunks::<STEP>().0[cell],
            &self.scales()[cell],
        )
    }
}

/// Whether so many rows are kept for tiles too.
fn with_tiles(pool: &Pool, rows: usize) -> bool {
    super::uses_tiles(pool.level()) && rows >= TILE_ROWS
}
