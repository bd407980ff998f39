//! `POST /v1/chat/completions`.

use crate::app::unix_now;
use crate::app::{App, Model};
use crate::body::{self, Events, Gone};
use crate::choice::{Delta, Finish};
use crate::conversation::Conversation;
use crate::fields::Fields;
use crate::job::{Answers, Job};
use crate::logprobs;
use crate::refusal::Refusal;
use crate::sampling::{MAX_CHOICES, Settings};
use crate::tools::parse::CallDelta;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

/// The most likely tokens that may be reported in each place.
const MAX_TOP: usize = 20;

/// A request, understood.
struct Ask {
    conversation: Conversation,
    settings: Settings,
    choices: usize,
    max_tokens: Option<usize>,
    logprobs: Option<usize>,
    /// Whether thoughts are kept apart from the answer.
    apart: bool,
    stream: Stream,
}

/// Whether and how an answer is streamed.
#[derive(Clone, Copy)]
pub(crate) struct Stream {
    pub wanted: bool,
    pub usage: bool,
}

impl Stream {
    /// Reads `stream` and `stream_options`.
    pub fn read(fields: &mut Fields) -> Result<Self, Refusal> {
        let wanted = fields.bool("stream")?.unwrap_or(false);
        let mut usage = false;
        if let Some(mut options) = fields.object("stream_options")? {
            if !wanted {
                return Err(fields.refuse("stream_options", "is for streams: set stream to true"));
            }
            usage = options.bool("include_usage")?.unwrap_or(false);
            // Noise against listeners that count bytes is not made here, and asking for none is fine.
            options.only("include_obfuscation", &[false.into()], "is not supported")?;
            options.finish()?;
        }
        Ok(Stream { wanted, usage })
    }
}

impl Ask {
    fn read(mut fields: Fields, model: &Model) -> Result<Self, Refusal> {
        let conversation = Conversation::read(&mut fields)?;
        let settings = Settings::read(&mut fields, model)?;
        let most = i32::MAX as usize;
        let limit = fields.count("max_completion_tokens", 1, most)?;
        let legacy = fields.count("max_tokens", 1, most)?;
        let wanted = fields.bool("logprobs")?.unwrap_or(false);
        let top = fields.count("top_logprobs", 0, MAX_TOP)?;
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(fields.refuse("top_logprobs", "needs logprobs to be true"));
        }
        let ask = Ask {
            conversation,
            settings,
            choices: fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1),
            max_tokens: limit.or(legacy),
            logprobs: wanted.then_some(top.unwrap_or(0)),
            apart: apart(&mut fields)?,
            stream: Stream::read(&mut fields)?,
        };
        for (name, accepted, reason) in [
            (
                "modalities",
                json!([["text"]]),
                "this model writes text: leave it out, or [\"text\"]",
            ),
            (
                "reasoning_effort",
                json!([]),
                "is not supported: say it in chat_template_kwargs, if the model's template knows it",
            ),
            ("prediction", json!([]), "is not supported"),
            (
                "web_search_options",
                json!([]),
                "is not supported: there is no web search here",
            ),
            (
                "functions",
                json!([]),
                "is the old form of tools: use tools",
            ),
            (
                "function_call",
                json!([]),
                "is the old form of tool_choice: use tool_choice",
            ),
            ("verbosity", json!(["medium"]), "is not supported"),
            (
                "audio",
                json!([]),
                "is not supported: this model writes text",
            ),
        ] {
            fields.only(name, accepted.as_array().map_or(&[], Vec::as_slice), reason)?;
        }
        fields.finish()?;
        Ok(ask)
    }

    fn job(self, model: &Model) -> Result<Job, Refusal> {
        let prepared = self.conversation.prepare(model)?;
        Ok(Job {
            prompts: vec![prepared.prompt],
            choices: self.choices,
            settings: self.settings,
            max_tokens: self.max_tokens,
            logprobs: self.logprobs,
            prompt_logprobs: None,
            grammar: prepared.grammar,
            thinking: prepared.thinking.filter(|_| self.apart),
            dialect: prepared.dialect,
        })
    }
}

/// Reads `reasoning_format`, llama-server's word for where thoughts go.
fn apart(fields: &mut Fields) -> Result<bool, Refusal> {
    match fields.text("reasoning_format")?.as_deref() {
        None | Some("auto" | "deepseek") => Ok(true),
        Some("none") => Ok(false),
        Some(other) => Err(fields.refuse(
            "reasoning_format",
            format!("must be auto, deepseek or none, not {other:?}"),
        )),
    }
}

/// What is the same in all chunks of an answer.
struct Head {
    id: String,
    created: u64,
    model: Arc<Model>,
    logprobs: bool,
    usage: bool,
}

/// Answers a chat request.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("model")?;
    let model = app.model_named(Some(&name))?;
    let (ask, job) = {
        let model = model.clone();
        body::prepare(move || {
            let ask = Ask::read(fields, &model)?;
            let stream = ask.stream;
            Ok((stream, ask.job(&model)?))
        })
        .await?
    };
    let head = Head {
        id: app.new_id("chatcmpl-"),
        created: unix_now(),
        logprobs: job.logprobs.is_some(),
        usage: ask.usage,
        model: model.clone(),
    };
    if ask.wanted {
        return stream(app, head, job).await;
    }
    whole(&app, &head, &job).await
}

/// The whole answer at once.
async fn whole(app: &App, head: &Head, job: &Job) -> Result<Response, Refusal> {
    let updates = job.submit(app, &head.model).await?;
    let mut answers = Answers::new(app, &head.model, job, updates)?;
    let mut gathered: Vec<Gathered> = (0..job.choices).map(|_| Gathered::default()).collect();
    while let Some((index, delta)) = answers.next().await? {
        gathered[index].add(delta);
    }
    let choices = gathered.into_iter().enumerate().map(|(index, choice)| {
        let finish = choice.finish.as_ref().map(Finish::name);
        let calls = choice.calls(app);
        let mut message = json!({ "role": "assistant", "content": choice.text, "refusal": null });
        if !choice.thoughts.is_empty() {
            message["reasoning_content"] = choice.thoughts.into();
        }
        if !calls.is_empty() {
            if choice.text.is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = calls.into();
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": head.logprobs.then(|| logprobs::chat(&head.model, &choice.reports)),
            "finish_reason": finish,
        })
    });
    Ok(body::json(&json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model.name,
        "choices": choices.collect::<Vec<_>>(),
        "usage": answers.usage().value(),
        "service_tier": "default",
        "system_fingerprint": null,
    })))
}

/// An answer put together from its parts.
#[derive(Default)]
pub(crate) struct Gathered {
    pub thoughts: String,
    pub text: String,
    /// Names and arguments.
    pub called: Vec<(String, String)>,
    pub reports: Vec<windlass_infer::sampler::TokenLogprobs>,
    pub finish: Option<Finish>,
}

impl Gathered {
    pub fn add(&mut self, delta: Delta) {
        self.thoughts += &delta.thoughts;
        self.text += &delta.text;
        for CallDelta {
            index,
            name,
            arguments,
        } in delta.calls
        {
            if let Some(name) = name {
                self.called.push((name, String::new()));
            }
            self.called[index].1 += &arguments;
        }
        self.reports.extend(delta.reports);
        self.finish = self.finish.take().or(delta.finish);
    }

    fn calls(&self, app: &App) -> Vec<Value> {
        let calls = self.called.iter().map(|(name, arguments)| {
            json!({
                "id": app.new_id("call_"),
                "type": "function",
                "function": { "name": name, "arguments": arguments },
            })
        });
        calls.collect()
    }
}

impl Head {
    fn chunk(&self, choices: Value, usage: Option<Value>) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": null,
            "choices": choices,
        });
        if self.usage {
            chunk["usage"] = usage.into();
        }
        chunk
    }

    fn choice(&self, index: usize, delta: Value, reports: Value, finish: Option<&str>) -> Value {
        let choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": reports,
            "finish_reason": finish,
        });
        self.chunk(json!([choice]), None)
    }
}

/// The answer as events. Errors before the first one are still answered by a status.
async fn stream(app: Arc<App>, head: Head, job: Job) -> Result<Response, Refusal> {
    let model = head.model.clone();
    let updates = job.submit(&app, &model).await?;
    Ok(body::events(|events| async move {
        let mut answers = match Answers::new(&app, &model, &job, updates) {
            Ok(answers) => answers,
            Err(refusal) => return events.data(&refusal.body()).await,
        };
        for index in 0..job.choices {
            let delta = json!({ "role": "assistant", "content": "" });
            events
                .data(&head.choice(index, delta, Value::Null, None))
                .await?;
        }
        loop {
            match events.until(answers.next()).await? {
                Ok(Some((index, delta))) => write_delta(&app, &head, &events, index, delta).await?,
                Ok(None) => break,
                Err(refusal) => return events.data(&refusal.body()).await,
            }
        }
        if head.usage {
            let usage = answers.usage().value();
            events.data(&head.chunk(json!([]), Some(usage))).await?;
        }
        events.done().await
    }))
}

async fn write_delta(
    app: &App,
    head: &Head,
    events: &Events,
    index: usize,
    delta: Delta,
) -> Result<(), Gone> {
    let mut reports = match head.logprobs {
        true => logprobs::chat(&head.model, &delta.reports),
        false => Value::Null,
    };
    if !delta.thoughts.is_empty() {
        let thoughts = json!({ "reasoning_content": delta.thoughts });
        events
            .data(&head.choice(index, thoughts, reports.take(), None))
            .await?;
    }
    if !delta.text.is_empty() {
        let content = json!({ "content": delta.text });
        events
            .data(&head.choice(index, content, reports.take(), None))
            .await?;
    }
    for call in delta.calls {
        let mut part = json!({ "index": call.index, "function": { "arguments": call.arguments } });
        if let Some(name) = call.name {
            part["id"] = app.new_id("call_").into();
            part["type"] = "function".into();
            part["function"]["name"] = name.into();
        }
        let calls = json!({ "tool_calls": [part] });
        events
            .data(&head.choice(index, calls, reports.take(), None))
            .await?;
    }
    if let Some(finish) = delta.finish {
        events
            .data(&head.choice(index, json!({}), reports.take(), Some(finish.name())))
            .await?;
    }
    Ok(())
}
