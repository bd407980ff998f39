//! `/tokenize`, `/detokenize` and `/apply-template`: what the model reads, without asking it.

use crate::app::App;
use crate::body;
use crate::conversation::Conversation;
use crate::refusal::Refusal;
use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;

/// The tokens of a text or of a conversation.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.text("model")?;
    let model = app.model_named(name.as_deref())?;
    let value = body::prepare(move || {
        // llama-server says `content`, vLLM `prompt`.
        let text = match fields.text("prompt")? {
            Some(text) => Some(text),
            None => fields.text("content")?,
        };
        let (text, conversation) = match text {
            Some(text) => (text, false),
            None => (Conversation::read(&mut fields)?.render(&model)?, true),
        };
        let special = fields.bool("add_special_tokens")?;
        let special = special
            .or(fields.bool("add_special")?)
            .unwrap_or(!conversation);
        let spelled = fields.bool("return_token_strs")?.unwrap_or(false);
        fields.finish()?;
        let ids = model.tokenizer.encode(&text, special);
        let ids = ids.map_err(|error| Refusal::invalid(error.to_string()))?;
        let spelled = spelled.then(|| ids.iter().map(|&id| model.text_of(id)).collect::<Vec<_>>());
        Ok(json!({
            "count": ids.len(),
            "max_model_len": model.context,
            "tokens": ids,
            "token_strs": spelled,
        }))
    })
    .await?;
    Ok(body::json(&value))
}

/// The text of tokens.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.text("model")?;
    let model = app.model_named(name.as_deref())?;
    let Some(list) = fields.list("tokens")? else {
        return Err(fields.refuse("tokens", "is missing"));
    };
    let id = |value: &Value| {
        let id = value.as_u64().filter(|&id| id < model.vocabulary as u64);
        let id =
            id.ok_or_else(|| Refusal::field("tokens", format!("{value} is no token of the model")));
        id.map(|id| id as u32)
    };
    let ids = list.iter().map(id).collect::<Result<Vec<u32>, Refusal>>()?;
    fields.finish()?;
    let text = model.tokenizer.decode(&ids, false);
    let text = text.map_err(|error| Refusal::invalid(error.to_string()))?;
    // vLLM says `prompt`, llama-server `content`.
    Ok(body::json(&json!({ "prompt": text, "content": text })))
}

/// The text that a conversation becomes.
pub(crate) async fn apply_template(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.text("model")?;
    let model = app.model_named(name.as_deref())?;
    let prompt = body::prepare(move || {
        let conversation = Conversation::read(&mut fields)?;
        fields.finish()?;
        conversation.render(&model)
    })
    .await?;
    Ok(body::json(&json!({ "prompt": prompt })))
}
