//! Decoding id by id. What is incomplete is held back; nothing that was given out is taken back.

use super::{Tokenizer, TokenizerError};

/// Turns ids into text as they come: complete characters only, spaces where they belong.
///
/// A piece of text is given out when the characters it ends with are complete. The last piece given out stays as
/// context for the next one, because the first token of a text is decoded differently from the same token later
/// (SentencePiece drops its leading space).
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// How many of `ids` have been given out: the context.
    shown: usize,
}

/// Ids held back for an incomplete character. One has at most four bytes, so more cannot be completed.
const HELD_IDS: usize = 8;

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            ids: Vec::new(),
            shown: 0,
        }
    }

    /// Takes the next id and returns the text that is certain by now, which may be empty.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] when the library cannot decode.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.pending()?;
        let incomplete = text.ends_with('\u{fffd}') && self.ids.len() - self.shown < HELD_IDS;
        if text.is_empty() || incomplete {
            return Ok(String::new());
        }
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }

    /// Returns what was held back: characters that stayed incomplete come as U+FFFD.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`] when the library cannot decode.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.pending()?;
        self.ids.clear();
        self.shown = 0;
        Ok(text)
    }

    /// The text of the ids that have not been given out.
    fn pending(&self) -> Result<String, TokenizerError> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, self.skip_special);
        let context = decode(&self.ids[..self.shown])?;
        let text = decode(&self.ids)?;
        match text.strip_prefix(&context) {
            Some(rest) => Ok(rest.to_owned()),
            // Invalid bytes after the context changed how the context itself is decoded.
            None => decode(&self.ids[self.shown..]),
        }
    }
}
