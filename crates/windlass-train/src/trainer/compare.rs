//! Batches of answers that are compared or rated, with what the reference makes of them.

use super::{Trainer, to_tokens};
use crate::data::Batch;
use crate::error::Result;
use crate::evaluate::run_on;
use crate::preference::{Comparison, Preference, Rewards};
use std::ops::Range;
use std::sync::Arc;
use windlass_model::{Goal, Tokens};
use windlass_tensor::{Cpu, IGNORED, Tape};

/// A batch's text: ids, targets and the lengths of its segments.
struct Text {
    ids: Vec<u32>,
    targets: Vec<i64>,
    lengths: Vec<usize>,
}

impl Text {
    fn segments(&self) -> Vec<Range<usize>> {
        let mut start = 0;
        let lengths = self.lengths.iter();
        lengths
            .map(|length| {
                start += length;
                start - length..start
            })
            .collect()
    }

    /// Makes the prompts of better answers targets too, as ORPO does, and says which positions these are.
    fn learn_prompts(&mut self) -> Vec<bool> {
        let mut prompts = vec![false; self.ids.len()];
        for range in self.segments().into_iter().step_by(2) {
            let next = self.ids[range.clone()].iter().skip(1);
            let places = self.targets[range.clone()]
                .iter_mut()
                .zip(&mut prompts[range]);
            for ((target, prompt), &next) in places.zip(next) {
                if *target == IGNORED {
                    (*target, *prompt) = (i64::from(next), true);
                }
            }
        }
        prompts
    }

    /// Each prompt with the answer to the next one.
    fn mismatched(&self, context: usize) -> Text {
        let segments = self.segments();
        let mut text = Text {
            ids: Vec::new(),
            targets: Vec::new(),
            lengths: Vec::new(),
        };
        // The first token of an answer is the target of the last one of its prompt.
        let answer = |range: &Range<usize>| {
            let first = self.targets[range.clone()]
                .iter()
                .position(|&t| t != IGNORED);
            range.start + first.map_or(range.len(), |at| at + 1)
        };
        for (at, own) in segments.iter().enumerate() {
            let other = &segments[(at + 1) % segments.len()];
            let (prompt, begin) = (own.start..answer(own), answer(other));
            let answer = &self.ids[begin..other.end];
            let start = text.ids.len();
            text.ids.extend_from_slice(&self.ids[prompt.clone()]);
            text.ids.extend_from_slice(answer);
            text.ids.truncate(start + context);
            let count = text.ids.len() - start;
            for at in 0..count {
                let next = (at + 1 >= prompt.len())
                    .then(|| text.ids.get(start + at + 1))
                    .flatten();
                text.targets.push(next.map_or(IGNORED, |&id| i64::from(id)));
            }
            text.lengths.push(count);
        }
        text
    }
}

impl Trainer {
    /// What a batch counts in the mean of a step's loss: tokens, pairs or answers; then tokens of better answers with their
    /// prompts.
    pub(super) fn weight(&self, batch: &Batch) -> (f64, f64) {
        let Some(method) = self.preference else {
            return (batch.scored() as f64, 0.0);
        };
        let answers = batch.segments.len();
        let count = if method.is_paired() {
            answers / 2
        } else {
            answers
        };
        let texts = batch.segments.iter().zip(&batch.labels);
        let chosen = texts.filter(|(_, good)| **good);
        let chosen: usize = chosen.map(|(length, _)| length.saturating_sub(1)).sum();
        (count as f64, chosen as f64)
    }

    /// What the comparisons of all ranks have shown.
    pub(super) fn all_rewards(&self, own: Option<Rewards>) -> Result<Option<Rewards>> {
        if self.preference.is_none() {
            return Ok(None);
        }
        let all = self.all("rewards", &own.unwrap_or_default().to_array())?;
        let mut sum = Rewards::default();
        for rank in all.as_chunks().0 {
            sum.add(&Rewards::from_array(*rank));
        }
        Ok(Some(sum))
    }

    /// A batch as the model reads it, in a step of `micro_batches` batches that counts as [`Trainer::weight`] says in all.
    pub(super) fn prepared(
        &self,
        batch: Batch,
        sums: (f64, f64),
        micro_batches: usize,
    ) -> Result<(Tokens, Option<Arc<Comparison>>)> {
        if let Some(method) = self.preference {
            let (tokens, comparison) = self.compared(batch, method, sums)?;
            return Ok((tokens, Some(comparison)));
        }
        let (config, dtype) = (&self.config, self.options.dtype);
        Ok((to_tokens(batch, config, dtype, sums.0, micro_batches), None))
    }

    /// A batch of answers as the model reads it, in a step of `count` comparisons with `chosen` tokens in better answers.
    pub(super) fn compared(
        &self,
        batch: Batch,
        method: Preference,
        (count, chosen): (f64, f64),
    ) -> Result<(Tokens, Arc<Comparison>)> {
        let labels = batch.labels;
        let mut text = Text {
            ids: batch.ids,
            targets: batch.targets,
            lengths: batch.segments,
        };
        let segments = text.segments();
        let learned = |range: &Range<usize>| {
            let targets = &text.targets[range.clone()];
            targets.iter().filter(|&&t| t != IGNORED).count()
        };
        let reference = match method.has_reference() {
            true => self.log_likelihoods(&text, &base)?,
            false => vec![0.0; segments.len()],
        };
        let kl = match method {
            Preference::Kto { .. } => {
                let other = text.mismatched(self.config.max_position_embeddings);
                let now = self.log_likelihoods(&other, &adapted)?;
                let before = self.log_likelihoods(&other, &base)?;
                let sum: f64 = now.iter().zip(&before).map(|(a, b)| a - b).sum();
                (sum / now.len().max(1) as f64).max(0.0)
            }
            _ => 0.0,
        };
        let tokens = segments.iter().map(learned).collect();
        let prompts = match method {
            Preference::Orpo { .. } => text.learn_prompts(),
            _ => Vec::new(),
        };
        let comparison = Arc::new(Comparison {
            method,
            tokens,
            prompts,
            segments,
            labels,
            reference,
            kl,
            count,
            chosen_tokens: chosen.max(1.0),
            rewards: Default::default(),
        });
        let goal = Goal::Objective {
            targets: text.targets.into(),
            objective: comparison.clone(),
        };
        let tokens = Tokens::new(text.ids, &text.lengths, goal, self.options.dtype);
        Ok((tokens, comparison))
    }

    /// The log-likelihood of each segment's targets.
    fn log_likelihoods(&self, text: &Text, tape: &dyn Fn(&Cpu) -> Tape) -> Result<Vec<f64>> {
        let goal = Goal::TokenLosses {
            targets: text.targets.clone().into(),
        };
        let tokens = Tokens::new(text.ids.clone(), &text.lengths, goal, self.options.dtype);
        let (model, store) = (self.engine.model(), self.engine.store());
        let losses = run_on(model, store, &tokens, tape)?.to_f64();
        let sum = |range: Range<usize>| -losses[range].iter().sum::<f64>();
        Ok(text.segments().into_iter().map(sum).collect())
    }
}

/// The model as it was before it got an adapter, in the arithmetic of training.
fn base(cpu: &Cpu) -> Tape {
    Tape::rehearsal(cpu).without_adapters()
}

/// The model as it is.
fn adapted(cpu: &Cpu) -> Tape {
    Tape::rehearsal(cpu)
}
