//! `POST /v1/completions`.

use crate::app::{App, Model, unix_now};
use crate::body;
use crate::chat::Stream;
use crate::choice::{Delta, Finish};
use crate::conversation::Format;
use crate::fields::{Fields, kind};
use crate::grammar::Grammar;
use crate::job::{Answers, Job};
use crate::logprobs::Columns;
use crate::refusal::Refusal;
use crate::sampling::{MAX_CHOICES, Settings};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use windlass_infer::sampler::TokenLogprobs;

/// Tokens of an answer when the request does not say: as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;
/// The most prompts of a request.
const MAX_PROMPTS: usize = 1024;
/// The most choices of a request, over all prompts.
const MAX_SAMPLES: usize = 2048;
/// The most likely tokens that may be reported in each place.
const MAX_TOP: usize = 20;

/// A request, understood.
struct Ask {
    job: Job,
    /// How many of the choices are given out, those with the likeliest tokens.
    best: usize,
    echo: bool,
    /// Whether log-probabilities are given out.
    logprobs: bool,
    stream: Stream,
}

impl Ask {
    fn read(mut fields: Fields, model: &Model) -> Result<Self, Refusal> {
        fields.only(
            "suffix",
            &["".into()],
            "text between a prompt and a suffix is not supported",
        )?;
        let prompts = texts(&mut fields, "prompt", model)?;
        let settings = Settings::read(&mut fields, model)?;
        let format = Format::read(&mut fields)?;
        let stream = Stream::read(&mut fields)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let max_tokens = fields.count("max_tokens", 0, i32::MAX as usize)?;
        let max_tokens = max_tokens.unwrap_or(DEFAULT_TOKENS);
        let logprobs = fields.count("logprobs", 0, MAX_TOP)?;
        let best = fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1);
        let of = fields.count("best_of", 1, MAX_CHOICES)?.unwrap_or(best);
        if of < best {
            return Err(fields.refuse("best_of", format!("must be at least n, which is {best}")));
        }
        if of > best && stream.wanted {
            return Err(fields.refuse(
                "best_of",
                "cannot be streamed: which choice is the best is known at the end",
            ));
        }
        if max_tokens == 0 && !echo {
            return Err(fields.refuse("max_tokens", "0 makes sense with echo only"));
        }
        if max_tokens == 0 && of > 1 {
            return Err(fields.refuse(
                "n",
                "without new tokens all choices are the same: ask for one",
            ));
        }
        if prompts.len() * of > MAX_SAMPLES {
            return Err(fields.refuse(
                "prompt",
                format!("at most {MAX_SAMPLES} choices over all prompts"),
            ));
        }
        fields.finish()?;
        Ok(Ask {
            job: Job {
                prompts,
                choices: of,
                settings,
                max_tokens: Some(max_tokens),
                // The best are chosen by their probabilities.
                logprobs: logprobs.or((of > best).then_some(0)),
                prompt_logprobs: logprobs.filter(|_| echo),
                grammar: grammar(&format, model)?,
                thinking: None,
                dialect: None,
            },
            best,
            echo,
            logprobs: logprobs.is_some(),
            stream,
        })
    }
}

fn grammar(format: &Format, model: &Model) -> Result<Option<Grammar>, Refusal> {
    let grammars = &model.grammars;
    Ok(match format {
        Format::Text => None,
        Format::Json(schema, param) => Some(grammars.json_schema(param, schema)?),
        Format::Regex(pattern) => Some(grammars.regex("guided_regex", pattern)?),
        Format::Lark(lark) => Some(grammars.lark("guided_grammar", lark)?),
    })
}

/// Texts as ids: one text or several, or ids of one or several.
pub(crate) fn texts(
    fields: &mut Fields,
    name: &str,
    model: &Model,
) -> Result<Vec<Vec<u32>>, Refusal> {
    let Some(value) = fields.take(name) else {
        return Err(fields.refuse(name, "is missing"));
    };
    let wrong = |found: &Value| {
        fields.refuse(
            name,
            format!(
                "must be a text, token ids, or a list of either, not {}",
                kind(found)
            ),
        )
    };
    let encode = |text: &str| {
        let ids = model.encode(text);
        ids.map_err(|error| fields.refuse(name, error))
    };
    let id = |value: &Value| {
        let id = value.as_u64().filter(|&id| id < model.vocabulary as u64);
        let id =
            id.ok_or_else(|| fields.refuse(name, format!("{value} is no token of the model")))?;
        Ok(id as u32)
    };
    let ids = |list: &[Value]| list.iter().map(id).collect::<Result<Vec<u32>, Refusal>>();
    let lists = match value {
        Value::String(text) => vec![encode(&text)?],
        Value::Array(list) if list.first().is_some_and(Value::is_number) => vec![ids(&list)?],
        Value::Array(list) => {
            if list.len() > MAX_PROMPTS {
                return Err(fields.refuse(name, format!("at most {MAX_PROMPTS}")));
            }
            let one = |value: &Value| match value {
                Value::String(text) => encode(text),
                Value::Array(list) => ids(list),
                other => Err(wrong(other)),
            };
            list.iter().map(one).collect::<Result<_, _>>()?
        }
        other => return Err(wrong(&other)),
    };
    if lists.is_empty() || lists.iter().any(Vec::is_empty) {
        return Err(fields.refuse(name, "is empty"));
    }
    Ok(lists)
}

impl Model {
    /// The ids of a text, inside what the tokenizer puts around one. An empty text becomes the token that begins one.
    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let ids = self.tokenizer.encode(text, true);
        let mut ids = ids.map_err(|error| error.to_string())?;
        if ids.is_empty() {
            let begin = self
                .tokenizer
                .bos()
                .or(self.tokenizer.eos().first().copied());
            ids.push(begin.ok_or("is empty, and the tokenizer has no token that begins a text")?);
        }
        Ok(ids)
    }
}

/// One choice of an answer.
#[derive(Default)]
struct Text {
    text: String,
    columns: Columns,
    finish: Option<Finish>,
    /// Whether the prompt has been put before it, where that is asked for.
    begun: bool,
}

/// What all choices have in common.
struct Head {
    id: String,
    created: u64,
    model: Arc<Model>,
    echo: bool,
    logprobs: bool,
}

impl Head {
    /// Takes what comes next for a choice. `prompt` is what it continues, with the probabilities of its tokens.
    fn add(
        &self,
        text: &mut Text,
        prompt: &[u32],
        scores: Option<&[TokenLogprobs]>,
        delta: Delta,
    ) -> Result<(), Refusal> {
        if self.echo && !text.begun {
            let shown = self.model.tokenizer.decode(prompt, true);
            let shown = shown.map_err(|error| Refusal::internal(error.to_string()))?;
            if let Some(scores) = scores {
                text.columns.first(&self.model, prompt[0]);
                for score in scores {
                    text.columns.push(&self.model, score);
                }
            }
            text.text += &shown;
        }
        text.begun = true;
        text.text += &delta.text;
        for report in &delta.reports {
            text.columns.push(&self.model, report);
        }
        text.finish = delta.finish;
        Ok(())
    }

    fn choice(&self, index: usize, text: &mut Text) -> Value {
        let logprobs = self.logprobs.then(|| text.columns.take());
        json!({
            "index": index,
            "text": std::mem::take(&mut text.text),
            "logprobs": logprobs,
            "finish_reason": text.finish.as_ref().map(Finish::name),
        })
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": null,
            "choices": choices,
        })
    }
}

/// Answers a completion request.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("model")?;
    let model = app.model_named(Some(&name))?;
    let ask = {
        let model = model.clone();
        body::prepare(move || Ask::read(fields, &model)).await?
    };
    let head = Head {
        id: app.new_id("cmpl-"),
        created: unix_now(),
        echo: ask.echo,
        logprobs: ask.logprobs,
        model,
    };
    match ask.stream.wanted {
        true => stream(app, head, ask).await,
        false => whole(&app, &head, &ask).await,
    }
}

/// The whole answer at once.
async fn whole(app: &App, head: &Head, ask: &Ask) -> Result<Response, Refusal> {
    let job = &ask.job;
    let updates = job.submit(app, &head.model).await?;
    let mut answers = Answers::new(app, &head.model, job, updates)?;
    let count = job.prompts.len() * job.choices;
    let mut texts: Vec<Text> = (0..count).map(|_| Text::default()).collect();
    while let Some((index, delta)) = answers.next().await? {
        let prompt = index / job.choices;
        let scores = answers.prompts[prompt * job.choices].as_deref();
        head.add(&mut texts[index], &job.prompts[prompt], scores, delta)?;
    }
    let mut choices = Vec::new();
    for prompt in 0..job.prompts.len() {
        let mut order: Vec<usize> = (prompt * job.choices..(prompt + 1) * job.choices).collect();
        if job.choices > ask.best {
            order.sort_by(|&a, &b| answers.mean_logprob(b).total_cmp(&answers.mean_logprob(a)));
            order.truncate(ask.best);
        }
        for from in order {
            choices.push(head.choice(choices.len(), &mut texts[from]));
        }
    }
    let mut object = head.object(choices);
    object["usage"] = answers.usage().value();
    Ok(body::json(&object))
}

/// The answer as events.
async fn stream(app: Arc<App>, head: Head, ask: Ask) -> Result<Response, Refusal> {
    let updates = ask.job.submit(&app, &head.model).await?;
    Ok(body::events(|events| async move {
        let job = &ask.job;
        let mut answers = match Answers::new(&app, &head.model, job, updates) {
            Ok(answers) => answers,
            Err(refusal) => return events.data(&refusal.body()).await,
        };
        let count = job.prompts.len() * job.choices;
        let mut texts: Vec<Text> = (0..count).map(|_| Text::default()).collect();
        loop {
            let (index, delta) = match events.until(answers.next()).await? {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(refusal) => return events.data(&refusal.body()).await,
            };
            let prompt = index / job.choices;
            let scores = answers.prompts[prompt * job.choices].as_deref();
            let text = &mut texts[index];
            if let Err(refusal) = head.add(text, &job.prompts[prompt], scores, delta) {
                return events.data(&refusal.body()).await;
            }
            let mut chunk = head.object(vec![head.choice(index, text)]);
            if ask.stream.usage {
                chunk["usage"] = Value::Null;
            }
            events.data(&chunk).await?;
        }
        if ask.stream.usage {
            let mut chunk = head.object(Vec::new());
            chunk["usage"] = answers.usage().value();
            events.data(&chunk).await?;
        }
        events.done().await
    }))
}
