//! One answer on its way: tokens in, text, tool calls and log-probabilities out.
//!
//! Text comes in whole characters. What could be the beginning of a stop string or of a tool call is held back.

use crate::app::Model;
use crate::refusal::Refusal;
use crate::thoughts::ThoughtParser;
use crate::tools::parse::{CallDelta, CallParser};
use windlass_infer::engine::FinishReason;
use windlass_infer::sampler::TokenLogprobs;
use windlass_infer::stop::{StopReason, StopRules, Stopper};
use windlass_model::tokenizer::DecodeStream;

/// Ids of the prompt's end that the text of the first tokens is decoded after, for spaces and split characters.
const TEXT_CONTEXT: usize = 32;

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// By a token that ends texts.
    Stop,
    /// By a stop string.
    StopString(String),
    /// No more tokens were asked for, or there is no room for more.
    Length,
    /// To call tools.
    ToolCalls,
}

impl Finish {
    /// OpenAI's word.
    pub fn name(&self) -> &'static str {
        match self {
            Finish::Stop | Finish::StopString(_) => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// What a token adds to an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delta {
    pub thoughts: String,
    pub text: String,
    pub calls: Vec<CallDelta>,
    /// The tokens whose text this is, where log-probabilities are asked for.
    pub reports: Vec<TokenLogprobs>,
    /// Set with the last one.
    pub finish: Option<Finish>,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        let said = !self.text.is_empty() || !self.thoughts.is_empty();
        !said && self.calls.is_empty() && self.finish.is_none()
    }
}

/// An answer on its way.
pub(crate) struct Choice<'a> {
    decoder: DecodeStream<'a>,
    stopper: Stopper,
    stop: Vec<String>,
    thoughts: Option<ThoughtParser>,
    calls: Option<CallParser>,
    /// Reports of tokens whose text is held back.
    held: Vec<TokenLogprobs>,
    /// Tokens so far.
    pub tokens: usize,
    /// Those of thoughts among them.
    pub thinking: usize,
    /// The sum of the log-probabilities so far, where they are asked for.
    pub logprob: f64,
    done: bool,
}

impl<'a> Choice<'a> {
    /// An answer at its beginning, after a prompt.
    pub fn new(
        model: &'a Model,
        prompt: &[u32],
        stop: &[String],
        thoughts: Option<ThoughtParser>,
        calls: Option<CallParser>,
    ) -> Result<Self, Refusal> {
        let mut decoder = model.tokenizer.stream(true);
        for &id in &prompt[prompt.len().saturating_sub(TEXT_CONTEXT)..] {
            decoder
                .push(id)
                .map_err(|error| Refusal::internal(error.to_string()))?;
        }
        let rules = StopRules {
            // The engine knows the tokens that end a text, and counts.
            eos_ids: Vec::new(),
            max_tokens: usize::MAX,
            stop_strings: stop.to_vec(),
        };
        Ok(Choice {
            decoder,
            stopper: Stopper::new(rules).map_err(|error| Refusal::of_infer(&error))?,
            stop: stop.to_vec(),
            thoughts,
            calls,
            held: Vec::new(),
            tokens: 0,
            thinking: 0,
            logprob: 0.0,
            done: false,
        })
    }

    fn is_thinking(&self) -> bool {
        let parser = self.thoughts.as_ref();
        parser.is_some_and(ThoughtParser::is_inside)
    }

    /// Whether nothing follows any more.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Takes the next token.
    pub fn token(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> Result<Delta, Refusal> {
        self.tokens += 1;
        self.thinking += usize::from(self.is_thinking());
        if let Some(logprobs) = logprobs {
            self.logprob += logprobs.logprob;
            self.held.push(logprobs);
        }
        let piece = self
            .decoder
            .push(token)
            .map_err(|error| Refusal::internal(error.to_string()))?;
        let step = self.stopper.push(token, &piece);
        match step.stop {
            Some(StopReason::StopString(index)) => {
                let finish = Finish::StopString(self.stop[index].clone());
                Ok(self.last(&step.text, finish))
            }
            _ => Ok(self.delta(&step.text)),
        }
    }

    /// Ends the answer for the engine's reason; what was held back comes out.
    pub fn finish(&mut self, reason: FinishReason) -> Result<Delta, Refusal> {
        let rest = self
            .decoder
            .finish()
            .map_err(|error| Refusal::internal(error.to_string()))?;
        // A character that stayed incomplete cannot complete a stop string.
        let text = self.stopper.finish() + &rest;
        let finish = match reason {
            FinishReason::Stop(_) => Finish::Stop,
            FinishReason::Length | FinishReason::Context => Finish::Length,
        };
        Ok(self.last(&text, finish))
    }

    /// What certain text comes to.
    fn delta(&mut self, text: &str) -> Delta {
        let (thoughts, text) = match &mut self.thoughts {
            Some(parser) => parser.push(text),
            None => (String::new(), text.to_owned()),
        };
        self.said(thoughts, &text)
    }

    /// What thoughts and other text come to.
    fn said(&mut self, thoughts: String, text: &str) -> Delta {
        let (text, calls) = match &mut self.calls {
            Some(parser) => parser.push(text),
            None => (text.to_owned(), Vec::new()),
        };
        let shown = !text.is_empty() || !thoughts.is_empty() || !calls.is_empty();
        Delta {
            thoughts,
            text,
            calls,
            reports: if shown {
                std::mem::take(&mut self.held)
            } else {
                Vec::new()
            },
            finish: None,
        }
    }

    fn last(&mut self, text: &str, finish: Finish) -> Delta {
        self.done = true;
        let mut delta = self.delta(text);
        if let Some(parser) = &mut self.thoughts {
            let (thoughts, text) = parser.finish();
            let rest = self.said(thoughts, &text);
            delta.thoughts += &rest.thoughts;
            delta.text += &rest.text;
            delta.calls.extend(rest.calls);
            delta.reports.extend(rest.reports);
        }
        let mut finish = finish;
        if let Some(parser) = &mut self.calls {
            let (text, mut calls) = parser.finish();
            delta.text += &text;
            delta.calls.append(&mut calls);
            if parser.has_called() && finish != Finish::Length {
                finish = Finish::ToolCalls;
            }
        }
        delta.reports.append(&mut self.held);
        delta.finish = Some(finish);
        delta
    }
}
