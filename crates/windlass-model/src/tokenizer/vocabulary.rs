//! A vocabulary as GGUF files keep it: plain arrays and settings, under `tokenizer.ggml.*`.
//!
//! Reading and writing files is another crate's business; this is what passes between. [`Tokenizer::from_gguf`] builds
//! a tokenizer of it, [`Tokenizer::to_gguf`] takes one apart.
//!
//! [`Tokenizer::from_gguf`]: super::Tokenizer::from_gguf
//! [`Tokenizer::to_gguf`]: super::Tokenizer::to_gguf

use std::collections::HashMap;

use super::TokenizerError;

/// What a token is for, with the numbers of `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenType {
    /// Not said.
    Undefined = 0,
    /// A piece of text.
    #[default]
    Normal = 1,
    /// What stands for text that no other token covers.
    Unknown = 2,
    /// A mark that is no text, such as the end of a message: found in a text only when asked for.
    Control = 3,
    /// A piece of text that is found before all others.
    UserDefined = 4,
    /// A row without a meaning.
    Unused = 5,
    /// One byte, spelled `<0x0A>`.
    Byte = 6,
}

impl TokenType {
    /// The type of a number; numbers out of range are [`TokenType::Undefined`], as in llama.cpp.
    pub fn from_number(number: i32) -> Self {
        match number {
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => TokenType::Undefined,
        }
    }

    /// Whether the token is left out of a text that is shown.
    pub(super) fn is_hidden(self) -> bool {
        matches!(self, TokenType::Control | TokenType::Unknown)
    }

    /// Whether the token is looked for in a text before the text is taken apart.
    pub(super) fn is_found_whole(self) -> bool {
        self.is_hidden() || self == TokenType::UserDefined
    }
}

/// The tokenizer of a GGUF file. A field that the file does not have is empty or `None`.
///
/// Named after the key it comes from: `eot` is `tokenizer.ggml.eot_token_id`, and so on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocabulary {
    /// The algorithm, `tokenizer.ggml.model`: `llama`, `gpt2`, `bert`, `t5`.
    pub model: String,
    /// How text is cut into words, `tokenizer.ggml.pre`; only `gpt2` needs it.
    pub pre: Option<String>,
    /// The tokens' spelling, by id.
    pub tokens: Vec<String>,
    /// A number for each token: which merge goes first (`llama`), or its logarithmic probability (`t5`).
    pub scores: Vec<f32>,
    /// What each token is for; empty when all are normal.
    pub token_types: Vec<TokenType>,
    /// Pairs that become one token, the first ones first: `left right` (`gpt2`).
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`: begins a text.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`: ends a text.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: ends a message.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: ends a message that goes on elsewhere.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.seperator_token_id` (so spelled in the files).
    pub separator: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding: Option<u32>,
    /// `tokenizer.ggml.mask_token_id`.
    pub mask: Option<u32>,
    /// Whether a text begins with `bos`.
    pub add_bos: Option<bool>,
    /// Whether a text ends with `eos`.
    pub add_eos: Option<bool>,
    /// Whether a text begins with a space (`llama`, `t5`).
    pub add_space_prefix: Option<bool>,
    /// Whether several spaces are one (`t5`).
    pub remove_extra_whitespaces: Option<bool>,
    /// SentencePiece's table of characters to replace, as it is in its model (`t5`).
    pub precompiled_charsmap: Vec<u8>,
    /// `tokenizer.ggml.normalizer.lowercase` (`bert`).
    pub lowercase: Option<bool>,
    /// `tokenizer.ggml.normalizer.strip_accents` (`bert`).
    pub strip_accents: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
    /// `general.name`: the tokens of Phi-3 swallow the spaces after them, which only the name tells.
    pub model_name: Option<String>,
}

/// An error about a vocabulary; `reason` names the key.
pub(super) fn invalid(reason: impl Into<String>) -> TokenizerError {
    TokenizerError::Vocabulary {
        reason: reason.into(),
    }
}

impl GgufVocabulary {
    /// The type of a token.
    pub(super) fn token_type(&self, id: u32) -> TokenType {
        let id = id as usize;
        self.token_types.get(id).copied().unwrap_or_default()
    }

    /// Checks the arrays, gives empty tokens a name, and drops special ids that are not in the vocabulary; returns
    /// the ids by token and what was dropped.
    pub(super) fn check(&mut self) -> Result<(HashMap<String, u32>, Vec<String>), TokenizerError> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(invalid("tokenizer.ggml.tokens is empty"));
        }
        for (key, length) in [
            ("scores", self.scores.len()),
            ("token_type", self.token_types.len()),
        ] {
            if length != 0 && length < count {
                return Err(invalid(format!(
                    "tokenizer.ggml.{key} has {length} entries for {count} tokens"
                )));
            }
        }
        if let Some(id) = self.scores.iter().position(|score| score.is_nan()) {
            return Err(invalid(format!("tokenizer.ggml.scores[{id}] is NaN")));
        }
        let mut ids = HashMap::with_capacity(count);
        for (id, token) in self.tokens.iter_mut().enumerate() {
            if token.is_empty() {
                *token = format!("[EMPTY_{id}]");
            }
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                return Err(invalid(format!(
                    "tokenizer.ggml.tokens has {token:?} twice, as {first} and as {id}"
                )));
            }
        }
        Ok((ids, self.drop_ids_out_of_range()))
    }

    fn drop_ids_out_of_range(&mut self) -> Vec<String> {
        let count = self.tokens.len();
        let mut notes = Vec::new();
        for (key, id) in [
            ("bos", &mut self.bos),
            ("eos", &mut self.eos),
            ("eot", &mut self.eot),
            ("eom", &mut self.eom),
            ("unknown", &mut self.unknown),
            ("seperator", &mut self.separator),
            ("padding", &mut self.padding),
            ("mask", &mut self.mask),
        ] {
            if let Some(wrong) = id.take_if(|id| *id as usize >= count) {
                notes.push(format!(
                    "tokenizer.ggml.{key}_token_id is {wrong}, but there are {count} tokens: it is not used"
                ));
            }
        }
        notes
    }
}
