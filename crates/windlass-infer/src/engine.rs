//! Many requests at once: continuous batching with Dynamic SplitFuse over paged keys and values.
//!
//! Each [`Engine::step`] is one pass through the model over the next tokens of all sequences that the
//! [`Scheduler`] chose, long prompts in parts and generated tokens alike. What a request gets
//! depends on nothing else that runs: not on the budget, the cut of its prompt, the cache or a preemption, nor on the
//! adapters of others.
//!
//! The engine knows no text, no clock and no connection: stop strings, deadlines and streams are its caller's.

mod blocks;
mod draw;
mod pass;
mod plan;
mod request;
pub mod scheduler;

pub use request::{Constraint, Event, FinishReason, Pooling, Request, RequestGoal};
pub use scheduler::{RequestId, SequenceId};

use crate::sampler::{Scratch, TokenLogprobs};
use crate::{InferError, LoadedModel};
use draw::Sample;
use pass::{Reading, What};
use scheduler::{Arrival, Counts, Limits, Next, Plan, Scheduler};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use windlass_model::KvBlocks;

/// The limits of an [`Engine`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOptions {
    /// Tokens of one pass.
    pub token_budget: usize,
    /// Sequences that are computed side by side.
    pub max_sequences: usize,
    /// Requests that may wait before more are refused.
    pub max_waiting: usize,
    /// Tokens that all sequences together have keys and values for, rounded up to whole blocks. Memory is taken as it is
    /// written.
    pub kv_tokens: usize,
    /// Whether requests that begin alike share what is computed.
    pub prefix_cache: bool,
    /// The most tokens of a text, where that is less than the model's.
    pub context: Option<usize>,
}

impl Default for EngineOptions {
    /// 512 tokens a pass, 32 sequences, 256 more waiting, room for 16,384 tokens, the cache on.
    fn default() -> Self {
        EngineOptions {
            token_budget: 512,
            max_sequences: 32,
            max_waiting: 256,
            kv_tokens: 16_384,
            prefix_cache: true,
            context: None,
        }
    }
}

/// What a step did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    /// What became of requests, in the order of their age.
    pub events: Vec<Event>,
    /// Tokens computed.
    pub tokens: usize,
    /// Sequences they belong to.
    pub sequences: usize,
    /// Sequences that lost their blocks before the pass.
    pub preempted: usize,
}

/// Counts since the engine began, and its state as of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences, blocks and cache.
    pub scheduler: Counts,
    /// Passes.
    pub steps: u64,
    /// Tokens of the prompts taken.
    pub prompt_tokens: u64,
    /// Tokens chosen.
    pub new_tokens: u64,
}

/// A request on its way.
struct Live {
    /// Without its prompt, which the scheduler keeps.
    request: Request,
    prompt_tokens: usize,
    cached_tokens: usize,
    started: bool,
    /// One for each sample that has begun; none while it is elsewhere or after its end.
    samples: Vec<Option<Sample>>,
    /// Samples that have not ended.
    left: usize,
    scored: Vec<TokenLogprobs>,
    pooled: Vec<f64>,
    pooled_tokens: usize,
}

/// A model and the requests that it works on.
pub struct Engine {
    model: LoadedModel,
    scheduler: Scheduler,
    blocks: Arc<Mutex<KvBlocks>>,
    context: usize,
    live: BTreeMap<RequestId, Live>,
    stats: EngineStats,
    scratch: Mutex<Vec<Scratch>>,
}

impl Engine {
    /// An engine without requests.
    ///
    /// # Errors
    /// [`InferError::Setting`] names a limit of zero.
    pub fn new(model: LoadedModel, options: EngineOptions) -> Result<Self, InferError> {
        let scheduler = Scheduler::new(Limits {
            token_budget: options.token_budget,
            max_sequences: options.max_sequences,
            max_waiting: options.max_waiting,
            blocks: options.kv_tokens.div_ceil(KvBlocks::LEN),
            block_len: KvBlocks::LEN,
            prefix_cache: options.prefix_cache,
        })?;
        let blocks = scheduler.limits().blocks;
        let blocks = KvBlocks::new(model.store.cpu(), &model.config, model.kv_type, blocks);
        let longest = options.context.unwrap_or(usize::MAX);
        Ok(Engine {
            context: model.context().min(longest).min(scheduler.capacity()),
            model,
            scheduler,
            blocks: Arc::new(Mutex::new(blocks)),
            live: BTreeMap::new(),
            stats: EngineStats::default(),
            scratch: Mutex::new(Vec::new()),
        })
    }

    /// The model.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// The model alone; what runs is dropped.
    pub fn into_model(self) -> LoadedModel {
        self.model
    }

    /// The most tokens of a text: the least of the model's context, the options' and the key-value memory.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Takes a request. Its events come from later steps.
    ///
    /// # Errors
    /// [`InferError::Busy`] when too many wait; [`InferError::TooLong`], [`InferError::Empty`],
    /// [`InferError::UnknownToken`] for a prompt or settings that the model cannot take; [`InferError::Setting`].
    ///
    /// # Panics
    /// When its adapter was loaded for a model of another shape.
    #[track_caller]
    pub fn submit(&mut self, mut request: Request) -> Result<RequestId, InferError> {
        let fits = request.adapter.iter().all(|a| self.model.fits(a));
        assert!(fits, "an adapter for another model");
        request.sampling.validate()?;
        self.model.check_ids(&request.prompt)?;
        let biased = request.sampling.logit_bias.iter().map(|&(id, _)| id);
        let named: Vec<u32> = biased.chain(request.stop_tokens.iter().copied()).collect();
        self.model.check_ids(&named)?;
        let prompt_tokens = request.prompt.len();
        if prompt_tokens > self.context {
            return Err(InferError::TooLong {
                what: "the prompt".into(),
                tokens: prompt_tokens,
                context: self.context,
            });
        }
        let every_row = match request.goal {
            RequestGoal::Generate => request.prompt_logprobs.is_some(),
            RequestGoal::Embed(pooling) => {
                request.max_new_tokens = 0;
                pooling == Pooling::Mean
            }
        };
        if request.max_new_tokens == 0 && request.samples > 1 {
            return Err(InferError::Setting {
                flag: "samples",
                value: request.samples.to_string(),
                rule: "1 where nothing is generated",
                hint: "ask for one sample, or for new tokens",
            });
        }
        // The last token that is generated is not read again.
        let read = request.max_new_tokens.saturating_sub(1);
        let id = self.scheduler.submit(Arrival {
            tokens: std::mem::take(&mut request.prompt),
            most_tokens: prompt_tokens.saturating_add(read).min(self.context),
            samples: request.samples,
            every_row,
            // Keys and values differ by adapter.
            root: request.adapter.as_ref().map_or(0, |adapter| adapter.id()),
        })?;
        self.stats.prompt_tokens += prompt_tokens as u64;
        let live = Live {
            prompt_tokens,
            cached_tokens: 0,
            started: false,
            samples: Vec::new(),
            left: request.samples,
            scored: Vec::new(),
            pooled: Vec::new(),
            pooled_tokens: 0,
            request,
        };
        self.live.insert(id, live);
        Ok(id)
    }

    /// Ends a request, whose blocks are free when this returns; no event follows. One that has ended is no error.
    pub fn cancel(&mut self, id: RequestId) {
        self.scheduler.cancel(|s| s.request == id);
        self.live.remove(&id);
    }

    /// Ends one sample, as [`Engine::cancel`] does. Before the request's first token this does nothing.
    pub fn cancel_sample(&mut self, id: RequestId, sample: usize) {
        let Some(live) = self.live.get_mut(&id) else {
            return;
        };
        let state = live.samples.get_mut(sample);
        if state.is_some_and(|state| state.take().is_some()) {
            self.scheduler
                .cancel(|s| s.request == id && s.sample == sample);
            live.left -= 1;
            if live.left == 0 {
                self.live.remove(&id);
            }
        }
    }

    /// Whether nothing is to be done.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// Sets the tokens of a pass, which change the time that a step takes and no result.
    pub fn set_token_budget(&mut self, tokens: usize) {
        self.scheduler.set_token_budget(tokens);
    }

    /// Counts and state.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            scheduler: self.scheduler.counts(),
            ..self.stats
        }
    }

    /// One pass through the model. An engine without requests does nothing.
    ///
    /// # Errors
    /// Weights that cannot be read. What goes wrong in one request is an [`Event::Failed`].
    pub fn step(&mut self) -> Result<Step, InferError> {
        if self.is_idle() {
            return Ok(Step::default());
        }
        let plan = self.scheduler.schedule();
        let mut step = Step {
            tokens: plan.tokens(),
            sequences: plan.work.len(),
            preempted: plan.preempted.len(),
            events: Vec::new(),
        };
        for &(id, cached_tokens) in &plan.admitted {
            let live = self
                .live
                .get_mut(&id.request)
                .expect("a request that is let in lives");
            if !live.started {
                live.started = true;
                live.cached_tokens = cached_tokens;
                step.events.push(Event::Started { id: id.request });
            }
        }
        self.stats.steps += 1;
        let readings = self.compute(&plan);
        self.answer(plan, readings, &mut step.events);
        Ok(step)
    }

    /// Tells what has been read, and the scheduler how the sequences go on.
    fn answer(&mut self, plan: Plan, readings: Vec<Reading>, events: &mut Vec<Event>) {
        let mut results = Vec::with_capacity(readings.len());
        let mut failed = Vec::new();
        for Reading { id, what, .. } in readings {
            let request = id.request;
            match what {
                What::Score { found, .. } => {
                    let live = self.live.get_mut(&request).expect("it is in the pass");
                    live.scored.extend(found);
                }
                What::Prompt => {
                    self.tell_prompt(request, events);
                    self.finish(id, FinishReason::Length, events);
                    results.push((id, Next::Finished));
                }
                What::Draw { .. } if failed.contains(&request) => {
                    results.push((id, Next::Finished));
                }
                What::Draw { sample, drawn } => {
                    self.tell_prompt(request, events);
                    let next = match drawn.expect("every row with logits is read") {
                        Ok(drawn) => self.go_on(id, *sample, drawn, events),
                        Err(message) => {
                            let id = request;
                            events.push(Event::Failed { id, message });
                            failed.push(id);
                            Next::Finished
                        }
                    };
                    results.push((id, next));
                }
            }
        }
        self.scheduler.update(plan, &results);
        for id in failed {
            self.cancel(id);
        }
    }
}
