//! Adapters beside a model: what a request gets is what a model with that adapter alone gives it, whoever shares its batch.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use windlass_infer::engine::{Engine, EngineOptions, Event, Pooling, Request, RequestGoal};
use windlass_infer::{LoadIn, LoadedModel, Overlay, SamplingParams, write_adapter};
use windlass_model::AdapterConfig;
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::BlockType;
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Cpu, DType, Rng};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../windlass-train/tests/fixtures")
}

fn open(base: &str, dtype: DType, load_in: LoadIn) -> LoadedModel {
    let folder = fixtures().join("arch").join(base);
    LoadedModel::open_in(&Cpu::new(2), &folder, Some(dtype), load_in).unwrap()
}

/// An adapter of random values for every matrix of a model, experts and routers too.
fn random(base: &str, folder: &Path, use_dora: bool) {
    let mut model = open(base, DType::F32, LoadIn::AsStored);
    let config = AdapterConfig {
        r: 3,
        use_dora,
        ..AdapterConfig::default()
    };
    model.new_adapter(&config, 5).unwrap();
    let mut rng = Rng::new(8);
    let tensors = model.adapter.unwrap().tensors.into_iter().map(|tensor| {
        let base = f64::from(u8::from(tensor.name.contains("magnitude")));
        let values = (0..tensor.shape.len()).map(|_| (base + 0.2 * rng.normal()) as f32);
        let values = values.collect();
        (tensor, values)
    });
    write_adapter(folder, &config, &tensors.collect::<Vec<_>>()).unwrap();
}

/// Requests of several kinds, all with one adapter.
fn requests(vocabulary: usize, adapter: Option<&Arc<Overlay>>) -> Vec<Request> {
    let mut rng = Rng::new(4);
    let prompt: Vec<u32> = (0..30)
        .map(|_| rng.below(vocabulary as u64) as u32)
        .collect();
    let base = |length: usize| Request {
        max_new_tokens: 6,
        logprobs: Some(2),
        adapter: adapter.cloned(),
        ..Request::new(prompt[..length].to_vec())
    };
    vec![
        Request {
            prompt_logprobs: Some(1),
            sampling: SamplingParams::greedy(),
            ..base(17)
        },
        Request {
            samples: 2,
            seed: 3,
            ..base(30)
        },
        Request {
            goal: RequestGoal::Embed(Pooling::Mean),
            ..base(9)
        },
    ]
}

/// The events of each request, without its number and without what the cache had of it.
fn answers(engine: &mut Engine, requests: Vec<Request>) -> Vec<Vec<String>> {
    let ids = requests.into_iter().map(|r| engine.submit(r).unwrap());
    let ids: Vec<_> = ids.collect();
    let mut answers = vec![Vec::new(); ids.len()];
    while !engine.is_idle() {
        for event in engine.step().unwrap().events {
            let (id, text) = match event {
                Event::Token {
                    id,
                    sample,
                    token,
                    logprobs,
                } => (id, format!("{sample}: {token} {logprobs:?}")),
                Event::Prompt { id, logprobs } => (id, format!("{logprobs:?}")),
                Event::Embedding { id, values } => (id, format!("{values:?}")),
                Event::Finished {
                    id, sample, reason, ..
                } => (id, format!("{sample}: {reason:?}")),
                Event::Started { .. } => continue,
                Event::Failed { message, .. } => panic!("{message}"),
            };
            let index = ids.iter().position(|&known| known == id).unwrap();
            answers[index].push(text);
        }
    }
    // Samples of a pass are told one after another; their order says nothing.
    answers.iter_mut().for_each(|answer| answer.sort());
    answers
}

fn engine(model: LoadedModel, token_budget: usize) -> Engine {
    let options = EngineOptions {
        token_budget,
        ..EngineOptions::default()
    };
    Engine::new(model, options).unwrap()
}

fn check(base: &str, adapters: &[PathBuf], dtype: DType, load_in: LoadIn) {
    let case = format!("{base}, {dtype}, {load_in:?}");
    let model = open(base, dtype, load_in);
    let vocabulary = model.config.vocab_size;
    let loader = model.overlay_loader().unwrap();
    let load = |folder: &PathBuf| Arc::new(loader.load(folder).unwrap());
    let overlays: Vec<Option<Arc<Overlay>>> = [None]
        .into_iter()
        .chain(adapters.iter().map(|folder| Some(load(folder))))
        .collect();
    let alone = |index: usize| {
        let mut model = open(base, dtype, load_in);
        if index > 0 {
            model.add_adapter(&adapters[index - 1]).unwrap();
        }
        answers(&mut engine(model, 512), requests(vocabulary, None))
    };
    let alone: Vec<Vec<Vec<String>>> = (0..overlays.len()).map(alone).collect();
    for (index, one) in alone.iter().enumerate() {
        assert!(
            !alone[..index].contains(one),
            "{case}: {index} changes nothing"
        );
    }
    let mut model = model;
    for budget in [512, 23, 5] {
        let mut engine = engine(model, budget);
        for round in 0..2 {
            // In turns, so that no adapter's requests are neighbors; in the second round the cache has all prompts.
            let mut turns = Vec::new();
            let mut all: Vec<_> = overlays
                .iter()
                .map(|overlay| requests(vocabulary, overlay.as_ref()).into_iter())
                .collect();
            for _ in 0..3 {
                turns.extend(all.iter_mut().map(|r| r.next().unwrap()));
            }
            let mixed = answers(&mut engine, turns);
            for (index, answer) in mixed.iter().enumerate() {
                let (adapter, request) = (index % overlays.len(), index / overlays.len());
                let expected = &alone[adapter][request];
                let place = format!("{case}, budget {budget}, round {round}: {adapter}, {request}");
                assert_eq!(answer, expected, "{place}");
            }
        }
        model = engine.into_model();
    }
}

#[test]
fn a_mixed_batch_gives_what_each_adapter_gives_alone() {
    let peft = |names: &[&str]| -> Vec<PathBuf> {
        let folder = fixtures().join("peft");
        names.iter().map(|name| folder.join(name)).collect()
    };
    let place = tempfile::tempdir().unwrap();
    let files = ["llama", "gpt_neox"].map(|name| {
        let file = place.path().join(name).with_extension("gguf");
        let mut model = open(name, DType::F32, LoadIn::AsStored);
        model.add_adapter(&peft(&[name])[0]).unwrap();
        let written = model.save_adapter_gguf(&RealDisk, &file, BlockType::F32);
        written.map(|()| file).unwrap()
    });
    let experts = [false, true].map(|use_dora| {
        let folder = place.path().join(format!("experts {use_dora}"));
        random("qwen3_moe", &folder, use_dora);
        folder
    });
    let llama = [
        "llama",
        "llama_dora",
        "llama_regex_layers",
        "llama_rslora_patterns",
        "llama_to_transform",
    ];
    for (dtype, load_in) in [
        (DType::F32, LoadIn::AsStored),
        (DType::Bf16, LoadIn::AsStored),
        (DType::F32, LoadIn::Packed(Layout::q4(32))),
    ] {
        check("llama", &peft(&llama), dtype, load_in);
        let biased = peft(&["llama_biases_dora"]);
        check("llama_biases_tied", &biased, dtype, load_in);
        let fused = peft(&["gpt_neox", "gpt_neox_dora"]);
        check("gpt_neox", &fused, dtype, load_in);
        check("phi3", &peft(&["phi3"]), dtype, load_in);
        check("qwen3_moe", &experts, dtype, load_in);
        check("llama", &files[..1], dtype, load_in);
        check("gpt_neox", &files[1..], dtype, load_in);
    }
}

#[test]
fn what_cannot_share_a_model_is_refused() {
    let model = open("llama", DType::F32, LoadIn::AsStored);
    let loader = model.overlay_loader().unwrap();
    for (name, words) in [
        ("llama_modules_to_save", ["lm_head, norm", "adapter merge"]),
        ("qwen3", ["tensors differ", "tiny/qwen3"]),
        ("nothing", ["adapter_config.json", "cannot be read"]),
        (
            "llama/adapter_model.safetensors",
            ["folder is needed", "adapter convert"],
        ),
    ] {
        let error = loader
            .load(&fixtures().join("peft").join(name))
            .unwrap_err();
        let text = format!("{error} {}", error.hint().unwrap_or_default());
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
    let folder = fixtures().join("peft/llama");
    let (first, again) = (loader.load(&folder).unwrap(), loader.load(&folder).unwrap());
    assert_ne!(first.id(), again.id());
    assert!(first.id() > 0 && first.bytes() == again.bytes() && first.bytes() > 0);
}
