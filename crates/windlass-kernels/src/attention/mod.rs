//! Causal flash attention over packed variable-length sequences, forward and backward.
//!
//! Query rows of all sequences lie one after another in one buffer; a [`Segment`] says which of them belong together
//! and which rows of keys and values they see. Scores exist only as tiles of at most 64 queries × 64 keys in worker
//! scratch, never as a whole matrix. Positions are not this module's business: rotate queries and keys before.
//!
//! The bits of a query's result depend on its own segment alone: key tiles are visited in the order of the key's index
//! in its segment, and every row does the same arithmetic whatever block of queries it is computed in. So a prompt
//! gives the same result whole, in chunks, or one token at a time against a cache, alone or in a batch, on any number
//! of threads. (It may differ between levels of the dispatch table.)

#[cfg(target_arch = "x86_64")]
mod amx;
mod backward;
mod forward;
#[cfg(target_arch = "x86_64")]
mod paged;
mod pages;
mod reference;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod softmax;
#[cfg(test)]
mod tests;
mod tile;
mod view;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use crate::Element;
use crate::dispatch::kernels;
use crate::pool::{Pool, SharedMut, Worker};
#[cfg(target_arch = "x86_64")]
use crate::{DType, dispatch::Level};

#[cfg(target_arch = "x86_64")]
use {backward::backward_simd, forward::forward_simd};

pub use pages::{KvType, PAGE, PagedKv};
pub use reference::{attention_backward_row, attention_row};
pub use view::{KvView, Rows};

use scalar::{backward_scalar, forward_scalar};

/// What does not change from one sequence to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`. Query head `h` reads kv head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Elements of one head's row.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Soft cap `c` of the scaled scores: `c * tanh(score / c)`.
    pub softcap: Option<f32>,
    /// Keys that a query sees, its own included; all earlier ones when absent.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Query heads that share one kv head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floating-point operations of the forward pass over `segments`: a multiply and an add for every visible pair of
    /// query and key and every element of a head, once for the scores and once for the values.
    pub fn flops(&self, segments: &[Segment]) -> f64 {
        let pairs: f64 = segments
            .iter()
            .map(|s| {
                (0..s.q_len)
                    .map(|i| s.visible(self, i).len() as f64)
                    .sum::<f64>()
            })
            .sum();
        4.0 * pairs * self.heads as f64 * self.head_dim as f64
    }
}

/// One sequence of the batch: its query rows and the key/value rows they may see.
///
/// The queries are the last `q_len` of `kv_len` positions: query `i` stands at position `p = kv_len - q_len + i` and
/// sees keys `p - window < j <= p`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First query row.
    pub q_start: usize,
    /// Query rows.
    pub q_len: usize,
    /// First key/value row.
    pub kv_start: usize,
    /// Key/value rows, at least `q_len`.
    pub kv_len: usize,
}

impl Segment {
    /// A sequence that attends to itself: training, or a prompt without a cache.
    pub fn whole(start: usize, len: usize) -> Segment {
        Segment {
            q_start: start,
            q_len: len,
            kv_start: start,
            kv_len: len,
        }
    }

    /// Position of query `i`, which is also the last key it sees.
    fn position(&self, i: usize) -> usize {
        self.kv_len - self.q_len + i
    }

    /// Keys that query `i` sees, as indices in the segment; never empty.
    fn visible(&self, shape: &AttentionShape, i: usize) -> Range<usize> {
        let end = self.position(i) + 1;
        end.saturating_sub(shape.window.unwrap_or(end))..end
    }
}

/// Everything a forward task reads and writes.
pub(crate) struct Forward<'a, E: Element> {
    shape: &'a AttentionShape,
    q: Rows<'a, E>,
    kv: Source<'a, E>,
    /// `[tokens, heads * head_dim]`
    out: SharedMut<'a, E>,
    /// `[heads, tokens]`
    lse: SharedMut<'a, E::Acc>,
    tokens: usize,
    /// Whether products are on AMX tiles.
    #[cfg(target_arch = "x86_64")]
    tiles: bool,
}

/// Where a forward pass finds keys and values.
#[derive(Clone, Copy)]
pub(crate) enum Source<'a, E> {
    /// Rows of buffers.
    Rows(KvView<'a, E>),
    /// Pages, and which of them each segment owns.
    Pages(&'a PagedKv, &'a [u32]),
}

/// A task of the forward pass: some queries of one segment, for all query heads of one kv head.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    segment: Segment,
    kv_head: usize,
    queries: Range<usize>,
}

/// Everything a backward task reads and writes.
pub(crate) struct Backward<'a, E: Element> {
    shape: &'a AttentionShape,
    q: Rows<'a, E>,
    kv: KvView<'a, E>,
    /// `[tokens, heads * head_dim]`, as `dout` and `dq`
    out: &'a [E],
    /// `[heads, tokens]`
    lse: &'a [E::Acc],
    dout: &'a [E],
    dq: SharedMut<'a, E>,
    /// `[kv tokens, kv_heads * head_dim]`, as `dv`
    dk: SharedMut<'a, E>,
    dv: SharedMut<'a, E>,
    tokens: usize,
}

/// Causal attention `softmax(scale * q k^T) v` of every query row over the keys it sees.
///
/// `lse` receives the logarithm of each row's sum of exponentials, which the backward pass needs. Rows of `out` and
/// `lse` that belong to no segment are left as they are.
///
/// # Shapes
/// `q`: rows of `heads * head_dim`; `k`, `v`: rows of `kv_heads * head_dim`; `out`: `[T, heads * head_dim]`;
/// `lse`: `[heads, T]`, where `T` covers the query rows of all segments.
///
/// # Panics
/// If shapes do not fit, a segment has fewer keys than queries, or segments are not in ascending order of disjoint
/// query rows.
///
/// # Source
/// Dao, "FlashAttention-2", 2023, algorithm 1.
#[track_caller]
pub fn attention<E: Element>(
    pool: &Pool,
    shape: &AttentionShape,
    segments: &[Segment],
    q: Rows<E>,
    k: Rows<E>,
    v: Rows<E>,
    out: &mut [E],
    lse: &mut [E::Acc],
) {
    let kv = KvView { keys: k, values: v };
    kv.check(shape, segments);
    forward(pool, shape, segments, q, Source::Rows(kv), out, lse);
}

/// [`attention`] with keys and values in pages: those of a segment's token `j` lie in the page
/// `table[(kv_start + j) / PAGE]`, where `kv_start` is a multiple of [`PAGE`].
///
/// Scores are computed from the stored numbers; the bits of a row's result do not depend on where its pages lie. At the AMX
/// level, over pages of `bf16` or bytes of another type than the queries, and for heads of a multiple of 64 elements, queries
/// and exponentials are rounded to `bf16` (half away from zero) and summed in `f32`.
///
/// # Panics
/// As [`attention`], or if a segment starts inside a page, or needs a page that is not in the table or does not exist,
/// or pages of `f64` meet other queries.
#[track_caller]
pub fn attention_paged<E: Element>(
    pool: &Pool,
    shape: &AttentionShape,
    segments: &[Segment],
    q: Rows<E>,
    kv: &PagedKv,
    table: &[u32],
    out: &mut [E],
    lse: &mut [E::Acc],
) {
    let own = [shape.kv_heads, shape.head_dim];
    assert_eq!(
        kv.shape(),
        own,
        "kv heads and head_dim of the pages and of attention"
    );
    let doubles = kv.kind() == KvType::Plain(crate::DType::F64);
    assert!(
        !doubles || E::DTYPE == crate::DType::F64,
        "pages of f64 for queries of {}",
        E::DTYPE
    );
    for segment in segments {
        assert!(
            segment.kv_start.is_multiple_of(PAGE),
            "{segment:?} starts inside a page"
        );
        let end = (segment.kv_start + segment.kv_len).div_ceil(PAGE);
        assert!(
            end <= table.len(),
            "{segment:?} ends at page {end} of a table of {}",
            table.len()
        );
        for &page in &table[segment.kv_start / PAGE..end] {
            assert!(
                (page as usize) < kv.pages(),
                "page {page} of {}",
                kv.pages()
            );
        }
    }
    forward(pool, shape, segments, q, Source::Pages(kv, table), out, lse);
}

#[track_caller]
fn forward<E: Element>(
    pool: &Pool,
    shape: &AttentionShape,
    segments: &[Segment],
    q: Rows<E>,
    kv: Source<'_, E>,
    out: &mut [E],
    lse: &mut [E::Acc],
) {
    let tokens = check_queries(shape, segments, q, out.len(), lse.len());
    let blocks = forward_blocks(shape, segments);
    let call = Forward {
        shape,
        q,
        kv,
        out: SharedMut::new(out),
        lse: SharedMut::new(lse),
        tokens,
        #[cfg(target_arch = "x86_64")]
        tiles: on_tiles(pool.level(), shape, &kv),
    };
    let kernel = forward_kernel::<E>(pool.level());
    // SAFETY: the pool's level is supported; blocks are disjoint in rows or heads, and everything fits as checked.
    pool.run(blocks.len(), |task, worker| unsafe {
        kernel(&call, &blocks[task], worker)
    });
}

/// Whether products are on AMX tiles: of pages of another type than the queries, so that pages of the same type give the bits of rows.
#[cfg(target_arch = "x86_64")]
fn on_tiles<E: Element>(level: Level, shape: &AttentionShape, kv: &Source<'_, E>) -> bool {
    let Source::Pages(kv, _) = kv else {
        return false;
    };
    let halves = matches!(kv.kind(), KvType::Plain(DType::Bf16) | KvType::Int8);
    let other = kv.kind() != KvType::Plain(E::DTYPE);
    level == Level::Amx && halves && other && amx::fits(shape.head_dim)
}

/// Gradients of [`attention`]: `dq`, `dk` and `dv` of `dout`, by recomputing the probabilities from `lse`.
///
/// With `p = exp(s - lse)` and `d = sum(dout * out)` of each row: `dv = p^T dout`, `ds = p * (dout v^T - d)` (times
/// the derivative of the soft cap), `dq = scale * ds k`, `dk = scale * ds^T q`. Rows that belong to no segment are
/// left as they are, all others are overwritten.
///
/// # Shapes
/// As [`attention`]; `dout` and `dq` as `out`, `dk` and `dv`: `[kv tokens, kv_heads * head_dim]`.
///
/// # Panics
/// As [`attention`], or if two segments share key rows.
///
/// # Source
/// Dao, "FlashAttention-2", 2023, algorithm 2.
#[track_caller]
pub fn attention_backward<E: Element>(
    pool: &Pool,
    shape: &AttentionShape,
    segments: &[Segment],
    q: Rows<E>,
    k: Rows<E>,
    v: Rows<E>,
    out: &[E],
    lse: &[E::Acc],
    dout: &[E],
    dq: &mut [E],
    dk: &mut [E],
    dv: &mut [E],
) {
    let tokens = check_queries(shape, segments, q, out.len(), lse.len());
    let kv = KvView { keys: k, values: v };
    kv.check(shape, segments);
    assert_eq!(dout.len(), out.len(), "dout and out");
    assert_eq!(dq.len(), out.len(), "dq and out");
    assert_eq!(dk.len(), dv.len(), "dk and dv");
    let kv_rows = segments
        .iter()
        .map(|s| s.kv_start + s.kv_len)
        .max()
        .unwrap_or(0);
    let width = shape.kv_heads * shape.head_dim;
    assert!(
        dk.len() >= kv_rows * width,
        "dk: {} elements, {kv_rows} rows need {}",
        dk.len(),
        kv_rows * width
    );
    let mut owned: Vec<_> = segments
        .iter()
        .map(|s| (s.kv_start, s.kv_start + s.kv_len))
        .collect();
    owned.sort_unstable();
    for pair in owned.windows(2) {
        assert!(
            pair[0].1 <= pair[1].0,
            "two segments share key rows: {:?} and {:?}",
            pair[0],
            pair[1]
        );
    }
    let order = longest_first(segments);
    let (dq, dk, dv) = (SharedMut::new(dq), SharedMut::new(dk), SharedMut::new(dv));
    let call = Backward {
        shape,
        q,
        kv,
        out,
        lse,
        dout,
        dq,
        dk,
        dv,
        tokens,
    };
    let kernel = backward_kernel::<E>(pool.level());
    pool.run(order.len() * shape.kv_heads, |task, worker| {
        let (segment, kv_head) = (&order[task / shape.kv_heads], task % shape.kv_heads);
        // SAFETY: the pool's level is supported; segments are disjoint, heads too, and everything fits as checked.
        unsafe { kernel(&call, segment, kv_head, worker) }
    });
}

/// Checks everything that concerns queries; returns the rows of `out`.
#[track_caller]
fn check_queries<E: Element>(
    shape: &AttentionShape,
    segments: &[Segment],
    q: Rows<E>,
    out: usize,
    lse: usize,
) -> usize {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        softcap,
        window,
        ..
    } = *shape;
    assert!(
        heads > 0 && kv_heads > 0 && head_dim > 0,
        "empty attention shape {shape:?}"
    );
    assert!(
        heads % kv_heads == 0,
        "{heads} heads are not a multiple of {kv_heads} kv heads"
    );
    assert!(softcap.is_none_or(|cap| cap > 0.0), "soft cap {softcap:?}");
    assert!(window != Some(0), "a window of 0 keys");
    let tokens = lse / heads;
    assert!(
        lse == heads * tokens,
        "lse: {lse} elements for {heads} heads"
    );
    assert!(
        out == lse * head_dim,
        "out: {out} elements, lse {lse} x head_dim {head_dim}"
    );
    let mut end = 0;
    for segment in segments {
        assert!(
            segment.q_start >= end,
            "{segment:?} starts before the query row {end} where another ends"
        );
        assert!(
            segment.q_len <= segment.kv_len,
            "{segment:?} has fewer keys than queries"
        );
        end = segment.q_start + segment.q_len;
    }
    assert!(
        end <= tokens,
        "segments end at query row {end}, out has {tokens} rows"
    );
    q.check("queries", end, heads * head_dim);
    tokens
}

/// Query positions of a forward task: few enough that their queries, sums and one tile stay in the second-level
/// cache, and many enough that a converted tile of keys is used often.
fn block_len(shape: &AttentionShape) -> usize {
    match shape.group() {
        1..=3 => 128,
        4..=7 => 64,
        8..=15 => 32,
        _ => 16,
    }
}

/// Tasks of the forward pass. Neighbors share keys and values; the costliest blocks come first.
fn forward_blocks(shape: &AttentionShape, segments: &[Segment]) -> Vec<Block> {
    let len = block_len(shape);
    let mut blocks = Vec::new();
    for segment in longest_first(segments) {
        for kv_head in 0..shape.kv_heads {
            for block in (0..segment.q_len.div_ceil(len)).rev() {
                let queries = block * len..segment.q_len.min((block + 1) * len);
                blocks.push(Block {
                    segment,
                    kv_head,
                    queries,
                });
            }
        }
    }
    blocks
}

kernels! {
    /// Attention of one block.
    fn forward_kernel<E>(call: &Forward<'_, E>, block: &Block, worker: &mut Worker) -> () {
        scalar: forward_scalar, simd: forward_simd
    }
    /// Gradients of one segment and kv head.
    fn backward_kernel<E>(call: &Backward<'_, E>, segment: &Segment, kv_head: usize, worker: &mut Worker) -> () {
        scalar: backward_scalar, simd: backward_simd
    }
}

fn longest_first(segments: &[Segment]) -> Vec<Segment> {
    let mut order: Vec<Segment> = segments.to_vec();
    order.sort_by_key(|s| std::cmp::Reverse(s.q_len * s.kv_len));
    order
}
