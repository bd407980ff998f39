//! Sequences cut from a stream of tokens, shuffled anew in every epoch, handed out in batches.
//!
//! Sequence `s` of length `L` has the tokens `sL .. sL + L` of the stream as inputs and those one further as targets.
//! In training, a rest shorter than a sequence is left out. The order of an epoch is a permutation that is computed,
//! not stored, so that the state of a sampler is a few numbers and any place can be reached at once.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use windlass_tensor::rng::splitmix64;

use super::split::View;
use crate::error::{Error, Result};

/// The target of a position that has no loss.
pub const IGNORED: i64 = -100;

/// How documents share a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// Each document sees itself alone: attention and positions begin anew, and the last token of a document does not
    /// predict the first one of the next.
    #[default]
    Documents,
    /// A sequence is one stretch of text, whatever begins or ends in it.
    Stream,
}

/// Packed sequences for one pass through a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Input ids of all sequences, one after the other. `[T]`
    pub ids: Vec<u32>,
    /// The id to be predicted at each position, or -100. `[T]`
    pub targets: Vec<i64>,
    /// The position of each input in its segment. `[T]`
    pub positions: Vec<u32>,
    /// Lengths of the stretches that attend to themselves alone; they add up to `T`.
    pub segments: Vec<usize>,
    /// The number of sequences.
    pub sequences: usize,
    /// Whether the text of each segment is a good one, where texts are rated or compared.
    pub labels: Vec<bool>,
}

impl Batch {
    /// The number of positions that have a loss.
    pub fn scored(&self) -> usize {
        self.targets
            .iter()
            .filter(|&&target| target != IGNORED)
            .count()
    }

    /// Adds the sequence whose inputs and last target are `range` of the stream.
    fn push(&mut self, view: &View, range: Range<u64>, packing: Packing) {
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        view.read(range, &mut tokens, &mut starts);
        let length = tokens.len() - 1;
        self.ids.extend_from_slice(&tokens[..length]);
        let first = self.targets.len();
        self.targets
            .extend(tokens[1..].iter().map(|&id| i64::from(id)));
        let mut begin = 0;
        if packing == Packing::Documents {
            for start in starts.into_iter().filter(|&start| start > 0) {
                self.targets[first + start - 1] = IGNORED;
                self.add_segment(begin..start);
                begin = start;
            }
        }
        if begin < length {
            self.add_segment(begin..length);
        }
        self.sequences += 1;
    }

    fn add_segment(&mut self, range: Range<usize>) {
        self.positions.extend(0..range.len() as u32);
        self.segments.push(range.len());
    }
}

/// A bijection of `0..n` chosen by a key: a Feistel network on the next larger power of four, walked until it
/// returns into the range.
#[derive(Clone, Debug)]
pub(crate) struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; 6],
}

impl Permutation {
    pub(crate) fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let mut mix = seed;
        mix = splitmix64(&mut mix) ^ epoch;
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self {
            n,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| splitmix64(&mut mix)),
        }
    }

    pub(crate) fn at(&self, index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                let mut round = key ^ right;
                (left, right) = (right, left ^ (splitmix64(&mut round) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.n {
                return value;
            }
        }
    }
}

/// Where a [`Sampler`] stands: saved with a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerState {
    /// The seed of the order.
    pub seed: u64,
    /// Epochs finished.
    pub epoch: u64,
    /// Sequences handed out in this epoch, by all ranks together.
    pub position: u64,
    /// Sequences in an epoch.
    pub sequences: u64,
    /// Inputs in a sequence.
    pub seq_len: u64,
}

impl SamplerState {
    /// Whether a run at `self` can go to a saved place.
    pub(crate) fn check(&self, saved: &SamplerState) -> Result<()> {
        for (what, saved, now) in [
            ("the seed of the data order", saved.seed, self.seed),
            ("the sequence length", saved.seq_len, self.seq_len),
            (
                "the number of training sequences",
                saved.sequences,
                self.sequences,
            ),
        ] {
            if saved != now {
                return Err(Error::Changed {
                    what,
                    saved: saved.to_string(),
                    now: now.to_string(),
                });
            }
        }
        Ok(())
    }
}

/// Training batches without end: every sequence once an epoch, in an order that depends on seed and epoch alone.
///
/// The sequences of a step are the same however they are divided into batches and among ranks.
#[derive(Clone, Debug)]
pub struct Sampler {
    view: View,
    packing: Packing,
    state: SamplerState,
    rank: u64,
    world_size: u64,
    order: Permutation,
}

impl Sampler {
    /// A sampler at the beginning of the first epoch.
    ///
    /// # Errors
    /// [`Error::TooFewTokens`] when the data do not fill one sequence; [`Error::Setting`] for sequences of length 0.
    pub fn new(view: View, seq_len: usize, packing: Packing, seed: u64) -> Result<Self> {
        let seq_len = length(seq_len)?;
        let tokens = view.tokens();
        let sequences = tokens.saturating_sub(1) / seq_len;
        if sequences == 0 {
            return Err(Error::TooFewTokens {
                part: "training",
                tokens,
                needed: seq_len + 1,
            });
        }
        Ok(Self {
            view,
            packing,
            state: SamplerState {
                seed,
                epoch: 0,
                position: 0,
                sequences,
                seq_len,
            },
            rank: 0,
            world_size: 1,
            order: Permutation::new(sequences, seed, 0),
        })
    }

    /// Hands out the batches of one rank of several; the default is rank 0 of 1.
    ///
    /// # Panics
    /// When `rank` is not below `world_size`.
    #[must_use]
    #[track_caller]
    pub fn shard(mut self, rank: usize, world_size: usize) -> Self {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        (self.rank, self.world_size) = (rank as u64, world_size as u64);
        self
    }

    /// The next `micro_batch` sequences of this rank. An epoch that ends in a batch is continued by the next one.
    pub fn next_batch(&mut self, micro_batch: usize) -> Batch {
        let mut batch = Batch::default();
        let count = micro_batch as u64;
        let mine = self.rank * count..(self.rank + 1) * count;
        for number in 0..count * self.world_size {
            if mine.contains(&number) {
                let first = self.order.at(self.state.position) * self.state.seq_len;
                let range = first..first + self.state.seq_len + 1;
                batch.push(&self.view, range, self.packing);
            }
            self.state.position += 1;
            if self.state.position == self.state.sequences {
                self.enter(self.state.epoch + 1, 0);
            }
        }
        batch
    }

    fn enter(&mut self, epoch: u64, position: u64) {
        let SamplerState {
            seed, sequences, ..
        } = self.state;
        (self.state.epoch, self.state.position) = (epoch, position);
        self.order = Permutation::new(sequences, seed, epoch);
    }

    /// Where the sampler stands.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Goes to a saved place; what follows is what would have followed there.
    ///
    /// # Errors
    /// [`Error::Changed`] when the data, the sequence length or the seed are not those of the saved state.
    pub fn resume(&mut self, saved: &SamplerState) -> Result<()> {
        self.state.check(saved)?;
        let position = saved.position % saved.sequences;
        self.enter(saved.epoch, position);
        Ok(())
    }

    /// The number of sequences in an epoch.
    pub fn sequences(&self) -> u64 {
        self.state.sequences
    }
}

/// Batches that hold every token once, in order: for measuring.
#[derive(Clone, Debug)]
pub struct Evaluation {
    view: View,
    packing: Packing,
    seq_len: u64,
    micro_batch: usize,
    at: u64,
}

impl Evaluation {
    /// One pass over `view`, `micro_batch` sequences at a time; the last sequence may be shorter.
    ///
    /// # Errors
    /// [`Error::TooFewTokens`] below two tokens; [`Error::Setting`] for sequences of length 0.
    pub fn new(view: View, seq_len: usize, packing: Packing, micro_batch: usize) -> Result<Self> {
        let seq_len = length(seq_len)?;
        let tokens = view.tokens();
        if tokens < 2 {
            return Err(Error::TooFewTokens {
                part: "held-out",
                tokens,
                needed: 2,
            });
        }
        Ok(Self {
            view,
            packing,
            seq_len,
            micro_batch: micro_batch.max(1),
            at: 0,
        })
    }

    /// The number of sequences in a pass.
    pub fn sequences(&self) -> u64 {
        (self.view.tokens() - 1).div_ceil(self.seq_len)
    }
}

impl Iterator for Evaluation {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let last = self.view.tokens() - 1;
        let mut batch = Batch::default();
        while self.at < last && batch.sequences < self.micro_batch {
            let end = last.min(self.at + self.seq_len);
            batch.push(&self.view, self.at..end + 1, self.packing);
            self.at = end;
        }
        (batch.sequences > 0).then_some(batch)
    }
}

fn length(seq_len: usize) -> Result<u64> {
    if seq_len == 0 {
        return Err(Error::Setting {
            setting: "the sequence length",
            value: "0".into(),
            range: "at least 1",
        });
    }
    Ok(seq_len as u64)
}
