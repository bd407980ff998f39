//! Every architecture against the known answers under `fixtures/arch`: logits, loss, every gradient, greedy tokens.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use windlass_model::{DecoderConfig, Goal, KvBlocks, Naming, Sequence, Tokens, decoder};
use windlass_store::{Store, load_weights, safetensors::Tensors};
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::{Cpu, DType, RouterStats};
use windlass_train::{Engine, EngineOptions, run};

fn cases() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/arch");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    cases.retain(|path| path.is_dir());
    cases.sort();
    assert_eq!(cases.len(), 25);
    cases
}

struct Golden(Tensors);

impl Golden {
    fn floats(&self, name: &str) -> Vec<f64> {
        let view = self.0.get(name).unwrap();
        let mut out = vec![0f64; view.elements()];
        view.read_into(0..view.rows(), &mut out).unwrap();
        out
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        self.0
            .get(name)
            .unwrap()
            .as_slice::<i32>()
            .unwrap()
            .to_vec()
    }
}

fn config(case: &Path, file: &str) -> DecoderConfig {
    let path = case.join(file);
    DecoderConfig::from_json(
        &path.display().to_string(),
        &std::fs::read_to_string(&path).unwrap(),
    )
    .unwrap()
}

fn store(cpu: &Cpu, case: &Path, config: &DecoderConfig, dtype: DType) -> Store {
    let model = decoder(config);
    let map = config.naming.file_tensors(&model);
    let tensors = Tensors::open(case).unwrap();
    let (weights, unused) =
        load_weights(cpu, &tensors, model.units(), &map, |_| None, dtype).unwrap();
    assert_eq!(unused, Vec::<String>::new(), "{}", case.display());
    Store::new(cpu, model.units(), weights)
}

/// Largest difference relative to the largest element.
fn difference(name: &str, got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "elements of {name}");
    let scale = want.iter().fold(1e-6, |m: f64, v| m.max(v.abs()));
    got.iter()
        .zip(want)
        .fold(0.0, |m: f64, (g, w)| m.max((g - w).abs()))
        / scale
}

fn check(case: &Path, config: &DecoderConfig, dtype: DType, tolerance: f64) {
    let name = case.file_name().unwrap().to_string_lossy().into_owned();
    let golden = Golden(Tensors::open(&case.join("golden.safetensors")).unwrap());
    let cpu = Cpu::new(2);
    let starts = golden.ints("cu_seqlens");
    let lengths: Vec<usize> = starts.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
    let ids: Vec<u32> = golden.ints("ids").iter().map(|&i| i as u32).collect();
    let targets: Arc<[i64]> = golden.ints("targets").iter().map(|&t| t as i64).collect();
    let model = decoder(config);
    let map = config.naming.file_tensors(&model);
    let close = |what: &str, got: &[f64], want: &[f64]| {
        let d = difference(what, got, want);
        assert!(d <= tolerance, "{name} {dtype}: {what} differs by {d:.2e}");
    };

    let rows = (0..ids.len() as u32).collect();
    let batch = Tokens::new(ids.clone(), &lengths, Goal::Logits { rows }, dtype);
    let logits = run(&model, &store(&cpu, case, config, dtype), &batch);
    close(
        "logits",
        &logits.unwrap().to_f64(),
        &golden.floats("logits"),
    );

    for checkpointing in [false, true] {
        let options = EngineOptions {
            activation_checkpointing: checkpointing,
            ..Default::default()
        };
        let mut engine =
            Engine::initialize(decoder(config), store(&cpu, case, config, dtype), options).unwrap();
        let denominator = targets.iter().filter(|&&t| t >= 0).count() as f64;
        let mut batch = Tokens::new(
            ids.clone(),
            &lengths,
            Goal::Loss {
                targets: targets.clone(),
                denominator,
            },
            dtype,
        );
        batch.router = config
            .experts
            .as_ref()
            .filter(|e| e.router_aux_loss_coef > 0.0)
            .map(|e| (Arc::new(RouterStats::default()), e.router_aux_loss_coef));
        let loss = engine.forward(batch).unwrap();
        close("loss", &[loss.value()], &golden.floats("loss"));
        engine.backward(loss).unwrap();
        let store = engine.store();
        let gradients: Vec<_> = store
            .params()
            .filter_map(|(id, _)| Some((id, store.gradient(id).unwrap()?.to_f64())))
            .collect();
        for file in &map {
            let parts: Vec<Vec<f64>> = file
                .parts
                .iter()
                .map(|id| {
                    let len = model.units()[id.unit].params[id.slot].shape.len();
                    gradients
                        .iter()
                        .find(|(other, _)| other == id)
                        .map_or(vec![0.0; len], |(_, g)| g.clone())
                })
                .collect();
            let rows: Vec<usize> = file
                .parts
                .iter()
                .map(|id| model.units()[id.unit].params[id.slot].shape[0])
                .collect();
            let parts: Vec<&[f64]> = parts.iter().map(Vec::as_slice).collect();
            close(
                &file.name,
                &file.join(&parts, &rows),
                &golden.floats(&format!("grad.{}", file.name)),
            );
        }
    }

    greedy(&name, &cpu, case, config, dtype, &golden);
}

/// Twenty greedy tokens through the key-value cache, the prompt in one piece and in two.
fn greedy(
    name: &str,
    cpu: &Cpu,
    case: &Path,
    config: &DecoderConfig,
    dtype: DType,
    golden: &Golden,
) {
    let model = decoder(config);
    let store = store(cpu, case, config, dtype);
    let prompt: Vec<u32> = golden
        .ints("greedy.prompt")
        .iter()
        .map(|&i| i as u32)
        .collect();
    for cut in [prompt.len(), 2] {
        let kind = KvType::Plain(dtype);
        let blocks = Arc::new(Mutex::new(KvBlocks::new(cpu, config, kind, 1)));
        let mut past = 0;
        let mut step = |ids: Vec<u32>| {
            let tokens = ids.len();
            let rows = [tokens as u32 - 1].into();
            let sequence = Sequence {
                past,
                tokens,
                blocks: &[0],
            };
            let batch = Tokens::ragged(ids, &[sequence], &blocks, rows, dtype);
            let logits = run(&model, &store, &batch).unwrap().to_f64();
            past += tokens;
            logits
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .unwrap()
                .0 as u32
        };
        let mut next = step(prompt[..cut].to_vec());
        if cut < prompt.len() {
            next = step(prompt[cut..].to_vec());
        }
        let mut tokens = vec![next as i32];
        while tokens.len() < 20 {
            next = step(vec![next]);
            tokens.push(next as i32);
        }
        assert_eq!(
            tokens,
            golden.ints("greedy.tokens"),
            "{name} {dtype}: greedy tokens, prompt cut at {cut}"
        );
    }
}

#[test]
fn every_architecture_agrees_with_transformers() {
    for case in cases() {
        for file in ["config.json", "config.v4.json"] {
            let config = config(&case, file);
            assert!(matches!(config.naming, Naming::Llama) || config.json.is_object());
            check(&case, &config, DType::F64, 2e-6);
            check(&case, &config, DType::F32, 1e-4);
        }
    }
}
