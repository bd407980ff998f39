//! A load of many clients on an engine, as DeepSpeed-FastGen's benchmark makes it, and what they wait for.
//!
//! Each client sends its next request when it has the answer to the last one. Time is an argument.

use crate::engine::{Engine, Event, Request, RequestId};
use crate::{InferError, SamplingParams};
use serde::Serialize;
use std::collections::BTreeMap;
use windlass_tensor::Rng;

/// Requests whose lengths are normally distributed.
///
/// # Source
/// DeepSpeed-FastGen's blog, "Performance Evaluation": lengths of ±30 %, 1 to 32 clients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    /// Requests of all clients together.
    pub requests: usize,
    /// Clients.
    pub clients: usize,
    /// Mean length of the prompts.
    pub prompt_tokens: usize,
    /// Mean length of the answers.
    pub new_tokens: usize,
    /// Standard deviation of both lengths, as a share of the mean.
    pub spread: f64,
    /// Decides lengths and tokens.
    pub seed: u64,
}

impl Workload {
    /// The lengths of prompt and answer of each request. They do not depend on the number of clients.
    pub fn lengths(&self) -> Vec<(usize, usize)> {
        let mut rng = Rng::new(self.seed);
        let mut draw = |mean: usize| {
            let length = mean as f64 * (1.0 + self.spread * rng.normal());
            (length.round() as usize).clamp(1, 3 * mean.max(1))
        };
        let lengths = (0..self.requests).map(|_| (draw(self.prompt_tokens), draw(self.new_tokens)));
        lengths.collect()
    }

    /// Tokens that an engine needs keys and values for, so that no client waits for another one's.
    pub fn kv_tokens(&self) -> usize {
        let lengths = self.lengths();
        let longest = lengths.iter().map(|(prompt, new)| prompt + new).max();
        // Blocks are not filled.
        self.clients * (longest.unwrap_or(0) + windlass_model::KvBlocks::LEN)
    }

    /// Runs the load to its end. `now` gives seconds since some moment.
    ///
    /// # Errors
    /// What [`Engine::submit`] and [`Engine::step`] refuse.
    pub fn drive(
        &self,
        engine: &mut Engine,
        now: &mut dyn FnMut() -> f64,
    ) -> Result<Load, InferError> {
        let mut rng = Rng::stream(self.seed, 1);
        let vocabulary = engine.model().config.vocab_size as u64;
        let lengths = self.lengths();
        let mut left = lengths.iter();
        let mut waits: BTreeMap<RequestId, Wait> = BTreeMap::new();
        let mut seen = Seen::default();
        let (start, before) = (now(), engine.stats());
        loop {
            let free = self.clients - waits.len();
            for &(prompt, new_tokens) in left.by_ref().take(free) {
                let prompt = (0..prompt).map(|_| rng.below(vocabulary) as u32);
                let id = engine.submit(Request {
                    sampling: SamplingParams::greedy(),
                    max_new_tokens: new_tokens,
                    ..Request::new(prompt.collect())
                })?;
                let sent = now();
                waits.insert(id, Wait { sent, last: None });
            }
            if waits.is_empty() {
                break;
            }
            let begun = now();
            let step = engine.step()?;
            let at = now();
            seen.steps.push(at - begun);
            for event in step.events {
                seen.take(event, at, &mut waits);
            }
        }
        let seconds = now() - start;
        let prompts: usize = lengths.iter().map(|(prompt, _)| prompt).sum();
        let after = engine.stats();
        let tokens = after.scheduler.computed_tokens - before.scheduler.computed_tokens;
        Ok(Load {
            clients: self.clients,
            requests: self.requests,
            seconds,
            requests_per_second: self.requests as f64 / seconds,
            prompt_tokens_per_second: prompts as f64 / seconds,
            new_tokens_per_second: seen.tokens as f64 / seconds,
            first_token: Quantiles::of(seen.first),
            between_tokens: Quantiles::of(seen.gaps),
            answer: Quantiles::of(seen.answers),
            tokens_per_step: tokens as f64 / seen.steps.len() as f64,
            step: Quantiles::of(seen.steps),
        })
    }
}

/// A client's request that is on its way.
struct Wait {
    sent: f64,
    last: Option<f64>,
}

/// What all clients have seen.
#[derive(Default)]
struct Seen {
    tokens: usize,
    first: Vec<f64>,
    gaps: Vec<f64>,
    answers: Vec<f64>,
    steps: Vec<f64>,
}

impl Seen {
    fn take(&mut self, event: Event, at: f64, waits: &mut BTreeMap<RequestId, Wait>) {
        match event {
            Event::Token { id, .. } => {
                let wait = waits.get_mut(&id).expect("a client waits for it");
                match wait.last.replace(at) {
                    None => self.first.push(at - wait.sent),
                    Some(last) => self.gaps.push(at - last),
                }
                self.tokens += 1;
            }
            Event::Finished { id, .. } | Event::Failed { id, .. } => {
                let wait = waits.remove(&id).expect("a client waits for it");
                self.answers.push(at - wait.sent);
            }
            Event::Started { .. } | Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
}

/// What a load came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Load {
    /// Clients.
    pub clients: usize,
    /// Requests of all of them.
    pub requests: usize,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Requests answered in a second.
    pub requests_per_second: f64,
    /// Tokens of prompts read in a second.
    pub prompt_tokens_per_second: f64,
    /// Tokens of answers given in a second.
    pub new_tokens_per_second: f64,
    /// Seconds from a request to its first token.
    pub first_token: Quantiles,
    /// Seconds from one token of an answer to the next.
    pub between_tokens: Quantiles,
    /// Seconds from a request to the end of its answer.
    pub answer: Quantiles,
    /// Seconds of a step.
    pub step: Quantiles,
    /// Mean number of tokens that a step computes.
    pub tokens_per_step: f64,
}

/// How a measure is distributed; all NaN where there was nothing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantiles {
    /// The median.
    pub p50: f64,
    /// What nine of ten do not exceed.
    pub p90: f64,
    /// What nineteen of twenty do not exceed.
    pub p95: f64,
    /// The greatest.
    pub most: f64,
}

impl Quantiles {
    /// Of these values, between the two nearest ones.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (values.len().max(1) - 1) as f64;
            let (low, high) = (place.floor() as usize, place.ceil() as usize);
            match (values.get(low), values.get(high)) {
                (Some(a), Some(b)) => a + (b - a) * place.fract(),
                _ => f64::NAN,
            }
        };
        Quantiles {
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            most: at(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_quantiles_are_as_distributed() {
        let workload = Workload {
            requests: 4000,
            clients: 8,
            prompt_tokens: 500,
            new_tokens: 100,
            spread: 0.3,
            seed: 1,
        };
        let lengths = workload.lengths();
        let other = Workload {
            clients: 1,
            ..workload
        };
        assert_eq!(lengths, other.lengths());
        let prompts: Vec<f64> = lengths.iter().map(|l| l.0 as f64).collect();
        let mean = prompts.iter().sum::<f64>() / 4000.0;
        let spread = prompts.iter().map(|p| (p - mean).powi(2)).sum::<f64>();
        let spread = (spread / 4000.0).sqrt();
        assert!((mean - 500.0).abs() < 10.0 && (spread - 150.0).abs() < 8.0);
        let quantiles = Quantiles::of((0..=100).rev().map(f64::from).collect());
        let got = [quantiles.p50, quantiles.p90, quantiles.p95, quantiles.most];
        assert_eq!(got, [50.0, 90.0, 95.0, 100.0]);
        assert_eq!(Quantiles::of(vec![1.0, 2.0]).p50, 1.5);
        assert!(Quantiles::of(vec![]).p95.is_nan());
    }
}
