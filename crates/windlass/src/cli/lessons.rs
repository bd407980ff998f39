//! Flags about data to fine-tune on, and what they become; `windlass data show`.

use super::{failure, usage};
use anyhow::Result;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use windlass::model::{ChatTemplate, LocalTime, Tokenizer};
use windlass::progress::say;
use windlass::train::tune::{Encoder, Example, Form, Learned, Long, Row, Sample, read_rows};

/// A template for models that came without one: headings, and the end token after every answer. Tools and calls are JSON.
const PLAIN: &str = "{%- if tools -%}### Tools:
{{ tools | tojson }}

{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content }}

{% elif message.role == 'assistant' -%}### Response:
{% generation %}{% if message.content %}{{ message.content }}{% endif -%}
{%- for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}


{% elif message.role == 'tool' -%}### Result:
{{ message.content }}

{% else -%}### Instruction:
{{ message.content }}

{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}### Response:
{% endif -%}";

/// What is learned of which data.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Tables of samples: .jsonl, .json, .csv and .parquet; their columns say what they are
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// A chat template (Jinja), or "plain" for headings [default: the model's]
    #[arg(long, value_name = "FILE|plain")]
    pub template: Option<PathBuf>,
    /// Which tokens are learned
    #[arg(long, value_enum, default_value_t = Learn::Usual)]
    learn: Learn,
    /// The most tokens of a sample [default: 1024, or the model's context where that is shorter]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// What becomes of longer samples
    #[arg(long, value_enum, default_value_t = TooLong::Cut)]
    long: TooLong,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Learn {
    /// Completions; texts and conversations whole
    Usual,
    /// Everything
    All,
    /// What follows the prompt; of a conversation its last message
    Completion,
    /// What the template marks as the assistant's words
    Assistant,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum TooLong {
    /// Cut off their end
    Cut,
    /// Leave them out
    Drop,
    /// Refuse the data
    Refuse,
}

/// Encoded data.
pub struct Lessons {
    /// What the rows are.
    pub form: Form,
    /// One example for each row, or two of a preference.
    pub samples: Vec<Vec<Example>>,
}

impl Args {
    /// The most tokens of a sample for a model of a context.
    pub fn max_length(&self, context: usize) -> Result<usize> {
        match self.max_length {
            Some(0 | 1) => Err(usage(
                "--max-length below 2",
                "a token is learned from the one before it",
            )),
            Some(wanted) if wanted > context => Err(usage(
                format!("--max-length {wanted}"),
                format!("the model has positions for {context} tokens"),
            )),
            Some(wanted) => Ok(wanted),
            None => Ok(context.min(1024)),
        }
    }

    /// The source of the chat template, where one was given.
    pub fn template_source(&self) -> Result<Option<String>> {
        Ok(match &self.template {
            Some(name) if name.as_os_str() == "plain" => Some(PLAIN.to_owned()),
            Some(file) => Some(super::read_text(file)?),
            None => None,
        })
    }

    /// The chat template, where there is one.
    pub fn template(&self, tokenizer: &Tokenizer, tools: bool) -> Result<Option<ChatTemplate>> {
        match self.template_source()? {
            Some(source) => Ok(Some(ChatTemplate::new(
                &source,
                tokenizer.special_tokens(),
            )?)),
            None => Ok(ChatTemplate::of(tokenizer, tools)?),
        }
    }

    fn encoder<'t>(
        &self,
        tokenizer: &'t Tokenizer,
        context: usize,
        tools: bool,
    ) -> Result<Encoder<'t>> {
        let learned = match self.learn {
            Learn::Usual => Learned::Usual,
            Learn::All => Learned::All,
            Learn::Completion => Learned::Completion,
            Learn::Assistant => Learned::Assistant,
        };
        let long = match self.long {
            TooLong::Cut => Long::Cut,
            TooLong::Drop => Long::Drop,
            TooLong::Refuse => Long::Refuse,
        };
        let template = self.template(tokenizer, tools)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        let now = now.map(|now| LocalTime::from_unix(now.as_secs() as i64));
        let limits = (self.max_length(context)?, long);
        Ok(Encoder::new(tokenizer, template, learned, limits, now)?)
    }

    fn samples(&self, paths: &[PathBuf]) -> Result<(Form, Vec<(Row, Sample)>)> {
        let rows = read_rows(paths)?;
        let form = Form::of(&rows)?;
        let samples = rows.into_iter().map(|row| {
            let sample = form.sample(&row)?;
            Ok((row, sample))
        });
        Ok((form, samples.collect::<Result<Vec<_>>>()?))
    }

    /// Reads and encodes the data of some files, and says what there is.
    pub fn read(
        &self,
        paths: &[PathBuf],
        tokenizer: &Tokenizer,
        context: usize,
    ) -> Result<Lessons> {
        let (form, samples) = self.samples(paths)?;
        let encoder = self.encoder(tokenizer, context, has_tools(&samples))?;
        let (examples, report) = encoder.encode_all(&samples)?;
        if examples.is_empty() {
            let message = "every sample is too long, and long ones are left out";
            return Err(failure(message, "give more room with --max-length"));
        }
        let q = |part| report.quantile(part);
        say(&format!(
            "data: {} samples ({form}), {} tokens, {} learned; lengths {} to {}, median {}, 95 % below {}",
            samples.len(),
            report.tokens,
            report.learned,
            q(0.0),
            q(1.0),
            q(0.5),
            q(0.95),
        ));
        let most = self.max_length(context)?;
        if report.cut > 0 {
            say(&format!(
                "note: {} samples are longer than {most} tokens and were cut",
                report.cut
            ));
        }
        if report.dropped > 0 {
            say(&format!(
                "note: {} samples are longer than {most} tokens and were left out",
                report.dropped
            ));
        }
        Ok(Lessons {
            form,
            samples: examples,
        })
    }
}

fn has_tools(samples: &[(Row, Sample)]) -> bool {
    samples
        .iter()
        .any(|(_, sample)| matches!(sample, Sample::Chat { tools: Some(_), .. }))
}

/// What to do with data.
#[derive(clap::Subcommand)]
pub enum Verb {
    /// Show samples as a model would be trained on them, learned tokens highlighted
    Show(ShowArgs),
}

#[derive(clap::Args)]
pub struct ShowArgs {
    /// The model or tokenizer whose tokens and template are used: a folder, a file or a hub id
    #[arg(long, short, value_name = "PATH|ID")]
    model: String,
    #[command(flatten)]
    lessons: Args,
    /// Samples to show
    #[arg(long, short = 'n', value_name = "N", default_value_t = 3)]
    count: usize,
    /// Tokens that the model has positions for
    #[arg(long, value_name = "N", default_value_t = 8192)]
    context: usize,
    /// Print a JSON object for each example: text, ids, learned
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(verb: Verb) -> Result<()> {
    let Verb::Show(args) = verb;
    let path = windlass::hub::resolve(&args.model)?;
    let tokenizer = windlass::infer::vocabulary::open_tokenizer(&path)?;
    let (form, samples) = args.lessons.samples(&args.lessons.data)?;
    let encoder = args
        .lessons
        .encoder(&tokenizer, args.context, has_tools(&samples))?;
    let out = std::io::stdout();
    let color = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let mut out = out.lock();
    for (row, sample) in samples.iter().take(args.count) {
        let examples = encoder.encode(row, sample)?;
        for (index, example) in examples.iter().enumerate() {
            if args.json {
                let json = serde_json::json!({
                    "at": row.at(),
                    "text": tokenizer.decode(&example.ids, false)?,
                    "ids": example.ids,
                    "learned": example.learned,
                });
                writeln!(out, "{json}")?;
                continue;
            }
            let which = match (examples.len(), index) {
                (2, 0) => ", chosen",
                (2, _) => ", rejected",
                _ => "",
            };
            let count = example.ids.len();
            writeln!(
                out,
                "--- {}{which}: {count} tokens, {} learned",
                row.at(),
                example.learned()
            )?;
            writeln!(out, "{}", shown(&tokenizer, example, color)?)?;
        }
    }
    if !args.json {
        // The whole of the data is checked too.
        args.lessons
            .read(&args.lessons.data, &tokenizer, args.context)?;
        say(&format!("form: {form}"));
    }
    Ok(())
}

/// A sample's text, what is learned in color or between marks.
fn shown(tokenizer: &Tokenizer, example: &Example, color: bool) -> Result<String> {
    let (begin, end) = match color {
        true => ("\x1b[32m", "\x1b[0m"),
        false => ("⟦", "⟧"),
    };
    let mut text = String::new();
    let mut at = 0;
    while at < example.ids.len() {
        // The first token is never learned: nothing stands before it.
        let learned = |at: usize| at > 0 && example.learned[at];
        let stop = (at..example.ids.len()).find(|&i| learned(i) != learned(at));
        let stop = stop.unwrap_or(example.ids.len());
        let piece = tokenizer.decode(&example.ids[at..stop], false)?;
        match learned(at) {
            true => text += &format!("{begin}{piece}{end}"),
            false => text += &piece,
        }
        at = stop;
    }
    Ok(text)
}
