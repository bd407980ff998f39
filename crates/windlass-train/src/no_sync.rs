//! Backward passes that send nothing: gradients are added up on each rank and reduced together later.

use crate::engine::{Engine, Loss};
use crate::error::{Error, Result};
use std::ops::Deref;
use windlass_store::Stage;

/// An engine whose passes leave their gradients on each rank: [`Engine::no_sync`]. It steps when this is gone.
pub struct NoSync<'a, B> {
    engine: &'a mut Engine<B>,
}

impl<B> Engine<B> {
    /// Until the guard drops, gradients are added up on each rank and nothing is sent; the first pass after it, or the
    /// step, reduces the sums. That sends less where a step has several passes, takes the memory of all gradients on
    /// each rank, and rounds in another order. [`Placement::reduce_once`](windlass_store::Placement::reduce_once) does
    /// it in every step.
    ///
    /// # Errors
    /// [`Error::NoSync`] in stages 2 and 3, where each rank keeps only a part of the gradients.
    pub fn no_sync(&mut self) -> Result<NoSync<'_, B>> {
        match self.store().placement().stage {
            Stage::Replicated | Stage::Optimizer => Ok(NoSync { engine: self }),
            stage => Err(Error::NoSync {
                stage: stage.number(),
            }),
        }
    }
}

impl<B> NoSync<'_, B> {
    /// As [`Engine::forward`]. What becomes of the gradients is settled here, wherever the backward pass is made.
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn forward(&mut self, batch: B) -> Result<Loss<B>> {
        self.engine.pass(batch, true)
    }

    /// As [`Engine::backward`].
    ///
    /// # Errors
    /// As [`Engine::forward`].
    pub fn backward(&mut self, loss: Loss<B>) -> Result<()> {
        self.engine.backward(loss)
    }
}

impl<B> Deref for NoSync<'_, B> {
    type Target = Engine<B>;
    fn deref(&self) -> &Engine<B> {
        self.engine
    }
}

impl<B> Engine<B> {
    /// Reduces the gradients that were left on the ranks. Collective.
    pub(crate) fn reduce_rest(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.unreduced) {
            return Ok(());
        }
        let store = self.store_mut();
        store.defer_reduction(false);
        let units = store.units().len();
        for unit in 0..units {
            let grads = store.grads(unit);
            store.reduce(unit, grads)?;
        }
        Ok(())
    }
}
