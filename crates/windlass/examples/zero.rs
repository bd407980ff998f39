//! The first program of DeepSpeed's documentation: a linear model from 10 to 10 numbers, mean squared error, Adam, batches
//! of 32, ZeRO stage 2, on two ranks. And the same in the words of Accelerate.
//!
//! ```sh
//! cargo run --release -p windlass --example zero
//! ```

use serde_json::json;
use std::time::Duration;
use windlass::accelerator::{Accelerator, AcceleratorOptions};
use windlass::comm::Group;
use windlass::prelude::*;
use windlass::store::{Placement, Stage};
use windlass::train::Result;
use windlass::train::config::{Config, Context};
use windlass::train::initialize_on;
use windlass::train::schedule::Rate;

/// Inputs and targets.
struct Batch {
    x: Tensor,
    y: Tensor,
}

/// `mean (x Wᵀ + b - y)²`.
struct LinearAndLoss;

impl Layer<Batch> for LinearAndLoss {
    fn forward(&self, w: &Weights, _: Var, batch: &Batch, tape: &mut Tape) -> Var {
        let x = tape.constant(batch.x.clone());
        let y = tape.linear(&x, w.at(0), Some(w.at(1)), None);
        let target = tape.constant(batch.y.clone());
        let target = tape.scale(-1.0, &target);
        let difference = tape.add(&y, &target);
        let square = tape.mul(&difference, &difference);
        let sum = tape.sum(&square);
        tape.scale(1.0 / batch.y.len() as f64, &sum)
    }
}

fn model() -> Model<Batch> {
    let mut model = Model::new();
    let linear = model.unit(
        "linear",
        vec![
            ParamSpec::normal("linear.weight", [10, 10], 0.3),
            ParamSpec::constant("linear.bias", [10], Init::Zeros),
        ],
    );
    model.layer(linear, LinearAndLoss);
    model
}

/// 32 points whose targets are their inputs, turned around.
fn batch(cpu: &Cpu, rng: &mut Rng) -> Batch {
    let x: Vec<f32> = (0..320).map(|_| rng.uniform_f32() - 0.5).collect();
    let y: Vec<f32> = x
        .chunks(10)
        .flat_map(|row| row.iter().rev().copied())
        .collect();
    Batch {
        x: Tensor::from_slice(cpu, &x, [32, 10], Category::Activations),
        y: Tensor::from_slice(cpu, &y, [32, 10], Category::Activations),
    }
}

const CONFIG: &str = r#"{
    "train_batch_size": 64,                 // 32 on each of 2 ranks
    "optimizer": {"type": "Adam", "params": {"lr": 2e-2}},
    "zero_optimization": {"stage": 2},
}"#;

/// DeepSpeed's way.
fn engine_way(group: Group) -> Result<f64> {
    let (cpu, rank) = (Cpu::new(1), group.rank() as u64);
    let config = Config::parse("example", CONFIG, &Context::ranks(2))?;
    let mut engine = initialize_on(&cpu, group, model(), &config, 1)?;
    let mut rng = Rng::stream(7, rank);
    let mut last = f64::NAN;
    for _ in 0..200 {
        let loss = engine.forward(batch(&cpu, &mut rng))?;
        last = loss.value();
        engine.backward(loss)?;
        engine.step()?;
    }
    Ok(last)
}

/// Accelerate's way.
fn accelerate_way(group: Group) -> Result<f64> {
    let placement = Placement {
        stage: Stage::Gradients,
        ..Placement::default()
    };
    let options = AcceleratorOptions {
        placement,
        ..AcceleratorOptions::default()
    };
    let mut accelerator = Accelerator::on(Cpu::new(1), group, options);
    let mut model = accelerator.prepare(model(), Optimizer::ADAMW, Rate::Constant(2e-2))?;
    let mut rng = Rng::stream(7, accelerator.process_index() as u64);
    let mut last = f64::NAN;
    for _ in 0..200 {
        last = model.accumulate(batch(accelerator.cpu(), &mut rng))?;
    }
    let losses = model.gather_for_metrics(&[last])?;
    accelerator.print(&json!({"loss": losses}).to_string());
    Ok(last)
}

/// Runs `job` on two ranks; the last loss of each.
fn ranks(job: fn(Group) -> Result<f64>) -> Result<Vec<f64>> {
    std::thread::scope(|scope| {
        let groups = Group::local(2, Duration::from_secs(60));
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|g| scope.spawn(move || job(g)))
            .collect();
        ranks
            .into_iter()
            .map(|r| r.join().expect("a rank"))
            .collect()
    })
}

fn main() -> Result<()> {
    println!("engine: last losses {:?}", ranks(engine_way)?);
    println!("accelerator: last losses {:?}", ranks(accelerate_way)?);
    Ok(())
}

#[test]
fn both_ways_learn() {
    for job in [engine_way, accelerate_way] {
        for last in ranks(job).unwrap() {
            assert!(last < 1e-3, "loss {last}");
        }
    }
}
