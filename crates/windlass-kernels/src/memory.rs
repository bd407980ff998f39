//! Memory that is not returned to the system between steps.
//!
//! Page faults cost more than arithmetic on a CPU, so blocks go back to a free list when their [`Buffer`] drops and
//! the next request of about that size takes them again. Large blocks are anonymous mappings with `MADV_HUGEPAGE`; those
//! that stay lie side by side, so that pages of 2 MiB span them.
//! In a pool that is [tight](Memory::tighten), free large blocks of other sizes go back to the system before it is asked for
//! more, as far as the pool would otherwise hold more than was ever in use at once.
//! Every block is accounted under a [`Category`], in use and at the moment of the highest use.
//!
//! This module does not know tensors, and it never zeroes a block on its own: a fresh block is zero, a reused one
//! holds whatever it held before (always initialized bytes).

use crate::Element;
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// What a block of memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// Parameters in the representation that the forward pass reads.
    Weights,
    /// Gradients of parameters.
    Gradients,
    /// Moments and the low halves of master weights.
    Optimizer,
    /// Values kept from the forward to the backward pass, and values in flight.
    Activations,
    /// Scratch that lives within one operation.
    Workspace,
}

impl Category {
    /// All categories, in report order.
    pub const ALL: [Category; 5] = [
        Category::Weights,
        Category::Gradients,
        Category::Optimizer,
        Category::Activations,
        Category::Workspace,
    ];

    /// Lower-case name for reports.
    pub const fn name(self) -> &'static str {
        match self {
            Category::Weights => "weights",
            Category::Gradients => "gradients",
            Category::Optimizer => "optimizer",
            Category::Activations => "activations",
            Category::Workspace => "workspace",
        }
    }
}

/// Bytes in use by category, in the order of [`Category::ALL`], and bytes taken from the system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use by category.
    pub by_category: [usize; 5],
    /// Bytes taken from the system: in use and on the free list.
    pub reserved: usize,
}

impl Usage {
    /// Bytes in use, all categories together.
    pub fn in_use(&self) -> usize {
        self.by_category.iter().sum()
    }

    /// Bytes in use under `category`.
    pub fn of(&self, category: Category) -> usize {
        self.by_category[category as usize]
    }
}

#[derive(Clone, Copy)]
struct Block {
    ptr: NonNull<u8>,
    capacity: usize,
}

#[derive(Default)]
struct State {
    free: BTreeMap<usize, Vec<Block>>,
    now: Usage,
    peak: Usage,
    /// The most that was ever in use at once.
    high: usize,
    tight: bool,
    /// Where blocks that stay come from.
    span: Span,
}

/// Addresses that nobody uses yet, from which blocks are cut: a page of 2 MiB holds the end of one and the beginning of the next,
/// where mappings of their own would have small pages at both.
#[derive(Default)]
struct Span {
    start: usize,
    len: usize,
}

struct Inner {
    state: Mutex<State>,
}

// SAFETY: the raw pointers of the free list are owned by `Inner` alone and only handed out one at a time.
unsafe impl Send for Inner {}
// SAFETY: as above; every access goes through the mutex.
unsafe impl Sync for Inner {}

/// A pool of memory blocks. Clones share the pool.
#[derive(Clone)]
pub struct Memory(Arc<Inner>);

/// What a disk asks of memory that it reads or fills by itself (`O_DIRECT`): blocks that long start on such a boundary.
pub const PAGE: usize = 4096;

/// Blocks from this size on are mapped, on pages of 2 MiB where the system has them.
const MAPPED_FROM: usize = 1 << 16;

/// A large page.
const LARGE_PAGE: usize = 1 << 21;

/// Addresses asked for at once. They take no memory before they are used.
const SPAN: usize = 1 << 26;

/// Gradients from this size on go back to the system.
const RETURNED_FROM: usize = 1 << 20;

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty pool.
    pub fn new() -> Self {
        Memory(Arc::new(Inner {
            state: Mutex::default(),
        }))
    }

    /// A block of at least `bytes` bytes, aligned to 64, and to [`PAGE`] if it is that long. Its contents are unspecified (but initialized).
    ///
    /// # Panics
    /// When the system has no memory left.
    pub fn alloc(&self, bytes: usize, category: Category) -> Buffer {
        let stays =
            bytes >= MAPPED_FROM && matches!(category, Category::Weights | Category::Optimizer);
        let returned = bytes >= MAPPED_FROM && category == Category::Gradients;
        // What stays, or goes back to the system, has its own size; what comes and goes here one that fits others too.
        let capacity = match stays || returned {
            true => bytes.next_multiple_of(PAGE),
            false => size_class(bytes),
        };
        let mut state = self.0.state.lock().expect("memory pool");
        let taken = state.take(capacity);
        let fresh = taken.is_none();
        let block = match taken {
            Some(block) => block,
            None => {
                if state.tight && capacity >= MAPPED_FROM {
                    state.make_room(capacity);
                }
                state.now.reserved += capacity;
                let ptr = match stays {
                    true => state.span.cut(capacity),
                    false => system_alloc(capacity),
                };
                let ptr = ptr.unwrap_or_else(|| {
                    panic!("the system has no memory left for a block of {capacity} bytes")
                });
                Block { ptr, capacity }
            }
        };
        state.now.by_category[category as usize] += block.capacity;
        if state.now.in_use() > state.peak.in_use() {
            state.peak.by_category = state.now.by_category;
        }
        state.high = state.high.max(state.now.in_use());
        state.peak.reserved = state.peak.reserved.max(state.now.reserved);
        Buffer {
            block,
            bytes,
            category,
            fresh,
            home: self.clone(),
        }
    }

    /// What is in use now.
    pub fn now(&self) -> Usage {
        self.0.state.lock().expect("memory pool").now
    }

    /// What was in use when the use was highest since [`Memory::reset_peak`].
    pub fn peak(&self) -> Usage {
        self.0.state.lock().expect("memory pool").peak
    }

    /// Starts a new measurement of the peak.
    pub fn reset_peak(&self) {
        let mut state = self.0.state.lock().expect("memory pool");
        state.peak = state.now;
    }

    /// From now on the pool holds no more large blocks than were ever in use at once: for a computation that uses most of its
    /// memory in other sizes at other times, and is slow beside what new pages cost.
    pub fn tighten(&self) {
        self.0.state.lock().expect("memory pool").tight = true;
    }

    /// Gives all free blocks back to the system, and what the allocator of small ones keeps.
    pub fn trim(&self) {
        let mut state = self.0.state.lock().expect("memory pool");
        for block in std::mem::take(&mut state.free).into_values().flatten() {
            state.now.reserved -= block.capacity;
            // SAFETY: a block on the free list has no other owner.
            unsafe { system_free(block) };
        }
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: it touches nothing but memory that is free.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

impl State {
    /// The smallest free block that fits without wasting more than a quarter of it.
    fn take(&mut self, capacity: usize) -> Option<Block> {
        let (&size, _) = self.free.range(capacity..=capacity + capacity / 4).next()?;
        let blocks = self.free.get_mut(&size)?;
        let block = blocks.pop();
        if blocks.is_empty() {
            self.free.remove(&size);
        }
        block
    }

    /// Gives free mapped blocks back to the system until a new one of `capacity` bytes makes no more than was ever in use at
    /// once; those first of which most is free.
    fn make_room(&mut self, capacity: usize) {
        let limit = self.high.max(self.now.in_use() + capacity);
        while self.now.reserved + capacity > limit {
            let mapped = self.free.range_mut(MAPPED_FROM..);
            let Some((&size, blocks)) = mapped.max_by_key(|(size, blocks)| **size * blocks.len())
            else {
                return;
            };
            let block = blocks.pop().expect("no class is empty");
            if blocks.is_empty() {
                self.free.remove(&size);
            }
            self.now.reserved -= size;
            // SAFETY: a block on the free list has no other owner.
            unsafe { system_free(block) };
        }
    }
}

impl Span {
    /// The next `capacity` bytes, whole pages; `None` when the system has no more.
    fn cut(&mut self, capacity: usize) -> Option<NonNull<u8>> {
        if capacity > self.len {
            let len = capacity.next_multiple_of(SPAN);
            let start = map(len + LARGE_PAGE)?.addr().get();
            self.release();
            let skipped = start.next_multiple_of(LARGE_PAGE) - start;
            // SAFETY: just mapped.
            unsafe { unmap(start, skipped) };
            (self.start, self.len) = (start + skipped, len + LARGE_PAGE - skipped);
        }
        let ptr = NonNull::new(self.start as *mut u8);
        self.start += capacity;
        self.len -= capacity;
        ptr
    }

    /// Gives back what was not used.
    fn release(&mut self) {
        // SAFETY: nobody has these addresses.
        unsafe { unmap(self.start, self.len) };
        *self = Span::default();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let state = self.state.get_mut().expect("memory pool");
        for block in std::mem::take(&mut state.free).into_values().flatten() {
            // SAFETY: buffers hold the pool alive, so only free blocks remain here.
            unsafe { system_free(block) };
        }
        state.span.release();
    }
}

/// A block of memory, returned to its pool when dropped.
pub struct Buffer {
    block: Block,
    bytes: usize,
    category: Category,
    fresh: bool,
    home: Memory,
}

// SAFETY: a buffer owns its block exclusively; access follows the borrow of the buffer.
unsafe impl Send for Buffer {}
// SAFETY: as above; `&Buffer` gives only shared slices.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// The bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole block as bytes: the bytes asked for and, up to the block's size, whatever lies behind them.
    ///
    /// For a disk that moves whole sectors; on a page boundary from 4096 bytes on.
    pub fn block(&self) -> &[u8] {
        // SAFETY: the block is initialized and `capacity` long.
        unsafe { std::slice::from_raw_parts(self.block.ptr.as_ptr(), self.block.capacity) }
    }

    /// The whole block as mutable bytes.
    pub fn block_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `block`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.block.ptr.as_ptr(), self.block.capacity) }
    }

    /// What the block is accounted under.
    pub fn category(&self) -> Category {
        self.category
    }

    /// Whether the block came from the system just now, so that all its bytes were zero.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The pool that the block returns to.
    pub fn memory(&self) -> &Memory {
        &self.home
    }

    /// The block as elements of `E`.
    pub fn as_slice<E: Element>(&self) -> &[E] {
        // SAFETY: the block is initialized, aligned to 64 or more, at least `bytes` long, and every bit pattern is a valid `E`.
        unsafe {
            std::slice::from_raw_parts(self.block.ptr.as_ptr().cast(), self.bytes / size_of::<E>())
        }
    }

    /// The block as mutable elements of `E`.
    pub fn as_mut_slice<E: Element>(&mut self) -> &mut [E] {
        // SAFETY: as in `as_slice`, and the borrow is exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.block.ptr.as_ptr().cast(),
                self.bytes / size_of::<E>(),
            )
        }
    }

    /// The block as bytes with a sign.
    pub fn as_i8(&self) -> &[i8] {
        // SAFETY: as in `as_slice`; every bit pattern is a valid `i8`.
        unsafe { std::slice::from_raw_parts(self.block.ptr.as_ptr().cast(), self.bytes) }
    }

    /// The block as mutable bytes with a sign.
    pub fn as_i8_mut(&mut self) -> &mut [i8] {
        // SAFETY: as in `as_mut_slice`; every bit pattern is a valid `i8`.
        unsafe { std::slice::from_raw_parts_mut(self.block.ptr.as_ptr().cast(), self.bytes) }
    }

    /// The block as 16-bit integers: the low halves of split master weights.
    pub fn as_i16(&self) -> &[i16] {
        // SAFETY: as in `as_slice`; every bit pattern is a valid `i16`.
        unsafe { std::slice::from_raw_parts(self.block.ptr.as_ptr().cast(), self.bytes / 2) }
    }

    /// The block as mutable 16-bit integers.
    pub fn as_i16_mut(&mut self) -> &mut [i16] {
        // SAFETY: as in `as_mut_slice`; every bit pattern is a valid `i16`.
        unsafe { std::slice::from_raw_parts_mut(self.block.ptr.as_ptr().cast(), self.bytes / 2) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.home.0.state.lock().expect("memory pool");
        state.now.by_category[self.category as usize] -= self.block.capacity;
        // Gradients live while activations die and the other way round, in blocks of other sizes. They are zeroed for
        // every step anyway, which the system does for mapped blocks: handing those back costs nothing more.
        let returned_from = match state.tight {
            true => MAPPED_FROM,
            false => RETURNED_FROM,
        };
        if self.category == Category::Gradients && self.block.capacity >= returned_from {
            state.now.reserved -= self.block.capacity;
            // SAFETY: the buffer owned the block and is gone after this.
            unsafe { system_free(self.block) };
            return;
        }
        let free = state.free.entry(self.block.capacity).or_default();
        free.push(self.block);
    }
}

/// Rounds up to an eighth of the next lower power of two (64 bytes at least), so that sizes repeat.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(64);
    let step = (bytes.next_power_of_two() / 16).max(64);
    let class = bytes.div_ceil(step) * step;
    if class >= MAPPED_FROM {
        class.div_ceil(PAGE) * PAGE
    } else {
        class
    }
}

fn system_alloc(capacity: usize) -> Option<NonNull<u8>> {
    if capacity >= MAPPED_FROM {
        return map(capacity);
    }
    // SAFETY: the layout has a non-zero size.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout(capacity)) })
}

/// # Safety
/// `block` must come from [`system_alloc`] or a [`Span`] and have no other owner.
unsafe fn system_free(block: Block) {
    if block.capacity >= MAPPED_FROM {
        // SAFETY: the bytes were mapped; a part of a mapping may be given back.
        unsafe { unmap(block.ptr.addr().get(), block.capacity) };
    } else {
        // SAFETY: allocated with the same layout.
        unsafe { std::alloc::dealloc(block.ptr.as_ptr(), layout(block.capacity)) };
    }
}

/// New zeros, on pages of 2 MiB where the system has them.
fn map(len: usize) -> Option<NonNull<u8>> {
    // SAFETY: a fresh anonymous mapping; the result is checked.
    unsafe {
        let ptr = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if ptr == libc::MAP_FAILED {
            return None;
        }
        #[cfg(target_os = "linux")]
        libc::madvise(ptr, len, libc::MADV_HUGEPAGE);
        NonNull::new(ptr.cast())
    }
}

/// # Safety
/// Whole pages that came from [`map`] and that nobody uses any more.
unsafe fn unmap(start: usize, len: usize) {
    if len > 0 {
        // SAFETY: the caller's promise.
        unsafe { libc::munmap(start as *mut libc::c_void, len) };
    }
}

fn layout(capacity: usize) -> Layout {
    let align = if capacity >= PAGE { PAGE } else { 64 };
    Layout::from_size_align(capacity, align).expect("a block size")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_reused_and_accounted() {
        let memory = Memory::new();
        for bytes in [
            0usize,
            1,
            63,
            64,
            1000,
            4096,
            5000,
            70_000,
            1 << 20,
            3_000_000,
            9_999_999,
        ] {
            let mut a = memory.alloc(bytes, Category::Activations);
            a.as_mut_slice::<f32>().fill(1.5);
            assert_eq!(a.as_slice::<f32>().len(), bytes / 4);
            let whole = a.block().len();
            assert!(whole >= bytes.max(64), "{bytes}: {whole}");
            let align = if whole >= PAGE { PAGE } else { 64 };
            assert_eq!(a.block_mut().as_ptr() as usize % align, 0, "{bytes}");
            assert!(memory.now().of(Category::Activations) >= bytes);
            assert!(
                memory.now().in_use() <= bytes.max(64) * 9 / 8 + 4096,
                "{bytes}: little is wasted"
            );
            let reserved = memory.now().reserved;
            drop(a);
            let b = memory.alloc(bytes, Category::Workspace);
            assert_eq!(
                memory.now().reserved,
                reserved,
                "{bytes}: the block is taken again"
            );
            assert_eq!(memory.now().of(Category::Activations), 0);
            drop(b);
        }
        let gradients = memory.alloc(3_000_000, Category::Gradients);
        assert!(gradients.as_slice::<f32>().iter().all(|v| *v == 1.5) || gradients.is_fresh());
        let reserved = memory.now().reserved;
        drop(gradients);
        assert!(
            memory.now().reserved < reserved,
            "large gradients go back to the system"
        );
        memory.trim();
        assert_eq!(memory.now(), Usage::default());
        assert!(memory.peak().in_use() >= 9_999_999);
    }

    #[test]
    fn blocks_that_stay_share_large_pages() {
        let memory = Memory::new();
        let sizes = [MAPPED_FROM, 3_000_000, SPAN + 1, 5_000_000, SPAN / 2];
        let mut blocks = sizes.map(|bytes| memory.alloc(bytes, Category::Weights));
        let ends = |block: &Buffer| {
            let bytes = block.block().as_ptr_range();
            (bytes.start.addr(), bytes.end.addr())
        };
        assert_eq!(ends(&blocks[0]).0 % LARGE_PAGE, 0);
        assert_eq!(ends(&blocks[0]).1, ends(&blocks[1]).0);
        assert_eq!(ends(&blocks[2]).0 % LARGE_PAGE, 0, "more than was left");
        assert_eq!(ends(&blocks[2]).1, ends(&blocks[3]).0);
        for (value, block) in (1..).zip(&mut blocks) {
            assert!(block.block().iter().all(|&byte| byte == 0));
            block.block_mut().fill(value);
        }
        // One of several in a mapping goes back, and the others stay.
        let [first, _, third, fourth, last] = blocks;
        memory.trim();
        for (value, block) in [(1, first), (3, third), (4, fourth), (5, last)] {
            assert!(block.block().iter().all(|&byte| byte == value));
        }
    }

    #[test]
    fn a_tight_pool_holds_what_was_in_use_at_once() {
        for tight in [false, true] {
            let memory = Memory::new();
            if tight {
                memory.tighten();
            }
            let take = |count: usize, bytes: usize, category| -> Vec<Buffer> {
                let block = |_| memory.alloc(bytes, category);
                (0..count).map(block).collect()
            };
            for step in 0..3 {
                let mut layers: Vec<_> = (0..8)
                    .map(|_| {
                        let wide = take(2, 5 << 20, Category::Activations);
                        (wide, take(3, 2 << 20, Category::Activations))
                    })
                    .collect();
                let mut gradients = Vec::new();
                while layers.pop().is_some() {
                    gradients.extend(take(14, 352 << 10, Category::Gradients));
                }
                let peak = memory.peak();
                let held = peak.reserved - peak.in_use();
                assert_eq!(held == 0, tight, "step {step}: {held} bytes too many");
            }
        }
    }
}
