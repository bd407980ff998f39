//! Samples of every form as tokens that are read or learned, bad data, packing, and runs on them: the same bits when resumed,
//! stopped early, best weights kept.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use windlass_comm::Group;
use windlass_model::{
    Adapter, AdapterConfig, ChatTemplate, DecoderConfig, Goal, Model, Targets, Tokenizer, Tokens,
    decoder,
};
use windlass_store::checkpoint::Checkpoints;
use windlass_store::safetensors::Tensors;
use windlass_store::swap::{AioOptions, SwapFile};
use windlass_store::{Deal, Home, Loader, Placement, Stage, Store, Tier};
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Category, Cpu, DType, FileTensor, Packed, ParamId, Weight, Weights};
use windlass_train::data::Packing;
use windlass_train::preference::Preference;
use windlass_train::schedule::{Decay, Schedule, Warmup};
use windlass_train::tune::{Encoder, Example, Examples, Form, Learned, Long, Report, read_rows};
use windlass_train::{
    End, Engine, EngineOptions, Error, Event, Lessons, Losses, StepShape, Subject, TrainOptions,
    Trainer, plan_batch,
};

const TEMPLATE: &str = "{% for m in messages %}
{% if m.role == 'assistant' %}
A:{% generation %}
{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}
    {%- endgeneration %}

{% else %}
{{ m.role[0] | upper }}:{{ m.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}A:{% endif %}";

/// A token for each byte, and one that ends texts.
fn tokenizer() -> Tokenizer {
    Tokenizer::train(["a"].iter(), 257, "<|end|>").unwrap()
}

fn template(tokenizer: &Tokenizer) -> ChatTemplate {
    let tokens = vec![(
        "eos_token".into(),
        tokenizer.token(tokenizer.eos()[0]).unwrap(),
    )];
    ChatTemplate::new(TEMPLATE, tokens).unwrap()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn encode(
    path: &Path,
    learned: Learned,
    limits: (usize, Long),
) -> Result<(Form, Vec<Vec<Example>>, Report), Error> {
    let tokenizer = tokenizer();
    let rows = read_rows(&[path.to_owned()])?;
    let form = Form::of(&rows)?;
    let samples: Result<Vec<_>, Error> = rows
        .into_iter()
        .map(|row| Ok((row.clone(), form.sample(&row)?)))
        .collect();
    let template = Some(template(&tokenizer));
    let encoder = Encoder::new(&tokenizer, template, learned, limits, None)?;
    let (all, report) = encoder.encode_all(&samples?)?;
    Ok((form, all, report))
}

/// The text of an example, what is learned between brackets.
fn shown(example: &Example) -> String {
    let tokenizer = tokenizer();
    let mut text = String::new();
    let mut inside = false;
    for (at, id) in example.ids.iter().enumerate() {
        if example.learned[at] != inside {
            inside = !inside;
            text.push(if inside { '[' } else { ']' });
        }
        text += &match tokenizer.eos().contains(id) {
            true => "$".into(),
            false => tokenizer.decode(&[*id], false).unwrap(),
        };
    }
    text + if inside { "]" } else { "" }
}

#[test]
fn every_form_says_what_is_learned() {
    use Form::{
        Alpaca, AlpacaPreference, Messages, MessagesUnpaired, Preference, PromptCompletion,
        ShareGpt, ShareGptPreference, Text, Unpaired,
    };
    use Learned::{All, Assistant, Completion, Usual};
    let chat = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
    let check = |name: &str, text: &str, learned: Learned, form: Form, expected: &[&str]| {
        let folder = Folder::new();
        let path = folder.write(name, text);
        let (found, samples, _) = encode(&path, learned, (500, Long::Refuse)).unwrap();
        assert_eq!(found, form, "{text}");
        let shown: Vec<String> = samples.iter().flatten().map(shown).collect();
        assert_eq!(shown, expected, "{text} {learned:?}");
    };
    check(
        "a.jsonl",
        "{\"text\": \"abc\"}\n\n{\"text\": \"d\"}",
        Usual,
        Text,
        &["[abc$]", "[d$]"],
    );
    check("a.csv", "text,n\nabc,1\n", Usual, Text, &["[abc$]"]);
    let pair = r#"[{"prompt": "2+2=", "completion": "4"}]"#;
    check("a.json", pair, Usual, PromptCompletion, &["2+2=[4$]"]);
    check("a.json", pair, All, PromptCompletion, &["[2+2=4$]"]);
    check(
        "a.csv",
        "prompt,completion\n\"1,\",2",
        Usual,
        PromptCompletion,
        &["1,[2$]"],
    );
    check(
        "a.jsonl",
        chat,
        Usual,
        Messages,
        &["[U:hi\nA:yo$\nU:x\nA:y$\n]"],
    );
    check(
        "a.jsonl",
        chat,
        Completion,
        Messages,
        &["U:hi\nA:yo$\nU:x\nA:[y$\n]"],
    );
    check(
        "a.jsonl",
        chat,
        Assistant,
        Messages,
        &["U:hi\nA:[yo$]\nU:x\nA:[y$]\n"],
    );
    let turns = r#"{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "r"}]}"#;
    check(
        "a.jsonl",
        turns,
        Usual,
        PromptCompletion,
        &["U:q\nA:[r$\n]"],
    );
    let alpaca = r#"{"instruction": "do", "input": "it", "output": "done"}"#;
    check(
        "a.jsonl",
        alpaca,
        Usual,
        Alpaca,
        &["U:do\n\nit\nA:[done$\n]"],
    );
    check(
        "a.csv",
        "instruction,input,output\ngo,,gone",
        Usual,
        Alpaca,
        &["U:go\nA:[gone$\n]"],
    );
    let better = r#"{"instruction": "do", "output": "", "chosen": "c", "rejected": "r"}"#;
    check(
        "a.jsonl",
        better,
        Usual,
        AlpacaPreference,
        &["U:do\nA:[c$\n]", "U:do\nA:[r$\n]"],
    );
    let said = r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{\"name\": \"f\"}"}, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "r"}], "tools": "[]"}"#;
    let call = "A:[[{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]$]";
    let text = format!("U:q\n{call}\nT:1\nA:[r$]\n");
    check("a.jsonl", said, Assistant, ShareGpt, &[&text]);
    let two = r#"{"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}}"#;
    check(
        "a.jsonl",
        two,
        Usual,
        ShareGptPreference,
        &["U:q\nA:[c$\n]", "U:q\nA:[r$\n]"],
    );
    let implicit = r#"{"chosen": "why? so", "rejected": "why? no"}"#;
    check(
        "a.jsonl",
        implicit,
        Usual,
        Preference,
        &["why? [so$]", "why? [no$]"],
    );
    let rated = r#"{"prompt": "p", "completion": "c", "label": false}"#;
    check("a.jsonl", rated, Usual, Unpaired, &["p[c$]"]);
    let rated = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}], "label": true}"#;
    check(
        "a.jsonl",
        rated,
        Usual,
        MessagesUnpaired,
        &["U:q\nA:[r$\n]"],
    );
}

#[test]
fn bad_data_is_refused_by_place() {
    let check =
        |name: &str, text: &str, learned: Learned, limits: (usize, Long), words: &[&str]| {
            let folder = Folder::new();
            let path = folder.write(name, text);
            let error = encode(&path, learned, limits).err();
            let error = error.unwrap_or_else(|| panic!("{text} was taken"));
            let text = format!("{error} {}", error.hint().unwrap_or_default());
            words
                .iter()
                .for_each(|word| assert!(text.contains(word), "{word}: {text}"));
        };
    let usual = |name, text, words: &[&str]| {
        check(name, text, Learned::Usual, (100, Long::Cut), words);
    };
    usual(
        "a.jsonl",
        "{\"a\": 1}",
        &["line 1", "columns a", "messages"],
    );
    usual(
        "a.jsonl",
        "{\"text\": \"a\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}",
        &["several forms", "line 2", "one form"],
    );
    usual("a.jsonl", "[1]", &["line 1", "object"]);
    usual("a.jsonl", "", &["empty"]);
    usual("a.txt", "a", &["no table", ".csv"]);
    usual("a.csv", "a,b\n1", &["line 2", "1 fields under 2 names"]);
    usual("a.csv", "text\n\"open", &["line 2", "not closed"]);
    usual(
        "a.jsonl",
        "{\"messages\": [{\"content\": \"x\"}]}",
        &["line 1", "role"],
    );
    usual(
        "a.jsonl",
        "{\"conversations\": [{\"from\": \"cat\", \"value\": \"x\"}]}",
        &["cat"],
    );
    usual(
        "a.jsonl",
        "{\"prompt\": \"p\", \"completion\": \"c\", \"label\": 3}",
        &["label", "3"],
    );
    let empty = "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\", \"completion\": \"\"}\n{\"prompt\": \"b\", \"completion\": \"\"}";
    usual("a.jsonl", empty, &["2 of 3", "line 2", "--max-length"]);
    let long = "{\"text\": \"abcdefghijk\"}";
    check(
        "a.jsonl",
        long,
        Learned::Usual,
        (5, Long::Refuse),
        &["12 tokens", "at most 5", "--long"],
    );
    let tokenizer = tokenizer();
    let plain = ChatTemplate::new("{{ messages }}", Vec::new()).unwrap();
    let limits = (5, Long::Cut);
    let error = Encoder::new(&tokenizer, Some(plain), Learned::Assistant, limits, None);
    let error = error.err().unwrap();
    assert!(error.to_string().contains("{% generation %}"), "{error}");
}

#[test]
fn long_samples_are_cut_or_left_out() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", "{\"text\": \"abcdefgh\"}\n{\"text\": \"ab\"}");
    let (_, samples, report) = encode(&path, Learned::Usual, (4, Long::Cut)).unwrap();
    let shown_all: Vec<String> = samples.iter().flatten().map(shown).collect();
    assert_eq!(shown_all, ["[abcd]", "[ab$]"]);
    assert_eq!(
        (report.cut, report.dropped, &report.lengths[..]),
        (1, 0, &[3, 9][..])
    );
    let (_, samples, report) = encode(&path, Learned::Usual, (4, Long::Drop)).unwrap();
    assert_eq!((samples.len(), report.dropped), (1, 1));
}

/// Samples of different lengths, of which the first tokens are read and the others learned.
fn lessons(count: usize) -> Vec<Vec<Example>> {
    let mut rng = windlass_tensor::Rng::new(3);
    let one = |_| {
        let length = 3 + rng.below(9) as usize;
        vec![Example {
            ids: (0..length).map(|_| rng.below(20) as u32).collect(),
            learned: (0..length).map(|at| at > 1).collect(),
            label: true,
        }]
    };
    (0..count).map(one).collect()
}

/// A tiny model without weights, adapted or not, with a part of its adapters' inputs dropped.
fn declared(adapted: bool, lora_dropout: f64) -> (DecoderConfig, Model<Tokens>, Option<Adapter>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/arch/llama");
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let text = text.replace("\"vocab_size\": 24", "\"vocab_size\": 257");
    let config = DecoderConfig::from_json("config.json", &text).unwrap();
    let mut model = decoder(&config);
    let settings = AdapterConfig {
        r: 4,
        lora_dropout,
        target_modules: Targets::AllLinear,
        ..AdapterConfig::default()
    };
    let adapter = adapted.then(|| model.adapt(config.naming, &settings).unwrap());
    (config, model, adapter)
}

fn subject(adapted: bool) -> Subject {
    let (config, model, adapter) = declared(adapted, 0.1);
    let store = Store::init(&Cpu::new(2), model.units(), DType::F32, 5);
    Subject {
        config,
        tokenizer: tokenizer(),
        model,
        store,
        adapter,
    }
}

/// Packed samples give the loss and the gradients of the samples one by one.
#[test]
fn packed_samples_do_not_see_each_other() {
    let samples = lessons(7);
    let packed = Examples::new(samples.clone(), Some(24));
    assert!(
        packed.len() < 7 && packed.longest() <= 24,
        "{}",
        packed.len()
    );
    assert_eq!(
        packed.tokens(),
        Examples::new(samples.clone(), None).tokens()
    );
    let scored: usize = samples.iter().flatten().map(Example::learned).sum();
    let gradients = |examples: &Examples, micro_batch: usize| {
        let Subject { model, store, .. } = subject(false);
        let options = EngineOptions {
            losses: Losses::Sum,
            ..Default::default()
        };
        let mut engine = Engine::initialize(model, store, options).unwrap();
        let mut sum = 0.0;
        for batch in examples.batches(micro_batch) {
            let goal = Goal::Loss {
                targets: batch.targets.into(),
                denominator: scored as f64,
            };
            let tokens = Tokens::new(batch.ids, &batch.segments, goal, DType::F32);
            let loss = engine.forward(tokens).unwrap();
            sum += loss.value();
            engine.backward(loss).unwrap();
        }
        (sum, engine.global_grad_norm().unwrap())
    };
    let (loss, norm) = gradients(&packed, 1);
    for (examples, micro_batch) in [(Examples::new(samples, None), 1), (packed, 3)] {
        let (other, other_norm) = gradients(&examples, micro_batch);
        assert!((loss - other).abs() < 1e-5 * loss, "{loss} {other}");
        assert!(
            (norm - other_norm).abs() < 1e-5 * norm,
            "{norm} {other_norm}"
        );
    }
}

fn options(out: &Path, steps: u64) -> TrainOptions {
    TrainOptions {
        dtype: DType::F32,
        engine: EngineOptions {
            noise: 3,
            ..EngineOptions::default()
        },
        shape: StepShape {
            micro_batch: 2,
            seq_len: 12,
            gradient_accumulation_steps: 2,
        },
        schedule: Schedule::new(1e-2, 0.1, Warmup::Steps(2), 8, Decay::Cosine)
            .unwrap()
            .into(),
        steps,
        packing: Packing::Documents,
        seed: 5,
        eval_every: Some(2),
        eval_sequences: None,
        save_every: Some(4),
        save_after: None,
        keep: None,
        out: out.to_owned(),
        monitor: Default::default(),
    }
}

/// Weights with those of a checkpoint in place of what is trained.
fn learned(
    model: &Model<Tokens>,
    map: &[FileTensor],
    base: Vec<Weights>,
    folder: &Path,
) -> Vec<Weights> {
    let (cpu, units) = (Cpu::new(2), model.units());
    let name = ["adapter_model.safetensors", "model.safetensors"]
        .map(|name| folder.join(name))
        .into_iter()
        .find(|file| file.is_file());
    // Ranks write a file each.
    let file = Tensors::open(name.as_deref().unwrap_or(folder)).unwrap();
    let mut loader = Loader::new(&cpu, &file, units, map, |_| None);
    let base = base.into_iter().enumerate();
    let unit = |(unit, weights): (usize, Weights)| {
        let slots = units[unit]
            .params
            .iter()
            .zip(weights.into_vec())
            .enumerate();
        let weights = slots.map(|(slot, (param, old))| match param.trained {
            true => {
                let id = ParamId { unit, slot };
                let new = loader.read(id, 0..param.shape.len(), DType::F32).unwrap();
                new.reshape(param.shape).into()
            }
            false => old,
        });
        Weights::new(weights.collect())
    };
    base.map(unit).collect()
}

fn trainer(out: &Path, steps: u64, patience: Option<u64>, resume: bool) -> Trainer {
    let (train, held_out) = Examples::split(lessons(20), 0.2, 1);
    assert_eq!((train.len(), held_out.len()), (16, 4));
    let lessons = Lessons {
        train: Arc::new(Examples::new(train, Some(20))),
        held_out: Some(Arc::new(Examples::new(held_out, None))),
        patience,
        preference: None,
    };
    let mut subject = subject(true);
    let mut checkpoint = None;
    if resume {
        let found = Checkpoints::open(out).latest().unwrap().unwrap().checkpoint;
        let weights = std::mem::replace(&mut subject.store, Store::new(&Cpu::new(2), &[], vec![]));
        let map = subject.adapter.clone().unwrap().tensors;
        let weights = learned(&subject.model, &map, weights.into_weights(), found.path());
        subject.store = Store::new(&Cpu::new(2), subject.model.units(), weights);
        checkpoint = Some(found);
    }
    let options = options(out, steps);
    Trainer::tune(subject, lessons, options, checkpoint.as_ref()).unwrap()
}

fn losses(trainer: &mut Trainer) -> (Vec<f64>, End) {
    let mut losses = Vec::new();
    let end = trainer.run(&AtomicBool::new(false), &mut |event| match event {
        Event::Step(step) => losses.push(step.loss),
        Event::Evaluated { loss, .. } => losses.push(loss),
        _ => {}
    });
    (losses, end.unwrap())
}

/// Dropout, order and optimizer state continue where they stood.
#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let (whole, parts) = (Folder::new(), Folder::new());
    let (expected, end) = losses(&mut trainer(whole.0.path(), 8, None, false));
    assert_eq!(end, End::Finished);
    let mut first = trainer(parts.0.path(), 8, None, false);
    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    first
        .run(&stop, &mut |event| match event {
            Event::Step(step) => {
                seen.push(step.loss);
                stop.store(step.step == 5, std::sync::atomic::Ordering::Relaxed);
            }
            Event::Evaluated { loss, .. } => seen.push(loss),
            _ => {}
        })
        .unwrap();
    let mut second = trainer(parts.0.path(), 8, None, true);
    seen.extend(losses(&mut second).0);
    assert_eq!(seen, expected);
    let read =
        |folder: &Path| std::fs::read(folder.join("best/adapter_model.safetensors")).unwrap();
    assert_eq!(read(whole.0.path()), read(parts.0.path()));
    assert!(expected.last() < expected.get(2), "{expected:?}");
}

/// Samples that teach nothing about those held out: the run ends, and the best weights are those of the best evaluation.
#[test]
fn a_run_that_gets_no_better_ends() {
    let out = Folder::new();
    let mut trainer = trainer(out.0.path(), 200, Some(2), false);
    let mut evaluations = Vec::new();
    let mut best = Vec::new();
    let end = trainer.run(&AtomicBool::new(false), &mut |event| match event {
        Event::Evaluated { loss, .. } => evaluations.push(loss),
        Event::Best { loss, .. } => best.push(loss),
        _ => {}
    });
    assert_eq!(end.unwrap(), End::Stopped);
    let lowest = evaluations.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(best.last(), Some(&lowest));
    assert_eq!(trainer.best_loss(), Some(lowest));
    let last = &evaluations[evaluations.len() - 2..];
    assert!(last.iter().all(|&loss| loss >= lowest), "{evaluations:?}");
    assert!(out.0.path().join("best/adapter_config.json").is_file());
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Lora,
    Qlora,
    Full,
}

/// A run of the tests over ranks that are threads.
#[derive(Clone, Copy, Debug)]
struct Job<'a> {
    method: Method,
    ranks: usize,
    accumulation: usize,
    placement: Placement,
    preference: Option<Preference>,
    out: &'a Path,
    /// The step after which it is interrupted.
    stop: Option<u64>,
    resume: bool,
}

impl<'a> Job<'a> {
    fn new(method: Method, ranks: usize, accumulation: usize, out: &'a Path) -> Self {
        Job {
            method,
            ranks,
            accumulation,
            placement: Placement::default(),
            preference: None,
            out,
            stop: None,
            resume: false,
        }
    }

    fn stage(self, stage: Stage) -> Self {
        let placement = Placement {
            stage,
            persistence_threshold: 0,
            ..self.placement
        };
        Job { placement, ..self }
    }

    /// The weights of all units; with `qlora` matrices that are not trained are packed.
    fn weights(&self) -> Vec<Weights> {
        let (_, model, adapter) = declared(self.method != Method::Full, 0.0);
        let cpu = Cpu::new(1);
        let mut weights = Store::init(&cpu, model.units(), DType::F32, 5).into_weights();
        let params = model.units().iter().map(|unit| &unit.params);
        for (params, weights) in params.zip(&mut weights) {
            for (param, weight) in params.iter().zip(weights.iter_mut()) {
                let frozen = !param.trained && weight.dense().rows() > 1;
                if self.method == Method::Qlora && frozen {
                    let packed = Packed::quantize(&cpu, Layout::q4(32), weight.dense());
                    *weight = Weight::Packed(packed);
                }
            }
        }
        if !self.resume {
            return weights;
        }
        let (config, ..) = declared(false, 0.0);
        let map = match &adapter {
            Some(adapter) => adapter.tensors.clone(),
            None => config.naming.file_tensors(&model),
        };
        let checkpoint = Checkpoints::open(self.out).latest().unwrap().unwrap();
        learned(&model, &map, weights, checkpoint.checkpoint.path())
    }

    /// Pairs or rated answers where they are compared, else texts.
    fn lessons(&self) -> Lessons {
        let mut samples = lessons(20);
        if self.preference.is_some_and(|method| method.is_paired()) {
            let all: Vec<Example> = samples.into_iter().flatten().collect();
            samples = all.chunks(2).map(<[Example]>::to_vec).collect();
            samples.iter_mut().for_each(|pair| pair[1].label = false);
        } else if self.preference.is_some() {
            let rated = samples.iter_mut().enumerate();
            rated.for_each(|(at, sample)| sample[0].label = at % 3 == 0);
        }
        let (train, held_out) = Examples::split(samples, 0.25, 1);
        Lessons {
            train: Arc::new(Examples::new(train, None)),
            held_out: Some(Arc::new(Examples::new(held_out, None))),
            patience: None,
            preference: self.preference,
        }
    }

    fn rank(&self, group: Group, deal: &Deal) -> Vec<f64> {
        let cpu = Cpu::new(1);
        let (config, model, adapter) = declared(self.method != Method::Full, 0.0);
        let mut home = Home::on(group, self.placement);
        if self.placement.needs_disk() {
            let name = format!("tune-{}", home.group.rank());
            let swap = SwapFile::create(&std::env::temp_dir(), &name, AioOptions::default(), None);
            home.swap = Some(swap.unwrap());
        }
        let checkpoint = self.resume.then(|| {
            Checkpoints::open(self.out)
                .latest()
                .unwrap()
                .unwrap()
                .checkpoint
        });
        let subject = Subject {
            store: Store::of(&cpu, home, model.units(), deal).unwrap(),
            config,
            tokenizer: tokenizer(),
            model,
            adapter,
        };
        let mut options = options(self.out, 8);
        options.shape.gradient_accumulation_steps = self.accumulation;
        let lessons = self.lessons();
        let mut trainer = Trainer::tune(subject, lessons, options, checkpoint.as_ref()).unwrap();
        let (stop, mut seen) = (AtomicBool::new(false), Vec::new());
        let end = trainer.run(&stop, &mut |event| match event {
            Event::Step(step) => {
                seen.push(step.loss);
                seen.extend(
                    step.rewards
                        .iter()
                        .flat_map(|r| r.means())
                        .map(|(_, mean)| mean),
                );
                let now = self.stop == Some(step.step);
                stop.store(now, std::sync::atomic::Ordering::Relaxed);
            }
            Event::Evaluated {
                loss, perplexity, ..
            } => {
                // The loss of a comparison is none of tokens.
                let expected = self.preference.is_none().then(|| loss.exp());
                assert_eq!(perplexity, expected, "{self:?}");
                seen.push(loss);
            }
            _ => {}
        });
        let end = end.unwrap();
        assert_eq!(end == End::Interrupted, self.stop.is_some(), "{self:?}");
        if let Some(io) = trainer.engine().store().io_stats() {
            assert!(io.bytes_read > 0 && io.bytes_written > 0, "{self:?} {io:?}");
        }
        trainer.save_trained(&self.out.join("last")).unwrap();
        seen
    }

    /// Losses and means of rewards as all ranks have seen them, and the file of what was learned.
    fn run(&self) -> (Vec<f64>, Vec<u8>) {
        let deal = Deal::new(self.weights(), self.ranks);
        let seen = std::thread::scope(|scope| {
            let groups = Group::local(self.ranks, Duration::from_secs(60)).into_iter();
            let deal = &deal;
            let rank = |group| scope.spawn(move || self.rank(group, deal));
            let ranks: Vec<_> = groups.map(rank).collect();
            ranks
                .into_iter()
                .map(|r| r.join().unwrap())
                .collect::<Vec<_>>()
        });
        assert!(seen.iter().all(|one| *one == seen[0]), "{self:?}");
        let name = match self.method {
            Method::Full => "model.safetensors",
            _ => "adapter_model.safetensors",
        };
        let file = std::fs::read(self.out.join("last").join(name)).unwrap();
        (seen[0].clone(), file)
    }

    /// The values in the file of what was learned, which is complete.
    fn learned(&self) -> Vec<f32> {
        let (config, model, adapter) = declared(self.method != Method::Full, 0.0);
        let (name, map) = match adapter {
            Some(adapter) => ("adapter_model.safetensors", adapter.tensors),
            None => ("model.safetensors", config.naming.file_tensors(&model)),
        };
        let file = Tensors::open(&self.out.join("last").join(name)).unwrap();
        let mut values = Vec::new();
        for tensor in &map {
            let view = file.get(&tensor.name).unwrap();
            view.expect_shape(&tensor.shape).unwrap();
            let read = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
            let own: Vec<f32> = view.bytes.chunks(4).map(read).collect();
            assert!(own.iter().any(|v| *v != 0.0), "{} is empty", tensor.name);
            values.extend(own);
        }
        values
    }
}

/// Everything partitioned and on the disk, however small.
const ON_DISK: Placement = Placement {
    stage: Stage::Parameters,
    persistence_threshold: 0,
    bucket: 700,
    wire: windlass_store::Wire::Exact,
    grad_accum: DType::F32,
    reduce_once: false,
    parameters: Tier::Nvme,
    optimizer: Tier::Nvme,
    activations: Tier::Memory,
    swap_from: 16,
    buffers: 2,
    sub_group: 9000,
};

/// A step of QLoRA takes what its layers keep, a few values on their way and one chunk of logits, and nothing that was used
/// for something else before: 1.1 B parameters in less than a quarter of what plain weights of 16 bits and PyTorch take.
#[test]
fn a_qlora_step_takes_what_it_keeps() {
    const LAYERS: usize = 22;
    const TOKENS: usize = 512;
    let (width, inner, kv, vocabulary) = (2048, 5632, 256, 32000);
    let text = format!(
        r#"{{ "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {width},
        "intermediate_size": {inner}, "num_hidden_layers": {LAYERS}, "num_attention_heads": 32, "num_key_value_heads": 4,
        "vocab_size": {vocabulary}, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false }}"#
    );
    let config = DecoderConfig::from_json("config.json", &text).unwrap();
    let mut model = decoder(&config);
    let settings = AdapterConfig {
        r: 16,
        target_modules: Targets::AllLinear,
        ..AdapterConfig::default()
    };
    let adapter = model.adapt(config.naming, &settings).unwrap();
    let cpu = Cpu::dry();
    let mut weights = Store::init(&cpu, model.units(), DType::Bf16, 5).into_weights();
    let params = model.units().iter().flat_map(|unit| &unit.params);
    let mut trained = 0;
    for (param, weight) in params.zip(weights.iter_mut().flat_map(Weights::iter_mut)) {
        if param.trained {
            trained += param.shape.len();
            *weight = weight
                .dense()
                .cast(&cpu, DType::F32, Category::Weights)
                .into();
        } else if weight.dense().rows() > 1 {
            *weight = Weight::Packed(Packed::quantize(&cpu, Layout::q4(32), weight.dense()));
        }
    }
    let sample = Example {
        ids: vec![1; TOKENS],
        learned: vec![true; TOKENS],
        label: true,
    };
    let batch = Examples::new(vec![vec![sample]], None).largest(1);
    let shape = StepShape {
        micro_batch: 1,
        seq_len: TOKENS,
        gradient_accumulation_steps: 1,
    };
    let opened = cpu.memory;
    let cpu = Cpu::dry();
    let home = Home::on(Group::solo(), Placement::default());
    let store = Store::of(&cpu, home, model.units(), &Deal::new(weights, 1)).unwrap();
    let shared = opened.now().of(Category::Weights);
    let parts = (model, store, adapter.tensors);
    let options = EngineOptions::default();
    let memory = plan_batch(parts, &config, DType::Bf16, options, (shape, batch)).memory;
    let all = shared + memory.reserved;
    println!("{all} bytes: {shared} of weights and {memory:?}");
    assert!(all < 1_300_000_000, "{all} bytes");
    let unused = memory.reserved - memory.in_use();
    assert!(unused < 1 << 20, "{unused} bytes that nothing uses");
    assert_eq!(memory.of(Category::Optimizer), trained * 8);
    // Both residual inputs, queries, what attention gives; keys and values; gate and up; the adapters' middle.
    let kept = LAYERS * TOKENS * 2 * (4 * width + 2 * kv + 2 * inner + 7 * 16);
    let way = TOKENS * 2 * (3 * inner + 4 * width);
    let activations = memory.of(Category::Activations);
    assert!(
        (kept..kept + way).contains(&activations),
        "{activations} bytes of activations, {kept} kept"
    );
    // Rows of logits and their gradient, in four and two bytes.
    let chunk = 128 * vocabulary * 6;
    let workspace = memory.of(Category::Workspace);
    assert!(
        workspace <= chunk + (1 << 20),
        "{workspace} bytes of workspace, {chunk} for a chunk of logits"
    );
}

const STAGES: [Stage; 4] = [
    Stage::Replicated,
    Stage::Optimizer,
    Stage::Gradients,
    Stage::Parameters,
];

/// All stages and tiers give the same bits, one rank with the same batch the same numbers but for the order of sums, and what is
/// written is whole.
#[test]
fn ranks_and_stages_learn_the_same() {
    for method in [Method::Lora, Method::Qlora, Method::Full] {
        for accumulation in [1, 2] {
            let alone = Folder::new();
            let one = Job::new(method, 1, 2 * accumulation, alone.0.path());
            let (losses, _) = one.run();
            let values = one.learned();
            assert!(losses.last() < losses.get(2), "{losses:?}");
            let mut same: Option<(Vec<f64>, Vec<u8>)> = None;
            let placements = STAGES.map(|stage| one.stage(stage).placement);
            for placement in placements.into_iter().chain([ON_DISK]) {
                let folder = Folder::new();
                let job = Job {
                    ranks: 2,
                    accumulation,
                    placement,
                    out: folder.0.path(),
                    ..one
                };
                let found = job.run();
                close(&found.0, &losses, 1e-5, &job);
                let learned: Vec<f64> = job.learned().iter().map(|&v| v.into()).collect();
                let wanted: Vec<f64> = values.iter().map(|&v| v.into()).collect();
                close(&learned, &wanted, 1e-4, &job);
                let same = same.get_or_insert_with(|| found.clone());
                assert!(*same == found, "{job:?}");
            }
        }
    }
}

fn close(found: &[f64], wanted: &[f64], tolerance: f64, job: &Job<'_>) {
    assert_eq!(found.len(), wanted.len(), "{job:?}");
    for (at, (a, b)) in found.iter().zip(wanted).enumerate() {
        let room = tolerance * b.abs().max(1.0);
        assert!((a - b).abs() <= room, "{at}: {a} and {b}, {job:?}");
    }
}

/// Comparisons need passes of their own, which partitioned weights are gathered for, by ranks without a batch too.
#[test]
fn ranks_compare_answers_as_one_does() {
    let dpo = Preference::Dpo {
        beta: 0.1,
        label_smoothing: 0.0,
    };
    let kto = Preference::Kto {
        beta: 0.1,
        desirable_weight: 1.0,
        undesirable_weight: 1.0,
    };
    for (method, preference) in [
        (Method::Qlora, dpo),
        (Method::Full, Preference::Orpo { beta: 0.1 }),
        (Method::Lora, kto),
    ] {
        let alone = Folder::new();
        let one = Job {
            preference: Some(preference),
            ..Job::new(method, 1, 2, alone.0.path())
        };
        let (losses, _) = one.run();
        for stage in [Stage::Replicated, Stage::Parameters] {
            let folder = Folder::new();
            let job = Job {
                ranks: 2,
                accumulation: 1,
                out: folder.0.path(),
                ..one.stage(stage)
            };
            close(&job.run().0, &losses, 1e-4, &job);
        }
    }
}

/// A run that two ranks began in stage 3 goes on in another stage to the same end, and on one rank to about the same.
#[test]
fn runs_over_ranks_are_resumed() {
    for method in [Method::Qlora, Method::Full] {
        let whole = Folder::new();
        let expected = Job::new(method, 2, 1, whole.0.path()).run();
        for (ranks, stage) in [(2, Stage::Gradients), (1, Stage::Replicated)] {
            let parts = Folder::new();
            let job = Job::new(method, 2, 1, parts.0.path());
            let first = Job {
                stop: Some(5),
                ..job.stage(Stage::Parameters)
            };
            let mut seen = first.run().0;
            let second = Job {
                ranks,
                accumulation: 2 / ranks,
                resume: true,
                ..job.stage(stage)
            };
            let (losses, file) = second.run();
            seen.extend(losses);
            match ranks {
                2 => assert!((seen, file) == expected, "{method:?}"),
                _ => close(&seen, &expected.0, 1e-5, &second),
            }
        }
    }
}
