//! Generation and scores on stories260K: known tokens, and what must not change them.

use std::path::PathBuf;
use windlass_infer::score::{Question, Tally, perplexity};
use windlass_infer::{
    GenerateOptions, Generation, Generator, InferError, LoadIn, LoadedModel, SamplingParams,
    Session, StopReason,
};
use windlass_model::{Goal, Tokens};
use windlass_store::atomic::RealDisk;
use windlass_store::llama2c::convert;
use windlass_tensor::kernels::attention::KvType;
use windlass_tensor::kernels::packed::Layout;
use windlass_tensor::{Category, Cpu, DType, Tape, Tensor};

struct Stories {
    data: PathBuf,
    folder: tempfile::TempDir,
    cpu: Cpu,
}

impl Stories {
    /// The model as a Hugging Face folder with its tokenizer.
    fn new() -> Option<Self> {
        let Some(data) = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from) else {
            println!("skipped: set WINDLASS_TEST_DATA");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let stories = data.join("models/stories260K");
        let (model, tokens) = (stories.join("stories260K.bin"), stories.join("tok512.bin"));
        convert(&RealDisk, &model, &tokens, folder.path()).unwrap();
        Some(Stories {
            data,
            folder,
            cpu: Cpu::new(2),
        })
    }

    fn open(&self, dtype: Option<DType>) -> LoadedModel {
        LoadedModel::open(&self.cpu, self.folder.path(), dtype).unwrap()
    }

    fn packed(&self) -> LoadedModel {
        LoadedModel::open_in(
            &self.cpu,
            self.folder.path(),
            None,
            LoadIn::Packed(Layout::q8()),
        )
        .unwrap()
    }

    /// Ids of the beginning of a text that the model was not trained on.
    fn ids(&self, model: &LoadedModel, count: usize) -> Vec<u32> {
        let path = self.data.join("corpora/tinystories/val_decoded.txt");
        let text = std::fs::read_to_string(path).unwrap();
        let mut ids = model
            .encode(&text[..text.floor_char_boundary(8 * count)])
            .unwrap();
        ids.truncate(count);
        assert_eq!(ids.len(), count);
        ids
    }
}

fn greedy(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_tokens,
        logprobs: true,
        ..Default::default()
    }
}

/// Generates, and checks that the pieces shown, one a token, are the text.
fn generate(model: &LoadedModel, prompt: &[u32], options: GenerateOptions) -> Generation {
    let mut pieces = Vec::new();
    let mut generator = Generator::new(model, options).unwrap();
    let generation = generator
        .generate(prompt, &mut |piece| pieces.push(piece.to_owned()))
        .unwrap();
    assert_eq!(pieces.concat(), generation.text);
    assert_eq!(pieces.len(), generation.ids.len());
    generation
}

/// Mean Kullback-Leibler divergence of rows of logits from others.
fn divergence(want: &[f32], got: &[f32], vocab: usize) -> f64 {
    let logs = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().fold(f32::MIN, |a, &b| a.max(b));
        let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
        row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
    };
    let rows = want.chunks_exact(vocab).zip(got.chunks_exact(vocab));
    let row = |(want, got): (&[f32], &[f32])| -> f64 {
        let pairs = logs(want).into_iter().zip(logs(got));
        pairs.map(|(p, q)| p.exp() * (p - q)).sum()
    };
    rows.map(row).sum::<f64>() / (want.len() / vocab) as f64
}

#[test]
fn keys_and_values_may_be_kept_in_fewer_bits() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let mut model = stories.open(None);
    let (ids, vocab) = (stories.ids(&model, 300), model.config.vocab_size);
    assert_eq!(model.kv_type, KvType::Plain(DType::F32));
    assert_eq!(stories.packed().kv_type, KvType::Plain(DType::Bf16));
    let logits = |model: &LoadedModel, chunk: usize| -> Vec<f32> {
        let mut session = Session::new(model, 300, chunk);
        let mut next = |ids: &[u32]| session.next_of_each(ids).unwrap().to_f32();
        ids.chunks(chunk).flat_map(&mut next).collect()
    };
    let want = logits(&model, 300);
    for (kind, limit) in [
        (KvType::Plain(DType::F32), 0.0),
        (KvType::Plain(DType::F16), 1e-5),
        (KvType::Plain(DType::Bf16), 5e-4),
        (KvType::Int8, 2e-3),
    ] {
        model.kv_type = kind;
        let whole = logits(&model, 300);
        // Evaluations keep them so too.
        assert!(model.logits(&ids).unwrap().to_f32() == whole, "{kind}");
        let kl = divergence(&want, &whole, vocab);
        println!("{kind}: mean KL {kl:.2e}");
        assert!(kl <= limit, "{kind}: mean KL {kl:.2e}");
        for chunk in [1, 37] {
            assert!(
                logits(&model, chunk) == whole,
                "{kind} in chunks of {chunk}"
            );
        }
    }
}

#[test]
fn two_hundred_greedy_tokens_are_the_known_ones() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let known = stories
        .data
        .join("models/stories260K/golden_greedy_200.json");
    let known: serde_json::Value = serde_json::from_slice(&std::fs::read(known).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(known["ids"].clone()).unwrap();
    let model = stories.open(None);
    assert_eq!(
        (model.dtype, model.encode("").unwrap()),
        (DType::F32, vec![1])
    );
    assert_eq!(model.notes, Vec::<String>::new());
    let generation = generate(&model, &ids[..1], greedy(200));
    assert_eq!(generation.ids, ids[1..]);
    assert_eq!(generation.text, known["text"].as_str().unwrap());
    assert_eq!(
        (generation.stop, generation.prompt_tokens),
        (StopReason::MaxTokens, 1)
    );

    // The log-probabilities are the losses that the scores know.
    let score = perplexity(&model, &ids, 512, 512, &mut |_, _| {}).unwrap();
    let mean = -generation.logprobs.unwrap().iter().sum::<f64>() / 200.0;
    assert!(
        (mean - score.loss).abs() < 1e-5,
        "{mean} against {}",
        score.loss
    );

    // A prompt as text continues with the space that belongs between.
    let mut generator = Generator::new(&model, greedy(3)).unwrap();
    let continued = generator.generate_text("Once upon", &mut |_| {}).unwrap();
    assert_eq!(continued.text, " a time,");
}

#[test]
fn the_cut_of_the_prompt_and_the_threads_change_nothing() {
    let Some(stories) = Stories::new() else {
        return;
    };
    for dtype in [DType::F32, DType::Bf16] {
        let model = stories.open(Some(dtype));
        let prompt = stories.ids(&model, 150);
        let sampled = GenerateOptions {
            sampling: SamplingParams::default(),
            seed: 7,
            max_tokens: 40,
            logprobs: true,
            ..Default::default()
        };
        let whole = generate(&model, &prompt, sampled.clone());
        for prefill_chunk in [1, 7, 64, 149, 150] {
            let options = GenerateOptions {
                prefill_chunk,
                ..sampled.clone()
            };
            let cut = generate(&model, &prompt, options);
            assert_eq!(cut, whole, "{dtype} in chunks of {prefill_chunk}");
        }
        let alone = LoadedModel::open(&Cpu::new(1), stories.folder.path(), Some(dtype)).unwrap();
        assert_eq!(
            generate(&alone, &prompt, sampled.clone()),
            whole,
            "{dtype} on one thread"
        );
        let other = GenerateOptions { seed: 8, ..sampled };
        assert_ne!(generate(&model, &prompt, other).ids, whole.ids);
    }
}

#[test]
fn generation_ends_for_every_reason() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(None);
    let prompt = stories.ids(&model, 500);
    let full = generate(
        &model,
        &prompt,
        GenerateOptions {
            stop_at_end: false,
            ..greedy(50)
        },
    );
    // The last token needs no position: it is not read.
    assert_eq!((full.stop, full.ids.len()), (StopReason::Context, 13));
    let stopped = generate(
        &model,
        &[1],
        GenerateOptions {
            stop_strings: vec!["Max".into(), " girl named".into()],
            ..greedy(50)
        },
    );
    assert_eq!(stopped.text, "Once upon a time, there was a little");
    assert_eq!(stopped.stop, StopReason::StopString(1));

    let mut generator = Generator::new(&model, greedy(1)).unwrap();
    let mut refuse = |ids: &[u32]| generator.generate(ids, &mut |_| {}).unwrap_err();
    let long = refuse(&vec![5; 513]);
    assert!(matches!(
        long,
        InferError::TooLong {
            tokens: 513,
            context: 512,
            ..
        }
    ));
    assert!(matches!(refuse(&[]), InferError::Empty { .. }));
    assert!(matches!(
        refuse(&[1, 512]),
        InferError::UnknownToken { id: 512, .. }
    ));
    for (options, flag) in [
        (
            GenerateOptions {
                max_tokens: 0,
                ..greedy(1)
            },
            "--max-tokens",
        ),
        (
            GenerateOptions {
                stop_strings: vec![String::new()],
                ..greedy(1)
            },
            "--stop",
        ),
    ] {
        let error = Generator::new(&model, options).err().unwrap();
        assert!(error.to_string().contains(flag), "{error}");
    }
}

/// All logits of one sequence, by the layers themselves.
fn logits(model: &LoadedModel, ids: &[u32]) -> Tensor {
    let cpu = model.store.cpu();
    let rows = (0..ids.len() as u32).collect();
    let batch = Tokens::new(
        ids.to_vec(),
        &[ids.len()],
        Goal::Logits { rows },
        model.dtype,
    );
    let mut x = Tensor::empty(cpu, [0], DType::F32, Category::Activations);
    for (unit, layer) in model.model.layers() {
        let mut tape = Tape::inference(cpu);
        let input = tape.input(x);
        x = layer
            .forward(&model.store.gather(unit).unwrap(), input, &batch, &mut tape)
            .tensor;
    }
    x
}

/// The loss of each token but the first, given all before it.
fn token_losses(model: &LoadedModel, ids: &[u32]) -> Vec<f64> {
    let logits = logits(model, ids).to_f64();
    let rows = logits.chunks(model.config.vocab_size).zip(&ids[1..]);
    rows.map(|(row, &next)| {
        let largest = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|l| (l - largest).exp()).sum();
        largest + sum.ln() - row[next as usize]
    })
    .collect()
}

#[test]
fn perplexity_is_the_mean_of_token_losses_by_windows() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(None);
    let ids = stories.ids(&model, 300);
    for (window, stride) in [(64, 64), (64, 24), (512, 512), (300, 1), (7, 3), (2, 1)] {
        // The definition: a token is scored in the first window that holds it, unless it stands first there.
        let mut expected = Vec::new();
        for t in 1..ids.len() {
            let start = (t + 1).saturating_sub(window).div_ceil(stride) * stride;
            if start < t {
                let end = (start + window).min(ids.len());
                expected.push(token_losses(&model, &ids[start..end])[t - start - 1]);
            }
        }
        let mean = expected.iter().sum::<f64>() / expected.len() as f64;
        let mut done = 0;
        let tell = &mut |tokens, _| done = tokens;
        let got = perplexity(&model, &ids, window, stride, tell).unwrap();
        assert_eq!((done, got.tokens), (300, 300));
        assert_eq!(
            got.scored_tokens,
            expected.len(),
            "window {window}, stride {stride}"
        );
        let off = (got.loss - mean).abs();
        assert!(off < 1e-6, "window {window}, stride {stride}: {off:e}");
        assert!((got.perplexity - mean.exp()).abs() < 1e-5 * got.perplexity);
    }
    for (window, stride, flag) in [
        (1, 1, "--window 1"),
        (513, 1, "--window 513"),
        (8, 9, "--stride 9"),
        (8, 0, "--stride 0"),
    ] {
        let error = perplexity(&model, &ids, window, stride, &mut |_, _| {}).unwrap_err();
        assert!(
            error.to_string().starts_with(flag) && error.hint().is_some(),
            "{error}"
        );
    }
    assert!(perplexity(&model, &ids[..1], 8, 8, &mut |_, _| {}).is_err());
}

#[test]
fn packed_and_bf16_weights_predict_almost_as_well() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let f32 = stories.open(None);
    let ids = stories.ids(&f32, 2000);
    let measure = |model: &LoadedModel| {
        perplexity(model, &ids, 256, 128, &mut |_, _| {})
            .unwrap()
            .perplexity
    };
    let exact = measure(&f32);
    assert!((2.0..20.0).contains(&exact), "{exact}");
    for (name, model, tolerance) in [
        ("q8", stories.packed(), 0.02),
        ("bf16", stories.open(Some(DType::Bf16)), 0.02),
    ] {
        let perplexity = measure(&model);
        let off = (perplexity / exact - 1.0).abs();
        println!("{name}: {perplexity:.4} against {exact:.4}");
        assert!(
            off < tolerance && off > 0.0,
            "{name}: {perplexity} against {exact}"
        );
    }
}

#[test]
fn choices_are_scored_by_their_own_tokens() {
    let Some(stories) = Stories::new() else {
        return;
    };
    let model = stories.open(None);
    let mut tally = Tally::default();
    for (prompt, choices, answer) in [
        ("Once upon a", ["time, there was", "banana he but ran"], 0),
        ("Lily was sad and didn't know what to", ["dog.", "do."], 1),
        ("", ["Once upon a time", "Upon time once a"], 0),
    ] {
        let choices = choices.map(str::to_owned).to_vec();
        let question = Question {
            prompt: prompt.into(),
            choices,
            answer,
        };
        let scores = model.score_choices(&question).unwrap();
        for (score, choice) in scores.iter().zip(&question.choices) {
            let space = if prompt.is_empty() { "" } else { " " };
            let whole = model.encode(&format!("{prompt}{space}{choice}")).unwrap();
            let losses = token_losses(&model, &whole);
            let own = &losses[losses.len() - score.tokens..];
            let expected = -own.iter().sum::<f64>();
            assert!(
                (score.log_likelihood - expected).abs() < 1e-5,
                "{prompt:?} {choice:?}"
            );
            assert_eq!(score.per_byte, score.log_likelihood / choice.len() as f64);
        }
        tally.add(&scores, answer);
    }
    assert_eq!(tally.accuracy().accuracy, 1.0);
}
