//! `windlass bench train`: tokens a second, time by phase, memory by category, beside the matrix products' own speed.

use crate::cli::drive::{bytes, count};
use crate::cli::world::World;
use crate::cli::{Machine, Precision, usage};
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use windlass::comm::Group;
use windlass::model::{DecoderConfig, Goal, Tokens, decoder};
use windlass::store::swap::IoStats;
use windlass::store::{Home, Placement, Store};
use windlass::tensor::kernels::gemm::{Epilogue, Layout, Mat, gemm, gemm_kernel_name};
use windlass::tensor::kernels::memory::Usage;
use windlass::tensor::{Category, Cpu, DType, Rng, Tensor, each_dtype};
use windlass::train::config::{Config, Context};
use windlass::train::loss_scale::LossScale;
use windlass::train::{Engine, EngineOptions, Plan, StepShape, plan_rank};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Shape: gpt2-124m, llama-110m or llama-1b
    #[arg(long, default_value = "llama-110m")]
    preset: String,
    /// Layers, in place of the preset's
    #[arg(long)]
    layers: Option<usize>,
    /// Storage type of weights and activations
    #[arg(long, value_enum, default_value_t = Precision::Bf16)]
    dtype: Precision,
    /// Sequences of a step, on each rank
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 512)]
    seq: usize,
    /// Steps that are timed
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Keep only the input of each layer for the backward pass
    #[arg(long)]
    checkpoint_activations: bool,
    /// Steps before those that are timed
    #[arg(long, default_value_t = 1)]
    warmup: usize,
    /// A ds_config.json: precision, optimizer, ZeRO and offloading; the batch is that of the flags
    #[arg(long, value_name = "FILE", conflicts_with = "dtype")]
    config: Option<PathBuf>,
    #[command(flatten)]
    world: World,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: Machine,
}

/// The shapes that are compared with other programs.
fn preset(name: &str) -> Option<serde_json::Value> {
    Some(match name {
        "gpt2-124m" => json!({
            "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
        }),
        "llama-110m" => json!({
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
            "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
            "max_position_embeddings": 1024, "tie_word_embeddings": true,
        }),
        "llama-1b" => json!({
            "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
            "max_position_embeddings": 2048, "tie_word_embeddings": false,
        }),
        _ => return None,
    })
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let mut shape = preset(&args.preset).ok_or_else(|| {
        usage(
            format!("--preset {}", args.preset),
            "known: gpt2-124m, llama-110m, llama-1b",
        )
    })?;
    if let Some(layers) = args.layers {
        for key in ["n_layer", "num_hidden_layers"] {
            if shape.get(key).is_some() {
                shape[key] = layers.into();
            }
        }
    }
    let config = DecoderConfig::from_json("--preset", &shape.to_string())?;
    if args.seq > config.max_position_embeddings
        || args.seq == 0
        || args.batch == 0
        || args.steps == 0
    {
        let hint = format!(
            "--batch and --steps are positive, --seq is 1 to {}",
            config.max_position_embeddings
        );
        return Err(usage("--batch, --seq or --steps is out of range", hint));
    }
    let ranks = args.world.join()?;
    let how = How::new(&args, ranks.count())?;
    ranks.run(&args.machine, |group, cpu| {
        let first = group.rank() == 0;
        let measured = measure(&args, &config, &how, group, &cpu)?;
        if first {
            let peak = gemm_peak(&cpu, how.dtype);
            report(&args, &config, &how, &cpu, &measured, peak);
        }
        Ok(())
    })
}

/// What is measured.
struct How {
    dtype: DType,
    options: EngineOptions,
    placement: Placement,
    config: Option<Config>,
    ranks: usize,
}

impl How {
    fn new(args: &Args, ranks: usize) -> Result<Self> {
        let Some(path) = &args.config else {
            return Ok(How {
                dtype: args.dtype.dtype(),
                options: EngineOptions {
                    activation_checkpointing: args.checkpoint_activations,
                    loss_scale: (args.dtype == Precision::F16).then(LossScale::default),
                    ..Default::default()
                },
                placement: Placement::default(),
                config: None,
                ranks,
            });
        };
        let mut context = Context::ranks(ranks as u64);
        for (key, value) in [
            ("train_micro_batch_size_per_gpu", args.batch),
            ("gradient_accumulation_steps", 1),
            ("train_batch_size", args.batch * ranks),
        ] {
            context.overrides.push((key.into(), value.into()));
        }
        let config = Config::load(path, &context)?;
        let mut options = config.engine_options()?;
        options.activation_checkpointing |= args.checkpoint_activations;
        Ok(How {
            dtype: config.dtype(),
            options,
            placement: config.placement(),
            config: Some(config),
            ranks,
        })
    }
}

/// What a run took.
struct Measured {
    plan: Plan,
    /// Seconds of each step: all, forward, backward, optimizer; the fastest first.
    times: Vec<[f64; 4]>,
    io: Option<IoStats>,
}

/// Steps on one rank.
fn measure(
    args: &Args,
    config: &DecoderConfig,
    how: &How,
    group: Group,
    cpu: &Cpu,
) -> Result<Measured> {
    let shape = StepShape {
        micro_batch: args.batch,
        seq_len: args.seq,
        gradient_accumulation_steps: 1,
    };
    let plan = plan_rank(
        config,
        how.dtype,
        how.options,
        shape,
        how.placement,
        how.ranks,
    );
    let model = decoder(config);
    let rank = group.rank() as u64;
    let home = match &how.config {
        Some(config) => config.home(group)?,
        None => Home::on(group, how.placement),
    };
    let store = Store::build(cpu, home, model.units(), |_, param, range| {
        Ok(param.fill_range(cpu, 1, how.dtype, range))
    })?;
    let mut engine = Engine::initialize(model, store, how.options)?;
    let mut rng = Rng::stream(7, rank);
    let (mut times, mut before) = (Vec::new(), None);
    for step in 0..args.steps + args.warmup {
        if step == args.warmup {
            before = engine.store().io_stats();
        }
        let batch = random_batch(&mut rng, config, args, how.dtype);
        let start = Instant::now();
        let loss = engine.forward(batch)?;
        let forward = start.elapsed().as_secs_f64();
        engine.backward(loss)?;
        let backward = start.elapsed().as_secs_f64() - forward;
        engine.step_at(3e-4)?;
        let total = start.elapsed().as_secs_f64();
        if step >= args.warmup {
            times.push([total, forward, backward, total - forward - backward]);
        }
    }
    times.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let io = engine
        .store()
        .io_stats()
        .zip(before)
        .map(|(now, then)| IoStats {
            bytes_read: now.bytes_read - then.bytes_read,
            bytes_written: now.bytes_written - then.bytes_written,
            busy_seconds: now.busy_seconds - then.busy_seconds,
            waited_seconds: now.waited_seconds - then.waited_seconds,
        });
    Ok(Measured { plan, times, io })
}

fn random_batch(rng: &mut Rng, config: &DecoderConfig, args: &Args, dtype: DType) -> Tokens {
    let total = args.batch * args.seq;
    let ids: Vec<u32> = (0..total)
        .map(|_| rng.below(config.vocab_size as u64) as u32)
        .collect();
    let targets = ids
        .iter()
        .enumerate()
        .map(|(i, _)| match (i + 1) % args.seq {
            0 => windlass::tensor::IGNORED,
            _ => ids[i + 1] as i64,
        });
    let goal = Goal::Loss {
        targets: targets.collect(),
        denominator: (total - args.batch) as f64,
    };
    Tokens::new(ids, &vec![args.seq; args.batch], goal, dtype)
}

/// Best of several products of 2048 x 2048 matrices, in operations a second.
fn gemm_peak(cpu: &Cpu, dtype: DType) -> f64 {
    const N: usize = 2048;
    let matrix = |value: f64| {
        let mut t = Tensor::empty(cpu, [N, N], dtype, Category::Workspace);
        each_dtype!(dtype, E => t.as_mut_slice::<E>().fill(windlass::tensor::kernels::Element::from_f64(value)));
        t
    };
    let (a, b, mut c) = (matrix(0.5), matrix(0.25), matrix(0.0));
    let best = (0..5).map(|_| {
        let start = Instant::now();
        each_dtype!(dtype, E => {
            let (a, b) = (Mat { data: a.as_slice::<E>(), stride: N }, Mat { data: b.as_slice::<E>(), stride: N });
            gemm(&cpu.pool, Layout::Nt, N, N, N, a, b, c.as_mut_slice::<E>(), N, Epilogue::default());
        });
        start.elapsed().as_secs_f64()
    });
    2.0 * (N as f64).powi(3) / best.fold(f64::INFINITY, f64::min)
}

/// Arithmetic of a token, forward and backward: six operations for each weight that multiplies it, and attention's two
/// products over half of the sequence.
fn flops_per_token(config: &DecoderConfig, parameters: usize, seq: usize) -> f64 {
    let table = config.vocab_size * config.hidden_size;
    let looked_up = if config.tie_word_embeddings { 0 } else { table };
    let positions = if config.learned_positions {
        config.max_position_embeddings * config.hidden_size
    } else {
        0
    };
    let products = (parameters - looked_up - positions) as f64;
    let attention = config.num_attention_heads * config.head_dim * config.num_hidden_layers();
    6.0 * products + 3.0 * 2.0 * attention as f64 * seq as f64
}

fn report(
    args: &Args,
    config: &DecoderConfig,
    how: &How,
    cpu: &Cpu,
    Measured { plan, times, io }: &Measured,
    peak: f64,
) {
    let tokens = (args.batch * args.seq * how.ranks) as f64;
    let peak = peak * how.ranks as f64;
    let (best, median) = (times[0], times[times.len() / 2]);
    let flops = flops_per_token(config, plan.parameters, args.seq) * tokens;
    let measured = cpu.memory.peak();
    let kernel = each_dtype!(how.dtype, E => gemm_kernel_name::<E>(&cpu.pool));
    if args.json {
        let memory: serde_json::Map<_, _> = Category::ALL
            .iter()
            .map(|c| (c.name().into(), measured.of(*c).into()))
            .collect();
        let report = json!({
            "preset": args.preset, "dtype": how.dtype.name(), "ranks": how.ranks, "threads": cpu.pool.threads(), "kernel": kernel,
            "batch": args.batch, "seq": args.seq, "parameters": plan.parameters,
            "tok_s_best": tokens / best[0], "tok_s_median": tokens / median[0],
            "fwd_bwd_opt": &best[1..], "gflops": flops / best[0] / 1e9, "gemm_gflops": peak / 1e9,
            "utilization": flops / best[0] / peak, "memory": memory,
            "sent_bytes": plan.sent_per_step, "io": io.map(|io| json!({
                "read_bytes": io.bytes_read, "written_bytes": io.bytes_written,
                "busy_s": io.busy_seconds, "waited_s": io.waited_seconds, "steps": times.len(),
            })),
            "memory_bytes": measured.reserved, "planned_bytes": plan.memory.reserved, "rss_bytes": resident_peak(),
        });
        println!("{report}");
        return;
    }
    println!(
        "{} · {} parameters · {} · batch {} x {} · {} threads · {kernel}",
        args.preset,
        count(plan.parameters),
        how.dtype,
        args.batch,
        args.seq,
        cpu.pool.threads()
    );
    println!(
        "tokens/s     {:.0} best, {:.0} median of {} steps",
        tokens / best[0],
        tokens / median[0],
        times.len()
    );
    println!(
        "utilization  {:.0} % ({:.0} of {:.0} GFLOP/s, the matrix product's own speed in this run)",
        100.0 * flops / best[0] / peak,
        flops / best[0] / 1e9,
        peak / 1e9
    );
    println!(
        "forward      {:.3} s (with the head's backward pass)",
        best[1]
    );
    println!("backward     {:.3} s", best[2]);
    println!("optimizer    {:.3} s", best[3]);
    report_traffic(how, plan, times.len(), *io);
    report_memory(&measured, plan.memory.reserved);
}

/// What the disk and the ranks have moved.
fn report_traffic(how: &How, plan: &Plan, steps: usize, io: Option<IoStats>) {
    if let Some(io) = io {
        let steps = steps as f64;
        println!(
            "disk         {} read, {} written in a step; {:.1} s busy, {:.1} s waited for",
            bytes((io.bytes_read as f64 / steps) as usize),
            bytes((io.bytes_written as f64 / steps) as usize),
            io.busy_seconds / steps,
            io.waited_seconds / steps
        );
    }
    if how.ranks > 1 {
        println!(
            "ranks        {}, each sends {} in a step; memory is that of the first one",
            how.ranks,
            bytes(plan.sent_per_step)
        );
    }
}

/// Memory by category, and beside the plan and what the system says.
fn report_memory(measured: &Usage, planned: usize) {
    for category in Category::ALL {
        println!("{:<12} {}", category.name(), bytes(measured.of(category)));
    }
    println!(
        "memory       {} ({} planned)",
        bytes(measured.reserved),
        bytes(planned)
    );
    if let Some(resident) = resident_peak() {
        println!(
            "resident     {} at most, the whole process",
            bytes(resident)
        );
    }
}

/// The process's largest resident size; `None` where the system does not say.
fn resident_peak() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
