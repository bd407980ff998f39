//! The description of the interface, for programs that read OpenAPI.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// The document.
pub(crate) async fn show() -> Response {
    let head = [(header::CONTENT_TYPE, "application/json")];
    let text = include_str!("openapi.json").replace("{version}", env!("CARGO_PKG_VERSION"));
    (head, text).into_response()
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
