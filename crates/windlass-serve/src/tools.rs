//! Tools that a model may call: their declarations, the choice among them, and what answers must then look like.
//!
//! A call is written as `<tool_call>{"name": …, "arguments": …}</tool_call>`, as most open models are trained to. Where a
//! model's chat template knows nothing of that, the tools are told in the system message.

pub(crate) mod parse;

use crate::fields::Fields;
use crate::grammar::{Grammars, with_white_space};
use crate::refusal::Refusal;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// The most tools of a request.
const MAX_TOOLS: usize = 128;
/// The most calls of an answer that must call.
const MAX_CALLS: usize = 16;

/// How calls are written in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// Between `<tool_call>` and `</tool_call>`.
    Marked,
}

impl Dialect {
    pub fn open(self) -> &'static str {
        match self {
            Dialect::Marked => "<tool_call>",
        }
    }

    pub fn close(self) -> &'static str {
        match self {
            Dialect::Marked => "</tool_call>",
        }
    }
}

/// A function that the model may call.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// The JSON schema of its arguments.
    pub parameters: Value,
    /// Whether arguments must follow the schema also where the model chooses to call.
    pub strict: bool,
}

impl Tool {
    /// Reads `{name, description, parameters, strict}`.
    pub fn read(fields: &mut Fields, parameters: &str) -> Result<Self, Refusal> {
        let name = fields.need_text("name")?;
        if !is_name(&name) {
            return Err(fields.refuse("name", "must be 1 to 64 letters, digits, `_`, `-` or `.`"));
        }
        let schema = fields.take(parameters);
        if schema.as_ref().is_some_and(|schema| !schema.is_object()) {
            return Err(fields.refuse(parameters, "must be a JSON schema, an object"));
        }
        Ok(Tool {
            name,
            description: fields.text("description")?,
            parameters: schema.unwrap_or_else(|| json!({ "type": "object", "properties": {} })),
            strict: fields.bool("strict")?.unwrap_or(false),
        })
    }

    /// The tool as templates know it.
    pub fn declaration(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.clone().into());
        if let Some(description) = &self.description {
            function.insert("description".into(), description.clone().into());
        }
        function.insert("parameters".into(), self.parameters.clone());
        json!({ "type": "function", "function": function })
    }
}

fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    (1..=64).contains(&name.len()) && name.chars().all(letter)
}

/// Whether and what to call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// Nothing.
    None,
    /// At least one tool.
    Required,
    /// This tool.
    Named(String),
}

/// The tools of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tools {
    pub list: Vec<Tool>,
    pub choice: ToolChoice,
    /// Whether an answer may have several calls.
    pub parallel: bool,
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls` of chat requests.
    pub fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let mut list = Vec::new();
        for (index, tool) in fields
            .list("tools")?
            .unwrap_or_default()
            .into_iter()
            .enumerate()
        {
            let at = fields.path(&format!("tools[{index}]"));
            let mut tool = Fields::inside(at, tool)?;
            tool.only("type", &["function".into()], "must be \"function\"")?;
            let Some(mut function) = tool.object("function")? else {
                return Err(tool.refuse("function", "is missing"));
            };
            list.push(Tool::read(&mut function, "parameters")?);
            function.finish()?;
            tool.finish()?;
        }
        let choice = match fields.take("tool_choice") {
            None => None,
            Some(Value::String(word)) => Some(choice_word(&word).ok_or_else(|| {
                fields.refuse(
                    "tool_choice",
                    format!("must be auto, none, required or a function, not {word:?}"),
                )
            })?),
            Some(object) => {
                let mut choice = Fields::inside(fields.path("tool_choice"), object)?;
                choice.only("type", &["function".into()], "must be \"function\"")?;
                let Some(mut function) = choice.object("function")? else {
                    return Err(choice.refuse("function", "is missing"));
                };
                let name = function.need_text("name")?;
                function.finish()?;
                choice.finish()?;
                Some(ToolChoice::Named(name))
            }
        };
        let parallel = fields.bool("parallel_tool_calls")?;
        Tools::new(list, choice, parallel)
    }

    /// Tools and a choice that fit together.
    pub fn new(
        list: Vec<Tool>,
        choice: Option<ToolChoice>,
        parallel: Option<bool>,
    ) -> Result<Self, Refusal> {
        if list.len() > MAX_TOOLS {
            return Err(Refusal::field("tools", format!("at most {MAX_TOOLS}")));
        }
        for (index, tool) in list.iter().enumerate() {
            if list[..index].iter().any(|other| other.name == tool.name) {
                return Err(Refusal::field(
                    "tools",
                    format!("two have the name {:?}", tool.name),
                ));
            }
        }
        match &choice {
            Some(ToolChoice::Named(name)) if !list.iter().any(|tool| tool.name == *name) => {
                return Err(Refusal::field(
                    "tool_choice",
                    format!("{name:?} is none of the tools"),
                ));
            }
            Some(ToolChoice::Required) if list.is_empty() => {
                return Err(Refusal::field("tool_choice", "there are no tools"));
            }
            _ => {}
        }
        Ok(Tools {
            list,
            choice: choice.unwrap_or_default(),
            parallel: parallel.unwrap_or(true),
        })
    }

    /// Whether the model is told of tools.
    pub fn is_offered(&self) -> bool {
        !self.list.is_empty() && self.choice != ToolChoice::None
    }

    /// The declarations that a template is given.
    pub fn declarations(&self) -> Vec<Value> {
        self.list.iter().map(Tool::declaration).collect()
    }

    /// What a model is told whose template knows nothing of tools.
    pub fn told(&self) -> String {
        let mut text = String::from(
            "You can call functions. Each line describes one, with the JSON schema of its parameters:\n",
        );
        for tool in &self.list {
            let _ = writeln!(text, "{}", tool.declaration()["function"]);
        }
        text += "To call one, write nothing but\n<tool_call>\n{\"name\": \"its name\", \"arguments\": {its arguments}}\n</tool_call>";
        text
    }

    /// What answers must look like, in Lark's notation; `None` when they are free. `format` is the JSON schema of answers
    /// that call nothing, where there is one.
    pub fn grammar(&self, grammars: &Grammars, format: Option<&Value>) -> Option<String> {
        let callable: Vec<&Tool> = match &self.choice {
            ToolChoice::None => return None,
            ToolChoice::Named(name) => self.list.iter().filter(|tool| tool.name == *name).collect(),
            _ => self.list.iter().collect(),
        };
        let (open, close) = (Dialect::Marked.open(), Dialect::Marked.close());
        let mark = |mark: &str| match grammars.is_control(mark) {
            true => mark.to_owned(),
            false => Value::from(mark).to_string(),
        };
        let mut text = String::new();
        text += match (&self.choice, format) {
            (ToolChoice::Auto, None) if !callable.iter().any(|tool| tool.strict) => return None,
            (ToolChoice::Auto, None) => {
                // The text before a call ends with its mark, so a control token cannot be part of it.
                if grammars.is_control(open) {
                    "start: TEXT | TEXT? calls\nTEXT: /(.|\\n)+/\n"
                } else {
                    "start: TEXT | lead first more\nTEXT: /(.|\\n)*/\nlead[lazy]: /(.|\\n)*<tool_call>/\n"
                }
            }
            (ToolChoice::Auto, Some(_)) => "start: answer | calls\n",
            _ => "start: calls\n",
        };
        if let Some(format) = format {
            let _ = writeln!(text, "answer: %json {}", with_white_space(format));
        }
        let most = if self.parallel { MAX_CALLS - 1 } else { 0 };
        let bodies: Vec<String> = (0..callable.len())
            .map(|index| format!("call_{index}"))
            .collect();
        let _ = writeln!(text, "calls: {} first more", mark(open));
        let _ = writeln!(
            text,
            "first: \"\\n\" ({}) \"\\n\" {}",
            bodies.join(" | "),
            mark(close)
        );
        let _ = match most {
            0 => writeln!(text, "more: \"\""),
            _ => writeln!(
                text,
                "more: (\"\\n\" calls_one){{0,{most}}}\ncalls_one: {} first",
                mark(open)
            ),
        };
        for (index, tool) in callable.iter().enumerate() {
            let head = format!(
                "{{\"name\": {}, \"arguments\": ",
                Value::from(tool.name.as_str())
            );
            let _ = writeln!(
                text,
                "call_{index}: {} arguments_{index} \"}}\"",
                Value::from(head)
            );
            let _ = writeln!(
                text,
                "arguments_{index}: %json {}",
                with_white_space(&tool.parameters)
            );
        }
        Some(text)
    }
}

/// A choice by a word.
pub(crate) fn choice_word(word: &str) -> Option<ToolChoice> {
    match word {
        "auto" => Some(ToolChoice::Auto),
        "none" => Some(ToolChoice::None),
        "required" => Some(ToolChoice::Required),
        _ => None,
    }
}
