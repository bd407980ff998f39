//! Where a run's batches come from: stretches of a stream of tokens, or examples.

use crate::data::{Batch, Evaluation, Packing, Sampler, SamplerState, View};
use crate::error::{Error, Result};
use crate::tune::{ExampleSampler, Examples};
use std::sync::Arc;

/// Batches to train on and to measure on.
pub(super) enum Feed {
    /// Stretches of a stream, of one length.
    Stream {
        sampler: Sampler,
        held_out: Option<View>,
        seq_len: usize,
        packing: Packing,
    },
    /// Samples, as long as they are.
    Examples {
        sampler: ExampleSampler,
        held_out: Option<Arc<Examples>>,
    },
}

impl Feed {
    pub(super) fn next_batch(&mut self, micro_batch: usize) -> Batch {
        match self {
            Feed::Stream { sampler, .. } => sampler.next_batch(micro_batch),
            Feed::Examples { sampler, .. } => sampler.next_batch(micro_batch),
        }
    }

    /// The next batch, without moving on.
    pub(super) fn peek(&self, micro_batch: usize) -> Batch {
        match self {
            Feed::Stream { sampler, .. } => sampler.clone().next_batch(micro_batch),
            Feed::Examples { sampler, .. } => sampler.clone().next_batch(micro_batch),
        }
    }

    pub(super) fn state(&self) -> SamplerState {
        match self {
            Feed::Stream { sampler, .. } => sampler.state(),
            Feed::Examples { sampler, .. } => sampler.state(),
        }
    }

    pub(super) fn resume(&mut self, saved: &SamplerState) -> Result<()> {
        match self {
            Feed::Stream { sampler, .. } => sampler.resume(saved),
            Feed::Examples { sampler, .. } => sampler.resume(saved),
        }
    }

    pub(super) fn has_held_out(&self) -> bool {
        match self {
            Feed::Stream { held_out, .. } => held_out.is_some(),
            Feed::Examples { held_out, .. } => held_out.is_some(),
        }
    }

    /// What is held out, once.
    ///
    /// # Errors
    /// Nothing is.
    pub(super) fn evaluation(
        &self,
        micro_batch: usize,
    ) -> Result<Box<dyn Iterator<Item = Batch> + '_>> {
        let nothing = || Error::TooFewTokens {
            part: "held-out",
            tokens: 0,
            needed: 2,
        };
        Ok(match self {
            Feed::Stream {
                held_out,
                seq_len,
                packing,
                ..
            } => {
                let view = held_out.clone().ok_or_else(nothing)?;
                Box::new(Evaluation::new(view, *seq_len, *packing, micro_batch)?)
            }
            Feed::Examples { held_out, .. } => {
                Box::new(held_out.as_ref().ok_or_else(nothing)?.batches(micro_batch))
            }
        })
    }
}
