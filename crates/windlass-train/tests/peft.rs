//! Adapters against PEFT's known answers under `fixtures/peft`: logits, loss, every gradient, twenty AdamW steps; and what
//! follows from freezing everything else.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use windlass_model::{
    ADAPTER_CONFIG_FILE, ADAPTER_FILE, Adapter, AdapterConfig, DecoderConfig, Goal, Model, Tokens,
    decoder,
};
use windlass_store::safetensors::Tensors;
use windlass_store::{Loader, Store, load_weights};
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{
    Category, Cpu, DType, FileTensor, Packed, ParamId, Tape, Tensor, Weight, Weights,
};
use windlass_train::preference::{Comparison, Preference};
use windlass_train::{Engine, EngineOptions, Losses, Optimizer, run};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A case: an adapter, its base and the answers.
struct Case {
    name: String,
    base: PathBuf,
    config: DecoderConfig,
    settings: AdapterConfig,
    folder: PathBuf,
    golden: Tensors,
}

fn cases() -> Vec<Case> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(fixtures().join("peft"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    folders.sort();
    assert_eq!(folders.len(), 15);
    folders.into_iter().map(Case::open).collect()
}

impl Case {
    fn open(folder: PathBuf) -> Self {
        let text = std::fs::read_to_string(folder.join(ADAPTER_CONFIG_FILE)).unwrap();
        let settings = AdapterConfig::from_json(ADAPTER_CONFIG_FILE, &text).unwrap();
        let base = settings.base_model_name_or_path.clone().unwrap();
        let base = fixtures()
            .join("arch")
            .join(base.strip_prefix("tiny/").unwrap());
        Case {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            config: DecoderConfig::load(&base).unwrap(),
            golden: Tensors::open(&folder.join("golden.safetensors")).unwrap(),
            base,
            settings,
            folder,
        }
    }

    /// The adapted model with the adapter's weights; of the base, matrices are packed where a layout is given.
    fn load(
        &self,
        cpu: &Cpu,
        dtype: DType,
        pack: Option<Layout>,
    ) -> (Model<Tokens>, Adapter, Store) {
        let mut model = decoder(&self.config);
        let map = self.config.naming.file_tensors(&model);
        let tensors = Tensors::open(&self.base).unwrap();
        let base = load_weights(cpu, &tensors, model.units(), &map, |_| None, dtype);
        let base = base.unwrap().0;
        let adapter = model.adapt(self.config.naming, &self.settings).unwrap();
        let file = Tensors::open(&self.folder.join(ADAPTER_FILE)).unwrap();
        let mut loader = Loader::new(cpu, &file, model.units(), &adapter.tensors, |_| None);
        assert_eq!(loader.unused(), Vec::<String>::new(), "{}", self.name);
        let mut weights = Vec::new();
        for (unit, (spec, base)) in model.units().iter().zip(base).enumerate() {
            let mut all: Vec<Weight> = base.iter().cloned().collect();
            for (slot, param) in spec.params.iter().enumerate() {
                let mut read = |dtype| {
                    let id = ParamId { unit, slot };
                    let values = loader.read(id, 0..param.shape.len(), dtype).unwrap();
                    Weight::from(values.reshape(param.shape))
                };
                if slot >= base.len() {
                    all.push(read(if dtype == DType::F64 {
                        dtype
                    } else {
                        DType::F32
                    }));
                } else if param.trained {
                    all[slot] = read(dtype);
                } else if let (Some(layout), [_, _]) = (pack, &param.shape[..]) {
                    all[slot] = Weight::Packed(Packed::quantize(cpu, layout, all[slot].dense()));
                }
            }
            weights.push(Weights::new(all));
        }
        let store = Store::new(cpu, model.units(), weights);
        (model, adapter, store)
    }

    fn answers(&self, name: &str) -> Vec<f64> {
        floats(&self.golden, name)
    }

    fn tokens(&self, dtype: DType, goal: impl Fn(Arc<[i64]>) -> Goal) -> Tokens {
        let golden = Tensors::open(&self.base.join("golden.safetensors")).unwrap();
        let ints = |name: &str| {
            golden
                .get(name)
                .unwrap()
                .as_slice::<i32>()
                .unwrap()
                .to_vec()
        };
        let starts = ints("cu_seqlens");
        let lengths: Vec<usize> = starts.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let ids = ints("ids").iter().map(|&id| id as u32).collect();
        let targets = ints("targets").iter().map(|&t| t as i64).collect();
        Tokens::new(ids, &lengths, goal(targets), dtype)
    }

    fn loss_batch(&self, dtype: DType) -> Tokens {
        self.tokens(dtype, |targets| Goal::Loss {
            denominator: targets.iter().filter(|&&t| t >= 0).count() as f64,
            targets,
        })
    }
}

fn floats(tensors: &Tensors, name: &str) -> Vec<f64> {
    let view = tensors.get(name).unwrap();
    let mut out = vec![0f64; view.elements()];
    view.read_into(0..view.rows(), &mut out).unwrap();
    out
}

/// Largest difference relative to the largest element.
fn difference(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-6, |m: f64, v| m.max(v.abs()));
    let pairs = got.iter().zip(want);
    pairs.fold(0.0, |m: f64, (g, w)| m.max((g - w).abs())) / scale
}

/// A tensor of a file from what `of` says of its parts.
fn joined(
    model: &Model<Tokens>,
    file: &FileTensor,
    of: &mut dyn FnMut(ParamId) -> Vec<f64>,
) -> Vec<f64> {
    let parts: Vec<Vec<f64>> = file.parts.iter().map(|&id| of(id)).collect();
    let rows = |id: &ParamId| model.units()[id.unit].params[id.slot].shape[0];
    let rows: Vec<usize> = file.parts.iter().map(rows).collect();
    let parts: Vec<&[f64]> = parts.iter().map(Vec::as_slice).collect();
    file.join(&parts, &rows)
}

fn gradient(engine: &Engine<Tokens>, id: ParamId) -> Vec<f64> {
    engine.store().gradient(id).unwrap().unwrap().to_f64()
}

fn options(activation_checkpointing: bool) -> EngineOptions {
    EngineOptions {
        activation_checkpointing,
        gradient_clipping: None,
        losses: Losses::Sum,
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        },
        ..Default::default()
    }
}

fn check(case: &Case, dtype: DType, tolerance: f64) {
    let cpu = Cpu::new(2);
    let close = |what: &str, got: &[f64], want: &[f64]| {
        let d = difference(got, want);
        assert!(
            d <= tolerance,
            "{} {dtype}: {what} differs by {d:.2e}",
            case.name
        );
    };
    let (model, _, store) = case.load(&cpu, dtype, None);
    let batch = case.tokens(dtype, |targets| Goal::Logits {
        rows: (0..targets.len() as u32).collect(),
    });
    let logits = run(&model, &store, &batch).unwrap();
    close("logits", &logits.to_f64(), &case.answers("logits"));
    for checkpointing in [false, true] {
        let (model, adapter, store) = case.load(&cpu, dtype, None);
        let mut engine = Engine::initialize(model, store, options(checkpointing)).unwrap();
        let loss = engine.forward(case.loss_batch(dtype)).unwrap();
        close("loss", &[loss.value()], &case.answers("loss"));
        engine.backward(loss).unwrap();
        for file in &adapter.tensors {
            let got = joined(engine.model(), file, &mut |id| gradient(&engine, id));
            close(
                &file.name,
                &got,
                &case.answers(&format!("grad.{}", file.name)),
            );
        }
        let trained = engine.store().params().filter(|(_, spec)| spec.trained);
        // A table that is the head too is in two tensors.
        let parts = adapter.tensors.iter().flat_map(|file| &file.parts);
        let named: BTreeSet<(usize, usize)> = parts.map(|id| (id.unit, id.slot)).collect();
        assert_eq!(trained.count(), named.len(), "{}", case.name);
        for (id, spec) in engine.store().params().filter(|(_, spec)| !spec.trained) {
            let frozen = engine.store().gradient(id).unwrap();
            assert!(
                frozen.is_none(),
                "{}: a gradient of {}",
                case.name,
                spec.name
            );
        }
    }
}

/// Twenty steps from PEFT's adapter: the losses on the way and the parameters after them.
fn check_steps(case: &Case) {
    let cpu = Cpu::new(2);
    let (model, adapter, store) = case.load(&cpu, DType::F32, None);
    let mut engine = Engine::initialize(model, store, options(false)).unwrap();
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = engine.forward(case.loss_batch(DType::F32)).unwrap();
        losses.push(loss.value());
        engine.backward(loss).unwrap();
        engine.step_at(1e-3).unwrap();
    }
    losses.push(engine.forward(case.loss_batch(DType::F32)).unwrap().value());
    let d = difference(&losses, &case.answers("losses"));
    assert!(d <= 1e-4, "{}: losses differ by {d:.2e}", case.name);
    for file in &adapter.tensors {
        let model = decoder(&case.config);
        let mut adapted = model;
        adapted.adapt(case.config.naming, &case.settings).unwrap();
        let store = engine.store_mut();
        let mut masters = |id| {
            let values = store.master(id).unwrap();
            values.iter().map(|&v| f64::from(v)).collect()
        };
        let got = joined(&adapted, file, &mut masters);
        let d = difference(&got, &case.answers(&format!("final.{}", file.name)));
        assert!(d <= 1e-4, "{}: {} differs by {d:.2e}", case.name, file.name);
    }
}

#[test]
fn adapters_agree_with_peft() {
    for case in cases() {
        check(&case, DType::F64, 3e-6);
        check(&case, DType::F32, 1e-4);
    }
}

#[test]
fn twenty_steps_agree_with_peft() {
    for case in cases() {
        check_steps(&case);
    }
}

#[test]
fn settings_are_written_as_they_were_read() {
    for case in cases() {
        let again = case.settings.to_json().to_string();
        let again = AdapterConfig::from_json(ADAPTER_CONFIG_FILE, &again).unwrap();
        assert_eq!(again, case.settings, "{}", case.name);
    }
}

/// Through a packed base flow the gradients of its unpacked weights, with and without activation checkpointing.
#[test]
fn a_packed_base_gives_the_gradients_of_its_unpacked_weights() {
    let cpu = Cpu::new(2);
    let case = Case::open(fixtures().join("peft/qwen3"));
    let mut results = Vec::new();
    for (packed, checkpointing) in [(true, false), (true, true), (false, false)] {
        let (model, adapter, store) = case.load(&cpu, DType::F32, Some(Layout::q4(32)));
        let units = store.into_weights().into_iter().map(|weights| {
            let plain = weights.iter().map(|weight| match weight {
                Weight::Packed(matrix) if !packed => matrix
                    .unpack_rows(&cpu, 0..matrix.shape()[0], DType::F32)
                    .into(),
                other => other.clone(),
            });
            Weights::new(plain.collect())
        });
        let store = Store::new(&cpu, model.units(), units.collect());
        let mut engine = Engine::initialize(model, store, options(checkpointing)).unwrap();
        let loss = engine.forward(case.loss_batch(DType::F32)).unwrap();
        let mut numbers = vec![loss.value()];
        engine.backward(loss).unwrap();
        for file in &adapter.tensors {
            numbers.extend(joined(engine.model(), file, &mut |id| {
                gradient(&engine, id)
            }));
        }
        results.push(numbers);
    }
    assert_eq!(results[0], results[1], "activation checkpointing");
    assert!(difference(&results[0], &results[2]) < 1e-6);
}

/// Dropout drops the same elements when a layer is run again, others in the next step, and nothing in evaluation.
#[test]
fn dropout_is_a_function_of_the_step() {
    let cpu = Cpu::new(2);
    let mut case = Case::open(fixtures().join("peft/llama"));
    let mut run_steps = |dropout: f64, checkpointing: bool| {
        case.settings.lora_dropout = dropout;
        let (model, _, store) = case.load(&cpu, DType::F32, None);
        let mut engine = Engine::initialize(model, store, options(checkpointing)).unwrap();
        let mut losses = Vec::new();
        for _ in 0..2 {
            let loss = engine.forward(case.loss_batch(DType::F32)).unwrap();
            losses.push(loss.value());
            engine.backward(loss).unwrap();
            engine.step_at(0.0).unwrap();
        }
        let norm = engine.last_grad_norm().unwrap();
        let goal = case.tokens(DType::F32, |targets| Goal::TokenLosses { targets });
        let quiet = engine.evaluate(&goal).unwrap().to_f64().iter().sum::<f64>();
        (losses, norm, quiet)
    };
    let (none, some, again) = (
        run_steps(0.0, false),
        run_steps(0.5, false),
        run_steps(0.5, true),
    );
    assert_eq!(none.0[0], none.0[1]);
    assert_ne!(some.0[0], some.0[1]);
    assert_ne!(none.0[0], some.0[0]);
    assert_eq!(some, again);
    assert_eq!(none.2, some.2);
}

#[test]
fn what_cannot_be_adapted_is_refused_by_name() {
    let llama = DecoderConfig::load(&fixtures().join("arch/llama")).unwrap();
    let check = |json: &str, key: &str, hint: &str| {
        let json = format!("{{\"peft_type\": \"LORA\", {json}}}");
        let settings = AdapterConfig::from_json("adapter_config.json", &json);
        let error = settings.and_then(|s| decoder(&llama).adapt(llama.naming, &s));
        let error = error.err().unwrap_or_else(|| panic!("{json} was taken"));
        let text = format!("{error} {}", error.hint().unwrap_or_default());
        assert!(text.contains(key) && text.contains(hint), "{json}: {text}");
    };
    let some = "\"target_modules\": [\"q_proj\"]";
    for (json, key, hint) in [
        (
            "\"target_modules\": [\"q_prj\"]",
            "q_prj",
            "nearest: q_proj",
        ),
        (
            "\"target_modules\": \".*nothing\"",
            "target_modules",
            "down_proj, gate_proj",
        ),
        ("\"target_modules\": \"(\"", "target_modules", "pattern"),
        (
            "\"target_modules\": [\"lm_head\"]",
            "lm_head",
            "modules_to_save",
        ),
        ("\"modules_to_save\": [\"score\"]", "score", "nearest"),
        ("\"r\": 0", "\"r\"", "ranks"),
        ("\"lora_dropout\": 1.0", "lora_dropout", "below 1"),
        ("\"bias\": \"all\"", "bias", "none"),
        (
            "\"init_lora_weights\": \"pissa\"",
            "init_lora_weights",
            "pissa",
        ),
        ("\"fan_in_fan_out\": true", "fan_in_fan_out", "GPT-2"),
        ("\"lora_bias\": true", "lora_bias", "not supported"),
        ("\"use_qalora\": true", "use_qalora", "not supported"),
        (
            "\"layer_replication\": [[0, 1]]",
            "layer_replication",
            "not supported",
        ),
        (
            "\"rank_pattern\": {\"q_proj\": 0}",
            "rank_pattern",
            "q_proj",
        ),
        ("\"something_new\": 3", "something_new", "not supported"),
    ] {
        let json = match json.contains("target_modules") {
            true => json.to_owned(),
            false => format!("{some}, {json}"),
        };
        check(&json, key, hint);
    }
    let ia3 = AdapterConfig::from_json("f", "{\"peft_type\": \"IA3\"}").unwrap_err();
    assert!(ia3.to_string().contains("IA3"), "{ia3}");
}

/// What is below the first adapted layer keeps nothing and costs no backward pass.
#[test]
fn layers_below_the_first_adapter_keep_nothing() {
    let cpu = Cpu::new(1);
    let peak = |layer: usize| {
        let mut case = Case::open(fixtures().join("peft/llama_to_transform"));
        case.settings.layers_to_transform = Some(vec![layer]);
        let mut model = decoder(&case.config);
        model.adapt(case.config.naming, &case.settings).unwrap();
        let store = Store::init(&cpu, model.units(), DType::F32, 0);
        let mut engine = Engine::initialize(model, store, options(false)).unwrap();
        let before = cpu.memory.now().of(Category::Activations);
        let loss = engine.forward(case.loss_batch(DType::F32)).unwrap();
        let kept = cpu.memory.now().of(Category::Activations) - before;
        engine.backward(loss).unwrap();
        let trained = engine.store().params().filter(|(_, spec)| spec.trained);
        let moved = trained.filter(|(id, _)| engine.store().gradient(*id).unwrap().is_some());
        assert_eq!(moved.count(), 4);
        kept
    };
    let (both, last) = (peak(0), peak(1));
    assert!(last * 3 < both * 2, "{last} against {both}");
}

/// DPO, ORPO and KTO by TRL's formulas: loss and every gradient, in one batch and with the reference and the divergence that
/// the trainer would compute.
#[test]
fn answers_are_compared_as_trl_does() {
    let cpu = Cpu::new(2);
    let case = Case::open(fixtures().join("peft/llama"));
    let golden = Tensors::open(&case.base.join("golden.safetensors")).unwrap();
    let ints = |name: &str| {
        golden
            .get(name)
            .unwrap()
            .as_slice::<i32>()
            .unwrap()
            .to_vec()
    };
    let (ids, starts) = (ints("ids"), ints("cu_seqlens"));
    let sequence = |i: usize| ids[starts[i] as usize..starts[i + 1] as usize].to_vec();
    let sequences: Vec<Vec<i32>> = [0, 2, 3, 0].into_iter().map(sequence).collect();
    let next = |i: usize| &sequences[(i + 1) % 4];
    let mismatched: Vec<Vec<i32>> = (0..4)
        .map(|i| [&sequences[i][..2], &next(i)[2..]].concat())
        .collect();
    // With `prompts`, those of every other sequence are learned too.
    let batch = |sequences: &[Vec<i32>], prompts: bool, goal: &dyn Fn(Arc<[i64]>) -> Goal| {
        let targets = sequences.iter().enumerate().flat_map(|(index, s)| {
            let target = |at: usize| {
                if at == 0 && !(prompts && index % 2 == 0) {
                    -100
                } else {
                    s.get(at + 1).map_or(-100, |&id| id.into())
                }
            };
            (0..s.len()).map(target).collect::<Vec<i64>>()
        });
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let ids = sequences.iter().flatten().map(|&id| id as u32).collect();
        Tokens::new(ids, &lengths, goal(targets.collect()), DType::F64)
    };
    let losses = |sequences: &[Vec<i32>], base: bool| -> Vec<f64> {
        let (model, _, store) = case.load(&cpu, DType::F64, None);
        let tokens = batch(sequences, false, &|targets| Goal::TokenLosses { targets });
        let mut x = Tensor::empty(&cpu, [0], DType::F64, Category::Activations);
        for (unit, layer) in model.layers() {
            let tape = Tape::rehearsal(&cpu);
            let mut tape = if base { tape.without_adapters() } else { tape };
            let input = tape.input(x);
            x = layer
                .forward(&store.gather(unit).unwrap(), input, &tokens, &mut tape)
                .tensor;
        }
        let all = x.to_f64();
        let mut start = 0;
        let sums = sequences.iter().map(|s| {
            start += s.len();
            -all[start - s.len()..start].iter().sum::<f64>()
        });
        sums.collect()
    };
    let mut start = 0;
    let segments: Vec<std::ops::Range<usize>> = sequences
        .iter()
        .map(|s| {
            start += s.len();
            start - s.len()..start
        })
        .collect();
    let pairs = losses(&mismatched, false)
        .into_iter()
        .zip(losses(&mismatched, true));
    let kl = (pairs.map(|(a, b)| a - b).sum::<f64>() / 4.0).max(0.0);
    let beta = 0.3;
    let dpo = Preference::Dpo {
        beta,
        label_smoothing: 0.1,
    };
    let kto = Preference::Kto {
        beta,
        desirable_weight: 1.0,
        undesirable_weight: 1.0,
    };
    for (name, method, count) in [
        ("dpo", dpo, 2.0),
        ("orpo", Preference::Orpo { beta }, 2.0),
        ("kto", kto, 4.0),
    ] {
        let tokens: Vec<usize> = sequences.iter().map(|s| s.len() - 2).collect();
        let prompts = matches!(method, Preference::Orpo { .. });
        let firsts = [segments[0].start, segments[2].start];
        let comparison = Arc::new(Comparison {
            method,
            segments: segments.clone(),
            labels: vec![true, false, true, false],
            chosen_tokens: (tokens[0] + tokens[2] + 2) as f64,
            prompts: (0..segments[3].end)
                .map(|at| prompts && firsts.contains(&at))
                .collect(),
            tokens,
            reference: losses(&sequences, true),
            kl,
            count,
            rewards: Default::default(),
        });
        let (model, adapter, store) = case.load(&cpu, DType::F64, None);
        let mut engine = Engine::initialize(model, store, options(false)).unwrap();
        let tokens = batch(&sequences, prompts, &|targets| Goal::Objective {
            targets,
            objective: comparison.clone(),
        });
        let loss = engine.forward(tokens).unwrap();
        let d = difference(&[loss.value()], &case.answers(&format!("{name}.loss")));
        assert!(d < 1e-6, "{name}: the loss differs by {d:.1e}");
        engine.backward(loss).unwrap();
        for file in &adapter.tensors {
            let got = joined(engine.model(), file, &mut |id| gradient(&engine, id));
            let want = case.answers(&format!("{name}.grad.{}", file.name));
            let d = difference(&got, &want);
            assert!(d < 3e-6, "{name}: {} differs by {d:.1e}", file.name);
        }
        let rewards = comparison.rewards();
        assert_eq!((rewards.count_chosen, rewards.count_rejected), (2.0, 2.0));
    }
}
