//! A conversation on its way to a prompt: messages, tools, the form of the answer.

use crate::app::{Model, unix_now};
use crate::fields::{Fields, kind};
use crate::grammar::Grammar;
use crate::refusal::Refusal;
use crate::thoughts::Thinking;
use crate::tools::{Dialect, Tools};
use serde_json::{Map, Value, json};
use windlass_model::{ChatError, ChatOptions, ChatTemplate, LocalTime};

/// The most messages of a conversation.
const MAX_MESSAGES: usize = 4096;

/// What the text of an answer must look like.
#[derive(Clone, Debug, Default)]
pub(crate) enum Format {
    /// Nothing in particular.
    #[default]
    Text,
    /// JSON of a schema; the field that it came in.
    Json(Value, &'static str),
    /// What a regular expression matches.
    Regex(String),
    /// What a grammar allows, in Lark's notation.
    Lark(String),
}

impl Format {
    /// Reads `response_format`, and the fields `guided_json`, `guided_regex` and `guided_grammar`.
    pub fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let mut formats = Vec::new();
        if let Some(mut format) = fields.object("response_format")? {
            match format.need_text("type")?.as_str() {
                "text" => {}
                "json_object" => {
                    formats.push(Format::Json(json!({ "type": "object" }), "response_format"))
                }
                "json_schema" => {
                    let Some(mut wrapped) = format.object("json_schema")? else {
                        return Err(format.refuse("json_schema", "is missing"));
                    };
                    formats.push(Format::named_schema(
                        &mut wrapped,
                        "response_format.json_schema.schema",
                    )?);
                    wrapped.finish()?;
                }
                other => {
                    return Err(format.refuse(
                        "type",
                        format!("must be text, json_object or json_schema, not {other:?}"),
                    ));
                }
            }
            format.finish()?;
        }
        if let Some(schema) = fields.take("guided_json") {
            formats.push(Format::Json(schema, "guided_json"));
        }
        if let Some(pattern) = fields.text("guided_regex")? {
            formats.push(Format::Regex(pattern));
        }
        if let Some(grammar) = fields.text("guided_grammar")? {
            formats.push(Format::Lark(grammar));
        }
        if formats.len() > 1 {
            return Err(Refusal::field(
                "response_format",
                "an answer has one format: give one of response_format, guided_json, guided_regex, guided_grammar",
            ));
        }
        Ok(formats.pop().unwrap_or_default())
    }

    /// A schema with a name, as `response_format` and Responses have it. Every answer follows its schema, strict or not.
    pub fn named_schema(fields: &mut Fields, param: &'static str) -> Result<Self, Refusal> {
        let name = fields.need_text("name")?;
        let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if !(1..=64).contains(&name.len()) || !name.chars().all(letter) {
            return Err(fields.refuse("name", "must be 1 to 64 letters, digits, `_` or `-`"));
        }
        fields.text("description")?;
        fields.bool("strict")?;
        match fields.take("schema") {
            Some(schema) => Ok(Format::Json(schema, param)),
            None => Err(fields.refuse("schema", "is missing")),
        }
    }
}

/// A conversation that waits for an answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conversation {
    /// As templates know them: role, content, tool calls.
    pub messages: Vec<Value>,
    pub tools: Tools,
    pub format: Format,
    /// More variables for the template.
    pub variables: Map<String, Value>,
    /// What the answer begins with.
    pub prefill: String,
}

/// What a conversation comes to.
pub(crate) struct Prepared {
    pub prompt: Vec<u32>,
    pub grammar: Option<Grammar>,
    pub dialect: Option<Dialect>,
    /// Where the answer begins, if it may think.
    pub thinking: Option<Thinking>,
}

impl Conversation {
    /// Reads `messages`, tools and formats of a chat request.
    pub fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let messages = fields.list("messages")?;
        let Some(messages) = messages.filter(|messages| !messages.is_empty()) else {
            return Err(fields.refuse("messages", "at least one message is needed"));
        };
        if messages.len() > MAX_MESSAGES {
            return Err(fields.refuse("messages", format!("at most {MAX_MESSAGES}")));
        }
        let messages = messages.into_iter().enumerate();
        let messages = messages.map(|(index, message)| read_message(index, message));
        let variables = fields.object("chat_template_kwargs")?;
        Ok(Conversation {
            messages: messages.collect::<Result<_, _>>()?,
            tools: Tools::read(fields)?,
            format: Format::read(fields)?,
            variables: variables.map(Fields::rest).unwrap_or_default(),
            prefill: String::new(),
        })
    }

    /// The template that is for it.
    fn template<'a>(&self, model: &'a Model) -> Option<&'a ChatTemplate> {
        let special = model.tool_template.as_ref();
        let special = special.filter(|_| self.tools.is_offered());
        let own = model.own_template.as_ref();
        own.or(special).or(model.template.as_ref())
    }

    /// The text that the model continues.
    pub fn render(&self, model: &Model) -> Result<String, Refusal> {
        let offered = self.tools.is_offered();
        let Some(template) = self.template(model) else {
            return Err(Refusal::invalid(
                "this model has no chat template: use /v1/completions, or start the server with --template FILE",
            ));
        };
        let source = template.source();
        let mut messages = self.messages.clone();
        if !source.contains("developer") {
            for message in &mut messages {
                if message["role"] == "developer" {
                    message["role"] = "system".into();
                }
            }
        }
        let known = source.contains(Dialect::Marked.open()) && source.contains("tools");
        if !known {
            messages = without_tools(messages);
            if offered {
                tell(&mut messages, &self.tools.told());
            }
        }
        let options = ChatOptions {
            add_generation_prompt: true,
            tools: (offered && known).then(|| self.tools.declarations()),
            now: Some(LocalTime::from_unix(unix_now() as i64)),
            variables: self.variables.clone(),
        };
        let text = template
            .render(&messages, &options)
            .map_err(|error| match error {
                // The template's author or the conversation's: both come from outside.
                ChatError::Refused { .. } | ChatError::Failed { .. } => {
                    Refusal::field("messages", error.to_string())
                }
                other => Refusal::internal(other.to_string()),
            })?;
        Ok(text + &self.prefill)
    }

    /// Prompt, grammar, and how to read the answer.
    pub fn prepare(&self, model: &Model) -> Result<Prepared, Refusal> {
        let text = self.render(model)?;
        let prompt = model.tokenizer.encode(&text, false);
        let prompt = prompt.map_err(|error| Refusal::invalid(error.to_string()))?;
        let offered = self.tools.is_offered();
        let grammars = &model.grammars;
        let schema = match &self.format {
            Format::Json(schema, _) => Some(schema),
            Format::Regex(_) | Format::Lark(_) if offered => {
                return Err(Refusal::field(
                    "tools",
                    "cannot be combined with guided_regex or guided_grammar",
                ));
            }
            _ => None,
        };
        let calls = match offered {
            true => self.tools.grammar(grammars, schema),
            false => None,
        };
        let grammar = match (calls, &self.format) {
            (Some(lark), _) => Some(grammars.lark("tools", &lark)?),
            (None, Format::Text) => None,
            (None, Format::Json(schema, param)) => Some(grammars.json_schema(param, schema)?),
            (None, Format::Regex(pattern)) => Some(grammars.regex("guided_regex", pattern)?),
            (None, Format::Lark(grammar)) => Some(grammars.lark("guided_grammar", grammar)?),
        };
        // What must have a form has no room for thoughts.
        let template = self.template(model).filter(|_| grammar.is_none());
        Ok(Prepared {
            thinking: template.and_then(|template| Thinking::begin(template.source(), &text)),
            prompt,
            grammar,
            dialect: offered.then_some(Dialect::Marked),
        })
    }
}

/// A message of a chat request, checked.
fn read_message(index: usize, message: Value) -> Result<Value, Refusal> {
    let mut fields = Fields::inside(format!("messages[{index}]"), message)?;
    let role = fields.need_text("role")?;
    let mut message = Map::new();
    let known = [
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
        "function",
    ];
    if !known.contains(&role.as_str()) {
        return Err(fields.refuse(
            "role",
            format!("must be one of {}, not {role:?}", known.join(", ")),
        ));
    }
    let content = content(&mut fields)?;
    let calls = match role.as_str() {
        "assistant" => tool_calls(&mut fields)?,
        _ => None,
    };
    if content.is_none() && calls.is_none() && role != "assistant" {
        return Err(fields.refuse("content", "is missing"));
    }
    let role = if role == "function" {
        "tool".to_owned()
    } else {
        role
    };
    message.insert("role".into(), role.clone().into());
    message.insert("content".into(), content.unwrap_or_default().into());
    if let Some(calls) = calls {
        message.insert("tool_calls".into(), calls.into());
    }
    if role == "assistant" {
        for name in ["reasoning_content", "refusal"] {
            if let Some(text) = fields.text(name)? {
                message.insert(name.into(), text.into());
            }
        }
        fields.only("audio", &[], "is not supported")?;
    }
    for name in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(name)? {
            message.insert(name.into(), text.into());
        }
    }
    fields.finish()?;
    Ok(Value::Object(message))
}

/// Text, or parts of text.
fn content(fields: &mut Fields) -> Result<Option<String>, Refusal> {
    let parts = match fields.take("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => {
            return Err(fields.refuse(
                "content",
                format!("must be a string or a list of parts, not {}", kind(&other)),
            ));
        }
    };
    let mut text = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::inside(fields.path(&format!("content[{index}]")), part)?;
        match part.need_text("type")?.as_str() {
            "text" => text += &part.need_text("text")?,
            "refusal" => text += &part.need_text("refusal")?,
            other => {
                return Err(part.refuse(
                    "type",
                    format!("{other} is not supported: this model reads text"),
                ));
            }
        }
        part.finish()?;
    }
    Ok(Some(text))
}

/// Calls of an earlier answer, with arguments as objects, as templates want them.
fn tool_calls(fields: &mut Fields) -> Result<Option<Vec<Value>>, Refusal> {
    let Some(list) = fields.list("tool_calls")? else {
        return Ok(None);
    };
    let mut calls = Vec::new();
    for (index, call) in list.into_iter().enumerate() {
        let mut call = Fields::inside(fields.path(&format!("tool_calls[{index}]")), call)?;
        call.only("type", &["function".into()], "must be \"function\"")?;
        let id = call.text("id")?;
        call.take("index");
        let Some(mut function) = call.object("function")? else {
            return Err(call.refuse("function", "is missing"));
        };
        let name = function.need_text("name")?;
        let arguments = match function.take("arguments") {
            Some(Value::String(text)) => match serde_json::from_str(&text) {
                Ok(Value::Object(object)) => Value::Object(object),
                _ if text.trim().is_empty() => json!({}),
                _ => Value::String(text),
            },
            Some(Value::Object(object)) => Value::Object(object),
            None => json!({}),
            Some(_) => return Err(function.refuse("arguments", "must be a string of JSON")),
        };
        function.finish()?;
        call.finish()?;
        calls.push(json!({
            "id": id,
            "type": "function",
            "function": { "name": name, "arguments": arguments },
        }));
    }
    Ok(Some(calls).filter(|calls| !calls.is_empty()))
}

/// Calls and their results as plain text, for templates that know neither.
fn without_tools(messages: Vec<Value>) -> Vec<Value> {
    let mut plain: Vec<Value> = Vec::new();
    for mut message in messages {
        if let Some(calls) = message.as_object_mut().and_then(|m| m.remove("tool_calls")) {
            let mut text = message["content"].as_str().unwrap_or("").to_owned();
            for call in calls.as_array().into_iter().flatten() {
                let call = &call["function"];
                let call = json!({ "name": call["name"], "arguments": call["arguments"] });
                let line = if text.is_empty() { "" } else { "\n" };
                text += &format!("{line}<tool_call>\n{call}\n</tool_call>");
            }
            message["content"] = text.into();
        }
        if message["role"] == "tool" {
            let result = message["content"].as_str().unwrap_or("");
            let text = format!("<tool_response>\n{result}\n</tool_response>");
            // Results follow one another; templates want user and assistant in turn.
            match plain.last_mut() {
                Some(last) if last["role"] == "user" && last["results"] == true => {
                    let before = last["content"].as_str().unwrap_or("");
                    last["content"] = format!("{before}\n{text}").into();
                }
                _ => plain.push(json!({ "role": "user", "content": text, "results": true })),
            }
            continue;
        }
        plain.push(message);
    }
    plain
}

/// Adds to the system message, or begins with one.
fn tell(messages: &mut Vec<Value>, text: &str) {
    match messages.first_mut() {
        Some(first) if first["role"] == "system" => {
            let before = first["content"].as_str().unwrap_or("");
            first["content"] = format!("{before}\n\n{text}").into();
        }
        _ => messages.insert(0, json!({ "role": "system", "content": text })),
    }
}
