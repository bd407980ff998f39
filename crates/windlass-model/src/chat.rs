//! Chat templates: a conversation as the text that a model was trained to continue.
//!
//! Templates are written in Jinja, for Python. They are run by `minijinja` with what Hugging Face's `transformers` gives
//! them: its functions, its way to write JSON, its handling of white space. A template is a program from a file, so its
//! steps are limited. Nothing here reads a clock: a template that asks for the date gets the caller's.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value as Item};
use serde_json::{Map, Value};
use std::ops::Range;
use thiserror::Error;

use crate::Tokenizer;

mod python;
mod time;

pub use time::LocalTime;

/// Steps that a template may take; the longest conversations need thousands.
const STEPS: u64 = 50_000_000;

/// What can go wrong with a chat template.
#[derive(Debug, Error)]
pub enum ChatError {
    /// The template itself is not valid.
    #[error("the chat template is not valid: {reason}")]
    Syntax {
        /// The parser's reason, with the line.
        reason: String,
    },
    /// The template failed on this conversation.
    #[error("the chat template failed: {reason}")]
    Failed {
        /// The engine's reason, with the line.
        reason: String,
    },
    /// The template refused the conversation (`raise_exception`).
    #[error("the chat template refuses this conversation: {message}")]
    Refused {
        /// The template's own words.
        message: String,
    },
    /// The template asks for the date, and the caller gave none.
    #[error("the chat template asks for the date (strftime_now), but none was given")]
    NoClock,
}

impl ChatError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Syntax { .. } | Self::Failed { .. } => {
                "give a template of your own with --template FILE"
            }
            Self::Refused { .. } => {
                "most templates want messages of user and assistant in turn, and some no system message"
            }
            Self::NoClock => "give the date with the conversation",
        };
        Some(text.to_owned())
    }
}

/// What a template is told besides the messages.
#[derive(Clone, Debug, Default)]
pub struct ChatOptions {
    /// Whether the text ends where the model's answer begins.
    pub add_generation_prompt: bool,
    /// Tools that the model may call, each a JSON object as in OpenAI's requests.
    pub tools: Option<Vec<Value>>,
    /// The time now, for templates that write the date.
    pub now: Option<LocalTime>,
    /// More variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` and so on.
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Compiles a template. `tokens` are the special tokens that it may write, by the names it knows them by
    /// (`bos_token`, `eos_token`).
    ///
    /// # Errors
    /// [`ChatError::Syntax`].
    pub fn new(source: &str, tokens: Vec<(String, String)>) -> Result<Self, ChatError> {
        let mut environment = environment();
        for (name, marked) in [("template", false), ("marked", true)] {
            environment
                .add_template_owned(name, without_generation_tags(source, marked))
                .map_err(|error| ChatError::Syntax {
                    reason: error.to_string(),
                })?;
        }
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
            tokens,
        })
    }

    /// The template that came with a tokenizer, `None` if none did. Where there is one of its own for tools, it is
    /// taken when `with_tools` says so.
    ///
    /// # Errors
    /// [`ChatError::Syntax`].
    pub fn of(tokenizer: &Tokenizer, with_tools: bool) -> Result<Option<Self>, ChatError> {
        let source = tokenizer.chat_template(with_tools);
        let template = source.map(|source| Self::new(&source, tokenizer.special_tokens()));
        template.transpose()
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. A message is an object with `role` and `content`, and what else the template knows
    /// (`tool_calls`, `reasoning_content`).
    ///
    /// The text has the special tokens in it that the model wants, so it is to be encoded without adding any.
    ///
    /// # Errors
    /// [`ChatError::Refused`] in the template's words, [`ChatError::Failed`], [`ChatError::NoClock`].
    pub fn render(&self, messages: &[Value], options: &ChatOptions) -> Result<String, ChatError> {
        self.run("template", messages, options)
    }

    /// Whether the template marks what the assistant says (`{% generation %}`).
    pub fn marks_answers(&self) -> bool {
        without_generation_tags(&self.source, true) != without_generation_tags(&self.source, false)
    }

    /// As [`ChatTemplate::render`], with the places of what the template marks as the assistant's words, in bytes.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_marked(
        &self,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let marked = self.run("marked", messages, options)?;
        let (mut text, mut answers) = (String::with_capacity(marked.len()), Vec::new());
        let mut begin = None;
        for piece in marked.split_inclusive([BEGIN, END]) {
            let words = piece.trim_end_matches([BEGIN, END]);
            text += words;
            match piece[words.len()..].chars().next() {
                Some(BEGIN) => begin = Some(text.len()),
                Some(_) => answers.extend(begin.take().map(|start| start..text.len())),
                None => {}
            }
        }
        Ok((text, answers))
    }

    fn run(
        &self,
        name: &str,
        messages: &[Value],
        options: &ChatOptions,
    ) -> Result<String, ChatError> {
        let mut variables: Vec<(&str, Item)> = Vec::new();
        for (name, token) in &self.tokens {
            variables.push((name, token.as_str().into()));
        }
        let list = |values: &[Value]| values.iter().map(python::from_json).collect::<Item>();
        let tools = options.tools.as_deref().map_or(Item::from(()), list);
        variables.push(("messages", list(messages)));
        variables.push(("tools", tools));
        variables.push(("documents", Item::from(())));
        variables.push((
            "add_generation_prompt",
            options.add_generation_prompt.into(),
        ));
        for (name, value) in &options.variables {
            variables.push((name, python::from_json(value)));
        }
        let now = options.now;
        variables.push((
            "strftime_now",
            Item::from_function(move |format: &str| time::strftime(now, format)),
        ));
        let template = self.environment.get_template(name);
        let text = template.and_then(|template| template.render(Item::from_pairs(variables)));
        text.map_err(|error| explain(&error))
    }
}

/// The engine, set up as `transformers` sets up Jinja.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    environment.set_syntax(syntax.build().expect("the usual marks"));
    environment.set_fuel(Some(STEPS));
    environment.set_formatter(python::print);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", python::string);
    environment.add_function("raise_exception", |message: &str| {
        let error = minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, "refused");
        Err::<Item, _>(error.with_source(ChatError::Refused {
            message: message.to_owned(),
        }))
    });
    environment
}

/// The error that a function of ours left, or the engine's own.
fn explain(error: &minijinja::Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        match inner.downcast_ref::<ChatError>() {
            Some(ChatError::Refused { message }) => {
                let message = message.clone();
                return ChatError::Refused { message };
            }
            Some(ChatError::NoClock) => return ChatError::NoClock,
            _ => cause = inner.source(),
        }
    }
    ChatError::Failed {
        reason: error.to_string(),
    }
}

/// What is written where an answer begins, and where it ends: characters that no text has.
const BEGIN: char = '\u{f8f0}';
const END: char = '\u{f8f1}';

/// The template with `{% generation %}` blocks as plain blocks: they mark answers for training, and write nothing, or
/// where `marked` says so, a character at each end. The last tag is a block in any case, as white space asks for.
fn without_generation_tags(source: &str, marked: bool) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, inside)) = rest.split_once("{%") {
        let Some((tag, after)) = inside.split_once("%}") else {
            break;
        };
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" if marked => Some(format!("if true %}}{{% if true %}}{BEGIN}{{% endif")),
            "endgeneration" if marked => Some(format!("if true %}}{END}{{% endif %}}{{% endif")),
            "generation" => Some("if true".to_owned()),
            "endgeneration" => Some("endif".to_owned()),
            _ => None,
        };
        text += before;
        text += "{%";
        match replacement {
            Some(other) => text += &tag.replacen(word, &other, 1),
            None => text += tag,
        }
        text += "%}";
        rest = after;
    }
    text + rest
}

impl Tokenizer {
    /// The chat template that came with the tokenizer, as it is written. Of several named ones it is `default`, or
    /// `tool_use` where there is one and `with_tools` asks for it.
    pub fn chat_template(&self, with_tools: bool) -> Option<String> {
        if let Some(vocabulary) = self.vocabulary() {
            return vocabulary.chat_template.clone();
        }
        let file = |wanted: &str| self.files().find(|(name, _)| *name == wanted);
        if let Some((_, template)) = file("chat_template.jinja") {
            return String::from_utf8(template.to_vec()).ok();
        }
        match &self.config()?["chat_template"] {
            Value::String(template) => Some(template.clone()),
            Value::Array(named) => {
                let find = |name: &str| named.iter().find(|entry| entry["name"] == name);
                let special = with_tools.then(|| find("tool_use")).flatten();
                let entry = special.or_else(|| find("default"));
                entry?["template"].as_str().map(str::to_owned)
            }
            _ => None,
        }
    }

    /// What `tokenizer_config.json` says, of a tokenizer that came with one.
    fn config(&self) -> Option<Value> {
        if self.vocabulary().is_some() {
            return None;
        }
        let mut files = self.files();
        let (_, config) = files.find(|(name, _)| *name == "tokenizer_config.json")?;
        serde_json::from_slice(config).ok()
    }

    /// The special tokens by the names that chat templates know them by: `bos_token`, `eos_token`, ….
    pub fn special_tokens(&self) -> Vec<(String, String)> {
        let mut tokens = Vec::new();
        if let Some(config) = self.config() {
            for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"] {
                let name = format!("{name}_token");
                let token = match &config[&name] {
                    Value::String(token) => Some(token.as_str()),
                    other => other["content"].as_str(),
                };
                if let Some(token) = token {
                    tokens.push((name, token.to_owned()));
                }
            }
            return tokens;
        }
        let vocabulary = self.vocabulary();
        for (name, id) in [
            ("bos_token", self.bos()),
            ("eos_token", self.eos().first().copied()),
            (
                "unk_token",
                vocabulary.and_then(|vocabulary| vocabulary.unknown),
            ),
            ("pad_token", self.pad()),
        ] {
            if let Some(token) = id.and_then(|id| self.token(id)) {
                tokens.push((name.to_owned(), token));
            }
        }
        tokens
    }
}

/// A conversation's message of plain text.
pub fn message(role: &str, content: &str) -> Value {
    serde_json::json!({ "role": role, "content": content })
}
