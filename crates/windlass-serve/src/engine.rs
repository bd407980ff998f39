//! The thread that owns the engine: requests in, steps, events out.
//!
//! It is the only one that computes. Requests come through a bounded channel; the events of a request go to whoever asked,
//! through a channel that holds no more than the tokens the request may have. When the asker is gone, the request is
//! cancelled before the next step. The clock is read here, since the engine knows none: for metrics, and for the tokens
//! of a step, which are kept so few that running answers do not stall while long prompts are read.

use crate::app::{App, Base, Model, unix_now};
use crate::grammar::Grammars;
use crate::metrics::{Finished, Metrics};
use crate::options::{ServeError, Served};
use crate::refusal::Refusal;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use windlass_infer::InferError;
use windlass_infer::engine::{Engine, Event, FinishReason, Request, RequestId, Step};

/// Requests on their way to the engine, beside those that wait inside.
const COMMANDS: usize = 256;
/// The fewest tokens of a step, whatever the target: below, steps read weights more than they compute, and prompts that
/// wait cost more than answers gain.
const LEAST_BUDGET: usize = 64;
/// The most steps that end by an error, one after another, before the engine is given up.
const MOST_FAILURES: usize = 3;

enum Command {
    Submit(Submission),
    End,
}

struct Submission {
    requests: Vec<Request>,
    arrived: Instant,
    events: mpsc::UnboundedSender<(usize, Event)>,
    /// Samples that are not wanted any more.
    closed: Arc<Mutex<Vec<usize>>>,
    reply: oneshot::Sender<Result<(), Refusal>>,
}

/// Where requests go.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    commands: mpsc::Sender<Command>,
}

impl EngineHandle {
    /// Hands over requests, all or none, and returns their events.
    pub async fn submit(&self, requests: Vec<Request>) -> Result<Updates, Refusal> {
        let (events, receiver) = mpsc::unbounded_channel();
        let (reply, answer) = oneshot::channel();
        let closed = Arc::new(Mutex::new(Vec::new()));
        let submission = Submission {
            requests,
            arrived: Instant::now(),
            events,
            closed: closed.clone(),
            reply,
        };
        let sent = self.commands.try_send(Command::Submit(submission));
        sent.map_err(|_| Refusal::busy("too many requests arrive at once: try again later"))?;
        let ended = |_| Refusal::unavailable("the server is shutting down", 5);
        answer.await.map_err(ended)??;
        Ok(Updates { receiver, closed })
    }

    /// Ends the thread, after its step.
    pub fn end(&self) {
        // The thread may have ended already.
        let _ = self.commands.blocking_send(Command::End);
    }
}

/// The events of a submission, each with the index of the sample among all samples of its requests. Dropping it cancels
/// what is not finished.
pub(crate) struct Updates {
    receiver: mpsc::UnboundedReceiver<(usize, Event)>,
    closed: Arc<Mutex<Vec<usize>>>,
}

impl Updates {
    /// The next event before `deadline`. One that waits already is too late as well: a request ends in time also when the
    /// engine is faster than who takes its events.
    pub async fn next(
        &mut self,
        deadline: tokio::time::Instant,
    ) -> Result<(usize, Event), Refusal> {
        let late = || Refusal::unavailable("the request took longer than the server allows", 60);
        if tokio::time::Instant::now() >= deadline {
            return Err(late());
        }
        let next = tokio::time::timeout_at(deadline, self.receiver.recv()).await;
        let next = next.map_err(|_| late())?;
        next.ok_or_else(|| Refusal::unavailable("the server is shutting down", 5))
    }

    /// A sample is not wanted any more.
    pub fn close(&self, sample: usize) {
        self.closed.lock().expect("a list").push(sample);
    }
}

/// A request inside the engine.
struct Tracked {
    events: mpsc::UnboundedSender<(usize, Event)>,
    closed: Arc<Mutex<Vec<usize>>>,
    /// The index of its first sample.
    first: usize,
    prompt_tokens: usize,
    max_tokens: usize,
    arrived: Instant,
    /// The beginning of the first step that computed for it.
    begun: Option<Instant>,
    samples: Vec<Sample>,
    /// Samples that have not ended.
    open: usize,
}

/// The times of a sample.
#[derive(Clone, Copy, Default)]
struct Sample {
    first: Option<Instant>,
    last: Option<Instant>,
    generated: usize,
    ended: bool,
}

/// The thread's state.
pub(crate) struct EngineThread {
    app: Arc<App>,
    engine: Engine,
    commands: mpsc::Receiver<Command>,
    tracked: HashMap<RequestId, Tracked>,
    budget: Budget,
}

impl EngineThread {
    /// Puts a model into service.
    pub fn new(app: &Arc<App>, served: Served) -> Result<Self, ServeError> {
        let load = |error: InferError| ServeError::Load(Box::new(error));
        let tokenizer = served.model.tokenizer().map_err(load)?;
        let tokens = tokenizer.token_bytes();
        let grammars = Grammars::new(&tokens, tokenizer.eos());
        let tokenizer = tokenizer.clone();
        let vocabulary = served.model.config.vocab_size;
        let hidden_size = served.model.config.hidden_size;
        let most = served.engine.token_budget;
        let loader = served.model.overlay_loader().map_err(load)?;
        let engine = Engine::new(served.model, served.engine).map_err(load)?;
        let (sender, commands) = mpsc::channel(COMMANDS);
        app.metrics.engine(engine.stats());
        let base = Base {
            context: engine.context(),
            tokenizer,
            vocabulary,
            hidden_size,
            template: served.template,
            tool_template: served.tool_template,
            engine: EngineHandle { commands: sender },
            grammars,
            tokens,
            loader,
        };
        let now = unix_now();
        let mut models = vec![Model::new(served.name, base, now)];
        for (name, adapter) in served.adapters {
            let adapted = Model::adapted(&models[0], name, adapter, now);
            models.push(adapted.map_err(|error| ServeError::Load(error.into()))?);
        }
        app.put(models);
        Ok(EngineThread {
            budget: Budget::new(most, app.options.inter_token_target),
            app: app.clone(),
            engine,
            commands,
            tracked: HashMap::new(),
        })
    }

    /// Steps until the server ends.
    pub fn run(mut self) -> Result<(), ServeError> {
        let mut failures = 0;
        // The end of the last step, where another one follows at once.
        let mut ended: Option<Instant> = None;
        loop {
            if self.engine.is_idle() {
                ended = None;
                self.app.metrics.engine(self.engine.stats());
                match self.commands.blocking_recv() {
                    Some(Command::Submit(submission)) => self.submit(submission),
                    _ => return Ok(()),
                }
            }
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Submit(submission) => self.submit(submission),
                    Command::End => return Ok(()),
                }
            }
            self.cancel_abandoned();
            if self.engine.is_idle() {
                continue;
            }
            let busy = self
                .tracked
                .values()
                .any(|t| t.samples.iter().any(|s| s.first.is_some()));
            self.engine.set_token_budget(self.budget.tokens(busy));
            let start = Instant::now();
            match self.engine.step() {
                Ok(step) => {
                    failures = 0;
                    let time = start.elapsed();
                    let between = ended.map_or(Duration::ZERO, |ended| start - ended);
                    ended = Some(start + time);
                    self.budget.learn(step.tokens, time);
                    self.app.metrics.token_budget(self.budget.tokens(true));
                    self.app.metrics.step(&step, time, between);
                    self.report(step, start);
                }
                Err(error) => {
                    tracing::error!(%error, "a step has failed; its requests are given up");
                    self.give_up(&error);
                    failures += 1;
                    if failures == MOST_FAILURES {
                        let reason = error.to_string();
                        return Err(ServeError::Engine { reason });
                    }
                }
            }
            self.app.metrics.engine(self.engine.stats());
        }
    }

    fn submit(&mut self, submission: Submission) {
        if submission.events.is_closed() {
            return;
        }
        let mut ids = Vec::new();
        let mut first = 0;
        for request in submission.requests {
            let tracked = Tracked {
                events: submission.events.clone(),
                closed: submission.closed.clone(),
                first,
                prompt_tokens: request.prompt.len(),
                max_tokens: request.max_new_tokens,
                arrived: submission.arrived,
                begun: None,
                samples: vec![Sample::default(); request.samples],
                open: request.samples,
            };
            first += request.samples;
            match self.engine.submit(request) {
                Ok(id) => {
                    ids.push(id);
                    self.tracked.insert(id, tracked);
                }
                Err(error) => {
                    for id in ids {
                        self.engine.cancel(id);
                        self.tracked.remove(&id);
                    }
                    let refusal = match &error {
                        InferError::Busy { waiting } => {
                            self.app.metrics.rejected();
                            Refusal::busy(format!(
                                "{waiting} requests are waiting already: try again later"
                            ))
                        }
                        other => Refusal::of_infer(other),
                    };
                    let _ = submission.reply.send(Err(refusal));
                    return;
                }
            }
        }
        // Where the asker is gone by now, the next look at the channel finds out.
        let _ = submission.reply.send(Ok(()));
    }

    /// Takes back requests whose askers are gone, and samples that have enough.
    fn cancel_abandoned(&mut self) {
        let metrics = &self.app.metrics;
        self.tracked.retain(|&id, tracked| {
            if tracked.events.is_closed() {
                self.engine.cancel(id);
                for sample in tracked.samples.iter().filter(|sample| !sample.ended) {
                    metrics.finished(&tracked.came_to(sample, Finished::ABORT));
                }
                return false;
            }
            // Mostly there is none.
            let closed: Vec<usize> = {
                let mut closed = tracked.closed.lock().expect("a list");
                let own = tracked.first..tracked.first + tracked.samples.len();
                closed
                    .extract_if(.., |sample| own.contains(sample))
                    .collect()
            };
            for index in closed {
                let sample = index - tracked.first;
                if !tracked.samples[sample].ended {
                    self.engine.cancel_sample(id, sample);
                    // An answer that ended by a stop string is complete.
                    tracked.end(sample, Finished::STOP, metrics);
                }
            }
            tracked.open > 0
        });
    }

    fn give_up(&mut self, error: &InferError) {
        for (id, tracked) in std::mem::take(&mut self.tracked) {
            self.engine.cancel(id);
            let failed = Event::Failed {
                id,
                message: error.to_string(),
            };
            let _ = tracked.events.send((tracked.first, failed));
            for sample in tracked.samples.iter().filter(|sample| !sample.ended) {
                self.app
                    .metrics
                    .finished(&tracked.came_to(sample, Finished::ERROR));
            }
        }
    }

    /// Hands out the events of a step.
    fn report(&mut self, step: Step, start: Instant) {
        let now = Instant::now();
        for event in step.events {
            let (id, sample) = address(&event);
            let Some(tracked) = self.tracked.get_mut(&id) else {
                continue;
            };
            match &event {
                Event::Token { .. } => {
                    let times = &mut tracked.samples[sample];
                    let since = times.last.unwrap_or(tracked.arrived);
                    self.app.metrics.token(times.first.is_none(), now - since);
                    times.first.get_or_insert(now);
                    times.last = Some(now);
                    times.generated += 1;
                }
                Event::Finished { reason, .. } => {
                    let reason = match reason {
                        FinishReason::Stop(_) => Finished::STOP,
                        FinishReason::Length | FinishReason::Context => Finished::LENGTH,
                    };
                    tracked.end(sample, reason, &self.app.metrics);
                }
                Event::Failed { .. } => {
                    for sample in 0..tracked.samples.len() {
                        tracked.end(sample, Finished::ERROR, &self.app.metrics);
                    }
                }
                Event::Started { .. } => {
                    tracked.begun.get_or_insert(start);
                }
                Event::Prompt { .. } | Event::Embedding { .. } => {}
            }
            let index = tracked.first + sample;
            let open = tracked.open;
            // Whether the asker is still there is looked at before the next step.
            let _ = tracked.events.send((index, event));
            if open == 0 {
                self.tracked.remove(&id);
            }
        }
    }
}

/// The request and the sample of an event.
fn address(event: &Event) -> (RequestId, usize) {
    match event {
        Event::Token { id, sample, .. } | Event::Finished { id, sample, .. } => (*id, *sample),
        Event::Started { id }
        | Event::Prompt { id, .. }
        | Event::Embedding { id, .. }
        | Event::Failed { id, .. } => (*id, 0),
    }
}

impl Tracked {
    /// A sample has ended; once is enough.
    fn end(&mut self, sample: usize, reason: usize, metrics: &Metrics) {
        if !std::mem::replace(&mut self.samples[sample].ended, true) {
            self.open -= 1;
            metrics.finished(&self.came_to(&self.samples[sample], reason));
        }
    }

    fn came_to(&self, sample: &Sample, reason: usize) -> Finished {
        let now = Instant::now();
        let begun = self.begun.unwrap_or(now);
        Finished {
            reason,
            prompt_tokens: self.prompt_tokens,
            generated: sample.generated,
            max_tokens: self.max_tokens,
            queued: begun - self.arrived,
            prefill: sample.first.map(|first| first - begun),
            decode: sample
                .first
                .zip(sample.last)
                .map(|(first, last)| last - first),
            whole: now - self.arrived,
        }
    }
}

/// How many tokens a step may compute, so that it takes no longer than wanted.
struct Budget {
    most: usize,
    target: Duration,
    /// Seconds a token takes in a step of many, smoothed.
    per_token: Option<f64>,
}

impl Budget {
    fn new(most: usize, target: Duration) -> Self {
        Budget {
            most,
            target,
            per_token: None,
        }
    }

    /// Learns from a step. Steps of few tokens wait for weights, and say nothing about many.
    fn learn(&mut self, tokens: usize, time: Duration) {
        if tokens >= LEAST_BUDGET {
            let seen = time.as_secs_f64() / tokens as f64;
            let before = self.per_token.unwrap_or(seen);
            self.per_token = Some(before + (seen - before) / 4.0);
        }
    }

    /// The tokens of the next step; without running answers nobody waits between two tokens.
    fn tokens(&self, busy: bool) -> usize {
        match self.per_token {
            Some(seconds) if busy => {
                let fit = (self.target.as_secs_f64() / seconds) as usize;
                fit.clamp(LEAST_BUDGET.min(self.most), self.most)
            }
            _ => self.most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_after_the_end_is_too_late() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        for index in 0..2 {
            let id = RequestId(0);
            sender.send((index, Event::Started { id })).unwrap();
        }
        let closed = Arc::default();
        let mut updates = Updates { receiver, closed };
        let now = tokio::time::Instant::now();
        let later = now + Duration::from_secs(60);
        for (deadline, expected) in [(later, Some(0)), (now, None), (later, Some(1))] {
            let next = runtime.block_on(updates.next(deadline));
            assert_eq!(next.ok().map(|(index, _)| index), expected);
        }
    }

    #[test]
    fn steps_are_kept_short_while_answers_run() {
        let mut budget = Budget::new(512, Duration::from_millis(100));
        assert_eq!(budget.tokens(true), 512);
        budget.learn(500, Duration::from_millis(500));
        assert_eq!((budget.tokens(true), budget.tokens(false)), (100, 512));
        // A step of few tokens says nothing.
        budget.learn(2, Duration::from_millis(500));
        assert_eq!(budget.tokens(true), 100);
        for _ in 0..50 {
            budget.learn(64, Duration::from_secs(5));
        }
        assert_eq!(budget.tokens(true), LEAST_BUDGET);
        for _ in 0..50 {
            budget.learn(512, Duration::from_millis(1));
        }
        assert_eq!(budget.tokens(true), 512);
    }
}
