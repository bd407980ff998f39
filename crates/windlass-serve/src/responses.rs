//! `POST /v1/responses`: OpenAI's newer API. Nothing is stored, so a conversation comes whole with every request.

mod read;
mod write;

use crate::app::{App, unix_now};
use crate::blocks::Blocks;
use crate::body;
use crate::job::Answers;
use crate::refusal::Refusal;
use axum::extract::{Request, State};
use axum::response::Response;
use std::sync::Arc;
use write::{Object, Writer};

/// Answers a request for a response.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("model")?;
    let model = app.model_named(Some(&name))?;
    let ask = {
        let model = model.clone();
        body::prepare(move || read::ask(fields, &model)).await?
    };
    let (streamed, job) = (ask.stream, ask.job);
    let object = Object {
        id: app.new_id("resp_"),
        created: unix_now(),
        model: model.name.clone(),
        echo: ask.echo,
    };
    let updates = job.submit(&app, &model).await?;
    if !streamed {
        let mut answers = Answers::new(&app, &model, &job, updates)?;
        let mut blocks = Blocks::default();
        let mut finish = None;
        while let Some((_, delta)) = answers.next().await? {
            blocks.take(&delta);
            finish = delta.finish;
        }
        let items = blocks
            .list
            .iter()
            .map(|block| write::item(block, &write::Names::new(&app, block)));
        let ended = object.ended(items.collect(), finish.as_ref(), answers.usage());
        return Ok(body::json(&ended));
    }
    Ok(body::events(|events| async move {
        let mut writer = Writer::new(&app, &events, object);
        let mut answers = match Answers::new(&app, &model, &job, updates) {
            Ok(answers) => answers,
            Err(refusal) => return writer.fail(&refusal).await,
        };
        writer.begin().await?;
        loop {
            match events.until(answers.next()).await? {
                Ok(Some((_, delta))) => writer.take(delta).await?,
                Ok(None) => return writer.end(answers.usage()).await,
                Err(refusal) => return writer.fail(&refusal).await,
            }
        }
    }))
}
