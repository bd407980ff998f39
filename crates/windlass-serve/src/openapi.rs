//! The description of the interface, for programs that read OpenAPI.

use crate::app::App;
use crate::body;
use axum::extract::State;
use axum::response::Response;
use serde_json::Value;
use std::sync::Arc;

/// The document, without addresses that this server does not have.
pub(crate) async fn show(State(app): State<Arc<App>>) -> Response {
    let text = include_str!("openapi.json").replace("{version}", env!("CARGO_PKG_VERSION"));
    let mut document: Value = serde_json::from_str(&text).expect("a document of our own");
    if let (None, Some(paths)) = (
        &app.options.adapter_folder,
        document["paths"].as_object_mut(),
    ) {
        paths.retain(|path, _| !path.ends_with("load_lora_adapter"));
    }
    body::json(&document)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    /// Every reference leads somewhere.
    #[test]
    fn the_document_is_whole() {
        let document: Value = serde_json::from_str(include_str!("openapi.json")).unwrap();
        fn visit(value: &Value, document: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(to)) = map.get("$ref") {
                        let pointer = to.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{to}");
                    }
                    map.values().for_each(|value| visit(value, document));
                }
                Value::Array(list) => list.iter().for_each(|value| visit(value, document)),
                _ => {}
            }
        }
        visit(&document, &document);
        assert_eq!(document["openapi"], "3.1.0");
    }
}
