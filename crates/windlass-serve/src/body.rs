//! Bodies in and out: JSON within limits of size, time and depth, and answers as JSON or events.

use crate::app::App;
use crate::fields::Fields;
use crate::refusal::Refusal;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::Instrument;

/// Events that a client may be behind; then its answer waits.
const EVENTS_AHEAD: usize = 64;
/// How long an event stream is silent before a comment keeps it alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The request's JSON object.
pub(crate) async fn fields(app: &App, request: Request) -> Result<Fields, Refusal> {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim();
    // A page of another site can make a browser send text, but not JSON.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Refusal::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            "send JSON, with the header Content-Type: application/json",
        ));
    }
    let body = Limited::new(request.into_body(), app.options.max_body).collect();
    let body = tokio::time::timeout(app.options.body_timeout, body).await;
    let body = body.map_err(|_| {
        Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            "the body took too long to arrive",
        )
    })?;
    let body = body.map_err(
        |error| match error.is::<http_body_util::LengthLimitError>() {
            true => Refusal::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the body is larger than {} bytes", app.options.max_body),
            ),
            false => Refusal::invalid(format!("the body cannot be read: {error}")),
        },
    )?;
    // The parser refuses more than 128 levels.
    let value: Value = serde_json::from_slice(&body.to_bytes())
        .map_err(|error| Refusal::invalid(format!("the body is no valid JSON: {error}")))?;
    Fields::new(value)
}

/// A response of JSON.
pub(crate) fn json(value: &Value) -> Response {
    let head = [(header::CONTENT_TYPE, "application/json")];
    (head, value.to_string()).into_response()
}

/// The sending end of a stream of events.
pub(crate) struct Events(mpsc::Sender<Bytes>);

/// The client is gone.
pub(crate) struct Gone;

impl Events {
    async fn write(&self, text: String) -> Result<(), Gone> {
        self.0.send(text.into()).await.map_err(|_| Gone)
    }

    /// An event of data alone, as OpenAI has it.
    pub async fn data(&self, value: &Value) -> Result<(), Gone> {
        self.write(format!("data: {value}\n\n")).await
    }

    /// An event with a name.
    pub async fn event(&self, name: &str, value: &Value) -> Result<(), Gone> {
        self.write(format!("event: {name}\ndata: {value}\n\n"))
            .await
    }

    /// The mark that ends OpenAI's streams.
    pub async fn done(&self) -> Result<(), Gone> {
        self.write("data: [DONE]\n\n".into()).await
    }

    /// Waits for something, with comments that keep the connection alive; `Err` when the client goes away.
    pub async fn until<T>(&self, what: impl Future<Output = T>) -> Result<T, Gone> {
        let mut what = std::pin::pin!(what);
        loop {
            tokio::select! {
                outcome = &mut what => return Ok(outcome),
                () = self.0.closed() => return Err(Gone),
                () = tokio::time::sleep(KEEP_ALIVE) => self.write(": still here\n\n".into()).await?,
            }
        }
    }
}

/// A stream of events that `write` fills in a task of its own.
pub(crate) fn events<F>(write: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = Result<(), Gone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel::<Bytes>(EVENTS_AHEAD);
    // A client that is gone is no error.
    let task = write(Events(sender));
    tokio::spawn(
        async move {
            let _ = task.await;
        }
        .in_current_span(),
    );
    let frames = stream::unfold(receiver, |mut receiver| async {
        let bytes = receiver.recv().await?;
        Some((Ok::<_, Infallible>(bytes), receiver))
    });
    let head = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // A proxy of nginx holds events back otherwise.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (head, Body::from_stream(frames)).into_response()
}

/// Runs what computes for a while (templates, tokenizers, grammars) where it holds up no connection.
pub(crate) async fn prepare<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let task = tokio::task::spawn_blocking(work);
    task.await
        .unwrap_or_else(|_| Err(Refusal::internal("the request could not be prepared")))
}
