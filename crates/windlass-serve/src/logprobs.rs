//! Log-probabilities in the two shapes of OpenAI's API.

use crate::app::Model;
use serde_json::{Map, Value, json};
use windlass_infer::sampler::TokenLogprobs;

/// JSON knows no infinity; a token that cannot be is this unlikely.
const IMPOSSIBLE: f64 = -9999.0;

fn finite(logprob: f64) -> f64 {
    match logprob.is_finite() {
        true => logprob,
        false => IMPOSSIBLE,
    }
}

impl Model {
    /// The bytes of a token; none for an id of the model that the tokenizer does not know.
    pub fn bytes_of(&self, token: u32) -> &[u8] {
        let entry = self.tokens.get(token as usize);
        entry.map_or(&[], |(bytes, _)| bytes)
    }

    /// A token as text. A part of a character is shown by its bytes.
    pub fn text_of(&self, token: u32) -> String {
        let bytes = self.bytes_of(token);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
                format!("bytes:{}", bytes.collect::<String>())
            }
        }
    }
}

/// `logprobs` of a chat choice.
pub(crate) fn chat(model: &Model, reports: &[TokenLogprobs]) -> Value {
    let entry = |token: u32, logprob: f64| {
        json!({
            "token": model.text_of(token),
            "logprob": finite(logprob),
            "bytes": model.bytes_of(token),
        })
    };
    let content = reports.iter().map(|report| {
        let top = report
            .top
            .iter()
            .map(|&(token, logprob)| entry(token, logprob));
        let mut of = entry(report.token, report.logprob);
        of["top_logprobs"] = top.collect::<Vec<_>>().into();
        of
    });
    json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
}

/// `logprobs` of a completion, which grows token by token.
#[derive(Default)]
pub(crate) struct Columns {
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    top: Vec<Value>,
    offsets: Vec<Value>,
    offset: usize,
}

impl Columns {
    /// A token without a probability: the first one of a text.
    pub fn first(&mut self, model: &Model, token: u32) {
        self.token(model, token);
        self.logprobs.push(Value::Null);
        self.top.push(Value::Null);
    }

    /// A token with its probability.
    pub fn push(&mut self, model: &Model, report: &TokenLogprobs) {
        self.token(model, report.token);
        self.logprobs.push(finite(report.logprob).into());
        let mut top = Map::new();
        // The chosen token is reported too, where it is none of the likeliest.
        let chosen = (report.token, report.logprob);
        for &(token, logprob) in report.top.iter().chain([&chosen]) {
            let name = model.text_of(token);
            top.entry(name).or_insert_with(|| finite(logprob).into());
        }
        self.top.push(top.into());
    }

    fn token(&mut self, model: &Model, token: u32) {
        self.tokens.push(model.text_of(token).into());
        self.offsets.push(self.offset.into());
        let text = String::from_utf8_lossy(model.bytes_of(token));
        self.offset += text.chars().count();
    }

    /// What was pushed since the last time.
    pub fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.logprobs),
            "top_logprobs": std::mem::take(&mut self.top),
            "text_offset": std::mem::take(&mut self.offsets),
        })
    }
}
