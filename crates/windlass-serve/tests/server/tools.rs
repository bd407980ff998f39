//! Tools and answers of a given form. The model speaks at random, so only what masks enforce is right.

use crate::house::{House, NAME};
use serde_json::{Value, json};

fn body(more: Value) -> Value {
    let mut body = json!({
        "model": NAME, "messages": [{ "role": "user", "content": "the cat" }], "max_tokens": 300, "seed": 1,
    });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "enum": ["Oslo", "Rome"] }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    json!([
        { "type": "function", "function": { "name": "weather", "description": "Weather", "parameters": parameters } },
        { "type": "function", "function": { "name": "now" } },
    ])
}

/// The arguments that a weather call may have.
#[track_caller]
fn check_weather(arguments: &Value) {
    let arguments: Value = serde_json::from_str(arguments.as_str().unwrap()).unwrap();
    assert!(
        ["Oslo", "Rome"].contains(&arguments["city"].as_str().unwrap()),
        "{arguments}"
    );
    assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()));
    assert_eq!(arguments.as_object().unwrap().len(), 2);
}

#[test]
fn a_named_tool_is_called_whole_and_streamed() {
    let house = House::new();
    let path = "/v1/chat/completions";
    let choice = json!({ "type": "function", "function": { "name": "weather" } });
    let asked =
        body(json!({ "tools": tools(), "tool_choice": choice, "parallel_tool_calls": false }));
    let whole = house.ok(path, &asked);
    let choice = &whole["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null),
        "{whole}"
    );
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(
        (calls.len(), &calls[0]["function"]["name"]),
        (1, &json!("weather"))
    );
    check_weather(&calls[0]["function"]["arguments"]);

    let events = house.stream(path, &asked);
    let mut arguments = String::new();
    let mut names = Vec::new();
    let mut pieces = 0;
    for event in &events {
        let delta = &event["choices"][0]["delta"];
        assert!(delta["content"].as_str().unwrap_or("").is_empty());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            assert_eq!(call["index"], 0);
            if call["id"].is_string() {
                names.push(call["function"]["name"].clone());
            }
            arguments += call["function"]["arguments"].as_str().unwrap();
            pieces += 1;
        }
    }
    assert_eq!(names, [json!("weather")]);
    assert!(pieces > 3, "the arguments came in {pieces} pieces");
    assert_eq!(calls[0]["function"]["arguments"], arguments);
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
}

#[test]
fn tool_choices_are_kept() {
    let house = House::new();
    let path = "/v1/chat/completions";
    for seed in 0..4 {
        let required = house.ok(
            path,
            &body(json!({ "tools": tools(), "tool_choice": "required", "seed": seed })),
        );
        let choice = &required["choices"][0];
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        for call in calls {
            match call["function"]["name"].as_str().unwrap() {
                "weather" if choice["finish_reason"] == "tool_calls" => {
                    check_weather(&call["function"]["arguments"])
                }
                "weather" | "now" => {}
                other => panic!("{other}"),
            }
        }
        let none = house.ok(
            path,
            &body(
                json!({ "tools": tools(), "tool_choice": "none", "seed": seed, "max_tokens": 20 }),
            ),
        );
        assert!(none["choices"][0]["message"].get("tool_calls").is_none());
        house.ok(
            path,
            &body(json!({ "tools": tools(), "seed": seed, "max_tokens": 20 })),
        );
    }
    // Strict tools hold for calls of the model's own choice too; text stays free.
    let mut strict = tools();
    strict[0]["function"]["strict"] = json!(true);
    house.ok(path, &body(json!({ "tools": strict, "max_tokens": 20 })));
    for (more, param) in [
        (
            json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "other" } } }),
            "tool_choice",
        ),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": tools(), "tool_choice": "sometimes" }),
            "tool_choice",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }),
            "tools[0].function.name",
        ),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "a", "parameters": 3 } }] }),
            "tools[0].function.parameters",
        ),
        (
            json!({ "tools": [{ "type": "code_interpreter" }] }),
            "tools[0].type",
        ),
    ] {
        house.refused(path, &body(more), 400, json!(param), "");
    }
    let bad = json!([{ "type": "function", "function": { "name": "a", "parameters": { "type": "strange" } } }]);
    house.refused(
        path,
        &body(json!({ "tools": bad, "tool_choice": "required" })),
        400,
        json!("tools"),
        "",
    );
}

#[test]
fn tools_work_in_the_other_shapes() {
    let house = House::new();
    let schema = tools()[0]["function"]["parameters"].clone();
    let asked = json!({
        "model": NAME, "max_tokens": 300, "messages": [{ "role": "user", "content": "x" }],
        "tools": [{ "name": "weather", "input_schema": schema }],
        "tool_choice": { "type": "tool", "name": "weather", "disable_parallel_tool_use": true },
        "seed": 2,
    });
    let whole = house.ok("/v1/messages", &asked);
    assert_eq!(
        (&whole["stop_reason"], &whole["content"][0]["type"]),
        (&json!("tool_use"), &json!("tool_use"))
    );
    check_weather(&whole["content"][0]["input"].to_string().into());
    let events = house.stream("/v1/messages", &asked);
    let parts = events
        .iter()
        .filter_map(|event| event["delta"]["partial_json"].as_str());
    check_weather(&parts.collect::<String>().into());

    let asked = json!({
        "model": NAME, "input": "x", "seed": 2, "parallel_tool_calls": false,
        "tools": [{ "type": "function", "name": "weather", "parameters": schema, "strict": true }],
        "tool_choice": { "type": "function", "name": "weather" },
    });
    let whole = house.ok("/v1/responses", &asked);
    let item = &whole["output"][0];
    assert_eq!(
        (&item["type"], &item["name"]),
        (&json!("function_call"), &json!("weather"))
    );
    check_weather(&item["arguments"]);
    let events = house.stream("/v1/responses", &asked);
    let done = events
        .iter()
        .find(|event| event["type"] == "response.function_call_arguments.done");
    assert_eq!(done.unwrap()["arguments"], item["arguments"]);
}

#[test]
fn answers_have_the_form_asked_for() {
    let house = House::new();
    let path = "/v1/chat/completions";
    let schema = json!({
        "type": "object",
        "properties": { "a": { "type": "array", "items": { "type": "boolean" }, "maxItems": 3 }, "b": { "type": "string", "pattern": "^[a-z]{2,4}$" } },
        "required": ["a", "b"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } });
    for seed in 0..5 {
        for more in [
            json!({ "response_format": format }),
            json!({ "guided_json": schema, "n": 2 }),
        ] {
            let mut asked = body(more);
            asked["seed"] = json!(seed);
            for choice in house.ok(path, &asked)["choices"].as_array().unwrap() {
                let text = choice["message"]["content"].as_str().unwrap();
                let value: Value =
                    serde_json::from_str(text).unwrap_or_else(|_| panic!("{choice}"));
                assert!(value["a"].as_array().unwrap().iter().all(Value::is_boolean));
                assert!((2..=4).contains(&value["b"].as_str().unwrap().len()));
            }
        }
    }
    let regex = house.ok(path, &body(json!({ "guided_regex": "(cat|dog) [0-9]{3}" })));
    let text = regex["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(
        text.starts_with("cat ") || text.starts_with("dog "),
        "{text}"
    );
    assert_eq!(
        (text.len(), &regex["choices"][0]["finish_reason"]),
        (7, &json!("stop"))
    );
    let asked =
        json!({ "model": NAME, "prompt": "x", "guided_grammar": "start: \"yes\" | \"no\"" });
    let lark = house.ok("/v1/completions", &asked);
    assert!(["yes", "no"].contains(&lark["choices"][0]["text"].as_str().unwrap()));
    let object = house.ok(
        path,
        &body(json!({ "response_format": { "type": "json_object" }, "max_tokens": 8 })),
    );
    assert!(
        object["choices"][0]["message"]["content"]
            .as_str()
            .unwrap()
            .starts_with('{')
    );
    for (more, param) in [
        (
            json!({ "response_format": { "type": "xml" } }),
            "response_format.type",
        ),
        (
            json!({ "response_format": { "type": "json_schema" } }),
            "response_format.json_schema",
        ),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "name": "x", "schema": { "type": "strange" } } } }),
            "response_format.json_schema.schema",
        ),
        (json!({ "guided_regex": "([" }), "guided_regex"),
        (
            json!({ "guided_regex": "a", "guided_grammar": "b" }),
            "response_format",
        ),
    ] {
        house.refused(path, &body(more), 400, json!(param), "");
    }
}
