//! Models run without recording.

use crate::engine::{Engine, start};
use crate::error::Result;
use windlass_model::Model;
use windlass_store::Store;
use windlass_tensor::{Cpu, Tape, Tensor};

impl<B> Engine<B> {
    /// Runs the model without recording: what the last layer returns.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn evaluate(&self, batch: &B) -> Result<Tensor> {
        run(self.model(), self.store(), batch)
    }
}

/// Runs a model without recording: what the last layer returns.
///
/// # Errors
/// What hinders the store from gathering weights: a lost rank, a failing disk.
pub fn run<B>(model: &Model<B>, store: &Store, batch: &B) -> Result<Tensor> {
    run_on(model, store, batch, &Tape::inference)
}

/// As [`run`], on tapes that `tape` makes.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_on<B>(
    model: &Model<B>,
    store: &Store,
    batch: &B,
    tape: &dyn Fn(&Cpu) -> Tape,
) -> Result<Tensor> {
    let cpu = store.cpu();
    let mut x = start(cpu);
    let mut next = model.layers().skip(1).map(|(unit, _)| unit);
    for (unit, layer) in model.layers() {
        let weights = store.gather(unit)?;
        if let Some(next) = next.next() {
            store.prefetch(next);
        }
        let mut tape = tape(cpu);
        let value = tape.input(x);
        x = layer.forward(&weights, value, batch, &mut tape).tensor;
    }
    Ok(x)
}

/// Takes part in the gathering of a pass that other ranks make and this one has no batch for.
///
/// # Errors
/// As [`run`].
pub fn idle<B>(model: &Model<B>, store: &Store) -> Result<()> {
    for (unit, _) in model.layers() {
        store.gather(unit)?;
    }
    Ok(())
}
