//! SentencePiece models, `tokenizer.model`: a protocol buffer with pieces, scores and settings.
//!
//! BPE and Unigram models are read; word and character models are refused, and so are BPE models that rewrite text
//! before they encode it.
//!
//! # Source
//! `sentencepiece_model.proto` of SentencePiece.

use std::path::Path;

use super::spm::SPACE;
use super::{GgufVocabulary, TOKENIZER_FILE, TokenType, Tokenizer, TokenizerError};

impl Tokenizer {
    /// Builds a tokenizer from a SentencePiece model; the files beside it may say which tokens are special.
    pub(super) fn from_sentencepiece(
        path: &Path,
        companions: Vec<(String, Vec<u8>)>,
    ) -> Result<Self, TokenizerError> {
        let refuse = |reason: String| TokenizerError::Invalid {
            path: path.to_owned(),
            reason,
        };
        let mut vocabulary = GgufVocabulary::from_sentencepiece(path, &super::read(path)?)?;
        let mut configs = Vec::new();
        for (name, content) in &companions {
            if !name.ends_with(".json") {
                vocabulary.chat_template = String::from_utf8(content.clone()).ok();
                continue;
            }
            let config = super::parse(&path.with_file_name(name), content)?;
            if name == "added_tokens.json" {
                let count = vocabulary.tokens.len() as u64;
                let ids = config.as_object().into_iter().flatten();
                if let Some((token, _)) = ids.into_iter().find(|(_, id)| id.as_u64() >= Some(count))
                {
                    let reason = format!("{name} adds {token:?}, which needs a {TOKENIZER_FILE}");
                    return Err(refuse(reason));
                }
            }
            let flag = |key: &str| config[key].as_bool();
            vocabulary.add_bos = flag("add_bos_token").or(vocabulary.add_bos);
            vocabulary.add_eos = flag("add_eos_token").or(vocabulary.add_eos);
            if let Some(template) = config["chat_template"].as_str() {
                vocabulary.chat_template = Some(template.to_owned());
            }
            configs.push(config);
        }
        let mut tokenizer = Self::from_gguf(&vocabulary)?;
        for config in &configs {
            tokenizer.add_special(config);
        }
        Ok(tokenizer)
    }
}

impl GgufVocabulary {
    /// The pieces of a SentencePiece model; `path` names it in errors.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`] for damaged files, and for models that are not read here.
    pub fn from_sentencepiece(path: &Path, content: &[u8]) -> Result<Self, TokenizerError> {
        parse(content).map_err(|reason| TokenizerError::Invalid {
            path: path.to_owned(),
            reason,
        })
    }
}

/// A field of a message: its number and its content.
struct Field<'a> {
    number: u64,
    content: Content<'a>,
}

enum Content<'a> {
    Integer(u64),
    Fixed([u8; 4]),
    Bytes(&'a [u8]),
    /// Eight bytes: no field that is read here has them.
    Other,
}

impl Content<'_> {
    fn is_true(&self) -> bool {
        matches!(self, Content::Integer(value) if *value != 0)
    }

    /// An id; negative ones are none.
    fn id(&self) -> Option<u32> {
        match self {
            Content::Integer(value) => u32::try_from(*value as i64).ok(),
            _ => None,
        }
    }
}

/// The fields of a message, one after another.
struct Message<'a>(&'a [u8]);

const TRUNCATED: &str = "it ends inside a field";

impl<'a> Message<'a> {
    fn next(&mut self) -> Result<Option<Field<'a>>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.integer()?;
        let content = match key & 7 {
            0 => Content::Integer(self.integer()?),
            1 => {
                self.take(8)?;
                Content::Other
            }
            2 => {
                let length = usize::try_from(self.integer()?).map_err(|_| TRUNCATED)?;
                Content::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Content::Fixed([bytes[0], bytes[1], bytes[2], bytes[3]])
            }
            kind => return Err(format!("it has a field of unknown kind {kind}")),
        };
        let number = key >> 3;
        Ok(Some(Field { number, content }))
    }

    fn integer(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("it has a number of more than 64 bits".into())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(length).ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(head)
    }
}

/// The settings that decide what a model is.
#[derive(Default)]
struct Settings {
    model_type: u64,
    suffix: bool,
}

const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

/// Reads a model. The error says what is wrong with the file.
fn parse(content: &[u8]) -> Result<GgufVocabulary, String> {
    let mut vocabulary = GgufVocabulary {
        add_bos: Some(true),
        add_eos: Some(false),
        add_space_prefix: Some(true),
        remove_extra_whitespaces: Some(true),
        unknown: Some(0),
        bos: Some(1),
        eos: Some(2),
        ..Default::default()
    };
    let mut settings = Settings {
        model_type: UNIGRAM,
        suffix: false,
    };
    let mut model = Message(content);
    while let Some(Field { number, content }) = model.next()? {
        match (number, content) {
            (1, Content::Bytes(piece)) => read_piece(piece, &mut vocabulary)?,
            (2, Content::Bytes(trainer)) => {
                read_trainer(trainer, &mut settings, &mut vocabulary)?;
            }
            (3, Content::Bytes(rules)) => read_normalizer(rules, &mut vocabulary)?,
            _ => {}
        }
    }
    vocabulary.model = match settings.model_type {
        UNIGRAM => "t5".into(),
        BPE => "llama".into(),
        other => {
            return Err(format!(
                "it has model_type {other}; 1 (Unigram) and 2 (BPE) are read"
            ));
        }
    };
    if settings.suffix {
        return Err("it puts spaces behind words (treat_whitespace_as_suffix)".into());
    }
    let rewrites = !vocabulary.precompiled_charsmap.is_empty()
        || vocabulary.remove_extra_whitespaces == Some(true);
    if settings.model_type == BPE && rewrites {
        return Err("it is a BPE model that rewrites text before it encodes it".into());
    }
    Ok(vocabulary)
}

fn read_piece(piece: &[u8], vocabulary: &mut GgufVocabulary) -> Result<(), String> {
    let (mut text, mut score, mut kind) = ("", 0.0, TokenType::Normal);
    let mut fields = Message(piece);
    while let Some(Field { number, content }) = fields.next()? {
        match (number, content) {
            (1, Content::Bytes(bytes)) => {
                text = std::str::from_utf8(bytes)
                    .map_err(|_| format!("piece {} is not UTF-8", vocabulary.tokens.len()))?;
            }
            (2, Content::Fixed(bytes)) => score = f32::from_le_bytes(bytes),
            (3, Content::Integer(number)) => kind = TokenType::from_number(number as i32),
            _ => {}
        }
    }
    // User-defined pieces are looked for in the text as it was written, before spaces become marks.
    vocabulary.tokens.push(match kind {
        TokenType::UserDefined => text.replace(SPACE, " "),
        _ => text.to_owned(),
    });
    vocabulary.scores.push(score);
    vocabulary.token_types.push(kind);
    Ok(())
}

fn read_trainer(
    trainer: &[u8],
    settings: &mut Settings,
    vocabulary: &mut GgufVocabulary,
) -> Result<(), String> {
    let mut fields = Message(trainer);
    while let Some(Field { number, content }) = fields.next()? {
        match (number, content) {
            (3, Content::Integer(kind)) => settings.model_type = kind,
            (24, flag) => settings.suffix = flag.is_true(),
            (40, id) => vocabulary.unknown = id.id(),
            (41, id) => vocabulary.bos = id.id(),
            (42, id) => vocabulary.eos = id.id(),
            (43, id) => vocabulary.padding = id.id(),
            _ => {}
        }
    }
    Ok(())
}

fn read_normalizer(rules: &[u8], vocabulary: &mut GgufVocabulary) -> Result<(), String> {
    let mut fields = Message(rules);
    while let Some(Field { number, content }) = fields.next()? {
        match (number, content) {
            (2, Content::Bytes(table)) => vocabulary.precompiled_charsmap = table.to_vec(),
            (3, flag) => vocabulary.add_space_prefix = Some(flag.is_true()),
            (4, flag) => vocabulary.remove_extra_whitespaces = Some(flag.is_true()),
            _ => {}
        }
    }
    Ok(())
}
