//! `POST /v1/embeddings`: the mean of the last hidden states of a text, at length 1.

use crate::app::{App, Model};
use crate::body;
use crate::completions::texts;
use crate::refusal::Refusal;
use axum::extract::{Request, State};
use axum::response::Response;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::time::Instant;
use windlass_infer::engine::{self, Event, Pooling, RequestGoal};

/// Answers a request for embeddings.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("model")?;
    let model = app.model_named(Some(&name))?;
    let base64 = match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(fields.refuse(
                "encoding_format",
                format!("must be float or base64, not {other:?}"),
            ));
        }
    };
    let dimensions = fields.count("dimensions", 1, model.hidden_size)?;
    let inputs = {
        let model = model.clone();
        body::prepare(move || {
            let inputs = texts(&mut fields, "input", &model)?;
            fields.finish()?;
            Ok(inputs)
        })
        .await?
    };
    let long = inputs.iter().find(|input| input.len() > model.context);
    if let Some(input) = long {
        return Err(Refusal::too_long(input.len(), model.context));
    }
    let tokens: usize = inputs.iter().map(Vec::len).sum();
    let vectors = compute(&app, &model, inputs).await?;
    let data = vectors.into_iter().enumerate().map(|(index, vector)| {
        let vector = shortened(vector, dimensions);
        let embedding: Value = match base64 {
            true => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                BASE64_STANDARD.encode(bytes).into()
            }
            false => vector.into(),
        };
        json!({ "object": "embedding", "index": index, "embedding": embedding })
    });
    Ok(body::json(&json!({
        "object": "list",
        "data": data.collect::<Vec<_>>(),
        "model": model.name,
        "usage": { "prompt_tokens": tokens, "total_tokens": tokens },
    })))
}

/// The vectors of texts, in their order.
async fn compute(
    app: &App,
    model: &Model,
    inputs: Vec<Vec<u32>>,
) -> Result<Vec<Vec<f32>>, Refusal> {
    let mut vectors: Vec<Option<Vec<f32>>> = vec![None; inputs.len()];
    let requests = inputs.into_iter().map(|input| engine::Request {
        goal: RequestGoal::Embed(Pooling::Mean),
        adapter: model.adapter.clone(),
        ..engine::Request::new(input)
    });
    app.metrics.arrived(vectors.len());
    let mut updates = model.engine.submit(requests.collect()).await?;
    let deadline = Instant::now() + app.options.request_timeout;
    while vectors.iter().any(Option::is_none) {
        match updates.next(deadline).await? {
            (index, Event::Embedding { values, .. }) => vectors[index] = Some(values),
            (_, Event::Failed { message, .. }) => return Err(Refusal::internal(message)),
            _ => {}
        }
    }
    Ok(vectors.into_iter().flatten().collect())
}

/// The first `dimensions` of a vector, at length 1.
fn shortened(mut vector: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
    vector.truncate(dimensions.unwrap_or(usize::MAX));
    let square: f64 = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let length = square.sqrt();
    if length > 0.0 {
        vector
            .iter_mut()
            .for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}
