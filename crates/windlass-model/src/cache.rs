//! Keys and values of the tokens that a sequence has already seen.

use windlass_tensor::{Category, Cpu, DType, Tensor};

/// Keys and values of one sequence, for every layer, contiguous: `[capacity, num_key_value_heads * head_dim]`.
pub struct KvCache {
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for `capacity` tokens.
    pub fn new(cpu: &Cpu, layers: usize, kv_dim: usize, capacity: usize, dtype: DType) -> Self {
        let buffer = || Tensor::empty(cpu, [capacity, kv_dim], dtype, Category::Activations);
        KvCache {
            layers: (0..layers).map(|_| (buffer(), buffer())).collect(),
            len: 0,
            capacity,
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes the new tokens' keys and values of one layer and returns those of all tokens so far.
    ///
    /// # Panics
    /// When the capacity is exceeded.
    #[track_caller]
    pub fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let (start, end) = (self.len, self.len + k.rows());
        assert!(
            end <= self.capacity,
            "{end} tokens against a cache of {}",
            self.capacity
        );
        let (keys, values) = &mut self.layers[layer];
        for (all, new) in [(&mut *keys, k), (&mut *values, v)] {
            let cols = all.cols();
            windlass_tensor::each_dtype!(new.dtype(), E => all.as_mut_slice::<E>()[start * cols..end * cols]
                .copy_from_slice(new.as_slice::<E>()));
        }
        (keys.slice_rows(0..end), values.slice_rows(0..end))
    }

    /// Counts the tokens that every layer has appended.
    pub fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}
