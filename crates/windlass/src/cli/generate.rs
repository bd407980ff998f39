//! `windlass generate`: prompts in, text out as it comes.

use super::sampling::Sampling;
use super::source::{Base, Source, misuse};
use super::{failure, usage};
use anyhow::Result;
use serde_json::json;
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;
use std::time::Instant;
use windlass::infer::{GenerateOptions, Generation, Generator, Guesses, StopReason};

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Text to continue, several times for several texts; "-" reads standard input. Without any, the model begins a
    /// text of its own
    #[arg(long, short, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Vec<String>,
    /// File with a text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// The most tokens to generate for each prompt
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: Sampling,
    /// Text that ends the generation, not shown; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Continue after tokens that end a text
    #[arg(long)]
    ignore_eos: bool,
    /// Guess tokens by what followed the same words before: the same text, faster where it repeats itself
    #[arg(long, conflicts_with = "draft_model")]
    lookup: bool,
    /// Guess tokens by a smaller model with the same vocabulary: the same text, faster where the two agree
    #[arg(long, value_name = "PATH|ID")]
    draft_model: Option<String>,
    /// The most tokens guessed at once
    #[arg(long, value_name = "N", default_value_t = 7)]
    draft_tokens: usize,
    /// Print a JSON object a prompt, when it is finished
    #[arg(long)]
    json: bool,
}

impl Args {
    fn options(&self) -> GenerateOptions {
        GenerateOptions {
            sampling: self.sampling.params(),
            max_tokens: self.max_tokens,
            stop_strings: self.stop.clone(),
            seed: self.sampling.seed,
            stop_at_end: !self.ignore_eos,
            draft_tokens: self.draft_tokens,
            ..Default::default()
        }
    }

    fn prompts(&self) -> Result<Vec<String>> {
        let mut prompts = Vec::new();
        if self.prompt.iter().filter(|prompt| *prompt == "-").count() > 1 {
            return Err(usage(
                "--prompt - is given twice",
                "standard input can be read once",
            ));
        }
        for prompt in &self.prompt {
            prompts.push(match prompt.as_str() {
                "-" => read_stdin()?,
                text => text.to_owned(),
            });
        }
        for file in &self.prompt_file {
            prompts.push(without_newline(super::read_text(file)?));
        }
        if prompts.is_empty() {
            prompts.push(String::new());
        }
        Ok(prompts)
    }
}

pub(super) fn read_stdin() -> Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| {
            failure(
                format!("cannot read standard input: {error}"),
                "pipe in text in UTF-8",
            )
        })?;
    Ok(without_newline(text))
}

/// Editors and `echo` end a text with a line break that is no part of the prompt.
fn without_newline(mut text: String) -> String {
    for end in ['\n', '\r'] {
        if text.ends_with(end) {
            text.pop();
        }
    }
    text
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let options = args.options();
    options.validate().map_err(misuse)?;
    let prompts = args.prompts()?;
    let model = args.source.open()?;
    let draft = match &args.draft_model {
        Some(path) => {
            let base = Base {
                model: path.clone(),
                tokenizer: None,
                save_packed: None,
                ..args.source.base.clone()
            };
            let source = Source {
                base,
                adapter: Vec::new(),
            };
            Some(source.open_on(model.store.cpu())?)
        }
        None => None,
    };
    let mut generator = Generator::new(&model, options).map_err(misuse)?;
    match &draft {
        Some(draft) => generator.guess_by_model(draft).map_err(misuse)?,
        None if args.lookup => generator.guess_by_lookup(),
        None => {}
    }
    for (index, prompt) in prompts.iter().enumerate() {
        if prompts.len() > 1 {
            eprintln!("prompt {} of {}", index + 1, prompts.len());
        }
        let ids = model.encode(prompt)?;
        let mut clock = Clock::start();
        let generation = generator.generate(&ids, &mut |piece| {
            clock.token();
            if !args.json {
                print(piece);
            }
        })?;
        let speed = clock.stop(&generation);
        if args.json {
            print(&format!(
                "{}\n",
                report(prompt, &generation, &speed, &args.stop)
            ));
        } else {
            print("\n");
            eprintln!(
                "{} + {} tokens, {} tokens/s",
                generation.prompt_tokens,
                generation.ids.len(),
                speed
                    .tokens_per_second
                    .map_or("-".into(), |speed| format!("{speed:.1}")),
            );
            if let Some(guesses) = generation.guesses {
                eprintln!("{}", told(&guesses));
            }
        }
    }
    Ok(())
}

/// What guessing was good for, in words.
fn told(guesses: &Guesses) -> String {
    let many = |count: usize, one: &str, more: &str| match count {
        1 => format!("1 {one}"),
        count => format!("{count} {more}"),
    };
    let Guesses {
        drafted,
        accepted,
        passes,
        pauses,
    } = *guesses;
    let share = 100.0 * accepted as f64 / drafted.max(1) as f64;
    let stopped = match pauses {
        0 => String::new(),
        n => format!(
            "; switched off {} for a while, since it did not pay",
            many(n, "time", "times")
        ),
    };
    format!(
        "guessed {} in {}, {accepted} rightly ({share:.0} %){stopped}",
        many(drafted, "token", "tokens"),
        many(passes, "pass", "passes")
    )
}

/// Writes to stdout at once. A reader that went away, such as `head`, ends the program without a complaint.
pub(super) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        if error.kind() != ErrorKind::BrokenPipe {
            eprintln!("error: cannot write to standard output: {error}");
        }
        std::process::exit(if error.kind() == ErrorKind::BrokenPipe {
            0
        } else {
            1
        });
    }
}

/// Measures one generation.
pub(super) struct Clock {
    start: Instant,
    first: Option<Instant>,
}

/// How fast it went. Speeds are `None` where too little was done to tell.
pub(super) struct Speed {
    pub(super) prompt_seconds: f64,
    seconds: f64,
    prompt_tokens_per_second: Option<f64>,
    pub(super) tokens_per_second: Option<f64>,
}

impl Clock {
    pub(super) fn start() -> Self {
        Clock {
            start: Instant::now(),
            first: None,
        }
    }

    /// A token was generated: the first one ends the reading of the prompt.
    pub(super) fn token(&mut self) {
        self.first.get_or_insert_with(Instant::now);
    }

    pub(super) fn stop(self, generation: &Generation) -> Speed {
        let first = self.first.unwrap_or(self.start);
        let (prompt_seconds, decode_seconds) = (
            (first - self.start).as_secs_f64(),
            first.elapsed().as_secs_f64(),
        );
        let speed = |tokens: usize, seconds: f64| {
            (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
        };
        Speed {
            prompt_seconds,
            seconds: prompt_seconds + decode_seconds,
            prompt_tokens_per_second: speed(
                generation.prompt_tokens - generation.kept_tokens,
                prompt_seconds,
            ),
            tokens_per_second: speed(generation.ids.len() - 1, decode_seconds),
        }
    }
}

fn report(
    prompt: &str,
    generation: &Generation,
    speed: &Speed,
    stops: &[String],
) -> serde_json::Value {
    let (reason, stop_string) = match generation.stop {
        StopReason::Eos => ("eos", None),
        StopReason::StopString(index) => ("stop_string", stops.get(index)),
        StopReason::MaxTokens => ("max_tokens", None),
        StopReason::Context => ("context", None),
        StopReason::Interrupted => ("interrupted", None),
    };
    json!({
        "prompt": prompt,
        "text": generation.text,
        "ids": generation.ids,
        "stop_reason": reason,
        "stop_string": stop_string,
        "prompt_tokens": generation.prompt_tokens,
        "generated_tokens": generation.ids.len(),
        "prompt_tokens_per_second": speed.prompt_tokens_per_second,
        "tokens_per_second": speed.tokens_per_second,
        "guesses": generation.guesses,
        "prompt_seconds": speed.prompt_seconds,
        "seconds": speed.seconds,
    })
}
