//! What rows are: TRL's forms, and those of Alpaca and ShareGPT, told apart by their columns.

use super::rows::Row;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::fmt;

/// A text, or a conversation's messages (`role`, `content`, …).
#[derive(Clone, Debug, PartialEq)]
pub enum Turns {
    /// Plain text.
    Text(String),
    /// Messages for the chat template.
    Messages(Vec<Value>),
}

impl Turns {
    fn is_empty(&self) -> bool {
        match self {
            Turns::Text(text) => text.is_empty(),
            Turns::Messages(messages) => messages.is_empty(),
        }
    }
}

/// What one row holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Sample {
    /// A text to be learned.
    Text(String),
    /// A conversation.
    Chat {
        /// Its messages.
        messages: Vec<Value>,
        /// The tools that the model may call.
        tools: Option<Vec<Value>>,
    },
    /// A text to be read, and one to be learned after it.
    Completion {
        /// What is read.
        prompt: Turns,
        /// What is learned.
        completion: Turns,
    },
    /// Two answers, one better than the other.
    Preference {
        /// What is read.
        prompt: Turns,
        /// The better answer.
        chosen: Turns,
        /// The other one.
        rejected: Turns,
    },
    /// An answer, and whether it is a good one.
    Unpaired {
        /// What is read.
        prompt: Turns,
        /// The answer.
        completion: Turns,
        /// Whether it is good.
        label: bool,
    },
}

/// How rows say what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `text`.
    Text,
    /// `messages` and perhaps `tools`.
    Messages,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `chosen`, `rejected` and perhaps `prompt`.
    Preference,
    /// `prompt`, `completion` and `label`.
    Unpaired,
    /// `instruction`, `input` and `output`.
    Alpaca,
    /// The same with `chosen` and `rejected` answers.
    AlpacaPreference,
    /// `conversations` of `from` and `value`, perhaps with `system` and `tools`.
    ShareGpt,
    /// `conversations` with `chosen` and `rejected` answers.
    ShareGptPreference,
    /// `messages` whose last one is the answer, and `label`.
    MessagesUnpaired,
}

impl fmt::Display for Form {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Form::Text => "text",
            Form::Messages => "messages",
            Form::PromptCompletion => "prompt and completion",
            Form::Preference => "preference",
            Form::Unpaired => "unpaired preference",
            Form::Alpaca => "Alpaca",
            Form::AlpacaPreference => "Alpaca with preference",
            Form::ShareGpt => "ShareGPT",
            Form::ShareGptPreference => "ShareGPT with preference",
            Form::MessagesUnpaired => "messages with a label",
        })
    }
}

impl Form {
    /// What a row is, by its columns; `None` where they say nothing.
    fn of_row(row: &Row) -> Option<Form> {
        let has = |name: &str| row.fields.get(name).is_some_and(|value| !value.is_null());
        let pair = has("chosen") && has("rejected");
        Some(match () {
            () if pair && has("conversations") => Form::ShareGptPreference,
            () if pair && has("instruction") => Form::AlpacaPreference,
            () if pair => Form::Preference,
            () if has("conversations") => Form::ShareGpt,
            () if has("messages") && has("label") => Form::MessagesUnpaired,
            () if has("messages") => Form::Messages,
            () if has("prompt") && has("completion") && has("label") => Form::Unpaired,
            () if has("prompt") && has("completion") => Form::PromptCompletion,
            () if has("instruction") && has("output") => Form::Alpaca,
            () if has("text") => Form::Text,
            () => return None,
        })
    }

    /// The form that all rows have.
    ///
    /// # Errors
    /// Columns that say nothing, rows of different forms.
    pub fn of(rows: &[Row]) -> Result<Form> {
        let mut first: Option<(Form, &Row)> = None;
        for row in rows {
            let Some(form) = Form::of_row(row) else {
                return Err(Error::UnknownForm {
                    at: row.at(),
                    columns: row.fields.keys().cloned().collect(),
                });
            };
            match first {
                None => first = Some((form, row)),
                Some((all, before)) if all != form => {
                    return Err(Error::MixedForms {
                        first: format!("{} is of the form {all}", before.at()),
                        other: format!("{} of the form {form}", row.at()),
                    });
                }
                Some(_) => {}
            }
        }
        Ok(first.expect("at least one row").0)
    }

    /// Whether its rows compare answers.
    pub fn is_preference(self) -> bool {
        use Form::{AlpacaPreference, Preference, ShareGptPreference};
        matches!(self, Preference | AlpacaPreference | ShareGptPreference)
    }

    /// Whether its rows rate answers.
    pub fn is_unpaired(self) -> bool {
        matches!(self, Form::Unpaired | Form::MessagesUnpaired)
    }

    /// What a row holds.
    ///
    /// # Errors
    /// Fields that are not what the form says.
    pub fn sample(self, row: &Row) -> Result<Sample> {
        Ok(match self {
            Form::Text => Sample::Text(text(row, "text")?),
            Form::Messages => Sample::Chat {
                messages: messages(row, "messages")?,
                tools: tools(row)?,
            },
            Form::PromptCompletion => Sample::Completion {
                prompt: turns(row, "prompt")?,
                completion: turns(row, "completion")?,
            },
            Form::Preference => preference(row)?,
            Form::Unpaired => Sample::Unpaired {
                prompt: turns(row, "prompt")?,
                completion: turns(row, "completion")?,
                label: label(row)?,
            },
            Form::Alpaca => Sample::Completion {
                prompt: instruction(row)?,
                completion: answer(text(row, "output")?),
            },
            Form::AlpacaPreference => Sample::Preference {
                prompt: instruction(row)?,
                chosen: answer(text(row, "chosen")?),
                rejected: answer(text(row, "rejected")?),
            },
            Form::ShareGpt => Sample::Chat {
                messages: conversation(row)?,
                tools: tools(row)?,
            },
            Form::ShareGptPreference => {
                let one = |name: &str| -> Result<Turns> {
                    Ok(Turns::Messages(vec![said(row, &row.fields[name])?]))
                };
                Sample::Preference {
                    prompt: Turns::Messages(conversation(row)?),
                    chosen: one("chosen")?,
                    rejected: one("rejected")?,
                }
            }
            Form::MessagesUnpaired => {
                let mut prompt = messages(row, "messages")?;
                let answer = prompt
                    .pop()
                    .ok_or_else(|| row.error("`messages` is empty"))?;
                Sample::Unpaired {
                    prompt: Turns::Messages(prompt),
                    completion: Turns::Messages(vec![answer]),
                    label: label(row)?,
                }
            }
        })
    }
}

fn text(row: &Row, name: &str) -> Result<String> {
    match row.fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        None | Some(Value::Null) => Ok(String::new()),
        Some(_) => Err(row.error(format!("`{name}` is not a text"))),
    }
}

/// Messages, given as a list or as a text of JSON.
fn messages(row: &Row, name: &str) -> Result<Vec<Value>> {
    let parsed;
    let value = match row.fields.get(name) {
        Some(Value::String(text)) => {
            parsed = serde_json::from_str(text).unwrap_or(Value::Null);
            &parsed
        }
        Some(other) => other,
        None => &Value::Null,
    };
    let list = value.as_array();
    let is_message = |v: &Value| v["role"].is_string();
    let list = list.filter(|list| list.iter().all(is_message));
    let list =
        list.ok_or_else(|| row.error(format!("`{name}` is no list of messages with a role")))?;
    Ok(list.iter().map(cleaned).collect())
}

/// A message without its empty fields, which tables give to all.
fn cleaned(message: &Value) -> Value {
    let Some(fields) = message.as_object() else {
        return message.clone();
    };
    let kept = fields.iter().filter(|(_, value)| !value.is_null());
    Value::Object(kept.map(|(k, v)| (k.clone(), v.clone())).collect())
}

fn turns(row: &Row, name: &str) -> Result<Turns> {
    match row.fields.get(name) {
        Some(Value::Array(_)) => messages(row, name).map(Turns::Messages),
        _ => text(row, name).map(Turns::Text),
    }
}

fn label(row: &Row) -> Result<bool> {
    match &row.fields["label"] {
        Value::Bool(label) => Ok(*label),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(false),
        other => Err(row.error(format!("`label` is {other}, not true or false"))),
    }
}

fn tools(row: &Row) -> Result<Option<Vec<Value>>> {
    let wrong = || row.error("`tools` is no list of tools");
    match row.fields.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(list)) => Ok(Some(list.clone())),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => serde_json::from_str(text).map(Some).map_err(|_| wrong()),
        Some(_) => Err(wrong()),
    }
}

/// Two answers to a prompt; without one, what both begin with is the prompt.
fn preference(row: &Row) -> Result<Sample> {
    let (mut chosen, mut rejected) = (turns(row, "chosen")?, turns(row, "rejected")?);
    let mut prompt = turns(row, "prompt")?;
    if prompt.is_empty() {
        match (&mut chosen, &mut rejected) {
            (Turns::Messages(chosen), Turns::Messages(rejected)) => {
                let pairs = chosen.iter().zip(rejected.iter());
                let shared = pairs.take_while(|(a, b)| a == b).count();
                prompt = Turns::Messages(chosen.drain(..shared).collect());
                rejected.drain(..shared);
            }
            (Turns::Text(chosen), Turns::Text(rejected)) => {
                let pairs = chosen.char_indices().zip(rejected.chars());
                let shared = pairs.take_while(|((_, a), b)| a == b);
                let end = shared.last().map_or(0, |((at, c), _)| at + c.len_utf8());
                prompt = Turns::Text(chosen.drain(..end).collect());
                rejected.drain(..end);
            }
            _ => return Err(row.error("`chosen` and `rejected` are not of one kind")),
        }
    }
    Ok(Sample::Preference {
        prompt,
        chosen,
        rejected,
    })
}

/// Alpaca's instruction with its input, as a user's message.
fn instruction(row: &Row) -> Result<Turns> {
    let (instruction, input) = (text(row, "instruction")?, text(row, "input")?);
    let asked = match input.is_empty() {
        true => instruction,
        false => format!("{instruction}\n\n{input}"),
    };
    let mut messages = Vec::new();
    let system = text(row, "system")?;
    if !system.is_empty() {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": asked }));
    Ok(Turns::Messages(messages))
}

fn answer(text: String) -> Turns {
    Turns::Messages(match text.is_empty() {
        true => Vec::new(),
        false => vec![json!({ "role": "assistant", "content": text })],
    })
}

/// ShareGPT's conversation as messages.
fn conversation(row: &Row) -> Result<Vec<Value>> {
    let list = row.fields["conversations"].as_array();
    let list = list.ok_or_else(|| row.error("`conversations` is no list"))?;
    let mut messages = Vec::new();
    let system = text(row, "system")?;
    if !system.is_empty() {
        messages.push(json!({ "role": "system", "content": system }));
    }
    for turn in list {
        messages.push(said(row, turn)?);
    }
    Ok(messages)
}

/// One turn, in ShareGPT's words or as a message.
fn said(row: &Row, turn: &Value) -> Result<Value> {
    if let Value::String(text) = turn {
        return Ok(json!({ "role": "assistant", "content": text }));
    }
    if turn["role"].is_string() {
        return Ok(cleaned(turn));
    }
    let (Some(from), Some(value)) = (turn["from"].as_str(), turn["value"].as_str()) else {
        return Err(row.error("a turn of a conversation has not the fields `from` and `value`"));
    };
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "bot" | "chatgpt" => "assistant",
        "system" => "system",
        "observation" | "tool" | "function_response" => "tool",
        "function_call" => {
            let call: Map<String, Value> = serde_json::from_str(value)
                .map_err(|error| row.error(format!("a function call is no JSON: {error}")))?;
            let calls = [json!({ "type": "function", "function": call })];
            return Ok(json!({ "role": "assistant", "content": "", "tool_calls": calls }));
        }
        other => {
            return Err(row.error(format!(
                "`from` is \"{other}\": nobody of that name is known"
            )));
        }
    };
    Ok(json!({ "role": role, "content": value }))
}
