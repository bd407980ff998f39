//! The vocabulary of a tokenizer as GGUF files keep it.
//!
//! What a GGUF file cannot say is refused, when it would change how ordinary text is encoded, or noted, when it shows
//! only in rare text. Nothing is guessed: the name of the word patterns is found from the patterns themselves.

use serde_json::Value;

use super::spm::SPACE;
use super::{GgufVocabulary, TokenType, Tokenizer, TokenizerError};

mod pieces;
mod words;

/// An error about what a GGUF file cannot say.
fn cannot(reason: impl Into<String>) -> TokenizerError {
    TokenizerError::NotInGguf {
        reason: reason.into(),
    }
}

/// A vocabulary on its way, with what the user should know of it.
struct Draft {
    vocabulary: GgufVocabulary,
    notes: Vec<String>,
}

impl Tokenizer {
    /// The vocabulary for a GGUF file of a model with `vocab_size` embeddings, and what the user should know: ids
    /// without a token are filled up with unused ones.
    ///
    /// # Errors
    /// [`TokenizerError::NotInGguf`] for a tokenizer that such a file cannot describe,
    /// [`TokenizerError::LargerThanModel`] when the model is too small.
    pub fn to_gguf(
        &self,
        vocab_size: usize,
    ) -> Result<(GgufVocabulary, Vec<String>), TokenizerError> {
        self.check_vocabulary(vocab_size)?;
        let mut draft = match self.origin.as_deref() {
            Some(origin) => Draft {
                vocabulary: origin.vocabulary.clone(),
                notes: Vec::new(),
            },
            None => self.draft()?,
        };
        fill(&mut draft.vocabulary, vocab_size);
        Ok((draft.vocabulary, draft.notes))
    }

    fn draft(&self) -> Result<Draft, TokenizerError> {
        let definition: Value = serde_json::from_slice(self.definition())
            .map_err(|error| super::failed("be read again", &error))?;
        let model = &definition["model"];
        let mut draft = Draft {
            vocabulary: self.tokens(&definition),
            notes: Vec::new(),
        };
        let has_bytes = words::steps(&definition["pre_tokenizer"], "pretokenizers")
            .iter()
            .any(|step| step["type"] == "ByteLevel");
        match model["type"].as_str() {
            Some("BPE") | None if has_bytes => words::byte_level(&definition, &mut draft)?,
            Some("BPE") | None if model["byte_fallback"] == true => {
                pieces::sentencepiece(&definition, &mut draft)?;
            }
            Some("Unigram") => pieces::unigram(&definition, &mut draft)?,
            Some("WordPiece") => pieces::word_piece(&definition, &mut draft)?,
            Some("BPE") | None => {
                return Err(cannot(
                    "its BPE works neither on bytes (ByteLevel) nor with byte_fallback",
                ));
            }
            Some(other) => return Err(cannot(format!("its model is of type {other}"))),
        }
        self.add_special_ids(&mut draft.vocabulary)?;
        note_flags(&definition, &mut draft.notes);
        draft.vocabulary.chat_template = self.chat_template(false);
        Ok(draft)
    }

    /// All tokens in order, with the types that the added tokens give them.
    fn tokens(&self, definition: &Value) -> GgufVocabulary {
        let mut vocabulary = GgufVocabulary::default();
        let added = definition["added_tokens"].as_array();
        let special = |id: u32| {
            let mut added = added.into_iter().flatten();
            added
                .find(|token| token["id"] == id)
                .map(|token| token["special"] == true)
        };
        for id in 0..self.vocab_size as u32 {
            let token = self.token(id);
            let kind = match (&token, special(id)) {
                (None, _) => TokenType::Unused,
                (_, Some(true)) => TokenType::Control,
                (_, Some(false)) => TokenType::UserDefined,
                (_, None) => TokenType::Normal,
            };
            vocabulary
                .tokens
                .push(token.unwrap_or_else(|| unused(id as usize)));
            vocabulary.token_types.push(kind);
        }
        vocabulary
    }

    /// The special ids, and what stands around a text: seen from what the tokenizer does with one.
    fn add_special_ids(&self, vocabulary: &mut GgufVocabulary) -> Result<(), TokenizerError> {
        let bare = self.encode("a", false)?;
        let full = self.encode("a", true)?;
        let extra = full.len() - bare.len().min(full.len());
        let at = (0..=extra).find(|&at| full[at..].starts_with(&bare));
        let Some(at) = at else {
            return Err(cannot("its post-processor changes the tokens of a text"));
        };
        let (before, after) = (&full[..at], &full[at + bare.len()..]);
        let (&[] | &[_], &[] | &[_]) = (before, after) else {
            return Err(cannot(
                "its post-processor puts several tokens around a text",
            ));
        };
        vocabulary.bos = before.first().copied().or(self.bos);
        let end = after.first().copied();
        if vocabulary.model == "bert" {
            vocabulary.separator = end;
        } else {
            vocabulary.eos = end.or(self.eos.first().copied());
        }
        let others = self.eos.iter().filter(|&&id| Some(id) != vocabulary.eos);
        vocabulary.eot = others
            .copied()
            .next()
            .filter(|_| vocabulary.model != "bert");
        vocabulary.padding = self.pad;
        vocabulary.add_bos = Some(!before.is_empty());
        vocabulary.add_eos = Some(!after.is_empty());
        Ok(())
    }
}

/// The name of an id that no text has.
fn unused(id: usize) -> String {
    format!("[PAD{id}]")
}

/// Adds unused tokens up to a number of tokens.
fn fill(vocabulary: &mut GgufVocabulary, vocab_size: usize) {
    let count = vocabulary.tokens.len();
    if vocabulary.token_types.is_empty() && count < vocab_size {
        vocabulary.token_types = vec![TokenType::Normal; count];
    }
    for id in count..vocab_size {
        vocabulary.tokens.push(unused(id));
        vocabulary.token_types.push(TokenType::Unused);
        if !vocabulary.scores.is_empty() {
            vocabulary.scores.push(-1000.0);
        }
    }
}

/// Notes the settings of added tokens that a GGUF file has no place for.
fn note_flags(definition: &Value, notes: &mut Vec<String>) {
    for flag in ["lstrip", "rstrip", "single_word"] {
        let added = definition["added_tokens"].as_array().into_iter().flatten();
        let mut set = added.filter(|token| token[flag] == true);
        if let Some(token) = set.next() {
            notes.push(format!(
                "{flag} of {} and {} other tokens is not kept: GGUF has no place for it",
                token["content"],
                set.count()
            ));
        }
    }
}
