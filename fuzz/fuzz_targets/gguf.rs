//! Any bytes as a GGUF file: refused in words, or every tensor lies within the file, apart from the others, and its
//! blocks can be read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_store::gguf::Header;
use windlass_tensor::kernels::blocks::{dequantize, first_bad_block};

fuzz_target!(|file: &[u8]| {
    let header = match Header::parse(file) {
        Ok(header) => header,
        Err(problem) => return assert!(!problem.to_string().is_empty()),
    };
    let mut ranges = Vec::new();
    for (info, range) in &header.tensors {
        let bytes = &file[range.clone()];
        assert_eq!(bytes.len(), info.byte_size());
        assert_eq!(info.elements(), info.rows() * info.row_len());
        let _ = first_bad_block(info.block_type, bytes);
        dequantize(info.block_type, bytes, &mut vec![0f32; info.elements()]);
        if !range.is_empty() {
            ranges.push((range.start, range.end));
        }
    }
    ranges.sort();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    for (key, value) in header.metadata.iter() {
        // The same value, not an equal one: it may be no number.
        let found = header.metadata.value(key).expect(key);
        assert!(std::ptr::eq(found, value));
        let _ = header.metadata.get::<Vec<u64>>(key);
    }
});
