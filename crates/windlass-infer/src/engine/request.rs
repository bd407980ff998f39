//! What is asked of an engine, and what it answers.

use super::scheduler::RequestId;
use crate::sampler::TokenLogprobs;
use crate::{Overlay, SamplingParams};
use std::sync::Arc;

/// A prompt and what to do with it.
///
/// Begin with [`Request::new`] and change what differs.
pub struct Request {
    /// Its tokens, at least one.
    pub prompt: Vec<u32>,
    /// What is wanted.
    pub goal: RequestGoal,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Decides all draws: the same request and seed give the same tokens, whatever else the engine does.
    pub seed: u64,
    /// Texts that continue the prompt, which is computed once for all. Sample `i` is what a request with the seed
    /// `seed + i` would get.
    pub samples: usize,
    /// The most tokens to generate, an end token included; 0 computes the prompt alone.
    pub max_new_tokens: usize,
    /// Tokens before which no stop token is chosen.
    pub min_new_tokens: usize,
    /// Tokens that end the text. Such a token is reported by [`FinishReason::Stop`], not as a token of the text.
    pub stop_tokens: Vec<u32>,
    /// Reports the probability of each token, and as many of the likeliest ones.
    pub logprobs: Option<usize>,
    /// Reports those of the prompt's tokens too, which are all computed then.
    pub prompt_logprobs: Option<usize>,
    /// Which tokens are allowed where.
    pub constraint: Option<Box<dyn Constraint>>,
    /// The adapter that it is computed with; others in the same batch may have other ones.
    pub adapter: Option<Arc<Overlay>>,
}

impl Request {
    /// Up to 16 tokens from the model's own distribution, as the completions API has it.
    pub fn new(prompt: Vec<u32>) -> Self {
        Request {
            prompt,
            goal: RequestGoal::Generate,
            sampling: SamplingParams::default(),
            seed: 0,
            samples: 1,
            max_new_tokens: 16,
            min_new_tokens: 0,
            stop_tokens: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            adapter: None,
        }
    }
}

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestGoal {
    /// Tokens that continue the prompt (none with `max_new_tokens: 0`), and probabilities where asked for.
    Generate,
    /// One vector for the prompt, from the hidden states after the last norm; not normalized. Nothing is generated.
    Embed(Pooling),
}

/// How the hidden states of a prompt become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last one.
    Last,
}

/// Rules for the text of one sample, such as a grammar. An error ends its request with [`Event::Failed`].
///
/// It may run on any thread, at the same time as those of other samples.
pub trait Constraint: Send + Sync {
    /// The tokens that may come next: bit `id % 32` of word `id / 32`; ids beyond the last word are not allowed.
    /// Called once before each token.
    ///
    /// # Errors
    /// Why no token can be given.
    fn mask(&mut self) -> Result<&[u32], String>;

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// Why it cannot be.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// Whether the text is complete and cannot go on: the sample ends as by a stop token.
    fn is_finished(&self) -> bool;

    /// The same rules for another sample, as they are now.
    fn fork(&self) -> Box<dyn Constraint>;
}

/// Why a sample ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// By this stop token, or because its constraint is complete.
    Stop(Option<u32>),
    /// [`Request::max_new_tokens`] are generated, or the prompt alone was asked for.
    Length,
    /// There is no position for another token.
    Context,
}

/// What became of a request in a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A request has left the queue: the first of its tokens are computed in this step.
    Started {
        /// The request.
        id: RequestId,
    },
    /// A sample's next token.
    Token {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample: usize,
        /// The token.
        token: u32,
        /// Its probability by the model itself, before all settings.
        logprobs: Option<TokenLogprobs>,
    },
    /// The probabilities of the prompt's tokens from the second on, when all are known.
    Prompt {
        /// The request.
        id: RequestId,
        /// One for each token but the first.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The vector of a prompt.
    Embedding {
        /// The request.
        id: RequestId,
        /// `[hidden_size]`.
        values: Vec<f32>,
    },
    /// The last event of a sample.
    Finished {
        /// The request.
        id: RequestId,
        /// Which of its samples.
        sample: usize,
        /// Why.
        reason: FinishReason,
        /// Tokens chosen, a stop token included.
        new_tokens: usize,
        /// Tokens of the prompt that were found in the cache.
        cached_tokens: usize,
    },
    /// The last event of a request that cannot go on: all its samples end.
    Failed {
        /// The request.
        id: RequestId,
        /// Why.
        message: String,
    },
}
