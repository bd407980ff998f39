//! Trained models of ternary weights, from the file format of their authors through a GGUF file, against known logits
//! and losses.

use std::path::Path;
use windlass_infer::LoadedModel;
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::{BlockType, Metadata, TensorInfo, Value, Writer};
use windlass_store::llama2c;
use windlass_store::safetensors::Tensors;
use windlass_tensor::Cpu;
use windlass_tensor::kernels::blocks::quantize;

/// What is left of a file of the authors' format: a header of 256 bytes, the last norm and the embeddings in `f32`, then
/// each kind of matrix for all layers.
struct Source<'a> {
    rest: &'a [u8],
}

impl Source<'_> {
    fn floats(&mut self, count: usize) -> Vec<f32> {
        let (floats, rest) = self.rest.split_at(4 * count);
        self.rest = rest;
        let floats = floats.as_chunks::<4>().0.iter();
        floats.map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    /// A scale, then four codes in a byte, the first in the upper bits: 1 stands for one, 3 for minus one.
    fn ternary(&mut self, count: usize) -> Vec<f32> {
        let scale = self.floats(1)[0];
        let (codes, rest) = self.rest.split_at(count / 4);
        self.rest = rest;
        let code =
            |byte: u8, shift: u8| [0.0, scale, f32::NAN, -scale][usize::from(byte >> shift & 3)];
        let codes = codes.iter();
        codes
            .flat_map(|&byte| [6, 4, 2, 0].map(|shift| code(byte, shift)))
            .collect()
    }
}

/// Rows of neighbors that are rotated together become the two halves of a head.
fn halves(matrix: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let dim = matrix.len() / cols / heads;
    let row = |n: usize| {
        let (head, at) = (n / dim, n % dim);
        let from = head * dim + at % (dim / 2) * 2 + at / (dim / 2);
        &matrix[from * cols..][..cols]
    };
    (0..heads * dim).flat_map(row).copied().collect()
}

/// A tensor of a file.
struct Part {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Writes a model as a GGUF file: matrices as `TQ2_0` where their rows are whole blocks of it, as `Q8_0` elsewhere.
fn to_gguf(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).unwrap();
    let word = |i: usize| i32::from_le_bytes(bytes[4 * i..][..4].try_into().unwrap()) as usize;
    let [dim, inner, layers, heads, kv_heads, vocabulary, context] =
        std::array::from_fn(|i| word(2 + i));
    let kv = dim / heads * kv_heads;
    let mut source = Source {
        rest: &bytes[256..],
    };
    let mut parts = Vec::new();
    let mut put = |name: String, shape: &[usize], values: Vec<f32>| {
        let shape = shape.to_vec();
        parts.push(Part {
            name,
            shape,
            values,
        });
    };
    put("output_norm.weight".into(), &[dim], source.floats(dim));
    put(
        "token_embd.weight".into(),
        &[vocabulary, dim],
        source.floats(vocabulary * dim),
    );
    for (name, rows, cols, rotated) in [
        ("attn_q", dim, dim, heads),
        ("attn_k", kv, dim, kv_heads),
        ("attn_v", kv, dim, 0),
        ("attn_output", dim, dim, 0),
        ("ffn_gate", inner, dim, 0),
        ("ffn_down", dim, inner, 0),
        ("ffn_up", inner, dim, 0),
    ] {
        for layer in 0..layers {
            let values = source.ternary(rows * cols);
            let values = match rotated {
                0 => values,
                heads => halves(&values, heads, cols),
            };
            put(format!("blk.{layer}.{name}.weight"), &[rows, cols], values);
        }
    }
    assert!(source.rest.is_empty());
    // Every product divides its input by its length and by the root of its width.
    for (name, width) in [
        ("attn_norm", dim),
        ("attn_sub_norm", dim),
        ("ffn_norm", dim),
        ("ffn_sub_norm", inner),
    ] {
        for layer in 0..layers {
            put(
                format!("blk.{layer}.{name}.weight"),
                &[width],
                vec![1.0 / width as f32; width],
            );
        }
    }
    let mut metadata = Metadata::default();
    metadata.insert("general.architecture", "bitnet");
    for (key, value) in [
        ("block_count", layers),
        ("context_length", context),
        ("embedding_length", dim),
        ("feed_forward_length", inner),
        ("attention.head_count", heads),
        ("attention.head_count_kv", kv_heads),
    ] {
        metadata.insert(format!("bitnet.{key}"), Value::U32(value as u32));
    }
    metadata.insert("bitnet.rope.freq_base", Value::F32(10_000.0));
    metadata.insert("bitnet.attention.layer_norm_rms_epsilon", Value::F32(1e-14));
    let kind = |part: &Part| match (
        part.name.starts_with("blk."),
        part.shape[..].last().unwrap() % 256,
    ) {
        _ if part.shape.len() == 1 => BlockType::F32,
        (false, _) => BlockType::F32,
        (true, 0) => BlockType::TQ2_0,
        _ => BlockType::Q8_0,
    };
    let infos: Vec<TensorInfo> = parts
        .iter()
        .map(|part| TensorInfo::new(part.name.clone(), part.shape.clone(), kind(part)))
        .collect();
    let mut writer = Writer::create(&RealDisk, to, &metadata, &infos).unwrap();
    for (part, info) in parts.iter().zip(&infos) {
        let mut bytes = vec![0; info.byte_size()];
        let cols = *part.shape.last().unwrap();
        let rows = bytes
            .chunks_mut(info.byte_size() / info.rows())
            .zip(part.values.chunks(cols));
        rows.for_each(|(to, row)| match info.block_type {
            BlockType::F32 => to
                .as_chunks_mut::<4>()
                .0
                .iter_mut()
                .zip(row)
                .for_each(|(to, x)| *to = x.to_le_bytes()),
            packed => quantize(packed, row, None, to),
        });
        writer.write(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// The negated log-probability of each next token, summed.
fn loss(logits: &[f32], width: usize, ids: &[u32]) -> f64 {
    let rows = logits.chunks(width).zip(&ids[1..]);
    rows.map(|(row, &next)| {
        let largest = f64::from(row.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
        largest + sum.ln() - f64::from(row[next as usize])
    })
    .sum()
}

#[test]
fn ternary_models_reach_their_known_losses() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let folder = Path::new(&data).join("models/bitllama2");
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(folder.join(name)).unwrap()).unwrap()
    };
    let texts: Vec<String> = serde_json::from_value(json("nll_texts.json")).unwrap();
    let known = json("golden_nll_tinystories_val12.json");
    let golden = Tensors::open(&folder.join("golden_logits.safetensors")).unwrap();
    let words = |name: &str| golden.get(name).unwrap().bytes.as_chunks::<4>().0.to_vec();
    let ids: Vec<u32> = words("ids").into_iter().map(u32::from_le_bytes).collect();

    let cpu = Cpu::new(2);
    let place = tempfile::tempdir().unwrap();
    let stories = folder.join("../stories260K/stories260K.bin");
    llama2c::convert(
        &RealDisk,
        &stories,
        &folder.join("tok512.bin"),
        place.path(),
    )
    .unwrap();
    let tokenizer = LoadedModel::open(&cpu, place.path(), None).unwrap();
    for name in ["1M", "3M"] {
        let path = place.path().join("model.gguf");
        to_gguf(&folder.join(format!("bit_model_{name}.bin")), &path);
        let model = LoadedModel::open(&cpu, &path, None).unwrap();
        assert!(model.is_packed().unwrap());

        let logits = model.logits(&ids).unwrap();
        let width = logits.cols();
        let want: Vec<f32> = words(&format!("logits_{name}"))
            .into_iter()
            .map(f32::from_le_bytes)
            .collect();
        let off = logits
            .to_f32()
            .iter()
            .zip(&want)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>();
        let size = want.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let off = (off / size).sqrt();

        let (mut total, mut count) = (0.0, 0);
        for text in &texts {
            let mut ids = tokenizer.encode(text).unwrap();
            ids.truncate(256);
            total += loss(&model.logits(&ids).unwrap().to_f32(), width, &ids);
            count += ids.len() - 1;
        }
        assert_eq!(known[name]["tokens"], count);
        let (mean, expected) = (total / count as f64, known[name]["nll"].as_f64().unwrap());
        println!("{name}: logits off by {off:.2e} of their size, loss {mean:.4} for {expected:.4}");
        // Theirs round the activations of a whole row to 8 bits, these those of 32 columns.
        assert!(off < 0.02, "{name}: {off}");
        assert!(
            (mean - expected).abs() < 0.01,
            "{name}: {mean} for {expected}"
        );
    }
}
