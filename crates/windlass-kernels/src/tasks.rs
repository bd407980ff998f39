//! How kernels cut their work into tasks of a size that never depends on the number of threads.

use std::ops::Range;

use crate::pool::SharedMut;

/// Elements of a task: enough work (about 2 µs) to pay for handing it out, few enough to balance small tensors.
const ELEMENTS: usize = 16 * 1024;
/// Columns of a task that sums over rows: some cache lines of a row, enough tasks for a narrow matrix.
const STRIPE: usize = 64;

/// A range cut into tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tasks {
    items: usize,
    per_task: usize,
}

impl Tasks {
    /// Over the elements of a buffer.
    pub fn elements(len: usize) -> Tasks {
        Tasks {
            items: len,
            per_task: ELEMENTS,
        }
    }

    /// Over rows of `cols` elements.
    pub fn rows(rows: usize, cols: usize) -> Tasks {
        Tasks {
            items: rows,
            per_task: (ELEMENTS / cols.max(1)).max(1),
        }
    }

    /// Over stripes of columns, each task seeing all rows in order.
    pub fn stripes(cols: usize) -> Tasks {
        Tasks {
            items: cols,
            per_task: STRIPE,
        }
    }

    /// Over blocks of a given number of items.
    pub fn blocks(items: usize, per_task: usize) -> Tasks {
        Tasks { items, per_task }
    }

    /// Number of tasks.
    pub fn count(self) -> usize {
        self.items.div_ceil(self.per_task)
    }

    /// The items of a task.
    pub fn part(self, task: usize) -> Range<usize> {
        let start = task * self.per_task;
        start..(start + self.per_task).min(self.items)
    }
}

/// The elements of rows `rows` of `cols` elements each.
#[inline]
pub(crate) fn cells(rows: &Range<usize>, cols: usize) -> Range<usize> {
    rows.start * cols..rows.end * cols
}

impl<T> SharedMut<'_, T> {
    /// As [`SharedMut::slice`], of a range.
    ///
    /// # Safety
    /// As [`SharedMut::slice`].
    #[track_caller]
    #[expect(clippy::mut_from_ref, reason = "as SharedMut::slice")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise.
        unsafe { self.slice(range.start, range.end - range.start) }
    }
}

/// Asserts that a buffer has the length its shape asks for.
#[track_caller]
pub(crate) fn assert_len(name: &str, got: usize, want: usize) {
    assert!(
        got == want,
        "{name} has {got} elements, its shape has {want}"
    );
}
