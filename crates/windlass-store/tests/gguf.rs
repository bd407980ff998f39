//! The GGUF codec: real files, files of our own, and hostile bytes.

use std::fs;
use std::path::{Path, PathBuf};

use windlass_store::Error;
use windlass_store::atomic::RealDisk;
use windlass_store::gguf::{Array, BlockType, File, Header, Metadata, TensorInfo, Value, Writer};

/// A file put together by hand, so that it may be wrong.
struct Raw {
    version: u32,
    keys: Vec<Vec<u8>>,
    tensors: Vec<Vec<u8>>,
    counts: Option<(u64, u64)>,
    data: usize,
}

fn text(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// A key with a value of type `kind`, as bytes.
fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(name.as_bytes())[..], &kind.to_le_bytes(), value].concat()
}

fn array(kind: u32, count: u64, values: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat()
}

/// A tensor's entry with dimensions in the file's order.
fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Raw {
    fn new(keys: &[Vec<u8>], tensors: &[Vec<u8>], data: usize) -> Self {
        Raw {
            version: 3,
            keys: keys.to_vec(),
            tensors: tensors.to_vec(),
            counts: None,
            data,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let found = (self.tensors.len() as u64, self.keys.len() as u64);
        let (tensors, keys) = self.counts.unwrap_or(found);
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.extend(self.keys.concat());
        bytes.extend(self.tensors.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + self.data, 0);
        bytes
    }
}

#[test]
fn hostile_files_are_refused_in_words() {
    let check = |bytes: &[u8], expected: &str| {
        let problem = Header::parse(bytes).expect_err(expected).to_string();
        assert!(
            problem.contains(expected),
            "'{problem}' does not say '{expected}'"
        );
    };
    let huge = u64::MAX.to_le_bytes();
    check(b"", "no GGUF file");
    check(b"PK\x03\x04", "PyTorch");
    check(b"tjgg\x03\0\0\0", "old GGJT");
    check(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS");
    check(b"<!doctype html>", "web page");
    check(b"FUGG", "reversed");
    check(b"GGUF", "cut short: the version");
    for (version, expected) in [
        (1, "version 1"),
        (0, "big-endian"),
        (3u32.swap_bytes(), "big-endian"),
        (4, "version 4 is not known"),
    ] {
        let raw = Raw {
            version,
            ..Raw::new(&[], &[], 0)
        };
        check(&raw.bytes(), expected);
    }
    for counts in [(u64::MAX, 0), (0, u64::MAX), (1 << 40, 1 << 40), (2, 0)] {
        let raw = Raw {
            counts: Some(counts),
            ..Raw::new(&[], &[], 0)
        };
        check(&raw.bytes(), "are announced");
    }

    let strings = |count: u64| array(8, count, &[text(b"a"), text(b"\xff")].concat());
    for (key, expected) in [
        (key("k", 13, &[0; 8]), "key 'k' is a value of type 13"),
        (key("k", u32::MAX, &[0; 8]), "type 4294967295"),
        (key("k", 7, &[2]), "key 'k' is a bool of 2"),
        (key("k", 8, &huge), "needs 18446744073709551615 bytes"),
        (
            key("k", 8, &text(b"a\xc3")),
            "key 'k' at byte 37 is not UTF-8 (byte 1 of it)",
        ),
        (key("k", 9, &array(9, 1, &[0; 32])), "array of arrays"),
        (
            key("k", 9, &array(99, 1, &[0; 32])),
            "key 'k' is an array of type 99",
        ),
        (
            key("k", 9, &array(5, 1 << 61, &[])),
            "values of key 'k' are announced",
        ),
        (
            key("k", 9, &array(8, 1 << 61, &[])),
            "values of key 'k' are announced",
        ),
        (
            key("k", 9, &array(0, 1 << 40, &[])),
            "values of key 'k' are announced",
        ),
        (key("k", 9, &strings(2)), "is not UTF-8"),
        (key("general.alignment", 4, &[0; 4]), "no power of two"),
        (
            key("general.alignment", 4, &33u32.to_le_bytes()),
            "'general.alignment' is 33",
        ),
        (
            key("general.alignment", 4, &[0, 0, 0, 0x80]),
            "no power of two",
        ),
        (
            key("general.alignment", 5, &[32, 0, 0, 0]),
            "is i32, expected u32",
        ),
        (
            [&huge[..], &[b'k'; 64]].concat(),
            "the name of metadata key 0 needs",
        ),
        ([text(b"\xfe\xff"), vec![0; 32]].concat(), "not UTF-8"),
    ] {
        check(&Raw::new(&[key], &[], 0).bytes(), expected);
    }
    let twice = key("k", 4, &[0; 4]);
    check(
        &Raw::new(&[twice.clone(), twice], &[], 0).bytes(),
        "key 'k' is there twice",
    );

    let second = tensor("b", &[32], 2, 32);
    for (tensors, data, expected) in [
        (
            vec![tensor("a", &[32], 4, 0)],
            64,
            "type 4 is Q4_2, removed",
        ),
        (vec![tensor("a", &[32], 31, 0)], 64, "Q4_0_4_4"),
        (vec![tensor("a", &[32], 9, 0)], 64, "Q8_1"),
        (
            vec![tensor("a", &[32], 4096, 0)],
            64,
            "type 4096 is not known",
        ),
        (
            vec![tensor("a", &[32, 1, 1, 1, 1], 0, 0)],
            256,
            "has 5 dimensions",
        ),
        (
            vec![tensor("a", &[u64::MAX], 0, 0)],
            256,
            "negative dimension",
        ),
        (vec![tensor("a", &[1 << 62, 8], 0, 0)], 256, "overflows"),
        (vec![tensor("a", &[1 << 62], 28, 0)], 256, "overflows"),
        (
            vec![tensor("a", &[1 << 40, 1 << 40, 0], 0, 0)],
            256,
            "overflows",
        ),
        (
            vec![tensor("a", &[33], 2, 0)],
            64,
            "rows of 33 elements, no whole blocks of 32 (Q4_0)",
        ),
        (vec![tensor("a", &[16, 2], 2, 0)], 64, "rows of 16"),
        (
            vec![tensor("a", &[64], 12, 0)],
            64,
            "no whole blocks of 256 (Q4_K)",
        ),
        (vec![tensor("a", &[32], 2, 8)], 64, "misaligned"),
        (
            vec![tensor("a", &[32], 2, 64)],
            64,
            "cut short: tensor 'a' ends at",
        ),
        (
            vec![tensor("a", &[32], 2, u64::MAX - 31)],
            64,
            "beyond any file",
        ),
        (
            vec![tensor("a", &[32], 0, 0), second.clone()],
            256,
            "'b' overlaps 'a'",
        ),
        (
            vec![second.clone(), tensor("a", &[32], 0, 0)],
            256,
            "'b' overlaps 'a'",
        ),
        (
            vec![tensor("a", &[8], 0, 0), tensor("c", &[8], 0, 0)],
            256,
            "'c' overlaps 'a'",
        ),
        (
            vec![second.clone(), second.clone()],
            256,
            "tensor 'b' is there twice",
        ),
        (
            vec![[text(b"\xff"), vec![0; 32]].concat()],
            64,
            "the name of tensor 0",
        ),
    ] {
        check(&Raw::new(&[], &tensors, data).bytes(), expected);
    }
}

/// A small file with every kind of value.
fn sample() -> (Metadata, Vec<TensorInfo>) {
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", "llama");
    metadata.insert("general.alignment", 64u32);
    let scalars: [Value; 11] = [
        1u8.into(),
        (-2i8).into(),
        3u16.into(),
        (-4i16).into(),
        5u32.into(),
        (-6i32).into(),
        7.5f32.into(),
        true.into(),
        8u64.into(),
        (-9i64).into(),
        10.25f64.into(),
    ];
    for (i, value) in scalars.into_iter().enumerate() {
        metadata.insert(format!("scalar.{i}"), value);
    }
    metadata.insert("texts", vec!["a".to_owned(), "β".to_owned(), String::new()]);
    metadata.insert("bools", vec![true, false]);
    metadata.insert("floats", vec![1.0f32, f32::NAN.copysign(1.0).min(2.0)]);
    metadata.insert("integers", vec![1i32, -1]);
    metadata.insert("empty", Vec::<u64>::new());
    let tensors = vec![
        TensorInfo::new("a.weight", [3, 64], BlockType::Q4_0),
        TensorInfo::new("nothing", [0, 32], BlockType::Q8_0),
        TensorInfo::new("b.weight", [2, 256], BlockType::Q6_K),
        TensorInfo::new("scalar", [], BlockType::F32),
        TensorInfo::new("cube", [2, 3, 4, 5], BlockType::F16),
    ];
    (metadata, tensors)
}

fn content(info: &TensorInfo) -> Vec<u8> {
    let seed = info.name.len();
    (0..info.byte_size())
        .map(|i| (i * 7 + seed) as u8)
        .collect()
}

fn write(path: &Path, metadata: &Metadata, tensors: &[TensorInfo]) {
    let mut writer = Writer::create(&RealDisk, path, metadata, tensors).unwrap();
    for info in tensors.iter().filter(|info| info.byte_size() > 0) {
        let bytes = content(info);
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        writer.write(&info.name, head).unwrap();
        writer.write(&info.name, tail).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sample.gguf");
    let (metadata, tensors) = sample();
    write(&path, &metadata, &tensors);
    let file = File::open(&path).unwrap();
    assert_eq!(file.version(), 3);
    assert!(file.metadata().iter().eq(metadata.iter()));
    assert!(file.tensors().eq(&tensors));
    for info in &tensors {
        let bytes = file.bytes(&info.name).unwrap();
        assert_eq!(bytes, content(info), "{info:?}");
        let address = bytes.as_ptr().addr();
        assert!(bytes.is_empty() || address.is_multiple_of(64), "{info:?}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no rests");

    // Cut anywhere, it is refused; the last padding alone may be missing.
    let bytes = fs::read(&path).unwrap();
    let cube = 2 * 2 * 3 * 4 * 5;
    let end = bytes.len() - (cube as usize).next_multiple_of(64) + cube as usize;
    for length in 0..bytes.len() {
        let parsed = Header::parse(&bytes[..length]);
        assert_eq!(
            parsed.is_ok(),
            length >= end,
            "{length} of {} bytes",
            bytes.len()
        );
    }
    // Any byte changed: refused, or read without leaving the file.
    for at in 0..bytes.len() - 512 {
        for flip in [1u8, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            if let Ok(header) = Header::parse(&damaged) {
                assert!(header.tensors.iter().all(|(_, r)| r.end <= damaged.len()));
            }
        }
    }
}

#[test]
fn values_are_read_as_what_fits() {
    let (metadata, _) = sample();
    assert_eq!(
        metadata.require::<&str>("general.architecture").unwrap(),
        "llama"
    );
    assert_eq!(metadata.get::<usize>("scalar.0").unwrap(), Some(1));
    assert_eq!(metadata.get::<i64>("scalar.5").unwrap(), Some(-6));
    assert_eq!(metadata.get_u32("scalar.8").unwrap(), Some(8));
    assert_eq!(metadata.get_f32("scalar.6").unwrap(), Some(7.5));
    assert_eq!(metadata.get_f32("scalar.10").unwrap(), Some(10.25));
    assert_eq!(metadata.get_bool("scalar.7").unwrap(), Some(true));
    assert_eq!(metadata.get_u32("absent").unwrap(), None);
    assert_eq!(metadata.get_strings("texts").unwrap().unwrap()[1], "β");
    assert_eq!(
        metadata.get::<Vec<f32>>("integers").unwrap(),
        Some(vec![1.0, -1.0])
    );
    assert_eq!(
        metadata.get_array("bools").unwrap(),
        Some(&Array::Bool(vec![true, false]))
    );
    let check = |error: Error, expected: &str| {
        let message = error.to_string();
        assert!(
            message.contains(expected),
            "'{message}' does not say '{expected}'"
        );
        assert!(error.hint().is_some());
    };
    check(
        metadata.require::<u32>("absent").unwrap_err(),
        "no metadata key 'absent'",
    );
    check(
        metadata.get_u32("scalar.5").unwrap_err(),
        "'scalar.5' is -6 (i32), expected an integer",
    );
    check(
        metadata.get_str("texts").unwrap_err(),
        "an array of string (3 values), expected a string",
    );
    check(
        metadata.get::<Vec<u8>>("integers").unwrap_err(),
        "expected an array of integers",
    );
    check(
        metadata.get_bool("general.architecture").unwrap_err(),
        "the string 'llama'",
    );
}

#[test]
fn the_writer_refuses_what_others_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no.gguf");
    let check = |info: TensorInfo, expected: &str| {
        let result = Writer::create(&RealDisk, &path, &Metadata::new(), &[info]);
        let message = result.err().expect(expected).to_string();
        assert!(
            message.contains(expected),
            "'{message}' does not say '{expected}'"
        );
    };
    check(
        TensorInfo::new("n".repeat(64), [1], BlockType::F32),
        "has 64 bytes",
    );
    check(
        TensorInfo::new("n", [1; 5], BlockType::F32),
        "[1, 1, 1, 1, 1]",
    );
    check(
        TensorInfo::new("n", [48], BlockType::Q8_0),
        "no whole blocks",
    );
    check(
        TensorInfo::new("n", [1 << 33, 1 << 33], BlockType::F32),
        "overflows",
    );
    // A writer that is dropped leaves nothing.
    let tensors = [TensorInfo::new("n", [32], BlockType::Q8_0)];
    let mut writer = Writer::create(&RealDisk, &path, &Metadata::new(), &tensors).unwrap();
    writer.write("n", &[0; 30]).unwrap();
    drop(writer);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn split_models_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let part = |i: usize| folder.path().join(format!("m-{i:05}-of-00003.gguf"));
    let put = |i: usize, number: u16, total: i32, names: &[&str]| {
        let mut metadata = Metadata::new();
        if i == 1 {
            metadata.insert("general.architecture", "llama");
        }
        metadata.insert("split.no", number);
        metadata.insert("split.count", 3u16);
        metadata.insert("split.tensors.count", total);
        let info = |name: &&str| TensorInfo::new(*name, [32], BlockType::Q8_0);
        let tensors: Vec<TensorInfo> = names.iter().map(info).collect();
        write(&part(i), &metadata, &tensors);
    };
    let refuse = |expected: &str| {
        let message = File::open(&part(2)).expect_err(expected).to_string();
        assert!(
            message.contains(expected),
            "'{message}' does not say '{expected}'"
        );
    };
    put(1, 0, 3, &["a"]);
    put(2, 1, 3, &["bb", "ccc"]);
    refuse("1 of the model's 3 files are missing");
    put(3, 2, 3, &[]);
    let file = File::open(&part(2)).unwrap();
    let names: Vec<&str> = file.tensors().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "bb", "ccc"]);
    assert_eq!(file.parts().len(), 3);
    assert_eq!(file.metadata().len(), 1, "the keys of the split are gone");
    for info in file.tensors() {
        assert_eq!(file.bytes(&info.name).unwrap(), content(info));
    }
    put(3, 1, 3, &[]);
    refuse("belong to different models");
    put(3, 2, 3, &["a"]);
    refuse("tensor 'a' is also in");
    put(3, 2, 3, &["d"]);
    refuse("the files hold 4 tensors");
    let alone = folder.path().join("alone.gguf");
    fs::copy(part(1), &alone).unwrap();
    let message = File::open(&alone).unwrap_err().to_string();
    assert!(message.contains("does not end in"), "{message}");
}

#[test]
fn real_files_are_read() {
    let Some(data) = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from) else {
        println!("skipped: set WINDLASS_TEST_DATA");
        return;
    };
    let models = data.join("models/stories260K");
    let mut sizes = Vec::new();
    for name in ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"] {
        let path = models.join(format!("gguf-v3/stories260K-{name}.gguf"));
        let file = File::open(&path).unwrap();
        assert_eq!(
            file.metadata().require::<u32>("llama.block_count").unwrap(),
            5
        );
        let embedding = file.tensor("token_embd.weight").unwrap();
        assert_eq!(embedding.shape, [512, 64]);
        assert_eq!(embedding.block_type.name(), name);
        sizes.push(file.total_bytes());
        let near = file.tensor("token_embed.weight").unwrap_err();
        assert!(
            near.hint().unwrap().contains("token_embd.weight"),
            "{near:?}"
        );
        // Written again it is the same model.
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("copy.gguf");
        let tensors: Vec<TensorInfo> = file.tensors().cloned().collect();
        let mut writer = Writer::create(&RealDisk, &copy, file.metadata(), &tensors).unwrap();
        for info in &tensors {
            writer
                .write(&info.name, file.bytes(&info.name).unwrap())
                .unwrap();
        }
        writer.finish().unwrap();
        let copy = File::open(&copy).unwrap();
        assert!(copy.metadata().iter().eq(file.metadata().iter()));
        for info in file.tensors() {
            assert_eq!(copy.tensor(&info.name).unwrap(), info);
            assert_eq!(
                copy.bytes(&info.name).unwrap(),
                file.bytes(&info.name).unwrap()
            );
        }
    }
    assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
    for (name, tokens) in [("gpt-2", 50257), ("llama-spm", 32000), ("phi-3", 32064)] {
        let path = data.join(format!("tokenizers/ggml-vocab/ggml-vocab-{name}.gguf"));
        let file = File::open(&path).unwrap();
        let texts: &[String] = file.metadata().require("tokenizer.ggml.tokens").unwrap();
        assert_eq!((texts.len(), file.tensors().len()), (tokens, 0), "{name}");
    }
    let old = File::open(&models.join("stories260K-f32-GGUFv1.gguf")).unwrap_err();
    assert!(old.to_string().contains("GGUF version 1"), "{old}");
    assert!(old.hint().is_some());
}
