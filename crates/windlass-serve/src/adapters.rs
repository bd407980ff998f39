//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while the server runs.
//!
//! They exist only where the server was given a folder for it. A request names a subfolder or GGUF file in that one, never a path. An
//! adapter is read beside the engine, which learns of it with the first request; one that is unloaded takes no more
//! requests and goes with the last answer under way.

use crate::app::{App, Model, unix_now};
use crate::body;
use crate::refusal::Refusal;
use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::path::{Component, Path};
use std::sync::Arc;
use windlass_infer::InferError;

/// The most bytes of a name.
const MAX_NAME: usize = 256;

/// Loads an adapter.
pub(crate) async fn load(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("lora_name")?;
    let place = fields.need_text("lora_path")?;
    fields.finish()?;
    let base = app.model()?;
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let rule = format!("must have 1 to {MAX_NAME} bytes, none of them control characters");
        return Err(Refusal::field("lora_name", rule));
    }
    if !is_plain(&place) {
        let rule = "must be the plain name of a folder or GGUF file among the adapters, not a path";
        return Err(Refusal::field("lora_path", rule));
    }
    app.has_room_for(&name)?;
    let loaded = name.clone();
    body::prepare(move || {
        let root = app.options.adapter_folder.as_deref();
        let root = root.expect("without a folder there is no such address");
        let path = root.join(&place);
        if !path.is_dir()
            && !path
                .extension()
                .is_some_and(|end| end == "gguf" && path.is_file())
        {
            return Err(Refusal {
                param: Some("lora_path".into()),
                ..Refusal::not_found(format!("there is no adapter {place:?}"))
            });
        }
        let overlay = base.loader.load(&path);
        let overlay = overlay.map_err(|error| unfit(root, &error))?;
        tracing::info!(name, bytes = overlay.bytes(), "adapter loaded");
        let model = Model::adapted(&base, name, overlay, unix_now());
        app.add(model.map_err(|error| Refusal::field("lora_path", error))?)
    })
    .await?;
    Ok(success(&loaded, "added"))
}

/// Takes an adapter away.
pub(crate) async fn unload(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut fields = body::fields(&app, request).await?;
    let name = fields.need_text("lora_name")?;
    fields.finish()?;
    app.model()?;
    app.remove(&name)?;
    tracing::info!(name, "adapter unloaded");
    Ok(success(&name, "removed"))
}

/// What vLLM answers.
fn success(name: &str, what: &str) -> Response {
    let head = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    let text = format!("Success: LoRA adapter '{name}' {what} successfully.");
    (head, text).into_response()
}

/// Whether a name is that of a folder and leads nowhere else.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let only = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    only && !name.starts_with('.') && !name.contains(['\\', '\0'])
}

/// An adapter that cannot be used. Where the server keeps it is not the client's business.
fn unfit(root: &Path, error: &InferError) -> Refusal {
    let hint = error.hint().unwrap_or_default();
    let text = format!("{error}; {hint}");
    let root = format!("{}/", root.display());
    Refusal::field("lora_path", text.replace(&root, ""))
}

#[cfg(test)]
mod tests {
    use super::is_plain;

    #[test]
    fn names_lead_nowhere_else() {
        for good in ["a", "sql-lora", "v1.2", "é", "a b"] {
            assert!(is_plain(good), "{good}");
        }
        for bad in [
            "", ".", "..", "/", "a/", "a/b", "/a", "./a", "../a", "a/..", ".a", "a\\b", "a\0b",
        ] {
            assert!(!is_plain(bad), "{bad}");
        }
    }
}
