//! One pass through the model: the batch of a plan, the logits that it needs, and what is read from them.

use super::draw::{Drawn, Sample, draw};
use super::scheduler::{Plan, SequenceId, Work};
use super::{Engine, Live, Pooling, RequestGoal};
use crate::Overlay;
use crate::sampler::{TokenLogprobs, token_logprobs};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use windlass_model::{Goal, Sequence, Tokens};
use windlass_tensor::Tensor;

/// Rows of logits that exist at once: those of a large vocabulary would need more memory than all activations.
const HEAD_ROWS: usize = 64;

/// What goes into a pass.
struct Batch {
    tokens: Tokens,
    /// The row of each work's first token.
    first_rows: Vec<usize>,
    /// Runs of rows with an adapter.
    overlays: Vec<(Range<usize>, Arc<Overlay>)>,
}

/// What is read from a row of logits, or from none.
pub(super) struct Reading {
    /// The sequence.
    pub(super) id: SequenceId,
    /// Which of the rows with logits.
    at: usize,
    /// What.
    pub(super) what: What,
}

/// What is read for a sequence.
pub(super) enum What {
    /// Nothing: its prompt is computed, and that was all.
    Prompt,
    /// The probability of the prompt's next token, beside the `top` likeliest.
    Score {
        token: u32,
        top: usize,
        found: Option<TokenLogprobs>,
    },
    /// A sample's next token.
    Draw {
        sample: Box<Sample>,
        drawn: Option<Result<Drawn, String>>,
    },
}

impl Engine {
    /// Computes a plan and reads what it asks for.
    pub(super) fn compute(&mut self, plan: &Plan) -> Vec<Reading> {
        for &(from, to) in &plan.copies {
            lock(&self.blocks).copy_block(from, to);
        }
        let Batch {
            tokens: mut batch,
            first_rows,
            overlays,
        } = self.batch(plan);
        let hidden = self.model.run_over(&batch, false, &overlays);
        let (mut readings, mut rows) = (Vec::new(), Vec::new());
        for (work, first) in plan.work.iter().zip(first_rows) {
            let live = self.live.get_mut(&work.id.request);
            let live = live.expect("a request in a pass lives");
            pool(live, work, first, &mut |rows| {
                batch.goal = Goal::Hidden { rows: rows.into() };
                self.model.head(&hidden, &batch)
            });
            let tokens = self.scheduler.tokens(work.id).expect("it is in the pass");
            score(live, work, tokens, first, (&mut readings, &mut rows));
            begin_draws(live, work, first, (&mut readings, &mut rows));
        }
        let mut left = readings.into_iter().peekable();
        let mut done = Vec::with_capacity(left.len());
        for (chunk, rows) in rows.chunks(HEAD_ROWS).enumerate() {
            batch.goal = Goal::Logits { rows: rows.into() };
            let logits = self.model.head(&hidden, &batch);
            let first = chunk * HEAD_ROWS;
            let mut part = Vec::new();
            while let Some(reading) = left.next_if(|r| r.at < first + rows.len()) {
                part.push(Mutex::new(reading));
            }
            self.read(&part, &logits, first);
            let part = part.into_iter().map(Mutex::into_inner);
            done.extend(part.map(|reading| reading.unwrap_or_else(PoisonError::into_inner)));
        }
        done.extend(left);
        done
    }

    /// The tokens of all sequences, those of an adapter one after another.
    fn batch(&self, plan: &Plan) -> Batch {
        let adapter = |index: usize| {
            let live = &self.live[&plan.work[index].id.request];
            live.request.adapter.as_ref()
        };
        let mut order: Vec<usize> = (0..plan.work.len()).collect();
        order.sort_by_key(|&index| adapter(index).map(|adapter| adapter.id()));
        let (mut ids, mut sequences) = (Vec::new(), Vec::new());
        let mut first_rows = vec![0; order.len()];
        let mut overlays: Vec<(Range<usize>, Arc<Overlay>)> = Vec::new();
        for index in order {
            let work = &plan.work[index];
            let tokens = self.scheduler.tokens(work.id).expect("it is in the plan");
            let first = ids.len();
            first_rows[index] = first;
            ids.extend_from_slice(&tokens[work.start..][..work.tokens]);
            sequences.push(Sequence {
                past: work.start,
                tokens: work.tokens,
                blocks: plan.blocks(work),
            });
            if let Some(adapter) = adapter(index) {
                match overlays.last_mut() {
                    Some((rows, last)) if Arc::ptr_eq(last, adapter) => rows.end = ids.len(),
                    _ => overlays.push((first..ids.len(), adapter.clone())),
                }
            }
        }
        let rows = [].into();
        let tokens = Tokens::ragged(ids, &sequences, &self.blocks, rows, self.model.dtype);
        Batch {
            tokens,
            first_rows,
            overlays,
        }
    }

    /// Reads rows of logits, of which the first is row `first` of all, on all threads.
    fn read(&self, readings: &[Mutex<Reading>], logits: &Tensor, first: usize) {
        let width = logits.cols();
        let logits = logits.to_f32();
        let (live, scheduler, scratch) = (&self.live, &self.scheduler, &self.scratch);
        self.model.store.cpu().pool.run(readings.len(), |index, _| {
            let mut reading = lock(&readings[index]);
            let Reading { id, at, what } = &mut *reading;
            let row = &logits[(*at - first) * width..][..width];
            match what {
                What::Prompt => {}
                What::Score { token, top, found } => {
                    *found = Some(token_logprobs(row, *token, *top));
                }
                What::Draw { sample, drawn } => {
                    let live = &live[&id.request];
                    // A sample that begins here has no tokens of its own yet.
                    let tokens = scheduler.tokens(*id).or_else(|| {
                        let first = SequenceId { sample: 0, ..*id };
                        scheduler.tokens(first)
                    });
                    let tokens = tokens.expect("it is in the pass");
                    let mut space = lock(scratch).pop().unwrap_or_default();
                    let ids = (tokens, live.prompt_tokens);
                    *drawn = Some(draw(sample, &live.request, ids, row, &mut space));
                    lock(scratch).push(space);
                }
            }
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds the hidden states of a prompt that is to be embedded.
fn pool(live: &mut Live, work: &Work, first: usize, hidden: &mut dyn FnMut(Vec<u32>) -> Tensor) {
    let RequestGoal::Embed(pooling) = live.request.goal else {
        return;
    };
    let end = work.start + work.tokens;
    let from = match pooling {
        Pooling::Mean => work.start.max(live.pooled_tokens),
        Pooling::Last if work.samples > 0 => end - 1,
        Pooling::Last => end,
    };
    if from == end {
        return;
    }
    let row = |position: usize| (first + position - work.start) as u32;
    let states = hidden((from..end).map(row).collect());
    let width = states.cols();
    live.pooled.resize(width, 0.0);
    for state in states.to_f32().chunks(width) {
        for (sum, value) in live.pooled.iter_mut().zip(state) {
            *sum += f64::from(*value);
        }
        live.pooled_tokens += 1;
    }
}

/// What to read, and the rows whose logits it is read from.
type Wanted<'a> = (&'a mut Vec<Reading>, &'a mut Vec<u32>);

/// The tokens of a prompt that are to be scored, each from the row before it.
fn score(live: &Live, work: &Work, tokens: &[u32], first: usize, (readings, rows): Wanted<'_>) {
    let Some(top) = live.request.prompt_logprobs else {
        return;
    };
    let end = (work.start + work.tokens).min(live.prompt_tokens - 1);
    let known = rows.len();
    let from = work.start.max(live.scored.len());
    for position in from..end {
        rows.push((first + position - work.start) as u32);
        let what = What::Score {
            token: tokens[position + 1],
            top,
            found: None,
        };
        readings.push(Reading {
            id: work.id,
            at: known + position - from,
            what,
        });
    }
}

/// The samples that continue after this work, which begin here if they have not yet.
fn begin_draws(live: &mut Live, work: &Work, first: usize, (readings, rows): Wanted<'_>) {
    if work.samples == 0 {
        return;
    }
    let at = rows.len();
    if live.request.max_new_tokens == 0 {
        readings.push(Reading {
            id: work.id,
            // With the next row, or after all.
            at,
            what: What::Prompt,
        });
        return;
    }
    rows.push((first + work.tokens - 1) as u32);
    if live.samples.is_empty() {
        live.samples = Sample::begin(&mut live.request)
            .into_iter()
            .map(Some)
            .collect();
    }
    for sample in work.id.sample..work.id.sample + work.samples {
        let id = SequenceId { sample, ..work.id };
        let state = live.samples[sample].take();
        let what = What::Draw {
            sample: Box::new(state.expect("a sample in a pass has not ended")),
            drawn: None,
        };
        readings.push(Reading { id, at, what });
    }
}
