//! Any text as a model's `config.json`: refused in words, or a configuration that a model can be built from.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_model::DecoderConfig;

fuzz_target!(|text: &str| {
    let _ = DecoderConfig::from_json("config.json", text);
});
