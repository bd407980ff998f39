//! What a value must be: the check of one value against the kind of its key.

use serde_json::{Number, Value};

use super::keys::Kind;

/// A value in the form that its kind is kept in, or what is expected.
pub(super) fn convert(kind: Kind, value: &Value) -> Result<Value, String> {
    let wrong = |expected: &str| Err(expected.to_owned());
    match (kind, value) {
        (Kind::Any, value) => Ok(value.clone()),
        (Kind::Bool, Value::Bool(_)) => Ok(value.clone()),
        (Kind::Bool, _) => wrong("true or false"),
        (Kind::Text, Value::String(_)) => Ok(value.clone()),
        (Kind::Text, _) => wrong("a text"),
        (Kind::List, Value::Array(_)) => Ok(value.clone()),
        (Kind::List, _) => wrong("a list"),
        (Kind::Int(least), value) => match whole(value).and_then(|n| u64::try_from(n).ok()) {
            Some(number) if number >= least => Ok(number.into()),
            _ if least == 0 => wrong("an integer"),
            _ => wrong(&format!("an integer of at least {least}")),
        },
        (Kind::Signed, value) => match whole(value).and_then(|n| i64::try_from(n).ok()) {
            Some(number) => Ok(number.into()),
            None => wrong("an integer"),
        },
        (Kind::Number(least, most), value) => match value.as_f64() {
            Some(number) if (least..=most).contains(&number) => Ok(number.into()),
            _ if most < f64::MAX => Err(format!("a number from {least} to {most}")),
            _ if least == 0.0 => wrong("a number that is not negative"),
            _ if least > 0.0 => wrong("a positive number"),
            _ => wrong("a number"),
        },
        (Kind::Betas, value) => {
            let inside = |v: &Value| v.as_f64().is_some_and(|b| (0.0..1.0).contains(&b));
            match value.as_array() {
                Some(betas) if betas.len() == 2 && betas.iter().all(inside) => Ok(value.clone()),
                _ => wrong("a list of two numbers from 0 to below 1"),
            }
        }
        (Kind::Choice(choices), value) => {
            let text = value.as_str().unwrap_or_default().to_lowercase();
            match choices.contains(&text.as_str()) {
                true => Ok(text.into()),
                false => Err(format!("one of {}", choices.join(", "))),
            }
        }
        (Kind::Float, value) => {
            let text = value.as_str().unwrap_or_default().to_lowercase();
            match text.strip_prefix("torch.").unwrap_or(&text) {
                "fp32" | "float32" | "float" => Ok("fp32".into()),
                "fp16" | "float16" | "half" => Ok("fp16".into()),
                "bf16" | "bfp16" | "bfloat16" => Ok("bf16".into()),
                _ => wrong("fp32, fp16 or bf16"),
            }
        }
    }
}

/// The integer that a number is, `5e8` included.
fn whole(value: &Value) -> Option<i128> {
    let number: &Number = value.as_number()?;
    if let Some(n) = number.as_u64() {
        return Some(n.into());
    }
    if let Some(n) = number.as_i64() {
        return Some(n.into());
    }
    let float = number.as_f64()?;
    let exact = float.fract() == 0.0 && float.abs() < 9.3e18;
    exact.then_some(float as i128)
}

/// A value in a message: short.
pub(super) fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
