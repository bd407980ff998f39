//! Batches on their way through the layers of a loaded model.

use crate::{InferError, LoadedModel};
use std::sync::{Arc, Mutex};
use windlass_model::{Goal, KvBlocks, Sequence, Tokens};
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::{Category, DType, Tape, Tensor};

impl LoadedModel {
    /// The logits after each token of a text.
    ///
    /// # Shapes
    /// `[ids.len(), vocab_size]`.
    ///
    /// # Errors
    /// An id without an embedding; more tokens than the model has positions for.
    pub fn logits(&self, ids: &[u32]) -> Result<Tensor, InferError> {
        self.check_ids(ids)?;
        if ids.len() > self.context() {
            return Err(InferError::TooLong {
                what: "the text".into(),
                tokens: ids.len(),
                context: self.context(),
            });
        }
        let rows = (0..ids.len() as u32).collect();
        let batch = self.whole(ids.to_vec(), &[ids.len()], Goal::Logits { rows });
        Ok(self.run(&batch, true))
    }

    /// Whole sequences of the given lengths, whose keys and values are rounded as in generation.
    pub(crate) fn whole(&self, ids: Vec<u32>, lengths: &[usize], goal: Goal) -> Tokens {
        let batch = Tokens::new(ids, lengths, goal, self.dtype);
        if self.kv_type == KvType::Plain(self.dtype) {
            return batch;
        }
        let needed = |tokens: &usize| tokens.div_ceil(KvBlocks::LEN);
        let count = lengths.iter().map(needed).sum();
        let table: Vec<u32> = (0..count as u32).collect();
        let mut rest = &table[..];
        let sequences = lengths.iter().map(|tokens| {
            let (blocks, behind) = rest.split_at(needed(tokens));
            rest = behind;
            Sequence {
                past: 0,
                tokens: *tokens,
                blocks,
            }
        });
        let blocks = KvBlocks::passing(self.store.cpu(), &self.config, self.kv_type, count);
        batch.cached(
            &sequences.collect::<Vec<_>>(),
            &Arc::new(Mutex::new(blocks)),
        )
    }

    /// Runs the layers on a batch without recording. `head` says whether the last layer runs too: without it only
    /// caches are filled.
    pub(crate) fn run(&self, batch: &Tokens, head: bool) -> Tensor {
        self.run_on(batch, head, |_| Tape::inference(self.store.cpu()))
    }

    /// As [`LoadedModel::run`], with a tape for each layer, made for its unit.
    pub(crate) fn run_on(
        &self,
        batch: &Tokens,
        head: bool,
        tape: impl Fn(usize) -> Tape,
    ) -> Tensor {
        let cpu = self.store.cpu();
        let mut x = Tensor::empty(cpu, [0], DType::F32, Category::Activations);
        let layers = self.model.layers();
        let count = layers.len() - usize::from(!head);
        for (unit, layer) in layers.take(count) {
            let weights = self
                .store
                .gather(unit)
                .expect("weights that lie in memory are gathered without fail");
            let mut tape = tape(unit);
            let input = tape.input(x);
            x = layer.forward(&weights, input, batch, &mut tape).tensor;
        }
        x
    }

    /// The last layer alone: what the batch's goal asks of the hidden states that [`LoadedModel::run`] gave without it.
    pub(crate) fn head(&self, hidden: &Tensor, batch: &Tokens) -> Tensor {
        let (unit, layer) = self
            .model
            .layers()
            .next_back()
            .expect("a decoder has a head");
        let weights = self
            .store
            .gather(unit)
            .expect("weights that lie in memory are gathered without fail");
        let mut tape = Tape::inference(self.store.cpu());
        let input = tape.input(hidden.clone());
        layer.forward(&weights, input, batch, &mut tape).tensor
    }

    /// Checks that every id has an embedding.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), InferError> {
        let vocabulary = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(&id) => Err(InferError::UnknownToken { id, vocabulary }),
            None => Ok(()),
        }
    }
}
