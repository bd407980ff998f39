//! Loads a model and continues a prompt:
//!
//! ```sh
//! cargo run --release -p windlass --example generate -- path/to/model "Once upon a time"
//! ```

use std::io::Write;
use std::path::Path;
use windlass::prelude::*;

fn main() -> Result<(), InferError> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(prompt)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: generate FOLDER PROMPT");
        std::process::exit(2);
    };

    // A Hugging Face folder or a checkpoint; `None` keeps the file's own precision.
    let cpu = Cpu::new(std::thread::available_parallelism().map_or(1, |n| n.get()));
    let model = LoadedModel::open(&cpu, Path::new(&folder), None)?;

    let options = GenerateOptions {
        sampling: SamplingParams {
            temperature: 0.8,
            top_p: 0.95,
            ..Default::default()
        },
        max_tokens: 100,
        seed: 42,
        ..Default::default()
    };
    let mut generator = Generator::new(&model, options)?;
    print!("{prompt}");
    let generation = generator.generate_text(&prompt, &mut |piece| {
        print!("{piece}");
        std::io::stdout().flush().expect("standard output");
    })?;
    println!("\n[{} tokens: {:?}]", generation.ids.len(), generation.stop);
    Ok(())
}
