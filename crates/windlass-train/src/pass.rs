//! What a layer leaves behind for its backward pass: what it recorded, or its input to be run again, in memory or on
//! the disk.

use crate::engine::Engine;
use crate::error::Result;
use windlass_model::Layer;
use windlass_store::{Shelved, Store};
use windlass_tensor::rng::splitmix64;
use windlass_tensor::{Recorded, Tape, Tensor, Var, Weights};

/// What one layer left behind.
pub(crate) enum Pass {
    /// All that its backward pass needs.
    Recorded(Recorded),
    /// Activation checkpointing: its input.
    Input(Tensor),
    /// The same, on the disk.
    Shelved(Shelved),
    /// Nothing: no gradient flows there.
    Frozen,
}

/// How a layer is run for training.
#[derive(Clone, Copy)]
pub(crate) struct How {
    /// Whether only its input is kept.
    pub(crate) checkpointing: bool,
    /// Whether its backward pass is the next one.
    pub(crate) next: bool,
    /// Whether neither it nor a layer before it trains anything.
    pub(crate) frozen: bool,
    /// Whether no layer before it trains anything.
    pub(crate) ends: bool,
    /// What is left to chance.
    pub(crate) noise: u64,
}

impl Pass {
    /// Runs a layer for training: its output, and what it leaves behind. With `checkpointing` that is its input, which
    /// goes to the disk where the store says so, unless its backward pass comes next.
    pub(crate) fn run<B>(
        store: &Store,
        (layer, weights): (&dyn Layer<B>, &Weights),
        input: Tensor,
        batch: &B,
        how: How,
    ) -> Result<(Tensor, Pass)> {
        let cpu = store.cpu();
        if !how.checkpointing && !how.frozen {
            let (y, recorded) = record(
                Tape::training(cpu),
                (layer, weights),
                (input, !how.ends),
                batch,
                how.noise,
            );
            return Ok((y.tensor, Pass::Recorded(recorded)));
        }
        let mut tape = Tape::rehearsal(cpu).with_noise(how.noise);
        let value = tape.input(input.clone());
        let y = layer.forward(weights, value, batch, &mut tape).tensor;
        if how.frozen {
            return Ok((y, Pass::Frozen));
        }
        let pass = match store.shelves(&input) && !how.next {
            true => Pass::Shelved(store.shelve(input)?),
            false => Pass::Input(input),
        };
        Ok((y, pass))
    }

    /// Whether no gradient flows there.
    pub(crate) fn is_frozen(&self) -> bool {
        matches!(self, Pass::Frozen)
    }

    /// Hint: the backward pass comes soon.
    pub(crate) fn recall(&mut self, store: &Store) -> Result<()> {
        match self {
            Pass::Shelved(shelved) => Ok(store.recall(shelved)?),
            Pass::Recorded(_) | Pass::Input(_) | Pass::Frozen => Ok(()),
        }
    }

    /// The way back through the layer; what was not recorded is recorded now.
    pub(crate) fn recorded<B>(
        self,
        store: &Store,
        layer: (&dyn Layer<B>, &Weights),
        batch: &B,
        noise: u64,
    ) -> Result<Recorded> {
        let input = match self {
            Pass::Recorded(recorded) => return Ok(recorded),
            Pass::Input(input) => input,
            Pass::Shelved(shelved) => store.unshelve(shelved)?,
            Pass::Frozen => unreachable!("no gradient reaches a layer that trains nothing"),
        };
        let tape = Tape::repeating(store.cpu());
        Ok(record(tape, layer, (input, true), batch, noise).1)
    }
}

fn record<B>(
    tape: Tape,
    (layer, weights): (&dyn Layer<B>, &Weights),
    (input, flows): (Tensor, bool),
    batch: &B,
    noise: u64,
) -> (Var, Recorded) {
    let mut tape = tape.with_noise(noise);
    // Without a place on the tape, no gradient is computed for it.
    let value = match flows {
        true => tape.input(input),
        false => tape.constant(input),
    };
    let y = layer.forward(weights, value, batch, &mut tape);
    let recorded = tape.finish(&y).0;
    (y, recorded)
}

impl<B> Engine<B> {
    /// The first layer that trains something: no gradient needs to flow further back.
    pub(crate) fn first_trained(&self, order: &[usize]) -> usize {
        let units = self.model().units();
        let trains = |&unit: &usize| units[unit].params.iter().any(|param| param.trained);
        order.iter().position(trains).unwrap_or(order.len())
    }

    /// What is left to chance in the next pass: the same when a run is repeated or resumed.
    pub(crate) fn noise(&self) -> u64 {
        let place =
            (self.global_steps() << 24) ^ ((self.skipped_steps() + self.micro_steps as u64) << 12);
        let mut seed = self.options().noise ^ place ^ (self.store().group().rank() as u64) << 56;
        splitmix64(&mut seed) << 16
    }
}
