//! Addresses, and what comes before every handler: request ids, keys, the log.

use crate::app::{App, Model, Phase};
use crate::refusal::Refusal;
use crate::{
    adapters, body, chat, completions, embeddings, messages, openapi, page, responses, tokens,
};
use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use subtle::ConstantTimeEq;
use tracing::Instrument;

/// Everything that is answered.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let open = Router::new()
        .route("/health", get(health))
        .route("/v1/health", get(health))
        .route("/", get(page::show));
    let mut kept = Router::new()
        .route("/version", get(version))
        .route("/openapi.json", get(openapi::show))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/apply-template", post(tokens::apply_template));
    if app.options.adapter_folder.is_some() {
        kept = kept
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload));
    }
    let kept = kept.route_layer(from_fn_with_state(app.clone(), check_key));
    open.merge(kept)
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), observe))
        .with_state(app.clone())
}

/// Gives each request an id, and writes a line about it.
async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let id = app.new_id("req_");
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", id);
    let start = Instant::now();
    let mut response = async {
        let response = next.run(request).await;
        let status = response.status().as_u16();
        let ms = start.elapsed().as_millis() as u64;
        // Probes come every few seconds.
        if path == "/health" || path == "/metrics" {
            tracing::debug!(%method, path, status, ms, "answering");
        } else {
            tracing::info!(%method, path, status, ms, "answering");
        }
        response
    }
    .instrument(span)
    .await;
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert("x-request-id", id);
    }
    let sniff = HeaderValue::from_static("nosniff");
    response
        .headers_mut()
        .insert(header::X_CONTENT_TYPE_OPTIONS, sniff);
    response
}

/// Lets in who names a key.
async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() {
        return next.run(request).await;
    }
    let headers = request.headers();
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let named = [bearer, headers.get("x-api-key").map(HeaderValue::as_bytes)];
    let mut known = subtle::Choice::from(0);
    for named in named.into_iter().flatten() {
        for key in keys {
            // Takes as long for any key of this length.
            known |= key.as_bytes().ct_eq(named.trim_ascii());
        }
    }
    match bool::from(known) {
        true => next.run(request).await,
        false if request.uri().path().starts_with("/v1/messages") => {
            let refusal = Refusal::unauthorized();
            refusal.response(&refusal.anthropic_body())
        }
        false => Refusal::unauthorized().into_response(),
    }
}

async fn nowhere(request: Request) -> Refusal {
    let (method, path) = (request.method(), request.uri().path());
    Refusal::not_found(format!("there is nothing at {method} {path}"))
}

async fn wrong_method(method: Method, request: Request) -> Refusal {
    let path = request.uri().path();
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request_error",
        format!("{path} does not answer to {method}"),
    )
}

/// Whether requests are answered.
async fn health(State(app): State<Arc<App>>) -> Response {
    match app.phase() {
        Phase::Ready => body::json(&json!({ "status": "ok" })),
        Phase::Loading => Refusal::unavailable("Loading model", 1).into_response(),
        Phase::Draining => Refusal::unavailable("the server is shutting down", 5).into_response(),
    }
}

async fn version() -> Response {
    body::json(&json!({ "version": env!("CARGO_PKG_VERSION") }))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let head = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    let models = app.models();
    let name = models.first().map_or("", |model| &model.name);
    (head, app.metrics.text(name)).into_response()
}

fn card(model: &Model, first: &Model) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "windlass",
        "max_model_len": model.context,
        "parent": model.adapter.is_some().then_some(&first.name),
    })
}

async fn models(State(app): State<Arc<App>>) -> Result<Response, Refusal> {
    let first = app.model()?;
    let models = app.models();
    let cards: Vec<Value> = models.iter().map(|model| card(model, &first)).collect();
    Ok(body::json(&json!({ "object": "list", "data": cards })))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, Refusal> {
    let model = app.model_named(Some(&id))?;
    let first = app.model()?;
    Ok(body::json(&card(&model, &first)))
}
