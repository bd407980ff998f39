//! `windlass serve`: a model behind the API of OpenAI.

use super::source::Base;
use super::{failure, read_text, usage};
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use windlass::infer::engine::EngineOptions;
use windlass::model::ChatTemplate;
use windlass::serve::{Notice, Served, Server, ServerOptions};

/// The variable of a key that does not stand in the list of processes.
const KEY_VARIABLE: &str = "WINDLASS_API_KEY";

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    base: Base,
    /// Adapter, a folder (PEFT) or a GGUF file (LoRA), several times for several ones; its model has this name, or that of the
    /// folder or file
    #[arg(long, value_name = "[NAME=]DIR|FILE")]
    adapter: Vec<String>,
    /// Lets requests load adapters, subfolders and GGUF files of a folder, and unload them, by name
    #[arg(long, value_name = "FOLDER")]
    allow_adapter_loading: Option<PathBuf>,
    /// Address to listen on; 0.0.0.0 is every network of this machine
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes one that is free
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// Key that requests must name, several times for several ones; WINDLASS_API_KEY adds one
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// File with keys, one a line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Name that requests know the model by [default: the hub id, or the last part of the path]
    #[arg(long, value_name = "NAME")]
    served_name: Option<String>,
    /// File with a chat template (Jinja) instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// The most tokens of a prompt and its answer [default: what the model and --kv-tokens allow]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens that all answers together have keys and values for
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().kv_tokens)]
    kv_tokens: usize,
    /// The most answers computed side by side; further ones wait
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().max_sequences)]
    max_sequences: usize,
    /// The most requests that wait; further ones are refused with 429
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().max_waiting)]
    max_queue: usize,
    /// The most tokens computed in a step
    #[arg(long, value_name = "N", default_value_t = EngineOptions::default().token_budget)]
    token_budget: usize,
    /// Milliseconds between two tokens of an answer that reading other prompts should not exceed
    #[arg(long, value_name = "MS", default_value_t = 100)]
    itl_target_ms: u64,
    /// Compute every prompt from its first token
    #[arg(long)]
    no_prefix_cache: bool,
    /// Megabytes of the largest request
    #[arg(long, value_name = "MB", default_value_t = 16)]
    max_body_mb: usize,
    /// The most connections at once
    #[arg(long, value_name = "N", default_value_t = ServerOptions::default().max_connections)]
    max_connections: usize,
    /// Seconds until a request is given up
    #[arg(long, value_name = "S", default_value_t = 3600)]
    request_timeout: u64,
    /// Seconds that running answers get after a signal to end
    #[arg(long, value_name = "S", default_value_t = 60)]
    drain_timeout: u64,
    /// Write prompts and answers to the log too
    #[arg(long)]
    log_prompts: bool,
    /// Write the log as JSON, a line an event
    #[arg(long)]
    log_json: bool,
    /// What is worth a line of the log
    #[arg(long, value_enum, default_value = "info")]
    log_level: Level,
}

/// What is worth a line.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Level {
    /// What broke
    Error,
    /// What may break
    Warn,
    /// Requests
    Info,
    /// Connections and probes too
    Debug,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let options = args.options()?;
    let adapters = args.adapters()?;
    let template = args.template.as_deref().map(read_text).transpose()?;
    for (flag, value) in [
        ("max-queue", args.max_queue),
        ("max-sequences", args.max_sequences),
        ("token-budget", args.token_budget),
        ("kv-tokens", args.kv_tokens),
        ("max-connections", args.max_connections),
        ("context", args.context.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(usage(format!("--{flag} 0"), "give a number of 1 or more"));
        }
    }
    args.start_log();
    let server = Server::bind(options)?;
    // What the loader fails by is this program's own error, with its hint and its exit code.
    let failed = Arc::new(Mutex::new(None));
    let load = {
        let failed = failed.clone();
        move || {
            args.load(template, &adapters).map_err(|error| {
                let text = error.to_string();
                *failed.lock().expect("one error") = Some(error);
                text
            })
        }
    };
    let ended = server.run(load, |notice| match notice {
        Notice::Listening(address) => {
            eprintln!("loading, and answering with 503 at http://{address}")
        }
        Notice::Ready(address) => println!("http://{address}"),
        Notice::Draining => eprintln!("finishing what runs; a second signal ends it at once"),
    });
    match failed.lock().expect("one error").take() {
        Some(error) => Err(error),
        None => Ok(ended?),
    }
}

impl Args {
    fn options(&self) -> Result<ServerOptions> {
        Ok(ServerOptions {
            host: self.host.clone(),
            port: self.port,
            api_keys: self.keys()?,
            max_body: self.max_body_mb.saturating_mul(1 << 20),
            max_connections: self.max_connections,
            request_timeout: Duration::from_secs(self.request_timeout),
            drain_timeout: Duration::from_secs(self.drain_timeout),
            inter_token_target: Duration::from_millis(self.itl_target_ms),
            log_prompts: self.log_prompts,
            adapter_folder: self.allow_adapter_loading.clone(),
            ..ServerOptions::default()
        })
    }

    fn keys(&self) -> Result<Vec<String>> {
        let mut keys = self.api_key.clone();
        keys.extend(std::env::var(KEY_VARIABLE).ok());
        if let Some(file) = &self.api_key_file {
            keys.extend(lines(file)?);
        }
        let keys: Vec<String> = keys.iter().map(|key| key.trim().to_owned()).collect();
        let asked = self.api_key_file.is_some() || !keys.is_empty();
        if asked && (keys.is_empty() || keys.iter().any(String::is_empty)) {
            let hint = format!(
                "a key has a character at least: check --api-key, --api-key-file and {KEY_VARIABLE}"
            );
            return Err(usage("an API key is empty", hint));
        }
        Ok(keys)
    }

    fn start_log(&self) {
        let level = match self.log_level {
            Level::Error => tracing::Level::ERROR,
            Level::Warn => tracing::Level::WARN,
            Level::Info => tracing::Level::INFO,
            Level::Debug => tracing::Level::DEBUG,
        };
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .with_target(false);
        match self.log_json {
            true => log.json().init(),
            false => log.init(),
        }
    }

    /// Opens the model, on the engine's thread.
    fn load(self, template: Option<String>, adapters: &[(String, PathBuf)]) -> Result<Served> {
        let model = self.base.open()?;
        let loader = model.overlay_loader()?;
        let mut overlays = Vec::new();
        for (name, folder) in adapters {
            overlays.push((name.clone(), loader.load(folder)?));
            eprintln!("loaded the adapter {} as {name}", folder.display());
        }
        let tokenizer = model.tokenizer()?;
        let (template, tool_template) = match template {
            Some(source) => {
                let own = ChatTemplate::new(&source, tokenizer.special_tokens())?;
                (Some(own), None)
            }
            None => {
                let plain = ChatTemplate::of(tokenizer, false)?;
                let tools = ChatTemplate::of(tokenizer, true)?;
                let source = plain.as_ref().map(ChatTemplate::source);
                let other = tools.filter(|tools| Some(tools.source()) != source);
                (plain, other)
            }
        };
        if template.is_none() {
            eprintln!(
                "note: the model has no chat template: it continues texts, but holds no conversations"
            );
        }
        if let Some(context) = self.context
            && context > model.context()
        {
            let hint = format!("the model has positions for {} tokens", model.context());
            return Err(usage(format!("--context {context}"), hint));
        }
        Ok(Served {
            name: self.name(),
            engine: EngineOptions {
                token_budget: self.token_budget,
                max_sequences: self.max_sequences,
                max_waiting: self.max_queue,
                kv_tokens: self.kv_tokens,
                prefix_cache: !self.no_prefix_cache,
                context: self.context,
            },
            template,
            tool_template,
            adapters: overlays,
            model,
        })
    }

    /// The name that requests know the model by.
    fn name(&self) -> String {
        let own = self.served_name.clone();
        own.unwrap_or_else(|| short(&self.base.model))
    }

    /// The adapters: the names of the models that they make, and their folders.
    fn adapters(&self) -> Result<Vec<(String, PathBuf)>> {
        if let Some(folder) = &self.allow_adapter_loading
            && !folder.is_dir()
        {
            let problem = format!(
                "--allow-adapter-loading {}: no such folder",
                folder.display()
            );
            return Err(usage(
                problem,
                "give the folder whose subfolders are adapters",
            ));
        }
        let mut adapters: Vec<(String, PathBuf)> = Vec::new();
        for given in &self.adapter {
            // A path may have the sign too, but not before the first folder's end.
            let named = given
                .split_once('=')
                .filter(|(name, _)| !name.contains('/'));
            let (name, folder) = match named {
                Some((name, folder)) => (name.to_owned(), PathBuf::from(folder)),
                None => (last(given), PathBuf::from(given)),
            };
            let taken = name == self.name() || adapters.iter().any(|(known, _)| *known == name);
            if name.is_empty() || taken {
                let hint = "each adapter makes a model with a name of its own: --adapter NAME=DIR";
                let problem = match name.is_empty() {
                    true => "has no name".to_owned(),
                    false => format!("the name {name} is taken"),
                };
                return Err(usage(format!("--adapter {given}: {problem}"), hint));
            }
            adapters.push((name, folder));
        }
        Ok(adapters)
    }
}

/// The last part of a path; a hub id stays whole.
fn short(model: &str) -> String {
    let path = Path::new(model);
    let last = if path.is_file() {
        path.file_stem()
    } else {
        path.file_name()
    };
    match last.filter(|_| path.exists()) {
        Some(last) => last.to_string_lossy().into_owned(),
        None => model.to_owned(),
    }
}

/// The last part of a path, without the ending of a GGUF file.
fn last(path: &str) -> String {
    let name = Path::new(path).file_name().unwrap_or_default();
    let name = name.to_string_lossy();
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

/// The lines of a file that hold something.
fn lines(file: &Path) -> Result<Vec<String>> {
    let text = read_text(file)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<String> = lines.map(str::to_owned).collect();
    match lines.is_empty() {
        true => Err(failure(
            format!("{} holds no key", file.display()),
            "write one key a line",
        )),
        false => Ok(lines),
    }
}
