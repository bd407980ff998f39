//! The fields that say how tokens are chosen and when to stop, which all endpoints share.

use crate::app::Model;
use crate::fields::Fields;
use crate::refusal::Refusal;
use serde_json::Value;
use windlass_infer::SamplingParams;

/// The most stop strings of a request.
const MAX_STOPS: usize = 16;
/// The most bytes of a stop string.
const MAX_STOP_BYTES: usize = 1024;
/// The most choices of a request.
pub(crate) const MAX_CHOICES: usize = 64;
/// The most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;

/// How to choose tokens, and when to stop.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub sampling: SamplingParams,
    /// Decides all draws; without one, each request draws anew.
    pub seed: Option<u64>,
    /// Strings that end an answer.
    pub stop: Vec<String>,
    /// Tokens that end an answer beside those of the model.
    pub stop_tokens: Vec<u32>,
    /// Whether the model's own end tokens are tokens like any other.
    pub ignore_eos: bool,
    /// Tokens before which nothing ends an answer but `max_tokens`.
    pub min_tokens: usize,
}

impl Settings {
    /// Reads the fields.
    pub fn read(fields: &mut Fields, model: &Model) -> Result<Self, Refusal> {
        let mut sampling = SamplingParams::default();
        let set = |to: &mut f64, value: Option<f64>| {
            if let Some(value) = value {
                *to = value;
            }
        };
        set(
            &mut sampling.temperature,
            fields.number("temperature", 0.0, 2.0)?,
        );
        set(&mut sampling.top_p, fields.number("top_p", 0.0, 1.0)?);
        // The smallest set of tokens that sums to nothing is the most likely token.
        sampling.top_p = sampling.top_p.max(f64::MIN_POSITIVE);
        set(&mut sampling.min_p, fields.number("min_p", 0.0, 1.0)?);
        set(
            &mut sampling.presence_penalty,
            fields.number("presence_penalty", -2.0, 2.0)?,
        );
        set(
            &mut sampling.frequency_penalty,
            fields.number("frequency_penalty", -2.0, 2.0)?,
        );
        for name in ["repetition_penalty", "repeat_penalty"] {
            set(
                &mut sampling.repetition_penalty,
                fields.number(name, 0.01, 10.0)?,
            );
        }
        // -1 is off too, as vLLM has it.
        if let Some(top_k) = fields.integer("top_k", -1, i64::from(u32::MAX))? {
            sampling.top_k = top_k.max(0) as usize;
        }
        sampling.logit_bias = logit_bias(fields, model)?;
        let seed = fields.integer("seed", i64::MIN, i64::MAX)?;
        Ok(Settings {
            sampling,
            seed: seed.map(|seed| seed as u64),
            stop: stop_strings(fields, "stop")?,
            stop_tokens: stop_tokens(fields, model)?,
            ignore_eos: fields.bool("ignore_eos")?.unwrap_or(false),
            min_tokens: fields.count("min_tokens", 0, model.context)?.unwrap_or(0),
        })
    }
}

/// One string or several.
pub(crate) fn stop_strings(fields: &mut Fields, name: &str) -> Result<Vec<String>, Refusal> {
    let stops = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one) => vec![one],
    };
    if stops.len() > MAX_STOPS {
        return Err(fields.refuse(name, format!("at most {MAX_STOPS} strings")));
    }
    let text = |stop: Value| match stop {
        Value::String(text) if text.is_empty() => {
            Err(fields.refuse(name, "an empty string stops at once: leave it out"))
        }
        Value::String(text) if text.len() > MAX_STOP_BYTES => {
            Err(fields.refuse(name, format!("at most {MAX_STOP_BYTES} bytes each")))
        }
        Value::String(text) => Ok(text),
        _ => Err(fields.refuse(name, "must be a string or a list of strings")),
    };
    stops.into_iter().map(text).collect()
}

fn token_id(value: u64, model: &Model) -> Option<u32> {
    let known = value < model.vocabulary as u64;
    known.then_some(value as u32)
}

fn stop_tokens(fields: &mut Fields, model: &Model) -> Result<Vec<u32>, Refusal> {
    let name = "stop_token_ids";
    let list = fields.list(name)?.unwrap_or_default();
    if list.len() > MAX_BIASES {
        return Err(fields.refuse(name, format!("at most {MAX_BIASES} ids")));
    }
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| token_id(id, model));
        id.ok_or_else(|| fields.refuse(name, format!("{value} is no token of the model")))
    };
    list.iter().map(id).collect()
}

fn logit_bias(fields: &mut Fields, model: &Model) -> Result<Vec<(u32, f32)>, Refusal> {
    let name = "logit_bias";
    let Some(object) = fields.object(name)? else {
        return Ok(Vec::new());
    };
    let map = object.rest();
    if map.len() > MAX_BIASES {
        return Err(fields.refuse(name, format!("at most {MAX_BIASES} tokens")));
    }
    let bias = |(token, value): (&String, &Value)| {
        let id = token.parse().ok().and_then(|id| token_id(id, model));
        let id = id
            .ok_or_else(|| fields.refuse(name, format!("{token:?} is no token id of the model")))?;
        let bias = value
            .as_f64()
            .filter(|bias| (-100.0..=100.0).contains(bias));
        let bias = bias.ok_or_else(|| {
            fields.refuse(
                &format!("{name}.{token}"),
                "must be a number from -100 to 100",
            )
        })?;
        Ok((id, bias as f32))
    };
    let mut biases = map.iter().map(bias).collect::<Result<Vec<_>, Refusal>>()?;
    biases.sort_unstable_by_key(|&(id, _)| id);
    Ok(biases)
}
