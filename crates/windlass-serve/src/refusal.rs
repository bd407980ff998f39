//! What a request is answered with when it cannot be: one type for every error that a client sees, in OpenAI's shape.
//!
//! Clients of OpenAI retry 408, 409, 429 and everything from 500 on, so those are used only where trying again makes sense,
//! or come with `x-should-retry: false`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use windlass_infer::InferError;

/// A request that is not served, and why.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    /// The status of the response.
    pub status: StatusCode,
    /// The class of the error, such as `invalid_request_error`.
    pub kind: &'static str,
    /// What is wrong, and what to do about it.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
    /// Tokens of the prompt and of the context, where the one is too long for the other.
    pub tokens: Option<(usize, usize)>,
}

impl Refusal {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Refusal {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after: None,
            tokens: None,
        }
    }

    /// 400: the request itself is wrong.
    pub fn invalid(message: impl Into<String>) -> Self {
        Refusal::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 400: a field is wrong. The message begins with its name.
    pub fn field(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        Refusal {
            param: Some(param.clone()),
            ..Refusal::invalid(format!("{param}: {problem}"))
        }
    }

    /// 404: nothing has this address.
    pub fn not_found(message: impl Into<String>) -> Self {
        Refusal::new(StatusCode::NOT_FOUND, "not_found_error", message)
    }

    /// 404: no such model.
    pub fn no_model(name: &str, known: &[&str]) -> Self {
        Refusal {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Refusal::not_found(format!(
                "the model `{name}` does not exist; here is {}",
                known.join(", ")
            ))
        }
    }

    /// 401: no key, or a wrong one.
    pub fn unauthorized() -> Self {
        Refusal {
            code: Some("invalid_api_key"),
            ..Refusal::new(
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "a valid API key is needed: send `Authorization: Bearer KEY` or `x-api-key: KEY`",
            )
        }
    }

    /// 503: not now, but soon.
    pub fn unavailable(message: impl Into<String>, seconds: u32) -> Self {
        Refusal {
            retry_after: Some(seconds),
            ..Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "unavailable_error",
                message,
            )
        }
    }

    /// 429: too many requests wait already.
    pub fn busy(message: impl Into<String>) -> Self {
        Refusal {
            code: Some("queue_full"),
            retry_after: Some(2),
            ..Refusal::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// 500: this program or the model's files are at fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// 400: the prompt leaves no room for an answer.
    pub fn too_long(prompt: usize, context: usize) -> Self {
        let mut refusal = Refusal::new(
            StatusCode::BAD_REQUEST,
            "exceed_context_size_error",
            format!(
                "the prompt has {prompt} tokens and needs room for an answer, but the context is {context} tokens: shorten it"
            ),
        );
        refusal.code = Some("context_length_exceeded");
        refusal.tokens = Some((prompt, context));
        refusal
    }

    /// The error of the inference crate, as the client sees it.
    pub fn of_infer(error: &InferError) -> Self {
        match error {
            InferError::TooLong {
                tokens, context, ..
            } => Refusal::too_long(*tokens, *context),
            InferError::Setting { flag, rule, .. } => {
                Refusal::field(flag.replace('-', "_"), format!("must be {rule}"))
            }
            InferError::UnknownToken { .. } | InferError::Empty { .. } => {
                Refusal::invalid(error.to_string())
            }
            _ => Refusal::internal(error.to_string()),
        }
    }

    /// The body in OpenAI's shape.
    pub fn body(&self) -> Value {
        let mut error = json!({
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        });
        if let Some((prompt, context)) = self.tokens {
            error["n_prompt_tokens"] = prompt.into();
            error["n_ctx"] = context.into();
        }
        json!({ "error": error })
    }

    /// The body in Anthropic's shape.
    pub fn anthropic_body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 | 529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        };
        json!({ "type": "error", "error": { "type": kind, "message": self.message } })
    }

    /// The response with a body of the caller's shape.
    pub fn response(&self, body: &Value) -> Response {
        let mut response = (
            self.status,
            [(header::CONTENT_TYPE, "application/json")],
            body.to_string(),
        )
            .into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        self.response(&self.body())
    }
}
