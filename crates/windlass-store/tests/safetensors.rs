//! The safetensors codec against the reference crate, hostile bytes, and every pair of types.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use proptest::prelude::*;
use windlass_store::Error;
use windlass_store::atomic::RealDisk;
use windlass_store::safetensors::{
    Dtype, Header, INDEX_FILE, Options, SINGLE_FILE, Spec, Tensors, Value, write_file, write_folder,
};

/// A file of this JSON header and so many zero bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn floats(seed: usize, count: usize) -> Vec<f32> {
    (0..count)
        .map(|i| ((i * 31 + seed * 17) % 257) as f32 / 64.0 - 2.0)
        .collect()
}

#[test]
fn hostile_headers_are_refused_in_words() {
    let check = |bytes: &[u8], expected: &str| {
        let problem = Header::parse(bytes).expect_err(expected);
        assert!(
            problem.contains(expected),
            "'{problem}' does not say '{expected}'"
        );
        assert!(
            ::safetensors::SafeTensors::deserialize(bytes).is_err() || expected.contains("twice"),
            "{expected}"
        );
    };
    check(b"", "0 bytes are too few");
    check(&[1, 2, 3], "3 bytes are too few");
    check(b"PK\x03\x04zip of a .pt file", "PyTorch");
    check(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS");
    check(&u64::MAX.to_le_bytes(), "beyond the format");
    check(
        &file("{}", 0)[..9],
        "cut short: a header of 2 bytes is announced, 1 bytes follow",
    );
    check(&file("not json", 0), "not valid");
    check(&file("[]", 0), "an object of tensors");
    check(&file("{\"a\":\u{1}}", 0), "not valid");
    let mut binary = file("{\"a\":1}", 0);
    binary[9] = 0xff;
    check(&binary, "not text");
    let deep = "[".repeat(100_000);
    check(&file(&format!("{{\"a\":{deep}"), 0), "not valid");
    check(&file(r#"{"__metadata__":{"a":1}}"#, 0), "'__metadata__'");
    check(&file("{}", 3), "3 bytes at the end belong to no tensor");

    let entry = |dtype: &str, shape: &str, begin: i64, end: i64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = |entry: String| format!("{{\"w\":{entry}}}");
    for (header, data, expected) in [
        (
            one(entry("F32", "[2]", 0, 8)),
            4,
            "cut short: tensor 'w' ends at byte 8",
        ),
        (
            one(entry("F32", "[2]", 8, 0)),
            8,
            "end (0) before they begin (8)",
        ),
        (one(entry("F32", "[2]", -8, 0)), 8, "'w'"),
        (
            one(entry("F32", "[3]", 0, 8)),
            8,
            "8 bytes, but F32 [3] needs 12",
        ),
        (one(entry("F33", "[2]", 0, 8)), 8, "unknown dtype 'F33'"),
        (one(entry("F32", "[-2]", 0, 8)), 8, "'w'"),
        (
            one(entry("F32", "[4294967296,4294967296,2]", 0, 8)),
            8,
            "overflows",
        ),
        (
            one(entry("F32", "[4294967296,4294967296,0]", 0, 0)),
            0,
            "overflows",
        ),
        (one(entry("F32", "[18446744073709551616]", 0, 8)), 8, "'w'"),
        (one(entry("F4", "[3]", 0, 1)), 1, "12 bits"),
        (
            one(entry("F32", "[1]", 4, 8)),
            8,
            "4 bytes before tensor 'w' belong to no tensor",
        ),
        (one("{}".to_owned()), 0, "missing field"),
        (
            one(r#"{"dtype":"F32","shape":[1]}"#.to_owned()),
            4,
            "missing field",
        ),
    ] {
        check(&file(&header, data), expected);
    }
    let two = |a: String, b: String, names: [&str; 2]| {
        format!(r#"{{"{}":{a},"{}":{b}}}"#, names[0], names[1])
    };
    let (a, b) = (entry("U8", "[4]", 0, 4), entry("U8", "[4]", 2, 6));
    check(
        &file(&two(a.clone(), b, ["a", "b"]), 6),
        "tensor 'b' overlaps",
    );
    check(
        &file(&two(a, entry("U8", "[4]", 4, 8), ["a", "a"]), 8),
        "tensor 'a' is listed twice",
    );
}

#[test]
fn every_pair_of_floating_types_converts_with_one_rounding() {
    /// `value` stored as `S` and read as `T`, and the other way: `T` in memory, stored as `S`.
    fn check<S: Value + PartialEq + std::fmt::Debug, T: Value + PartialEq + std::fmt::Debug>(
        values: &[f64],
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let stored: Vec<S> = values.iter().map(|&v| v.cast()).collect();
        let spec = [Spec::new("w", S::DTYPE, [values.len()])];
        write_file(&RealDisk, &path, &spec, &BTreeMap::new(), |_, out| {
            out.values(&stored)
        })
        .unwrap();
        let mut read = vec![T::default(); values.len()];
        let all = 0..values.len();
        Tensors::open(&path)
            .unwrap()
            .read_into("w", all.clone(), &mut read)
            .unwrap();
        let expected: Vec<T> = stored.iter().map(|s| s.cast()).collect();
        assert_eq!(read, expected, "{} read as {}", S::DTYPE, T::DTYPE);

        let memory: Vec<T> = values.iter().map(|&v| v.cast()).collect();
        write_file(&RealDisk, &path, &spec, &BTreeMap::new(), |_, out| {
            let (front, back) = memory.split_at(memory.len() / 3);
            out.values(front)?;
            out.values(back)
        })
        .unwrap();
        let tensors = Tensors::open(&path).unwrap();
        let expected: Vec<S> = memory.iter().map(|m| m.cast()).collect();
        assert_eq!(
            tensors.get("w").unwrap().as_slice::<S>().unwrap(),
            expected,
            "{} written as {}",
            T::DTYPE,
            S::DTYPE
        );
    }
    fn check_stored<S: Value + PartialEq + std::fmt::Debug>(values: &[f64]) {
        check::<S, f32>(values);
        check::<S, f64>(values);
        check::<S, bf16>(values);
        check::<S, f16>(values);
    }
    // 1 + 2^-8 + 2^-40 lies just above the middle of two bf16: rounding it to f32 first would lose that.
    let above_middle = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
    let mut values = vec![
        0.0,
        -0.0,
        1.0,
        -1.5,
        f64::INFINITY,
        1e-40,
        65504.0,
        1e300,
        0.1,
        above_middle,
    ];
    values.extend((0..200_000).map(|i| f64::from(i) * 0.37 - 3e4));
    check_stored::<f32>(&values);
    check_stored::<f64>(&values);
    check_stored::<bf16>(&values);
    check_stored::<f16>(&values);
    // `half::bf16::from_f64` drops the low half of the f64 before it rounds, and gives 1 here.
    for sign in [1.0, -1.0] {
        assert_eq!(
            (sign * above_middle).cast::<bf16>().to_f64(),
            sign * (1.0 + 2f64.powi(-7))
        );
        assert_eq!((sign * 1e-320).cast::<bf16>().to_f64(), sign * 0.0);
        assert_eq!((sign * 1e300).cast::<bf16>().to_f64(), sign * f64::INFINITY);
        assert_eq!(
            (sign * (1.0 + 2f64.powi(-8))).cast::<bf16>().to_f64(),
            sign,
            "a tie goes to even"
        );
    }
    assert!(f64::NAN.cast::<bf16>().is_nan());
}

#[test]
fn rows_shapes_and_types_are_checked_when_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(SINGLE_FILE);
    let specs = [
        Spec::new("ids", Dtype::I64, [3]),
        Spec::new("layers.0.weight", Dtype::BF16, [5, 2, 3]),
        Spec::new("scale", Dtype::F32, []),
        Spec::new("empty", Dtype::F32, [0, 7]),
    ];
    let weight = floats(1, 30);
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_file(&RealDisk, &path, &specs, &metadata, |i, out| match i {
        0 => out.bytes(windlass_store::mmap::bytes_of(&[7i64, -8, 9])),
        1 => out.values(&weight),
        2 => out.values(&[2.5f32]),
        _ => Ok(()),
    })
    .unwrap();

    let bytes = fs::read(&path).unwrap();
    let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = Tensors::open(folder.path()).unwrap();
    assert_eq!(
        tensors.names().collect::<Vec<_>>(),
        ["empty", "ids", "layers.0.weight", "scale"]
    );
    assert_eq!(tensors.metadata(), &metadata);
    for name in tensors.names() {
        let (ours, theirs) = (tensors.get(name).unwrap(), reference.tensor(name).unwrap());
        assert_eq!(
            (ours.dtype, ours.shape, ours.bytes),
            (theirs.dtype(), theirs.shape(), theirs.data())
        );
    }
    let widest_first = ::safetensors::SafeTensors::read_metadata(&bytes)
        .unwrap()
        .1
        .offset_keys();
    assert_eq!(
        widest_first[0], "ids",
        "eight-byte elements come first, so that all are aligned"
    );
    assert_eq!(
        tensors.get("ids").unwrap().as_slice::<i64>(),
        Some(&[7, -8, 9][..])
    );

    let mut rows = [0f32; 12];
    tensors
        .read_into("layers.0.weight", 2..4, &mut rows)
        .unwrap();
    let expected: Vec<f32> = weight[12..24]
        .iter()
        .map(|&v| bf16::from_f32(v).to_f32())
        .collect();
    assert_eq!(rows[..], expected);
    let mut scalar = [0f64];
    tensors.read_into("scale", 0..1, &mut scalar).unwrap();
    assert_eq!(scalar, [2.5]);
    tensors.read_into::<f32>("empty", 0..0, &mut []).unwrap();

    let check = |result: windlass_store::Result<()>, expected: &str, hint: &str| {
        let error = result.expect_err(expected);
        let (message, advice) = (error.to_string(), error.hint().unwrap_or_default());
        assert!(
            message.contains(expected) && advice.contains(hint),
            "{message} / {advice}"
        );
        assert!(
            message.contains("model.safetensors") || matches!(error, Error::MissingTensor { .. }),
            "{message}"
        );
    };
    check(
        tensors.read_into("layers.0.weight", 4..6, &mut rows),
        "rows 4..6",
        "config.json",
    );
    check(
        tensors.read_into("layers.0.weight", 0..1, &mut rows),
        "expected 12 values",
        "",
    );
    check(
        tensors.read_into("ids", 0..3, &mut [0f32; 3]),
        "is I64, expected F32",
        "",
    );
    check(
        tensors.get("scale").unwrap().expect_shape(&[1]),
        "is [], expected [1]",
        "",
    );
    check(
        tensors.get("layers.0.wieght").map(drop),
        "no tensor named",
        "did you mean 'layers.0.weight'?",
    );
    check(
        tensors.get("lm_head.bias").map(drop),
        "no tensor named",
        "another model",
    );
}

#[test]
fn a_sharded_folder_reads_as_one_and_its_contradictions_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let specs: Vec<Spec> = (0..5)
        .map(|i| Spec::new(format!("t{i}"), Dtype::F32, [i + 1, 4]))
        .collect();
    let options = Options {
        max_shard_bytes: 50,
        ..Options::default()
    };
    let save = |options: &Options| {
        write_folder(&RealDisk, dir, &specs, options, |i, out| {
            out.values(&floats(i, (i + 1) * 4))
        })
        .unwrap()
    };
    let whole = |dir: &Path| {
        let tensors = Tensors::open(dir).unwrap();
        assert_eq!((tensors.len(), tensors.total_bytes()), (5, 240));
        for i in 0..5 {
            let mut values = vec![0f32; (i + 1) * 4];
            tensors
                .read_into(&format!("t{i}"), 0..i + 1, &mut values)
                .unwrap();
            assert_eq!(values, floats(i, (i + 1) * 4));
        }
    };
    // 16 + 32 fit 50; then 48, 64 (over the limit alone), 80.
    let shards = save(&options);
    assert_eq!(shards.len(), 4);
    assert!(shards[1].ends_with("model-00002-of-00004.safetensors"));
    whole(dir);
    whole(&dir.join(INDEX_FILE));
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 240);
    assert_eq!(
        index["weight_map"]["t1"],
        "model-00001-of-00004.safetensors"
    );

    // Saving in fewer files removes what an earlier save left, and nothing else.
    fs::write(dir.join("config.json"), "{}").unwrap();
    assert_eq!(save(&Options::default()).len(), 1);
    whole(dir);
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["config.json", SINGLE_FILE]);
    let shards = save(&options);
    assert!(!dir.join(SINGLE_FILE).exists());

    let broken = |expected: &str, hint: &str| {
        let error = Tensors::open(dir).expect_err(expected);
        let (message, advice) = (error.to_string(), error.hint().unwrap_or_default());
        assert!(
            message.contains(expected) && advice.contains(hint),
            "{message} / {advice}"
        );
    };
    let index = fs::read_to_string(dir.join(INDEX_FILE)).unwrap();
    let with_index = |text: &str, expected: &str| {
        fs::write(dir.join(INDEX_FILE), text).unwrap();
        broken(expected, "fetch it again");
        fs::write(dir.join(INDEX_FILE), &index).unwrap();
    };
    with_index(
        &index.replace("model-00002-of-00004", "../../etc/passwd"),
        "not a file name in the same folder",
    );
    with_index(
        &index.replace("\"t1\": \"model-00001", "\"t1\": \"model-00002"),
        "tensor 't1' is listed for",
    );
    with_index(
        &index.replace("\"t1\"", "\"other\""),
        "tensor 'other' is listed for",
    );
    with_index("{}", "not a shard index");
    fs::copy(&shards[0], &shards[1]).unwrap();
    broken("tensor 't0' is also in", "");
    fs::write(&shards[1], &fs::read(&shards[0]).unwrap()[..100]).unwrap();
    broken("cut short", "fetch it again");
    fs::remove_file(&shards[1]).unwrap();
    broken("1 of 4 shards are missing", "");
    fs::remove_file(dir.join(INDEX_FILE)).unwrap();
    broken("no model.safetensors", "name the file itself");
    for shard in [0, 2, 3] {
        fs::remove_file(&shards[shard]).unwrap();
    }
    fs::write(dir.join("pytorch_model.bin"), "").unwrap();
    broken("no model.safetensors", "PyTorch");
    let error = Tensors::open(&dir.join("nowhere.safetensors")).unwrap_err();
    assert!(error.hint().unwrap().contains("spelling"), "{error}");
}

#[test]
#[should_panic(expected = "declared twice")]
fn declaring_a_name_twice_is_the_callers_mistake() {
    let folder = tempfile::tempdir().unwrap();
    let specs = [
        Spec::new("w", Dtype::F32, [1]),
        Spec::new("w", Dtype::F32, [1]),
    ];
    let path = folder.path().join("a.safetensors");
    let _ = write_file(&RealDisk, &path, &specs, &BTreeMap::new(), |_, out| {
        out.values(&[1f32])
    });
}

proptest! {
    /// Damage in any place is either refused or leaves a header whose every claim holds; and never a panic. Whatever
    /// the reference crate refuses, we refuse.
    #[test]
    fn damaged_files_never_panic(
        shapes in prop::collection::vec(prop::collection::vec(0usize..4, 0..3), 0..4),
        cut in 0usize..400,
        edits in prop::collection::vec((0usize..400, any::<u8>()), 0..4),
    ) {
        let views: Vec<(String, Vec<usize>, Vec<u8>)> = shapes.into_iter().enumerate()
            .map(|(i, shape)| (format!("t{i}"), shape.clone(), vec![1u8; shape.iter().product::<usize>() * 4]))
            .collect();
        let views = views.iter()
            .map(|(n, s, d)| (n, ::safetensors::tensor::TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
        let whole = ::safetensors::serialize(views, None).unwrap();
        prop_assert!(Header::parse(&whole).is_ok());
        let mut bytes = whole;
        for (at, value) in edits {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut.saturating_sub(200)));
        let reference = ::safetensors::SafeTensors::deserialize(&bytes);
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert!(reference.is_ok(), "{header:?} is accepted, but {:?}", reference.err());
            for info in header.tensors.values() {
                prop_assert_eq!(
                    info.bytes.len() * 8,
                    info.shape.iter().product::<usize>() * info.dtype.bitsize()
                );
                prop_assert!(info.bytes.end <= bytes.len());
            }
        }
    }
}

/// Every safetensors file of the test data reads the same through the reference crate.
#[test]
fn real_files_read_as_the_reference_crate_reads_them() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA") else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let mut checked = 0;
    for name in [
        "models/stories260K/hf/model.safetensors",
        "models/stories260K/hf/golden_train.safetensors",
        "models/bitllama2/golden_logits.safetensors",
        "fixtures/onnx-ops/cases.safetensors",
    ] {
        let path = Path::new(&data).join(name);
        let Ok(bytes) = fs::read(&path) else { continue };
        let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensors = Tensors::open(&path).unwrap();
        assert_eq!(tensors.len(), reference.len());
        for (name, theirs) in reference.iter() {
            let ours = tensors.get(name).unwrap();
            assert_eq!(
                (ours.dtype, ours.shape, ours.bytes),
                (theirs.dtype(), theirs.shape(), theirs.data())
            );
        }
        checked += 1;
    }
    assert!(
        checked >= 2,
        "the folder of WINDLASS_TEST_DATA lacks models/stories260K/hf"
    );
}
