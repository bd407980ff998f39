//! Responses and the events that they come in.

use crate::app::App;
use crate::blocks::{Block, Blocks, Change};
use crate::body::{Events, Gone};
use crate::choice::{Delta, Finish};
use crate::job::Usage;
use crate::refusal::Refusal;
use serde_json::{Map, Value, json};

/// What is the same in all states of a response.
pub(super) struct Object {
    pub id: String,
    pub created: u64,
    pub model: String,
    pub echo: Map<String, Value>,
}

impl Object {
    fn state(&self, status: &str, output: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": null,
            "model": self.model,
            "output": output,
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "service_tier": "default",
            "store": false,
            "truncation": "disabled",
            "usage": usage.map(|usage| json!({
                "input_tokens": usage.prompt,
                "input_tokens_details": { "cached_tokens": usage.cached },
                "output_tokens": usage.completion,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": usage.prompt + usage.completion,
            })),
        });
        for (name, value) in &self.echo {
            object[name] = value.clone();
        }
        object
    }

    /// The response at its end.
    pub fn ended(&self, output: Vec<Value>, finish: Option<&Finish>, usage: Usage) -> Value {
        match finish {
            Some(Finish::Length) => {
                let mut object = self.state("incomplete", output, Some(usage));
                object["incomplete_details"] = json!({ "reason": "max_output_tokens" });
                object
            }
            _ => self.state("completed", output, Some(usage)),
        }
    }
}

/// The names of an item.
pub(super) struct Names {
    id: String,
    call: String,
}

impl Names {
    pub fn new(app: &App, block: &Block) -> Self {
        let prefix = match block {
            Block::Text(_) => "msg_",
            Block::Call(..) => "fc_",
        };
        Names {
            id: app.new_id(prefix),
            call: app.new_id("call_"),
        }
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

/// A finished item of the output.
pub(super) fn item(block: &Block, names: &Names) -> Value {
    match block {
        Block::Text(text) => json!({
            "type": "message",
            "id": names.id,
            "status": "completed",
            "role": "assistant",
            "content": [part(text)],
        }),
        Block::Call(name, arguments) => json!({
            "type": "function_call",
            "id": names.id,
            "call_id": names.call,
            "name": name,
            "arguments": arguments,
            "status": "completed",
        }),
    }
}

/// Writes a response event by event.
pub(super) struct Writer<'a> {
    app: &'a App,
    events: &'a Events,
    object: Object,
    blocks: Blocks,
    names: Vec<Names>,
    finish: Option<Finish>,
    sequence: u64,
}

impl<'a> Writer<'a> {
    pub fn new(app: &'a App, events: &'a Events, object: Object) -> Self {
        Writer {
            app,
            events,
            object,
            blocks: Blocks::default(),
            names: Vec::new(),
            finish: None,
            sequence: 0,
        }
    }

    async fn write(&mut self, name: &str, mut event: Value) -> Result<(), Gone> {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        self.events.event(name, &event).await
    }

    /// The response at its beginning.
    pub async fn begin(&mut self) -> Result<(), Gone> {
        let state = json!({ "response": self.object.state("in_progress", Vec::new(), None) });
        self.write("response.created", state.clone()).await?;
        self.write("response.in_progress", state).await
    }

    /// More of the answer.
    pub async fn take(&mut self, delta: Delta) -> Result<(), Gone> {
        for change in self.blocks.take(&delta) {
            self.write_change(change).await?;
        }
        self.finish = self.finish.take().or(delta.finish);
        Ok(())
    }

    async fn write_change(&mut self, change: Change) -> Result<(), Gone> {
        // Changes come in order: what begins here is the block after those that have names.
        if matches!(change, Change::Text | Change::Call(_)) {
            let begun = match &change {
                Change::Call(name) => Block::Call(name.clone(), String::new()),
                _ => Block::Text(String::new()),
            };
            let names = Names::new(self.app, &begun);
            let mut added = item(&begun, &names);
            added["status"] = "in_progress".into();
            if matches!(begun, Block::Text(_)) {
                added["content"] = json!([]);
            }
            let (index, id) = (self.names.len(), names.id.clone());
            self.names.push(names);
            let event = json!({ "output_index": index, "item": added });
            self.write("response.output_item.added", event).await?;
            if matches!(begun, Block::Text(_)) {
                let event = json!({ "item_id": id, "output_index": index, "content_index": 0, "part": part("") });
                self.write("response.content_part.added", event).await?;
            }
            return Ok(());
        }
        let index = self.names.len() - 1;
        let id = self.names[index].id.clone();
        match change {
            Change::More(text) => {
                let event = json!({ "item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": [] });
                self.write("response.output_text.delta", event).await
            }
            Change::Arguments(text) => {
                let event = json!({ "item_id": id, "output_index": index, "delta": text });
                self.write("response.function_call_arguments.delta", event)
                    .await
            }
            _ => self.write_end(index, &id).await,
        }
    }

    async fn write_end(&mut self, index: usize, id: &str) -> Result<(), Gone> {
        let block = self.blocks.list[index].clone();
        match &block {
            Block::Text(text) => {
                let at = json!({ "item_id": id, "output_index": index, "content_index": 0 });
                let mut done = at.clone();
                done["text"] = text.as_str().into();
                done["logprobs"] = json!([]);
                self.write("response.output_text.done", done).await?;
                let mut done = at;
                done["part"] = part(text);
                self.write("response.content_part.done", done).await?;
            }
            Block::Call(name, arguments) => {
                let done = json!({ "item_id": id, "output_index": index, "name": name, "arguments": arguments });
                self.write("response.function_call_arguments.done", done)
                    .await?;
            }
        }
        let done = json!({ "output_index": index, "item": item(&block, &self.names[index]) });
        self.write("response.output_item.done", done).await
    }

    /// The response at its end.
    pub async fn end(mut self, usage: Usage) -> Result<(), Gone> {
        let items = self.blocks.list.iter().zip(&self.names);
        let items = items.map(|(block, names)| item(block, names)).collect();
        let response = self.object.ended(items, self.finish.as_ref(), usage);
        let name = match self.finish {
            Some(Finish::Length) => "response.incomplete",
            _ => "response.completed",
        };
        self.write(name, json!({ "response": response })).await
    }

    /// The answer cannot go on.
    pub async fn fail(&mut self, refusal: &Refusal) -> Result<(), Gone> {
        let event =
            json!({ "code": refusal.code, "message": refusal.message, "param": refusal.param });
        self.write("error", event).await
    }
}
