//! SentencePiece's byte-pair encoding: neighbors merge while together they are a token, the best score first.
//!
//! Unlike a list of merges, scores alone decide: any two neighbors that spell a token may merge, and of equal scores
//! the leftmost goes first. What no token covers becomes bytes. Normalization other than spaces is not done here.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::invalid;
use super::{GgufVocabulary, TokenType, TokenizerError};

/// The character that stands for a space inside tokens.
pub(super) const SPACE: &str = "\u{2581}";

/// A vocabulary ready to encode with.
#[derive(Debug)]
pub(super) struct Spm {
    /// Ids and scores of the tokens that merges may make.
    pieces: HashMap<Box<str>, (u32, f32)>,
    bytes: Option<Box<[u32; 256]>>,
    unknown: Option<u32>,
    /// Tokens that are found whole, the longest first.
    whole: Vec<Whole>,
    space_prefix: bool,
}

#[derive(Debug)]
struct Whole {
    text: String,
    id: u32,
    hidden: bool,
    strips_after: bool,
}

/// A part of a text: still text, or a token that was found whole.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

impl Spm {
    /// Takes over a checked vocabulary.
    pub(super) fn new(
        vocabulary: &GgufVocabulary,
        ids: &HashMap<String, u32>,
    ) -> Result<Self, TokenizerError> {
        if vocabulary.scores.is_empty() {
            return Err(invalid("tokenizer.ggml.scores is missing"));
        }
        let byte = |byte: usize| ids.get(&format!("<0x{byte:02X}>")).copied();
        let bytes: Option<Vec<u32>> = (0..256).map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok()).map(Box::new);
        let unknown = vocabulary
            .unknown
            .or((vocabulary.token_type(0) == TokenType::Unknown).then_some(0));
        if bytes.is_none() && unknown.is_none() {
            return Err(invalid(
                "tokenizer.ggml.tokens lacks some of the 256 byte tokens <0x00> to <0xFF>, \
                 and there is no unknown token",
            ));
        }
        let phi3 = vocabulary.model_name.as_deref().is_some_and(|name| {
            let name = name.to_lowercase();
            name.contains("phi-3") || name.contains("phi3")
        });
        let (mut pieces, mut whole) = (HashMap::with_capacity(ids.len()), Vec::new());
        for (id, text) in (0..).zip(&vocabulary.tokens) {
            let kind = vocabulary.token_type(id);
            if kind.is_found_whole() {
                let keeps = ["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_str());
                whole.push(Whole {
                    text: text.clone(),
                    id,
                    hidden: kind.is_hidden(),
                    strips_after: phi3 && !keeps,
                });
            }
            if !kind.is_hidden() && kind != TokenType::Byte {
                // The sum turns -0 to 0: the two are equal scores.
                let score = vocabulary.scores[id as usize] + 0.0;
                pieces.insert(text.as_str().into(), (id, score));
            }
        }
        whole.sort_by_key(|whole| std::cmp::Reverse(whole.text.len()));
        Ok(Spm {
            pieces,
            bytes,
            unknown,
            whole,
            space_prefix: vocabulary.add_space_prefix.unwrap_or(true),
        })
    }

    /// The ids of a text; with `marks`, control tokens spelled in it are those tokens.
    pub(super) fn encode(&self, text: &str, marks: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut after_token = true;
        for part in self.partition(text, marks) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    let mut spaced = text.replace(' ', SPACE);
                    if self.space_prefix && after_token {
                        spaced.insert_str(0, SPACE);
                    }
                    self.merge(&spaced, &mut ids);
                }
            }
            after_token = matches!(part, Part::Token(_));
        }
        ids
    }

    /// Finds the tokens that are looked for whole: all occurrences of a longer one before a shorter one.
    fn partition<'a>(&self, text: &'a str, marks: bool) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
        let wanted = self.whole.iter().filter(|whole| marks || !whole.hidden);
        for whole in wanted.filter(|whole| text.contains(&whole.text)) {
            let mut cut = Vec::with_capacity(parts.len() + 2);
            for part in parts {
                match part {
                    Part::Text(text) => whole.cut(text, &mut cut),
                    token => cut.push(token),
                }
            }
            parts = cut;
        }
        parts
    }

    fn merge(&self, text: &str, ids: &mut Vec<u32>) {
        let mut chain = Chain::new(text);
        for right in 1..chain.symbols.len() {
            self.offer(&mut chain, right - 1, right);
        }
        while let Some(pair) = chain.queue.pop() {
            if chain.apply(&pair) {
                let symbol = chain.symbols[pair.left];
                self.offer(&mut chain, symbol.before, pair.left);
                self.offer(&mut chain, pair.left, symbol.after);
            }
        }
        let mut at = 0;
        let mut after_unknown = false;
        while let Some(symbol) = chain.symbols.get(at) {
            let piece = &text[symbol.start..symbol.end];
            let known = self.pieces.get(piece);
            match (known, &self.bytes, self.unknown) {
                (Some(&(id, _)), ..) => ids.push(id),
                (None, Some(table), _) => ids.extend(piece.bytes().map(|b| table[b as usize])),
                (None, None, Some(id)) if !after_unknown => ids.push(id),
                _ => {}
            }
            after_unknown = known.is_none();
            at = symbol.after;
        }
    }

    /// Queues two neighbors that together spell a token.
    fn offer(&self, chain: &mut Chain, left: usize, right: usize) {
        let (Some(a), Some(b)) = (chain.symbols.get(left), chain.symbols.get(right)) else {
            return;
        };
        if let Some(&(_, score)) = self.pieces.get(&chain.text[a.start..b.end]) {
            let length = b.end - a.start;
            let pair = Pair {
                score,
                left,
                right,
                length,
            };
            chain.queue.push(pair);
        }
    }
}

impl Whole {
    /// Cuts a text at all occurrences of the token.
    fn cut<'a>(&self, mut text: &'a str, parts: &mut Vec<Part<'a>>) {
        while let Some(at) = text.find(&self.text) {
            if at > 0 {
                parts.push(Part::Text(&text[..at]));
            }
            parts.push(Part::Token(self.id));
            text = &text[at + self.text.len()..];
            if self.strips_after {
                text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
            }
        }
        if !text.is_empty() {
            parts.push(Part::Text(text));
        }
    }
}

/// No neighbor: an index past every symbol.
const NONE: usize = usize::MAX;

/// A run of characters on its way to a token; empty once merged into the one before it.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    before: usize,
    after: usize,
}

/// Two neighbors that may merge, as they were when they were queued.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self.score.total_cmp(&other.score);
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

/// The symbols of a text in a linked list, and the pairs that may merge.
struct Chain<'a> {
    text: &'a str,
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
}

impl<'a> Chain<'a> {
    /// A symbol for each character.
    fn new(text: &'a str) -> Self {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (start, c))| Symbol {
                start,
                end: start + c.len_utf8(),
                before: index.wrapping_sub(1),
                after: index + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = NONE;
        }
        Chain {
            text,
            symbols,
            queue: BinaryHeap::new(),
        }
    }

    /// Merges a pair, unless one of the two has changed since it was queued.
    fn apply(&mut self, pair: &Pair) -> bool {
        let (left, right) = (self.symbols[pair.left], self.symbols[pair.right]);
        let is_empty = |symbol: Symbol| symbol.start == symbol.end;
        if is_empty(left)
            || is_empty(right)
            || left.end - left.start + right.end - right.start != pair.length
        {
            return false;
        }
        self.symbols[pair.left].end = right.end;
        self.symbols[pair.left].after = right.after;
        self.symbols[pair.right].start = right.end;
        if let Some(next) = self.symbols.get_mut(right.after) {
            next.before = pair.left;
        }
        true
    }
}
