//! Any text as a `ds_config.json`: refused in words, or a configuration whose values agree with one another.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_train::config::{Auto, Config, Context};

fuzz_target!(|text: &str| {
    let auto = Auto {
        lr: Some(1e-3),
        total_num_steps: Some(10),
        hidden_size: Some(64),
        ..Auto::default()
    };
    let context = Context {
        auto,
        ..Context::ranks(3)
    };
    match Config::parse("ds_config.json", text, &context) {
        Ok(config) => {
            let batch = config.batch;
            let product = batch.train_micro_batch_size_per_gpu * batch.gradient_accumulation_steps;
            assert_eq!(batch.train_batch_size, product.saturating_mul(3));
            assert!(!config.report().is_empty());
            let _ = config.scheduler.map(|scheduler| scheduler.update_lr(7));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
