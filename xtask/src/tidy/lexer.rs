//! As much of Rust's grammar as the laws need: what is code, what is a comment or a literal, where functions
//! and test modules begin and end.

use std::ops::Range;

/// The source with comments and the contents of literals blanked: same length, same lines.
pub fn mask(source: &str) -> String {
    let mut out = source.as_bytes().to_vec();
    let mut at = 0;
    while at < source.len() {
        let end = at + blank_len(source, at);
        if end == at {
            at += 1;
            continue;
        }
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out)
        .expect("whole characters outside literals are kept, and the rest is spaces")
}

/// The length of the comment or literal that starts at `at`, or 0 when code does.
fn blank_len(source: &str, at: usize) -> usize {
    let bytes = source.as_bytes();
    let rest = &bytes[at..];
    match rest[0] {
        b'/' if rest.starts_with(b"//") => line_len(rest),
        b'/' if rest.starts_with(b"/*") => block_comment_len(rest),
        b'"' => string_len(rest),
        b'\'' => char_len(&source[at..]),
        b'r' if at == 0 || !is_word(bytes[at - 1]) || bytes[at - 1] == b'b' => raw_string_len(rest),
        _ => 0,
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 128
}

fn line_len(rest: &[u8]) -> usize {
    rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len())
}

/// Block comments nest.
fn block_comment_len(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn string_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `'x'` and `'\n'` are literals; `'a` is a lifetime or a label and counts as code.
fn char_len(rest: &str) -> usize {
    let mut chars = rest.char_indices().skip(1);
    match chars.next() {
        Some((_, '\\')) => {
            let escaped = &rest[2..];
            let first = escaped.chars().next().map_or(0, char::len_utf8);
            let close = escaped[first..].find('\'');
            close.map_or(0, |offset| 2 + first + offset + 1)
        }
        Some((_, '\'')) | None => 0,
        Some(_) => match chars.next() {
            Some((close, '\'')) => close + 1,
            _ => 0,
        },
    }
}

/// `r"…"` and `r#"…"#`, but not the raw identifier `r#type`.
fn raw_string_len(rest: &[u8]) -> usize {
    let hashes = rest[1..].iter().take_while(|&&b| b == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return 0;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    let body = 2 + hashes;
    let found = rest[body..].windows(close.len()).position(|w| w == close);
    found.map_or(rest.len(), |offset| body + offset + close.len())
}

/// Where a word stands alone in masked code.
pub fn find_word<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = code.as_bytes();
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |&at| {
            let before = at.checked_sub(1).map(|i| bytes[i]);
            let after = bytes.get(at + word.len()).copied();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
}

/// The line of a position, counted from 1.
pub fn line_at(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at]
        .iter()
        .filter(|&&b| b == b'\n')
        .count()
}

/// The end of the item that starts at `from`: after its `;` or the brace that closes its first block.
fn item_end(code: &str, from: usize) -> usize {
    let (mut braces, mut others) = (0usize, 0usize);
    for (offset, byte) in code.as_bytes()[from..].iter().enumerate() {
        match byte {
            b'(' | b'[' => others += 1,
            b')' | b']' => others = others.saturating_sub(1),
            b'{' => braces += 1,
            b'}' => {
                braces = braces.saturating_sub(1);
                if braces == 0 && others == 0 {
                    return from + offset + 1;
                }
            }
            b';' if braces == 0 && others == 0 => return from + offset + 1,
            _ => {}
        }
    }
    code.len()
}

/// The items under `#[cfg(test)]`, as byte ranges of the masked code.
pub fn test_items(code: &str) -> Vec<Range<usize>> {
    let mut items: Vec<Range<usize>> = Vec::new();
    for marker in ["#[cfg(test)]", "#[cfg(all(test,"] {
        for (at, _) in code.match_indices(marker) {
            let attribute = at + code[at..].find(']').map_or(marker.len(), |end| end + 1);
            let body = skip_attributes(code, attribute);
            items.push(at..item_end(code, body));
        }
    }
    items
}

/// The first position after further attributes, whose brackets would hide the item.
fn skip_attributes(code: &str, mut at: usize) -> usize {
    loop {
        let start = at + (code.len() - at - code[at..].trim_start().len());
        if !code[start..].starts_with("#[") {
            return start;
        }
        let mut depth = 0usize;
        let closing = code.as_bytes()[start..].iter().position(|byte| {
            match byte {
                b'[' => depth += 1,
                b']' => depth -= 1,
                _ => {}
            }
            *byte == b']' && depth == 0
        });
        let Some(closing) = closing else {
            return start;
        };
        at = start + closing + 1;
    }
}

/// A function with a body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name, or `$name` in a macro.
    pub name: String,
    /// From the word `fn` to the closing brace.
    pub range: Range<usize>,
}

/// The functions of masked code, nested ones too; types such as `fn(u8)` and declarations are not counted.
pub fn functions(code: &str) -> Vec<Function> {
    let mut found = Vec::new();
    for at in find_word(code, "fn") {
        let rest = code[at + 2..].trim_start();
        let name: String = rest
            .chars()
            .take_while(|&c| c == '_' || c == '$' || c.is_alphanumeric())
            .collect();
        let end = item_end(code, at);
        if !name.is_empty() && code[..end].ends_with('}') {
            found.push(Function {
                name,
                range: at..end,
            });
        }
    }
    found
}
