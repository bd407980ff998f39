//! Which tensor gets which type, and files rewritten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex::Regex;
use windlass_compress::{Error, FileType, Importance, Options, Report, plan, quantize};
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::{BlockType, File, Metadata, TensorInfo, Writer};
use windlass_tensor::kernels::blocks::dequantize;
use windlass_tensor::kernels::pool::Pool;

/// A model's shape, as far as types depend on it.
#[derive(Clone, Copy)]
struct Shape {
    architecture: &'static str,
    layers: usize,
    heads: u32,
    key_heads: u32,
    width: usize,
    inner: usize,
    experts: usize,
    tied: bool,
    fused: bool,
}

const LLAMA: Shape = Shape {
    architecture: "llama",
    layers: 10,
    heads: 8,
    key_heads: 2,
    width: 512,
    inner: 768,
    experts: 0,
    tied: false,
    fused: false,
};

/// The models that the known answers were taken from, with fewer rows.
fn shape(name: &str) -> Shape {
    let narrow = Shape {
        width: 256,
        inner: 256,
        heads: 4,
        key_heads: 2,
        ..LLAMA
    };
    match name {
        "llama" => LLAMA,
        "llama33" => Shape {
            layers: 33,
            key_heads: 4,
            ..narrow
        },
        "tied" => Shape {
            layers: 17,
            heads: 8,
            inner: 512,
            tied: true,
            ..narrow
        },
        "moe8" => Shape {
            layers: 9,
            experts: 8,
            ..narrow
        },
        "moe4" => Shape {
            layers: 9,
            key_heads: 4,
            experts: 4,
            ..narrow
        },
        "odd" => Shape {
            layers: 8,
            width: 288,
            inner: 416,
            ..narrow
        },
        "falcon" => Shape {
            architecture: "falcon",
            layers: 18,
            key_heads: 1,
            inner: 1024,
            fused: true,
            ..narrow
        },
        "big80" => Shape {
            layers: 80,
            heads: 8,
            key_heads: 4,
            ..narrow
        },
        _ => panic!("no model '{name}'"),
    }
}

fn value(i: usize) -> f32 {
    ((i * 7919 + i / 13) % 1009) as f32 / 1009.0 - 0.5
}

/// Writes a model of eight rows a matrix, in `F32`. `change` may spoil a tensor.
fn write(folder: &Path, shape: Shape, change: impl Fn(&str, &mut [f32])) -> PathBuf {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", shape.architecture);
    let mut put = |key: &str, value: u32| {
        metadata.insert(format!("{}.{key}", shape.architecture), value);
    };
    put("block_count", shape.layers as u32);
    put("attention.head_count", shape.heads);
    put("attention.head_count_kv", shape.key_heads);
    if shape.experts > 0 {
        put("expert_count", shape.experts as u32);
    }
    let mut tensors = Vec::new();
    let mut add =
        |name: String, shape: &[usize]| tensors.push(TensorInfo::new(name, shape, BlockType::F32));
    add("token_embd.weight".into(), &[8, shape.width]);
    for layer in 0..shape.layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        add(name("attn_norm"), &[shape.width]);
        let parts: &[&str] = if shape.fused {
            &["attn_qkv"]
        } else {
            &["attn_q", "attn_k", "attn_v"]
        };
        for part in parts.iter().chain(&["attn_output"]) {
            add(name(part), &[8, shape.width]);
        }
        let gated: &[&str] = if shape.fused {
            &["ffn_up"]
        } else {
            &["ffn_gate", "ffn_up"]
        };
        if shape.experts > 0 {
            add(name("ffn_gate_inp"), &[shape.experts, shape.width]);
            for part in gated {
                add(
                    name(&format!("{part}_exps")),
                    &[shape.experts, 8, shape.width],
                );
            }
            add(name("ffn_down_exps"), &[shape.experts, 8, shape.inner]);
        } else {
            gated
                .iter()
                .for_each(|part| add(name(part), &[8, shape.width]));
            add(name("ffn_down"), &[8, shape.inner]);
        }
    }
    add("output_norm.weight".into(), &[shape.width]);
    if !shape.tied {
        add("output.weight".into(), &[8, shape.width]);
    }
    let path = folder.join("model.gguf");
    let mut writer = Writer::create(&RealDisk, &path, &metadata, &tensors).unwrap();
    for info in &tensors {
        let mut values: Vec<f32> = (0..info.elements()).map(value).collect();
        change(&info.name, &mut values);
        writer
            .write(&info.name, windlass_store::mmap::bytes_of(&values))
            .unwrap();
    }
    writer.finish().unwrap();
    path
}

/// Matrix → the types of its layers, in the form of the known answers.
fn summary(file: &File, options: &Options) -> String {
    let mut parts: BTreeMap<String, Vec<(usize, BlockType)>> = BTreeMap::new();
    for planned in plan(file, options).unwrap() {
        let name = planned.info.name.strip_suffix(".weight").unwrap();
        if name.contains("norm") || name.contains("gate_inp") {
            assert_eq!(planned.target, BlockType::F32, "{name} is kept");
            continue;
        }
        let (layer, part) = match name.strip_prefix("blk.") {
            Some(rest) => {
                let (layer, part) = rest.split_once('.').unwrap();
                (layer.parse().unwrap(), part)
            }
            None => (0, name),
        };
        parts
            .entry(part.to_owned())
            .or_default()
            .push((layer, planned.target));
    }
    let runs = |(part, mut types): (String, Vec<(usize, BlockType)>)| {
        types.sort();
        let runs = types.chunk_by(|a, b| a.1 == b.1);
        let runs: Vec<String> = runs
            .map(|run| format!("{}x{}", run[0].1, run.len()))
            .collect();
        format!("{part} {}", runs.join(" "))
    };
    parts.into_iter().map(runs).collect::<Vec<_>>().join("; ")
}

#[test]
fn types_are_chosen_as_by_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let mut files: BTreeMap<&str, File> = BTreeMap::new();
    let mut checked = 0;
    for line in include_str!("choices.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let (head, expected) = line.split_once(": ").unwrap();
        let (model, file_type) = head.split_once(' ').unwrap();
        let file = files.entry(model).or_insert_with(|| {
            let folder = folder.path().join(model);
            std::fs::create_dir(&folder).unwrap();
            File::open(&write(&folder, shape(model), |_, _| {})).unwrap()
        });
        let options = Options::new(FileType::from_name(file_type).unwrap());
        assert_eq!(summary(file, &options), expected, "{head}");
        checked += 1;
    }
    assert_eq!(checked, 112);
}

fn run(path: &Path, options: &Options) -> Result<(Report, File), Error> {
    let file = File::open(path)?;
    let out = path.with_file_name("out.gguf");
    let mut last = 0;
    let report = quantize(&Pool::new(2), &RealDisk, &file, &out, options, |_, done| {
        assert!(done >= last);
        last = done;
    })?;
    assert_eq!(last, file.total_bytes(), "progress ends with all bytes");
    Ok((report, File::open(&out)?))
}

/// Largest distance of a tensor's values from the source's.
fn distance(a: &File, b: &File, name: &str) -> f32 {
    let values = |file: &File| {
        let info = file.tensor(name).unwrap();
        let mut values = vec![0.0; info.elements()];
        dequantize(info.block_type, file.bytes(name).unwrap(), &mut values);
        values
    };
    let pairs = values(a).into_iter().zip(values(b));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn files_keep_their_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        Shape {
            layers: 2,
            experts: 2,
            ..LLAMA
        },
        |_, _| {},
    );
    let source = File::open(&path).unwrap();
    for &file_type in FileType::ALL {
        if file_type == FileType::Q2_K_S {
            continue;
        }
        let (report, file) = run(&path, &Options::new(file_type)).unwrap();
        assert_eq!(report.bytes_after, file.total_bytes());
        assert_eq!(
            file.metadata().get_u32("general.file_type").unwrap(),
            Some(file_type.id())
        );
        assert_eq!(FileType::from_id(file_type.id()), Some(file_type));
        for (info, planned) in file.tensors().zip(&report.tensors) {
            assert_eq!(info.block_type, planned.target);
            assert_eq!(info.shape, planned.info.shape);
            let bound = match info.block_type.bits() {
                bits if bits >= 32.0 => 0.0,
                bits if bits >= 6.0 => 0.02,
                bits if bits >= 4.0 => 0.13,
                bits if bits >= 3.0 => 0.15,
                _ => 0.6,
            };
            let found = distance(&source, &file, &info.name);
            assert!(found <= bound, "{file_type} {}: {found}", info.name);
        }
    }
}

#[test]
fn users_have_the_last_word() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), Shape { layers: 2, ..LLAMA }, |_, _| {});
    let file = File::open(&path).unwrap();
    let of = |options: &Options, name: &str| {
        let planned = plan(&file, options).unwrap();
        planned.iter().find(|p| p.info.name == name).unwrap().target
    };
    let plain = Options::new(FileType::Q4_K_M);
    let pure = Options {
        pure: true,
        ..plain.clone()
    };
    assert!(
        plan(&file, &pure)
            .unwrap()
            .iter()
            .all(|p| matches!(p.target, BlockType::Q4_K | BlockType::F32))
    );
    let options = Options {
        overrides: vec![
            (Regex::new("blk\\.1\\.ffn").unwrap(), BlockType::Q8_0),
            (Regex::new("ffn_down").unwrap(), BlockType::IQ4_NL),
        ],
        output_type: Some(BlockType::F16),
        embedding_type: Some(BlockType::Q5_1),
        ..plain.clone()
    };
    assert_eq!(of(&options, "blk.0.ffn_down.weight"), BlockType::IQ4_NL);
    assert_eq!(of(&options, "blk.1.ffn_down.weight"), BlockType::Q8_0);
    assert_eq!(of(&options, "output.weight"), BlockType::F16);
    assert_eq!(of(&options, "token_embd.weight"), BlockType::Q5_1);
    let options = Options {
        leave_output: true,
        ..plain
    };
    assert_eq!(of(&options, "output.weight"), BlockType::F32);
}

#[test]
fn importances_reach_their_columns() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        Shape {
            layers: 1,
            experts: 2,
            ..LLAMA
        },
        |_, _| {},
    );
    let mut importance = Importance::default();
    (importance.datasets, importance.chunks) = (vec!["text".into()], 3);
    let columns = |seed: usize, count| {
        (0..count)
            .map(|i| value(i * seed).abs() + 1e-3)
            .collect::<Vec<f32>>()
    };
    importance.insert(
        "blk.0.ffn_down_exps.weight",
        columns(3, 2 * 768),
        vec![4.0, 0.0],
    );
    importance.insert("blk.0.attn_q.weight", columns(5, 512), vec![2.0]);
    let saved = folder.path().join("importance.gguf");
    importance.write(&RealDisk, &saved).unwrap();
    let read = Importance::open(&saved).unwrap();
    assert_eq!(read, importance);
    let down = read.columns("blk.0.ffn_down_exps.weight").unwrap();
    assert_eq!(down[5], columns(3, 768)[5] / 4.0);
    assert_eq!(down[768..], [1.0; 768], "an expert that saw nothing");

    let with = Options {
        importance: Some(read),
        importance_name: "i.gguf".into(),
        ..Options::new(FileType::Q4_K_S)
    };
    let (report, weighted) = run(&path, &with).unwrap();
    let bytes = |file: &File, name: &str| file.bytes(name).unwrap().to_vec();
    assert_eq!(
        report.without_importance.len(),
        5,
        "{:?}",
        report.without_importance
    );
    assert_eq!(
        weighted
            .metadata()
            .get_u32("quantize.imatrix.chunks_count")
            .unwrap(),
        Some(3)
    );
    let names = [
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.ffn_down_exps.weight",
    ];
    let weighted = names.map(|name| bytes(&weighted, name));
    let (_, plain) = run(&path, &Options::new(FileType::Q4_K_S)).unwrap();
    let plain = names.map(|name| bytes(&plain, name));
    assert_ne!(weighted[0], plain[0]);
    assert_eq!(weighted[1], plain[1]);
    let half = plain[2].len() / 2;
    assert_ne!(weighted[2][..half], plain[2][..half]);

    // The older kind of file, whole and cut anywhere.
    let mut old = 1i32.to_le_bytes().to_vec();
    let name = b"blk.0.attn_q.weight";
    old.extend((name.len() as i32).to_le_bytes());
    old.extend(name);
    old.extend(2i32.to_le_bytes());
    old.extend(512i32.to_le_bytes());
    old.extend(columns(5, 512).iter().flat_map(|v| v.to_le_bytes()));
    let end = old.len();
    old.extend(3i32.to_le_bytes());
    old.extend(4i32.to_le_bytes());
    old.extend(b"text");
    let dat = folder.path().join("old.dat");
    let open = |bytes: &[u8]| {
        std::fs::write(&dat, bytes).unwrap();
        Importance::open(&dat)
    };
    let whole = open(&old).unwrap();
    assert_eq!(
        whole.columns("blk.0.attn_q.weight"),
        importance.columns("blk.0.attn_q.weight")
    );
    assert_eq!(
        (whole.chunks, &whole.datasets[..]),
        (3, &["text".to_owned()][..])
    );
    for length in (0..end).step_by(61).chain([end + 4, end + 9]) {
        let error = open(&old[..length]).unwrap_err();
        assert!(error.hint().is_some(), "{length}: {error}");
    }
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let small = Shape { layers: 1, ..LLAMA };
    let check = |change: &dyn Fn(&str, &mut [f32]), options: Options, expected: &str| {
        let path = write(folder.path(), small, change);
        let out = path.with_file_name("out.gguf");
        let _ = std::fs::remove_file(&out);
        let error = run(&path, &options).map(|_| ()).expect_err(expected);
        assert!(
            error.to_string().contains(expected),
            "'{error}' does not say '{expected}'"
        );
        assert!(error.hint().is_some(), "{error}");
        assert!(!out.exists(), "{expected}");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no rests"
        );
    };
    let keep = |_: &str, _: &mut [f32]| {};
    let spoil = |v: f32| {
        move |name: &str, values: &mut [f32]| {
            if name == "blk.0.attn_k.weight" {
                values[512 * 3 + 7] = v;
            }
        }
    };
    let q4 = || Options::new(FileType::Q4_K_M);
    check(
        &spoil(f32::NAN),
        q4(),
        "'blk.0.attn_k.weight', row 3: a weight is NaN",
    );
    check(&spoil(f32::NEG_INFINITY), q4(), "a weight is -inf");
    check(
        &spoil(1e20),
        q4(),
        "row 3: weights are beyond the range of Q4_K",
    );
    check(
        &keep,
        Options::new(FileType::Q2_K_S),
        "needs an importance matrix",
    );
    let mut importance = Importance::default();
    importance.insert("blk.0.attn_k.weight", vec![1.0; 256], vec![1.0]);
    let options = Options {
        importance: Some(importance),
        ..q4()
    };
    check(
        &keep,
        options,
        "'blk.0.attn_k.weight' has 256 columns, the model's has 512",
    );
    let ternary = Regex::new("attn_k").unwrap();
    let options = Options {
        overrides: vec![(ternary, BlockType::IQ2_XS)],
        ..q4()
    };
    check(&keep, options, "IQ2_XS is not written");

    let path = write(folder.path(), small, keep);
    let (_, file) = run(&path, &Options::new(FileType::Q8_0)).unwrap();
    let out = file.path().with_file_name("again.gguf");
    let again = |out: &Path, options: &Options| {
        quantize(&Pool::new(1), &RealDisk, &file, out, options, |_, _| {}).map(|_| ())
    };
    let error = again(&out, &q4()).unwrap_err();
    assert!(error.to_string().contains("is Q8_0 already"), "{error}");
    again(
        &out,
        &Options {
            allow_requantize: true,
            ..q4()
        },
    )
    .unwrap();
    let error = again(
        file.path(),
        &Options {
            allow_requantize: true,
            ..q4()
        },
    )
    .unwrap_err();
    assert!(matches!(error, Error::SameFile { .. }), "{error}");
}
