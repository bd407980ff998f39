//! A model as units and layers.

use windlass_tensor::{ParamSpec, Tape, UnitSpec, Var, Weights};

/// One step of a model's forward pass, on the borrowed weights of its unit.
///
/// `B` is the model's batch: whatever its layers read beside the value that flows from layer to layer.
pub trait Layer<B>: Send + Sync {
    /// Computes the layer's output from `x`. The first layer receives an empty value and starts from the batch; the last
    /// one returns the loss (a scalar) in training.
    fn forward(&self, weights: &Weights, x: Var, batch: &B, tape: &mut Tape) -> Var;
}

/// Units, which own parameters, and the layers that compute on them in order.
///
/// A unit may serve several layers: tied weights belong to one unit that the first and the last layer share.
pub struct Model<B> {
    units: Vec<UnitSpec>,
    layers: Vec<(usize, Box<dyn Layer<B>>)>,
}

impl<B> Default for Model<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B> Model<B> {
    /// A model without layers.
    pub fn new() -> Self {
        Model {
            units: Vec::new(),
            layers: Vec::new(),
        }
    }

    /// Declares a unit; nothing is allocated.
    pub fn unit(&mut self, name: impl Into<String>, params: Vec<ParamSpec>) -> usize {
        self.units.push(UnitSpec {
            name: name.into(),
            params,
            adapters: Default::default(),
        });
        self.units.len() - 1
    }

    /// Appends a layer on a declared unit.
    ///
    /// # Panics
    /// When the unit does not exist.
    #[track_caller]
    pub fn layer(&mut self, unit: usize, layer: impl Layer<B> + 'static) {
        assert!(
            unit < self.units.len(),
            "unit {unit} against {} units",
            self.units.len()
        );
        self.layers.push((unit, Box::new(layer)));
    }

    /// The units.
    pub fn units(&self) -> &[UnitSpec] {
        &self.units
    }

    /// The units, to be changed before anything is allocated.
    pub(crate) fn units_mut(&mut self) -> &mut [UnitSpec] {
        &mut self.units
    }

    /// The layers in order, each with the index of its unit.
    pub fn layers(
        &self,
    ) -> impl DoubleEndedIterator<Item = (usize, &dyn Layer<B>)> + ExactSizeIterator {
        self.layers
            .iter()
            .map(|(unit, layer)| (*unit, layer.as_ref()))
    }

    /// Number of parameters.
    pub fn num_params(&self) -> usize {
        self.units
            .iter()
            .flat_map(|u| &u.params)
            .map(|p| p.shape.len())
            .sum()
    }
}
