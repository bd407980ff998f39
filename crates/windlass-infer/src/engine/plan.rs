//! What goes into a [`Scheduler`](super::scheduler::Scheduler) and comes out of it.

use std::ops::Range;

/// The number of a request, in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// One of the texts of a request. The order is that of age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request.
    pub request: RequestId,
    /// Which of its samples, from 0.
    pub sample: usize,
}

/// The limits of a [`Scheduler`](super::scheduler::Scheduler).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one pass, 1 or more.
    pub token_budget: usize,
    /// Sequences that are computed side by side, 1 or more.
    pub max_sequences: usize,
    /// Requests that may wait, 1 or more.
    pub max_waiting: usize,
    /// Blocks of keys and values, 1 or more.
    pub blocks: usize,
    /// Tokens of a block.
    pub block_len: usize,
    /// Whether texts that begin alike share blocks, also one after another.
    pub prefix_cache: bool,
}

/// A sequence that wants to be computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Its tokens so far, one or more.
    pub tokens: Vec<u32>,
    /// The most tokens that it may come to have computed.
    pub most_tokens: usize,
    /// Sequences that continue after `tokens`, each in its own way.
    pub samples: usize,
    /// Whether the result of every token is wanted, not of the last one alone: none is taken from the cache then.
    pub every_row: bool,
    /// Sequences of different roots share nothing.
    pub root: u64,
}

/// What one sequence computes in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub id: SequenceId,
    /// Tokens whose keys and values exist.
    pub start: usize,
    /// Tokens to compute, after those.
    pub tokens: usize,
    /// How many sequences continue after the last of these tokens: 0 where more tokens are known, else 1, or as many as
    /// the request has samples.
    pub samples: usize,
    pub(super) table: Range<usize>,
}

/// A pass: first the copies, in order, then the work.
#[derive(Debug, Default)]
pub struct Plan {
    /// Blocks to be copied whole, from the first to the second.
    pub copies: Vec<(u32, u32)>,
    /// What is computed.
    pub work: Vec<Work>,
    /// Sequences that were let in, with the number of tokens that they found in the cache.
    pub admitted: Vec<(SequenceId, usize)>,
    /// Sequences that lost their blocks.
    pub preempted: Vec<SequenceId>,
    pub(super) tables: Vec<u32>,
}

impl Plan {
    /// The blocks of a sequence, up to the last token that it computes.
    pub fn blocks(&self, work: &Work) -> &[u32] {
        &self.tables[work.table.clone()]
    }

    /// Tokens computed in this pass.
    pub fn tokens(&self) -> usize {
        self.work.iter().map(|w| w.tokens).sum()
    }

    pub(super) fn clear(&mut self) {
        self.copies.clear();
        self.work.clear();
        self.admitted.clear();
        self.preempted.clear();
        self.tables.clear();
    }
}

/// How a sequence goes on after its last token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// With this token.
    Token(u32),
    /// Not at all.
    Finished,
}

/// Counts of a scheduler, since it began or as of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences being computed.
    pub running: usize,
    /// Sequences that wait to be let in.
    pub waiting: usize,
    /// Blocks that a sequence owns.
    pub blocks_used: usize,
    /// Blocks without an owner whose content can be found again.
    pub blocks_cached: usize,
    /// All blocks.
    pub blocks: usize,
    /// Tokens looked for in the cache by new requests.
    pub prefix_queries: u64,
    /// Those found.
    pub prefix_hits: u64,
    /// How often a sequence lost its blocks.
    pub preemptions: u64,
    /// Tokens computed.
    pub computed_tokens: u64,
}
