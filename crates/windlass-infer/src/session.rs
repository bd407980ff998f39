//! One sequence on its way through a model: the tokens read so far and their keys and values.

use crate::{InferError, LoadedModel};
use std::sync::{Arc, Mutex};
use windlass_model::{KvBlocks, Sequence, Tokens};
use windlass_tensor::Tensor;

/// A sequence that a model reads, token by token or in chunks; how it is cut changes no bit of what follows.
pub struct Session<'m> {
    model: &'m LoadedModel,
    blocks: Arc<Mutex<KvBlocks>>,
    table: Vec<u32>,
    ids: Vec<u32>,
    capacity: usize,
    chunk: usize,
}

impl<'m> Session<'m> {
    /// An empty sequence of at most `capacity` tokens (or the model's context, if that is less), which reads `chunk`
    /// tokens at once.
    pub fn new(model: &'m LoadedModel, capacity: usize, chunk: usize) -> Self {
        let capacity = capacity.min(model.context());
        let count = capacity.div_ceil(KvBlocks::LEN);
        let blocks = KvBlocks::new(model.store.cpu(), &model.config, model.kv_type, count);
        Session {
            model,
            blocks: Arc::new(Mutex::new(blocks)),
            table: (0..count as u32).collect(),
            ids: Vec::new(),
            capacity,
            chunk: chunk.max(1),
        }
    }

    /// The model.
    pub fn model(&self) -> &'m LoadedModel {
        self.model
    }

    /// The most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The tokens read so far.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Tokens that can still be read.
    pub fn room(&self) -> usize {
        self.capacity - self.ids.len()
    }

    /// Forgets all tokens from the first `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
    }

    /// Reads tokens without asking what follows.
    ///
    /// # Errors
    /// As [`Session::next`].
    pub fn read(&mut self, ids: &[u32]) -> Result<(), InferError> {
        self.check(ids)?;
        for ids in ids.chunks(self.chunk) {
            self.run(ids, 0, false);
        }
        Ok(())
    }

    /// Reads tokens (at least one) and returns the logits after the last of them: only that one needs the head.
    ///
    /// # Errors
    /// An id without an embedding; more tokens than there is room for.
    ///
    /// # Panics
    /// Without a token.
    #[track_caller]
    pub fn next(&mut self, ids: &[u32]) -> Result<Vec<f32>, InferError> {
        assert!(!ids.is_empty(), "what follows no token is not known");
        self.check(ids)?;
        let last = (ids.len() - 1) / self.chunk * self.chunk;
        self.read(&ids[..last])?;
        let ids = &ids[last..];
        Ok(self.run(ids, ids.len() - 1, true).to_f32())
    }

    /// Reads tokens in one pass and returns the logits after each, `[ids.len(), vocab_size]`.
    ///
    /// # Errors
    /// As [`Session::next`].
    pub fn next_of_each(&mut self, ids: &[u32]) -> Result<Tensor, InferError> {
        self.check(ids)?;
        Ok(self.run(ids, 0, true))
    }

    fn check(&self, ids: &[u32]) -> Result<(), InferError> {
        if ids.len() > self.room() {
            return Err(InferError::TooLong {
                what: "the sequence".into(),
                tokens: self.ids.len() + ids.len(),
                context: self.capacity,
            });
        }
        self.model.check_ids(ids)
    }

    /// One pass; with the head, the logits after the tokens from `first` on.
    fn run(&mut self, ids: &[u32], first: usize, head: bool) -> Tensor {
        let rows = (first as u32..ids.len() as u32).collect();
        let sequence = Sequence {
            past: self.ids.len(),
            tokens: ids.len(),
            blocks: &self.table,
        };
        let dtype = self.model.dtype;
        let batch = Tokens::ragged(ids.to_vec(), &[sequence], &self.blocks, rows, dtype);
        let logits = self.model.run(&batch, head);
        self.ids.extend_from_slice(ids);
        logits
    }
}
