//! `windlass chat`: a conversation with a model, on a terminal or through a pipe.
//!
//! Every turn renders the whole conversation by the model's template; what the model has read of it in earlier turns
//! is not computed again.

use super::generate::{Clock, print};
use super::sampling::Sampling;
use super::source::{Source, misuse};
use super::{failure, usage};
use anyhow::Result;
use serde_json::{Map, Value};
use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use windlass::infer::{GenerateOptions, Generation, Generator, LoadedModel, Session, StopReason};
use windlass::model::chat::message;
use windlass::model::{ChatError, ChatOptions, ChatTemplate, LocalTime, Tokenizer};

mod input;

use input::{Command, Input};

/// Tokens that a conversation may have when the flag does not say and the model has room for more.
const CONTEXT: usize = 8192;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    system: Option<String>,
    /// Conversation to go on with: a JSON list of messages, as /save writes it
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// File with a chat template (Jinja) instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Variable for the template, such as enable_thinking=false; the value is JSON or text
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// File with the tools that the template tells the model of: a JSON list
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_tokens: usize,
    /// The most tokens of the whole conversation [default: the model's own, at most 8192]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    sampling: Sampling,
}

/// A conversation under way.
struct Chat<'a> {
    args: &'a Args,
    /// The model with all adapters, with each alone, and with none, by their names.
    choices: &'a [(String, LoadedModel)],
    model: &'a LoadedModel,
    template: ChatTemplate,
    session: Session<'a>,
    context: usize,
    tools: Option<Vec<Value>>,
    variables: Map<String, Value>,
    messages: Vec<Value>,
    answers: u64,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<()> {
    options(args, 0).validate().map_err(misuse)?;
    let variables = variables(&args.set)?;
    let tools = match &args.tools {
        Some(file) => Some(read_list(file, "tools")?),
        None => None,
    };
    let messages = match &args.load {
        Some(file) => read_list(file, "messages")?,
        None => Vec::new(),
    };
    let choices = choices(&args.source)?;
    let model = &choices[0].1;
    let tokenizer = model.tokenizer()?;
    let with_tools = tools.is_some();
    let mut adapters = args.source.adapter.iter();
    let of_adapter = adapters.find_map(|(adapter, _)| adapter_template(adapter));
    let template = template(
        tokenizer,
        args.template.as_deref().or(of_adapter.as_deref()),
        with_tools,
        &args.source.model,
    )?;
    let context = context(args, model)?;
    let mut chat = Chat {
        args,
        template,
        session: Session::new(model, context, options(args, 0).prefill_chunk),
        model,
        choices: &choices,
        context,
        tools,
        variables,
        messages,
        answers: 0,
    };
    if let Some(system) = &args.system {
        chat.set_system(system);
    }
    let interactive = std::io::stdin().is_terminal();
    listen_for_interrupts(interactive)?;
    chat.talk(interactive)
}

/// The models to answer with: that with all adapters first. They share the weights.
fn choices(source: &Source) -> Result<Vec<(String, LoadedModel)>> {
    let base = source.base.open()?;
    if source.adapter.is_empty() {
        return Ok(vec![("none".into(), base)]);
    }
    let mut choices = vec![("all".to_owned(), base.with_adapters(&source.adapter)?)];
    if source.adapter.len() > 1 {
        for (index, one) in source.adapter.iter().enumerate() {
            let name = one
                .0
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            let name = name.filter(|name| choices.iter().all(|(other, _)| other != name));
            let name = name.unwrap_or_else(|| (index + 1).to_string());
            choices.push((name, base.with_adapters(std::slice::from_ref(one))?));
        }
    }
    choices.push(("none".into(), base));
    eprintln!("adapters: {}; /adapter NAME chooses", names(&choices));
    Ok(choices)
}

fn names(choices: &[(String, LoadedModel)]) -> String {
    let names: Vec<&str> = choices.iter().map(|(name, _)| name.as_str()).collect();
    names.join(", ")
}

fn options(args: &Args, answer: u64) -> GenerateOptions {
    GenerateOptions {
        sampling: args.sampling.params(),
        max_tokens: args.max_tokens,
        // Every answer draws anew.
        seed: args.sampling.seed.wrapping_add(answer),
        ..Default::default()
    }
}

fn context(args: &Args, model: &LoadedModel) -> Result<usize> {
    let most = model.context();
    match args.context {
        Some(0) => Err(usage("--context 0", "leave room for a conversation")),
        Some(wanted) if wanted > most => Err(usage(
            format!("--context {wanted}"),
            format!("the model has positions for {most} tokens"),
        )),
        Some(wanted) => Ok(wanted),
        None => Ok(most.min(CONTEXT)),
    }
}

fn variables(settings: &[String]) -> Result<Map<String, Value>> {
    let mut variables = Map::new();
    for setting in settings {
        let Some((key, value)) = setting.split_once('=') else {
            let hint = "write KEY=VALUE, such as enable_thinking=false";
            return Err(usage(format!("--set {setting}"), hint));
        };
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        variables.insert(key.to_owned(), value);
    }
    Ok(variables)
}

/// A JSON file with a list of objects.
fn read_list(file: &Path, what: &str) -> Result<Vec<Value>> {
    let text = super::read_text(file)?;
    let list = match serde_json::from_str(&text) {
        Ok(Value::Array(list)) if list.iter().all(Value::is_object) => Some(list),
        _ => None,
    };
    list.ok_or_else(|| {
        let hint = match what {
            "tools" => "such as [{\"type\": \"function\", \"function\": {\"name\": \"…\", \"parameters\": {}}}]",
            _ => "such as [{\"role\": \"user\", \"content\": \"…\"}], as /save writes it",
        };
        failure(format!("{} is no JSON list of {what}", file.display()), hint)
    })
}

/// The template that an adapter was trained with, where its folder has one.
fn adapter_template(adapter: &Path) -> Option<PathBuf> {
    let folders = [
        adapter.to_owned(),
        adapter.join("best"),
        adapter.join("last"),
    ];
    let files = folders.map(|folder| folder.join("chat_template.jinja"));
    files.into_iter().find(|file| file.is_file())
}

/// The template of a file, or the model's own.
pub(super) fn template(
    tokenizer: &Tokenizer,
    file: Option<&Path>,
    with_tools: bool,
    model: &str,
) -> Result<ChatTemplate> {
    if let Some(file) = file {
        let source = super::read_text(file)?;
        return Ok(ChatTemplate::new(&source, tokenizer.special_tokens())?);
    }
    ChatTemplate::of(tokenizer, with_tools)?.ok_or_else(|| {
        let hint = "give one with --template FILE; a model without one may not be made for \
                    conversations: continue texts with windlass generate";
        failure(format!("{model} has no chat template"), hint)
    })
}

/// The text of a conversation; it ends where an answer begins, unless it ends with one.
pub(super) fn render(
    template: &ChatTemplate,
    messages: &[Value],
    tools: Option<&[Value]>,
    variables: &Map<String, Value>,
) -> Result<String, ChatError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let answered = messages
        .last()
        .is_some_and(|last| last["role"] == "assistant");
    let options = ChatOptions {
        add_generation_prompt: !answered,
        tools: tools.map(<[Value]>::to_vec),
        now: now
            .ok()
            .map(|now| LocalTime::from_unix(now.as_secs() as i64)),
        variables: variables.clone(),
    };
    template.render(messages, &options)
}

/// Whether an answer is on its way, which Ctrl-C may stop.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Whether the answer on its way is to stop.
static STOP: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C stop an answer; pressed twice, it ends the program. Between answers it does nothing on a terminal, so that
/// one that comes late is harmless, and ends the program in a pipe.
fn listen_for_interrupts(interactive: bool) -> Result<()> {
    ctrlc::set_handler(move || {
        let answering = ANSWERING.load(Ordering::Relaxed);
        let again = answering && STOP.swap(true, Ordering::Relaxed);
        if again || (!answering && !interactive) {
            eprintln!();
            std::process::exit(130);
        }
        if !answering {
            eprint!("\n/exit or Ctrl-D ends the conversation\n> ");
        }
    })?;
    Ok(())
}

impl Chat<'_> {
    /// Takes messages and commands until there are no more. On a terminal a mistake is said and forgotten; in a pipe it
    /// ends the program.
    fn talk(&mut self, interactive: bool) -> Result<()> {
        if interactive {
            eprintln!(
                "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation"
            );
        }
        let mut lines = std::io::stdin().lock();
        loop {
            let input = match self.read(&mut lines, interactive)? {
                None | Some(Input::Command(Ok(Command::Exit))) => break,
                Some(input) => input,
            };
            let done = match input {
                Input::Message(text) => self.answer(&text),
                Input::Command(Ok(command)) => self.obey(command),
                Input::Command(Err(message)) => Err(usage(
                    message,
                    "/help lists the commands; // begins a message with /",
                )),
            };
            match done {
                Ok(()) => {}
                Err(error) if interactive => {
                    super::report(&error);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&self, lines: &mut dyn BufRead, interactive: bool) -> Result<Option<Input>> {
        let input = input::read(lines, &mut |first| {
            if interactive {
                eprint!("{}", if first { "> " } else { ". " });
            }
        });
        input.map_err(|error| {
            let message = format!("cannot read standard input: {error}");
            failure(message, "pipe in text in UTF-8")
        })
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Help => eprintln!("{}", input::HELP),
            Command::Reset => {
                self.messages.retain(|message| message["role"] == "system");
                eprintln!("the conversation begins anew");
            }
            Command::System(text) => {
                self.set_system(&text);
                eprintln!(
                    "the system message is {}",
                    if text.is_empty() { "gone" } else { "set" }
                );
            }
            Command::Save(file) => {
                let text = format!("{:#}\n", Value::from(self.messages.clone()));
                std::fs::write(&file, text).map_err(|error| {
                    let message = format!("cannot write {}: {error}", file.display());
                    failure(message, "give a file in a folder that can be written to")
                })?;
                eprintln!(
                    "saved {} messages to {}",
                    self.messages.len(),
                    file.display()
                );
            }
            Command::Load(file) => {
                self.messages = read_list(&file, "messages")?;
                eprintln!("loaded {} messages", self.messages.len());
            }
            Command::Adapter(name) => self.choose(&name)?,
            Command::Exit => {}
        }
        Ok(())
    }

    /// Goes on with the model of a name, which reads the conversation anew.
    fn choose(&mut self, name: &str) -> Result<()> {
        let choices = self.choices;
        if name.is_empty() {
            eprintln!("adapters: {}", names(choices));
            return Ok(());
        }
        let Some((_, model)) = choices.iter().find(|(known, _)| known == name) else {
            let hint = format!("there are {}", names(choices));
            return Err(usage(format!("/adapter {name}: no such adapter"), hint));
        };
        self.model = model;
        let chunk = options(self.args, 0).prefill_chunk;
        self.session = Session::new(model, self.context, chunk);
        eprintln!("adapter {name}");
        Ok(())
    }

    /// Sets the message that comes before all others; an empty text takes it away.
    fn set_system(&mut self, text: &str) {
        self.messages.retain(|message| message["role"] != "system");
        if !text.is_empty() {
            self.messages.insert(0, message("system", text));
        }
    }

    /// Answers a message. When that fails, the message is forgotten.
    fn answer(&mut self, text: &str) -> Result<()> {
        self.messages.push(message("user", text));
        let generation = self.generate();
        if generation.is_err() {
            self.messages.pop();
        }
        let generation = generation?;
        self.messages.push(message("assistant", &generation.text));
        Ok(())
    }

    fn generate(&mut self) -> Result<Generation> {
        let prompt = render(
            &self.template,
            &self.messages,
            self.tools.as_deref(),
            &self.variables,
        )?;
        let ids = self.model.tokenizer()?.encode(&prompt, false)?;
        if ids.len() >= self.context {
            return Err(failure(
                format!(
                    "the conversation has {} tokens, but the context is {}",
                    ids.len(),
                    self.context
                ),
                "/reset begins anew; --context N holds more where the model can",
            ));
        }
        let options = options(self.args, self.answers);
        self.answers += 1;
        let mut generator = Generator::new(self.model, options)?;
        let mut clock = Clock::start();
        STOP.store(false, Ordering::Relaxed);
        ANSWERING.store(true, Ordering::Relaxed);
        let generation = generator.continue_in(&mut self.session, &ids, &mut |piece| {
            clock.token();
            print(piece);
            !STOP.load(Ordering::Relaxed)
        });
        ANSWERING.store(false, Ordering::Relaxed);
        let generation = generation?;
        print("\n");
        let speed = clock.stop(&generation);
        let end = match generation.stop {
            StopReason::Interrupted => "; stopped",
            StopReason::MaxTokens => "; cut off by --max-tokens",
            StopReason::Context => "; cut off: the context is full, /reset begins anew",
            StopReason::Eos | StopReason::StopString(_) => "",
        };
        eprintln!(
            "[{} tokens, {} tokens/s; {} of {} tokens read in {:.2} s{end}]",
            generation.ids.len(),
            speed
                .tokens_per_second
                .map_or("-".into(), |speed| format!("{speed:.1}")),
            generation.prompt_tokens - generation.kept_tokens,
            generation.prompt_tokens,
            speed.prompt_seconds,
        );
        Ok(generation)
    }
}
