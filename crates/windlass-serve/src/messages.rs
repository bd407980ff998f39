//! `POST /v1/messages` and `/v1/messages/count_tokens`: the API of Anthropic.

mod read;

use crate::app::{App, Model};
use crate::blocks::{Block, Blocks, Change};
use crate::body::{self, Events, Gone};
use crate::choice::Finish;
use crate::fields::Fields;
use crate::job::{Answers, Job, Usage};
use crate::refusal::Refusal;
use crate::sampling::{Settings, stop_strings};
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers a request for a message.
pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Response {
    let answer = answer(app, request).await;
    answer.unwrap_or_else(|refusal| refusal.response(&refusal.anthropic_body()))
}

/// Counts the tokens of a conversation.
pub(crate) async fn count(State(app): State<Arc<App>>, request: Request) -> Response {
    let counted = async {
        let (model, fields) = begin(&app, request).await?;
        let tokens = body::prepare(move || {
            let mut fields = fields;
            let conversation = read::conversation(&mut fields)?;
            fields.finish()?;
            Ok(conversation.prepare(&model)?.prompt.len())
        });
        Ok(body::json(&json!({ "input_tokens": tokens.await? })))
    };
    let counted: Result<Response, Refusal> = counted.await;
    counted.unwrap_or_else(|refusal| refusal.response(&refusal.anthropic_body()))
}

async fn begin(app: &App, request: Request) -> Result<(Arc<Model>, Fields), Refusal> {
    let mut fields = body::fields(app, request).await?;
    let name = fields.need_text("model")?;
    Ok((app.model_named(Some(&name))?, fields))
}

async fn answer(app: Arc<App>, request: Request) -> Result<Response, Refusal> {
    let (model, fields) = begin(&app, request).await?;
    let (streamed, job) = {
        let model = model.clone();
        body::prepare(move || job(fields, &model)).await?
    };
    let id = app.new_id("msg_");
    let updates = job.submit(&app, &model).await?;
    if !streamed {
        let mut answers = Answers::new(&app, &model, &job, updates)?;
        let mut blocks = Blocks::default();
        let mut finish = None;
        while let Some((_, delta)) = answers.next().await? {
            blocks.take(&delta);
            finish = delta.finish;
        }
        let content = blocks.list.iter().map(|block| content(&app, block));
        let content: Vec<Value> = content.collect();
        let message = message(&id, &model, content, finish.as_ref(), answers.usage());
        return Ok(body::json(&message));
    }
    Ok(body::events(|events| async move {
        let mut answers = match Answers::new(&app, &model, &job, updates) {
            Ok(answers) => answers,
            Err(refusal) => return events.event("error", &refusal.anthropic_body()).await,
        };
        let start = message(&id, &model, Vec::new(), None, answers.usage());
        let start = json!({ "type": "message_start", "message": start });
        events.event("message_start", &start).await?;
        events.event("ping", &json!({ "type": "ping" })).await?;
        let mut blocks = Blocks::default();
        loop {
            let delta = match events.until(answers.next()).await? {
                Ok(Some((_, delta))) => delta,
                Ok(None) => break,
                Err(refusal) => return events.event("error", &refusal.anthropic_body()).await,
            };
            // Blocks are numbered from the one that was open before.
            let mut index = blocks.index();
            let mut begun = !blocks.list.is_empty();
            for change in blocks.take(&delta) {
                if matches!(change, Change::Text | Change::Call(_)) {
                    index += usize::from(begun);
                    begun = true;
                }
                write_change(&app, &events, index, change).await?;
            }
            if let Some(finish) = &delta.finish {
                let (reason, sequence) = stop_reason(finish);
                let end = json!({
                    "type": "message_delta",
                    "delta": { "stop_reason": reason, "stop_sequence": sequence },
                    "usage": usage(answers.usage()),
                });
                events.event("message_delta", &end).await?;
            }
        }
        events
            .event("message_stop", &json!({ "type": "message_stop" }))
            .await
    }))
}

fn job(mut fields: Fields, model: &Model) -> Result<(bool, Job), Refusal> {
    let Some(max_tokens) = fields.count("max_tokens", 1, i32::MAX as usize)? else {
        return Err(fields.refuse("max_tokens", "is missing"));
    };
    let stop = stop_strings(&mut fields, "stop_sequences")?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    let conversation = read::conversation(&mut fields)?;
    let mut settings = Settings::read(&mut fields, model)?;
    settings.stop = stop;
    let tier = [json!("auto"), json!("standard_only")];
    fields.only(
        "service_tier",
        &tier,
        "there is one tier here: leave it out",
    )?;
    fields.finish()?;
    let prepared = conversation.prepare(model)?;
    let job = Job {
        prompts: vec![prepared.prompt],
        choices: 1,
        settings,
        max_tokens: Some(max_tokens),
        logprobs: None,
        prompt_logprobs: None,
        grammar: prepared.grammar,
        thinking: None,
        dialect: prepared.dialect,
    };
    Ok((stream, job))
}

fn usage(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt - usage.cached,
        "output_tokens": usage.completion,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    })
}

fn message(
    id: &str,
    model: &Model,
    content: Vec<Value>,
    finish: Option<&Finish>,
    of: Usage,
) -> Value {
    let (reason, sequence) = finish.map_or((Value::Null, Value::Null), stop_reason);
    json!({
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model.name,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage(of),
    })
}

fn stop_reason(finish: &Finish) -> (Value, Value) {
    match finish {
        Finish::Stop => ("end_turn".into(), Value::Null),
        Finish::StopString(text) => ("stop_sequence".into(), text.as_str().into()),
        Finish::Length => ("max_tokens".into(), Value::Null),
        Finish::ToolCalls => ("tool_use".into(), Value::Null),
    }
}

fn content(app: &App, block: &Block) -> Value {
    match block {
        Block::Text(text) => json!({ "type": "text", "text": text }),
        Block::Call(name, arguments) => {
            // A call that was cut off has no arguments that can be read.
            let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
            json!({ "type": "tool_use", "id": app.new_id("toolu_"), "name": name, "input": input })
        }
    }
}

async fn write_change(
    app: &App,
    events: &Events,
    index: usize,
    change: Change,
) -> Result<(), Gone> {
    let start = |block: Value| json!({ "type": "content_block_start", "index": index, "content_block": block });
    let delta =
        |delta: Value| json!({ "type": "content_block_delta", "index": index, "delta": delta });
    let event = match change {
        Change::Text => start(json!({ "type": "text", "text": "" })),
        Change::Call(name) => start(json!({
            "type": "tool_use",
            "id": app.new_id("toolu_"),
            "name": name,
            "input": {},
        })),
        Change::More(text) => delta(json!({ "type": "text_delta", "text": text })),
        Change::Arguments(text) => {
            delta(json!({ "type": "input_json_delta", "partial_json": text }))
        }
        Change::End => json!({ "type": "content_block_stop", "index": index }),
    };
    let name = event["type"].as_str().unwrap_or_default().to_owned();
    events.event(&name, &event).await
}
