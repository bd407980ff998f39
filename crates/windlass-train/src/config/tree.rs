//! Relaxed JSON (Hjson) with the line of every key and value.
//!
//! Comments (`#`, `//`, `/* */`), trailing and missing commas, unquoted keys, words and text up to the end of its
//! line, `'''` texts, a root without braces. A key that is given twice is refused. It knows nothing of keys or types.

use std::fmt;

use serde_json::{Map, Number, Value};

/// Nested objects and lists that a file may have; more is refused.
const MAX_DEPTH: usize = 64;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The file, at a line counted from one.
    File {
        /// The line.
        line: u32,
    },
    /// The file, under an older name.
    Alias {
        /// The older name.
        name: String,
        /// The line.
        line: u32,
    },
    /// `"auto"` in the file, filled in from what the run is given.
    Auto {
        /// The line; 0 when the program set it.
        line: u32,
    },
    /// A setting on the command line.
    CommandLine,
    /// It follows from other keys.
    Inferred,
    /// The default.
    Default,
}

impl Origin {
    /// The line in the file, where there is one.
    pub fn line(&self) -> Option<u32> {
        match self {
            Self::File { line } | Self::Alias { line, .. } | Self::Auto { line } => {
                Some(*line).filter(|line| *line > 0)
            }
            Self::CommandLine | Self::Inferred | Self::Default => None,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { line: 0 } => write!(out, "the program"),
            Self::File { line } => write!(out, "line {line}"),
            Self::Alias { name, line: 0 } => write!(out, "alias {name}"),
            Self::Alias { name, line } => write!(out, "alias {name}, line {line}"),
            Self::Auto { .. } => write!(out, "auto"),
            Self::CommandLine => write!(out, "command line"),
            Self::Inferred => write!(out, "inferred"),
            Self::Default => write!(out, "default"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Where it came from.
    pub origin: Origin,
    /// The value.
    pub value: Tree,
}

/// The value of a [`Node`].
#[derive(Clone, Debug, PartialEq)]
pub enum Tree {
    /// Anything but an object.
    Leaf(Value),
    /// An object: keys in the order of the file, each once.
    Object(Vec<(String, Node)>),
}

impl Node {
    /// A value as if it stood in a file.
    pub fn from_value(value: Value, origin: &Origin) -> Self {
        let value = match value {
            Value::Object(map) => Tree::Object(
                map.into_iter()
                    .map(|(key, value)| (key, Self::from_value(value, origin)))
                    .collect(),
            ),
            other => Tree::Leaf(other),
        };
        Self {
            origin: origin.clone(),
            value,
        }
    }

    /// The value without its places.
    pub fn to_value(&self) -> Value {
        match &self.value {
            Tree::Leaf(value) => value.clone(),
            Tree::Object(entries) => Value::Object(
                entries
                    .iter()
                    .map(|(key, node)| (key.clone(), node.to_value()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }

    /// Whether this is anything but `null`.
    pub fn is_there(&self) -> bool {
        self.value != Tree::Leaf(Value::Null)
    }

    /// The node of a key, when this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries()?
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, node)| node)
    }

    /// The node of a key, when this is an object that has it.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        self.entries_mut()?
            .iter_mut()
            .find(|(name, _)| name == key)
            .map(|(_, node)| node)
    }

    /// Sets the origin of this and of all below.
    pub fn set_origin(&mut self, origin: &Origin) {
        self.origin = origin.clone();
        for (_, node) in self.entries_mut().into_iter().flatten() {
            node.set_origin(origin);
        }
    }

    /// The keys and nodes, when this is an object.
    pub fn entries(&self) -> Option<&Vec<(String, Node)>> {
        match &self.value {
            Tree::Object(entries) => Some(entries),
            Tree::Leaf(_) => None,
        }
    }

    /// The keys and nodes, when this is an object.
    pub fn entries_mut(&mut self) -> Option<&mut Vec<(String, Node)>> {
        match &mut self.value {
            Tree::Object(entries) => Some(entries),
            Tree::Leaf(_) => None,
        }
    }
}

/// What a text is not, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// The line, counted from one.
    pub line: u32,
    /// The key path around the place; empty at the root.
    pub key: String,
    /// What is wrong.
    pub message: String,
}

type Parsed<T> = Result<T, SyntaxError>;

/// Reads a text.
///
/// # Errors
/// A syntax error or a duplicate key, with its line and the key path around it.
pub fn parse(text: &str) -> Parsed<Node> {
    let mut reader = Reader {
        rest: text,
        line: 1,
        path: Vec::new(),
    };
    reader.space()?;
    let line = reader.line;
    let value = match reader.peek() {
        Some('{') => {
            reader.next();
            reader.object(Some('}'))?
        }
        Some('[') => return Err(reader.error("a configuration is an object, and this is a list")),
        Some(_) => reader.object(None)?,
        None => return Err(reader.error("the file is empty")),
    };
    reader.space()?;
    if let Some(next) = reader.peek() {
        return Err(reader.error(format!("'{next}' after the end of the configuration")));
    }
    Ok(Node {
        origin: Origin::File { line },
        value: Tree::Object(value),
    })
}

struct Reader<'a> {
    rest: &'a str,
    line: u32,
    path: Vec<String>,
}

impl Reader<'_> {
    fn error(&self, message: impl Into<String>) -> SyntaxError {
        SyntaxError {
            line: self.line,
            key: self.path.join("."),
            message: message.into(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.rest = &self.rest[next.len_utf8()..];
        self.line += u32::from(next == '\n');
        Some(next)
    }

    fn skip(&mut self, bytes: usize) {
        let (skipped, rest) = self.rest.split_at(bytes);
        self.line += skipped.matches('\n').count() as u32;
        self.rest = rest;
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest.starts_with(token);
        if found {
            self.skip(token.len());
        }
        found
    }

    /// Skips white space and comments.
    fn space(&mut self) -> Parsed<()> {
        loop {
            let blank = self.rest.len()
                - self
                    .rest
                    .trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}')
                    .len();
            self.skip(blank);
            if self.rest.starts_with('#') || self.rest.starts_with("//") {
                self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if self.rest.starts_with("/*") {
                let Some(end) = self.rest.find("*/") else {
                    return Err(self.error("a comment /* has no end */"));
                };
                self.skip(end + 2);
            } else {
                return Ok(());
            }
        }
    }

    /// The entries up to `end`, or up to the end of the text.
    fn object(&mut self, end: Option<char>) -> Parsed<Vec<(String, Node)>> {
        if self.path.len() >= MAX_DEPTH {
            return Err(self.error(format!("more than {MAX_DEPTH} levels")));
        }
        let start = self.line;
        let mut entries: Vec<(String, Node, u32)> = Vec::new();
        loop {
            self.space()?;
            match (self.peek(), end) {
                (None, None) => break,
                (None, Some(_)) => {
                    return Err(self.error(format!("the {{ of line {start} has no }}")));
                }
                (Some(next), Some(end)) if next == end => {
                    self.next();
                    break;
                }
                _ => {}
            }
            let line = self.line;
            let key = self.key()?;
            self.path.push(key.clone());
            if let Some((_, _, first)) = entries.iter().find(|(name, ..)| *name == key) {
                return Err(SyntaxError {
                    line,
                    key: self.path.join("."),
                    message: format!("duplicate key \"{key}\": lines {first} and {line}"),
                });
            }
            self.space()?;
            if !self.eat(":") {
                return Err(self.error(format!("':' is expected after the key \"{key}\"")));
            }
            self.space()?;
            let node = self.value()?;
            self.path.pop();
            entries.push((key, node, line));
            self.space()?;
            self.eat(",");
        }
        Ok(entries
            .into_iter()
            .map(|(key, node, _)| (key, node))
            .collect())
    }

    fn key(&mut self) -> Parsed<String> {
        match self.peek() {
            Some(quote @ ('"' | '\'')) => self.quoted(quote),
            _ => {
                let stop = |c: char| c.is_whitespace() || ",:[]{}\"'#".contains(c);
                let length = self.rest.find(stop).unwrap_or(self.rest.len());
                if length == 0 {
                    let found = self.peek().map_or("the end".into(), |c| format!("'{c}'"));
                    return Err(self.error(format!("a key is expected and this is {found}")));
                }
                let key = self.rest[..length].to_owned();
                self.skip(length);
                Ok(key)
            }
        }
    }

    fn value(&mut self) -> Parsed<Node> {
        let line = self.line;
        let value = match self.peek() {
            Some('{') => {
                self.next();
                Tree::Object(self.object(Some('}'))?)
            }
            Some('[') => {
                self.next();
                Tree::Leaf(Value::Array(self.list()?))
            }
            Some('\'') if self.rest.starts_with("'''") => Tree::Leaf(self.long_text()?),
            Some(quote @ ('"' | '\'')) => Tree::Leaf(Value::String(self.quoted(quote)?)),
            Some(next @ ('}' | ']' | ',' | ':')) => {
                return Err(self.error(format!("a value is expected and this is '{next}'")));
            }
            None => return Err(self.error("a value is expected and the text ends")),
            Some(_) => Tree::Leaf(self.bare()?),
        };
        Ok(Node {
            origin: Origin::File { line },
            value,
        })
    }

    fn list(&mut self) -> Parsed<Vec<Value>> {
        if self.path.len() >= MAX_DEPTH {
            return Err(self.error(format!("more than {MAX_DEPTH} levels")));
        }
        let start = self.line;
        let mut items = Vec::new();
        loop {
            self.space()?;
            match self.peek() {
                None => return Err(self.error(format!("the [ of line {start} has no ]"))),
                Some(']') => {
                    self.next();
                    return Ok(items);
                }
                Some(_) => {}
            }
            self.path.push(items.len().to_string());
            items.push(self.value()?.to_value());
            self.path.pop();
            self.space()?;
            self.eat(",");
        }
    }

    fn quoted(&mut self, quote: char) -> Parsed<String> {
        let start = self.error(format!("a text that begins with {quote} does not end"));
        self.next();
        let mut text = String::new();
        loop {
            match self.next().ok_or_else(|| start.clone())? {
                '\n' => return Err(start),
                c if c == quote => return Ok(text),
                '\\' => text.push(self.escape()?),
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self) -> Parsed<char> {
        Ok(match self.next() {
            Some(c @ ('"' | '\'' | '\\' | '/')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => {
                let high = self.hex()?;
                let code = match high {
                    0xd800..0xdc00 if self.eat("\\u") => {
                        let low = self.hex()?;
                        0x10000 + ((high - 0xd800) << 10) + (low.wrapping_sub(0xdc00) & 0x3ff)
                    }
                    code => code,
                };
                char::from_u32(code).ok_or_else(|| self.error("\\u is half of a pair"))?
            }
            _ => return Err(self.error("an escape that JSON does not know")),
        })
    }

    fn hex(&mut self) -> Parsed<u32> {
        let digits = self
            .rest
            .get(..4)
            .filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let code = code.ok_or_else(|| self.error("\\u needs four hexadecimal digits"))?;
        self.skip(4);
        Ok(code)
    }

    fn long_text(&mut self) -> Parsed<Value> {
        self.skip(3);
        let Some(end) = self.rest.find("'''") else {
            return Err(self.error("a text that begins with ''' does not end"));
        };
        let text = self.rest[..end].trim_matches('\n').to_owned();
        self.skip(end + 3);
        Ok(Value::String(text))
    }

    /// A number, `true`, `false`, `null`, or a text without quotes up to the end of its line.
    fn bare(&mut self) -> Parsed<Value> {
        let line_end = self.rest.find(['\n', '\r']).unwrap_or(self.rest.len());
        let line = &self.rest[..line_end];
        let stop = |c: char| c.is_whitespace() || ",]}#".contains(c);
        let mut length = line.find(stop).unwrap_or(line.len());
        if let Some(comment) = line.find("//").or_else(|| line.find("/*")) {
            length = length.min(comment);
        }
        let after = line[length..].trim_start();
        let ends = after.is_empty()
            || after.starts_with([',', ']', '}', '#'])
            || after.starts_with("//")
            || after.starts_with("/*");
        if let Some(value) = literal(&line[..length]).filter(|_| ends) {
            self.skip(length);
            return Ok(value);
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
        if ends && length > 0 && line[..length].chars().all(plain) {
            let word = line[..length].to_owned();
            self.skip(length);
            return Ok(Value::String(word));
        }
        // An unquoted text of several words would swallow what follows on its line.
        if line.contains([',', ']', '}', '{', '[', '"']) {
            let word = &line[..length];
            return Err(self.error(format!(
                "{word} is not a number, true, false or null; write a text in quotes"
            )));
        }
        let text = line.trim_end().to_owned();
        self.skip(line_end);
        Ok(Value::String(text))
    }
}

/// The value of a word, when it is a number or a constant of JSON.
fn literal(word: &str) -> Option<Value> {
    match word {
        "true" => return Some(Value::Bool(true)),
        "false" => return Some(Value::Bool(false)),
        "null" => return Some(Value::Null),
        _ => {}
    }
    let digits = word.strip_prefix(['-', '+']).unwrap_or(word);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let number = match (word.parse::<u64>(), word.parse::<i64>()) {
        (Ok(number), _) => Number::from(number),
        (_, Ok(number)) => Number::from(number),
        _ => Number::from_f64(word.parse().ok()?)?,
    };
    Some(Value::Number(number))
}
