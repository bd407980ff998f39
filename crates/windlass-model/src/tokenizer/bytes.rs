//! The bytes that each token stands for, which a vocabulary spells in letters of its own.

use super::Tokenizer;
use std::collections::HashMap;

/// The space of SentencePiece.
const SPACE: char = '\u{2581}';

impl Tokenizer {
    /// The bytes of every token, by id, and whether it is a control token, whose bytes are its name. Ids without a token
    /// have no bytes.
    ///
    /// A token can be a part of a character. A text's bytes are those of its tokens one after another, but for the space
    /// that SentencePiece puts before a text and takes away again.
    pub fn token_bytes(&self) -> Vec<(Vec<u8>, bool)> {
        let letters = byte_level_letters();
        let added = self.inner.get_added_tokens_decoder();
        let byte_level = self.is_byte_level();
        let bytes_of = |id: u32| {
            if let Some(token) = added.get(&id) {
                return (token.content.as_bytes().to_vec(), token.special);
            }
            let Some(token) = self.inner.id_to_token(id) else {
                return (Vec::new(), false);
            };
            let bytes = match byte_level {
                true => token
                    .chars()
                    .flat_map(|letter| match letters.get(&letter) {
                        Some(&byte) => vec![byte],
                        None => letter.to_string().into_bytes(),
                    })
                    .collect(),
                false => match byte_name(&token) {
                    Some(byte) => vec![byte],
                    None => token.replace(SPACE, " ").into_bytes(),
                },
            };
            (bytes, false)
        };
        (0..self.vocab_size as u32).map(bytes_of).collect()
    }

    /// Whether tokens are spelled in one letter for each byte.
    fn is_byte_level(&self) -> bool {
        let decoder = serde_json::to_string(&self.inner.get_decoder());
        decoder.is_ok_and(|decoder| decoder.contains("\"ByteLevel\""))
    }
}

/// The byte of a token such as `<0x0A>`.
fn byte_name(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// GPT-2's letters for bytes: printable ones stand for themselves, the others for what comes after U+0100 in order.
fn byte_level_letters() -> HashMap<char, u8> {
    let mut letters = HashMap::new();
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let itself = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let letter = match itself {
            true => u32::from(byte),
            false => {
                next += 1;
                next - 1
            }
        };
        letters.insert(char::from_u32(letter).expect("a letter of Latin"), byte);
    }
    letters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_join_to_the_text() {
        let corpus = ["the cat — süß, 猫 \u{1f408}\n"; 9];
        let tokenizer = Tokenizer::train(corpus.iter(), 300, "<|end|>").unwrap();
        let bytes = tokenizer.token_bytes();
        assert_eq!(bytes.len(), tokenizer.vocab_size());
        for text in ["the cat", " \t\n", "\u{1f408}\u{1f431}ß", "a\u{0}b\u{ad}"] {
            let ids = tokenizer.encode(text, false).unwrap();
            let joined: Vec<u8> = ids
                .iter()
                .flat_map(|&id| bytes[id as usize].0.clone())
                .collect();
            assert_eq!(joined, text.as_bytes());
        }
        let end = tokenizer.id("<|end|>").unwrap();
        assert_eq!(bytes[end as usize], (b"<|end|>".to_vec(), true));
        assert_eq!(byte_name("<0x0A>"), Some(10));
        assert_eq!(byte_name("<0x0>"), None);
    }
}
