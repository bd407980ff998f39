//! Tool calls out of an answer's text, as it comes.
//!
//! Where a call has the usual order, name and then arguments, the arguments are given out while they are written. A call
//! that is no call stays text: nothing that the model said is lost.

use super::Dialect;
use serde_json::Value;

/// A part of a tool call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallDelta {
    /// Which call of the answer.
    pub index: usize,
    /// The function's name: with the first part of each call.
    pub name: Option<String>,
    /// More of the arguments, which are JSON.
    pub arguments: String,
}

/// Reads calls from text that comes in pieces.
pub(crate) struct CallParser {
    dialect: Dialect,
    buffer: String,
    state: State,
    calls: usize,
}

#[derive(Debug, PartialEq)]
enum State {
    /// In text.
    Text,
    /// In a call whose name is not known yet.
    Head,
    /// In the arguments.
    Arguments(Nesting),
    /// After the arguments.
    Tail,
}

/// How deep in JSON a scan is.
#[derive(Debug, Default, PartialEq)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// The length of the text that belongs to the value, and whether it ends there.
    fn scan(&mut self, text: &str) -> (usize, bool) {
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}

/// The length of the longest end of `text` that begins `mark`.
pub(crate) fn begun(text: &str, mark: &str) -> usize {
    let most = text.len().min(mark.len() - 1);
    let lengths = (1..=most).rev();
    let mut lengths = lengths.filter(|&length| text.is_char_boundary(text.len() - length));
    let found = lengths.find(|&length| mark.starts_with(&text[text.len() - length..]));
    found.unwrap_or(0)
}

impl CallParser {
    pub fn new(dialect: Dialect) -> Self {
        CallParser {
            dialect,
            buffer: String::new(),
            state: State::Text,
            calls: 0,
        }
    }

    /// Whether the answer calls a tool.
    pub fn has_called(&self) -> bool {
        self.calls > 0
    }

    /// Takes more text; gives out text and parts of calls that are certain.
    pub fn push(&mut self, text: &str) -> (String, Vec<CallDelta>) {
        self.buffer += text;
        let (mut text, mut calls) = (String::new(), Vec::new());
        while self.step(&mut text, &mut calls) {}
        (text, calls)
    }

    /// What is left at the end of the answer.
    pub fn finish(&mut self) -> (String, Vec<CallDelta>) {
        let (mut text, mut calls) = (String::new(), Vec::new());
        let rest = std::mem::take(&mut self.buffer);
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => text = rest,
            State::Head => self.whole(&rest, false, &mut text, &mut calls),
            State::Arguments(_) | State::Tail => {}
        }
        (text, calls)
    }

    /// One step on; false when more text is needed.
    fn step(&mut self, text: &mut String, calls: &mut Vec<CallDelta>) -> bool {
        match &mut self.state {
            State::Text => self.in_text(text),
            State::Head => self.in_head(text, calls),
            State::Arguments(nesting) => {
                let (length, ended) = nesting.scan(&self.buffer);
                let rest = self.buffer.split_off(length);
                let arguments = std::mem::replace(&mut self.buffer, rest);
                if !arguments.is_empty() {
                    calls.push(CallDelta {
                        index: self.calls - 1,
                        name: None,
                        arguments,
                    });
                }
                if ended {
                    self.state = State::Tail;
                }
                ended
            }
            State::Tail => {
                let close = self.dialect.close();
                match self.buffer.find(close) {
                    Some(at) => {
                        self.buffer.drain(..at + close.len());
                        self.state = State::Text;
                        true
                    }
                    None => {
                        let kept = begun(&self.buffer, close);
                        self.buffer.drain(..self.buffer.len() - kept);
                        false
                    }
                }
            }
        }
    }

    fn in_text(&mut self, text: &mut String) -> bool {
        // Between calls there is white space only, which is no text.
        if self.calls > 0 {
            let start = self.buffer.len() - self.buffer.trim_start().len();
            self.buffer.drain(..start);
        }
        let open = self.dialect.open();
        let found = self.buffer.find(open);
        let until = found.unwrap_or(self.buffer.len() - begun(&self.buffer, open));
        // The line break before a call belongs to the call.
        let shown = self.buffer[..until].trim_end_matches('\n').len();
        *text += &self.buffer[..shown];
        match found {
            Some(at) => {
                self.buffer.drain(..at + open.len());
                self.state = State::Head;
                true
            }
            None => {
                self.buffer.drain(..shown);
                false
            }
        }
    }

    fn in_head(&mut self, text: &mut String, calls: &mut Vec<CallDelta>) -> bool {
        if let Some((name, length)) = head(&self.buffer) {
            self.calls += 1;
            calls.push(CallDelta {
                index: self.calls - 1,
                name: Some(name),
                arguments: String::new(),
            });
            self.buffer.drain(..length);
            self.state = State::Arguments(Nesting::default());
            return true;
        }
        let close = self.dialect.close();
        let Some(at) = self.buffer.find(close) else {
            return false;
        };
        let rest = self.buffer.split_off(at + close.len());
        let whole = std::mem::replace(&mut self.buffer, rest);
        self.state = State::Text;
        self.whole(&whole[..at], true, text, calls);
        true
    }

    /// A call whose parts come in another order, read when it is complete; what is none stays text.
    fn whole(&mut self, body: &str, closed: bool, text: &mut String, calls: &mut Vec<CallDelta>) {
        let value: Value = serde_json::from_str(body.trim()).unwrap_or_default();
        let arguments = ["arguments", "parameters"];
        let arguments = arguments.iter().find_map(|key| value.get(key));
        match (value["name"].as_str(), arguments) {
            (Some(name), Some(arguments)) if arguments.is_object() => {
                calls.push(CallDelta {
                    index: self.calls,
                    name: Some(name.to_owned()),
                    arguments: arguments.to_string(),
                });
                self.calls += 1;
            }
            _ => {
                *text += self.dialect.open();
                *text += body;
                *text += if closed { self.dialect.close() } else { "" };
            }
        }
    }
}

/// The name in the beginning of a call, and the length of all before its arguments; `None` as long as they have not begun,
/// or come in another order.
fn head(text: &str) -> Option<(String, usize)> {
    let rest = after(text, "{")?;
    let rest = after(after(rest, "\"name\"")?, ":")?.trim_start();
    let mut strings = serde_json::Deserializer::from_str(rest).into_iter::<String>();
    let name = strings.next()?.ok()?;
    let rest = after(&rest[strings.byte_offset()..], ",")?;
    let rest = after(rest, "\"arguments\"").or_else(|| after(rest, "\"parameters\""))?;
    let rest = after(rest, ":")?.trim_start();
    rest.starts_with('{')
        .then_some((name, text.len() - rest.len()))
}

/// What follows a mark that comes next, but for white space.
fn after<'a>(text: &'a str, mark: &str) -> Option<&'a str> {
    text.trim_start().strip_prefix(mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text and calls (name, arguments) of an answer, and whether they are the same however it is cut.
    fn check(answer: &str, text: &str, calls: &[(&str, &str)]) {
        for size in [1, 2, 3, 7, 1000] {
            let mut parser = CallParser::new(Dialect::Marked);
            let mut got = (String::new(), Vec::<(String, String)>::new());
            let letters: Vec<char> = answer.chars().collect();
            let pieces = letters.chunks(size).map(String::from_iter);
            let mut deltas: Vec<_> = pieces.map(|piece| parser.push(&piece)).collect();
            deltas.push(parser.finish());
            for (text, calls) in deltas {
                got.0 += &text;
                for call in calls {
                    if let Some(name) = call.name {
                        assert_eq!(call.index, got.1.len());
                        got.1.push((name, String::new()));
                    }
                    got.1[call.index].1 += &call.arguments;
                }
            }
            let got_calls: Vec<(&str, &str)> = got
                .1
                .iter()
                .map(|(name, arguments)| (name.as_str(), arguments.as_str()))
                .collect();
            assert_eq!(
                (got.0.as_str(), &got_calls[..]),
                (text, calls),
                "{answer:?} by {size}"
            );
        }
    }

    #[test]
    fn calls_are_found_however_the_text_is_cut() {
        check("no call < here\n", "no call < here\n", &[]);
        check(
            "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"{\", \"b\": [1, {}]}}\n</tool_call>",
            "Let me see.",
            &[("f", "{\"a\": \"}\\\"{\", \"b\": [1, {}]}")],
        );
        check(
            "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>\n{\"arguments\": {\"x\": 1}, \"name\": \"g\"}\n</tool_call>\n",
            "",
            &[("f", "{}"), ("g", "{\"x\":1}")],
        );
        check(
            "<tool_call>not a call</tool_call> so",
            "<tool_call>not a call</tool_call> so",
            &[],
        );
        check(
            "<tool_call>{\"name\": \"f\"",
            "<tool_call>{\"name\": \"f\"",
            &[],
        );
        check(
            "<tool_call>{\"name\": \"f\", \"parameters\": {\"a\": 1",
            "",
            &[("f", "{\"a\": 1")],
        );
    }
}
