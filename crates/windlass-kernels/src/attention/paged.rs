//! The forward pass over pages: tiles are read where they rest, or widened once where many rows need them.

use super::forward::{Edges, Scratch, TileData, tile};
use super::pages::{PAGE, Stored};
use super::tile::{KEYS, ROWS, Tiles, padded, prefetch};
use super::{AttentionShape, Segment};
use crate::simd::SimdLoad;
use std::ops::Range;

/// Rows up to which a product widens numbers as it reads them; more rows would widen the same ones again.
const DIRECT: usize = 12;

/// A block of queries and the pages it sees.
pub(super) struct Walk<'a, B> {
    pub shape: &'a AttentionShape,
    pub stored: Stored<'a, B>,
    pub table: &'a [u32],
    pub segment: &'a Segment,
    pub kv_head: usize,
    pub queries: &'a Range<usize>,
}

impl<B: SimdLoad> Walk<'_, B> {
    /// The tile of the keys from `start` on.
    #[inline(always)]
    pub fn tile(&self, start: usize) -> TileData<'_, B> {
        let AttentionShape {
            kv_heads, head_dim, ..
        } = *self.shape;
        let page = self.table[(self.segment.kv_start + start) / PAGE] as usize;
        let tile = page * kv_heads + self.kv_head;
        let numbers = tile * head_dim * PAGE..(tile + 1) * head_dim * PAGE;
        let scales = self.stored.scales;
        TileData {
            keys: self.stored.keys[numbers.clone()].as_ptr(),
            values: self.stored.values[numbers].as_ptr(),
            stride: head_dim,
            scales: scales.map(|s| s.map(|s| &s[tile * PAGE..(tile + 1) * PAGE])),
        }
    }
}

/// All tiles of a block from left to right.
///
/// # Safety
/// The level of `S` is supported, and pages and scratch are as large as the shape says.
#[inline(always)]
pub(super) unsafe fn walk<S: Tiles, B: SimdLoad>(w: &Walk<'_, B>, scratch: &mut Scratch) {
    let (shape, d) = (w.shape, w.shape.head_dim);
    let rows = shape.group() * w.queries.len();
    let end = w.segment.visible(shape, w.queries.end - 1).end;
    let first = w.segment.visible(shape, w.queries.start).start / KEYS * KEYS;
    let direct = rows <= DIRECT && d.is_multiple_of(S::LANES);
    for start in (first..end).step_by(KEYS) {
        let keys = start..end.min(start + KEYS);
        let at_rest = w.tile(start);
        if keys.end < end {
            ahead(&w.tile(keys.end), d);
        }
        // SAFETY: a tile has `d * KEYS` numbers; scratch has room for them.
        let widened = (!direct).then(|| unsafe { widen::<S, B>(&at_rest, keys.len(), d, scratch) });
        for start in (0..rows).step_by(ROWS) {
            let part = start..rows.min(start + ROWS);
            let edges = Edges::new(shape, w.segment, &keys, part.clone(), w.queries);
            if edges.none {
                continue;
            }
            // SAFETY: the level is supported.
            unsafe {
                match &widened {
                    Some(data) => tile::<S, f32>(shape, scratch, data, part, keys.len(), &edges),
                    None => tile::<S, B>(shape, scratch, &at_rest, part, keys.len(), &edges),
                }
            }
        }
    }
}

/// Asks for a tile.
#[inline(always)]
fn ahead<B>(tile: &TileData<'_, B>, head_dim: usize) {
    for at in (0..head_dim * KEYS * size_of::<B>()).step_by(64) {
        prefetch(tile.keys.cast::<u8>().wrapping_add(at));
        prefetch(tile.values.cast::<u8>().wrapping_add(at));
    }
}

/// Copies a tile of `keys` keys to scratch.
#[inline(always)]
unsafe fn widen<'a, S: Tiles, B: SimdLoad>(
    tile: &TileData<'a, B>,
    keys: usize,
    head_dim: usize,
    scratch: &mut Scratch,
) -> TileData<'a, f32> {
    let (stride, columns) = (padded(head_dim), keys.next_multiple_of(S::LANES));
    let (to_keys, to_values) = (scratch.keys.as_mut_ptr(), scratch.values.as_mut_ptr());
    // SAFETY: the caller's promise.
    unsafe {
        for row in 0..head_dim {
            for column in (0..columns).step_by(S::LANES) {
                let at = row * KEYS + column;
                B::load_vector::<S>(tile.keys.add(at)).store(to_keys.add(at));
            }
        }
        for row in 0..keys {
            let from = tile.values.add(row * head_dim);
            for column in (0..stride).step_by(S::LANES) {
                let left = head_dim.saturating_sub(column);
                let x = match left >= S::LANES {
                    true => B::load_vector::<S>(from.add(column)),
                    false => B::load_vector_partial::<S>(from.add(column.min(head_dim)), left),
                };
                x.store(to_values.add(row * stride + column));
            }
        }
    }
    TileData {
        keys: to_keys,
        values: to_values,
        stride,
        scales: tile.scales,
    }
}
