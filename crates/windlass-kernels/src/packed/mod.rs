//! Matrices of small integers with scales, laid out for products with few or many rows of 8-bit activations.
//!
//! A matrix `[N, K]` is cut into *panels* of 16 rows; a panel is one stream of bytes along `K`, so a core that works on
//! four panels reads four streams. Inside, a *step* of 32 columns holds its codes so that one 64-byte vector has four
//! neighboring columns of each of the 16 rows: what `vpdpbusd` multiplies. A *unit* of up to eight steps starts with the
//! scales of its steps.
//!
//! Activations are quantized once for each row: symmetric 8-bit integers with an `f32` scale for each unit of 256 columns.
//! A product sums integers over a unit, where scales are whole numbers times one for it (the sub-scales of K-quants; those of
//! symmetric 4-bit formats are taken as such). Elsewhere it sums them over a step, or over a *group* of 128 columns that have
//! one scale, and adds these parts in order in `f32`, multiplied by the scales of the weights. Then it adds what it summed in
//! order, multiplied by the scales of the activations: a row's result has the same bits for any number of rows, threads and
//! neighbors, and at every [`crate::dispatch::Level`]. (The scales of weights mostly change every 32 columns, and what is done
//! for each of these on top of the integers is the limit of a product with many rows.)
//!
//! This module knows nothing of file formats; a [`RowUnit`] is what their blocks are taken apart into.

mod activations;
mod amx;
mod finish;
mod from_blocks;
mod kernel;
mod lanes;
mod layout;
mod matrix;
mod planes;
mod product;
mod quantize;
mod reference;
#[cfg(test)]
mod tests;
mod unit;
mod unpack;

pub use activations::Activations;
pub use layout::{Codes, LAYOUT_VERSION, Layout, Min, Scale};
pub use matrix::PackedMatrix;
pub(crate) use product::uses_tiles;
pub use product::{Gate, Product, kernel_names, multiply, multiply_groups};
pub use unit::{RowUnit, UnitMut};
pub(crate) use unpack::{ROOM, Unpack};

/// Rows of a panel.
pub const PANEL: usize = 16;
/// Columns of a step.
pub const STEP: usize = 32;
/// Steps of a group: the most that weights with an `f16` of their own are summed over.
pub const GROUP_STEPS: usize = 4;
/// Steps of a whole unit: activations share a scale.
pub const UNIT_STEPS: usize = 8;
/// Columns of a whole unit.
pub const UNIT: usize = STEP * UNIT_STEPS;
