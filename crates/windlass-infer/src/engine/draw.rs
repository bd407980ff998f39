//! A sample's next token, and what becomes of the sample with it.

use super::scheduler::{Next, RequestId, SequenceId};
use super::{Constraint, Engine, Event, FinishReason, Request, RequestGoal};
use crate::sampler::{Context, Scratch, TokenLogprobs, token_logprobs};
use windlass_tensor::Rng;

/// What a sample keeps from one token to the next, beside its tokens.
pub(super) struct Sample {
    rng: Rng,
    constraint: Option<Box<dyn Constraint>>,
    new_tokens: usize,
}

impl Sample {
    /// All samples of a request at their beginning.
    pub(super) fn begin(request: &mut Request) -> Vec<Sample> {
        let constraint = request.constraint.take();
        let samples = (0..request.samples as u64).map(|sample| Sample {
            rng: Rng::new(request.seed.wrapping_add(sample)),
            constraint: constraint.as_ref().map(|c| c.fork()),
            new_tokens: 0,
        });
        samples.collect()
    }
}

/// A token that was chosen.
pub(super) struct Drawn {
    token: u32,
    logprobs: Option<TokenLogprobs>,
    /// Why the sample ends with it, as far as the sample knows.
    end: Option<FinishReason>,
}

/// Chooses the token after `tokens`, of which the first `prompt` were given.
pub(super) fn draw(
    sample: &mut Sample,
    request: &Request,
    (tokens, prompt): (&[u32], usize),
    logits: &[f32],
    scratch: &mut Scratch,
) -> Result<Drawn, String> {
    let mut context = Context::split(tokens, prompt);
    if sample.new_tokens < request.min_new_tokens {
        context.banned = &request.stop_tokens;
    }
    if let Some(constraint) = &mut sample.constraint {
        context.mask = Some(constraint.mask()?);
    }
    let token = scratch.sample(&request.sampling, logits, context, &mut sample.rng);
    let token = token.map_err(|error| error.to_string())?;
    sample.new_tokens += 1;
    let stop = request.stop_tokens.contains(&token);
    let mut end = stop.then_some(FinishReason::Stop(Some(token)));
    if let (Some(constraint), false) = (&mut sample.constraint, stop) {
        constraint.accept(token)?;
        end = constraint.is_finished().then_some(FinishReason::Stop(None));
    }
    if end.is_none() && sample.new_tokens == request.max_new_tokens {
        end = Some(FinishReason::Length);
    }
    let top = request.logprobs;
    Ok(Drawn {
        token,
        logprobs: top.map(|top| token_logprobs(logits, token, top)),
        end,
    })
}

impl Engine {
    /// Reports a token that was chosen, and whether the sample goes on.
    pub(super) fn go_on(
        &mut self,
        id: SequenceId,
        sample: Sample,
        drawn: Drawn,
        events: &mut Vec<Event>,
    ) -> Next {
        let token = drawn.token;
        self.stats.new_tokens += 1;
        let live = self.live.get_mut(&id.request).expect("it is in the pass");
        // The token itself needs a position before another one can follow.
        let read = live.prompt_tokens + sample.new_tokens;
        let full = (read > self.context).then_some(FinishReason::Context);
        let end = drawn.end.or(full);
        live.samples[id.sample] = Some(sample);
        if !matches!(end, Some(FinishReason::Stop(Some(_)))) {
            events.push(Event::Token {
                id: id.request,
                sample: id.sample,
                token,
                logprobs: drawn.logprobs,
            });
        }
        match end {
            Some(reason) => {
                self.finish(id, reason, events);
                Next::Finished
            }
            None => Next::Token(token),
        }
    }

    /// Reports the end of a sample, and forgets a request without others.
    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason, events: &mut Vec<Event>) {
        let live = self.live.get_mut(&id.request).expect("it is in the pass");
        let state = live.samples.get_mut(id.sample).and_then(Option::take);
        events.push(Event::Finished {
            id: id.request,
            sample: id.sample,
            reason,
            new_tokens: state.map_or(0, |s| s.new_tokens),
            cached_tokens: live.cached_tokens,
        });
        live.left -= 1;
        if live.left == 0 {
            self.live.remove(&id.request);
        }
    }

    /// Reports what was wanted of a prompt that is computed now.
    pub(super) fn tell_prompt(&mut self, id: RequestId, events: &mut Vec<Event>) {
        let live = self.live.get_mut(&id).expect("it is in the pass");
        if live.request.prompt_logprobs.take().is_some() {
            let logprobs = std::mem::take(&mut live.scored);
            events.push(Event::Prompt { id, logprobs });
        }
        if let RequestGoal::Embed(_) = live.request.goal {
            let tokens = live.pooled_tokens as f64;
            let values = live.pooled.iter().map(|sum| (sum / tokens) as f32);
            let values = values.collect();
            events.push(Event::Embedding { id, values });
        }
    }
}
