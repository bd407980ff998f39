//! What a model thinks before it answers, apart from the answer.
//!
//! Models that reason write `<think>…</think>` first; some chat templates write the first mark themselves. Clients expect the
//! thoughts in a field of their own, `reasoning_content`.

use crate::tools::parse::begun;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Where an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Thinking {
    /// At its beginning, where it may begin to think.
    Before,
    /// In thoughts.
    Inside,
    /// In the answer itself.
    After,
}

impl Thinking {
    /// Where an answer begins, by its template and the prompt; `None` when the template knows no thoughts.
    pub fn begin(template: &str, prompt: &str) -> Option<Self> {
        if !template.contains(CLOSE) {
            return None;
        }
        let prompt = prompt.trim_end();
        Some(if prompt.ends_with(OPEN) {
            Thinking::Inside
        } else if prompt.ends_with(CLOSE) {
            Thinking::After
        } else {
            Thinking::Before
        })
    }
}

/// Parts thoughts from text that comes in pieces.
pub(crate) struct ThoughtParser {
    state: Thinking,
    buffer: String,
    /// White space between the thoughts and the answer belongs to neither.
    skipping: bool,
}

impl ThoughtParser {
    pub fn new(state: Thinking) -> Self {
        ThoughtParser {
            state,
            buffer: String::new(),
            skipping: state == Thinking::Inside,
        }
    }

    /// Whether the next text is a thought.
    pub fn is_inside(&self) -> bool {
        self.state == Thinking::Inside
    }

    /// Takes more text; gives out thoughts and text that are certain.
    pub fn push(&mut self, text: &str) -> (String, String) {
        self.buffer += text;
        let mut thoughts = String::new();
        if self.state == Thinking::Before {
            let begun = self.buffer.trim_start();
            if let Some(rest) = begun.strip_prefix(OPEN) {
                self.buffer = rest.to_owned();
                self.state = Thinking::Inside;
                self.skipping = true;
            } else if OPEN.starts_with(begun) {
                return (thoughts, String::new());
            } else {
                self.state = Thinking::After;
            }
        }
        if self.state == Thinking::Inside {
            self.skip();
            let found = self.buffer.find(CLOSE);
            let until = found.unwrap_or(self.buffer.len() - begun(&self.buffer, CLOSE));
            // Line breaks before the mark belong to it.
            let shown = self.buffer[..until].trim_end().len();
            thoughts += &self.buffer[..shown];
            match found {
                Some(at) => {
                    self.buffer.drain(..at + CLOSE.len());
                    self.state = Thinking::After;
                    self.skipping = true;
                }
                None => {
                    self.buffer.drain(..shown);
                    return (thoughts, String::new());
                }
            }
        }
        self.skip();
        (thoughts, std::mem::take(&mut self.buffer))
    }

    /// What is left at the end of the answer.
    pub fn finish(&mut self) -> (String, String) {
        let rest = std::mem::take(&mut self.buffer);
        match self.state {
            Thinking::Inside => (rest.trim_end().to_owned(), String::new()),
            _ => (String::new(), rest),
        }
    }

    fn skip(&mut self) {
        if self.skipping {
            let start = self.buffer.len() - self.buffer.trim_start().len();
            self.buffer.drain(..start);
            self.skipping = self.buffer.is_empty();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Thoughts and text of an answer, and whether they are the same however it is cut.
    #[track_caller]
    fn check(begin: Thinking, answer: &str, thoughts: &str, text: &str) {
        let letters: Vec<char> = answer.chars().collect();
        for size in [1, 2, 3, 7, 1000] {
            let mut parser = ThoughtParser::new(begin);
            let pieces = letters.chunks(size).map(String::from_iter);
            let mut parts: Vec<_> = pieces.map(|piece| parser.push(&piece)).collect();
            parts.push(parser.finish());
            let (got, said): (String, String) = parts.into_iter().unzip();
            assert_eq!((got.as_str(), said.as_str()), (thoughts, text), "by {size}");
        }
    }

    #[test]
    fn thoughts_are_parted_however_the_text_is_cut() {
        use Thinking::{After, Before, Inside};
        let answer = "<think>\nIs é < b?\n\nYes.\n</think>\n\nIt is </think> so.\n";
        check(Before, answer, "Is é < b?\n\nYes.", "It is </think> so.\n");
        check(Inside, "\nso\n</think>\n\nyes", "so", "yes");
        check(Inside, "cut of", "cut of", "");
        check(Inside, "cut </thi", "cut </thi", "");
        check(Before, " no <think>", "", " no <think>");
        check(Before, "<thin", "", "<thin");
        check(Before, "\n<think></think>", "", "");
        check(After, "\n<think> is text", "", "\n<think> is text");
    }

    #[test]
    fn templates_and_prompts_say_where_an_answer_begins() {
        let template = "{{ '<think>' }}{{ '</think>' }}";
        for (template, prompt, begin) in [
            ("no thoughts", "<think>", None),
            (template, "user: x\n<think>\n", Some(Thinking::Inside)),
            (template, "<think>\n\n</think>\n\n", Some(Thinking::After)),
            (template, "user: x\nassistant:", Some(Thinking::Before)),
        ] {
            assert_eq!(Thinking::begin(template, prompt), begin, "{prompt}");
        }
    }
}
