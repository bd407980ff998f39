//! The decode loop: a prompt in, tokens and text out, through a key-value cache.
//!
//! The prompt is read in chunks; how it is cut changes nothing in the result. The loop knows no time: the callback
//! comes once for each token, the first call when the prompt has been read, so the caller can measure both phases.

use crate::sampler::{Context, Sampler, SamplingParams, token_logprobs};
use crate::speculate::{Guess, Guesses, Speculator};
use crate::stop::{StopReason, StopRules, Stopper};
use crate::{InferError, LoadedModel, Session};
use windlass_model::Tokenizer;
use windlass_tensor::Rng;

/// Ids of the prompt's end that the text of the first tokens is decoded after, for spaces and split characters.
const TEXT_CONTEXT: usize = 32;

/// How to continue a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How a token is chosen.
    pub sampling: SamplingParams,
    /// The most tokens to generate, an end token included.
    pub max_tokens: usize,
    /// Strings that end the text; they are not part of it.
    pub stop_strings: Vec<String>,
    /// Decides all draws: the same prompt, options and seed give the same tokens.
    pub seed: u64,
    /// Tokens of the prompt that are computed at once.
    pub prefill_chunk: usize,
    /// Whether the end tokens of the tokenizer end the text.
    pub stop_at_end: bool,
    /// Whether to report the log-probability of each token.
    pub logprobs: bool,
    /// The most tokens to guess at once, where that is asked for.
    pub draft_tokens: usize,
}

impl Default for GenerateOptions {
    /// At most 200 tokens from the model's own distribution, seed 0.
    fn default() -> Self {
        GenerateOptions {
            sampling: SamplingParams::default(),
            max_tokens: 200,
            stop_strings: Vec::new(),
            seed: 0,
            prefill_chunk: 512,
            stop_at_end: true,
            logprobs: false,
            draft_tokens: 7,
        }
    }
}

impl GenerateOptions {
    /// Checks all options, which needs no model.
    ///
    /// # Errors
    /// [`InferError::Setting`] names the first option at fault.
    pub fn validate(&self) -> Result<(), InferError> {
        self.sampling.validate()?;
        self.stopper(Vec::new()).map(|_| ())
    }

    fn stopper(&self, eos_ids: Vec<u32>) -> Result<Stopper, InferError> {
        Stopper::new(StopRules {
            eos_ids,
            max_tokens: self.max_tokens,
            stop_strings: self.stop_strings.clone(),
        })
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens, a final end token included.
    pub ids: Vec<u32>,
    /// Their text, without end token and stop string.
    pub text: String,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that the session had read before.
    pub kept_tokens: usize,
    /// How many tokens were guessed, and how many of them rightly, where that was asked for.
    pub guesses: Option<Guesses>,
    /// Natural logarithm of the probability that the model itself (before temperature and penalties) gave to each
    /// token, when asked for.
    pub logprobs: Option<Vec<f64>>,
}

/// Continues prompts with one model and one set of options.
pub struct Generator<'m> {
    model: &'m LoadedModel,
    tokenizer: &'m Tokenizer,
    options: GenerateOptions,
    sampler: Sampler,
    guess: Guess<'m>,
}

impl<'m> Generator<'m> {
    /// A generator; all options are checked.
    ///
    /// # Errors
    /// [`InferError::Setting`] names the option at fault; a model without a tokenizer.
    pub fn new(model: &'m LoadedModel, options: GenerateOptions) -> Result<Self, InferError> {
        options.validate()?;
        Ok(Generator {
            model,
            tokenizer: model.tokenizer()?,
            sampler: Sampler::new(options.sampling.clone())?,
            options,
            guess: Guess::Off,
        })
    }

    /// Looks up what followed the last tokens before, and reads it in one pass with the next one: the same text, in fewer
    /// passes where it repeats itself.
    pub fn guess_by_lookup(&mut self) {
        self.guess = Guess::Lookup;
    }

    /// Lets a smaller model guess the next tokens: the same text, in fewer passes where the two agree.
    ///
    /// # Errors
    /// A model with another vocabulary.
    pub fn guess_by_model(&mut self, draft: &'m LoadedModel) -> Result<(), InferError> {
        let (own, other) = (self.model.config.vocab_size, draft.config.vocab_size);
        let same = own == other
            && draft
                .tokenizer
                .as_ref()
                .is_none_or(|t| t.vocab_size() == self.tokenizer.vocab_size());
        if !same {
            return Err(InferError::Setting {
                flag: "draft-model",
                value: draft.folder.display().to_string(),
                rule: "a model with the same vocabulary",
                hint: "take a smaller model of the same family",
            });
        }
        let capacity = self.model.context().min(draft.context());
        self.guess = Guess::Model(Session::new(draft, capacity, self.options.prefill_chunk));
        Ok(())
    }

    fn stopper(&self) -> Result<Stopper, InferError> {
        let end = match self.options.stop_at_end {
            true => self.tokenizer.eos(),
            false => &[],
        };
        self.options.stopper(end.to_vec())
    }

    /// Continues a text; see [`Generator::generate`].
    ///
    /// # Errors
    /// Those of [`LoadedModel::encode`] and [`Generator::generate`].
    pub fn generate_text(
        &mut self,
        prompt: &str,
        show: &mut dyn FnMut(&str),
    ) -> Result<Generation, InferError> {
        let ids = self.model.encode(prompt)?;
        self.generate(&ids, show)
    }

    /// Continues a prompt. `show` is called once for each token with the text that is certain by then (maybe none):
    /// the pieces together are [`Generation::text`].
    ///
    /// # Errors
    /// [`InferError::TooLong`] when the prompt does not fit the context, [`InferError::Empty`] without a token,
    /// [`InferError::UnknownToken`], and what the sampler refuses.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        show: &mut dyn FnMut(&str),
    ) -> Result<Generation, InferError> {
        // The last token that is generated is not read again.
        let capacity = prompt.len().saturating_add(self.options.max_tokens - 1);
        let mut session = Session::new(self.model, capacity, self.options.prefill_chunk);
        self.continue_in(&mut session, prompt, &mut |piece| {
            show(piece);
            true
        })
    }

    /// As [`Generator::generate`], in a session that may have read the beginning of the prompt before: what it has read
    /// is not computed again, and the tokens are the same. `show` says whether to go on: `false` ends the text with
    /// [`StopReason::Interrupted`].
    ///
    /// # Errors
    /// Those of [`Generator::generate`]; the context is the session's.
    pub fn continue_in(
        &mut self,
        session: &mut Session<'m>,
        prompt: &[u32],
        show: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Generation, InferError> {
        self.check(prompt)?;
        let same = session.ids().iter().zip(prompt);
        let same = same.take_while(|(read, wanted)| read == wanted).count();
        let kept = same.min(prompt.len() - 1);
        session.truncate(kept);
        let mut stopper = self.stopper()?;
        let mut decoder = self.tokenizer.stream(true);
        for &id in &prompt[prompt.len().saturating_sub(TEXT_CONTEXT)..] {
            decoder.push(id)?;
        }
        let mut rng = Rng::new(self.options.seed);
        let mut ids = prompt.to_vec();
        let mut logprobs = self.options.logprobs.then(Vec::new);
        let mut text = String::new();
        let mut logits = session.next(&prompt[kept..])?;
        let mut ahead = Speculator::new(&mut self.guess, self.model, self.options.draft_tokens);
        let stop = loop {
            let token = {
                let context = Context::split(&ids, prompt.len());
                self.sampler.sample(&logits, context, &mut rng)?
            };
            ids.push(token);
            if let Some(logprobs) = &mut logprobs {
                logprobs.push(token_logprobs(&logits, token, 0).logprob);
            }
            let step = stopper.push(token, &decoder.push(token)?);
            let stop = step
                .stop
                .or((session.capacity() < ids.len()).then_some(StopReason::Context));
            let mut piece = step.text;
            if let Some(reason) = stop {
                if step.stop.is_none() {
                    piece += &stopper.finish();
                }
                if !matches!(reason, StopReason::StopString(_)) {
                    piece += &decoder.finish()?;
                }
            }
            let go_on = show(&piece);
            text += &piece;
            match stop {
                Some(reason) => break reason,
                None if go_on => {}
                None => break StopReason::Interrupted,
            }
            let left = self.options.max_tokens - (ids.len() - prompt.len()) - 1;
            logits = ahead.next(session, &ids, left)?;
        };
        let guesses = ahead.counts();
        Ok(Generation {
            ids: ids.split_off(prompt.len()),
            text,
            stop,
            prompt_tokens: prompt.len(),
            kept_tokens: kept,
            guesses,
            logprobs,
        })
    }

    fn check(&self, prompt: &[u32]) -> Result<(), InferError> {
        if prompt.is_empty() {
            return Err(InferError::Empty {
                what: "the prompt",
                hint: "give at least one token to continue",
            });
        }
        if prompt.len() > self.model.context() {
            return Err(InferError::TooLong {
                what: "the prompt".into(),
                tokens: prompt.len(),
                context: self.model.context(),
            });
        }
        self.model.check_ids(prompt)
    }
}
