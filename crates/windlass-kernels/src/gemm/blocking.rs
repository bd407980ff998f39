//! Loops around the micro-kernel: what is packed when, and which task computes which block of C.
//!
//! Three facts make the bits of a result independent of threads, block sizes and neighbors: the inner dimension is cut at
//! multiples of the kernel's `kc` always; a sum belongs to one task at a time and visits the blocks in order; and a row or
//! column that pads a sliver never meets another.

use crate::pool::{Phases, Pool, SharedMut, Worker};

use super::finish::{Block, Target};
use super::kernel::{Kernel, Source};
use crate::packed::ROOM;
use std::ops::Range;

/// Of `(steps, columns, room, out)`: writes a block of an operand, one step after another.
type Read<'a> = dyn Fn(Range<usize>, Range<usize>, &mut [f32], *mut u8) + Sync + 'a;

/// The second operand.
pub(super) enum Right<'a> {
    Plain(Source),
    /// One that is unpacked when a block of it is needed, in elements of `size` bytes.
    Packed {
        read: &'a Read<'a>,
        size: usize,
    },
}

/// One product: sizes, operands and what becomes of the sums.
pub(super) struct Problem<'a> {
    pub kernel: &'a Kernel,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Source,
    pub b: Right<'a>,
    pub target: Target,
}

/// Largest packed part of B, in words (16 MiB): it lives in the last-level cache.
const B_WORDS: usize = 4 << 20;
/// Largest depth of a packed part of B, in words a column.
const B_DEPTH: usize = 4096;
/// Rows of A that one task packs into its L2 cache.
const TASK_ROWS: usize = 128;
/// Columns of B that a task passes over with those rows.
const TASK_COLUMNS: usize = 512;
/// Rows whose partial sums are kept at a time when B has to be packed in several depths.
const PARTIAL_ROWS: usize = 4096;

/// Runs the product; sizes are not zero, except perhaps `k`.
pub(super) fn run(pool: &Pool, p: &Problem<'_>) {
    match p.b {
        Right::Plain(b) if p.m <= TASK_ROWS => p.run_few_rows(pool, b),
        _ => p.run_shared(pool),
    }
}

/// How many depth blocks there are; one empty one when there is no depth, to make zeros.
fn blocks(depth: usize, kc: usize) -> usize {
    depth.div_ceil(kc).max(1)
}

impl Problem<'_> {
    /// The range of the `index`-th block of `size` out of `whole`.
    fn block(index: usize, size: usize, whole: usize) -> (usize, usize) {
        let first = index * size;
        (first, size.min(whole.saturating_sub(first)))
    }

    /// Few rows: A is packed whole and shared; every task streams its own columns of B once, through its L1 cache.
    fn run_few_rows(&self, pool: &Pool, b: Source) {
        let kn = self.kernel;
        let slivers = self.m.div_ceil(kn.mr);
        let k_blocks = blocks(self.k, kn.kc);
        let room = kn.a_room(kn.mr.min(self.m), kn.kc.min(self.k));
        // One task where packing costs less than waking a thread.
        let grain = if self.m * self.k <= 1 << 14 {
            k_blocks
        } else {
            4
        };
        // Long streams of B for single tokens; wider blocks where A would be read too often, or B's rows too briefly.
        let group = if self.m <= kn.mr && b.k_contiguous {
            1
        } else {
            4
        };
        let b_slivers = self.n.div_ceil(kn.nr);
        pool.run_phases::<f32>(room * slivers * k_blocks, |phases, common| {
            phases.run(k_blocks.div_ceil(grain), |task, _| {
                for block in task * grain..k_blocks.min((task + 1) * grain) {
                    // SAFETY: this block's part of the buffer belongs to this task.
                    let part = unsafe { common.slice(block * slivers * room, slivers * room) };
                    self.pack_rows(part, room, 0, self.m, block);
                }
            });
            phases.run(b_slivers.div_ceil(group), |task, worker| {
                let j = task * group..b_slivers.min((task + 1) * group);
                let a = common.as_mut_ptr().cast_const();
                self.stream_columns(worker, b, j, a, room);
            });
        });
    }

    /// A task of [`Self::run_few_rows`]: columns of slivers `j` against all of A.
    fn stream_columns(
        &self,
        worker: &mut Worker,
        source: Source,
        j: Range<usize>,
        a: *const f32,
        room: usize,
    ) {
        let kn = self.kernel;
        let (slivers, tile) = (self.m.div_ceil(kn.mr), kn.mr * kn.nr);
        let (b, sums) =
            worker.scratch2::<f32, f32>(kn.nr * kn.words(kn.kc) + 16, j.len() * slivers * tile);
        // SAFETY: the kernel's level is supported; `pack_b` gets columns and depth in range, `multiply` slivers packed
        // to the depth it is told, and blocks of sums inside `sums`.
        unsafe {
            (kn.enter)();
            for block in 0..blocks(self.k, kn.kc) {
                let (k, depth) = Self::block(block, kn.kc, self.k);
                for (local, sliver) in j.clone().enumerate() {
                    let (column, columns) = Self::block(sliver, kn.nr, self.n);
                    (kn.pack_b)(
                        source.skip_lanes(column).skip_k(k),
                        columns,
                        depth,
                        b.as_mut_ptr(),
                        kn.nr,
                    );
                    for i in 0..slivers {
                        let rows = kn.padded(Self::block(i, kn.mr, self.m).1);
                        let a = a.add((block * slivers + i) * room);
                        let sums = sums.as_mut_ptr().add((local * slivers + i) * tile);
                        (kn.multiply)(
                            rows,
                            kn.words(depth),
                            a,
                            b.as_ptr(),
                            sums,
                            block == 0,
                            b.as_ptr(),
                        );
                    }
                }
            }
            (kn.leave)();
        }
        for (local, sliver) in j.enumerate() {
            for i in 0..slivers {
                self.finish(&sums[(local * slivers + i) * tile..], i, sliver);
            }
        }
    }

    /// Many rows: threads pack a part of B together, then tasks multiply blocks of rows with it.
    fn run_shared(&self, pool: &Pool) {
        let kn = self.kernel;
        let depth = self.k.min(B_DEPTH * kn.per_word / kn.kc * kn.kc);
        let parts = blocks(self.k, depth.max(1));
        let sliver_words = kn.nr * (depth / kn.kc * kn.words(kn.kc) + kn.words(depth % kn.kc));
        let b_slivers = self.n.div_ceil(kn.nr);
        // Equal chunks of columns.
        let chunks = b_slivers.div_ceil((B_WORDS / sliver_words.max(1)).max(1));
        let chunk = b_slivers.div_ceil(chunks);
        let rows = if parts > 1 {
            self.m.min(PARTIAL_ROWS / kn.mr * kn.mr)
        } else {
            self.m
        };
        let packed = chunk * sliver_words + 16;
        let partial = if parts > 1 {
            rows.div_ceil(kn.mr) * chunk * kn.mr * kn.nr
        } else {
            0
        };
        pool.run_phases::<f32>(packed + partial, |phases, common| {
            for row in (0..self.m).step_by(rows) {
                for first in (0..b_slivers).step_by(chunk) {
                    for part in 0..parts {
                        let (k, depth) = Self::block(part, depth, self.k);
                        let shared = Shared {
                            problem: self,
                            common,
                            sliver_words,
                            partial: (parts > 1).then_some(packed),
                            rows: (row, rows.min(self.m - row)),
                            slivers: (first, chunk.min(b_slivers - first)),
                            depth: (k, depth),
                        };
                        shared.run(pool, phases);
                    }
                }
            }
        });
    }

    /// Packs block `block` of the depth for rows `row..row + rows` into slivers of `room` words.
    fn pack_rows(&self, to: &mut [f32], room: usize, row: usize, rows: usize, block: usize) {
        let kn = self.kernel;
        let (k, depth) = Self::block(block, kn.kc, self.k);
        for (i, to) in to.chunks_mut(room).enumerate().take(rows.div_ceil(kn.mr)) {
            let (first, count) = Self::block(i, kn.mr, rows);
            let src = self.a.skip_lanes(row + first).skip_k(k);
            // SAFETY: rows and depth are in range; `room` holds the sliver and the vector past it.
            unsafe { (kn.pack_a)(src, count, depth, to.as_mut_ptr(), kn.padded(count)) };
        }
    }

    /// Hands the sums of one sliver of rows and one of columns to the epilogue.
    fn finish(&self, sums: &[f32], i: usize, sliver: usize) {
        let kn = self.kernel;
        let (row, rows) = Self::block(i, kn.mr, self.m);
        let (column, columns) = Self::block(sliver, kn.nr, self.n);
        let block = Block {
            sums: sums.as_ptr(),
            pitch: kn.nr,
            row,
            column,
            rows,
            columns,
        };
        // SAFETY: the block lies in C, and no other task has it.
        unsafe { (self.target.finish)(&self.target, block) }
    }
}

/// One packed part of B and the blocks of C that it contributes to; pairs are first and count.
struct Shared<'a> {
    problem: &'a Problem<'a>,
    common: SharedMut<'a, f32>,
    sliver_words: usize,
    /// Where partial sums start in `common`, when other parts contribute too.
    partial: Option<usize>,
    rows: (usize, usize),
    slivers: (usize, usize),
    depth: (usize, usize),
}

impl Shared<'_> {
    fn run(&self, pool: &Pool, phases: &Phases<'_>) {
        let kn = self.problem.kernel;
        // Neighboring slivers together: where columns are neighbors in memory, they share pages.
        const GROUP: usize = 4;
        let groups = self.slivers.1.div_ceil(GROUP);
        phases.run(groups * blocks(self.depth.1, kn.kc), |task, worker| {
            let (block, group) = (task / groups, task % groups);
            let slivers = group * GROUP..self.slivers.1.min((group + 1) * GROUP);
            self.pack_columns(worker, slivers, block);
        });
        // Blocks only shrink when there are too few for the threads; no result depends on their size.
        let slivers = self.rows.1.div_ceil(kn.mr);
        let (mut tall, mut wide) = ((TASK_ROWS / kn.mr).max(1), (TASK_COLUMNS / kn.nr).max(1));
        let tasks =
            |tall: usize, wide: usize| slivers.div_ceil(tall) * self.slivers.1.div_ceil(wide);
        while tasks(tall, wide) < 8 * pool.threads() && wide > 4 {
            wide /= 2;
        }
        while tasks(tall, wide) < 8 * pool.threads() && tall > 2 {
            tall /= 2;
        }
        let columns = self.slivers.1.div_ceil(self.slivers.1.div_ceil(wide));
        let across = self.slivers.1.div_ceil(columns);
        phases.run(tasks(tall, columns), |task, worker| {
            let i = task / across * tall;
            let j = task % across * columns;
            self.multiply(
                worker,
                i..slivers.min(i + tall),
                j..self.slivers.1.min(j + columns),
            );
        });
    }

    /// The words of block `block` in a sliver of B.
    fn b_offset(&self, sliver: usize, block: usize) -> usize {
        let kn = self.problem.kernel;
        sliver * self.sliver_words + block * kn.nr * kn.words(kn.kc)
    }

    /// What is multiplied after a sliver: the next of the same depth, or the first of the next depth.
    fn next_sliver(&self, sliver: usize, block: usize, j: &Range<usize>) -> *const f32 {
        let (sliver, block) = if sliver < j.end {
            (sliver, block)
        } else {
            (j.start, block + 1)
        };
        self.common
            .as_mut_ptr()
            .wrapping_add(self.b_offset(sliver, block))
    }

    /// Packs block `block` of the depth for neighboring slivers of columns.
    fn pack_columns(&self, worker: &mut Worker, slivers: Range<usize>, block: usize) {
        let (p, kn) = (self.problem, self.problem.kernel);
        let first = (self.slivers.0 + slivers.start) * kn.nr;
        let columns = (slivers.len() * kn.nr).min(p.n - first);
        let (k, depth) = Problem::block(block, kn.kc, self.depth.1);
        let k = self.depth.0 + k;
        let src = match p.b {
            Right::Plain(b) => b.skip_lanes(first).skip_k(k),
            Right::Packed { read, size } => {
                let words = (depth * columns * size).div_ceil(size_of::<f32>());
                let (room, out) = worker.scratch2::<f32, f32>(ROOM, words);
                read(
                    k..k + depth,
                    first..first + columns,
                    room,
                    out.as_mut_ptr().cast(),
                );
                Source {
                    data: out.as_ptr().cast(),
                    stride: columns * size,
                    size,
                    k_contiguous: false,
                }
            }
        };
        for (local, sliver) in slivers.enumerate() {
            let (column, columns) = Problem::block(local, kn.nr, columns);
            // SAFETY: this part of the buffer belongs to this task, columns and depth are in range, and `pitch` being a
            // multiple of the vector, nothing is written past it.
            unsafe {
                let to = self
                    .common
                    .slice(self.b_offset(sliver, block), kn.nr * kn.words(depth));
                (kn.pack_b)(
                    src.skip_lanes(column),
                    columns,
                    depth,
                    to.as_mut_ptr(),
                    kn.nr,
                );
            }
        }
    }

    /// One block of C: slivers `i` of the rows by slivers `j` of the columns of this part.
    fn multiply(&self, worker: &mut Worker, i: Range<usize>, j: Range<usize>) {
        let (p, kn) = (self.problem, self.problem.kernel);
        let tile = kn.mr * kn.nr;
        let room = kn.a_room(kn.mr, kn.kc.min(self.depth.1));
        let own = if self.partial.is_some() {
            0
        } else {
            i.len() * j.len() * tile
        };
        let (a, sums) = worker.scratch2::<f32, f32>(room * i.len(), own);
        let at = |row: usize, column: usize| match self.partial {
            // SAFETY: `common` holds the partial sums of all blocks, and no other task has this one.
            Some(start) => unsafe {
                self.common
                    .as_mut_ptr()
                    .add(start + (row * self.slivers.1 + column) * tile)
            },
            None => sums
                .as_ptr()
                .cast_mut()
                .wrapping_add(((row - i.start) * j.len() + column - j.start) * tile),
        };
        let (first, rows) = (self.rows.0 + i.start * kn.mr, self.rows.1 - i.start * kn.mr);
        let rows = rows.min(i.len() * kn.mr);
        // SAFETY: the kernel's level is supported; slivers are packed to the depth `multiply` is told.
        unsafe {
            (kn.enter)();
            for block in 0..blocks(self.depth.1, kn.kc) {
                let depth = Problem::block(block, kn.kc, self.depth.1).1;
                p.pack_rows(a, room, first, rows, self.depth.0 / kn.kc + block);
                for column in j.clone() {
                    let b = self.common.as_mut_ptr().add(self.b_offset(column, block));
                    let next = self.next_sliver(column + 1, block, &j);
                    for (local, row) in i.clone().enumerate() {
                        // Every sliver of rows fetches its share of the next columns.
                        let ahead = next.wrapping_add(local * kn.nr * kn.words(depth) / i.len());
                        let count = kn.padded(Problem::block(local, kn.mr, rows).1);
                        let a = a.as_ptr().add(local * room);
                        let fresh = block == 0 && self.depth.0 == 0;
                        (kn.multiply)(count, kn.words(depth), a, b, at(row, column), fresh, ahead);
                    }
                }
            }
            (kn.leave)();
            if self.depth.0 + self.depth.1 == p.k {
                for row in i.clone() {
                    for column in j.clone() {
                        let sums = std::slice::from_raw_parts(at(row, column), tile);
                        p.finish(sums, self.rows.0 / kn.mr + row, self.slivers.0 + column);
                    }
                }
            }
        }
    }
}
