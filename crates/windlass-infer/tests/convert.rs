//! Folders into GGUF files and back, with weights that no initializer would choose, for every architecture.

use serde_json::{Value as Json, json};
use std::path::Path;
use windlass_infer::convert::{Folder, folder_dtype, write_hugging_face};
use windlass_infer::{InferError, LoadedModel};
use windlass_model::{DecoderConfig, Tokenizer, decoder};
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::{BlockType, File, Value};
use windlass_store::safetensors::{Dtype, Options, Tensors};
use windlass_store::save_weights;
use windlass_tensor::{Cpu, DType};

/// A number between -1 and 1 with few bits, so that Gemma's norms lose none when 1 is added.
fn number(seed: usize) -> f32 {
    let mixed = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed >> 40) % 512) as f32 / 256.0 - 1.0
}

/// A configuration of a model type with some keys changed.
fn description(model_type: &str, changes: &Json) -> Json {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3,
        "rope_theta": 100.0, "tie_word_embeddings": false,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

/// Writes a model folder.
fn folder(path: &Path, json: &Json) {
    let config = DecoderConfig::from_json("config.json", &json.to_string()).unwrap();
    std::fs::create_dir_all(path).unwrap();
    std::fs::write(path.join("config.json"), json.to_string()).unwrap();
    let model = decoder(&config);
    let map = config.naming.file_tensors(&model);
    let options = Options::default();
    let mut count = 0;
    save_weights(path, model.units(), &map, DType::F32, &options, |id| {
        let len = model.units()[id.unit].params[id.slot].shape.len();
        count += len;
        (count - len..count).map(number).collect()
    })
    .unwrap();
}

fn to_gguf(cpu: &Cpu, from: &Path, to: &Path) -> Result<Vec<String>, InferError> {
    let folder = Folder::open(from)?;
    let types = vec![BlockType::F32; folder.tensors().len()];
    let mut last = 0;
    folder.write(cpu, &RealDisk, to, (0, &types), |_, done| last = done)?;
    let elements: usize = folder.tensors().iter().map(|info| info.elements()).sum();
    assert_eq!(last, elements, "progress ends where the file does");
    Ok(folder.notes().to_vec())
}

/// All keys but the name.
fn keys(path: &Path) -> Vec<(String, Value)> {
    let file = File::open(path).unwrap();
    let keys = file
        .metadata()
        .iter()
        .filter(|(key, _)| *key != "general.name");
    keys.map(|(key, value)| (key.to_owned(), value.clone()))
        .collect()
}

fn elements(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let tensors = Tensors::open(folder).unwrap();
    let mut names: Vec<String> = tensors.names().map(String::from).collect();
    names.sort();
    let all = names.into_iter();
    all.map(|name| (name.clone(), tensors.get(&name).unwrap().bytes.to_vec()))
        .collect()
}

#[track_caller]
fn check(model_type: &str, changes: Json, tolerance: f32) {
    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let (first, file, second, again) = (path("a"), path("a.gguf"), path("b"), path("b.gguf"));
    folder(&first, &description(model_type, &changes));
    to_gguf(&cpu, &first, &file).unwrap();
    let gguf = File::open(&file).unwrap();
    assert_eq!(folder_dtype(&gguf), Dtype::F32);
    write_hugging_face(&gguf, &RealDisk, &second, Dtype::F32, |_, _| {}).unwrap();
    let (before, after) = (elements(&first), elements(&second));
    let names = |all: &[(String, Vec<u8>)]| all.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    if !["mistral"].contains(&model_type) {
        assert_eq!(names(&before), names(&after), "{model_type}");
    }
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        assert!(before == after, "{model_type}: {name}");
    }
    to_gguf(&cpu, &second, &again).unwrap();
    let (keys, once_more) = (keys(&file), keys(&again));
    if tolerance == 0.0 {
        assert_eq!(keys, once_more, "{model_type}");
    }
    let ids: Vec<u32> = (0..20).map(|i| i * 7 % 24).collect();
    let logits = |path: &Path| {
        let model = LoadedModel::open(&cpu, path, None).unwrap();
        model.logits(&ids).unwrap().to_f32()
    };
    let want = logits(&first);
    assert!(want.iter().all(|value| value.is_finite()));
    for path in [&file, &second, &again] {
        let got = logits(path);
        let off = got.iter().zip(&want).map(|(g, w)| (g - w).abs());
        let off = off.fold(0f32, f32::max);
        println!("{model_type}: off by {off:.1e}");
        assert!(off <= tolerance, "{model_type} {}: {off}", path.display());
    }
}

#[test]
fn every_architecture_survives_both_ways() {
    let none = json!({});
    check("llama", none.clone(), 0.0);
    check(
        "llama",
        json!({ "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true, "head_dim": 6 }),
        0.0,
    );
    check(
        "llama",
        json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.5 } }),
        0.0,
    );
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    check(
        "llama",
        json!({ "rope_scaling": llama3.clone(), "head_dim": 8 }),
        2e-3,
    );
    // The usual numbers are recognized.
    let mut usual = llama3;
    usual["original_max_position_embeddings"] = 8192.into();
    check(
        "llama",
        json!({ "rope_scaling": usual, "head_dim": 64, "rope_theta": 5e5 }),
        0.0,
    );
    let yarn =
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    check("llama", json!({ "rope_scaling": yarn, "head_dim": 8 }), 0.0);
    check("mistral", none.clone(), 0.0);
    let experts = json!({ "num_local_experts": 4, "num_experts_per_tok": 2 });
    check("mixtral", experts, 0.0);
    check("smollm3", none.clone(), 0.0);
    check("qwen2", none.clone(), 0.0);
    check("qwen3", json!({ "head_dim": 10 }), 0.0);
    let experts = json!({
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "norm_topk_prob": true,
        "head_dim": 4,
    });
    check("qwen3_moe", experts, 0.0);
    let caps = json!({
        "head_dim": 6, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0, "sliding_window": 4, "tie_word_embeddings": true,
    });
    check("gemma2", caps, 0.0);
    let windows = json!({
        "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4, "sliding_window_pattern": 3,
        "rope_local_base_freq": 10.0, "tie_word_embeddings": true,
        "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
    });
    check("gemma3_text", windows, 0.0);
    check(
        "stablelm",
        json!({ "use_qkv_bias": true, "partial_rotary_factor": 0.5 }),
        0.0,
    );
    check(
        "stablelm",
        json!({ "use_parallel_residual": true, "qk_layernorm": true, "partial_rotary_factor": 0.5 }),
        0.0,
    );
    let silu = json!({ "hidden_act": "silu", "tie_word_embeddings": true });
    check("bitnet", silu, 0.0);
    check("olmo2", none.clone(), 0.0);
    check("phi3", json!({ "sliding_window": 8 }), 0.0);
    let long = json!({
        "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.25, 2.5],
        "original_max_position_embeddings": 16,
    });
    check(
        "phi3",
        json!({ "rope_scaling": long, "original_max_position_embeddings": 16 }),
        2e-3,
    );
    check(
        "gpt2",
        json!({ "tie_word_embeddings": true, "layer_norm_epsilon": 1e-3, "num_key_value_heads": 4 }),
        0.0,
    );
    check(
        "gpt_neox",
        json!({ "num_key_value_heads": 4, "rotary_pct": 0.5, "rotary_emb_base": 100.0 }),
        0.0,
    );
    check(
        "gpt_neox",
        json!({ "num_key_value_heads": 4, "rotary_pct": 0.5, "use_parallel_residual": false }),
        0.0,
    );
}

#[test]
fn what_a_file_cannot_say_is_refused() {
    for (model_type, changes, key) in [
        ("llama", json!({ "hidden_act": "relu" }), "hidden_act"),
        (
            "smollm3",
            json!({ "no_rope_layers": [1, 1, 1, 1] }),
            "no_rope_layers",
        ),
        (
            "qwen3",
            json!({ "attention_bias": true, "head_dim": 4 }),
            "attention_bias",
        ),
        ("qwen2", json!({ "head_dim": 6 }), "head_dim"),
        (
            "gemma2",
            json!({ "head_dim": 6, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "tie_word_embeddings": true }),
            "query_pre_attn_scalar",
        ),
        (
            "gemma2",
            json!({ "head_dim": 6, "query_pre_attn_scalar": 6, "final_logit_softcapping": 2.0, "tie_word_embeddings": true }),
            "attn_logit_softcapping",
        ),
        (
            "qwen3_moe",
            json!({ "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 6, "head_dim": 4 }),
            "norm_topk_prob",
        ),
        (
            "qwen2",
            json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16 } }),
            "rope_scaling",
        ),
    ] {
        let place = tempfile::tempdir().unwrap();
        folder(place.path(), &description(model_type, &changes));
        let Err(error) = Folder::open(place.path()) else {
            panic!("{model_type} with {changes} is converted");
        };
        assert!(error.to_string().contains(key), "{error}");
        assert!(error.hint().is_some());
    }
    // A window that the architecture has not ends the context: exact there.
    let place = tempfile::tempdir().unwrap();
    folder(
        place.path(),
        &description("mistral", &json!({ "sliding_window": 32 })),
    );
    let opened = Folder::open(place.path()).unwrap();
    let context = opened.metadata().get_u32("llama.context_length").unwrap();
    assert_eq!(context, Some(32));
    assert!(
        opened
            .notes()
            .iter()
            .any(|note| note.contains("sliding window"))
    );
    // Nothing is left behind by weights that cannot be stored.
    let path = place.path().join("model.gguf");
    let types = vec![BlockType::F16; opened.tensors().len()];
    let disk = &RealDisk;
    opened
        .write(&Cpu::new(1), disk, &path, (1, &types), |_, _| {})
        .unwrap();
    assert!(path.is_file());
}

#[test]
fn tokenizers_and_templates_come_along() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("WINDLASS_TEST_DATA is not set: nothing is compared");
        return;
    };
    let cpu = Cpu::new(2);
    for name in ["minimind", "llama2"] {
        let source = Path::new(&data).join("tokenizers").join(name);
        let tokenizer = Tokenizer::load(&source).unwrap();
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let vocabulary = json!({ "vocab_size": tokenizer.vocab_size() + 3 });
        folder(&path("a"), &description("llama", &vocabulary));
        tokenizer.save(&path("a")).unwrap();
        to_gguf(&cpu, &path("a"), &path("a.gguf")).unwrap();
        let file = File::open(&path("a.gguf")).unwrap();
        write_hugging_face(&file, &RealDisk, &path("b"), Dtype::BF16, |_, _| {}).unwrap();
        let text = "Once upon a time, there was 1 café.\n  Really?";
        for other in ["a.gguf", "b"] {
            let model = LoadedModel::open(&cpu, &path(other), None).unwrap();
            let other = model.tokenizer().unwrap();
            assert_eq!(
                other.encode(text, true).unwrap(),
                tokenizer.encode(text, true).unwrap(),
                "{name}"
            );
            assert_eq!(other.eos()[0], tokenizer.eos()[0]);
            let templates = (other.chat_template(false), tokenizer.chat_template(false));
            assert_eq!(templates.0, templates.1, "{name}");
        }
    }
}
