//! What a layer leaves behind for its backward pass: what it recorded, or its input to be run again, in memory or on
//! the disk.

use crate::error::Result;
use windlass_model::Layer;
use windlass_store::{Shelved, Store};
use windlass_tensor::{Recorded, Tape, Tensor, Var, Weights};

/// What one layer left behind.
pub(crate) enum Pass {
    /// All that its backward pass needs.
    Recorded(Recorded),
    /// Activation checkpointing: its input.
    Input(Tensor),
    /// The same, on the disk.
    Shelved(Shelved),
}

impl Pass {
    /// Runs a layer for training: its output, and what it leaves behind. With `checkpointing` that is its input, which
    /// goes to the disk where the store says so, unless its backward pass comes `next`.
    pub(crate) fn run<B>(
        store: &Store,
        (layer, weights): (&dyn Layer<B>, &Weights),
        input: Tensor,
        batch: &B,
        (checkpointing, next): (bool, bool),
    ) -> Result<(Tensor, Pass)> {
        let cpu = store.cpu();
        if !checkpointing {
            let (y, recorded) = record(store, (layer, weights), input, batch);
            return Ok((y.tensor, Pass::Recorded(recorded)));
        }
        let mut tape = Tape::inference(cpu);
        let value = tape.input(input.clone());
        let y = layer.forward(weights, value, batch, &mut tape).tensor;
        let pass = match store.shelves(&input) && !next {
            true => Pass::Shelved(store.shelve(input)?),
            false => Pass::Input(input),
        };
        Ok((y, pass))
    }

    /// Hint: the backward pass comes soon.
    pub(crate) fn recall(&mut self, store: &Store) -> Result<()> {
        match self {
            Pass::Shelved(shelved) => Ok(store.recall(shelved)?),
            Pass::Recorded(_) | Pass::Input(_) => Ok(()),
        }
    }

    /// The way back through the layer; what was not recorded is recorded now.
    pub(crate) fn recorded<B>(
        self,
        store: &Store,
        layer: (&dyn Layer<B>, &Weights),
        batch: &B,
    ) -> Result<Recorded> {
        let input = match self {
            Pass::Recorded(recorded) => return Ok(recorded),
            Pass::Input(input) => input,
            Pass::Shelved(shelved) => store.unshelve(shelved)?,
        };
        Ok(record(store, layer, input, batch).1)
    }
}

fn record<B>(
    store: &Store,
    (layer, weights): (&dyn Layer<B>, &Weights),
    input: Tensor,
    batch: &B,
) -> (Var, Recorded) {
    let mut tape = Tape::training(store.cpu());
    let value = tape.input(input);
    let y = layer.forward(weights, value, batch, &mut tape);
    let recorded = tape.finish(&y).0;
    (y, recorded)
}
