//! Folders of packed weights: the same bits as the model that was kept, and what is said of damaged ones.

use std::fs;
use std::path::{Path, PathBuf};
use windlass_infer::{LoadIn, LoadedModel};
use windlass_store::atomic::RealDisk;
use windlass_store::llama2c::convert;
use windlass_store::packed::FILE_NAME;
use windlass_tensor::kernels::packed::{LAYOUT_VERSION, Layout};
use windlass_tensor::{Cpu, DType};

fn stories() -> Option<PathBuf> {
    let data = std::env::var_os("WINDLASS_TEST_DATA");
    if data.is_none() {
        println!("WINDLASS_TEST_DATA is not set: nothing is compared");
    }
    Some(PathBuf::from(data?).join("models/stories260K"))
}

const TEXT: &str = "Once upon a time,   there was a girl.\n\n\nShe said: \"aaaa\"";

/// Keeps a model, opens it again, and holds the two against each other.
fn check(model: &LoadedModel, folder: &Path) {
    model.save_packed(&RealDisk, folder).unwrap();
    let kept = LoadedModel::open(model.store.cpu(), folder, None).unwrap();
    let name = folder.display();
    assert_eq!(
        (kept.dtype, kept.notes.len()),
        (model.dtype, model.config.notes.len())
    );
    assert_eq!(kept.weight_bytes().unwrap(), model.weight_bytes().unwrap());
    let ids = model.encode(TEXT).unwrap();
    assert_eq!(kept.encode(TEXT).unwrap(), ids, "{name}");
    let (want, got) = (model.logits(&ids).unwrap(), kept.logits(&ids).unwrap());
    assert_eq!(got.to_f32(), want.to_f32(), "{name}");
    let other = LoadedModel::open(model.store.cpu(), folder, Some(DType::Bf16)).unwrap();
    assert_ne!(
        other.logits(&ids).unwrap().to_f32(),
        want.to_f32(),
        "{name}"
    );
}

#[test]
fn kept_models_are_the_same_models() {
    let Some(data) = stories() else { return };
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let folder = |name: &str| place.path().join(name);
    for name in ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] {
        let path = data.join(format!("gguf-v3/stories260K-{name}.gguf"));
        check(
            &LoadedModel::open(&cpu, &path, None).unwrap(),
            &folder(name),
        );
    }
    let plain = folder("plain");
    let (model, tokens) = (data.join("stories260K.bin"), data.join("tok512.bin"));
    convert(&RealDisk, &model, &tokens, &plain).unwrap();
    for (layout, dtype) in [
        (Layout::q4(32), DType::F32),
        (Layout::q4_asymmetric(64), DType::F16),
        (Layout::q8(), DType::F32),
    ] {
        let load_in = LoadIn::Packed(layout);
        let model = LoadedModel::open_in(&cpu, &plain, Some(dtype), load_in).unwrap();
        // The folder of the one before is replaced.
        check(&model, &folder("own"));
    }
    let again = LoadedModel::open_in(&cpu, &folder("own"), None, LoadIn::Packed(Layout::q8()));
    let note = again.unwrap().notes.pop().unwrap();
    assert!(note.contains("--load-in changes nothing"), "{note}");

    let unpacked = LoadedModel::open_in(&cpu, &folder("own"), None, LoadIn::Plain).unwrap();
    assert!(!unpacked.is_packed().unwrap());
    let packed = LoadedModel::open(&cpu, &folder("own"), None).unwrap();
    let dense = LoadedModel::open(&cpu, &plain, None).unwrap();
    for (model, folder, expected) in [
        (&dense, folder("new"), "plain weights"),
        (&packed, plain.clone(), "is not a folder of packed weights"),
        (&packed, folder("own"), "the model comes from"),
    ] {
        let error = model.save_packed(&RealDisk, &folder).unwrap_err();
        let told = error.to_string();
        assert!(
            told.contains(expected),
            "'{told}' does not say '{expected}'"
        );
        assert!(error.hint().is_some());
    }
    damaged(&cpu, &folder("Q4_0"), &folder("own"));
    // A file is known by how it begins.
    let renamed = folder("model.bin");
    fs::copy(data.join("gguf-v3/stories260K-Q4_0.gguf"), &renamed).unwrap();
    LoadedModel::open(&cpu, &renamed, None).unwrap();
}

fn damaged(cpu: &Cpu, folder: &Path, other: &Path) {
    let path = folder.join(FILE_NAME);
    let bytes = fs::read(&path).unwrap();
    let with = |at: usize, new: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        bytes
    };
    let text = |from: &str, to: &str| {
        let at = bytes
            .windows(from.len())
            .position(|part| part == from.as_bytes());
        with(at.unwrap(), to.as_bytes())
    };
    for (bytes, expected) in [
        (Vec::new(), "no file of packed weights"),
        (b"GGUF".repeat(30), "no file of packed weights"),
        (bytes[..10].to_vec(), "cut short"),
        (bytes[..100].to_vec(), "cut short"),
        (bytes[..bytes.len() - 1].to_vec(), "cut short"),
        (bytes[..bytes.len() / 2].to_vec(), "cut short"),
        (with(8, &7u32.to_le_bytes()), "packed by file layout 7"),
        (
            with(12, &(LAYOUT_VERSION + 1).to_le_bytes()),
            "packed by matrix layout",
        ),
        (with(16, &u64::MAX.to_le_bytes()), "cut short"),
        (text("embed_tokens", "embed_tokenz"), "checksum"),
        (fs::read(other.join(FILE_NAME)).unwrap(), ""),
    ] {
        fs::write(&path, bytes).unwrap();
        let found = LoadedModel::open(cpu, folder, None);
        if expected.is_empty() {
            // Other weights of the same shapes.
            assert!(found.is_ok());
            continue;
        }
        let error = found.err().unwrap();
        let told = error.to_string();
        assert!(
            told.contains(expected),
            "'{told}' does not say '{expected}'"
        );
        assert!(error.hint().is_some());
    }
    let config = folder.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let narrow = text.replace("\"hidden_size\": 64", "\"hidden_size\": 32");
    assert_ne!(text, narrow);
    fs::write(&config, narrow).unwrap();
    let error = LoadedModel::open(cpu, folder, None)
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("expected"), "{error}");
}
