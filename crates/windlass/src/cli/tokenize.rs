//! `windlass tokenize`: the tokens of a text or of a conversation.

use super::chat::{render, template};
use super::generate::{print, read_stdin};
use super::usage;
use anyhow::Result;
use serde_json::{Value, json};
use std::path::PathBuf;
use windlass::hub;
use windlass::infer::vocabulary::open_tokenizer;
use windlass::model::Tokenizer;
use windlass::model::chat::message;

/// Flags of the verb.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, GGUF file, tokenizer.json, tokenizer.model, or hub id such as org/name[@revision]
    #[arg(long, short, value_name = "PATH|ID")]
    model: String,
    /// The text [default: standard input]
    #[arg(allow_hyphen_values = true)]
    text: Option<String>,
    /// File with the text
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    file: Option<PathBuf>,
    /// Leave out what the tokenizer puts around a text, such as the token that begins one
    #[arg(long)]
    bare: bool,
    /// Read control tokens that are spelled in the text as text
    #[arg(long)]
    literal: bool,
    /// The text is a conversation: a JSON list of messages, or what the user says; its tokens are those of the chat
    /// template
    #[arg(long)]
    chat: bool,
    /// File with a chat template instead of the model's own
    #[arg(long, value_name = "FILE", requires = "chat")]
    template: Option<PathBuf>,
    /// The text is a list of ids; print what they say
    #[arg(long, conflicts_with_all = ["bare", "literal", "chat"])]
    decode: bool,
    /// Print the ids alone, in one line
    #[arg(long, conflicts_with_all = ["count", "json"])]
    ids: bool,
    /// Print the number of tokens alone
    #[arg(long, conflicts_with = "json")]
    count: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Result<()> {
    let tokenizer = open_tokenizer(&hub::resolve(&args.model)?)?;
    for note in tokenizer.notes() {
        eprintln!("note: {note}");
    }
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => super::read_text(file)?,
        (None, None) => read_stdin()?,
    };
    if args.decode {
        let ids = parse_ids(&text, &tokenizer)?;
        let text = tokenizer.decode(&ids, false)?;
        if args.json {
            print(&format!("{}\n", json!({ "ids": ids, "text": text })));
        } else {
            print(&format!("{text}\n"));
        }
        return Ok(());
    }
    let (text, special) = match args.chat {
        true => (conversation(&args, &tokenizer, text)?, false),
        false => (text, !args.bare),
    };
    let ids = tokenizer.encode_with(&text, special, !args.literal)?;
    report(&args, &tokenizer, &text, &ids);
    Ok(())
}

/// The text of a conversation up to where the model's next answer begins.
fn conversation(args: &Args, tokenizer: &Tokenizer, text: String) -> Result<String> {
    let messages = match serde_json::from_str(&text) {
        Ok(Value::Array(messages)) => messages,
        _ => vec![message("user", &text)],
    };
    let template = template(tokenizer, args.template.as_deref(), false, &args.model)?;
    Ok(render(&template, &messages, None, &Default::default())?)
}

fn parse_ids(text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
    let mut ids = Vec::new();
    for word in words.filter(|word| !word.is_empty()) {
        let id = word
            .parse()
            .ok()
            .filter(|&id| tokenizer.token(id).is_some());
        ids.push(id.ok_or_else(|| {
            let last = tokenizer.vocab_size().saturating_sub(1);
            usage(
                format!("{word} is no token id"),
                format!("ids go from 0 to {last}"),
            )
        })?);
    }
    Ok(ids)
}

fn report(args: &Args, tokenizer: &Tokenizer, text: &str, ids: &[u32]) {
    let spelled = |id: &u32| tokenizer.token(*id).unwrap_or_default();
    if args.count {
        print(&format!("{}\n", ids.len()));
    } else if args.ids {
        let words: Vec<String> = ids.iter().map(u32::to_string).collect();
        print(&format!("{}\n", words.join(" ")));
    } else if args.json {
        let tokens: Vec<String> = ids.iter().map(spelled).collect();
        let report = json!({ "text": text, "count": ids.len(), "ids": ids, "tokens": tokens });
        print(&format!("{report}\n"));
    } else {
        let width = ids.iter().max().map_or(1, |id| id.to_string().len());
        for id in ids {
            print(&format!("{id:width$}  {}\n", spelled(id).escape_debug()));
        }
        let characters = text.chars().count();
        eprintln!(
            "{} tokens, {characters} characters, {} bytes",
            ids.len(),
            text.len()
        );
    }
}
