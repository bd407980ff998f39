//! Buffers of the pool: slices that tasks write disjoint parts of, and reusable scratch memory.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::marker::PhantomData;

use crate::Element;

/// Alignment of scratch buffers: one cache line, one AVX-512 vector.
const ALIGN: usize = 64;
/// A huge page.
const HUGE: usize = 2 << 20;

/// A `Sync` view of a slice from which tasks take disjoint parts to write.
#[derive(Clone, Copy)]
pub struct SharedMut<'a, T> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are only handed out by an unsafe method whose caller promises that they do not overlap.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Borrows `data` for as long as the view lives.
    pub fn new(data: &'a mut [T]) -> SharedMut<'a, T> {
        SharedMut {
            data: data.as_mut_ptr(),
            len: data.len(),
            borrow: PhantomData,
        }
    }

    /// Elements in the whole view.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the view has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first element's address, for kernels that write strided parts. Access through it follows
    /// [`SharedMut::slice`]'s promise.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.data
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// No other thread accesses an element of the part as long as the returned slice lives, and no other live slice
    /// of this thread overlaps it.
    ///
    /// # Panics
    /// When the part is out of range.
    #[track_caller]
    #[expect(
        clippy::mut_from_ref,
        reason = "disjointness is the caller's promise; this is what the type is for"
    )]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        let end = start.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "part {start}+{len} of a view of {}",
            self.len
        );
        // SAFETY: in range; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// A grow-only, aligned, always initialized buffer.
pub(super) struct Scratch {
    data: *mut u8,
    bytes: usize,
}

// SAFETY: plain owned memory.
unsafe impl Send for Scratch {}

impl Scratch {
    pub(super) const fn new() -> Scratch {
        Scratch {
            data: std::ptr::null_mut(),
            bytes: 0,
        }
    }

    pub(super) fn slices<E: Element, F: Element>(
        &mut self,
        len: usize,
        len2: usize,
    ) -> (&mut [E], &mut [F]) {
        let first = len
            .checked_mul(size_of::<E>())
            .expect("scratch too large")
            .next_multiple_of(ALIGN);
        let second = len2
            .checked_mul(size_of::<F>())
            .expect("scratch too large")
            .next_multiple_of(ALIGN);
        self.grow((first + second).max(ALIGN));
        // SAFETY: both parts lie in the allocation, aligned, disjoint; it is initialized, and every bit pattern is
        // a value of an `Element` (a sealed trait of plain numbers).
        unsafe {
            let second = self.data.add(first).cast();
            (
                std::slice::from_raw_parts_mut(self.data.cast(), len),
                std::slice::from_raw_parts_mut(second, len2),
            )
        }
    }

    fn grow(&mut self, bytes: usize) {
        if bytes <= self.bytes {
            return;
        }
        self.free();
        let layout = layout(bytes);
        // SAFETY: the size is not zero; pages are advised on and zeroed inside the allocation.
        let data = unsafe {
            let data = alloc(layout);
            if data.is_null() {
                handle_alloc_error(layout);
            }
            #[cfg(target_os = "linux")]
            if layout.align() == HUGE {
                // Advice: where it is refused, small pages do.
                libc::madvise(data.cast(), layout.size(), libc::MADV_HUGEPAGE);
            }
            data.write_bytes(0, layout.size());
            data
        };
        (self.data, self.bytes) = (data, layout.size());
    }

    fn free(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated in `grow` with this layout, which rounds its own size to itself.
            unsafe { dealloc(self.data, layout(self.bytes)) };
            (self.data, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

/// Large buffers are whole huge pages: packed operands are read page after page, and each small one costs a table walk.
fn layout(bytes: usize) -> Layout {
    let align = if bytes > HUGE / 2 { HUGE } else { ALIGN };
    let size = bytes
        .checked_next_multiple_of(align)
        .expect("scratch too large");
    Layout::from_size_align(size, align).expect("scratch too large")
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.free();
    }
}
