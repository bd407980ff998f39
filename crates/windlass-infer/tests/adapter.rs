//! PEFT's adapters on loaded models: known logits, files there and back, merged and taken out again.

use std::path::{Path, PathBuf};
use windlass_infer::{AdapterFolder, LoadIn, LoadedModel};
use windlass_model::{ADAPTER_FILE, AdapterConfig, Targets};
use windlass_store::safetensors::{Dtype, Tensors};
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
    assert_eq!(folders.len(), 14);
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
}
