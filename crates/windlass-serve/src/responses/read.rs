//! A request for a response, understood.

use crate::app::Model;
use crate::conversation::{Conversation, Format};
use crate::fields::{Fields, kind};
use crate::job::Job;
use crate::refusal::Refusal;
use crate::sampling::Settings;
use crate::tools::{Tool, ToolChoice, Tools, choice_word};
use serde_json::{Map, Value, json};

/// What is wanted.
pub(super) struct Ask {
    pub job: Job,
    pub stream: bool,
    /// The settings that the response repeats.
    pub echo: Map<String, Value>,
}

/// The fields that a response repeats, and what they are when the request does not say.
fn echoed(fields: &Fields) -> Map<String, Value> {
    let mut echo = Map::new();
    for (name, default) in [
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("metadata", json!({})),
        ("parallel_tool_calls", json!(true)),
        ("temperature", json!(1.0)),
        ("text", json!({ "format": { "type": "text" } })),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("top_p", json!(1.0)),
        ("user", Value::Null),
    ] {
        echo.insert(name.into(), fields.peek(name).cloned().unwrap_or(default));
    }
    echo
}

/// Refuses what needs something that is not here.
fn refuse_others(fields: &mut Fields) -> Result<(), Refusal> {
    for (name, accepted, reason) in [
        (
            "previous_response_id",
            json!([]),
            "is not supported: nothing is stored here, send the conversation as input",
        ),
        (
            "conversation",
            json!([]),
            "is not supported: nothing is stored here, send the conversation as input",
        ),
        ("background", json!([false]), "is not supported"),
        (
            "truncation",
            json!(["disabled"]),
            "is not supported: leave it out, or disabled",
        ),
        ("reasoning", json!([{}]), "is not supported"),
        ("include", json!([[]]), "is not supported"),
        (
            "top_logprobs",
            json!([0]),
            "is not supported here: use /v1/chat/completions",
        ),
        (
            "prompt",
            json!([]),
            "is not supported: there are no stored prompts",
        ),
        (
            "max_tool_calls",
            json!([]),
            "is not supported: there are no tools of the server's own",
        ),
    ] {
        fields.only(name, accepted.as_array().map_or(&[], Vec::as_slice), reason)?;
    }
    if let Some(mut options) = fields.object("stream_options")? {
        options.only("include_obfuscation", &[false.into()], "is not supported")?;
        options.finish()?;
    }
    Ok(())
}

/// Reads a request.
pub(super) fn ask(mut fields: Fields, model: &Model) -> Result<Ask, Refusal> {
    let echo = echoed(&fields);
    refuse_others(&mut fields)?;
    let mut messages = Vec::new();
    if let Some(text) = fields.text("instructions")? {
        messages.push(json!({ "role": "system", "content": text }));
    }
    match fields.take("input") {
        Some(Value::String(text)) => messages.push(json!({ "role": "user", "content": text })),
        Some(Value::Array(items)) if !items.is_empty() => {
            for (index, item) in items.into_iter().enumerate() {
                read_item(&mut messages, index, item)?;
            }
        }
        _ => {
            return Err(fields.refuse(
                "input",
                "must be a text or a list of items that is not empty",
            ));
        }
    }
    let conversation = Conversation {
        messages,
        tools: tools(&mut fields)?,
        format: format(&mut fields)?,
        ..Conversation::default()
    };
    let settings = Settings::read(&mut fields, model)?;
    let max_tokens = fields.count("max_output_tokens", 1, i32::MAX as usize)?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    fields.finish()?;
    let prepared = conversation.prepare(model)?;
    Ok(Ask {
        job: Job {
            prompts: vec![prepared.prompt],
            choices: 1,
            settings,
            max_tokens,
            logprobs: None,
            prompt_logprobs: None,
            grammar: prepared.grammar,
            thinking: None,
            dialect: prepared.dialect,
        },
        stream,
        echo,
    })
}

/// Takes over an item of the input: a message, a call, or its result.
fn read_item(messages: &mut Vec<Value>, index: usize, item: Value) -> Result<(), Refusal> {
    let mut item = Fields::inside(format!("input[{index}]"), item)?;
    let name = item.text("type")?.unwrap_or_else(|| "message".into());
    item.text("id")?;
    item.text("status")?;
    match name.as_str() {
        "message" => {
            let role = item.need_text("role")?;
            if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
                return Err(item.refuse(
                    "role",
                    format!("must be user, assistant, system or developer, not {role:?}"),
                ));
            }
            let content = content(&mut item)?;
            messages.push(json!({ "role": role, "content": content }));
        }
        "function_call" => {
            let arguments = item.text("arguments")?.unwrap_or_default();
            let arguments = match serde_json::from_str(&arguments) {
                Ok(Value::Object(object)) => Value::Object(object),
                _ => arguments.into(),
            };
            let call = json!({
                "id": item.text("call_id")?,
                "type": "function",
                "function": { "name": item.need_text("name")?, "arguments": arguments },
            });
            // Calls belong to the answer before them.
            match messages.last_mut() {
                Some(last) if last["role"] == "assistant" => {
                    match last["tool_calls"].as_array_mut() {
                        Some(calls) => calls.push(call),
                        None => last["tool_calls"] = json!([call]),
                    }
                }
                _ => messages
                    .push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
            }
        }
        "function_call_output" => {
            let id = item.need_text("call_id")?;
            let output = item.need_text("output")?;
            messages.push(json!({ "role": "tool", "tool_call_id": id, "content": output }));
        }
        other => return Err(item.refuse("type", format!("{other} is not supported"))),
    }
    item.finish()
}

fn content(item: &mut Fields) -> Result<String, Refusal> {
    let parts = match item.take("content") {
        Some(Value::String(text)) => return Ok(text),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            let problem = format!("must be a string or a list of parts, not {}", kind(&other));
            return Err(item.refuse("content", problem));
        }
        None => return Err(item.refuse("content", "is missing")),
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::inside(item.path(&format!("content[{index}]")), part)?;
        match part.need_text("type")?.as_str() {
            "input_text" | "output_text" | "text" => text += &part.need_text("text")?,
            "refusal" => text += &part.need_text("refusal")?,
            other => {
                return Err(part.refuse(
                    "type",
                    format!("{other} is not supported: this model reads text"),
                ));
            }
        }
        part.list("annotations")?;
        part.list("logprobs")?;
        part.finish()?;
    }
    Ok(text)
}

fn tools(fields: &mut Fields) -> Result<Tools, Refusal> {
    let mut list = Vec::new();
    for (index, tool) in fields
        .list("tools")?
        .unwrap_or_default()
        .into_iter()
        .enumerate()
    {
        let mut tool = Fields::inside(format!("tools[{index}]"), tool)?;
        let kind = tool.need_text("type")?;
        if kind != "function" {
            return Err(tool.refuse(
                "type",
                format!("{kind} is not supported: only functions are"),
            ));
        }
        list.push(Tool::read(&mut tool, "parameters")?);
        tool.finish()?;
    }
    let choice = match fields.take("tool_choice") {
        None => None,
        Some(Value::String(word)) => {
            let choice = choice_word(&word);
            Some(choice.ok_or_else(|| {
                fields.refuse(
                    "tool_choice",
                    format!("must be auto, none, required or a function, not {word:?}"),
                )
            })?)
        }
        Some(object) => {
            let mut choice = Fields::inside("tool_choice", object)?;
            choice.only("type", &["function".into()], "must be \"function\"")?;
            let name = choice.need_text("name")?;
            choice.finish()?;
            Some(ToolChoice::Named(name))
        }
    };
    let parallel = fields.bool("parallel_tool_calls")?;
    Tools::new(list, choice, parallel)
}

fn format(fields: &mut Fields) -> Result<Format, Refusal> {
    let Some(mut text) = fields.object("text")? else {
        return Ok(Format::Text);
    };
    text.only("verbosity", &["medium".into()], "is not supported")?;
    let format = match text.object("format")? {
        None => Format::Text,
        Some(mut format) => {
            let found = match format.need_text("type")?.as_str() {
                "text" => Format::Text,
                "json_object" => Format::Json(json!({ "type": "object" }), "text.format"),
                "json_schema" => Format::named_schema(&mut format, "text.format.schema")?,
                other => {
                    return Err(format.refuse(
                        "type",
                        format!("must be text, json_object or json_schema, not {other:?}"),
                    ));
                }
            };
            format.finish()?;
            found
        }
    };
    text.finish()?;
    Ok(format)
}
