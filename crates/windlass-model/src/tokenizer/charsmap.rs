//! Checks of SentencePiece's table of characters to replace: the library that walks it trusts it.

use super::TokenizerError;
use super::vocabulary::invalid;

/// Checks that every walk through the table stays inside it.
///
/// The table is the length of a trie in bytes, the trie as a double array of 32-bit units, and the replacements, each
/// ended by a zero byte. A walk goes from a node's base to `base ^ byte`; where a word ends, the unit at the base
/// holds the place of its replacement.
pub(super) fn check(table: &[u8]) -> Result<(), TokenizerError> {
    let refuse = |what: &str| invalid(format!("tokenizer.ggml.precompiled_charsmap {what}"));
    let (length, rest) = table.split_first_chunk().ok_or(refuse("is too short"))?;
    let length = u32::from_le_bytes(*length) as usize;
    if !length.is_multiple_of(4) || length > rest.len() || length == 0 {
        return Err(refuse("has a wrong length"));
    }
    let (trie, replacements) = rest.split_at(length);
    let units: Vec<u32> = trie
        .chunks_exact(4)
        .map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]))
        .collect();
    let replacements = std::str::from_utf8(replacements)
        .map_err(|_| refuse("has replacements that are not UTF-8"))?;
    let base = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
    let mut seen = vec![false; units.len()];
    let mut open = vec![base(units[0])];
    while let Some(node) = open.pop() {
        if node | 0xFF >= units.len() {
            return Err(refuse("points outside itself"));
        }
        if std::mem::replace(&mut seen[node], true) {
            continue;
        }
        for byte in 1..=0xFF_u32 {
            let child = node ^ byte as usize;
            let unit = units[child];
            if unit & (1 << 31 | 0xFF) != byte {
                continue;
            }
            let next = child ^ base(unit);
            if unit & (1 << 8) != 0 {
                let place = units.get(next).map(|unit| (unit & !(1 << 31)) as usize);
                if !place.is_some_and(|place| replacements.is_char_boundary(place)) {
                    return Err(refuse("has a replacement outside itself"));
                }
            }
            open.push(next);
        }
    }
    Ok(())
}
