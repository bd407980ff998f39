//! Windlass's half of the comparison in `benchmarks/shakespeare`: the same weights, batches and recipe as PyTorch's.
//!
//! ```sh
//! cargo run --release -p windlass-train --example shakespeare -- FOLDER f32|bf16 curve.json [THREADS]
//! ```
//!
//! `FOLDER` is what `benchmarks/shakespeare_torch.py init` wrote.

use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;
use windlass_model::{DecoderConfig, Goal, Tokens, decoder};
use windlass_store::Home;
use windlass_tensor::{Cpu, DType};
use windlass_train::schedule::{Decay, Schedule, Warmup};
use windlass_train::{Engine, EngineOptions, Losses, Optimizer, load_model};

type Failure = Box<dyn std::error::Error>;

/// `batches.json` and `tokens.bin`.
struct Data {
    recipe: Value,
    starts: Vec<Vec<usize>>,
    tokens: Vec<u32>,
}

impl Data {
    fn read(folder: &Path) -> Result<Self, Failure> {
        let json: Value = serde_json::from_slice(&std::fs::read(folder.join("batches.json"))?)?;
        let bytes = std::fs::read(folder.join("tokens.bin"))?;
        let tokens = bytes
            .chunks_exact(2)
            .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]])));
        Ok(Data {
            recipe: json["recipe"].clone(),
            starts: serde_json::from_value(json["starts"].clone())?,
            tokens: tokens.collect(),
        })
    }

    fn number(&self, key: &str) -> Result<f64, Failure> {
        let number = self.recipe[key].as_f64();
        number.ok_or_else(|| format!("batches.json: recipe.{key} is no number").into())
    }

    /// The sequences of one step.
    fn batch(&self, starts: &[usize], context: usize, dtype: DType) -> Tokens {
        let ids = |shift: usize| {
            starts
                .iter()
                .flat_map(move |s| &self.tokens[s + shift..][..context])
        };
        let goal = Goal::Loss {
            targets: ids(1).map(|&id| i64::from(id)).collect(),
            denominator: (starts.len() * context) as f64,
        };
        let lengths = vec![context; starts.len()];
        Tokens::new(ids(0).copied().collect(), &lengths, goal, dtype)
    }
}

fn options(data: &Data) -> Result<(EngineOptions, Schedule), Failure> {
    let engine = EngineOptions {
        optimizer: Optimizer::AdamW {
            beta1: data.number("beta1")?,
            beta2: data.number("beta2")?,
            eps: data.number("eps")?,
            weight_decay: data.number("weight_decay")?,
        },
        gradient_clipping: Some(data.number("clip")?),
        losses: Losses::Sum,
        ..EngineOptions::default()
    };
    let (lr, warmup) = (data.number("lr")?, data.number("warmup")? as u64);
    let schedule = Schedule::new(
        lr,
        data.number("lr_min")? / lr,
        Warmup::Steps(warmup),
        data.number("steps")? as u64,
        Decay::Cosine,
    )?;
    Ok((engine, schedule))
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, dtype, out, rest @ ..] = args.as_slice() else {
        return Err("usage: shakespeare FOLDER f32|bf16 curve.json [THREADS]".into());
    };
    let storage = match dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::Bf16,
        other => return Err(format!("{other}: choose f32 or bf16").into()),
    };
    let threads: usize = rest.first().map_or(Ok(1), |n| n.parse())?;
    let folder = Path::new(folder);
    let data = Data::read(folder)?;
    let (options, schedule) = options(&data)?;
    let context = data.number("context")? as usize;
    let cpu = Cpu::new(threads);
    let config = DecoderConfig::load(folder)?;
    let (store, _) = load_model(&cpu, Home::alone(), folder, &config, storage)?;
    let mut engine = Engine::initialize(decoder(&config), store, options)?;
    let (mut losses, mut norms, began) = (Vec::new(), Vec::new(), Instant::now());
    for (step, starts) in data.starts.iter().enumerate() {
        let loss = engine.forward(data.batch(starts, context, storage))?;
        losses.push(loss.value());
        engine.backward(loss)?;
        norms.push(engine.step_at(schedule.lr(step as u64))?.grad_norm);
        if step % 25 == 0 || step + 1 == data.starts.len() {
            let seconds = began.elapsed().as_secs_f64();
            println!("step {step} loss {:.5} {seconds:.1} s", losses[step]);
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let tokens = (losses.len() * data.starts[0].len() * context) as f64;
    let rounded = |values: &[f64], unit: f64| -> Vec<f64> {
        values.iter().map(|v| (v * unit).round() / unit).collect()
    };
    let result = json!({
        "dtype": dtype,
        "windlass": env!("CARGO_PKG_VERSION"),
        "threads": threads,
        "seconds": (seconds * 10.0).round() / 10.0,
        "tokens_per_second": (tokens / seconds).round(),
        "reserved_mib": cpu.memory.peak().reserved >> 20,
        "recipe": data.recipe,
        "loss": rounded(&losses, 1e6),
        "gradient_norm": rounded(&norms, 1e5),
    });
    std::fs::write(out, format!("{result}\n"))?;
    Ok(())
}
