//! The batch of a language model: packed token sequences.

use crate::{Cached, KvBlocks};
use std::sync::{Arc, Mutex};
use windlass_tensor::{DType, IGNORED, RouterStats, Segment, Sloped};

/// Several sequences, one after another, without padding.
#[derive(Clone)]
pub struct Tokens {
    /// `[T]`: token ids.
    pub ids: Vec<u32>,
    /// `[T]`: position of each token in its sequence.
    pub positions: Arc<[u32]>,
    /// Where the sequences lie, among the queries and among the keys.
    pub segments: Arc<[Segment]>,
    /// What the head computes.
    pub goal: Goal,
    /// Storage type of the activations.
    pub dtype: DType,
    /// Keys and values of earlier tokens, to be read and added to.
    pub cache: Option<Cached>,
    /// Where mixture-of-experts layers count, and the coefficient of the load-balancing loss in the loss.
    pub router: Option<(Arc<RouterStats>, f64)>,
}

/// A loss made of the losses of positions.
pub trait Objective: std::fmt::Debug + Send + Sync {
    /// Its value, and its derivative by the loss of each position, which is 0 where there is no target.
    fn evaluate(&self, losses: &[f64]) -> Sloped;
}

/// What the head computes from the last hidden states.
#[derive(Clone, Debug)]
pub enum Goal {
    /// The mean loss against `targets [T]` (already shifted; `IGNORED` has none), divided by `denominator`.
    Loss {
        /// The next token of each position.
        targets: Arc<[i64]>,
        /// The number that the sum is divided by: the targets of all micro-batches of a step.
        denominator: f64,
    },
    /// A loss that depends on the losses of all positions together.
    Objective {
        /// The next token of each position.
        targets: Arc<[i64]>,
        /// What they make together.
        objective: Arc<dyn Objective>,
    },
    /// The loss of each position, without a gradient.
    TokenLosses {
        /// The next token of each position.
        targets: Arc<[i64]>,
    },
    /// Logits of some rows, in `f32` (or `f64`).
    Logits {
        /// The rows.
        rows: Arc<[u32]>,
    },
    /// Hidden states of some rows after the last norm, `[rows, hidden_size]`.
    Hidden {
        /// The rows.
        rows: Arc<[u32]>,
    },
}

impl Tokens {
    /// Sequences of the given lengths, for training: the target of each position is the next id of its sequence, the
    /// last position of a sequence has none, and the loss is the mean over the targets.
    ///
    /// # Panics
    /// As [`Tokens::new`].
    #[track_caller]
    pub fn next_token(ids: Vec<u32>, lengths: &[usize], dtype: DType) -> Self {
        let mut targets: Vec<i64> = ids.iter().skip(1).map(|&id| id as i64).collect();
        targets.resize(ids.len(), IGNORED);
        let mut end = 0;
        for length in lengths {
            end += length;
            targets[end - 1] = IGNORED;
        }
        let denominator = targets.iter().filter(|&&t| t != IGNORED).count().max(1) as f64;
        let goal = Goal::Loss {
            targets: targets.into(),
            denominator,
        };
        Self::new(ids, lengths, goal, dtype)
    }

    /// Sequences of the given lengths; positions begin at 0 in each.
    ///
    /// # Panics
    /// When the lengths do not add up to `ids.len()`.
    #[track_caller]
    pub fn new(ids: Vec<u32>, lengths: &[usize], goal: Goal, dtype: DType) -> Self {
        assert_eq!(
            ids.len(),
            lengths.iter().sum::<usize>(),
            "tokens against the lengths of the sequences"
        );
        let positions = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        let mut start = 0;
        let segments = lengths.iter().map(|&n| {
            start += n;
            Segment {
                q_start: start - n,
                q_len: n,
                kv_start: start - n,
                kv_len: n,
            }
        });
        Tokens {
            ids,
            positions,
            segments: segments.collect(),
            goal,
            dtype,
            cache: None,
            router: None,
        }
    }

    /// The next tokens of several cached sequences, one sequence after another.
    ///
    /// # Panics
    /// When the tokens of the sequences do not add up to `ids.len()`, or a sequence has no block for a token.
    #[track_caller]
    pub fn ragged(
        ids: Vec<u32>,
        sequences: &[Sequence<'_>],
        blocks: &Arc<Mutex<KvBlocks>>,
        rows: Arc<[u32]>,
        dtype: DType,
    ) -> Self {
        let lengths: Vec<usize> = sequences.iter().map(|s| s.tokens).collect();
        Self::new(ids, &lengths, Goal::Logits { rows }, dtype).cached(sequences, blocks)
    }

    /// With the keys and values of its sequences in blocks.
    ///
    /// # Panics
    /// When a sequence has no block for a token.
    #[track_caller]
    pub fn cached(mut self, sequences: &[Sequence<'_>], blocks: &Arc<Mutex<KvBlocks>>) -> Self {
        let (mut slots, mut table) = (Vec::with_capacity(self.ids.len()), Vec::new());
        let mut segments = self.segments.to_vec();
        for (segment, sequence) in segments.iter_mut().zip(sequences) {
            let end = sequence.past + sequence.tokens;
            let needed = end.div_ceil(KvBlocks::LEN);
            assert!(
                needed <= sequence.blocks.len(),
                "{end} tokens need {needed} blocks and have {}",
                sequence.blocks.len()
            );
            segment.kv_start = table.len() * KvBlocks::LEN;
            segment.kv_len = end;
            let slot = |at: usize| {
                let block = sequence.blocks[at / KvBlocks::LEN] as usize;
                (block * KvBlocks::LEN + at % KvBlocks::LEN) as u32
            };
            slots.extend((sequence.past..end).map(slot));
            table.extend_from_slice(&sequence.blocks[..needed]);
        }
        let positions = sequences.iter().flat_map(|s| s.past..s.past + s.tokens);
        self.positions = positions.map(|p| p as u32).collect();
        self.segments = segments.into();
        self.cache = Some(Cached {
            blocks: blocks.clone(),
            slots: slots.into(),
            table: table.into(),
        });
        self
    }
}

/// The next tokens of a cached sequence, as part of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Tokens that the blocks hold already.
    pub past: usize,
    /// Tokens that follow.
    pub tokens: usize,
    /// Its blocks, with room for all of them; one that another sequence reads too must be full.
    pub blocks: &'a [u32],
}
