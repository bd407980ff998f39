//! Loads a model and continues a prompt.
//!
//! ```sh
//! cargo run --release -p windlass --example generate -- path/to/model "Once upon a time"
//! ```

use std::io::Write;
use std::path::Path;
use windlass::prelude::*;

/// Continues `prompt` with the model in `folder`, and shows the text as it comes.
fn continue_text(folder: &Path, prompt: &str) -> Result<Generation, InferError> {
    // A Hugging Face folder or a checkpoint; `None` keeps the file's own precision.
    let cpu = Cpu::new(2);
    let model = LoadedModel::open(&cpu, folder, None)?;

    let options = GenerateOptions {
        sampling: SamplingParams {
            temperature: 0.8,
            top_p: 0.95,
            ..Default::default()
        },
        max_tokens: 30,
        seed: 42,
        ..Default::default()
    };
    let mut generator = Generator::new(&model, options)?;
    print!("{prompt}");
    let generation = generator.generate_text(prompt, &mut |piece| {
        print!("{piece}");
        std::io::stdout().flush().expect("standard output");
    })?;
    println!();
    Ok(generation)
}

fn main() -> Result<(), InferError> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, prompt] = &arguments[..] else {
        eprintln!("usage: generate FOLDER PROMPT");
        std::process::exit(2);
    };
    let generation = continue_text(Path::new(folder), prompt)?;
    println!("{} tokens: {:?}", generation.ids.len(), generation.stop);
    Ok(())
}

#[test]
fn a_saved_model_continues_a_prompt() {
    let text = "A windlass lifts what its turner could not carry.";
    let tokenizer = Tokenizer::train([text].iter(), 300, "<|endoftext|>").unwrap();
    let config = preset_config("llama", "1m", tokenizer.vocab_size()).unwrap();
    let config = DecoderConfig::from_json("config", &config).unwrap();
    let model = decoder(&config);
    let store = Store::init(&Cpu::new(1), model.units(), DType::F32, 1);
    let folder = tempfile::tempdir().unwrap();
    let map = config.naming.file_tensors(&model);
    let (units, values) = (model.units(), |id: windlass::tensor::ParamId| {
        windlass::store::elements(store.gather(id.unit).unwrap().at(id.slot).weight)
    });
    windlass::store::save_weights(
        folder.path(),
        units,
        &map,
        DType::F32,
        &Default::default(),
        values,
    )
    .unwrap();
    std::fs::write(folder.path().join("config.json"), config.json.to_string()).unwrap();
    tokenizer.save(folder.path()).unwrap();

    let first = continue_text(folder.path(), "A windlass").unwrap();
    assert!(!first.ids.is_empty() && first.ids.len() <= 30);
    assert_eq!(continue_text(folder.path(), "A windlass").unwrap(), first);
}
