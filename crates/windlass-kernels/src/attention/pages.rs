//! Keys and values at rest: pages of [`PAGE`] tokens that sequences own one by one.
//!
//! A page holds all kv heads of one layer. Within it the keys of a head lie transposed, `[head_dim, PAGE]`, so that a
//! tile of scores is computed straight from storage, and its values as rows, `[PAGE, head_dim]`. Which page holds which
//! tokens of which sequence is a table of the caller's.

use super::Rows;
use super::tile::KEYS;
use crate::memory::{Buffer, Category, Memory};
use crate::pool::{Pool, SharedMut};
use crate::{DType, Element, Float};
use half::{bf16, f16};

/// Tokens of a page.
pub const PAGE: usize = KEYS;

/// The smallest number stored as `bf16`: tiles take denormal numbers and results for zero, and products of these have none.
const LEAST: f64 = 1.0 / (1u64 << 56) as f64;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As numbers, rounded to nearest even; in `bf16` those below 2^-56 are zero.
    Plain(DType),
    /// As bytes with one scale for each token and head: `x = scale * code`, `scale = max |x| / 127`.
    Int8,
}

impl KvType {
    /// Bytes that one token takes in one layer: its keys, values and scales.
    pub fn bytes(self, kv_heads: usize, head_dim: usize) -> usize {
        let head = match self {
            KvType::Plain(dtype) => dtype.size() * head_dim,
            KvType::Int8 => head_dim + size_of::<f32>(),
        };
        2 * kv_heads * head
    }
}

impl std::fmt::Display for KvType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KvType::Plain(dtype) => write!(f, "{}", dtype.name().to_lowercase()),
            KvType::Int8 => f.write_str("int8"),
        }
    }
}

/// Keys and values of one layer, for every sequence.
pub struct PagedKv {
    kind: KvType,
    kv_heads: usize,
    head_dim: usize,
    pages: usize,
    /// `[pages, kv_heads, head_dim, PAGE]`
    keys: Buffer,
    /// `[pages, kv_heads, PAGE, head_dim]`
    values: Buffer,
    /// `[pages, kv_heads, PAGE]` each
    scales: Option<[Buffer; 2]>,
}

/// Storage of keys and values as slices.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a, B> {
    pub keys: &'a [B],
    pub values: &'a [B],
    /// Of keys and of values.
    pub scales: Option<[&'a [f32]; 2]>,
}

impl PagedKv {
    /// Room for `pages` pages. Nothing is written.
    pub fn new(
        memory: &Memory,
        kind: KvType,
        kv_heads: usize,
        head_dim: usize,
        pages: usize,
    ) -> PagedKv {
        let tokens = pages * kv_heads * PAGE;
        let size = match kind {
            KvType::Plain(dtype) => dtype.size(),
            KvType::Int8 => 1,
        };
        let buffer = |bytes| memory.alloc(bytes, Category::Activations);
        PagedKv {
            kind,
            kv_heads,
            head_dim,
            pages,
            keys: buffer(tokens * head_dim * size),
            values: buffer(tokens * head_dim * size),
            scales: (kind == KvType::Int8).then(|| [(); 2].map(|()| buffer(4 * tokens))),
        }
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// `[kv_heads, head_dim]` of every token.
    pub fn shape(&self) -> [usize; 2] {
        [self.kv_heads, self.head_dim]
    }

    /// Stores the keys and values of tokens: row `i` in slot `slots[i]`, which is its page times [`PAGE`] plus its place
    /// in the page. A key or value that is not finite makes an `int8` token's scale NaN, which nothing hides.
    ///
    /// # Shapes
    /// `k`, `v`: `slots.len()` rows of `kv_heads * head_dim`.
    ///
    /// # Panics
    /// When rows are missing, or a slot is out of range or follows itself.
    #[track_caller]
    pub fn write<E: Element>(&mut self, pool: &Pool, k: Rows<E>, v: Rows<E>, slots: &[u32]) {
        let width = self.kv_heads * self.head_dim;
        k.check("keys", slots.len(), width);
        v.check("values", slots.len(), width);
        let end = self.pages * PAGE;
        for pair in slots.windows(2) {
            assert!(pair[0] != pair[1], "slot {} is given twice", pair[0]);
        }
        for &slot in slots {
            assert!((slot as usize) < end, "slot {slot} of {end}");
        }
        match self.kind {
            KvType::Plain(DType::F32) => self.write_plain::<E, f32>(pool, k, v, slots, 0.0),
            KvType::Plain(DType::F64) => self.write_plain::<E, f64>(pool, k, v, slots, 0.0),
            KvType::Plain(DType::Bf16) => {
                self.write_plain::<E, bf16>(pool, k, v, slots, LEAST);
            }
            KvType::Plain(DType::F16) => self.write_plain::<E, f16>(pool, k, v, slots, 0.0),
            KvType::Int8 => self.write_int8(pool, k, v, slots),
        }
    }

    fn write_plain<E: Element, C: Element>(
        &mut self,
        pool: &Pool,
        k: Rows<E>,
        v: Rows<E>,
        slots: &[u32],
        least: f64,
    ) {
        let (heads, d) = (self.kv_heads, self.head_dim);
        let keys = SharedMut::new(self.keys.as_mut_slice::<C>());
        let values = SharedMut::new(self.values.as_mut_slice::<C>());
        pool.run(heads, |head, _| {
            for (row, &slot) in slots.iter().enumerate() {
                let (tile, at) = place(slot, heads, head);
                // SAFETY: only this task touches this head's part of a page.
                let (keys, values) = unsafe {
                    (
                        keys.slice(tile * d * PAGE, d * PAGE),
                        values.slice((tile * PAGE + at) * d, d),
                    )
                };
                let stored = |x: &E| match x.to_f64() {
                    x if x.abs() < least => C::from_f64(0.0),
                    x => C::from_f64(x),
                };
                for (i, x) in k.head(row, head, d).iter().enumerate() {
                    keys[i * PAGE + at] = stored(x);
                }
                for (to, x) in values.iter_mut().zip(v.head(row, head, d)) {
                    *to = stored(x);
                }
            }
        });
    }

    fn write_int8<E: Element>(&mut self, pool: &Pool, k: Rows<E>, v: Rows<E>, slots: &[u32]) {
        let (heads, d) = (self.kv_heads, self.head_dim);
        let keys = SharedMut::new(self.keys.as_i8_mut());
        let values = SharedMut::new(self.values.as_i8_mut());
        let [key_scales, value_scales] = self.scales.as_mut().expect("int8 has scales");
        let key_scales = SharedMut::new(key_scales.as_mut_slice::<f32>());
        let value_scales = SharedMut::new(value_scales.as_mut_slice::<f32>());
        pool.run(heads, |head, _| {
            for (row, &slot) in slots.iter().enumerate() {
                let (tile, at) = place(slot, heads, head);
                let line = tile * PAGE + at;
                // SAFETY: only this task touches this head's part of a page.
                unsafe {
                    let x = k.head(row, head, d);
                    let keys = keys.slice(tile * d * PAGE, d * PAGE);
                    let to = keys[at..].iter_mut().step_by(PAGE);
                    key_scales.slice(line, 1)[0] = quantize(x, to);
                    let x = v.head(row, head, d);
                    value_scales.slice(line, 1)[0] =
                        quantize(x, values.slice(line * d, d).iter_mut());
                }
            }
        });
    }

    /// Copies a page over another.
    ///
    /// # Panics
    /// When a page does not exist.
    #[track_caller]
    pub fn copy_page(&mut self, from: usize, to: usize) {
        let [keys, values] =
            [self.keys.bytes(), self.values.bytes()].map(|b| b / self.pages.max(1));
        let pages = self.pages;
        assert!(
            from < pages && to < pages,
            "pages {from} and {to} of {pages}"
        );
        let copy = |buffer: &mut Buffer, size: usize| {
            let bytes = buffer.block_mut();
            bytes.copy_within(from * size..(from + 1) * size, to * size);
        };
        copy(&mut self.keys, keys);
        copy(&mut self.values, values);
        for scales in self.scales.iter_mut().flatten() {
            copy(scales, self.kv_heads * PAGE * size_of::<f32>());
        }
    }

    /// Storage of plain numbers.
    pub(super) fn plain<C: Element>(&self) -> Stored<'_, C> {
        Stored {
            keys: self.keys.as_slice::<C>(),
            values: self.values.as_slice::<C>(),
            scales: None,
        }
    }

    /// Storage of bytes.
    pub(super) fn int8(&self) -> Stored<'_, i8> {
        let scales = self.scales.as_ref().expect("int8 has scales");
        Stored {
            keys: self.keys.as_i8(),
            values: self.values.as_i8(),
            scales: Some([scales[0].as_slice(), scales[1].as_slice()]),
        }
    }

    /// The numbers that a token's key (or value) of one head stands for.
    pub(super) fn read<A: Float>(&self, slot: usize, head: usize, value: bool, to: &mut [A]) {
        let (tile, at) = place(slot as u32, self.kv_heads, head);
        let d = self.head_dim;
        for (i, to) in to.iter_mut().enumerate() {
            let index = match value {
                false => (tile * d + i) * PAGE + at,
                true => (tile * PAGE + at) * d + i,
            };
            let buffer = if value { &self.values } else { &self.keys };
            *to = match (self.kind, &self.scales) {
                (KvType::Plain(DType::F32), _) => A::of(buffer.as_slice::<f32>()[index].into()),
                (KvType::Plain(DType::F64), _) => A::of(buffer.as_slice::<f64>()[index]),
                (KvType::Plain(DType::Bf16), _) => A::of(buffer.as_slice::<bf16>()[index].into()),
                (KvType::Plain(DType::F16), _) => A::of(buffer.as_slice::<f16>()[index].into()),
                (KvType::Int8, scales) => {
                    let scales = &scales.as_ref().expect("int8 has scales")[usize::from(value)];
                    let scale = scales.as_slice::<f32>()[tile * PAGE + at];
                    A::of(f64::from(scale * f32::from(buffer.as_i8()[index])))
                }
            };
        }
    }
}

/// The tile (page and head) of a slot, and its place there.
fn place(slot: u32, heads: usize, head: usize) -> (usize, usize) {
    let slot = slot as usize;
    (slot / PAGE * heads + head, slot % PAGE)
}

/// Writes codes and returns their scale.
#[inline(always)]
fn quantize<'a, E: Element>(x: &[E], to: impl Iterator<Item = &'a mut i8>) -> f32 {
    let value = |x: &E| x.to_f64() as f32;
    let largest = x.iter().map(|x| value(x).abs()).fold(0.0, f32::max);
    if !x.iter().all(|x| value(x).is_finite()) {
        to.for_each(|code| *code = 0);
        return f32::NAN;
    }
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    for (code, x) in to.zip(x) {
        *code = (value(x) * inverse).round_ties_even() as i8;
    }
    largest / 127.0
}
