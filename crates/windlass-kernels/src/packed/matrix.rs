//! A packed matrix in memory: filled a panel at a time, read back a row at a time.

use super::layout::{Layout, Units};
use super::unit::{RowUnit, UnitMut, read_unit};
use super::{PANEL, UNIT};
use crate::memory::{Buffer, Category, Memory};
use crate::pool::{Pool, SharedMut};
use std::sync::Arc;

/// A matrix `[rows, cols]` of codes and scales.
pub struct PackedMatrix {
    layout: Layout,
    rows: usize,
    cols: usize,
    units: Units,
    data: Data,
}

/// Where the bytes of a matrix live.
enum Data {
    Owned(Buffer),
    /// Somebody else's memory: a mapped file.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "PackedMatrix [{}, {}] {:?}",
            self.rows, self.cols, self.layout
        )
    }
}

impl PackedMatrix {
    /// Packs a matrix unit by unit: `read(row, unit, out)` writes the unit of 256 columns (fewer at the end of a row) of a
    /// row, all of it, in any order of units and on all threads.
    ///
    /// # Panics
    /// On a layout with an impossible group.
    #[track_caller]
    pub fn pack(
        pool: &Pool,
        memory: &Memory,
        layout: Layout,
        [rows, cols]: [usize; 2],
        read: impl Fn(usize, usize, &mut UnitMut<'_>) + Sync,
    ) -> PackedMatrix {
        Self::pack_panels(pool, memory, layout, [rows, cols], |panel, units, bytes| {
            for index in 0..units.len() {
                let (unit, start) = units.at(index);
                for lane in 0..PANEL {
                    let bytes = &mut bytes[start..][..unit.bytes];
                    let mut out = UnitMut::new(&layout, unit, bytes, lane);
                    match panel * PANEL + lane {
                        row if row < rows => read(row, index, &mut out),
                        _ => out.write(&RowUnit::ZERO),
                    }
                }
            }
        })
    }

    /// Packs a matrix panel by panel: `fill(panel, units, bytes)` writes all bytes of a panel, on all threads.
    ///
    /// # Panics
    /// On a layout with an impossible group.
    #[track_caller]
    pub(super) fn pack_panels(
        pool: &Pool,
        memory: &Memory,
        layout: Layout,
        [rows, cols]: [usize; 2],
        fill: impl Fn(usize, &Units, &mut [u8]) + Sync,
    ) -> PackedMatrix {
        let units = Units::new(&layout, cols);
        let panels = rows.div_ceil(PANEL);
        let mut data = memory.alloc(panels * units.bytes(), Category::Weights);
        let view = SharedMut::new(&mut data.block_mut()[..panels * units.bytes()]);
        pool.run(panels, |panel, _| {
            // SAFETY: a task has its own panel.
            let bytes = unsafe { view.slice(panel * units.bytes(), units.bytes()) };
            fill(panel, &units, bytes);
        });
        PackedMatrix {
            layout,
            rows,
            cols,
            units,
            data: Data::Owned(data),
        }
    }

    /// A matrix over bytes that were packed before, as [`PackedMatrix::bytes`] gave them.
    ///
    /// # Panics
    /// When the number of bytes is not that of the shape; see [`PackedMatrix::packed_bytes`].
    #[track_caller]
    pub fn from_bytes(
        layout: Layout,
        [rows, cols]: [usize; 2],
        bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    ) -> PackedMatrix {
        let expected = Self::packed_bytes(&layout, [rows, cols]);
        assert_eq!(
            (*bytes).as_ref().len(),
            expected,
            "bytes of a packed matrix [{rows}, {cols}]"
        );
        PackedMatrix {
            layout,
            rows,
            cols,
            units: Units::new(&layout, cols),
            data: Data::Shared(bytes),
        }
    }

    /// Bytes of a packed matrix of a shape.
    pub fn packed_bytes(layout: &Layout, [rows, cols]: [usize; 2]) -> usize {
        rows.div_ceil(PANEL) * Units::new(layout, cols).bytes()
    }

    /// How it is stored.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Rows, `N`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, `K`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Steps of a row, the padding of its last group included.
    pub(super) fn steps(&self) -> usize {
        self.units.steps()
    }

    pub(super) fn units(&self) -> &Units {
        &self.units
    }

    /// All panels.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Owned(buffer) => &buffer.block()[..buffer.bytes()],
            Data::Shared(bytes) => (**bytes).as_ref(),
        }
    }

    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.bytes()[panel * self.units.bytes()..][..self.units.bytes()]
    }

    /// Where a panel is, or would be.
    pub(super) fn address(&self, panel: usize) -> usize {
        let start = self.bytes().as_ptr().addr();
        start.wrapping_add(panel * self.units.bytes())
    }

    /// Takes unit `index` of a row apart again.
    pub fn row_unit(&self, row: usize, index: usize, out: &mut RowUnit) {
        let (unit, start) = self.units.at(index);
        let bytes = &self.panel(row / PANEL)[start..][..unit.bytes];
        read_unit(&self.layout, &unit, bytes, row % PANEL, out);
    }

    /// Writes row `row` as plain numbers.
    ///
    /// # Panics
    /// When `out` does not hold exactly a row.
    #[track_caller]
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "elements of a row");
        let mut unit = RowUnit::ZERO;
        for (index, out) in out.chunks_mut(UNIT).enumerate() {
            self.row_unit(row, index, &mut unit);
            for (k, out) in out.iter_mut().enumerate() {
                *out = unit.weight(&self.layout, k);
            }
        }
    }
}
