//! PEFT's adapters on loaded models: known logits, files there and back, merged and taken out again.

use std::path::{Path, PathBuf};
use windlass_infer::{AdapterFolder, InferError, LoadIn, LoadedModel};
use windlass_model::{ADAPTER_FILE, AdapterConfig, Targets};
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::BlockType;
use windlass_store::safetensors::{Dtype, Tensors};
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Cpu, DType};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../windlass-train/tests/fixtures")
}

fn adapters() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("peft")).unwrap();
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

fn base(adapter: &Path) -> PathBuf {
    let config = AdapterFolder::open(adapter).unwrap().config;
    let base = config.base_model_name_or_path.unwrap();
    fixtures()
        .join("arch")
        .join(base.strip_prefix("tiny/").unwrap())
}

fn open(cpu: &Cpu, base: &Path) -> LoadedModel {
    LoadedModel::open(cpu, base, Some(DType::F32)).unwrap()
}

/// The logits of the known sequences.
fn logits(model: &LoadedModel, base: &Path) -> Vec<f32> {
    let golden = Tensors::open(&base.join("golden.safetensors")).unwrap();
    let ints = |name: &str| {
        golden
            .get(name)
            .unwrap()
            .as_slice::<i32>()
            .unwrap()
            .to_vec()
    };
    let ids: Vec<u32> = ints("ids").iter().map(|&id| id as u32).collect();
    let starts: Vec<usize> = ints("cu_seqlens").iter().map(|&at| at as usize).collect();
    let sequences = starts.windows(2);
    sequences
        .flat_map(|w| model.logits(&ids[w[0]..w[1]]).unwrap().to_f32())
        .collect()
}

fn golden(folder: &Path, name: &str) -> Vec<f32> {
    let tensors = Tensors::open(&folder.join("golden.safetensors")).unwrap();
    let view = tensors.get(name).unwrap();
    let mut out = vec![0f32; view.elements()];
    view.read_into(0..view.rows(), &mut out).unwrap();
    out
}

/// Largest difference relative to the largest element.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-6, |m: f32, v| m.max(v.abs()));
    let pairs = got.iter().zip(want);
    pairs.fold(0.0, |m: f32, (g, w)| m.max((g - w).abs())) / scale
}

fn check(folder: &Path) {
    let name = folder.file_name().unwrap().to_string_lossy();
    let (cpu, base) = (Cpu::new(2), base(folder));
    let mut model = open(&cpu, &base);
    let plain = logits(&model, &base);
    model.add_adapter(folder).unwrap();
    let adapted = logits(&model, &base);
    let d = difference(&adapted, &golden(folder, "logits"));
    assert!(d < 1e-4, "{name}: logits differ by {d:.1e}");
    let d = difference(&adapted, &plain);
    assert!(d > 1e-3, "{name}: the adapter changes nothing: {d:.1e}");

    let temporary = tempfile::tempdir().unwrap();
    let again = temporary.path().join("adapter");
    model.save_adapter(&again).unwrap();
    let (old, new) = (folder.join(ADAPTER_FILE), again.join(ADAPTER_FILE));
    let (old, new) = (Tensors::open(&old).unwrap(), Tensors::open(&new).unwrap());
    assert!(old.names().eq(new.names()), "{name}");
    for tensor in old.names() {
        let (old, new) = (old.get(tensor).unwrap(), new.get(tensor).unwrap());
        assert_eq!(
            (old.shape, old.bytes),
            (new.shape, new.bytes),
            "{name}: {tensor}"
        );
    }

    let merged = temporary.path().join("merged");
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::BF16, 4e-2)] {
        model.save_merged(&merged, dtype, 1.0).unwrap();
        let d = difference(&logits(&open(&cpu, &merged), &base), &adapted);
        assert!(d < tolerance, "{name}: merged in {dtype:?}, {d:.1e}");
    }
    let config = AdapterFolder::open(folder).unwrap().config;
    if !config.use_dora && config.modules_to_save.is_empty() {
        model.save_merged(&merged, Dtype::F32, 1.0).unwrap();
        let mut merged = open(&cpu, &merged);
        merged.add_adapter(folder).unwrap();
        let unmerged = temporary.path().join("unmerged");
        merged.save_merged(&unmerged, Dtype::F32, -1.0).unwrap();
        let d = difference(&logits(&open(&cpu, &unmerged), &base), &plain);
        assert!(d < 1e-5, "{name}: taken out again, {d:.1e}");
    }
}

#[test]
fn adapters_compute_what_peft_computes() {
    let folders = adapters();
    assert_eq!(folders.len(), 15);
    folders.iter().for_each(|folder| check(folder));
}

/// A new adapter changes nothing, on plain and on packed weights; with magnitudes, nothing but roundings.
#[test]
fn a_new_adapter_changes_nothing() {
    let cpu = Cpu::new(2);
    let base = fixtures().join("arch/llama");
    for load_in in [LoadIn::AsStored, LoadIn::Packed(Layout::q4(32))] {
        for use_dora in [false, true] {
            let mut model = LoadedModel::open_in(&cpu, &base, Some(DType::F32), load_in).unwrap();
            let before = logits(&model, &base);
            let config = AdapterConfig {
                r: 4,
                use_dora,
                modules_to_save: vec!["lm_head".into()],
                target_modules: Targets::Names(vec!["q_proj".into(), "down_proj".into()]),
                ..AdapterConfig::default()
            };
            model.new_adapter(&config, 7).unwrap();
            let d = difference(&logits(&model, &base), &before);
            let packed = load_in != LoadIn::AsStored;
            // A head that is to be trained is unpacked: its input is no longer rounded.
            let bound = [if use_dora { 1e-6 } else { 0.0 }, 2e-2][usize::from(packed)];
            assert!(d <= bound, "{load_in:?}, DoRA {use_dora}: {d:.1e}");
        }
    }
}

/// As GGUF files and back: the same logits. What such files cannot say is refused.
#[test]
fn gguf_adapters_compute_the_same() {
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("adapter.gguf");
    let mut written = 0;
    for folder in adapters() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let base = base(&folder);
        let mut model = open(&cpu, &base);
        model.add_adapter(&folder).unwrap();
        let config = model.adapter.as_ref().unwrap().config.clone();
        let result = model.save_adapter_gguf(&RealDisk, &file, BlockType::F32);
        if config.use_dora || !config.modules_to_save.is_empty() {
            let error = result.unwrap_err();
            assert!(error.to_string().contains("cannot hold"), "{name}: {error}");
            assert!(error.hint().is_some());
            continue;
        }
        if let Err(InferError::Model(error)) = &result {
            // Nor can a GGUF file say what the model is.
            assert!(error.to_string().contains("config.json"), "{name}: {error}");
            continue;
        }
        result.unwrap();
        written += 1;
        let mut again = open(&cpu, &base);
        again.add_adapter(&file).unwrap();
        let d = difference(&logits(&again, &base), &logits(&model, &base));
        assert!(d < 2e-6, "{name}: {d:.1e}");
        let other = if base.ends_with("gpt2") {
            "llama"
        } else {
            "gpt2"
        };
        let mut other = open(&cpu, &fixtures().join("arch").join(other));
        let error = other.add_adapter(&file).unwrap_err();
        assert!(
            error.to_string().contains("architecture"),
            "{name}: {error}"
        );
    }
    assert!(written >= 8, "{written} adapters were written");
}

/// The difference of a model and the same with an adapter merged is that adapter; less rank leaves more of it.
#[test]
fn an_adapter_is_found_in_a_difference() {
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let [merged, found] = ["merged", "found"].map(|name| place.path().join(name));
    for name in ["llama", "gpt2", "gpt_neox", "phi3", "gemma2"] {
        let folder = fixtures().join("peft").join(name);
        let base = base(&folder);
        let mut adapted = open(&cpu, &base);
        adapted.add_adapter(&folder).unwrap();
        adapted.save_merged(&merged, Dtype::F32, 1.0).unwrap();
        let (plain, tuned) = (open(&cpu, &base), open(&cpu, &merged));
        let whole = adapted.adapter.as_ref().unwrap().config.clone();
        let mut left = Vec::new();
        for r in [1, 2, whole.r] {
            let config = AdapterConfig {
                r,
                rank_pattern: Vec::new(),
                alpha_pattern: Vec::new(),
                ..whole.clone()
            };
            let told = plain.extract_adapter(&tuned, &config, &found).unwrap();
            assert!(told.modules > 0, "{name}");
            left.push(told.rest / told.change);
        }
        assert!(
            left[0] > 1.05 * left[1] && left[1] > left[2],
            "{name}: {left:?}"
        );
        assert!(left[2] < 1e-4, "{name}: {left:?}");
        let mut again = open(&cpu, &base);
        again.add_adapter(&found).unwrap();
        let d = difference(&logits(&again, &base), &logits(&adapted, &base));
        assert!(d < 1e-4, "{name}: {d:.1e}");
    }
}

/// `‖W - Q - BA‖` falls with LoftQ, and with every turn.
#[test]
fn loftq_makes_up_for_packing() {
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    for name in ["llama", "phi3", "gpt2"] {
        let base = fixtures().join("arch").join(name);
        let config = AdapterConfig {
            r: 4,
            fan_in_fan_out: name == "gpt2",
            ..AdapterConfig::default()
        };
        let plain = logits(&open(&cpu, &base), &base);
        let mut left = Vec::new();
        for turns in [1, 2, 5] {
            let load_in = LoadIn::Packed(Layout::q4(32));
            let mut model = LoadedModel::open_in(&cpu, &base, Some(DType::F32), load_in).unwrap();
            model.kv_type = KvType::Plain(DType::F32);
            let packed = difference(&logits(&model, &base), &plain);
            let told = model.loftq(&base, &config, turns, place.path()).unwrap();
            assert!(told.rest < 0.9 * told.change, "{name}: {told:?}");
            left.push(told.rest);
            model.add_adapter(place.path()).unwrap();
            let d = difference(&logits(&model, &base), &plain);
            assert!(d < packed, "{name}: {d:.1e} for {packed:.1e}");
        }
        assert!(left[0] > left[1] && left[1] > left[2], "{name}: {left:?}");
    }
    let mut model = open(&cpu, &fixtures().join("arch/llama"));
    let error = model.loftq(
        &fixtures().join("arch/llama"),
        &AdapterConfig::default(),
        1,
        place.path(),
    );
    let error = error.unwrap_err();
    assert!(error.to_string().contains("is not packed"), "{error}");
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let cpu = Cpu::new(1);
    let refused = |base: &str, folder: &Path, words: &[&str]| {
        let mut model = open(&cpu, &fixtures().join("arch").join(base));
        let error = model.add_adapter(folder).unwrap_err();
        let text = format!("{error} {}", error.hint().unwrap_or_default());
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
    };
    let peft = fixtures().join("peft");
    refused(
        "qwen3",
        &peft.join("llama"),
        &["tensors differ", "the model needs", "tiny/llama"],
    );
    refused("gpt2", &peft.join("qwen3"), &["target_modules", "c_attn"]);
    refused(
        "llama",
        &peft.join("nothing"),
        &["adapter_config.json", "cannot be read"],
    );
    let folder = tempfile::tempdir().unwrap();
    let config = peft.join("llama/adapter_config.json");
    std::fs::copy(config, folder.path().join("adapter_config.json")).unwrap();
    refused("llama", folder.path(), &["no adapter_model.safetensors"]);
    std::fs::write(folder.path().join("adapter_model.bin"), [0]).unwrap();
    refused("llama", folder.path(), &["pickle", "safe_serialization"]);
    // A table and a head of their own, for a model in which they are one.
    let tied = |place: &str| {
        let from = peft.join("llama_tied").join(place);
        (std::fs::read(from).unwrap(), folder.path().join(place))
    };
    let (tensors, file) = tied(ADAPTER_FILE);
    std::fs::write(file, &tensors).unwrap();
    let (settings, file) = tied("adapter_config.json");
    let settings = String::from_utf8(settings).unwrap();
    let apart = settings.replace(
        "\"ensure_weight_tying\": true",
        "\"ensure_weight_tying\": false",
    );
    std::fs::write(&file, apart).unwrap();
    refused(
        "llama_biases_tied",
        folder.path(),
        &["table and head in one", "ensure_weight_tying"],
    );
    std::fs::write(&file, settings).unwrap();
    let mut damaged = tensors;
    let header = u64::from_le_bytes(damaged[..8].try_into().unwrap());
    // The first element of the first tensor, which is the head.
    damaged[8 + header as usize] ^= 1;
    std::fs::write(folder.path().join(ADAPTER_FILE), damaged).unwrap();
    refused(
        "llama_biases_tied",
        folder.path(),
        &["are one in the model"],
    );
}

/// A model with several adapters gives the logits of one merged after the other.
fn check_sum(name: &str, first: &str, second: &str, weight: f64) {
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| fixtures().join("peft").join(name);
    let (a, b) = (path(first), path(second));
    let base = base(&a);
    let mut sum = open(&cpu, &base);
    sum.add_adapters(&[(a.clone(), 1.0), (b.clone(), weight)])
        .unwrap();
    let got = logits(&sum, &base);

    let [merged, part] = ["merged", "part"].map(|name| place.path().join(name));
    let mut one = open(&cpu, &base);
    one.add_adapter(&a).unwrap();
    let alone = logits(&one, &base);
    one.save_merged(&merged, Dtype::F32, 1.0).unwrap();
    std::fs::create_dir(&part).unwrap();
    std::fs::copy(b.join(ADAPTER_FILE), part.join(ADAPTER_FILE)).unwrap();
    let mut config = AdapterFolder::open(&b).unwrap().config;
    config.lora_alpha *= weight;
    let alphas = config.alpha_pattern.iter_mut();
    alphas.for_each(|(_, alpha)| *alpha *= weight);
    std::fs::write(
        part.join("adapter_config.json"),
        config.to_json().to_string(),
    )
    .unwrap();
    let mut both = open(&cpu, &merged);
    both.add_adapter(&part).unwrap();
    let d = difference(&got, &logits(&both, &base));
    assert!(d < 1e-5, "{name}: {d:.1e}");
    let d = difference(&got, &alone);
    assert!(d > 1e-3, "{name}: the second changes nothing: {d:.1e}");

    // The sum is an adapter like others: merged, as a GGUF file, and with one of its parts as such a file.
    sum.save_merged(&merged, Dtype::F32, 1.0).unwrap();
    let d = difference(&logits(&open(&cpu, &merged), &base), &got);
    assert!(d < 1e-5, "{name}: merged, {d:.1e}");
    let file = place.path().join("a.gguf");
    if one
        .save_adapter_gguf(&RealDisk, &file, BlockType::F32)
        .is_ok()
    {
        let mut again = open(&cpu, &base);
        again.add_adapters(&[(file, 1.0), (b, weight)]).unwrap();
        let d = difference(&logits(&again, &base), &got);
        assert!(d < 1e-5, "{name}: from a GGUF file, {d:.1e}");
    }
}

#[test]
fn several_adapters_add_up() {
    for (first, second, weight) in [
        ("llama", "llama_rslora_patterns", 1.0),
        ("llama_rslora_patterns", "llama_to_transform", 0.5),
        ("llama", "llama_modules_to_save", 1.0),
        ("gpt2", "gpt2_usual", -2.0),
        ("phi3", "phi3", 0.25),
        ("gpt_neox", "gpt_neox", 0.5),
    ] {
        check_sum(
            &format!("{first} + {weight} {second}"),
            first,
            second,
            weight,
        );
    }
    let cpu = Cpu::new(1);
    for (first, second, weight, words) in [
        ("llama", "llama_dora", 1.0, "stands alone"),
        ("llama_dora", "llama", 1.0, "stands alone"),
        ("llama", "llama_modules_to_save", 0.5, "counts 1"),
        (
            "llama_modules_to_save",
            "llama_modules_to_save",
            1.0,
            "has another",
        ),
    ] {
        let path = |name: &str| fixtures().join("peft").join(name);
        let mut model = open(&cpu, &base(&path(first)));
        let error = model
            .add_adapters(&[(path(first), 1.0), (path(second), weight)])
            .unwrap_err();
        let text = format!("{error} {}", error.hint().unwrap_or_default());
        assert!(text.contains(words) && text.contains("merge"), "{text}");
    }
}
