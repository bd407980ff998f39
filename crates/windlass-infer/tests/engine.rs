//! The engine on stories260K: what a request gets is what it gets alone, whatever else runs and however little memory
//! there is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;
use windlass_infer::engine::{
    Constraint, Engine, EngineOptions, Event, FinishReason, Pooling, Request, RequestGoal,
    RequestId,
};
use windlass_infer::workload::Workload;
use windlass_infer::{
    GenerateOptions, Generator, InferError, LoadIn, LoadedModel, SamplingParams, StopReason,
};
use windlass_model::{Goal, Tokens};
use windlass_store::atomic::RealDisk;
use windlass_store::llama2c::convert;
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Category, Cpu, DType, Rng, Tape, Tensor};

struct Stories {
    data: PathBuf,
    folder: tempfile::TempDir,
}

impl Stories {
    fn new() -> Option<Self> {
        let Some(data) = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from) else {
            println!("skipped: set WINDLASS_TEST_DATA");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let stories = data.join("models/stories260K");
        let (model, tokens) = (stories.join("stories260K.bin"), stories.join("tok512.bin"));
        convert(&RealDisk, &model, &tokens, folder.path()).unwrap();
        Some(Stories { data, folder })
    }

    fn open(&self, load_in: LoadIn) -> LoadedModel {
        LoadedModel::open_in(&Cpu::new(2), self.folder.path(), None, load_in).unwrap()
    }

    /// Ids of the beginning of a text that the model was not trained on.
    fn ids(&self, model: &LoadedModel, count: usize) -> Vec<u32> {
        let path = self.data.join("corpora/tinystories/val_decoded.txt");
        let text = std::fs::read_to_string(path).unwrap();
        let text = &text[..text.floor_char_boundary(8 * count)];
        let mut ids = model.encode(text).unwrap();
        ids.truncate(count);
        assert_eq!(ids.len(), count);
        ids
    }
}

/// A request that can be made more than once, and its samples by [`Generator`].
struct Known {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    seed: u64,
    samples: usize,
    max_new_tokens: usize,
    stop_tokens: Vec<u32>,
    expected: Vec<(Vec<u32>, FinishReason)>,
}

impl Known {
    fn request(&self) -> Request {
        Request {
            sampling: self.sampling.clone(),
            seed: self.seed,
            samples: self.samples,
            max_new_tokens: self.max_new_tokens,
            stop_tokens: self.stop_tokens.clone(),
            ..Request::new(self.prompt.clone())
        }
    }

    fn generate(mut self, model: &LoadedModel) -> Known {
        for sample in 0..self.samples as u64 {
            let options = GenerateOptions {
                sampling: self.sampling.clone(),
                max_tokens: self.max_new_tokens,
                seed: self.seed + sample,
                stop_at_end: !self.stop_tokens.is_empty(),
                ..GenerateOptions::default()
            };
            let mut generator = Generator::new(model, options).unwrap();
            let alone = generator.generate(&self.prompt, &mut |_| {}).unwrap();
            let mut ids = alone.ids;
            let reason = match alone.stop {
                StopReason::Eos => FinishReason::Stop(ids.pop()),
                StopReason::MaxTokens => FinishReason::Length,
                StopReason::Context => FinishReason::Context,
                other => panic!("{other:?}"),
            };
            self.expected.push((ids, reason));
        }
        self
    }
}

/// Requests of all kinds; several begin alike, and some continue the answer to another one.
fn requests(stories: &Stories, model: &LoadedModel, count: usize) -> Vec<Known> {
    let mut rng = Rng::new(12);
    let texts: Vec<Vec<u32>> = vec![
        stories.ids(model, 240),
        model
            .encode(&"Once upon a time there was a dog. ".repeat(20))
            .unwrap(),
        stories.ids(model, 400)[300..].to_vec(),
    ];
    let end = model.tokenizer().unwrap().eos().to_vec();
    let mut known: Vec<Known> = Vec::new();
    for index in 0..count {
        let turn = (index % 4 == 3).then(|| &known[index - 1]);
        let prompt = match turn {
            Some(before) => {
                let answer = &before.expected[0].0;
                let more = &texts[0][7..7 + rng.below(20) as usize + 1];
                [&before.prompt, answer, more].concat()
            }
            None => {
                let text = rng.choose(&texts);
                text[..1 + rng.below(text.len() as u64 - 1) as usize].to_vec()
            }
        };
        let sampled = SamplingParams {
            temperature: 0.9,
            top_k: [0, 20][index / 2 % 2],
            top_p: [1.0, 0.9][index / 4 % 2],
            repetition_penalty: [1.0, 1.2][index / 3 % 2],
            presence_penalty: [0.0, 0.3][index / 5 % 2],
            ..SamplingParams::default()
        };
        let request = Known {
            prompt,
            sampling: match index % 2 {
                0 => SamplingParams::greedy(),
                _ => sampled,
            },
            seed: rng.below(5),
            samples: [1, 1, 1, 3, 1, 2][index % 6],
            max_new_tokens: 1 + rng.below(40) as usize,
            stop_tokens: if index % 5 == 0 { vec![] } else { end.clone() },
            expected: Vec::new(),
        };
        known.push(request.generate(model));
    }
    known
}

/// What a sample has been given so far.
type Texts = BTreeMap<(RequestId, usize), (Vec<u32>, Option<FinishReason>)>;

fn collect(texts: &mut Texts, events: Vec<Event>) {
    for event in events {
        match event {
            Event::Token {
                id, sample, token, ..
            } => {
                texts.entry((id, sample)).or_default().0.push(token);
            }
            Event::Finished {
                id,
                sample,
                reason,
                new_tokens,
                ..
            } => {
                let text = texts.entry((id, sample)).or_default();
                assert_eq!(text.1.replace(reason), None, "ended twice");
                let stopped = usize::from(matches!(reason, FinishReason::Stop(Some(_))));
                assert_eq!(new_tokens, text.0.len() + stopped);
            }
            Event::Started { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Runs requests that come in a random order at random times; some are cancelled on the way.
fn run(engine: &mut Engine, known: &[Known], rng: &mut Rng, name: &str) {
    let mut order: Vec<usize> = (0..known.len()).collect();
    rng.shuffle(&mut order);
    let mut texts = Texts::new();
    let mut sent: Vec<(RequestId, usize)> = Vec::new();
    let mut cancelled = Vec::new();
    let gap = 1 + rng.below(12);
    while !order.is_empty() || !engine.is_idle() {
        while !order.is_empty() && (engine.is_idle() || rng.below(gap) == 0) {
            let index = order.pop().unwrap();
            let id = engine.submit(known[index].request()).unwrap();
            sent.push((id, index));
        }
        let step = engine.step().unwrap();
        assert!(step.tokens > 0, "{name}: a pass without work");
        collect(&mut texts, step.events);
        if rng.below(40) == 0 {
            let (id, _) = *rng.choose(&sent);
            engine.cancel(id);
            cancelled.push(id);
        }
    }
    for (id, index) in sent {
        let gone = cancelled.contains(&id);
        for (sample, (expected, reason)) in known[index].expected.iter().enumerate() {
            let (text, end) = texts.remove(&(id, sample)).unwrap_or_default();
            let case = format!("{name}: request {index}, sample {sample}");
            assert!(
                expected.starts_with(&text),
                "{case}: {text:?} of {expected:?}"
            );
            if !gone || end.is_some() {
                assert_eq!((&text, end), (expected, Some(*reason)), "{case}");
            }
        }
    }
    let counts = engine.stats().scheduler;
    assert_eq!(
        (counts.running, counts.waiting, counts.blocks_used),
        (0, 0, 0)
    );
}

#[test]
fn a_request_gets_what_it_gets_alone() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let packed = LoadIn::Packed(Layout::q8());
    let most = usize::MAX;
    for (weights, load_in, kv_type, budgets) in [
        ("f32", LoadIn::AsStored, None, &[1, 3, 7, 64, most][..]),
        ("q8", packed, None, &[5, most]),
        ("q8, int8 keys and values", packed, Some(KvType::Int8), &[9]),
    ] {
        let mut model = stories.open(load_in);
        model.kv_type = kv_type.unwrap_or(model.kv_type);
        let known = requests(&stories, &model, 24);
        let longest = known.iter().map(|k| k.prompt.len() + k.max_new_tokens);
        let longest = longest.max().unwrap();
        let mut rng = Rng::new(3);
        let (mut preempted, mut hits) = (0, 0);
        for &token_budget in budgets {
            for prefix_cache in [false, true] {
                for kv_tokens in [longest, 2 * longest, 100_000] {
                    let name = format!("{weights}, {token_budget}, {prefix_cache}, {kv_tokens}");
                    let options = EngineOptions {
                        token_budget,
                        max_sequences: 3 + rng.below(6) as usize,
                        kv_tokens,
                        prefix_cache,
                        ..EngineOptions::default()
                    };
                    let mut engine = Engine::new(model, options).unwrap();
                    run(&mut engine, &known, &mut rng, &name);
                    let stats = engine.stats();
                    preempted += stats.scheduler.preemptions;
                    hits += stats.scheduler.prefix_hits;
                    assert_eq!(stats.scheduler.prefix_hits > 0, prefix_cache, "{name}");
                    model = engine.into_model();
                }
            }
        }
        println!("{weights}: {preempted} preemptions, {hits} tokens from the cache");
        assert!(preempted > 10 && hits > 1000);
    }
}

/// All events of requests that are sent together.
fn events(engine: &mut Engine, requests: Vec<Request>) -> (Vec<RequestId>, Vec<Event>) {
    let ids = requests.into_iter().map(|r| engine.submit(r).unwrap());
    let ids: Vec<RequestId> = ids.collect();
    let mut events = Vec::new();
    while !engine.is_idle() {
        events.extend(engine.step().unwrap().events);
    }
    assert_eq!(engine.stats().scheduler.blocks_used, 0);
    (ids, events)
}

/// What the layers themselves give for a text: logits of each row, or hidden states.
fn direct(model: &LoadedModel, ids: &[u32], hidden: bool) -> Vec<Vec<f64>> {
    let cpu = model.store.cpu();
    let rows = (0..ids.len() as u32).collect();
    let goal = match hidden {
        true => Goal::Hidden { rows },
        false => Goal::Logits { rows },
    };
    let batch = Tokens::new(ids.to_vec(), &[ids.len()], goal, model.dtype);
    let mut x = Tensor::empty(cpu, [0], DType::F32, Category::Activations);
    for (unit, layer) in model.model.layers() {
        let mut tape = Tape::inference(cpu);
        let input = tape.input(x);
        let weights = model.store.gather(unit).unwrap();
        x = layer.forward(&weights, input, &batch, &mut tape).tensor;
    }
    x.to_f64().chunks(x.cols()).map(<[f64]>::to_vec).collect()
}

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l - sum.ln()).collect()
}

#[test]
fn prompts_are_scored_and_embedded_in_parts() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let mut model = stories.open(LoadIn::AsStored);
    let ids = stories.ids(&model, 150);
    let logprobs: Vec<Vec<f64>> = direct(&model, &ids, false)
        .iter()
        .map(|l| log_softmax(l))
        .collect();
    let states = direct(&model, &ids, true);
    let close = |a: f64, b: f64| (a - b).abs() < 1e-4 * b.abs().max(1.0);
    for (token_budget, kv_tokens) in [(1000, 10_000), (40, 192), (7, 256)] {
        let options = EngineOptions {
            token_budget,
            kv_tokens,
            ..EngineOptions::default()
        };
        let mut engine = Engine::new(model, options).unwrap();
        for round in 0..2 {
            let mean = RequestGoal::Embed(Pooling::Mean);
            let last = RequestGoal::Embed(Pooling::Last);
            let requests = vec![
                Request {
                    prompt_logprobs: Some(3),
                    max_new_tokens: 0,
                    ..Request::new(ids.clone())
                },
                Request {
                    goal: mean,
                    ..Request::new(ids.clone())
                },
                Request {
                    goal: last,
                    ..Request::new(ids.clone())
                },
                Request {
                    prompt_logprobs: Some(0),
                    logprobs: Some(2),
                    sampling: SamplingParams {
                        temperature: 3.0,
                        ..SamplingParams::default()
                    },
                    max_new_tokens: 5,
                    ..Request::new(ids[..60].to_vec())
                },
            ];
            let (sent, events) = events(&mut engine, requests);
            let case = format!("budget {token_budget}, round {round}");
            let mut drawn = Vec::new();
            let mut seen = [0; 3];
            for event in &events {
                match event {
                    Event::Prompt { id, logprobs: got } => {
                        seen[0] += 1;
                        let (count, top) = if *id == sent[0] { (150, 3) } else { (60, 0) };
                        assert_eq!(got.len(), count - 1, "{case}");
                        for (row, token) in got.iter().enumerate() {
                            let expected = &logprobs[row];
                            assert_eq!((token.token, token.top.len()), (ids[row + 1], top));
                            assert!(close(token.logprob, expected[ids[row + 1] as usize]));
                            let best = expected.iter().copied().fold(f64::MIN, f64::max);
                            assert!(token.top.first().is_none_or(|t| close(t.1, best)));
                        }
                    }
                    Event::Embedding { id, values } => {
                        seen[1] += 1;
                        for (at, value) in values.iter().enumerate() {
                            let expected = match *id == sent[1] {
                                true => states.iter().map(|s| s[at]).sum::<f64>() / 150.0,
                                false => states[149][at],
                            };
                            assert!(close(f64::from(*value), expected), "{case}");
                        }
                    }
                    Event::Token {
                        id,
                        logprobs,
                        token,
                        ..
                    } => {
                        assert_eq!(*id, sent[3]);
                        let logprobs = logprobs.as_ref().unwrap();
                        assert_eq!((logprobs.token, logprobs.top.len()), (*token, 2));
                        assert!(logprobs.top[0].1 >= logprobs.top[1].1.max(logprobs.logprob));
                        drawn.push((*token, logprobs.logprob));
                    }
                    Event::Finished { reason, .. } => {
                        seen[2] += 1;
                        assert_eq!(*reason, FinishReason::Length);
                    }
                    Event::Started { .. } => {}
                    Event::Failed { .. } => panic!("{event:?}"),
                }
            }
            assert_eq!((seen, drawn.len()), ([2, 2, 4], 5), "{case}");
            // The model's own probabilities, not those after the temperature.
            let tokens: Vec<u32> = drawn.iter().map(|d| d.0).collect();
            let text = [&ids[..60], &tokens].concat();
            let rows = direct(engine.model(), &text, false);
            for (at, (token, logprob)) in drawn.iter().enumerate() {
                let expected = log_softmax(&rows[59 + at])[*token as usize];
                assert!(close(*logprob, expected), "{case}: {logprob} {expected}");
            }
        }
        model = engine.into_model();
    }
}

/// Allows tokens of one kind after another, a fixed number of them, and breaks where it is told to.
#[derive(Clone)]
struct Turns {
    masks: [Vec<u32>; 2],
    taken: usize,
    last: usize,
    fails_at: usize,
}

impl Constraint for Turns {
    fn mask(&mut self) -> Result<&[u32], String> {
        match self.taken == self.fails_at {
            true => Err("no more turns".to_owned()),
            false => Ok(&self.masks[self.taken % 2]),
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        let word = self.masks[self.taken % 2][token as usize / 32];
        assert_eq!(word >> (token % 32) & 1, 1, "a token that is not allowed");
        self.taken += 1;
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.taken == self.last
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[test]
fn constraints_stop_tokens_and_limits_end_texts() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(LoadIn::AsStored);
    let prompt = stories.ids(&model, 20);
    let mut engine = Engine::new(model, EngineOptions::default()).unwrap();
    let turns = |last, fails_at| -> Option<Box<dyn Constraint>> {
        // Even and odd ids by turns, all below 256.
        let masks = [vec![0x5555_5555; 8], vec![0xaaaa_aaaa; 8]];
        Some(Box::new(Turns {
            masks,
            taken: 0,
            last,
            fails_at,
        }))
    };
    let base = || Request {
        max_new_tokens: 30,
        seed: 4,
        ..Request::new(prompt.clone())
    };
    let requests = vec![
        Request {
            constraint: turns(9, 99),
            samples: 3,
            ..base()
        },
        Request {
            constraint: turns(99, 5),
            samples: 2,
            ..base()
        },
        // Every token is a stop token: the first one ends the text, or the first after four others.
        Request {
            stop_tokens: (0..512).collect(),
            ..base()
        },
        Request {
            stop_tokens: (256..512).collect(),
            min_new_tokens: 12,
            ..base()
        },
        Request {
            sampling: SamplingParams {
                logit_bias: vec![(77, 1e9)],
                ..SamplingParams::greedy()
            },
            ..base()
        },
    ];
    let (sent, events) = events(&mut engine, requests);
    let mut texts = Texts::new();
    let failed = events.iter().filter(|e| matches!(e, Event::Failed { .. }));
    let failed: Vec<&Event> = failed.collect();
    let message = "no more turns".to_owned();
    assert_eq!(
        failed,
        [&Event::Failed {
            id: sent[1],
            message
        }]
    );
    let rest = events.iter().filter(|e| !matches!(e, Event::Failed { .. }));
    collect(&mut texts, rest.cloned().collect());
    for sample in 0..3 {
        let (text, end) = &texts[&(sent[0], sample)];
        assert_eq!((text.len(), *end), (9, Some(FinishReason::Stop(None))));
        assert!(
            text.iter()
                .enumerate()
                .all(|(at, &id)| id < 256 && id as usize % 2 == at % 2)
        );
    }
    let broken = &texts[&(sent[1], 0)];
    assert_eq!((broken.0.len(), broken.1), (5, None));
    let (text, end) = &texts[&(sent[2], 0)];
    assert!(text.is_empty() && matches!(end, Some(FinishReason::Stop(Some(_)))));
    let (text, end) = &texts[&(sent[3], 0)];
    assert!(
        text.len() >= 12 && text.iter().all(|&id| id < 256),
        "{text:?}"
    );
    assert!(!matches!(end, Some(FinishReason::Context)));
    assert_eq!(texts[&(sent[4], 0)].0, [77; 30]);
}

#[test]
fn requests_that_cannot_be_are_refused_and_cancelled_ones_leave_nothing() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(LoadIn::AsStored);
    let prompt = stories.ids(&model, 200);
    let options = EngineOptions {
        token_budget: 50,
        max_sequences: 4,
        max_waiting: 3,
        kv_tokens: 400,
        ..EngineOptions::default()
    };
    let mut engine = Engine::new(model, options.clone()).unwrap();
    assert_eq!(engine.context(), 448);
    let base = || Request::new(prompt.clone());
    let biased = SamplingParams {
        logit_bias: vec![(512, 1.0)],
        ..SamplingParams::default()
    };
    let refused: [(Request, &str); 7] = [
        (Request::new(vec![]), "the prompt is empty"),
        (Request::new(vec![1, 600]), "token 600"),
        (
            Request {
                stop_tokens: vec![512],
                ..base()
            },
            "token 512",
        ),
        (
            Request {
                sampling: biased,
                ..base()
            },
            "token 512",
        ),
        (Request::new(vec![1; 449]), "has 449 tokens"),
        (
            Request {
                samples: 5,
                ..base()
            },
            "--samples 5",
        ),
        (
            Request {
                samples: 2,
                max_new_tokens: 0,
                ..base()
            },
            "--samples 2",
        ),
    ];
    for (request, expected) in refused {
        let error = engine.submit(request).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.hint().is_some());
    }
    for waiting in 0..3 {
        assert_eq!(engine.stats().scheduler.waiting, waiting);
        engine.submit(base()).unwrap();
    }
    let error = engine.submit(base()).unwrap_err();
    assert!(matches!(error, InferError::Busy { waiting: 3 }), "{error}");
    // At every moment of a life: before it, in the prompt, with samples.
    for steps in 0..12 {
        let request = Request {
            samples: 3,
            ..base()
        };
        for id in (0..1000).map(RequestId) {
            engine.cancel(id);
        }
        assert!(engine.is_idle() && engine.stats().scheduler.blocks_used == 0);
        let id = engine.submit(request).unwrap();
        for _ in 0..steps {
            engine.step().unwrap();
        }
        engine.cancel_sample(id, 1);
        engine.cancel(id);
        assert!(engine.is_idle() && engine.stats().scheduler.blocks_used == 0);
        assert_eq!(engine.step().unwrap().tokens, 0);
    }
    // A sample that ends early leaves the others as they are.
    let id = engine
        .submit(Request {
            samples: 3,
            ..base()
        })
        .unwrap();
    let mut texts = Texts::new();
    while !engine.is_idle() {
        collect(&mut texts, engine.step().unwrap().events);
        if texts.get(&(id, 1)).is_some_and(|t| t.0.len() == 3) {
            engine.cancel_sample(id, 1);
        }
    }
    let lengths = texts.values().map(|t| (t.0.len(), t.1.is_some()));
    assert_eq!(
        lengths.collect::<Vec<_>>(),
        [(16, true), (3, false), (16, true)]
    );
    let mut model = engine.into_model();
    for (change, flag) in [
        (
            (|o| o.token_budget = 0) as fn(&mut EngineOptions),
            "--token-budget 0",
        ),
        (|o| o.max_sequences = 0, "--max-sequences 0"),
        (|o| o.max_waiting = 0, "--max-queue 0"),
        (|o| o.kv_tokens = 0, "--kv-blocks 0"),
    ] {
        let mut options = options.clone();
        change(&mut options);
        let error = Engine::new(model, options).err().unwrap();
        assert!(error.to_string().starts_with(flag), "{error}");
        model = stories.open(LoadIn::AsStored);
    }
}

#[test]
fn a_long_load_takes_no_more_memory_than_a_short_one() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(LoadIn::Packed(Layout::q8()));
    // Less room than the clients want, and prompts that no round repeats: blocks are evicted and taken back.
    let options = EngineOptions {
        token_budget: 64,
        kv_tokens: 1000,
        ..EngineOptions::default()
    };
    let mut engine = Engine::new(model, options).unwrap();
    let mut sizes = Vec::new();
    for round in 0..8 {
        let workload = Workload {
            requests: 40,
            clients: 8,
            prompt_tokens: 80,
            new_tokens: 20,
            spread: 0.3,
            seed: round,
        };
        let start = Instant::now();
        let mut now = || start.elapsed().as_secs_f64();
        let load = workload.drive(&mut engine, &mut now).unwrap();
        assert!(load.tokens_per_step > 8.0 && load.tokens_per_step <= 64.0);
        let memory = &engine.model().store.cpu().memory;
        sizes.push((memory.now().in_use(), memory.peak().in_use()));
        if round == 7 {
            println!("{load:?}");
        }
    }
    println!("bytes in use, and at most: {sizes:?}");
    let counts = engine.stats().scheduler;
    assert!(counts.preemptions > 0 && counts.blocks_used == 0 && counts.blocks_cached > 10);
    assert_eq!(sizes[3], sizes[7]);
}
