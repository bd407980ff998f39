//! `windlass finetune`: adapters on any model that can be opened, or the whole model, on samples of the user's own.

use super::lessons;
use super::recipe::Tuning;
use super::settings::{self, Settings};
use super::source::Packing;
use super::world::{Ranks, World};
use super::{Machine, failure, usage};
use anyhow::Result;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use windlass::infer::{LoadIn, LoadedModel};
use windlass::progress::say;
use windlass::store::checkpoint::CheckpointDir;
use windlass::store::{Deal, Stage, Store};
use windlass::tensor::{Cpu, DType};
use windlass::train::tune::Examples;
use windlass::train::{Lessons, TrainOptions};

mod adapter;
mod compare;
mod job;
mod outlook;
mod samples;

pub use adapter::targets;
use job::Job;
use outlook::Course;
use samples::Speaker;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// What is fine-tuned: a Hugging Face folder or id, a GGUF file, a GPTQ or AWQ folder; packed matrices stay packed
    #[arg(long, short, value_name = "PATH|ID")]
    model: String,
    /// Tokenizer instead of the model's own: a tokenizer.json or its folder
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    lessons: lessons::Args,
    /// What is trained
    #[arg(long, value_enum, default_value_t = Method::Lora)]
    method: Method,
    /// How qlora packs the matrices of a model that is not packed [default: q4]
    #[arg(long, value_enum, value_name = "FORMAT")]
    load_in: Option<Packing>,
    #[command(flatten)]
    adapter: adapter::Args,
    #[command(flatten)]
    compare: compare::Args,

    /// Samples to measure on
    #[arg(long, num_args = 1.., value_name = "FILE", conflicts_with = "held_out")]
    eval_data: Vec<PathBuf>,
    /// Part of the samples that is held out to measure on
    #[arg(long, value_name = "PART", default_value_t = 0.05)]
    held_out: f64,
    /// Put as many samples into a sequence as fit in --max-length tokens; they do not see each other
    #[arg(long)]
    pack: bool,
    /// Optimizer steps
    #[arg(long, conflicts_with = "epochs")]
    steps: Option<u64>,
    /// Passes over the samples [default: 1]
    #[arg(long)]
    epochs: Option<f64>,
    #[command(flatten)]
    how: settings::Args,
    /// Seed of the adapter, of what is held out and of the order
    #[arg(long, default_value_t = 42)]
    seed: u64,

    /// Folder of checkpoints and metrics
    #[arg(long, default_value = "runs/finetune")]
    out: PathBuf,
    /// Continue the run in --out from its latest checkpoint
    #[arg(long)]
    resume: bool,
    /// Say what the run needs and how long it takes, and stop
    #[arg(long)]
    plan: bool,
    /// Steps between evaluations [default: ten in a run]
    #[arg(long, value_name = "STEPS")]
    eval_every: Option<u64>,
    /// Evaluations without a better loss after which the run ends
    #[arg(long, value_name = "N")]
    patience: Option<u64>,
    /// Text that the model answers at every evaluation; may be given several times
    #[arg(long, value_name = "TEXT")]
    sample: Vec<String>,
    /// The most tokens of such an answer
    #[arg(long, value_name = "N", default_value_t = 48)]
    sample_tokens: usize,
    /// Steps between checkpoints
    #[arg(long, value_name = "STEPS")]
    save_every: Option<u64>,
    /// Checkpoints kept
    #[arg(long, default_value = "2")]
    keep: NonZeroUsize,
    #[command(flatten)]
    world: World,
    #[command(flatten)]
    machine: Machine,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Low-rank adapters
    Lora,
    /// The same, on matrices that are packed in four bits while they are loaded
    Qlora,
    /// Low-rank adapters with magnitudes
    Dora,
    /// All weights
    Full,
}

impl Args {
    /// The run's folder.
    pub fn out(&self) -> &Path {
        &self.out
    }
}

/// Runs the verb.
pub fn run(mut args: Args) -> Result<()> {
    args.how.tune(match args.method {
        Method::Full => Tuning::Full,
        _ => Tuning::Adapter,
    });
    args.machine.cpu_threads()?;
    let ranks = args.world.join()?;
    let path = ranks.prepare(|| Ok(windlass::hub::resolve(&args.model)?))?;
    let Some(job) = prepare(&args, &path, &ranks)? else {
        return Ok(());
    };
    let best = ranks.run(&args.machine, |group, cpu| job.run(group, &cpu))?;
    let folder = match best {
        Some(loss) => {
            let best = args.out.join("best");
            let shown = best.display();
            say(&format!("best: held-out loss {loss:.4}, in {shown}"));
            best
        }
        None => args.out.join("last"),
    };
    let how = match args.method {
        Method::Full => format!("--model {}", folder.display()),
        _ => format!("{} --adapter {}", adapter::base(&args), folder.display()),
    };
    say(&format!("next: windlass generate {how} --prompt \"...\""));
    Ok(())
}

/// What all ranks of this process train; none if only the plan was asked for.
fn prepare<'a>(args: &'a Args, path: &Path, ranks: &Ranks) -> Result<Option<Job<'a>>> {
    let resume = match args.resume {
        true => Some(super::train::latest(&args.out)?),
        false => super::train::fresh(&args.out)?,
    };
    let cpu = match args.plan {
        true => Cpu::dry(),
        false => args.machine.cpu()?,
    };
    let mut model = open(args, &cpu, path, ranks.count(), resume.as_ref())?;
    let tokenizer = model.tokenizer()?.clone();
    let lessons = read(args, &model)?;
    let train = &lessons.train;
    let (settings, steps) = decide(args, &model, &lessons, ranks.count())?;
    settings.announce();
    say(&outlook::parameters(&model));
    if args.plan {
        let course = Course {
            settings: &settings,
            train,
            preference: lessons.preference,
            steps,
            ranks,
        };
        outlook::plan(model, &settings, train, ranks)?.tell(args, &course)?;
        return Ok(None);
    }
    let observe = settings.observe();
    // What communication is compared with, where it is to be told.
    let theory = match observe.comms_logger.is_some() {
        true => {
            let dry = open(args, &Cpu::dry(), path, ranks.count(), None)?;
            Some(outlook::plan(dry, &settings, train, ranks)?.plan)
        }
        false => None,
    };
    let cut = settings.placement.stage == Stage::Parameters && ranks.count() > 1;
    if cut && !args.sample.is_empty() {
        say(
            "note: --sample in stage 3: the first rank has the whole model in memory while it answers",
        );
    }
    let speaker = Speaker::new(args, &model)?;
    let store = std::mem::replace(&mut model.store, Store::new(&cpu, &[], Vec::new()));
    cpu.memory.trim();
    let here = match ranks {
        Ranks::Threads(ranks, _) => *ranks,
        Ranks::Process(_) => 1,
    };
    Ok(Some(Job {
        options: options(args, &settings, steps)?,
        adapter: model.adapter.map(|adapter| adapter.config),
        config: model.config,
        tokenizer,
        deal: Deal::new(store.into_weights(), here),
        memory: cpu.memory.clone(),
        lessons,
        settings,
        observe,
        theory,
        speaker,
        resume,
        args,
    }))
}

/// The samples to train on and to measure on, and how they are compared.
fn read(args: &Args, model: &LoadedModel) -> Result<Lessons> {
    let (context, tokenizer) = (model.context(), model.tokenizer()?);
    let read = args.lessons.read(&args.lessons.data, tokenizer, context)?;
    let preference = compare::method(args, read.form, model)?;
    let (train, held_out) = match args.eval_data.is_empty() {
        true => Examples::split(read.samples, args.held_out, args.seed),
        false => {
            let other = args.lessons.read(&args.eval_data, tokenizer, context)?;
            (read.samples, other.samples)
        }
    };
    let pack = match args.pack {
        true => Some(args.lessons.max_length(context)?),
        false => None,
    };
    let train = Examples::new(train, pack);
    let held_out = (!held_out.is_empty()).then(|| Arc::new(Examples::new(held_out, pack)));
    Ok(Lessons {
        train: Arc::new(train),
        held_out,
        patience: args.patience,
        preference,
    })
}

/// The model, with the adapter that is to be trained.
fn open(
    args: &Args,
    cpu: &Cpu,
    path: &Path,
    ranks: usize,
    resume: Option<&CheckpointDir>,
) -> Result<LoadedModel> {
    let full = args.method == Method::Full;
    let own = resume.and_then(|_| adapter::own_base(args));
    let path = match (resume.filter(|_| full), &own) {
        (Some(checkpoint), _) => checkpoint.path(),
        (None, Some(base)) => base,
        (None, None) => path,
    };
    let load_in = match (args.method, args.load_in) {
        (Method::Qlora, packing) => LoadIn::Packed(packing.unwrap_or(Packing::Q4).layout()),
        (_, None) => LoadIn::AsStored,
        (_, Some(_)) => {
            return Err(usage(
                "--load-in without --method qlora",
                "qlora packs weights",
            ));
        }
    };
    let packed = path.extension().is_some_and(|end| end == "gguf");
    let load_in = match packed && args.load_in.is_none() {
        // The bits of a quantized file are few enough.
        true => LoadIn::AsStored,
        false => load_in,
    };
    // Beside packed matrices, activations are what takes memory.
    let halved = (args.method == Method::Qlora).then_some(DType::Bf16);
    let dtype = args.how.dtype(ranks)?.or(halved);
    let mut model = LoadedModel::open_in(cpu, path, dtype, load_in)?;
    if let Some(tokenizer) = &args.tokenizer {
        model.set_tokenizer(tokenizer)?;
    }
    for note in &model.notes {
        say(&format!("note: {note}"));
    }
    if full && model.is_packed()? {
        let message =
            "--method full: the model's matrices are packed, and packed weights are not trained";
        return Err(failure(
            message,
            "use --method lora, or a model that is not quantized",
        ));
    }
    match resume {
        _ if full => {}
        Some(checkpoint) => model.add_adapter(checkpoint.path())?,
        None => adapter::begin(args, path, &mut model)?,
    }
    Ok(model)
}

/// How the run trains, and its steps, which the settings may need and which depend on the batch.
fn decide(
    args: &Args,
    model: &LoadedModel,
    lessons: &Lessons,
    ranks: usize,
) -> Result<(Settings, u64)> {
    let train = &lessons.train;
    let known = settings(args, model, train, ranks, args.steps.unwrap_or(1))?;
    let rated = lessons.preference.is_some_and(|method| !method.is_paired());
    if rated && known.shape.micro_batch < 2 {
        let message = "--batch 1 with rated answers";
        let hint = "kto pairs each prompt with the answer to another one: at least 2";
        return Err(usage(message, hint));
    }
    let steps = steps(args, &known, train, ranks);
    Ok((settings(args, model, train, ranks, steps)?, steps))
}

fn settings(
    args: &Args,
    model: &LoadedModel,
    train: &Examples,
    ranks: usize,
    steps: u64,
) -> Result<Settings> {
    let (width, longest) = (model.config.hidden_size, train.longest());
    let mut settings = args.how.settings(ranks, steps, width, longest)?;
    settings.dtype = model.dtype;
    if model.dtype == DType::F16 {
        settings.engine.loss_scale.get_or_insert_default();
    }
    Ok(settings)
}

fn steps(args: &Args, settings: &Settings, train: &Examples, ranks: usize) -> u64 {
    let shape = settings.shape;
    let per_step = (shape.micro_batch * shape.gradient_accumulation_steps * ranks) as f64;
    let passes = args.epochs.unwrap_or(1.0);
    let all = (passes * train.len() as f64 / per_step).ceil() as u64;
    args.steps.unwrap_or(all.max(1))
}

fn options(args: &Args, settings: &Settings, steps: u64) -> Result<TrainOptions> {
    let every = args.eval_every.unwrap_or((steps / 10).max(1));
    Ok(TrainOptions {
        dtype: settings.dtype,
        engine: windlass::train::EngineOptions {
            noise: args.seed,
            ..settings.engine
        },
        shape: settings.shape,
        schedule: args.how.rate(settings, steps)?,
        steps,
        packing: windlass::train::data::Packing::Documents,
        seed: args.seed,
        eval_every: Some(every).filter(|&n| n > 0),
        eval_sequences: None,
        save_every: args.save_every.filter(|&n| n > 0),
        save_after: None,
        keep: Some(args.keep),
        out: args.out.clone(),
        monitor: settings
            .config
            .as_ref()
            .map_or_else(Default::default, |config| config.monitor(&args.out)),
    })
}
