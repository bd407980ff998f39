//! `windlass train`: a model from scratch or from a Hugging Face folder, on the user's own texts.

use super::drive::{self, bytes};
use super::fits;
use super::io::parse_size;
use super::observe::Observer;
use super::settings::{self, Settings};
use super::world::World;
use super::{Machine, failure, usage};
use anyhow::{Context, Result};
use clap::ValueEnum;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use windlass::comm::Group;
use windlass::model::{DecoderConfig, PRESETS, Tokenizer, decoder, preset_config};
use windlass::progress::{Progress, say};
use windlass::store::Store;
use windlass::store::checkpoint::{CheckpointDir, Checkpoints};
use windlass::tensor::{Cpu, ParamSpec};
use windlass::train::config::Observe;
use windlass::train::data::{
    Corpus, Packing, ReadOptions, Split, TokenizeOptions, Tokenized, tokenize,
};
use windlass::train::{Plan, StepShape, TrainOptions, Trainer, load_model};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Texts: .txt, .jsonl, .json and .parquet files, or folders of them
    #[arg(required = true, value_name = "DATA")]
    data: Vec<PathBuf>,
    /// Field or column that holds the text
    #[arg(long, default_value = "text")]
    field: String,
    /// Splits .txt files into documents wherever this text occurs
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,

    /// Architecture of a new model (llama, gpt2, qwen3, ...)
    #[arg(long, conflicts_with_all = ["model_config", "model"], default_value = "llama")]
    arch: String,
    /// Size of a new model (1m, 3m, 15m, 42m, 110m, 350m, 1b)
    #[arg(long, conflicts_with_all = ["model_config", "model"], default_value = "15m")]
    size: String,
    /// A model's config.json that describes a new model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    model_config: Option<PathBuf>,
    /// A Hugging Face folder or id whose weights training starts from
    #[arg(long, value_name = "FOLDER|ID")]
    model: Option<String>,
    /// A tokenizer.json, or a folder with one [default: the model's, or one trained on the data]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Tokens of a tokenizer trained on the data
    #[arg(long, default_value_t = 4096)]
    vocab_size: usize,

    /// Folder of checkpoints and metrics
    #[arg(long, default_value = "runs/train")]
    out: PathBuf,
    /// Continue the run in --out from its latest checkpoint
    #[arg(long)]
    resume: bool,
    /// Say what the run needs, and stop
    #[arg(long)]
    plan: bool,
    /// Memory that the ranks on this machine may take together: 4G [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<usize>,

    /// Optimizer steps
    #[arg(long, conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Passes over the data [default: 1]
    #[arg(long)]
    epochs: Option<f64>,
    /// Tokens of a sequence [default: 512, or the model's context where that is shorter]
    #[arg(long)]
    seq_len: Option<usize>,
    /// Whether documents that share a sequence see each other
    #[arg(long, value_enum, default_value_t = Pack::Documents)]
    pack: Pack,
    /// Part of the data that is held out to measure on
    #[arg(long, default_value_t = 0.05)]
    held_out: f64,
    /// Seed of weights, held-out split and data order
    #[arg(long, default_value_t = 42)]
    seed: u64,

    #[command(flatten)]
    how: settings::Args,

    /// Steps between evaluations
    #[arg(long, value_name = "STEPS")]
    eval_every: Option<u64>,
    /// Most sequences of an evaluation
    #[arg(long, value_name = "N")]
    eval_sequences: Option<u64>,
    /// Steps between checkpoints
    #[arg(long, value_name = "STEPS")]
    save_every: Option<u64>,
    /// Minutes between checkpoints
    #[arg(long, value_name = "MINUTES", default_value_t = 10.0)]
    save_minutes: f64,
    /// Print what each collective sends and takes, beside what it should send; "comms_logger" of a --config
    #[arg(long)]
    comms: bool,
    /// Checkpoints kept
    #[arg(long, default_value = "2")]
    keep: NonZeroUsize,
    #[command(flatten)]
    world: World,
    #[command(flatten)]
    machine: Machine,
}

#[derive(ValueEnum, Clone, Copy)]
enum Pack {
    /// Each document sees itself alone
    Documents,
    /// A sequence is one stretch of text
    Stream,
}

impl Args {
    /// The run's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    if args.seq_len == Some(0) {
        return Err(usage("--seq-len 0", "it must be positive"));
    }
    let ranks = args.world.join()?;
    let Some(job) = ranks.prepare(|| prepare(&args, ranks.count(), ranks.here()))? else {
        return Ok(());
    };
    ranks.run(&args.machine, |group, cpu| job.run(group, &cpu))?;
    say(&format!(
        "next: windlass generate --model {} --prompt \"...\"",
        args.out.display()
    ));
    Ok(())
}

/// What all ranks train; none if only the plan was asked for.
fn prepare(args: &Args, ranks: usize, here: usize) -> Result<Option<Job>> {
    args.machine.cpu_threads()?;
    let model = args
        .model
        .as_deref()
        .map(windlass::hub::resolve)
        .transpose()?;
    let resume = if args.resume {
        Some(latest(&args.out)?)
    } else {
        fresh(&args.out)?
    };
    let origin = resume.as_ref().map(|c| c.path().to_owned()).or(model);
    let corpus = Corpus::open(
        &args.data,
        ReadOptions {
            field: args.field.clone(),
            separator: args.separator.clone(),
        },
    )?;
    let tokenizer = tokenizer(args, origin.as_deref(), &corpus)?;
    let config = config(args, origin.as_deref(), &tokenizer)?;
    for note in &config.notes {
        say(&format!("note: {note}"));
    }
    let seq_len = args
        .seq_len
        .unwrap_or(512.min(config.max_position_embeddings));
    // The length of the run may follow from the data; what a step needs does not depend on it.
    let known = args.steps.unwrap_or(1);
    let settings = args
        .how
        .settings(ranks, known, config.hidden_size, seq_len)?;
    settings.announce();
    let plan = settings.plan(&config, ranks);
    describe(&config, &plan, ranks);
    let outline = settings.outline(ranks);
    let needed = plan.memory.reserved;
    fits::check(&config, outline, needed, here, args.memory)?;
    if args.plan {
        return Ok(None);
    }
    let tokenized = tokens(args, &corpus, &tokenizer)?;
    let data = tokenized.file.description().key.clone();
    let split = Split::new(&Arc::new(tokenized.file), args.held_out, args.seed)?;
    let steps = steps(args, settings.shape, split.train.tokens() / ranks as u64);
    let settings = args
        .how
        .settings(ranks, steps, config.hidden_size, seq_len)?;
    Ok(Some(Job {
        options: options(args, &settings, steps)?,
        observe: observe(args, &settings),
        plan,
        settings,
        origin,
        resume,
        config,
        tokenizer,
        data,
        split,
    }))
}

/// What all ranks train.
struct Job {
    settings: Settings,
    origin: Option<PathBuf>,
    resume: Option<CheckpointDir>,
    config: DecoderConfig,
    tokenizer: Tokenizer,
    /// The key of the tokens: data, tokenizer and how they were read.
    data: String,
    split: Split,
    options: TrainOptions,
    /// What is said about the run.
    observe: Observe,
    plan: Plan,
}

impl Job {
    /// One rank's part.
    fn run(&self, group: Group, cpu: &Cpu) -> Result<()> {
        let first = group.rank() == 0;
        self.agree(&group)?;
        let store = self.store(group, cpu, first)?;
        let mut trainer = Trainer::new(
            self.config.clone(),
            self.tokenizer.clone(),
            store,
            self.split.train.clone(),
            self.split.held_out.clone(),
            self.options.clone(),
            self.resume.as_ref(),
        )?;
        let observer = first.then(|| Observer::new(self.observe.clone(), Some(&self.plan)));
        drive::train(&mut trainer, self.options.steps, observer)
    }

    /// Fails, on all ranks, if they are not about to do the same.
    fn agree(&self, group: &Group) -> Result<()> {
        let resume = self.resume.as_ref().map(CheckpointDir::step);
        for (what, value) in [
            ("the model", self.config.json.to_string()),
            (
                "the settings",
                format!("{:?} {:?}", self.options, self.settings.placement),
            ),
            ("the data and its tokenizer", self.data.clone()),
            ("the checkpoint to resume from", format!("{resume:?}")),
        ] {
            // Not the hash of a map, whose keys are chosen by chance.
            let mut hasher = DefaultHasher::new();
            value.hash(&mut hasher);
            group.agree(what, hasher.finish())?;
        }
        Ok(())
    }

    /// The parameters, read or made where this rank keeps them.
    fn store(&self, group: Group, cpu: &Cpu, first: bool) -> Result<Store> {
        let (dtype, model) = (self.options.dtype, decoder(&self.config));
        let home = self.settings.home(group)?;
        if let Some(note) = home.swap.as_ref().and_then(|swap| swap.note())
            && first
        {
            say(&format!("note: swap file: {note}"));
        }
        let Some(folder) = &self.origin else {
            let seed = self.options.seed;
            let fill = |_, param: &ParamSpec, range| Ok(param.fill_range(cpu, seed, dtype, range));
            return Ok(Store::build(cpu, home, model.units(), fill)?);
        };
        let (store, unused) = load_model(cpu, home, folder, &self.config, dtype)?;
        if first && !unused.is_empty() {
            say(&format!(
                "note: {} tensors of the file have no use in the model, such as {}",
                unused.len(),
                unused[0]
            ));
        }
        Ok(store)
    }
}

/// Steps of a run over `tokens` tokens on each rank.
fn steps(args: &Args, shape: StepShape, tokens: u64) -> u64 {
    let per_step = (shape.micro_batch * shape.seq_len * shape.gradient_accumulation_steps) as f64;
    let passes = args.epochs.unwrap_or(1.0);
    args.steps
        .unwrap_or_else(|| (passes * tokens as f64 / per_step).ceil() as u64)
}

/// How the run trains.
fn options(args: &Args, settings: &Settings, steps: u64) -> Result<TrainOptions> {
    Ok(TrainOptions {
        dtype: settings.dtype,
        engine: settings.engine,
        shape: settings.shape,
        schedule: args.how.rate(settings, steps)?,
        steps,
        packing: match args.pack {
            Pack::Documents => Packing::Documents,
            Pack::Stream => Packing::Stream,
        },
        seed: args.seed,
        eval_every: args.eval_every.filter(|&n| n > 0),
        eval_sequences: args.eval_sequences,
        save_every: args.save_every.filter(|&n| n > 0),
        save_after: (args.save_minutes > 0.0)
            .then(|| Duration::from_secs_f64(args.save_minutes * 60.0)),
        keep: Some(args.keep),
        out: args.out.clone(),
        monitor: settings
            .config
            .as_ref()
            .map_or_else(Default::default, |config| config.monitor(&args.out)),
    })
}

/// What is said about the run.
fn observe(args: &Args, settings: &Settings) -> Observe {
    let mut observe = settings.observe();
    if args.comms {
        observe.comms_logger.get_or_insert_default();
    }
    observe
}

/// The latest checkpoint of a run that is to be continued.
pub(super) fn latest(out: &Path) -> Result<CheckpointDir> {
    let found = Checkpoints::open(out).latest()?.ok_or_else(|| {
        failure(
            format!("--resume: no checkpoint in {}", out.display()),
            "leave --resume out to start there",
        )
    })?;
    if let Some(note) = found.note {
        say(&format!("note: {note}"));
    }
    say(&format!(
        "resuming from {}",
        found.checkpoint.path().display()
    ));
    Ok(found.checkpoint)
}

/// Refuses to start a new run over an old one.
pub(super) fn fresh(out: &Path) -> Result<Option<CheckpointDir>> {
    if Checkpoints::open(out).steps()?.is_empty() {
        return Ok(None);
    }
    let message = format!(
        "--out {} holds the checkpoints of another run",
        out.display()
    );
    Err(failure(
        message,
        "add --resume to continue that run, or choose another folder",
    ))
}

fn tokenizer(args: &Args, origin: Option<&Path>, corpus: &Corpus) -> Result<Tokenizer> {
    if let Some(path) = args.tokenizer.as_deref().filter(|_| !args.resume) {
        return Ok(Tokenizer::load(path)?);
    }
    if let Some(folder) = origin {
        return Ok(Tokenizer::load(folder)?);
    }
    say(&format!(
        "training a tokenizer of up to {} tokens on {}",
        args.vocab_size,
        bytes(corpus.bytes() as usize)
    ));
    let mut failed = None;
    let texts = corpus.pieces(Some(1 << 16)).map_while(|piece| match piece {
        Ok(piece) => Some(piece.text),
        Err(error) => {
            failed = Some(error);
            None
        }
    });
    let texts: Vec<String> = texts.collect();
    if let Some(error) = failed {
        return Err(error.into());
    }
    Ok(Tokenizer::train(
        texts.iter(),
        args.vocab_size,
        "<|endoftext|>",
    )?)
}

fn config(args: &Args, origin: Option<&Path>, tokenizer: &Tokenizer) -> Result<DecoderConfig> {
    if let Some(folder) = origin {
        return Ok(DecoderConfig::load(folder)?);
    }
    if let Some(path) = &args.model_config {
        let file = path.display().to_string();
        let text =
            std::fs::read_to_string(path).with_context(|| format!("--model-config {file}"))?;
        return Ok(DecoderConfig::from_json(&file, &text)?);
    }
    // A vocabulary divisible by 64 costs nothing and keeps matrix products on full tiles.
    let vocab_size = tokenizer.vocab_size().next_multiple_of(64);
    let text = preset_config(&args.arch, &args.size, vocab_size)?;
    debug_assert!(PRESETS.iter().any(|p| p.name == args.size));
    Ok(DecoderConfig::from_json("--arch", &text)?)
}

fn tokens(args: &Args, corpus: &Corpus, tokenizer: &Tokenizer) -> Result<Tokenized> {
    let options = TokenizeOptions {
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        bos: false,
        folder: args.out.join("tokens"),
    };
    let mut bar = Progress::new(corpus.bytes(), "tokenizing");
    let tokenized = tokenize(corpus, tokenizer, &options, &mut |p| {
        bar.set(p.bytes.min(p.total_bytes), &format!("{} tokens", p.tokens));
    })?;
    let description = tokenized.file.description();
    let how = if tokenized.reused {
        "reused"
    } else {
        "written"
    };
    bar.finish(&format!(
        "{} tokens of {} documents {how}",
        description.tokens, description.documents
    ));
    Ok(tokenized)
}

/// Prints what the run needs.
fn describe(config: &DecoderConfig, plan: &Plan, ranks: usize) {
    use windlass::tensor::Category;
    say(&format!(
        "{}: {} parameters, {} layers, {} tokens per step",
        config.model_type,
        drive::count(plan.parameters),
        config.num_hidden_layers(),
        plan.tokens_per_step
    ));
    let parts: Vec<String> = Category::ALL
        .iter()
        .map(|c| format!("{} {}", c.name(), bytes(plan.memory.of(*c))))
        .collect();
    let each = if ranks > 1 {
        format!(" for each of {ranks} ranks")
    } else {
        String::new()
    };
    say(&format!(
        "memory: {}{each} ({})",
        bytes(plan.memory.reserved),
        parts.join(", ")
    ));
    if ranks > 1 {
        say(&format!(
            "communication: {} sent by each rank in a step",
            bytes(plan.sent_per_step)
        ));
    }
}
