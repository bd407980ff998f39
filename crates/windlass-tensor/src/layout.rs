//! Units and file layouts as plain data: what a model declares, what a store keeps, what a file holds.

use crate::ops::Lora;
use crate::{ParamSpec, Shape};
use std::sync::Arc;

/// Parameters that are gathered, reduced and updated together.
#[derive(Clone, Debug, PartialEq)]
pub struct UnitSpec {
    /// Name, for messages.
    pub name: String,
    /// Parameters in slot order.
    pub params: Vec<ParamSpec>,
    /// Adapters, each with the slot of the weight that it adapts.
    pub adapters: Arc<[(usize, Lora)]>,
}

/// A parameter of a model: which unit, which slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId {
    /// Index of the unit.
    pub unit: usize,
    /// Index among the unit's parameters.
    pub slot: usize,
}

/// How the elements of one tensor of a file are made of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The rows of the parameters, one parameter after another.
    Rows,
    /// The same, then transposed (GPT-2 stores `[in, out]`).
    Transposed,
    /// Rows grouped by head: the first head's rows of every parameter, then the second head's (GPT-NeoX).
    ByHead {
        /// Number of heads.
        heads: usize,
    },
}

/// One tensor of a checkpoint file: some of our parameters in some layout.
#[derive(Clone, Debug, PartialEq)]
pub struct FileTensor {
    /// Name in the file.
    pub name: String,
    /// Shape in the file.
    pub shape: Shape,
    /// The parameters that it holds.
    pub parts: Vec<ParamId>,
    /// How it holds them.
    pub layout: Layout,
}

impl FileTensor {
    /// Cuts the elements of the file's tensor into those of its parameters, each of `rows[i]` rows.
    ///
    /// # Panics
    /// When the element counts do not fit.
    #[track_caller]
    pub fn split<T: Copy>(&self, elements: &[T], rows: &[usize]) -> Vec<Vec<T>> {
        assert_eq!(
            elements.len(),
            self.shape.len(),
            "elements against the shape of {}",
            self.name
        );
        let total: usize = rows.iter().sum();
        let cols = elements.len().checked_div(total).unwrap_or(0);
        if self.layout == Layout::Rows && rows.len() == 1 {
            return vec![elements.to_vec()];
        }
        let mut parts: Vec<Vec<T>> = rows.iter().map(|r| Vec::with_capacity(r * cols)).collect();
        for (part, row) in self.order(rows) {
            match self.layout {
                Layout::Transposed => {
                    parts[part].extend((0..cols).map(|c| elements[c * total + row]))
                }
                _ => parts[part].extend_from_slice(&elements[row * cols..(row + 1) * cols]),
            }
        }
        parts
    }

    /// The inverse of [`FileTensor::split`].
    #[track_caller]
    pub fn join<T: Copy + Default>(&self, parts: &[&[T]], rows: &[usize]) -> Vec<T> {
        let total: usize = rows.iter().sum();
        let mut out = vec![T::default(); self.shape.len()];
        let cols = out.len().checked_div(total).unwrap_or(0);
        let mut next = vec![0; parts.len()];
        for (part, row) in self.order(rows) {
            let from = &parts[part][next[part] * cols..(next[part] + 1) * cols];
            next[part] += 1;
            match self.layout {
                Layout::Transposed => from
                    .iter()
                    .enumerate()
                    .for_each(|(c, v)| out[c * total + row] = *v),
                _ => out[row * cols..(row + 1) * cols].copy_from_slice(from),
            }
        }
        out
    }

    /// The parameter of each row of the file's (untransposed) tensor, in file order, with the row. `rows` are those of the
    /// parameters.
    pub fn order(&self, rows: &[usize]) -> Vec<(usize, usize)> {
        let heads = if let Layout::ByHead { heads } = self.layout {
            heads
        } else {
            1
        };
        let turns = (0..heads).flat_map(|_| rows.iter().enumerate());
        turns
            .flat_map(|(part, r)| std::iter::repeat_n(part, r / heads))
            .enumerate()
            .map(|(row, part)| (part, row))
            .collect()
    }
}
