//! Anthropic's messages as conversations.

use crate::conversation::{Conversation, Format};
use crate::fields::{Fields, kind};
use crate::refusal::Refusal;
use crate::tools::{Tool, ToolChoice, Tools};
use serde_json::{Value, json};

/// Reads `system`, `messages`, `tools` and `tool_choice`.
pub(super) fn conversation(fields: &mut Fields) -> Result<Conversation, Refusal> {
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        let text = text_of(fields.path("system"), system)?;
        messages.push(json!({ "role": "system", "content": text }));
    }
    let list = fields.list("messages")?;
    let Some(list) = list.filter(|list| !list.is_empty()) else {
        return Err(fields.refuse("messages", "at least one message is needed"));
    };
    for (index, message) in list.into_iter().enumerate() {
        read_message(&mut messages, index, message)?;
    }
    // An answer at the end is the beginning of the one that is wanted.
    let last = messages.last();
    let begun =
        last.is_some_and(|last| last["role"] == "assistant" && last["tool_calls"].is_null());
    let mut prefill = String::new();
    if begun && let Some(last) = messages.pop() {
        prefill = last["content"].as_str().unwrap_or("").to_owned();
    }
    if let Some(mut thinking) = fields.object("thinking")? {
        thinking.only(
            "type",
            &["disabled".into()],
            "is not supported: leave it out, or disabled",
        )?;
        thinking.finish()?;
    }
    let mut format = Format::Text;
    if let Some(mut config) = fields.object("output_config")? {
        if let Some(mut wanted) = config.object("format")? {
            wanted.only("type", &["json_schema".into()], "must be json_schema")?;
            let Some(schema) = wanted.take("schema") else {
                return Err(wanted.refuse("schema", "is missing"));
            };
            wanted.finish()?;
            format = Format::Json(schema, "output_config.format.schema");
        }
        config.finish()?;
    }
    fields.take("cache_control");
    Ok(Conversation {
        messages,
        format,
        tools: tools(fields)?,
        prefill,
        ..Conversation::default()
    })
}

/// Text, or blocks of text.
fn text_of(at: String, value: Value) -> Result<String, Refusal> {
    let blocks = match value {
        Value::String(text) => return Ok(text),
        Value::Array(blocks) => blocks,
        other => {
            let problem = format!("must be a string or a list of blocks, not {}", kind(&other));
            return Err(Refusal::field(at, problem));
        }
    };
    let mut text = String::new();
    for (index, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::inside(format!("{at}[{index}]"), block)?;
        block.only(
            "type",
            &["text".into()],
            "must be text: this model reads nothing else",
        )?;
        text += &block.need_text("text")?;
        finish_block(block)?;
    }
    Ok(text)
}

/// What begins alike is kept in memory anyway, so marks for it change nothing.
fn finish_block(mut block: Fields) -> Result<(), Refusal> {
    block.take("cache_control");
    block.only("citations", &[], "is not supported")?;
    block.finish()
}

fn read_message(messages: &mut Vec<Value>, index: usize, message: Value) -> Result<(), Refusal> {
    let mut fields = Fields::inside(format!("messages[{index}]"), message)?;
    let role = fields.need_text("role")?;
    if role != "user" && role != "assistant" {
        return Err(fields.refuse("role", format!("must be user or assistant, not {role:?}")));
    }
    let blocks = match fields.take("content") {
        Some(Value::String(text)) => vec![json!({ "type": "text", "text": text })],
        Some(Value::Array(blocks)) => blocks,
        Some(other) => {
            let problem = format!("must be a string or a list of blocks, not {}", kind(&other));
            return Err(fields.refuse("content", problem));
        }
        None => return Err(fields.refuse("content", "is missing")),
    };
    let (mut text, mut calls, mut results) = (String::new(), Vec::new(), Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        let mut block = Fields::inside(fields.path(&format!("content[{index}]")), block)?;
        match (block.need_text("type")?.as_str(), role.as_str()) {
            ("text", _) => text += &block.need_text("text")?,
            ("tool_use", "assistant") => {
                let input = block.take("input").unwrap_or_else(|| json!({}));
                calls.push(json!({
                    "id": block.text("id")?,
                    "type": "function",
                    "function": { "name": block.need_text("name")?, "arguments": input },
                }));
            }
            ("tool_result", "user") => {
                let content = block.take("content").unwrap_or_else(|| "".into());
                let mut result = text_of(block.path("content"), content)?;
                if block.bool("is_error")?.unwrap_or(false) {
                    result = format!("error: {result}");
                }
                let id = block.need_text("tool_use_id")?;
                results.push(json!({ "role": "tool", "tool_call_id": id, "content": result }));
            }
            // What a model thought before is not told to it again.
            ("thinking" | "redacted_thinking", "assistant") => {
                block.take("thinking");
                block.take("signature");
                block.take("data");
            }
            (other, _) => {
                let problem = format!("{other} is not supported here: this model reads text");
                return Err(block.refuse("type", problem));
            }
        }
        finish_block(block)?;
    }
    fields.finish()?;
    let only_results = !results.is_empty() && text.is_empty();
    messages.append(&mut results);
    if !only_results {
        let mut message = json!({ "role": role, "content": text });
        if !calls.is_empty() {
            message["tool_calls"] = calls.into();
        }
        messages.push(message);
    }
    Ok(())
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
        tool.only(
            "type",
            &["custom".into()],
            "is not supported: only tools of one's own are",
        )?;
        list.push(Tool::read(&mut tool, "input_schema")?);
        finish_block(tool)?;
    }
    let mut parallel = None;
    let mut chosen = None;
    if let Some(mut choice) = fields.object("tool_choice")? {
        chosen = Some(match choice.need_text("type")?.as_str() {
            "auto" => ToolChoice::Auto,
            "any" => ToolChoice::Required,
            "none" => ToolChoice::None,
            "tool" => ToolChoice::Named(choice.need_text("name")?),
            other => {
                return Err(choice.refuse(
                    "type",
                    format!("must be auto, any, tool or none, not {other:?}"),
                ));
            }
        });
        parallel = choice.bool("disable_parallel_tool_use")?.map(|not| !not);
        choice.finish()?;
    }
    Tools::new(list, chosen, parallel)
}
