//! Models in GGUF files against known logits and losses.

use std::path::{Path, PathBuf};
use windlass_infer::{GenerateOptions, Generator, LoadIn, LoadedModel, SamplingParams};
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::{BlockType, File, TensorInfo, Writer};
use windlass_store::safetensors::Tensors;
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Cpu, DType};

fn data() -> Option<PathBuf> {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("WINDLASS_TEST_DATA is not set: nothing is compared");
        return None;
    };
    Some(PathBuf::from(data).join("models/stories260K"))
}

/// Log-probability of each next token, negated, on average.
fn nll(logits: &[Vec<f32>], ids: &[u32]) -> f64 {
    let losses = logits.iter().zip(&ids[1..]).map(|(logits, &next)| {
        let largest = logits.iter().fold(f32::MIN, |m, &l| m.max(l)) as f64;
        let sum: f64 = logits.iter().map(|&l| (l as f64 - largest).exp()).sum();
        largest + sum.ln() - logits[next as usize] as f64
    });
    losses.sum::<f64>() / (ids.len() - 1) as f64
}

/// The known logits of a file, and the tokens.
fn golden(folder: &Path, name: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let golden = Tensors::open(&folder.join("golden_logits.safetensors")).unwrap();
    let ids = golden.get("ids").unwrap();
    let ids: Vec<u32> = ids
        .bytes
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let name = format!("logits.{name}");
    let logits = golden.get(&name).unwrap();
    let logits: Vec<f32> = logits
        .bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let width = logits.len() / ids.len();
    (ids, logits.chunks(width).map(<[f32]>::to_vec).collect())
}

/// The mean over positions of the divergence of `q` from `p`.
fn divergence(p: &[Vec<f32>], q: &[Vec<f32>]) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let largest = logits.iter().fold(f32::MIN, |m, &l| m.max(l)) as f64;
        let sum: f64 = logits.iter().map(|&l| (l as f64 - largest).exp()).sum();
        let log = largest + sum.ln();
        logits.iter().map(|&l| l as f64 - log).collect()
    };
    let rows = p.iter().zip(q).map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        p.iter()
            .zip(&q)
            .map(|(p, q)| p.exp() * (p - q))
            .sum::<f64>()
    });
    rows.sum::<f64>() / p.len() as f64
}

#[test]
fn files_of_all_types_give_the_known_logits() {
    let Some(data) = data() else { return };
    let folder = data.join("gguf-v3");
    let cpu = Cpu::new(2);
    let known: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("golden_nll.json")).unwrap()).unwrap();
    // Packed products round activations to 8 bits.
    for (name, tolerance, most) in [
        ("F32", 2e-4, 1e-9),
        ("F16", 2e-4, 1e-9),
        ("BF16", 2e-4, 1e-9),
        ("Q8_0", 0.6, 1e-3),
        ("Q5_1", 0.6, 1e-3),
        ("Q5_0", 0.6, 1e-3),
        ("Q4_1", 0.6, 1e-3),
        ("Q4_0", 0.6, 1e-3),
    ] {
        let path = folder.join(format!("stories260K-{name}.gguf"));
        let (ids, want) = golden(&folder, name);
        let logits = |load_in: LoadIn| {
            let model = LoadedModel::open_in(&cpu, &path, Some(DType::F32), load_in).unwrap();
            let got = model.logits(&ids).unwrap();
            let rows = got.to_f32();
            let rows = rows.chunks(got.cols()).map(<[f32]>::to_vec);
            rows.collect::<Vec<Vec<f32>>>()
        };
        // Unpacked, the numbers are those of the file, and activations are not rounded.
        let unpacked = logits(LoadIn::Plain);
        let apart = divergence(&want, &unpacked);
        assert!(apart < 1e-9, "{name}, unpacked: divergence {apart}");
        let got = logits(LoadIn::AsStored);
        let largest = got.iter().flatten().zip(want.iter().flatten());
        let off = largest.map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        let divergence = divergence(&want, &got);
        let (loss, expected) = (nll(&got, &ids), known[name]["nll"].as_f64().unwrap());
        println!(
            "{name}: logits off by {off:.1e}, divergence {divergence:.1e}, loss {loss:.5} for {expected:.5}"
        );
        assert!(off < tolerance, "{name}: logits off by {off}");
        assert!(divergence < most, "{name}: divergence {divergence}");
        assert!(
            (loss - expected).abs() < 0.02 * expected,
            "{name}: {loss} for {expected}"
        );
    }
}

#[test]
fn the_file_tells_the_stories_of_the_folder() {
    let Some(data) = data() else { return };
    let cpu = Cpu::new(2);
    let path = data.join("gguf-v3/stories260K-F32.gguf");
    let model = LoadedModel::open(&cpu, &path, None).unwrap();
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(data.join("golden_greedy_200.json")).unwrap())
            .unwrap();
    println!("{golden:.200}");
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_tokens: 100,
        ..GenerateOptions::default()
    };
    let mut generator = Generator::new(&model, options.clone()).unwrap();
    let text = generator
        .generate_text("Once upon a time", &mut |_| {})
        .unwrap();
    assert!(text.text.starts_with(", there was a"), "{}", text.text);
    // Prompts in chunks give the same tokens with packed weights, whose rows do not depend on their neighbors.
    let packed = LoadIn::Packed(Layout::q4(32));
    let model = LoadedModel::open_in(&cpu, &path, None, packed).unwrap();
    let prompt = model
        .encode("Once upon a time, there was a little girl named")
        .unwrap();
    let tell = |chunk: usize| {
        let options = GenerateOptions {
            prefill_chunk: chunk,
            ..options.clone()
        };
        let mut generator = Generator::new(&model, options).unwrap();
        generator.generate(&prompt, &mut |_| {}).unwrap().ids
    };
    let whole = tell(512);
    for chunk in [1, 2, 3, 5, 8] {
        assert_eq!(tell(chunk), whole, "chunks of {chunk}");
    }
}

/// A pass that was paid for is judged when it is known how many of its guesses were right.
#[test]
fn right_guesses_count_before_guessing_stops() {
    let Some(data) = data() else { return };
    let path = data.join("gguf-v3/stories260K-Q8_0.gguf");
    let cpu = Cpu::new(2);
    let model = LoadedModel::open(&cpu, &path, None).unwrap();
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_tokens: 150,
        stop_at_end: false,
        ..GenerateOptions::default()
    };
    let mut generator = Generator::new(&model, options).unwrap();
    generator.guess_by_model(&model).unwrap();
    let generation = generator.generate_text("One day", &mut |_| {}).unwrap();
    let guesses = generation.guesses.unwrap();
    assert_eq!(guesses.accepted, guesses.drafted, "its own draft");
    assert!(
        guesses.pauses > 0 && guesses.passes >= 2 * guesses.pauses,
        "{guesses:?}"
    );
}

/// Guessing changes no token, chosen or drawn, and saves passes.
#[test]
fn guesses_change_nothing_but_the_passes() {
    let Some(data) = data() else { return };
    let cpu = Cpu::new(2);
    let open = |name: &str| {
        let path = data.join(format!("gguf-v3/stories260K-{name}.gguf"));
        LoadedModel::open(&cpu, &path, None).unwrap()
    };
    let (model, draft) = (open("Q8_0"), open("Q4_0"));
    let prompt = model
        .encode("One day, Tim and Sam went to the park. Tim and Sam")
        .unwrap();
    for sampling in [
        SamplingParams::greedy(),
        SamplingParams {
            temperature: 0.8,
            top_k: 40,
            repetition_penalty: 1.1,
            ..SamplingParams::default()
        },
    ] {
        for (max_tokens, draft_tokens) in [(1, 7), (2, 7), (150, 1), (150, 7), (1000, 4)] {
            let options = GenerateOptions {
                sampling: sampling.clone(),
                max_tokens,
                draft_tokens,
                stop_at_end: false,
                seed: 3,
                ..GenerateOptions::default()
            };
            let run = |prepare: &dyn Fn(&mut Generator<'_>)| {
                let mut generator = Generator::new(&model, options.clone()).unwrap();
                prepare(&mut generator);
                generator.generate(&prompt, &mut |_| {}).unwrap()
            };
            let plain = run(&|_| {});
            assert!(plain.guesses.is_none());
            let looked = run(&|generator| generator.guess_by_lookup());
            let mut generator = Generator::new(&model, options.clone()).unwrap();
            generator.guess_by_model(&draft).unwrap();
            let drafted = generator.generate(&prompt, &mut |_| {}).unwrap();
            for (name, guessed) in [("lookup", looked), ("draft", drafted)] {
                assert_eq!(guessed.ids, plain.ids, "{name}, {max_tokens} tokens");
                assert_eq!((&guessed.text, &guessed.stop), (&plain.text, &plain.stop));
                let guesses = guessed.guesses.unwrap();
                println!("{name}, {max_tokens} tokens: {guesses:?}");
                assert!(guesses.accepted <= guesses.drafted);
                if name == "draft" && max_tokens >= 150 {
                    // A draft model of the same size cannot pay, however often it is right.
                    assert!(guesses.pauses > 0, "{guesses:?}");
                    assert!(guesses.accepted * 2 > guesses.passes, "{guesses:?}");
                }
            }
        }
    }
}

#[test]
fn damaged_scales_are_refused_by_tensor() {
    let Some(data) = data() else { return };
    let cpu = Cpu::new(1);
    let folder = tempfile::tempdir().unwrap();
    for name in ["Q8_0", "Q4_0", "F32"] {
        let mut bytes =
            std::fs::read(data.join(format!("gguf-v3/stories260K-{name}.gguf"))).unwrap();
        let half = bytes.len() / 2;
        bytes[half..].fill(0xff);
        let path = folder.path().join("damaged.gguf");
        std::fs::write(&path, bytes).unwrap();
        let Err(error) = LoadedModel::open(&cpu, &path, None) else {
            panic!("{name}: a file with scales that are no numbers was opened");
        };
        let message = error.to_string();
        assert!(
            message.contains("damaged.gguf: tensor ") && message.contains("no finite number"),
            "{message}"
        );
        assert!(error.hint().is_some());
    }
}

/// Tensors without use are told, those that would change the model are refused.
#[test]
fn tensors_without_use_are_told() {
    let Some(data) = data() else { return };
    let cpu = Cpu::new(1);
    let file = File::open(&data.join("gguf-v3/stories260K-Q8_0.gguf")).unwrap();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("more");
    for (name, value, note, refused) in [
        ("rope_freqs.weight", 1.0f32, "", false),
        ("blk.0.attn_norm.bias", 0.0, "", false),
        ("blk.0.attn_norm.bias", 0.5, "", true),
        ("blk.0.attn_q.scale", 1.0, "", false),
        ("blk.0.attn_q.scale", 0.5, "", true),
        (
            "blk.0.attn_q_norm.weight",
            1.0,
            "1 tensors of the file are not used",
            false,
        ),
    ] {
        let mut infos: Vec<TensorInfo> = file.tensors().cloned().collect();
        infos.push(TensorInfo::new(name, [32], BlockType::F32));
        let mut writer = Writer::create(&RealDisk, &path, file.metadata(), &infos).unwrap();
        for info in file.tensors() {
            writer
                .write(&info.name, file.bytes(&info.name).unwrap())
                .unwrap();
        }
        writer.write(name, &value.to_le_bytes().repeat(32)).unwrap();
        writer.finish().unwrap();
        match LoadedModel::open(&cpu, &path, None) {
            Ok(model) => {
                assert!(!refused, "{name} {value}");
                let notes = model.notes.concat();
                assert!(
                    notes.contains(note) && note.is_empty() == notes.is_empty(),
                    "{notes}"
                );
            }
            Err(error) => assert!(refused && error.to_string().contains(name), "{error}"),
        }
    }
}
