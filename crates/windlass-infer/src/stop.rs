//! When a generation ends, and which of its text may already be shown.
//!
//! Text is streamed piece by piece, while a stop string may begin in one piece and end in another. What could
//! still become a stop string is held back, so that no part of it is ever shown. The text shown does not
//! depend on how it was cut into pieces. The module knows nothing of models and tokenizers.

use serde::Serialize;

use crate::InferError;

/// The conditions that end a generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StopRules {
    /// The tokens that end the text; they are not shown.
    pub eos_ids: Vec<u32>,
    /// The most tokens to generate, an end token included.
    pub max_tokens: usize,
    /// The strings that end the text; they are not shown.
    pub stop_strings: Vec<String>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model gave an end token.
    Eos,
    /// A stop string was completed: its index in [`StopRules::stop_strings`].
    StopString(usize),
    /// [`StopRules::max_tokens`] tokens were generated.
    MaxTokens,
    /// The model has no position for another token; the caller says so, not the [`Stopper`].
    Context,
    /// Whoever reads the text wants no more of it; the caller says so.
    Interrupted,
}

/// What one token adds to the visible text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Text that may be shown now.
    pub text: String,
    /// Set when the generation ends with this token; `text` then completes the output.
    pub stop: Option<StopReason>,
}

/// Follows one generation.
#[derive(Debug, Clone)]
pub struct Stopper {
    rules: StopRules,
    tokens: usize,
    held: String,
    stopped: bool,
}

impl Stopper {
    /// A generation at its start.
    ///
    /// # Errors
    /// [`InferError::Setting`] when a stop string is empty or no token may be generated.
    pub fn new(rules: StopRules) -> Result<Self, InferError> {
        if rules.stop_strings.iter().any(String::is_empty) {
            return Err(InferError::Setting {
                flag: "stop",
                value: "\"\"".to_owned(),
                rule: "a text of at least one character",
                hint: "leave out the flag to generate until the end token or --max-tokens",
            });
        }
        if rules.max_tokens == 0 {
            return Err(InferError::Setting {
                flag: "max-tokens",
                value: "0".to_owned(),
                rule: "1 or more",
                hint: "give the number of tokens to generate, such as 200",
            });
        }
        Ok(Self {
            rules,
            tokens: 0,
            held: String::new(),
            stopped: false,
        })
    }

    /// The number of tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Takes the next token and the text by which it extends the output (empty inside a character).
    ///
    /// An end token comes first, then stop strings, then the number of tokens. Of several stop strings the
    /// one completed first counts, and of those completed together the longest.
    ///
    /// # Panics
    /// After the generation has stopped.
    #[track_caller]
    pub fn push(&mut self, token: u32, piece: &str) -> Step {
        assert!(!self.stopped, "a token after the end of the generation");
        self.tokens += 1;
        if self.rules.eos_ids.contains(&token) {
            return self.stop(StopReason::Eos);
        }
        self.held.push_str(piece);
        if let Some((index, start)) = self.completed() {
            self.held.truncate(start);
            return self.stop(StopReason::StopString(index));
        }
        if self.tokens >= self.rules.max_tokens {
            return self.stop(StopReason::MaxTokens);
        }
        let kept = self.held.split_off(self.safe_len());
        Step {
            text: std::mem::replace(&mut self.held, kept),
            stop: None,
        }
    }

    /// The text held back, when the caller ends the generation for a reason of its own.
    pub fn finish(&mut self) -> String {
        self.stopped = true;
        std::mem::take(&mut self.held)
    }

    fn stop(&mut self, reason: StopReason) -> Step {
        Step {
            text: self.finish(),
            stop: Some(reason),
        }
    }

    /// The index and start of the stop string that ends first in the held text.
    fn completed(&self) -> Option<(usize, usize)> {
        let found = self.rules.stop_strings.iter().enumerate();
        let found = found.filter_map(|(index, stop)| Some((index, self.held.find(stop)?, stop)));
        let first = found.min_by_key(|(_, start, stop)| (start + stop.len(), *start))?;
        Some((first.0, first.1))
    }

    /// The length of the text before the longest suffix that begins a stop string.
    fn safe_len(&self) -> usize {
        let stops = &self.rules.stop_strings;
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let begins_stop = |suffix: &str| stops.iter().any(|stop| stop.starts_with(suffix));
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| begins_stop(&self.held[at..]))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopper(stops: &[&str], max_tokens: usize) -> Stopper {
        Stopper::new(StopRules {
            eos_ids: vec![0, 7],
            max_tokens,
            stop_strings: stops.iter().map(|&s| s.to_owned()).collect(),
        })
        .unwrap()
    }

    #[test]
    fn a_beginning_of_a_stop_string_is_held_back() {
        let mut stopper = stopper(&["\nUser:", "###"], 100);
        let mut shown = Vec::new();
        for piece in ["Hi", " #", "1", "\n", "\nUs", "e", "d ##", "\nUser", ": x"] {
            let step = stopper.push(1, piece);
            shown.push((step.text, step.stop));
        }
        let last = shown.pop().unwrap();
        let texts: Vec<&str> = shown.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(texts, ["Hi", " ", "#1", "", "\n", "", "\nUsed ", "##"]);
        assert_eq!(last, (String::new(), Some(StopReason::StopString(0))));
    }

    #[test]
    fn every_reason_completes_the_text() {
        // (pieces, last token, most tokens) -> text and reason
        for (pieces, token, max_tokens, text, reason) in [
            (&["a", "b#"][..], 7, 9, "ab#", StopReason::Eos),
            (&["a", "b#"], 0, 3, "ab#", StopReason::Eos),
            (&["a", "b#"], 1, 3, "ab#", StopReason::MaxTokens),
            (&["a", "b#", "##"], 1, 3, "ab", StopReason::StopString(0)),
            (&["a###b"], 1, 1, "a", StopReason::StopString(0)),
        ] {
            let mut stopper = stopper(&["###"], max_tokens);
            let mut steps: Vec<Step> = Vec::new();
            for piece in pieces {
                steps.push(stopper.push(1, piece));
            }
            if steps.last().unwrap().stop.is_none() {
                steps.push(stopper.push(token, ""));
            }
            let shown: String = steps.iter().map(|s| s.text.as_str()).collect();
            assert_eq!(
                (shown.as_str(), steps.last().unwrap().stop),
                (text, Some(reason))
            );
            assert_eq!(stopper.tokens(), steps.len());
        }
        let mut cancelled = stopper(&["###"], 9);
        assert_eq!(cancelled.push(1, "a##").text, "a");
        assert_eq!(cancelled.finish(), "##");
    }

    /// Every text of up to six characters over an alphabet with a two-byte one, cut in every way, must show
    /// what the definition shows of the whole.
    #[test]
    fn the_cut_into_pieces_does_not_matter() {
        let alphabet = ['a', 'b', 'é'];
        for stops in [
            &["ab"][..],
            &["aab", "ba"],
            &["aé", "éa", "é"],
            &["abéab", "béa"],
            &["aaa", "aa"],
            &[],
        ] {
            for length in 1..=6u32 {
                for code in 0..3usize.pow(length) {
                    let letter = |i: u32| alphabet[code / 3usize.pow(i) % 3];
                    let text: String = (0..length).map(letter).collect();
                    let expected = whole(&text, stops);
                    for cuts in 0..1u32 << (length - 1) {
                        assert_eq!(streamed(&text, stops, cuts), expected, "{text} {stops:?}");
                    }
                }
            }
        }
    }

    /// The definition: cut at the first end of any stop string, before the longest one that ends there.
    fn whole(text: &str, stops: &[&str]) -> (String, bool) {
        for (end, character) in text.char_indices() {
            let head = &text[..end + character.len_utf8()];
            let ending = stops.iter().filter(|stop| head.ends_with(**stop));
            if let Some(longest) = ending.map(|stop| stop.len()).max() {
                return (head[..head.len() - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn streamed(text: &str, stops: &[&str], cuts: u32) -> (String, bool) {
        let mut stopper = stopper(stops, 100);
        let mut shown = String::new();
        let mut piece = String::new();
        for (i, character) in text.chars().enumerate() {
            piece.push(character);
            if i + 1 < text.chars().count() && cuts >> i & 1 == 0 {
                continue;
            }
            let step = stopper.push(1, &piece);
            shown.push_str(&step.text);
            piece.clear();
            if step.stop.is_some() {
                return (shown, true);
            }
        }
        shown.push_str(&stopper.finish());
        (shown, false)
    }

    #[test]
    fn useless_rules_are_refused() {
        for (max_tokens, stop, expected) in [
            (0, "x", "--max-tokens 0: must be 1 or more"),
            (
                5,
                "",
                "--stop \"\": must be a text of at least one character",
            ),
        ] {
            let rules = StopRules {
                max_tokens,
                stop_strings: vec!["y".to_owned(), stop.to_owned()],
                eos_ids: Vec::new(),
            };
            let error = Stopper::new(rules).unwrap_err();
            assert_eq!(error.to_string(), expected);
            assert!(error.hint().is_some());
        }
        let reason = serde_json::to_string(&StopReason::MaxTokens).unwrap();
        assert_eq!(reason, "\"max_tokens\"");
    }
}
