//! Speculative decoding: tokens are guessed, read in one pass, and kept as far as they are what would have been chosen.
//!
//! A pass over a few tokens costs little more than over one where memory binds. Every token is drawn as without guessing,
//! from the same logits (a row's bits do not depend on its neighbors) and with the same draws, so the text is the same,
//! greedy or not. Guessing stops by itself for a while when it does not pay.

use crate::{InferError, LoadedModel, Session};
use std::collections::VecDeque;

/// What guesses the tokens that follow.
#[derive(Default)]
pub enum Guess<'m> {
    /// Nothing.
    #[default]
    Off,
    /// What followed the last few tokens where they stood before.
    Lookup,
    /// The likeliest tokens of a smaller model with the same vocabulary.
    Model(Session<'m>),
}

/// What guessing was good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Guesses {
    /// Tokens guessed.
    pub drafted: usize,
    /// Those of them that were right.
    pub accepted: usize,
    /// Passes of the model that read guesses.
    pub passes: usize,
    /// Times that guessing stopped for a while since it did not pay.
    pub pauses: usize,
}

/// Tokens of the longest pattern that is looked up.
const LONGEST: usize = 4;
/// What another token in a pass costs, of a pass with one: measured for packed weights, 2 to 8 tokens.
const COST: f64 = 0.2;
/// Tokens without guesses after they did not pay.
const PAUSE: usize = 32;
/// Share of the past in the running gain, a pass.
const MEMORY: f64 = 0.8;

/// Guesses and reads ahead.
pub(crate) struct Speculator<'g, 'm> {
    guess: &'g mut Guess<'m>,
    /// Most tokens guessed at once.
    most: usize,
    /// Cost of a guessed token, of a pass with one.
    cost: f64,
    /// Guessed tokens that were read, and the logits after each.
    ahead: VecDeque<(u32, Vec<f32>)>,
    /// Passes saved less their cost, lately.
    gain: f64,
    /// Tokens until the next guess.
    pause: usize,
    counts: Guesses,
}

impl<'g, 'm> Speculator<'g, 'm> {
    pub fn new(guess: &'g mut Guess<'m>, model: &LoadedModel, most: usize) -> Self {
        let drafting = match guess {
            Guess::Model(draft) => {
                draft.model().model.num_params() as f64 / model.model.num_params() as f64
            }
            _ => 0.0,
        };
        Speculator {
            guess,
            most,
            cost: COST + drafting,
            ahead: VecDeque::new(),
            gain: 1.0,
            pause: 0,
            counts: Guesses::default(),
        }
    }

    /// What guessing was good for so far; `None` when it is off.
    pub fn counts(&self) -> Option<Guesses> {
        (!matches!(self.guess, Guess::Off)).then_some(self.counts)
    }

    /// The logits after the last of `ids`, which was chosen just now; at most `left` more will be chosen.
    ///
    /// # Errors
    /// As [`Session::next`].
    pub fn next(
        &mut self,
        session: &mut Session<'_>,
        ids: &[u32],
        left: usize,
    ) -> Result<Vec<f32>, InferError> {
        let (&token, before) = ids.split_last().expect("a token was chosen");
        if let Some((guessed, logits)) = self.ahead.pop_front() {
            if guessed == token {
                self.counts.accepted += 1;
                self.gain += 1.0 - MEMORY;
                return Ok(logits);
            }
            self.ahead.clear();
        }
        session.truncate(before.len());
        let draft = self.draft(ids, left.min(session.room() - 1))?;
        if draft.is_empty() {
            return session.next(&[token]);
        }
        self.counts.drafted += draft.len();
        self.counts.passes += 1;
        self.gain = MEMORY * self.gain - (1.0 - MEMORY) * self.cost * draft.len() as f64;
        let mut read = vec![token];
        read.extend_from_slice(&draft);
        let logits = session.next_of_each(&read)?;
        let mut rows: VecDeque<Vec<f32>> = logits
            .to_f32()
            .chunks(logits.cols())
            .map(<[f32]>::to_vec)
            .collect();
        let first = rows.pop_front().expect("a row for each token");
        self.ahead = draft.into_iter().zip(rows).collect();
        Ok(first)
    }

    fn draft(&mut self, ids: &[u32], left: usize) -> Result<Vec<u32>, InferError> {
        // By now it is known how many of the last guesses were right.
        if self.gain < 0.0 {
            (self.gain, self.pause) = (1.0, PAUSE);
            self.counts.pauses += 1;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Ok(Vec::new());
        }
        let most = self.most.min(left);
        match self.guess {
            Guess::Off => Ok(Vec::new()),
            Guess::Lookup => Ok(lookup(ids, most)),
            Guess::Model(session) => draft(session, ids, most),
        }
    }
}

/// What followed the longest run of last tokens that stood before, where it stood last.
fn lookup(ids: &[u32], most: usize) -> Vec<u32> {
    for length in (1..=LONGEST.min(ids.len().saturating_sub(1))).rev() {
        let pattern = &ids[ids.len() - length..];
        let earlier = &ids[..ids.len() - 1];
        if let Some(at) = earlier
            .windows(length)
            .rposition(|window| window == pattern)
        {
            let follows = &ids[at + length..];
            return follows[..most.min(follows.len())].to_vec();
        }
    }
    Vec::new()
}

/// The likeliest tokens of a model, one after another.
fn draft(session: &mut Session<'_>, ids: &[u32], most: usize) -> Result<Vec<u32>, InferError> {
    let same = session.ids().iter().zip(ids);
    let same = same.take_while(|(read, id)| read == id).count();
    session.truncate(same.min(ids.len() - 1));
    let mut next = ids[session.ids().len()..].to_vec();
    let mut draft = Vec::new();
    // The model's context may be shorter than the text.
    while draft.len() < most && next.len() <= session.room() {
        let logits = session.next(&next)?;
        let best =
            (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
        let best = best.expect("a vocabulary") as u32;
        draft.push(best);
        next = vec![best];
    }
    Ok(draft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_place_of_the_longest_pattern_counts() {
        for (ids, most, want) in [
            (&[1, 2, 3, 4, 1, 2][..], 3, &[3, 4, 1][..]),
            (&[1, 2, 3, 9, 2, 3, 7, 1, 2, 3], 2, &[9, 2]),
            (&[5, 6, 5, 7, 5], 9, &[7, 5]),
            (&[5, 5], 9, &[5]),
            (&[1, 2, 3], 4, &[]),
            (&[1], 4, &[]),
            (&[1, 2, 1], 0, &[]),
        ] {
            assert_eq!(lookup(ids, most), want, "{ids:?}");
        }
    }
}
