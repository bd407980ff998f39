//! One sequence on its way through a model: the tokens read so far and their keys and values.

use crate::{InferError, LoadedModel};
use std::sync::{Arc, Mutex};
use windlass_model::{KvCache, Tokens};
use windlass_tensor::Tensor;

/// A sequence that a model reads, token by token or in chunks; how it is cut changes no bit of what follows.
pub struct Session<'m> {
    model: &'m LoadedModel,
    cache: Arc<Mutex<KvCache>>,
    ids: Vec<u32>,
    capacity: usize,
    chunk: usize,
}

impl<'m> Session<'m> {
    /// An empty sequence of at most `capacity` tokens (or the model's context, if that is less), which reads `chunk`
    /// tokens at once.
    pub fn new(model: &'m LoadedModel, capacity: usize, chunk: usize) -> Self {
        let config = &model.config;
        let capacity = capacity.min(model.context());
        let kv_dim = config.num_key_value_heads * config.head_dim;
        let layers = config.num_hidden_layers();
        let cache = KvCache::new(model.store.cpu(), layers, kv_dim, capacity, model.dtype);
        Session {
            model,
            cache: Arc::new(Mutex::new(cache)),
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
        self.cache.lock().expect("cache").truncate(len);
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
        let batch = Tokens::cached(ids.to_vec(), &self.cache, rows, self.model.dtype);
        let logits = self.model.run(&batch, head);
        self.cache.lock().expect("cache").advance(ids.len());
        self.ids.extend_from_slice(ids);
        logits
    }
}
