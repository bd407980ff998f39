//! Any bytes as a safetensors file: refused in words, or every tensor lies within the file and can be read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use windlass_store::safetensors::{Dtype, Header, read_values};

fuzz_target!(|file: &[u8]| {
    let Ok(header) = Header::parse(file) else {
        return;
    };
    for info in header.tensors.values() {
        let bytes = &file[info.bytes.clone()];
        let count: usize = info.shape.iter().product();
        assert_eq!(bytes.len() * 8, count * info.dtype.bitsize());
        if matches!(
            info.dtype,
            Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::BF16
        ) {
            read_values(info.dtype, bytes, &mut vec![0f32; count]);
        }
    }
});
