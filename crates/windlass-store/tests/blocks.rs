//! Block types against vectors of the `gguf` package of llama.cpp.

use std::path::PathBuf;

use windlass_store::gguf::BlockType;
use windlass_store::safetensors::Tensors;
use windlass_tensor::kernels::blocks::{dequantize, quantize};

fn fixture(name: &str) -> Option<Tensors> {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from) else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return None;
    };
    let path = data.join("fixtures/ggml-quants").join(name);
    Some(Tensors::open(&path).unwrap())
}

#[test]
fn dequantized_as_by_the_reference() {
    let Some(vectors) = fixture("dequant_vectors.safetensors") else {
        return;
    };
    let mut checked = Vec::new();
    for name in vectors.names().filter_map(|name| name.strip_suffix(".raw")) {
        let kind = BlockType::from_name(name).unwrap();
        let raw = format!("{name}.raw");
        let bytes = vectors.get(&raw).unwrap().bytes;
        let expected = format!("{name}.deq");
        let expected = vectors.get(&expected).unwrap();
        let expected = expected.as_slice::<f32>().unwrap();
        let mut values = vec![0.0; expected.len()];
        dequantize(kind, bytes, &mut values);
        for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
            assert_eq!(
                value.to_bits(),
                expected.to_bits(),
                "{kind} element {i}: {value} and {expected}"
            );
        }
        checked.push(name);
    }
    assert_eq!(checked.len(), 24, "{checked:?}");
}

#[test]
fn quantized_as_by_the_reference() {
    let Some(vectors) = fixture("quantize_vectors.safetensors") else {
        return;
    };
    let mut checked = Vec::new();
    for name in vectors.names().filter_map(|name| name.strip_suffix(".raw")) {
        let kind = BlockType::from_name(name).unwrap();
        let raw = format!("{name}.raw");
        let expected = vectors.get(&raw).unwrap();
        let long = kind.elements() == 256;
        let source = vectors.get(if long { "src256" } else { "src" }).unwrap();
        let rows = source.as_slice::<f32>().unwrap().chunks(source.row_len());
        for (i, (row, expected)) in rows
            .zip(expected.bytes.chunks(expected.row_len()))
            .enumerate()
        {
            let mut bytes = vec![0; expected.len()];
            quantize(kind, row, None, &mut bytes);
            assert_eq!(bytes, expected, "{kind} row {i}");
        }
        checked.push(name);
    }
    assert_eq!(checked.len(), 9, "{checked:?}");
}
