//! A model of one's own, no language in it: two linear layers and a loss, declared as units and trained.
//!
//! ```sh
//! cargo run --release -p windlass --example own_model
//! ```

use windlass::prelude::*;

/// What the layers read beside the value that flows through them.
struct Points {
    x: Tensor,
    y: Tensor,
}

/// `gelu(x W1ᵀ + b1)`: the first layer starts from the batch.
struct Hidden;

impl Layer<Points> for Hidden {
    fn forward(&self, w: &Weights, _: Var, batch: &Points, tape: &mut Tape) -> Var {
        let x = tape.constant(batch.x.clone());
        let h = tape.linear(&x, w.at(0), Some(w.at(1)), None);
        tape.activation(Activation::Gelu, &h)
    }
}

/// `mean (h W2ᵀ + b2 - y)²`: the last layer returns the loss.
struct MeanSquare;

impl Layer<Points> for MeanSquare {
    fn forward(&self, w: &Weights, h: Var, batch: &Points, tape: &mut Tape) -> Var {
        let out = tape.linear(&h, w.at(0), Some(w.at(1)), None);
        let minus_y = tape.constant(batch.y.clone());
        let minus_y = tape.scale(-1.0, &minus_y);
        let difference = tape.add(&out, &minus_y);
        let square = tape.mul(&difference, &difference);
        let sum = tape.sum(&square);
        tape.scale(1.0 / batch.y.len() as f64, &sum)
    }
}

/// Learns `y = x0 * x1` on random points; returns the first and the last loss.
fn train() -> Result<(f64, f64), windlass::train::Error> {
    let cpu = Cpu::new(2);
    let linear = |name: &str, rows: usize, cols: usize| {
        vec![
            ParamSpec::normal(format!("{name}.weight"), [rows, cols], 0.5),
            ParamSpec::constant(format!("{name}.bias"), [rows], Init::Zeros),
        ]
    };
    let mut model = Model::new();
    let hidden = model.unit("hidden", linear("hidden", 32, 2));
    model.layer(hidden, Hidden);
    let output = model.unit("output", linear("output", 1, 32));
    model.layer(output, MeanSquare);

    let store = Store::init(&cpu, model.units(), DType::F32, 1);
    let mut engine = Engine::initialize(model, store, EngineOptions::default())?;
    let mut rng = Rng::new(1);
    let mut losses = Vec::new();
    for _ in 0..300 {
        let x: Vec<f32> = (0..128).map(|_| rng.uniform_f32() * 2.0 - 1.0).collect();
        let y: Vec<f32> = x.chunks(2).map(|p| p[0] * p[1]).collect();
        let loss = engine.forward(Points {
            x: Tensor::from_slice(&cpu, &x, [64, 2], Category::Activations),
            y: Tensor::from_slice(&cpu, &y, [64, 1], Category::Activations),
        })?;
        losses.push(loss.value());
        engine.backward(loss)?;
        engine.step_at(1e-2)?;
    }
    Ok((losses[0], losses[losses.len() - 1]))
}

fn main() -> Result<(), windlass::train::Error> {
    let (first, last) = train()?;
    println!("loss {first:.4} -> {last:.4}");
    Ok(())
}

#[test]
fn the_model_learns() {
    let (first, last) = train().unwrap();
    assert!(last < first / 20.0, "loss {first} -> {last}");
}
