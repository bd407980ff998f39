//! Any text as what a checkpoint says of its quantized weights: refused in words and with advice, or understood.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_infer::quantized::Quantization;

fuzz_target!(|text: &str| {
    match Quantization::from_json("quantize_config.json", text) {
        Err(problem) => assert!(!problem.to_string().is_empty() && problem.hint().is_some()),
        Ok(Quantization::Gptq(gptq)) => {
            assert!([2, 3, 4, 8].contains(&gptq.bits) && gptq.group != Some(0));
        }
        Ok(Quantization::Awq { group }) => assert_ne!(group, Some(0)),
        Ok(Quantization::CompressedTensors { schemes }) => {
            let known = |bits| [4, 8].contains(&bits);
            assert!(schemes.iter().all(|s| known(s.bits) && s.group != Some(0)));
            assert!(!schemes.is_empty());
        }
    }
});
