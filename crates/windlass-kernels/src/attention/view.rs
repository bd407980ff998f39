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

/// Where keys and values lie. The one place that knows: everything else asks for a row number.
#[derive(Clone, Copy, Debug)]
pub struct KvView<'a, E> {
    keys: Rows<'a, E>,
    values: Rows<'a, E>,
    pages: Option<Pages<'a>>,
}

/// Row `r` of a segment is row `table[r / len] * len + r % len` of the buffers.
#[derive(Clone, Copy, Debug)]
struct Pages<'a> {
    len: usize,
    table: &'a [u32],
}

impl<'a, E: Element> KvView<'a, E> {
    /// Row `r` is row `r` of the buffers.
    pub fn contiguous(keys: Rows<'a, E>, values: Rows<'a, E>) -> KvView<'a, E> {
        KvView {
            keys,
            values,
            pages: None,
        }
    }

    /// Row `r` is row `table[r / page_len] * page_len + r % page_len` of the buffers; `kv_start` of a segment is
    /// `page_len` times the place of its first page in `table`.
    ///
    /// # Panics
    /// If `page_len` is 0.
    #[track_caller]
    pub fn paged(
        keys: Rows<'a, E>,
        values: Rows<'a, E>,
        page_len: usize,
        table: &'a [u32],
    ) -> KvView<'a, E> {
        assert!(page_len > 0, "pages of no rows");
        KvView {
            keys,
            values,
            pages: Some(Pages {
                len: page_len,
                table,
            }),
        }
    }

    #[inline]
    fn row(&self, row: usize) -> usize {
        match self.pages {
            None => row,
            Some(Pages { len, table }) => table[row / len] as usize * len + row % len,
        }
    }

    pub(super) fn key(&self, row: usize, head: usize, head_dim: usize) -> &'a [E] {
        self.keys.head(self.row(row), head, head_dim)
    }

    pub(super) fn value(&self, row: usize, head: usize, head_dim: usize) -> &'a [E] {
        self.values.head(self.row(row), head, head_dim)
    }

    #[track_caller]
    pub(super) fn check(&self, shape: &AttentionShape, segments: &[Segment]) {
        let width = shape.kv_heads * shape.head_dim;
        let rows = match self.pages {
            None => segments
                .iter()
                .map(|s| s.kv_start + s.kv_len)
                .max()
                .unwrap_or(0),
            Some(Pages { len, table }) => {
                let used = |s: &Segment| s.kv_start / len..(s.kv_start + s.kv_len).div_ceil(len);
                let pages = segments.iter().flat_map(|s| table[used(s)].iter()).max();
                pages.map_or(0, |&page| (page as usize + 1) * len)
            }
        };
        self.keys.check("keys", rows, width);
        self.values.check("values", rows, width);
    }
}
