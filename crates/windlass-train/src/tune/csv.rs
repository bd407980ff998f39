//! Comma-separated values, as RFC 4180 has them: quoted fields may hold commas, line ends and doubled quotes.

/// The fields of a record, with the line it begins in.
type Record = (u64, Vec<String>);

/// The records of a text, each with the line it begins in, counted from one. `Err` names the line of a quote that is not
/// closed or not followed by a comma.
pub(super) fn records(text: &str) -> Result<Vec<Record>, (u64, &'static str)> {
    let mut all = Vec::new();
    let mut chars = text.chars().peekable();
    let mut line = 1;
    while chars.peek().is_some() {
        let begun = line;
        let mut fields = Vec::new();
        loop {
            let mut field = String::new();
            if chars.next_if_eq(&'"').is_some() {
                loop {
                    match chars.next() {
                        None => return Err((begun, "a quote is not closed")),
                        Some('"') if chars.next_if_eq(&'"').is_some() => field.push('"'),
                        Some('"') => break,
                        Some(c) => {
                            line += u64::from(c == '\n');
                            field.push(c);
                        }
                    }
                }
                if !matches!(chars.peek(), None | Some(',' | '\n' | '\r')) {
                    return Err((line, "something follows a closing quote"));
                }
            } else {
                while let Some(c) = chars.next_if(|c| !matches!(c, ',' | '\n' | '\r')) {
                    field.push(c);
                }
            }
            fields.push(field);
            if chars.next_if_eq(&',').is_none() {
                break;
            }
        }
        chars.next_if_eq(&'\r');
        chars.next_if_eq(&'\n');
        line += 1;
        if fields.len() > 1 || !fields[0].is_empty() {
            all.push((begun, fields));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_may_hold_what_separates_them() {
        let text = "a,b\r\n\"x, \"\"y\"\"\nz\",2\n\n,\nlast,";
        let rows: Vec<Record> = records(text).unwrap();
        let plain: Vec<(u64, Vec<&str>)> = rows
            .iter()
            .map(|(line, fields)| (*line, fields.iter().map(String::as_str).collect()))
            .collect();
        let expected = [
            (1, vec!["a", "b"]),
            (2, vec!["x, \"y\"\nz", "2"]),
            (5, vec!["", ""]),
            (6, vec!["last", ""]),
        ];
        assert_eq!(plain, expected);
        assert_eq!(records("a\n\"b").unwrap_err().0, 2);
        assert_eq!(records("\"a\"b").unwrap_err().0, 1);
    }
}
