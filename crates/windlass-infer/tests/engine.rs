//! The engine on stories260K: what a request gets is what it gets alone, whatever else runs and however little memory
//! there is.

use std::collections::BTreeMap;
use std::path::PathBuf;
use windlass_infer::engine::{
    Constraint, Engine, EngineOptions, Event, FinishReason, Pooling, Request, RequestGoal,
    RequestId,
};
use windlass_infer::{
    GenerateOptions, Generator, InferError, LoadIn, LoadedModel, SamplingParams, StopReason,
};
use windlass_model::{Goal, Tokens};
use windlass_store::atomic::RealDisk;
use windlass_store::llama2c::convert;
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
        model.encode(&"Once upon a time there was a dog. ".repeat(20)).unwrap(),
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
            Event::Token { id, sample, token, .. } => {
                texts.entry((id, sample)).or_default().0.push(token);
            }
            Event::Finished { id, sample, reason, new_tokens, .. } => {
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
            assert!(expected.starts_with(&text), "{case}: {text:?} of {expected:?}");
            if !gone || end.is_some() {
                assert_eq!((&text, end), (expected, Some(*reason)), "{case}");
            }
        }
    }
    let counts = engine.stats().scheduler;
    assert_eq!((counts.running, counts.waiting, counts.blocks_used), (0, 0, 0));
}

#[test]
fn a_request_gets_what_it_gets_alone() {
    let Some(stories) = Stories::new() else {
        return;
    };
    for (weights, load_in) in [("f32", LoadIn::AsStored), ("q8", LoadIn::Packed(Layout::q8()))] {
        let mut model = stories.open(load_in);
        let known = requests(&stories, &model, 24);
        let longest = known.iter().map(|k| k.prompt.len() + k.max_new_tokens);
        let longest = longest.max().unwrap();
        let mut rng = Rng::new(3);
        let (mut preempted, mut hits) = (0, 0);
        for token_budget in [1, 3, 7, 64, usize::MAX] {
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
        assert!(preempted > 100 && hits > 1000);
    }
}
