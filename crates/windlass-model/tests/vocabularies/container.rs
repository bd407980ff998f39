//! The metadata of a GGUF file, as much of it as these tests need; sound files only.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use windlass_model::tokenizer::{GgufVocabulary, TokenType};

/// A value of the metadata.
enum Value {
    Number(f64),
    Text(String),
    List(Vec<Value>),
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("a whole file");
        self.0 = rest;
        *head
    }

    fn text(&mut self) -> String {
        let length = u64::from_le_bytes(self.take()) as usize;
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(text.to_vec()).expect("UTF-8")
    }

    fn value(&mut self, kind: u32) -> Value {
        Value::Number(match kind {
            0 => u8::from_le_bytes(self.take()).into(),
            1 => i8::from_le_bytes(self.take()).into(),
            2 => u16::from_le_bytes(self.take()).into(),
            3 => i16::from_le_bytes(self.take()).into(),
            4 => u32::from_le_bytes(self.take()).into(),
            5 => i32::from_le_bytes(self.take()).into(),
            6 => f32::from_le_bytes(self.take()).into(),
            7 => u8::from_le_bytes(self.take()).into(),
            8 => return Value::Text(self.text()),
            9 => {
                let kind = u32::from_le_bytes(self.take());
                let length = u64::from_le_bytes(self.take());
                return Value::List((0..length).map(|_| self.value(kind)).collect());
            }
            10 => u64::from_le_bytes(self.take()) as f64,
            11 => i64::from_le_bytes(self.take()) as f64,
            12 => f64::from_le_bytes(self.take()),
            other => panic!("type {other}"),
        })
    }
}

/// The folder of the test data, if there is one.
pub fn data() -> Option<PathBuf> {
    let folder = std::env::var_os("WINDLASS_TEST_DATA").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: set WINDLASS_TEST_DATA");
    }
    folder
}

/// The vocabulary of a file.
pub fn vocabulary(path: &Path) -> GgufVocabulary {
    let content = std::fs::read(path).unwrap();
    let mut reader = Reader(&content);
    assert_eq!(&reader.take(), b"GGUF");
    let _version: [u8; 4] = reader.take();
    let _tensors: [u8; 8] = reader.take();
    let count = u64::from_le_bytes(reader.take());
    let mut values = HashMap::new();
    for _ in 0..count {
        let key = reader.text();
        let kind = u32::from_le_bytes(reader.take());
        values.insert(key, reader.value(kind));
    }
    let number = |key: &str| match values.get(key) {
        Some(Value::Number(number)) => Some(*number),
        _ => None,
    };
    let id = |key: &str| number(&format!("tokenizer.ggml.{key}_token_id")).map(|id| id as u32);
    let flag = |key: &str| number(&format!("tokenizer.ggml.{key}")).map(|flag| flag != 0.0);
    let text = |key: &str| match values.get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let list = |key: &str| match values.get(&format!("tokenizer.ggml.{key}")) {
        Some(Value::List(list)) => list.as_slice(),
        _ => &[],
    };
    let texts = |key: &str| {
        let texts = list(key).iter().map(|value| match value {
            Value::Text(text) => text.clone(),
            _ => panic!("{key} is no list of texts"),
        });
        texts.collect::<Vec<_>>()
    };
    let numbers = |key: &str| {
        let numbers = list(key).iter().map(|value| match value {
            Value::Number(number) => *number,
            _ => panic!("{key} is no list of numbers"),
        });
        numbers.collect::<Vec<_>>()
    };
    let types = numbers("token_type").into_iter();
    GgufVocabulary {
        model: text("tokenizer.ggml.model").unwrap(),
        pre: text("tokenizer.ggml.pre"),
        tokens: texts("tokens"),
        scores: numbers("scores")
            .iter()
            .map(|&score| score as f32)
            .collect(),
        token_types: types
            .map(|kind| TokenType::from_number(kind as i32))
            .collect(),
        merges: texts("merges"),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        padding: id("padding"),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        chat_template: text("tokenizer.chat_template"),
        model_name: text("general.name"),
        ..Default::default()
    }
}
