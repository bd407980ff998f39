//! JSON in base64, as launchers pass it in place of a path.

/// The JSON object that a text is in base64 (either alphabet, padded or not).
pub(super) fn json(text: &str) -> Option<String> {
    let digits = text.trim_end_matches('=');
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(digits.len() * 3 / 4), 0u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' | b'-' => 62,
            b'/' | b'_' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    let json = String::from_utf8(bytes).ok()?;
    json.trim_start().starts_with('{').then_some(json)
}
