//! What a request wants of the engine, and the answers as they come.

use crate::app::{App, Model};
use crate::choice::{Choice, Delta};
use crate::engine::Updates;
use crate::grammar::Grammar;
use crate::refusal::Refusal;
use crate::sampling::Settings;
use crate::thoughts::{Thinking, ThoughtParser};
use crate::tools::Dialect;
use crate::tools::parse::CallParser;
use serde_json::{Value, json};
use tokio::time::Instant;
use windlass_infer::engine::{Event, Request};
use windlass_infer::sampler::TokenLogprobs;

/// What to generate.
pub(crate) struct Job {
    /// Each is continued `choices` times.
    pub prompts: Vec<Vec<u32>>,
    pub choices: usize,
    pub settings: Settings,
    /// The most tokens of an answer; 0 asks for the prompt's log-probabilities alone.
    pub max_tokens: Option<usize>,
    /// How many of the likeliest tokens to report in each place of the answer.
    pub logprobs: Option<usize>,
    /// The same in each place of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// What answers must look like.
    pub grammar: Option<Grammar>,
    /// Where answers begin, if what they think is kept apart.
    pub thinking: Option<Thinking>,
    /// How answers call tools, where they may.
    pub dialect: Option<Dialect>,
}

impl Job {
    /// The requests, prompt by prompt.
    fn requests(&self, app: &App, model: &Model) -> Result<Vec<Request>, Refusal> {
        let seed = self.settings.seed.unwrap_or_else(|| app.draw());
        let mut requests = Vec::new();
        for prompt in &self.prompts {
            let room = model.context.saturating_sub(prompt.len());
            let scoring = self.max_tokens == Some(0);
            if prompt.is_empty() {
                return Err(Refusal::invalid("the prompt is empty"));
            }
            if room == 0 && !scoring || prompt.len() > model.context {
                return Err(Refusal::too_long(prompt.len(), model.context));
            }
            requests.push(Request {
                sampling: self.settings.sampling.clone(),
                seed,
                samples: self.choices,
                max_new_tokens: self.max_tokens.unwrap_or(room).min(room),
                min_new_tokens: self.settings.min_tokens,
                stop_tokens: self.end_tokens(model),
                logprobs: self.logprobs,
                prompt_logprobs: self.prompt_logprobs,
                constraint: self.grammar.as_ref().map(Grammar::constraint),
                adapter: model.adapter.clone(),
                ..Request::new(prompt.clone())
            });
        }
        Ok(requests)
    }

    /// Hands the requests to the engine.
    pub async fn submit(&self, app: &App, model: &Model) -> Result<Updates, Refusal> {
        let requests = self.requests(app, model)?;
        if app.options.log_prompts {
            for prompt in &self.prompts {
                let text = model.tokenizer.decode(prompt, false).unwrap_or_default();
                tracing::info!(text, "prompt");
            }
        }
        app.metrics.arrived(self.prompts.len() * self.choices);
        model.engine.submit(requests).await
    }

    fn end_tokens(&self, model: &Model) -> Vec<u32> {
        let own = match self.settings.ignore_eos {
            true => &[],
            false => model.tokenizer.eos(),
        };
        [own, &self.settings.stop_tokens].concat()
    }
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub prompt: usize,
    pub cached: usize,
    pub completion: usize,
    /// Tokens of thoughts among those.
    pub reasoning: usize,
}

impl Usage {
    /// OpenAI's `usage`.
    pub fn value(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": { "cached_tokens": self.cached, "audio_tokens": 0 },
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        })
    }
}

/// Answers under way. When it is dropped, the engine stops computing them.
pub(crate) struct Answers<'a> {
    updates: Updates,
    choices: Vec<Choice<'a>>,
    /// For each choice that is its prompt's first, the log-probabilities of the prompt's tokens from the second on, where
    /// they are asked for.
    pub prompts: Vec<Option<Vec<TokenLogprobs>>>,
    usage: Usage,
    /// Samples of each prompt, and whether what was cached of it is counted.
    samples: usize,
    cached: Vec<bool>,
    deadline: Instant,
    log_text: bool,
}

impl<'a> Answers<'a> {
    /// The answers of a job that the engine works on.
    pub fn new(app: &App, model: &'a Model, job: &Job, updates: Updates) -> Result<Self, Refusal> {
        let mut choices = Vec::new();
        for prompt in &job.prompts {
            for _ in 0..job.choices {
                let calls = job.dialect.map(CallParser::new);
                let thoughts = job.thinking.map(ThoughtParser::new);
                let choice = Choice::new(model, prompt, &job.settings.stop, thoughts, calls)?;
                choices.push(choice);
            }
        }
        Ok(Answers {
            updates,
            prompts: vec![None; choices.len()],
            choices,
            samples: job.choices,
            cached: vec![false; job.prompts.len()],
            usage: Usage {
                prompt: job.prompts.iter().map(Vec::len).sum(),
                ..Usage::default()
            },
            deadline: Instant::now() + app.options.request_timeout,
            log_text: app.options.log_prompts,
        })
    }

    /// What comes next, and for which choice; `None` when all answers are complete.
    pub async fn next(&mut self) -> Result<Option<(usize, Delta)>, Refusal> {
        loop {
            if self.choices.iter().all(Choice::is_done) {
                return Ok(None);
            }
            let (index, event) = self.updates.next(self.deadline).await?;
            let choice = &mut self.choices[index];
            if choice.is_done() {
                continue;
            }
            let delta = match event {
                Event::Token {
                    token, logprobs, ..
                } => {
                    self.usage.completion += 1;
                    choice.token(token, logprobs)?
                }
                Event::Finished {
                    reason,
                    cached_tokens,
                    new_tokens,
                    ..
                } => {
                    // A token that ends the text is counted, but no event of its own.
                    self.usage.completion += new_tokens.saturating_sub(choice.tokens);
                    if !std::mem::replace(&mut self.cached[index / self.samples], true) {
                        self.usage.cached += cached_tokens;
                    }
                    choice.finish(reason)?
                }
                Event::Failed { message, .. } => return Err(Refusal::internal(message)),
                Event::Prompt { logprobs, .. } => {
                    self.prompts[index] = Some(logprobs);
                    continue;
                }
                Event::Started { .. } | Event::Embedding { .. } => continue,
            };
            if choice.is_done() {
                self.updates.close(index);
            }
            if self.log_text && !delta.text.is_empty() {
                tracing::info!(choice = index, text = delta.text, "answer");
            }
            if !delta.is_empty() {
                return Ok(Some((index, delta)));
            }
        }
    }

    /// The sum of the log-probabilities of a choice for each of its tokens.
    pub fn mean_logprob(&self, index: usize) -> f64 {
        let choice = &self.choices[index];
        choice.logprob / choice.tokens.max(1) as f64
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        Usage {
            reasoning: self.choices.iter().map(|choice| choice.thinking).sum(),
            ..self.usage
        }
    }
}

impl Drop for Answers<'_> {
    fn drop(&mut self) {
        let Usage {
            prompt,
            cached,
            completion,
            ..
        } = self.usage;
        let complete = self.choices.iter().all(Choice::is_done);
        tracing::info!(
            prompt_tokens = prompt,
            cached_tokens = cached,
            completion_tokens = completion,
            complete,
            "answered"
        );
    }
}
