//! A training loop over one's own texts.
//!
//! ```sh
//! cargo run --release -p windlass --example train_loop
//! ```

use windlass::prelude::*;

type Failure = Box<dyn std::error::Error>;

/// Trains a small Llama on `texts`; returns the first and the last loss.
fn train(texts: &[&str], steps: usize) -> Result<(f64, f64), Failure> {
    let cpu = Cpu::new(2);
    let tokenizer = Tokenizer::train(texts.iter(), 300, "<|endoftext|>")?;
    let config = preset_config("llama", "1m", tokenizer.vocab_size())?;
    let model = decoder(&DecoderConfig::from_json("config", &config)?);
    let store = Store::init(&cpu, model.units(), DType::F32, 1);
    let mut engine = Engine::initialize(model, store, EngineOptions::default())?;
    let mut losses = Vec::new();
    for step in 0..steps {
        let ids = tokenizer.encode(texts[step % texts.len()], false)?;
        let length = ids.len();
        let loss = engine.forward(Tokens::next_token(ids, &[length], DType::F32))?;
        losses.push(loss.value());
        engine.backward(loss)?;
        engine.step_at(2e-3)?;
    }
    Ok((losses[0], losses[steps - 1]))
}

const TEXTS: &[&str] = &[
    "A windlass lifts what its turner could not carry.",
    "The longer the crank, the lighter the load.",
];

fn main() -> Result<(), Failure> {
    let (first, last) = train(TEXTS, 40)?;
    println!("loss {first:.3} -> {last:.3}");
    Ok(())
}

#[test]
fn the_loss_falls() {
    let (first, last) = train(TEXTS, 40).unwrap();
    assert!(last < first / 2.0, "loss {first} -> {last}");
}
