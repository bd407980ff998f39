//! Checkpoints in the formats of GPTQ, AWQ and compressed-tensors, packed here number by number as their formats are
//! described: what is loaded is exactly the numbers meant, and computes what these numbers compute.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use windlass_infer::convert::Folder;
use windlass_infer::quantized::Quantization;
use windlass_infer::{LoadIn, LoadedModel};
use windlass_model::{DecoderConfig, decoder};
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::BlockType;
use windlass_store::safetensors::{Dtype, Spec, Tensors, write_file};
use windlass_tensor::{Cpu, DType, Layout, Rng, Weight, bf16, f16, kernels::packed};

/// A tensor of a file: its name, type, shape and bytes.
type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

fn write(folder: &Path, config: &Value, entries: &[Entry]) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let specs: Vec<Spec> = entries
        .iter()
        .map(|(name, dtype, shape, _)| Spec::new(name, *dtype, shape.clone()))
        .collect();
    let path = folder.join("model.safetensors");
    let metadata = BTreeMap::new();
    write_file(&RealDisk, &path, &specs, &metadata, |i, writer| {
        writer.bytes(&entries[i].3)
    })
    .unwrap();
}

fn floats(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Entry {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name.into(), Dtype::F32, shape.to_vec(), bytes)
}

fn words(name: String, shape: [usize; 2], values: &[u32]) -> Entry {
    assert_eq!(values.len(), shape[0] * shape[1]);
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name, Dtype::I32, shape.to_vec(), bytes)
}

/// How a checkpoint is quantized.
#[derive(Clone, Copy)]
struct Recipe {
    bits: usize,
    /// Inputs of a group; 0 for all.
    group: usize,
    sym: bool,
    /// Whether groups are made of random inputs.
    shuffled: bool,
    scales: Dtype,
}

/// The numbers of a quantized matrix.
struct Numbers {
    outputs: usize,
    inputs: usize,
    bits: usize,
    /// Group of each input.
    group_of: Vec<usize>,
    groups: usize,
    /// `[outputs][inputs]`.
    codes: Vec<Vec<u32>>,
    /// `[groups][outputs]`.
    scales: Vec<Vec<f32>>,
    zeros: Vec<Vec<u32>>,
    scale_type: Dtype,
}

impl Numbers {
    fn random(rng: &mut Rng, [outputs, inputs]: [usize; 2], recipe: Recipe) -> Numbers {
        let size = if recipe.group == 0 {
            inputs
        } else {
            recipe.group
        };
        let mut group_of: Vec<usize> = (0..inputs).map(|i| i / size).collect();
        if recipe.shuffled {
            for i in (1..inputs).rev() {
                group_of.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
            }
        }
        let groups = inputs / size;
        let levels = 1u64 << recipe.bits;
        let mut below = |n: u64| (rng.next_u64() % n) as u32;
        let codes = (0..outputs).map(|_| (0..inputs).map(|_| below(levels)).collect());
        let codes: Vec<Vec<u32>> = codes.collect();
        let zeros = (0..groups).map(|_| {
            let zero = |_| match recipe.sym {
                true => levels as u32 / 2,
                false => (levels as u32 / 4).max(1) + below(levels / 2),
            };
            (0..outputs).map(zero).collect()
        });
        let zeros: Vec<Vec<u32>> = zeros.collect();
        let mut scale = || {
            // Few bits and a normal f16, so that every type holds it exactly.
            let value = (64 + rng.next_u64() % 64) as f32 / 64.0;
            value * 0.25 / (levels as f32 * (inputs as f32).sqrt())
        };
        let scales = (0..groups).map(|_| {
            (0..outputs)
                .map(|_| bf16::from_f32(scale()).to_f32())
                .collect()
        });
        Numbers {
            outputs,
            inputs,
            bits: recipe.bits,
            group_of,
            groups,
            codes,
            scales: scales.collect(),
            zeros,
            scale_type: recipe.scales,
        }
    }

    fn weight(&self, output: usize, input: usize) -> f32 {
        let group = self.group_of[input];
        let level = self.codes[output][input] as f32 - self.zeros[group][output] as f32;
        self.scales[group][output] * level
    }

    /// Scales in their type, `[groups, outputs]` or the other way.
    fn scales(&self, name: String, by_output: bool) -> Entry {
        let shape = match by_output {
            true => vec![self.outputs, self.groups],
            false => vec![self.groups, self.outputs],
        };
        let mut bytes = Vec::new();
        for a in 0..shape[0] {
            for b in 0..shape[1] {
                let (group, output) = if by_output { (b, a) } else { (a, b) };
                let value = self.scales[group][output];
                match self.scale_type {
                    Dtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                    Dtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                    _ => bytes.extend(value.to_le_bytes()),
                }
            }
        }
        (name, self.scale_type, shape, bytes)
    }

    fn g_idx(&self, name: String) -> Entry {
        let bytes = self.group_of.iter().flat_map(|&g| (g as i32).to_le_bytes());
        (name, Dtype::I32, vec![self.inputs], bytes.collect())
    }
}

/// Puts 3-bit values into words as GPTQ does: ten and two bits, a bit and ten and a bit, two bits and ten.
fn pack3(values: &[u32]) -> Vec<u32> {
    let mut out = Vec::new();
    for v in values.chunks(32) {
        let mut words = [0u32; 3];
        (0..10).for_each(|j| words[0] |= v[j] << (3 * j));
        words[0] |= v[10] << 30;
        words[1] |= v[10] >> 2;
        (0..10).for_each(|j| words[1] |= v[11 + j] << (3 * j + 1));
        words[1] |= v[21] << 31;
        words[2] |= v[21] >> 1;
        (0..10).for_each(|j| words[2] |= v[22 + j] << (3 * j + 2));
        out.extend(words);
    }
    out
}

/// Values side by side in words, the first in the lowest bits.
fn pack(values: &[u32], bits: usize) -> Vec<u32> {
    if bits == 3 {
        return pack3(values);
    }
    let words = values.chunks(32 / bits);
    let word = |values: &[u32]| {
        let mut word = 0;
        for (j, value) in values.iter().enumerate() {
            word |= value << (bits * j);
        }
        word
    };
    words.map(word).collect()
}

fn transpose(rows: &[Vec<u32>]) -> Vec<u32> {
    let turned = (0..rows[0].len()).flat_map(|c| rows.iter().map(move |row| row[c]));
    turned.collect()
}

fn gptq(module: &str, n: &Numbers, v2: bool) -> Vec<Entry> {
    let columns: Vec<Vec<u32>> = n.codes.iter().map(|row| pack(row, n.bits)).collect();
    let mask = (1 << n.bits) - 1;
    let zeros: Vec<u32> = n
        .zeros
        .iter()
        .flat_map(|row| {
            let stored = row
                .iter()
                .map(|z| if v2 { *z } else { z.wrapping_sub(1) & mask });
            pack(&stored.collect::<Vec<u32>>(), n.bits)
        })
        .collect();
    vec![
        words(
            format!("{module}.qweight"),
            [n.inputs * n.bits / 32, n.outputs],
            &transpose(&columns),
        ),
        words(
            format!("{module}.qzeros"),
            [n.groups, n.outputs * n.bits / 32],
            &zeros,
        ),
        n.scales(format!("{module}.scales"), false),
        n.g_idx(format!("{module}.g_idx")),
    ]
}

fn awq(module: &str, n: &Numbers) -> Vec<Entry> {
    const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    let pack = |row: &[u32]| -> Vec<u32> {
        let eights = row.chunks(8);
        let word = |eight: &[u32]| (0..8).map(|i| eight[ORDER[i]] << (4 * i)).sum();
        eights.map(word).collect()
    };
    let mut codes = Vec::new();
    for input in 0..n.inputs {
        let row: Vec<u32> = n.codes.iter().map(|row| row[input]).collect();
        codes.extend(pack(&row));
    }
    let zeros: Vec<u32> = n.zeros.iter().flat_map(|row| pack(row)).collect();
    vec![
        words(
            format!("{module}.qweight"),
            [n.inputs, n.outputs / 8],
            &codes,
        ),
        words(
            format!("{module}.qzeros"),
            [n.groups, n.outputs / 8],
            &zeros,
        ),
        n.scales(format!("{module}.scales"), false),
    ]
}

fn compressed(module: &str, n: &Numbers, recipe: Recipe, bytes: bool) -> Vec<Entry> {
    let middle = 1 << (n.bits - 1);
    let mut entries = vec![n.scales(format!("{module}.weight_scale"), true)];
    if bytes {
        let signed = n
            .codes
            .iter()
            .flatten()
            .map(|&code| (code as i32 - middle) as i8 as u8);
        let shape = vec![n.outputs, n.inputs];
        entries.push((
            format!("{module}.weight"),
            Dtype::I8,
            shape,
            signed.collect(),
        ));
    } else {
        let codes: Vec<u32> = n.codes.iter().flat_map(|row| pack(row, n.bits)).collect();
        let shape = [n.outputs, n.inputs * n.bits / 32];
        entries.push(words(format!("{module}.weight_packed"), shape, &codes));
        let sizes = [n.outputs as i64, n.inputs as i64].map(i64::to_le_bytes);
        let name = format!("{module}.weight_shape");
        entries.push((name, Dtype::I64, vec![2], sizes.as_flattened().to_vec()));
    }
    let name = format!("{module}.weight_zero_point");
    if !recipe.sym && bytes {
        let signed = (0..n.outputs).flat_map(|o| {
            n.zeros
                .iter()
                .map(move |row| (row[o] as i32 - middle) as i8 as u8)
        });
        let shape = vec![n.outputs, n.groups];
        entries.push((name, Dtype::I8, shape, signed.collect()));
    } else if !recipe.sym {
        let columns: Vec<Vec<u32>> = n.zeros.iter().map(|row| pack(row, n.bits)).collect();
        let shape = [n.outputs * n.bits / 32, n.groups];
        entries.push(words(name, shape, &transpose(&columns)));
    }
    if recipe.shuffled {
        entries.push(n.g_idx(format!("{module}.weight_g_idx")));
    }
    entries
}

/// A format, and its configuration's variant.
#[derive(Clone, Copy)]
enum Format {
    Gptq { v2: bool },
    Awq,
    Packed,
    Bytes,
}

impl Format {
    fn pack(self, module: &str, n: &Numbers, recipe: Recipe) -> Vec<Entry> {
        match self {
            Format::Gptq { v2 } => gptq(module, n, v2),
            Format::Awq => awq(module, n),
            Format::Packed => compressed(module, n, recipe, false),
            Format::Bytes => compressed(module, n, recipe, true),
        }
    }

    fn config(self, recipe: Recipe) -> Value {
        let group = if recipe.group == 0 {
            -1
        } else {
            recipe.group as i64
        };
        let strategy = if recipe.group == 0 {
            "channel"
        } else {
            "group"
        };
        let scheme = json!({
            "targets": ["Linear"],
            "weights": {
                "num_bits": recipe.bits, "type": "int", "symmetric": recipe.sym, "strategy": strategy,
                "group_size": (recipe.group > 0).then_some(group),
                "actorder": recipe.shuffled.then_some("group"),
            },
        });
        match self {
            Format::Gptq { v2 } => json!({
                "quant_method": "gptq", "bits": recipe.bits, "group_size": group, "sym": recipe.sym,
                "desc_act": recipe.shuffled, "lm_head": false,
                "checkpoint_format": if v2 { "gptq_v2" } else { "gptq" },
            }),
            Format::Awq => json!({
                "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": "gemm",
                "modules_to_not_convert": null,
            }),
            Format::Packed | Format::Bytes => json!({
                "quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"group_0": scheme},
                "format": if let Format::Packed = self { "pack-quantized" } else { "int-quantized" },
                "quantization_status": "compressed",
            }),
        }
    }
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    })
}

/// Writes a random model twice: quantized, and the same numbers plain.
fn build(
    config: &Value,
    format: Format,
    recipe: Recipe,
    seed: u64,
) -> (tempfile::TempDir, tempfile::TempDir, Vec<Entry>) {
    let parsed = DecoderConfig::from_json("test", &config.to_string()).unwrap();
    let mut rng = Rng::new(seed);
    let (mut quantized, mut plain) = (Vec::new(), Vec::new());
    for file in parsed.naming.file_tensors(&decoder(&parsed)) {
        let shape = file.shape.to_vec();
        // Routers stay plain, as programs leave them.
        let layers = [".layers.", ".h."]
            .iter()
            .any(|part| file.name.contains(part))
            && !file.name.ends_with(".gate.weight");
        if let ([rows, cols], true) = (&shape[..], layers) {
            let turned = file.layout == Layout::Transposed;
            let size = if turned {
                [*cols, *rows]
            } else {
                [*rows, *cols]
            };
            let n = Numbers::random(&mut rng, size, recipe);
            let value = |at: usize| match turned {
                true => n.weight(at % cols, at / cols),
                false => n.weight(at / cols, at % cols),
            };
            let values: Vec<f32> = (0..rows * cols).map(value).collect();
            let module = file.name.strip_suffix(".weight").unwrap();
            quantized.extend(format.pack(module, &n, recipe));
            plain.push(floats(file.name, &shape, &values));
        } else {
            let norm = shape.len() == 1 && file.name.ends_with("weight");
            let (mean, deviation) = if norm { (1.0, 0.1) } else { (0.0, 0.3) };
            let values = (0..file.shape.len()).map(|_| (mean + deviation * rng.normal()) as f32);
            let values: Vec<f32> = values.collect();
            quantized.push(floats(file.name.clone(), &shape, &values));
            plain.push(floats(file.name, &shape, &values));
        }
    }
    let folders = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut with = config.clone();
    with["quantization_config"] = format.config(recipe);
    write(folders.0.path(), &with, &quantized);
    write(folders.1.path(), config, &plain);
    (folders.0, folders.1, quantized)
}

/// The mean divergence of `q` from `p` over rows of logits.
fn divergence(p: &[f32], q: &[f32], width: usize) -> f64 {
    let log_softmax = |logits: &[f32]| -> Vec<f64> {
        let largest = f64::from(logits.iter().fold(f32::MIN, |m, &l| m.max(l)));
        let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
        let log = largest + sum.ln();
        logits.iter().map(|&l| f64::from(l) - log).collect()
    };
    let rows = p.chunks(width).zip(q.chunks(width)).map(|(p, q)| {
        let (p, q) = (log_softmax(p), log_softmax(q));
        let terms = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q));
        terms.sum::<f64>()
    });
    rows.sum::<f64>() / (p.len() / width) as f64
}

/// All parameters as plain numbers.
fn numbers(cpu: &Cpu, model: &LoadedModel) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for unit in 0..model.model.units().len() {
        for weight in model.store.gather(unit).unwrap().iter() {
            all.push(match weight {
                Weight::Dense(tensor) => tensor.to_f32(),
                Weight::Packed(packed) => {
                    let rows = 0..packed.shape()[0];
                    packed.unpack_rows(cpu, rows, DType::F32).to_f32()
                }
            });
        }
    }
    all
}

/// Converts a quantized checkpoint to a plain folder and to a GGUF file; returns how many tensors keep their codes there.
fn converted(name: &str, cpu: &Cpu, quantized: &Path, want: &LoadedModel) -> usize {
    let place = tempfile::tempdir().unwrap();
    let (folder, file) = (place.path().join("plain"), place.path().join("file.gguf"));
    let source = Folder::open(quantized).unwrap();
    assert!(source.is_quantized());
    source
        .write_plain(cpu, &RealDisk, &folder, Dtype::F32, |_, _| {})
        .unwrap();
    let exact = source.exact_types(cpu).unwrap();
    let types: Vec<BlockType> = exact
        .iter()
        .map(|kind| kind.unwrap_or(BlockType::F32))
        .collect();
    source
        .write(cpu, &RealDisk, &file, (0, &types), |_, _| {})
        .unwrap();
    let want = numbers(cpu, want);
    // Eight bits hold what four do.
    let large = place.path().join("large.gguf");
    let types: Vec<BlockType> = exact
        .iter()
        .map(|kind| kind.map_or(BlockType::F32, |_| BlockType::Q8_0))
        .collect();
    source
        .write(cpu, &RealDisk, &large, (0, &types), |_, _| {})
        .unwrap();
    for path in [folder, file, large] {
        let got = LoadedModel::open(cpu, &path, Some(DType::F32)).unwrap();
        assert!(numbers(cpu, &got) == want, "{name}: {}", path.display());
    }
    exact.iter().flatten().count()
}

/// Checks a quantized checkpoint against its numbers; returns how many matrices are packed.
fn compare(name: &str, cpu: &Cpu, quantized: &Path, plain: &Path, ids: &[u32]) -> usize {
    let got = LoadedModel::open(cpu, quantized, None).unwrap_or_else(|e| panic!("{name}: {e}"));
    let want = LoadedModel::open(cpu, plain, Some(DType::F32)).unwrap();
    assert_eq!(got.notes, want.notes, "{name}");
    let mut count = 0;
    for unit in 0..got.model.units().len() {
        let (a, b) = (
            got.store.gather(unit).unwrap(),
            want.store.gather(unit).unwrap(),
        );
        let params = &got.model.units()[unit].params;
        for ((a, b), param) in a.iter().zip(b.iter()).zip(params) {
            let values = match a {
                Weight::Dense(tensor) => tensor.to_f32(),
                Weight::Packed(packed) => {
                    count += 1;
                    let rows = 0..packed.shape()[0];
                    packed.unpack_rows(cpu, rows, DType::F32).to_f32()
                }
            };
            let same = values == b.dense().to_f32();
            assert!(same, "{name}: other numbers in {}", param.name);
        }
    }
    let (p, q) = (want.logits(ids).unwrap(), got.logits(ids).unwrap());
    let width = p.cols();
    let (p, q) = (p.to_f32(), q.to_f32());
    let divergence = divergence(&p, &q, width);
    println!("{name}: divergence {divergence:.1e}");
    assert!(divergence < 1e-3, "{name}: divergence {divergence}");
    assert_ne!(p, q, "{name}: activations are rounded");
    // Unpacked, they are the plain model.
    let plain = LoadedModel::open_in(cpu, quantized, None, LoadIn::Plain).unwrap();
    assert!(!plain.is_packed().unwrap(), "{name}");
    let unpacked = plain.logits(ids).unwrap().to_f32();
    assert_eq!(unpacked, p, "{name}: unpacked weights");
    let kept = tempfile::tempdir().unwrap();
    let kept = kept.path().join("packed");
    got.save_packed(&RealDisk, &kept).unwrap();
    let kept = LoadedModel::open(cpu, &kept, None).unwrap();
    let again = kept.logits(ids).unwrap().to_f32();
    assert_eq!(q, again, "{name}: packed weights were kept");
    let exact = converted(name, cpu, quantized, &want);
    match name {
        "gptq 4" | "gptq 2, symmetric" => assert_eq!(exact, count, "{name}"),
        "gptq 4, zeros" | "gptq 4, desc_act" => assert_eq!(exact, 0, "{name}"),
        _ => println!("{name}: {exact} of {count} matrices keep their codes"),
    }
    count
}

#[test]
fn checkpoints_are_their_numbers() {
    let cpu = Cpu::new(2);
    let v1 = Format::Gptq { v2: false };
    let v2 = Format::Gptq { v2: true };
    let recipe = |bits, group, sym, shuffled, scales| Recipe {
        bits,
        group,
        sym,
        shuffled,
        scales,
    };
    let ids: Vec<u32> = (0..24).map(|i| i * 37 % 96).collect();
    let cases = [
        ("gptq 4", v1, recipe(4, 32, true, false, Dtype::F16)),
        (
            "gptq 4, zeros",
            v1,
            recipe(4, 128, false, false, Dtype::F16),
        ),
        (
            "gptq 4, desc_act",
            v1,
            recipe(4, 64, false, true, Dtype::F16),
        ),
        (
            "gptq 4, all inputs",
            v2,
            recipe(4, 0, true, false, Dtype::BF16),
        ),
        (
            "gptq 4, v2 zeros",
            v2,
            recipe(4, 32, false, true, Dtype::F32),
        ),
        ("gptq 2", v1, recipe(2, 32, false, false, Dtype::F16)),
        (
            "gptq 2, symmetric",
            v2,
            recipe(2, 64, true, false, Dtype::F16),
        ),
        ("gptq 3", v1, recipe(3, 32, false, true, Dtype::F16)),
        (
            "gptq 3, symmetric",
            v2,
            recipe(3, 128, true, false, Dtype::F16),
        ),
        ("gptq 8", v1, recipe(8, 128, true, false, Dtype::F16)),
        ("gptq 8, zeros", v2, recipe(8, 0, false, false, Dtype::F16)),
        ("awq", Format::Awq, recipe(4, 128, false, false, Dtype::F16)),
        (
            "awq 32",
            Format::Awq,
            recipe(4, 32, false, false, Dtype::F16),
        ),
        (
            "packed 4",
            Format::Packed,
            recipe(4, 32, true, false, Dtype::BF16),
        ),
        (
            "packed 4, zeros",
            Format::Packed,
            recipe(4, 64, false, false, Dtype::F16),
        ),
        (
            "packed 4, actorder",
            Format::Packed,
            recipe(4, 32, false, true, Dtype::BF16),
        ),
        (
            "packed 8, channels",
            Format::Packed,
            recipe(8, 0, true, false, Dtype::F32),
        ),
        (
            "bytes",
            Format::Bytes,
            recipe(8, 0, true, false, Dtype::BF16),
        ),
        (
            "bytes, zeros",
            Format::Bytes,
            recipe(8, 0, false, false, Dtype::F32),
        ),
        (
            "bytes, groups",
            Format::Bytes,
            recipe(8, 64, false, false, Dtype::F16),
        ),
    ];
    for (seed, (name, format, recipe)) in cases.into_iter().enumerate() {
        let (quantized, plain, _) = build(&llama(), format, recipe, seed as u64);
        let count = compare(name, &cpu, quantized.path(), plain.path(), &ids);
        assert_eq!(count, 14, "{name}: packed matrices");
    }

    // Tensors that hold several matrices, transposed ones, and rows by head.
    let mut phi3 = llama();
    phi3["model_type"] = "phi3".into();
    let mut neox = llama();
    neox["model_type"] = "gpt_neox".into();
    neox["num_key_value_heads"] = 4.into();
    let gpt2 = json!({
        "model_type": "gpt2", "vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64,
    });
    let mut mixtral = llama();
    mixtral["model_type"] = "mixtral".into();
    mixtral["num_local_experts"] = 4.into();
    mixtral["num_experts_per_tok"] = 2.into();
    let shuffled = recipe(4, 32, false, true, Dtype::F16);
    for (name, config, format, count) in [
        ("phi3", &phi3, v1, 14),
        ("phi3, awq", &phi3, Format::Awq, 14),
        ("gpt_neox", &neox, v1, 12),
        ("gpt_neox, packed", &neox, Format::Packed, 12),
        ("gpt2", &gpt2, v1, 12),
        ("mixtral", &mixtral, v1, 2 * (4 + 4 * 3)),
        ("mixtral, awq", &mixtral, Format::Awq, 2 * (4 + 4 * 3)),
    ] {
        let recipe = Recipe {
            shuffled: !matches!(format, Format::Awq),
            ..shuffled
        };
        let (quantized, plain, _) = build(config, format, recipe, 99);
        let packed = compare(name, &cpu, quantized.path(), plain.path(), &ids);
        assert_eq!(packed, count, "{name}: packed matrices");
    }
    let (quantized, _, _) = build(&gpt2, Format::Packed, shuffled, 7);
    let error = LoadedModel::open(&cpu, quantized.path(), None)
        .err()
        .unwrap();
    assert!(error.to_string().contains("transposed"), "{error}");
}

/// Settings in a file of their own, biases of zeros, matrices of other bits, the rest rounded while loading; and the plain
/// loader, which training uses, refuses.
#[test]
fn folders_as_programs_leave_them() {
    let cpu = Cpu::new(2);
    let recipe = Recipe {
        bits: 4,
        group: 32,
        sym: true,
        shuffled: false,
        scales: Dtype::F16,
    };
    let format = Format::Gptq { v2: false };
    let (quantized, plain, mut entries) = build(&llama(), format, recipe, 5);
    let folder = quantized.path();
    let error = DecoderConfig::load(folder).err().unwrap();
    assert!(error.to_string().contains("quantization_config"), "{error}");
    assert!(error.hint().unwrap().contains("inference"), "{error}");

    let bias = "model.layers.0.self_attn.q_proj.bias";
    entries.push(floats(bias, &[128], &[0.0; 128]));
    write(folder, &llama(), &entries);
    let settings =
        json!({"bits": 8, "group_size": 32, "desc_act": false, "dynamic": {"+:.*": {"bits": 4}}});
    let path = folder.join("quantize_config.json");
    std::fs::write(&path, settings.to_string()).unwrap();
    let ids: Vec<u32> = (0..12).collect();
    assert_eq!(compare("own file", &cpu, folder, plain.path(), &ids), 14);

    let load_in = LoadIn::Packed(packed::Layout::q8());
    let model = LoadedModel::open_in(&cpu, folder, None, load_in).unwrap();
    let weights = model.store.gather(0).unwrap();
    assert!(
        matches!(weights.at(0).weight, Weight::Packed(p) if p.matrix().layout() == &packed::Layout::q8())
    );
    let weights = model.store.gather(1).unwrap();
    let layouts = weights.iter().filter_map(|weight| match weight {
        Weight::Packed(packed) => Some(packed.matrix().layout()),
        Weight::Dense(_) => None,
    });
    assert_eq!(layouts.collect::<Vec<_>>(), [&packed::Layout::q4(32); 7]);
    assert!(
        model
            .notes
            .iter()
            .any(|note| note.contains("keep their bits"))
    );

    // A bias that is not zero is one that the model lacks.
    entries.last_mut().unwrap().3[2] = 0x80;
    entries.last_mut().unwrap().3[3] = 0x3f;
    write(folder, &llama(), &entries);
    let error = LoadedModel::open(&cpu, folder, None).err().unwrap();
    assert!(error.to_string().contains(bias), "{error}");
}

/// The trained model in groups of 32: its losses are those of its rounded weights.
#[test]
fn stories_in_four_bits() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let stories = Path::new(&data).join("models/stories260K");
    let folder = tempfile::tempdir().unwrap();
    let (model, tokens) = (stories.join("stories260K.bin"), stories.join("tok512.bin"));
    windlass_store::llama2c::convert(&RealDisk, &model, &tokens, folder.path()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    let tensors = Tensors::open(folder.path()).unwrap();
    let format = Format::Gptq { v2: false };
    let recipe = Recipe {
        bits: 4,
        group: 32,
        sym: true,
        shuffled: false,
        scales: Dtype::F16,
    };
    let (mut quantized, mut plain) = (Vec::new(), Vec::new());
    for name in tensors.names() {
        let view = tensors.get(name).unwrap();
        let mut values = vec![0f32; view.elements()];
        view.read_into(0..view.rows(), &mut values).unwrap();
        let shape = view.shape.to_vec();
        // The MLP's 172 rows or columns fill no whole words or groups.
        let whole = shape.len() == 2 && name.contains(".self_attn.");
        if !whole {
            quantized.push(floats(name, &shape, &values));
            plain.push(floats(name, &shape, &values));
            continue;
        }
        let (outputs, inputs) = (shape[0], shape[1]);
        let mut n = Numbers::random(&mut Rng::new(0), [outputs, inputs], recipe);
        for o in 0..outputs {
            for g in 0..2 {
                let at = |i: usize| values[o * inputs + g * 32 + i];
                let largest = (0..32).map(|i| at(i).abs()).fold(0f32, f32::max);
                let scale = f16::from_f32(largest / 7.5).to_f32();
                n.scales[g][o] = scale;
                for i in 0..32 {
                    let code = (at(i) / scale).round() + 8.0;
                    n.codes[o][g * 32 + i] = code.clamp(0.0, 15.0) as u32;
                }
            }
        }
        let value = |at: usize| n.weight(at / inputs, at % inputs);
        let values: Vec<f32> = (0..outputs * inputs).map(value).collect();
        quantized.extend(format.pack(name.strip_suffix(".weight").unwrap(), &n, recipe));
        plain.push(floats(name, &shape, &values));
    }
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut with = config.clone();
    with["quantization_config"] = format.config(recipe);
    write(folders[0].path(), &with, &quantized);
    write(folders[1].path(), &config, &plain);
    let known = std::fs::read_to_string(stories.join("golden_greedy_200.json")).unwrap();
    let known: Value = serde_json::from_str(&known).unwrap();
    let ids: Vec<u32> = serde_json::from_value(known["ids"].clone()).unwrap();
    let cpu = Cpu::new(2);
    let packed = compare(
        "stories",
        &cpu,
        folders[0].path(),
        folders[1].path(),
        &ids[..128],
    );
    assert_eq!(packed, 5 * 4);
}

#[test]
fn unknown_settings_are_refused_by_name() {
    let group = |weights: Value| {
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    };
    let gptq = |key: &str, value: Value| {
        let mut json = json!({"quant_method": "gptq", "bits": 4, "group_size": 128});
        json[key] = value;
        json
    };
    let awq = |key: &str, value: Value| {
        let mut json = json!({"quant_method": "awq", "bits": 4, "group_size": 128});
        json[key] = value;
        json
    };
    let int4 = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32});
    let with = |key: &str, value: Value| {
        let mut json = group(int4.clone());
        json[key] = value;
        json
    };
    for (json, said) in [
        (json!([]), "object"),
        (json!({}), "bits"),
        (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (json!({"quant_method": "fp8"}), "fp8"),
        (json!({"quant_method": "gptq", "bits": 4}), "group_size"),
        (gptq("bits", json!(5)), "\"5\""),
        (gptq("bits", json!("4")), "bits"),
        (gptq("group_size", json!(0)), "group_size"),
        (gptq("group_size", json!(-2)), "-2"),
        (gptq("group_size", json!(1.5)), "1.5"),
        (gptq("checkpoint_format", json!("gptq_p")), "gptq_p"),
        (gptq("format", json!("marlin")), "marlin"),
        (gptq("is_marlin_format", json!(true)), "is_marlin_format"),
        (gptq("pack_dtype", json!("int16")), "int16"),
        (gptq("desc_act", json!("yes")), "desc_act"),
        (awq("bits", json!(8)), "\"8\""),
        (awq("version", json!("gemv")), "gemv"),
        (awq("version", json!("GEMV_fast")), "gemv_fast"),
        (awq("version", json!("marlin")), "marlin"),
        (awq("zero_point", json!(false)), "zero_point"),
        (
            awq("modules_to_not_convert", json!([1])),
            "modules_to_not_convert",
        ),
        (
            json!({"w_bit": 4, "q_group_size": 128, "version": "GEMV"}),
            "gemv",
        ),
        (
            json!({"quant_method": "compressed-tensors"}),
            "config_groups",
        ),
        (with("config_groups", json!({})), "config_groups"),
        (with("config_groups", json!({"W4A16": ["Linear"]})), "W4A16"),
        (with("format", json!("float-quantized")), "float-quantized"),
        (with("format", json!("nvfp4-pack-quantized")), "nvfp4"),
        (with("format", json!("marlin-24")), "marlin-24"),
        (with("format", Value::Null), "format"),
        (
            with("sparsity_config", json!({"format": "sparse-bitmask"})),
            "sparse-bitmask",
        ),
        (with("quantization_status", json!("frozen")), "frozen"),
        (with("ignore", json!("lm_head")), "ignore"),
        (group(json!({"num_bits": 8, "type": "float"})), "float"),
        (group(json!({"num_bits": 3})), "num_bits"),
        (group(json!({"num_bits": 4, "strategy": "block"})), "block"),
    ] {
        let error = Quantization::from_json("quantize_config.json", &json.to_string());
        let error = error.expect_err(&json.to_string());
        assert!(error.to_string().contains(said), "{json}: {error}");
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
    }
    assert!(Quantization::from_json("x", "{").is_err());
}

#[test]
fn damaged_checkpoints_are_refused() {
    let cpu = Cpu::new(1);
    let recipe = Recipe {
        bits: 4,
        group: 32,
        sym: true,
        shuffled: true,
        scales: Dtype::F32,
    };
    let format = Format::Gptq { v2: false };
    let (folder, _, entries) = build(&llama(), format, recipe, 3);
    let set = |settings: Value| {
        let mut config = llama();
        config["quantization_config"] = format.config(recipe);
        for (key, value) in settings.as_object().unwrap() {
            config["quantization_config"][key] = value.clone();
        }
        config
    };
    let module = "model.layers.1.mlp.up_proj";
    type Damage<'a> = &'a dyn Fn(&mut Entry);
    let float = |value: f32| move |e: &mut Entry| e.3[8..12].copy_from_slice(&value.to_le_bytes());
    let drop: Damage = &|e| e.0.push_str(".old");
    let turn: Damage = &|e| e.2.reverse();
    let (huge, nan) = (float(1e6), float(f32::NAN));
    for (part, damage, settings, said) in [
        ("scales", &huge as Damage, json!({}), "1000000"),
        ("scales", &nan, json!({}), "NaN"),
        ("scales", &turn, json!({}), "scales"),
        ("scales", drop, json!({}), "scales"),
        ("qzeros", drop, json!({}), "qzeros"),
        ("qzeros", turn, json!({}), "qzeros"),
        ("g_idx", drop, json!({}), "g_idx"),
        ("g_idx", &|e| e.3[0] = 4, json!({}), "g_idx"),
        ("g_idx", &|e| e.3[3] = 0x80, json!({}), "g_idx"),
        (
            "g_idx",
            &|e| (0..128).for_each(|i| e.3[4 * i] = i as u8 % 4 + u8::from(i == 5)),
            json!({}),
            "blocks of 32",
        ),
        ("qweight", turn, json!({}), "qweight"),
        ("qweight", drop, json!({}), "up_proj"),
        ("qweight", &|e| e.1 = Dtype::F32, json!({}), "F32"),
        ("none", drop, json!({"bits": 8}), "qweight"),
        (
            "none",
            drop,
            json!({"checkpoint_format": "gptq_v2"}),
            "checkpoint_format",
        ),
        ("none", drop, json!({"quant_method": "awq"}), "qweight"),
    ] {
        let name = format!("{module}.{part}");
        let mut entries = entries.clone();
        entries.iter_mut().filter(|e| e.0 == name).for_each(damage);
        write(folder.path(), &set(settings.clone()), &entries);
        let error = LoadedModel::open(&cpu, folder.path(), None).err();
        let error = error.unwrap_or_else(|| panic!("{part} {settings}: {said}"));
        assert!(
            error.to_string().contains(said),
            "{part} {settings}: {error}"
        );
        assert!(error.hint().is_some_and(|hint| !hint.is_empty()), "{error}");
    }
}
