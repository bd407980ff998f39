//! The known architectures: a row each, from `config.json` to decoder options.

mod base;
mod options;
mod rows;

use crate::config::{Fields, ModelError, nearest};
use base::base;
pub use options::{DecoderConfig, Experts, LayerOptions, Norm, Placement, QkNorm};
use rows::{
    bitnet, gemma2, gemma3, gpt_neox, gpt2, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3,
    qwen3_moe, smollm3, stablelm,
};
use serde_json::Value;
use std::path::Path;

type Row = (
    &'static str,
    fn(&Fields<'_>, &mut DecoderConfig) -> Result<(), ModelError>,
);

/// `model_type` and what it changes on a Llama.
const FAMILIES: &[Row] = &[
    ("llama", llama),
    ("mistral", mistral),
    ("qwen2", qwen2),
    ("qwen3", qwen3),
    ("gemma2", gemma2),
    ("gemma3_text", gemma3),
    ("phi3", phi3),
    ("smollm3", smollm3),
    ("stablelm", stablelm),
    ("olmo2", olmo2),
    ("gpt2", gpt2),
    ("gpt_neox", gpt_neox),
    ("mixtral", mixtral),
    ("qwen3_moe", qwen3_moe),
    ("bitnet", bitnet),
];

/// The known values of `model_type`.
pub fn known_architectures() -> Vec<&'static str> {
    FAMILIES.iter().map(|(name, _)| *name).collect()
}

/// The text of a folder's `config.json`, and its path for messages.
fn read(folder: &Path) -> Result<(String, String), ModelError> {
    let path = folder.join("config.json");
    let file = path.display().to_string();
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok((file, text)),
        Err(e) => Err(ModelError::Json {
            file,
            message: format!("cannot be read: {e}"),
        }),
    }
}

fn parse(file: &str, text: &str) -> Result<Value, ModelError> {
    serde_json::from_str(text).map_err(|e| ModelError::Json {
        file: file.into(),
        message: e.to_string(),
    })
}

impl DecoderConfig {
    /// Reads the `config.json` of a model folder.
    ///
    /// # Errors
    /// When the file cannot be read or says something that is not understood.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        let (file, text) = read(folder)?;
        Self::from_json(&file, &text)
    }

    /// As [`DecoderConfig::load`], of a folder whose weights may be quantized. The value of `quantization_config`, which is
    /// not in [`DecoderConfig::json`] then, is the caller's to understand.
    ///
    /// # Errors
    /// Those of [`DecoderConfig::load`], but for quantized weights.
    pub fn load_quantized(folder: &Path) -> Result<(Self, Option<Value>), ModelError> {
        let (file, text) = read(folder)?;
        let mut json = parse(&file, &text)?;
        let quantization = json
            .as_object_mut()
            .and_then(|object| object.remove("quantization_config"));
        let config = Self::from_value(&file, json)?;
        Ok((config, quantization.filter(|value| !value.is_null())))
    }

    /// Parses the text of a `config.json`; `file` is for messages.
    ///
    /// # Errors
    /// Malformed JSON, an unknown architecture, missing or contradicting keys, unsupported options.
    pub fn from_json(file: &str, text: &str) -> Result<Self, ModelError> {
        Self::from_value(file, parse(file, text)?)
    }

    fn from_value(file: &str, json: Value) -> Result<Self, ModelError> {
        let fields = Fields::root(file, &json)?;
        let name = fields.text("model_type")?.ok_or_else(|| {
            fields.error(
                "model_type",
                "is missing",
                format!("known: {}", known_architectures().join(", ")),
            )
        })?;
        let known = FAMILIES.iter().find(|(family, _)| *family == name);
        let Some((model_type, adapt)) = known else {
            return Err(ModelError::Architecture {
                file: file.into(),
                nearest: nearest(&name, known_architectures())
                    .unwrap_or_default()
                    .into(),
                name,
                known: known_architectures(),
            });
        };
        let mut config = base(model_type, &fields)?;
        adapt(&fields, &mut config)?;
        config.check(&fields)?;
        config.json = json;
        Ok(config)
    }

    /// Number of layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    fn check(&mut self, f: &Fields<'_>) -> Result<(), ModelError> {
        if !self
            .num_attention_heads
            .is_multiple_of(self.num_key_value_heads)
        {
            let message = format!(
                "{} heads are not a multiple of it",
                self.num_attention_heads
            );
            return Err(f.error(
                "num_key_value_heads",
                message,
                "each key head serves the same number of query heads",
            ));
        }
        if f.has("quantization_config") {
            let hint = "a quantized checkpoint is for inference (generate, chat, eval, bench); use the unquantized \
                        model here";
            return Err(f.error(
                "quantization_config",
                "the weights are quantized, and plain ones are needed",
                hint,
            ));
        }
        for key in [
            "attention_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "hidden_dropout",
            "resid_dropout",
        ] {
            if f.number(key)?.is_some_and(|p| p != 0.0) {
                self.notes.push(format!(
                    "{key} is not applied: this engine trains without dropout"
                ));
            }
        }
        if self.layers.is_empty() || self.layers.len() > 10_000 {
            return Err(f.error(
                "num_hidden_layers",
                format!("is {}", self.layers.len()),
                "it must be 1 to 10000",
            ));
        }
        Ok(())
    }
}
