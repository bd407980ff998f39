//! Packed weights of which a tape asks for nothing but the product: what several products in one run are made of.

use super::experts::Projection;
use crate::{Activation, Packed, Tape, Tensor, Weight};
use windlass_kernels::Element;
use windlass_kernels::packed::{Gate, Product};

/// A packed weight and its bias, with nothing else between a tape and its product.
#[derive(Clone, Copy)]
pub(super) struct PackedWeight<'w> {
    pub packed: &'w Packed,
    bias: Option<&'w Tensor>,
}

impl<'w> PackedWeight<'w> {
    /// `x Wᵀ + b`.
    pub fn product<'a, E: Element>(&self, out: &'a mut [E]) -> Product<'a, E>
    where
        'w: 'a,
    {
        Product {
            bias: self.bias.map(Tensor::as_slice::<E>),
            ..Product::of(self.packed.matrix(), out)
        }
    }

    /// Its product as the gate of another.
    pub fn gate<E: Element>(&self, activation: Activation) -> Gate<'w, E> {
        Gate {
            activation,
            matrix: self.packed.matrix(),
            bias: self.bias.map(Tensor::as_slice::<E>),
        }
    }

    /// Whether one product can have both: alike in shape, layout and the order of columns.
    pub fn goes_beside(&self, other: &PackedWeight<'_>) -> bool {
        let layout = |weight: &PackedWeight<'_>| *weight.packed.matrix().layout();
        self.packed.shape() == other.packed.shape()
            && layout(self) == layout(other)
            && self.packed.order() == other.packed.order()
    }
}

impl Tape {
    /// A weight and its bias, where it is packed and the tape asks for nothing but its product.
    pub(super) fn packed_weight<'w>(
        &self,
        (weight, bias): Projection<'w>,
    ) -> Option<PackedWeight<'w>> {
        match weight.weight {
            Weight::Packed(packed)
                if self.rounds()
                    && self.watch.is_none()
                    && !(self.has_adapters() && weight.lora.is_some())
                    && !self.is_overlaid(weight.slot) =>
            {
                let bias = bias.map(|bias| bias.weight.dense());
                Some(PackedWeight { packed, bias })
            }
            _ => None,
        }
    }
}
