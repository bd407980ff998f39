//! `tokenizer.bin`: SentencePiece pieces with scores, brought to the merges of a `tokenizer.json`.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::mmap::Mapped;

/// The pieces that have a fixed place: unknown, beginning and end of a text.
const SPECIAL: [&str; 3] = ["<unk>", "<s>", "</s>"];
/// SentencePiece's visible space.
const SPACE: &str = "\u{2581}";

/// A llama2.c vocabulary: byte-pair encoding with scores, spaces visible, unknown characters as bytes.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Vec<(String, f32)>,
    ids: HashMap<String, usize>,
}

impl Tokenizer {
    /// Opens a `tokenizer.bin`.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] for anything else than an `i32` and then, for each piece, a score (`f32`), a
    /// length (`i32`) and so many bytes of UTF-8, each piece once, all 256 bytes among them.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Mapped::open(path)?.bytes()).map_err(|problem| Error::corrupt(path, problem))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let total = bytes.len();
        let (_longest, mut rest) = word(bytes).ok_or("no llama2.c tokenizer: it is empty")?;
        let mut pieces = Vec::new();
        let mut ids = HashMap::new();
        while !rest.is_empty() {
            let id = pieces.len();
            let at = total - rest.len();
            let (score, after) =
                word(rest).ok_or(format!("cut short in token {id} (byte {at})"))?;
            let (length, after) =
                word(after).ok_or(format!("cut short in token {id} (byte {at})"))?;
            let length = u32::from_le_bytes(length) as usize;
            let (raw, after) = after.split_at_checked(length).ok_or(format!(
                "token {id} (byte {at}) claims {length} bytes, {} are left",
                after.len()
            ))?;
            let raw =
                std::str::from_utf8(raw).map_err(|e| format!("token {id} (byte {at}): {e}"))?;
            let piece = SPECIAL
                .get(id)
                .map_or_else(|| raw.replace(' ', SPACE), |&name| name.to_owned());
            if let Some(other) = ids.insert(piece.clone(), id) {
                return Err(format!("tokens {other} and {id} are both '{piece}'"));
            }
            pieces.push((piece, f32::from_le_bytes(score)));
            rest = after;
        }
        let tokenizer = Tokenizer { pieces, ids };
        if let Some(byte) = (0..=255u8).find(|&b| !tokenizer.ids.contains_key(&byte_piece(b))) {
            return Err(format!(
                "no token {}: characters outside the vocabulary have no encoding",
                byte_piece(byte)
            ));
        }
        Ok(tokenizer)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are none; never, for one that was read.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The `tokenizer.json` that encodes and decodes the same way, with BOS put first.
    ///
    /// A score orders merges by the piece they make; `tokenizer.json` wants an ordered list of pairs. Every way of
    /// cutting a piece in two others becomes a pair, in the order of the pieces' scores.
    pub fn to_json(&self) -> Value {
        let added: Vec<Value> = SPECIAL
            .iter()
            .enumerate()
            .map(|(id, content)| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true,
                })
            })
            .collect();
        let vocab: Map<String, Value> = self
            .pieces
            .iter()
            .enumerate()
            .map(|(id, (piece, _))| (piece.clone(), json!(id)))
            .collect();
        let bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let pair = json!({ "Sequence": { "id": "B", "type_id": 1 } });
        let pair_bos = json!({ "SpecialToken": { "id": "<s>", "type_id": 1 } });
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": SPACE },
                { "type": "Replace", "pattern": { "String": " " }, "content": SPACE },
            ]},
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, text],
                "pair": [bos, text, pair_bos, pair],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
            },
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": SPACE }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ]},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": "<unk>",
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.merges(),
            },
        })
    }

    /// The `tokenizer_config.json` beside it.
    pub fn to_config_json(&self) -> Value {
        json!({
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": true,
            "add_eos_token": false,
            "clean_up_tokenization_spaces": false,
        })
    }

    /// Pairs of pieces that make a third, best score first.
    fn merges(&self) -> Vec<[&str; 2]> {
        let mut merges = Vec::new();
        for (id, (piece, score)) in self.pieces.iter().enumerate().skip(SPECIAL.len()) {
            for (cut, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(cut);
                if let (Some(&l), Some(&r)) = (self.ids.get(left), self.ids.get(right)) {
                    merges.push((-score, id, l, r, [left, right]));
                }
            }
        }
        merges.sort_by(|a, b| {
            a.0.total_cmp(&b.0)
                .then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
        });
        merges.into_iter().map(|merge| merge.4).collect()
    }
}

/// The piece that stands for a byte.
fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The first four bytes, and what follows.
fn word(bytes: &[u8]) -> Option<([u8; 4], &[u8])> {
    bytes.split_first_chunk().map(|(word, rest)| (*word, rest))
}
