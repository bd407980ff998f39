//! `windlass quickstart`: the whole way, from a made-up language to a model that speaks it, in about a minute.

use super::drive::{self, bytes, count};
use super::observe::Observer;
use super::{Machine, failure};
use anyhow::Result;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use windlass::infer::{GenerateOptions, Generator, LoadedModel, SamplingParams};
use windlass::model::{DecoderConfig, Tokenizer, decoder, preset_config};
use windlass::store::Store;
use windlass::tensor::{Cpu, DType};
use windlass::train::corpus::{self, Prompt, Score};
use windlass::train::data::{Corpus, Packing, ReadOptions, Split, TokenizeOptions, tokenize};
use windlass::train::schedule::{Decay, Schedule, Warmup};
use windlass::train::{EngineOptions, Optimizer, StepShape, TrainOptions, Trainer, measure_step};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Folder for corpus, run and model; what an earlier quickstart left there is replaced
    #[arg(long, default_value = "quickstart")]
    out: PathBuf,
    /// About how long to train
    #[arg(long, default_value_t = 60.0, conflicts_with = "steps")]
    seconds: f64,
    /// How long to train, in steps
    #[arg(long)]
    steps: Option<u64>,
    /// Seed of the corpus, the weights and the data order
    #[arg(long, default_value_t = 42)]
    seed: u64,
    #[command(flatten)]
    machine: Machine,
}

/// Sequences of a step: short ones, as the texts are.
const SHAPE: StepShape = StepShape {
    micro_batch: 8,
    seq_len: 128,
    gradient_accumulation_steps: 1,
};
/// Tokens of the vocabulary: the bytes and the words of the small language.
const VOCABULARY: usize = 384;
/// Questions of each kind.
const QUESTIONS: usize = 40;
/// The end token of the corpus.
const END: &str = corpus::SEPARATOR;

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let cpu = args.machine.cpu()?;
    let folder = prepare(&args.out)?;
    let text = corpus::text(args.seed, corpus::DEFAULT_BYTES);
    let file = folder.join("corpus.txt");
    std::fs::write(&file, &text)?;
    eprintln!(
        "corpus: {} of stories and games, made from seed {} ({})",
        bytes(text.len()),
        args.seed,
        file.display()
    );
    let tokenizer = Tokenizer::train(text.split(END), VOCABULARY, END)?;
    let config = DecoderConfig::from_json(
        "quickstart",
        &preset_config("llama", "1m", tokenizer.vocab_size().next_multiple_of(64))?,
    )?;
    let vocabulary = tokenizer.vocab_size();
    let mut trainer = trainer(&args, &cpu, &folder, &file, &config, tokenizer)?;
    eprintln!(
        "model: a Llama of {} parameters in bf16, a vocabulary of {}, {} threads",
        count(trainer.0.engine().model().num_params()),
        vocabulary,
        cpu.pool.threads()
    );
    let before = trainer.0.evaluate()?.exp();
    drive::train(&mut trainer.0, trainer.1, Some(Observer::default()))?;
    let after = trainer.0.evaluate()?.exp();
    let saved = folder.join("model");
    trainer.0.save_model(&saved)?;
    drop(trainer);

    let model = LoadedModel::open(&cpu, &saved, None)?;
    println!("held-out perplexity: {before:.1} before training, {after:.2} after");
    let prompts = corpus::prompts(args.seed, QUESTIONS);
    let score = examine(&model, &prompts)?;
    println!("answers exactly right, on numbers and lists never seen in training:");
    for &(kind, right, asked) in &score.kinds {
        println!("  {kind:<22} {right:>3} of {asked}");
    }
    println!("  {:<22} {:.0} %", "all", 100.0 * score.total());
    speak(&model, args.seed)?;
    farewell(&saved, start);
    Ok(())
}

/// An empty place for the run.
fn prepare(out: &Path) -> Result<PathBuf> {
    let run = out.join("run");
    if run.is_dir() && !out.join("corpus.txt").is_file() {
        let message = format!(
            "--out {} holds a run that no quickstart made",
            out.display()
        );
        return Err(failure(message, "choose another folder"));
    }
    if run.is_dir() {
        std::fs::remove_dir_all(&run)?;
    }
    std::fs::create_dir_all(&run)?;
    Ok(out.to_owned())
}

/// The run, and its number of steps: as many as fit the time, from the speed of a few.
fn trainer(
    args: &Args,
    cpu: &Cpu,
    folder: &Path,
    file: &Path,
    config: &DecoderConfig,
    tokenizer: Tokenizer,
) -> Result<(Trainer, u64)> {
    let data = Corpus::open(
        &[file.to_owned()],
        ReadOptions {
            separator: Some(format!("{END}\n")),
            ..Default::default()
        },
    )?;
    let out = folder.join("run");
    let options = TokenizeOptions {
        threads: cpu.pool.threads(),
        bos: false,
        folder: out.clone(),
    };
    let tokens = tokenize(&data, &tokenizer, &options, &mut |_| {})?;
    let split = Split::new(&Arc::new(tokens.file), 0.02, args.seed)?;
    let engine = EngineOptions {
        optimizer: Optimizer::AdamW {
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.05,
        },
        ..Default::default()
    };
    let steps = match args.steps {
        Some(steps) => steps,
        None => {
            let step = measure_step(cpu, config, DType::Bf16, engine, SHAPE);
            (args.seconds.clamp(1.0, 3600.0) / step).clamp(20.0, 20_000.0) as u64
        }
    };
    let options = TrainOptions {
        dtype: DType::Bf16,
        engine,
        shape: SHAPE,
        schedule: Schedule::new(4e-3, 0.05, Warmup::Fraction(0.1), steps, Decay::Cosine)?.into(),
        steps,
        packing: Packing::Documents,
        seed: args.seed,
        eval_every: Some((steps / 4).max(1)),
        eval_sequences: Some(64),
        save_every: None,
        save_after: None,
        keep: None,
        out,
        monitor: Default::default(),
    };
    let store = Store::init(cpu, decoder(config).units(), DType::Bf16, args.seed);
    let trainer = Trainer::new(
        config.clone(),
        tokenizer,
        store,
        split.train,
        split.held_out,
        options,
        None,
    )?;
    Ok((trainer, steps))
}

/// Lets the model answer all questions.
fn examine(model: &LoadedModel, prompts: &[Prompt]) -> Result<Score> {
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_tokens: 16,
        stop_strings: vec!["\n".into()],
        ..Default::default()
    };
    let mut generator = Generator::new(model, options)?;
    let mut answers = Vec::new();
    for prompt in prompts {
        answers.push(generator.generate_text(&prompt.text, &mut |_| {})?.text);
    }
    Ok(Score::new(prompts, &answers))
}

/// Streams a story to the terminal.
fn speak(model: &LoadedModel, seed: u64) -> Result<()> {
    let prompt = "Story:";
    let options = GenerateOptions {
        sampling: SamplingParams {
            temperature: 0.8,
            ..Default::default()
        },
        max_tokens: 80,
        seed,
        ..Default::default()
    };
    print!("\n{prompt}");
    let mut out = std::io::stdout();
    Generator::new(model, options)?.generate_text(prompt, &mut |piece| {
        // A closed pipe ends the show, not the program.
        let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
    })?;
    println!("\n");
    Ok(())
}

fn farewell(model: &Path, start: Instant) {
    eprintln!(
        "done in {:.0} s; the model is a Hugging Face folder: {}",
        start.elapsed().as_secs_f64(),
        model.display()
    );
    eprintln!("next, on your own data:");
    eprintln!("  windlass train my.txt --size 15m --out runs/mine     train on your texts");
    eprintln!("  windlass generate --model runs/mine --prompt \"...\"   let the result speak");
    eprintln!(
        "  windlass generate --model {} --prompt \"The larger:\"",
        model.display()
    );
    eprintln!("  windlass eval perplexity --model runs/mine --file other.txt");
}
