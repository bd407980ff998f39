//! The scheduler without a model: known schedules, and random ones whose blocks are checked by a memory that computes
//! like a model does, each row from the row before it.
//!
//! The known ones have the figures of OpenVINO GenAI's `tests/cpp/scheduler.cpp` and vLLM's
//! `tests/v1/core/test_scheduler.py`, as far as they make sense here. What differs, and why:
//! - A sequence that makes room gives back all blocks, where OpenVINO keeps the first ones; with the prefix cache the
//!   same blocks are found again. Its last token is computed again too, which their figures leave out.
//! - Prompts are always cut, so vLLM's cases without chunked prefill begin a part of the next prompt early.
//! - Not here: caps for long prompts (`long_prefill_token_threshold`), a cache that grows or evicts inside a sequence,
//!   beam search, and outputs that arrive after a preemption, since a pass ends before the next one is planned.
//! - vLLM never shares a partial block and computes the last block of a known prompt again; here its rows are copied,
//!   and the last token alone is computed, as OpenVINO has it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use windlass_infer::InferError;
use windlass_infer::engine::scheduler::{Arrival, Limits, Next, Plan, Scheduler};
use windlass_infer::engine::{RequestId, SequenceId};
use windlass_tensor::Rng;

fn limits(block_len: usize, blocks: usize, token_budget: usize) -> Limits {
    Limits {
        token_budget,
        max_sequences: 16,
        max_waiting: 1000,
        blocks,
        block_len,
        prefix_cache: false,
    }
}

fn arrival(tokens: Vec<u32>, new_tokens: usize) -> Arrival {
    Arrival {
        most_tokens: tokens.len() + new_tokens,
        tokens,
        samples: 1,
        every_row: false,
        root: 0,
    }
}

/// Distinct tokens for each request.
fn prompt(request: usize, len: usize) -> Vec<u32> {
    (0..len).map(|at| (1000 * request + at) as u32).collect()
}

/// One pass: `(request, tokens, blocks)` of the work, requests that lost their blocks, and those that end after it.
type Pass<'a> = (&'a [(u64, usize, usize)], &'a [u64], &'a [u64]);

fn check(name: &str, limits: Limits, prompts: &[usize], passes: &[Pass<'_>]) {
    let mut scheduler = Scheduler::new(limits).unwrap();
    for (request, &len) in prompts.iter().enumerate() {
        scheduler.submit(arrival(prompt(request, len), 3)).unwrap();
    }
    for (index, (work, preempted, finished)) in passes.iter().enumerate() {
        let plan = scheduler.schedule();
        let got = plan.work.iter();
        let got = got.map(|w| (w.id.request.0, w.tokens, plan.blocks(w).len()));
        assert_eq!(got.collect::<Vec<_>>(), *work, "{name}, pass {index}");
        let lost: Vec<u64> = plan.preempted.iter().map(|id| id.request.0).collect();
        assert_eq!(lost, *preempted, "{name}, pass {index}");
        let ends = plan.work.iter().filter(|w| w.samples > 0).map(|w| w.id);
        let results = ends.map(|id| match finished.contains(&id.request.0) {
            true => (id, Next::Finished),
            false => (id, Next::Token(7)),
        });
        let results: Vec<_> = results.collect();
        scheduler.update(plan, &results);
    }
}

#[test]
fn known_schedules() {
    let cached = |limits| Limits {
        prefix_cache: true,
        ..limits
    };
    check(
        "OpenVINO general",
        limits(4, 6, 32),
        &[8, 8, 8],
        &[
            (&[(0, 8, 2), (1, 8, 2), (2, 8, 2)], &[], &[]),
            (&[(0, 1, 3), (1, 1, 3)], &[2], &[0]),
            (&[(1, 1, 3), (2, 9, 3)], &[], &[]),
        ],
    );
    check(
        "OpenVINO append slots",
        limits(4, 5, 32),
        &[8, 8],
        &[
            (&[(0, 8, 2), (1, 8, 2)], &[], &[]),
            (&[(0, 1, 3)], &[1], &[]),
        ],
    );
    let partly = |again| -> Vec<Pass<'static>> {
        vec![
            (&[(0, 11, 3), (1, 8, 2)], &[], &[]),
            (&[(0, 1, 3), (1, 1, 3)], &[], &[]),
            (&[(0, 1, 4)], &[1], &[0]),
            (again, &[], &[]),
        ]
    };
    let name = "OpenVINO partial preemption";
    check(name, limits(4, 6, 32), &[11, 8], &partly(&[(1, 10, 3)]));
    let limit = cached(limits(4, 6, 32));
    check(name, limit, &[11, 8], &partly(&[(1, 2, 3)]));
    let prompts = |again| -> Vec<Pass<'static>> {
        vec![
            (&[(0, 12, 3), (1, 12, 3)], &[], &[]),
            (&[(0, 1, 4)], &[1], &[0]),
            (again, &[], &[]),
        ]
    };
    let name = "OpenVINO partially preempted prompt";
    check(name, limits(4, 6, 32), &[12, 12], &prompts(&[(1, 13, 4)]));
    let limit = cached(limits(4, 6, 32));
    check(name, limit, &[12, 12], &prompts(&[(1, 5, 4)]));
    check(
        "vLLM three prompts at once",
        limits(16, 1000, 1024),
        &[800, 800, 800],
        &[
            (&[(0, 800, 50), (1, 224, 14)], &[], &[]),
            (&[(0, 1, 51), (1, 576, 50), (2, 447, 28)], &[], &[]),
            (&[(0, 1, 51), (1, 1, 51), (2, 353, 50)], &[], &[]),
        ],
    );
    let all: Vec<(u64, usize, usize)> = (0..10).map(|id| (id, 10, 1)).collect();
    let limit = limits(16, 1000, 8192);
    check("vLLM schedule", limit, &[10; 10], &[(&all, &[], &[])]);
    check(
        "vLLM order: short prompts do not overtake",
        Limits {
            max_sequences: 3,
            ..limits(16, 1000, 1024)
        },
        &[800, 800, 10, 10],
        &[
            (&[(0, 800, 50), (1, 224, 14)], &[], &[]),
            (&[(0, 1, 51), (1, 576, 50), (2, 10, 1)], &[], &[]),
            (&[(0, 1, 51), (1, 1, 51), (2, 1, 1)], &[], &[2]),
            (&[(0, 1, 51), (1, 1, 51), (3, 10, 1)], &[], &[]),
        ],
    );
    check(
        "vLLM preemption",
        limits(16, 10, 100),
        &[80, 80],
        &[
            (&[(0, 80, 5), (1, 20, 2)], &[], &[]),
            (&[(0, 1, 6)], &[1], &[]),
            (&[(0, 1, 6)], &[], &[0]),
            (&[(1, 80, 5)], &[], &[]),
        ],
    );
    check(
        "vLLM chunks",
        limits(16, 1000, 256),
        &[500],
        &[
            (&[(0, 256, 16)], &[], &[]),
            (&[(0, 244, 32)], &[], &[]),
            (&[(0, 1, 32)], &[], &[]),
        ],
    );
    check(
        "vLLM a decode beside a prompt",
        limits(16, 1000, 50),
        &[20, 80],
        &[
            (&[(0, 20, 2), (1, 30, 2)], &[], &[]),
            (&[(0, 1, 2), (1, 49, 5)], &[], &[]),
            (&[(0, 1, 2), (1, 1, 5)], &[], &[]),
        ],
    );
    check(
        "vLLM capacity",
        limits(16, 1000, 200),
        &[200, 200],
        &[
            (&[(0, 200, 13)], &[], &[]),
            (&[(0, 1, 13), (1, 199, 13)], &[], &[]),
            (&[(0, 1, 13), (1, 1, 13)], &[], &[]),
        ],
    );
    check(
        "FastGen: a prompt waits until all of it has room, and holds back those behind it",
        limits(4, 6, 32),
        &[12, 16, 4],
        &[
            (&[(0, 12, 3)], &[], &[]),
            (&[(0, 1, 4)], &[], &[0]),
            (&[(1, 16, 4), (2, 4, 1)], &[], &[]),
        ],
    );
    check(
        "A budget of one",
        limits(4, 6, 1),
        &[2, 2],
        &[
            (&[(0, 1, 1)], &[], &[]),
            (&[(0, 1, 1)], &[], &[]),
            (&[(0, 1, 1)], &[], &[0]),
            (&[(1, 1, 1)], &[], &[]),
        ],
    );
}

/// Tokens of each pass of conversations, in which every turn repeats all before it and adds `more` tokens.
fn turns(limits: Limits, conversations: usize, more: usize, answer: usize) -> Vec<Vec<usize>> {
    let mut scheduler = Scheduler::new(limits).unwrap();
    let mut history: Vec<u32> = Vec::new();
    let mut turns = Vec::new();
    for turn in 0..10 {
        history.extend(prompt(turn, if turn == 0 { 8 } else { more }));
        for _ in 0..conversations {
            let next = arrival(history.clone(), answer);
            scheduler.submit(next).unwrap();
        }
        let mut passes = Vec::new();
        while !scheduler.is_idle() {
            let plan = scheduler.schedule();
            passes.push(plan.tokens());
            let next = match passes.len() == answer {
                true => Next::Finished,
                false => Next::Token(passes.len() as u32),
            };
            let results: Vec<_> = plan.work.iter().map(|w| (w.id, next)).collect();
            scheduler.update(plan, &results);
        }
        history.extend(1..=answer as u32);
        turns.push(passes);
    }
    turns
}

#[test]
fn a_turn_of_a_conversation_computes_what_is_new() {
    let cached = |block_len| Limits {
        prefix_cache: true,
        ..limits(block_len, 100, 32)
    };
    for (block_len, conversations, more, answer) in
        [(4, 1, 8, 11), (4, 2, 8, 11), (32, 1, 0, 1), (16, 2, 3, 5)]
    {
        let turns = turns(cached(block_len), conversations, more, answer);
        for (turn, passes) in turns.iter().enumerate() {
            // The last token of an answer is not computed before the next turn.
            let first = if turn == 0 { 8 } else { more + 1 };
            let mut expected = vec![conversations; answer];
            expected[0] = conversations * first;
            assert_eq!(*passes, expected, "blocks of {block_len}, turn {turn}");
        }
    }
}

#[test]
fn what_a_scheduler_cannot_do_is_refused() {
    let mut scheduler = Scheduler::new(Limits {
        max_waiting: 2,
        max_sequences: 3,
        ..limits(4, 6, 32)
    })
    .unwrap();
    let refused = [
        (arrival(vec![], 3), "empty"),
        (arrival(vec![1; 20], 5), "may come to 25 tokens"),
        (
            Arrival {
                samples: 4,
                ..arrival(vec![1], 1)
            },
            "--samples 4",
        ),
        (
            Arrival {
                samples: 0,
                ..arrival(vec![1], 1)
            },
            "--samples 0",
        ),
    ];
    for (arrival, expected) in refused {
        let error = scheduler.submit(arrival).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.hint().is_some());
    }
    for _ in 0..2 {
        scheduler.submit(arrival(vec![1; 20], 4)).unwrap();
    }
    let busy = scheduler.submit(arrival(vec![1], 1)).unwrap_err();
    assert!(matches!(busy, InferError::Busy { waiting: 2 }));
}

/// The state after a token, by the state before it: what a model's keys and values depend on.
fn mix(state: u64, token: u32) -> u64 {
    let mut word = state ^ u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    windlass_tensor::rng::splitmix64(&mut word)
}

/// The next token of a sample, or its end.
fn next(state: u64, sample: usize, left: usize) -> Next {
    let token = (mix(state, sample as u32) % 6) as u32;
    match left == 0 || token == 5 {
        true => Next::Finished,
        false => Next::Token(token),
    }
}

/// Blocks of rows, each row with the state after its token.
struct Memory {
    block_len: usize,
    rows: Vec<u64>,
}

impl Memory {
    /// Does what a pass does, and returns the state after each work's last token.
    fn run(&mut self, scheduler: &Scheduler, plan: &Plan) -> Vec<u64> {
        let len = self.block_len;
        for &(from, to) in &plan.copies {
            let from = from as usize * len;
            self.rows.copy_within(from..from + len, to as usize * len);
        }
        let slot = |blocks: &[u32], at: usize| blocks[at / len] as usize * len + at % len;
        for work in &plan.work {
            let (blocks, tokens) = (plan.blocks(work), scheduler.tokens(work.id).unwrap());
            let new = tokens.iter().enumerate().skip(work.start).take(work.tokens);
            for (at, &token) in new {
                let before = at
                    .checked_sub(1)
                    .map_or(0, |at| self.rows[slot(blocks, at)]);
                self.rows[slot(blocks, at)] = mix(before, token);
            }
        }
        let states = plan.work.iter().map(|work| {
            // All rows that the work reads, after all writing.
            let (blocks, tokens) = (plan.blocks(work), scheduler.tokens(work.id).unwrap());
            let mut state = 0;
            for (at, token) in tokens[..work.start + work.tokens].iter().enumerate() {
                state = mix(state, *token);
                assert_eq!(self.rows[slot(blocks, at)], state, "{:?} at {at}", work.id);
            }
            state
        });
        states.collect()
    }
}

/// A request, and what each of its samples gets alone.
#[derive(Clone)]
struct Wish {
    arrival: Arrival,
    new_tokens: usize,
    texts: Vec<Vec<u32>>,
}

impl Wish {
    fn new(arrival: Arrival, new_tokens: usize) -> Self {
        let start = arrival.tokens.iter().fold(0, |state, &t| mix(state, t));
        let texts = (0..arrival.samples).map(|sample| {
            let (mut state, mut text) = (start, Vec::new());
            while let Next::Token(token) = next(state, sample, new_tokens - text.len()) {
                text.push(token);
                state = mix(state, token);
            }
            text
        });
        Wish {
            texts: texts.collect(),
            arrival,
            new_tokens,
        }
    }

    fn random(rng: &mut Rng, limits: &Limits, before: Option<&Wish>) -> Self {
        let capacity = limits.blocks * limits.block_len;
        let new_tokens = rng.below(capacity.min(12) as u64) as usize;
        let longest = capacity - new_tokens;
        let mut tokens: Vec<u32> = match before {
            Some(before) => [&before.arrival.tokens[..], &before.texts[0], &[9]].concat(),
            // Few different texts, so that many begin alike.
            None => {
                let (same, other) = (rng.below(30), rng.below(3));
                let token = |at| at / 7 + if at < same { 0 } else { other };
                (0..30).map(|at| token(at) as u32).collect()
            }
        };
        tokens.truncate(1 + rng.below(longest as u64) as usize);
        let arrival = Arrival {
            most_tokens: tokens.len() + new_tokens,
            tokens,
            samples: 1 + rng.below(limits.max_sequences.min(3) as u64) as usize,
            every_row: rng.below(5) == 0,
            root: rng.below(2),
        };
        Wish::new(arrival, new_tokens)
    }
}

/// A world of random requests, and what must hold in it at every pass.
struct World {
    limits: Limits,
    scheduler: Scheduler,
    memory: Memory,
    wishes: BTreeMap<RequestId, Wish>,
    running: BTreeSet<SequenceId>,
    waiting: BTreeSet<SequenceId>,
    texts: BTreeMap<SequenceId, Vec<u32>>,
    delivered: BTreeMap<SequenceId, usize>,
    tight: bool,
    time: Duration,
    passes: usize,
}

impl World {
    fn new(limits: Limits) -> Self {
        World {
            scheduler: Scheduler::new(limits.clone()).unwrap(),
            memory: Memory {
                block_len: limits.block_len,
                rows: vec![0; limits.blocks * limits.block_len],
            },
            limits,
            wishes: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            texts: BTreeMap::new(),
            delivered: BTreeMap::new(),
            tight: false,
            time: Duration::ZERO,
            passes: 0,
        }
    }

    fn submit(&mut self, wish: Wish) {
        let request = self.scheduler.submit(wish.arrival.clone()).unwrap();
        self.waiting.insert(SequenceId { request, sample: 0 });
        self.wishes.insert(request, wish);
    }

    fn cancel(&mut self, request: RequestId) {
        self.scheduler.cancel(|id| id.request == request);
        self.tight &= !self.running.iter().any(|id| id.request == request);
        self.running.retain(|id| id.request != request);
        self.waiting.retain(|id| id.request != request);
    }

    fn pass(&mut self) {
        let before = self.running.clone();
        let start = Instant::now();
        let plan = self.scheduler.schedule();
        self.time += start.elapsed();
        self.passes += 1;
        self.follow(&plan);
        self.check(&plan, &before);
        let states = self.memory.run(&self.scheduler, &plan);
        let mut results = Vec::new();
        for (work, state) in plan.work.iter().zip(states) {
            let wish = &self.wishes[&work.id.request];
            for sample in work.id.sample..work.id.sample + work.samples {
                let id = SequenceId { sample, ..work.id };
                self.running.insert(id);
                let rows = self.delivered[&work.id];
                self.delivered.insert(id, rows);
                let text = self.texts.entry(id).or_default();
                let next = next(state, sample, wish.new_tokens - text.len());
                match next {
                    Next::Token(token) => text.push(token),
                    Next::Finished => {
                        assert_eq!(*text, wish.texts[sample], "{id:?}");
                        assert!(self.running.remove(&id));
                        self.tight = false;
                    }
                }
                results.push((id, next));
            }
        }
        let start = Instant::now();
        self.scheduler.update(plan, &results);
        self.time += start.elapsed();
        let counts = self.scheduler.counts();
        let sizes = (self.running.len(), self.waiting.len());
        assert_eq!((counts.running, counts.waiting), sizes);
    }

    /// Moves sequences between the two sets as the plan says.
    fn follow(&mut self, plan: &Plan) {
        for id in &plan.preempted {
            assert!(self.running.remove(id), "{id:?} did not run");
            assert!(self.running.last() < Some(id), "{id:?} is not the youngest");
            self.waiting.insert(*id);
            self.tight = true;
        }
        for (id, cached) in &plan.admitted {
            assert_eq!(
                self.waiting.pop_first(),
                Some(*id),
                "the oldest is let in first"
            );
            assert!(!self.tight, "{id:?} is let in where blocks are missing");
            self.running.insert(*id);
            let wish = &self.wishes[&id.request];
            let delivered = self.delivered.get(id).copied().unwrap_or(0);
            assert!(!wish.arrival.every_row || *cached <= delivered);
        }
    }

    fn check(&mut self, plan: &Plan, before: &BTreeSet<SequenceId>) {
        let budget = self.limits.token_budget;
        assert!(
            (1..=budget).contains(&plan.tokens()),
            "{} tokens",
            plan.tokens()
        );
        let working: BTreeSet<SequenceId> = plan.work.iter().map(|w| w.id).collect();
        assert_eq!(
            working.len(),
            plan.work.len(),
            "a sequence is in a pass once"
        );
        assert!(working.is_subset(&self.running));
        if plan.tokens() < budget {
            assert_eq!(
                working, self.running,
                "budget is left, and a sequence has no work"
            );
            self.check_queue();
        }
        // Of those that miss one token the oldest come first, then those that miss more.
        let single = |w: &&windlass_infer::engine::scheduler::Work| {
            before.contains(&w.id) && self.scheduler.tokens(w.id).unwrap().len() - w.start == 1
        };
        let first: Vec<SequenceId> = plan.work.iter().take_while(single).map(|w| w.id).collect();
        assert_eq!(plan.work.iter().filter(single).count(), first.len());
        assert!(first.is_sorted() && plan.work[first.len()..].is_sorted_by_key(|w| w.id));
        for work in &plan.work {
            let delivered = self.delivered.entry(work.id).or_default();
            if self.wishes[&work.id.request].arrival.every_row {
                assert!(work.start <= *delivered, "rows of {:?} left out", work.id);
            }
            *delivered = (*delivered).max(work.start + work.tokens);
            let all = self.scheduler.tokens(work.id).unwrap().len();
            assert_eq!(work.samples > 0, work.start + work.tokens == all);
        }
    }

    /// Who waits though budget is left has no room.
    fn check_queue(&self) {
        let Some(first) = self.waiting.first() else {
            return;
        };
        let counts = self.scheduler.counts();
        let tokens = self.scheduler.tokens(*first).unwrap().len();
        let room = counts.blocks - counts.blocks_used >= tokens.div_ceil(self.limits.block_len);
        let samples = |id: &SequenceId| match self.texts.contains_key(id) {
            true => 1,
            false => self.wishes[&id.request].arrival.samples,
        };
        let places: usize = self.running.iter().map(samples).sum();
        let place = places + samples(first) <= self.limits.max_sequences;
        assert!(
            self.tight || !room || !place,
            "{first:?} waits without a reason"
        );
    }
}

#[test]
fn random_schedules_keep_all_promises() {
    let mut rng = Rng::new(77);
    let (mut passes, mut preempted, mut hits, mut time) = (0, 0, 0, Duration::ZERO);
    while passes < 100_000 {
        let limits = Limits {
            token_budget: *rng.choose(&[1, 2, 3, 7, 20, 1000]),
            max_sequences: 1 + rng.below(6) as usize,
            max_waiting: 100,
            blocks: 1 + rng.below(20) as usize,
            block_len: *rng.choose(&[1, 2, 4, 16]),
            prefix_cache: rng.below(2) == 0,
        };
        let mut world = World::new(limits.clone());
        let mut left = 12;
        let pause = 1 + rng.below(6);
        while left > 0 || !world.scheduler.is_idle() {
            while left > 0 && (world.scheduler.is_idle() || rng.below(pause) == 0) {
                let before = world.wishes.values().last().filter(|_| rng.below(3) == 0);
                let wish = Wish::random(&mut rng, &limits, before);
                world.submit(wish);
                left -= 1;
            }
            if rng.below(30) == 0 {
                let ids: Vec<RequestId> = world.wishes.keys().copied().collect();
                world.cancel(*rng.choose(&ids));
            }
            if !world.scheduler.is_idle() {
                world.pass();
            }
            assert!(world.passes < 10_000, "no end: {limits:?}");
        }
        let counts = world.scheduler.counts();
        assert_eq!(counts.blocks_used, 0);
        assert!(limits.prefix_cache || counts.blocks_cached == 0);
        passes += world.passes;
        preempted += counts.preemptions;
        hits += counts.prefix_hits;
        time += world.time;
    }
    println!(
        "{passes} passes, {preempted} preemptions, {hits} tokens from the cache, {:?} a pass",
        time / passes as u32
    );
    assert!(preempted > 2000 && hits > 5000);
}

/// The time that a pass costs the scheduler when 32 sequences of 1000 tokens run and nothing is left to be let in.
#[test]
fn a_pass_is_planned_in_microseconds() {
    let mut scheduler = Scheduler::new(Limits {
        max_sequences: 32,
        prefix_cache: true,
        ..limits(64, 1000, 2048)
    })
    .unwrap();
    for request in 0..40 {
        scheduler
            .submit(arrival(prompt(request, 1000), 500))
            .unwrap();
    }
    let mut times = Vec::new();
    for pass in 0..400 {
        let start = Instant::now();
        let plan = scheduler.schedule();
        let ends = plan.work.iter().filter(|w| w.samples > 0);
        let results: Vec<_> = ends.map(|w| (w.id, Next::Token(pass))).collect();
        scheduler.update(plan, &results);
        times.push(start.elapsed());
    }
    times.sort();
    println!("median {:?}, worst {:?}", times[200], times[399]);
    assert!(times[200] < Duration::from_millis(1));
}

/// What a row of logits of a large vocabulary costs the sampler.
#[test]
fn a_row_of_logits_is_read_in_microseconds() {
    use windlass_infer::sampler::{Context, Sampler, token_logprobs};
    let mut rng = Rng::new(1);
    let mut logits = vec![0.0; 151_936];
    rng.fill_normal(&mut logits, 0.0, 2.5);
    let mut params = windlass_infer::SamplingParams::greedy();
    let ids: Vec<u32> = (0..1000).map(|at| at * 7).collect();
    for (name, temperature, top_k, top_p, penalty) in [
        ("greedy", 0.0, 0, 1.0, 1.0),
        ("temperature", 0.8, 0, 1.0, 1.0),
        ("top-p", 0.8, 0, 0.95, 1.0),
        ("top-k", 0.8, 40, 0.95, 1.0),
        ("penalty", 0.8, 40, 0.95, 1.1),
    ] {
        params.temperature = temperature;
        (params.top_k, params.top_p, params.repetition_penalty) = (top_k, top_p, penalty);
        let mut sampler = Sampler::new(params.clone()).unwrap();
        let mut times: Vec<Duration> = (0..9)
            .map(|_| {
                let start = Instant::now();
                let context = Context::split(&ids, 500);
                sampler.sample(&logits, context, &mut rng).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        println!("{name}: {:?}", times[4]);
        assert!(times[4] < Duration::from_millis(50));
    }
    let start = Instant::now();
    token_logprobs(&logits, 3, 20);
    println!("logprobs: {:?}", start.elapsed());
}
