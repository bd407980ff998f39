//! Where rows of queries, keys and values lie. Computes nothing.

use super::{AttentionShape, Segment};
use crate::Element;

/// Rows of heads: head `h` of row `t` is `data[t * stride + h * head_dim ..][.. head_dim]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, E> {
    /// The elements.
    pub data: &'a [E],
    /// Elements from one row to the next.
    pub stride: usize,
}

impl<'a, E: Element> Rows<'a, E> {
    /// Rows of `stride` elements.
    pub fn new(data: &'a [E], stride: usize) -> Rows<'a, E> {
        Rows { data, stride }
    }

    pub(super) fn head(&self, row: usize, head: usize, head_dim: usize) -> &'a [E] {
        &self.data[row * self.stride + head * head_dim..][..head_dim]
    }

    #[track_caller]
    pub(super) fn check(&self, name: &str, rows: usize, width: usize) {
        assert!(
            self.stride >= width,
            "{name}: row stride {} < {width} elements of a row",
            self.stride
        );
        let needed = if rows == 0 {
            0
        } else {
            (rows - 1) * self.stride + width
        };
        assert!(
            self.data.len() >= needed,
            "{name}: {} elements, {rows} rows need {needed}",
            self.data.len()
        );
    }
}

/// Rows of keys and values, row `j` of a segment at `kv_start + j`.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a, E> {
    /// `[rows, kv_heads * head_dim]`
    pub keys: Rows<'a, E>,
    /// `[rows, kv_heads * head_dim]`
    pub values: Rows<'a, E>,
}

impl<'a, E: Element> KvView<'a, E> {
    pub(super) fn key(&self, row: usize, head: usize, head_dim: usize) -> &'a [E] {
        self.keys.head(row, head, head_dim)
    }

    pub(super) fn value(&self, row: usize, head: usize, head_dim: usize) -> &'a [E] {
        self.values.head(row, head, head_dim)
    }

    #[track_caller]
    pub(super) fn check(&self, shape: &AttentionShape, segments: &[Segment]) {
        let width = shape.kv_heads * shape.head_dim;
        let ends = segments.iter().map(|s| s.kv_start + s.kv_len);
        let rows = ends.max().unwrap_or(0);
        self.keys.check("keys", rows, width);
        self.values.check("values", rows, width);
    }
}
