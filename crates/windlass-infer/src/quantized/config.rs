//! What a checkpoint says of its quantized weights: `quantization_config` of `config.json`, or a file of its own.
//!
//! Which matrices are quantized is not read here: a matrix is where its tensors are, whatever the lists of exceptions say.

use serde_json::Value;
use std::path::Path;
use windlass_model::ModelError;
use windlass_model::config::Fields;

/// How the quantized matrices of a checkpoint are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// What AutoGPTQ and GPTQModel write.
    Gptq(Gptq),
    /// What AutoAWQ writes as `gemm`.
    Awq {
        /// Inputs that share a scale; all of them when `None`.
        group: Option<usize>,
    },
    /// What compressed-tensors and llm-compressor write.
    CompressedTensors {
        /// The kinds of matrices, one for each of `config_groups`.
        schemes: Vec<Scheme>,
    },
}

/// The settings of a GPTQ checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gptq {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale; all of them when `None`.
    pub group: Option<usize>,
    /// Whether groups are made of inputs that are not neighbors.
    pub desc_act: bool,
    /// Whether every zero is the middle code.
    pub sym: bool,
    /// Whether the file has zeros less one (`checkpoint_format` "gptq", not "gptq_v2").
    pub less_one: bool,
    /// Whether some matrices have settings of their own (`dynamic`): bits and groups follow from their shapes then.
    pub dynamic: bool,
}

/// A kind of matrix of a compressed-tensors checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Whether codes are packed in 32-bit words (`pack-quantized`), or are bytes (`int-quantized`).
    pub packed: bool,
    /// Bits of a code: 4 or 8.
    pub bits: usize,
    /// Inputs that share a scale; all of them when `None`.
    pub group: Option<usize>,
}

impl Quantization {
    /// Reads the settings of a folder: `quantization_config` of its `config.json`, which the caller has read, or
    /// `quantize_config.json` or `quant_config.json`. Nothing when there are none of these.
    ///
    /// # Errors
    /// A file that cannot be read, or settings that are not understood.
    pub fn of_folder(folder: &Path, config: Option<&Value>) -> Result<Option<Self>, ModelError> {
        if let Some(value) = config {
            let file = folder.join("config.json").display().to_string();
            return Self::from_value(&format!("{file}: quantization_config"), value).map(Some);
        }
        for name in ["quantize_config.json", "quant_config.json"] {
            let path = folder.join(name);
            if path.is_file() {
                let file = path.display().to_string();
                let text = std::fs::read_to_string(&path).map_err(|e| ModelError::Json {
                    file: file.clone(),
                    message: format!("cannot be read: {e}"),
                })?;
                return Self::from_json(&file, &text).map(Some);
            }
        }
        Ok(None)
    }

    /// Parses the text of a `quantize_config.json`; `file` is for messages.
    ///
    /// # Errors
    /// Malformed JSON, an unknown method, settings that are missing, contradict each other or are not supported.
    pub fn from_json(file: &str, text: &str) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text).map_err(|e| ModelError::Json {
            file: file.into(),
            message: e.to_string(),
        })?;
        Self::from_value(file, &json)
    }

    fn from_value(file: &str, json: &Value) -> Result<Self, ModelError> {
        let f = Fields::root(file, json)?;
        // Files of a single method do not name it.
        let awq = f.has("w_bit") || f.has("version");
        let unnamed = if awq { "awq" } else { "gptq" };
        let method = f.text("quant_method")?.unwrap_or_else(|| unnamed.into());
        match method.as_str() {
            "gptq" => gptq(&f).map(Quantization::Gptq),
            "awq" => awq_gemm(&f),
            "compressed-tensors" => compressed_tensors(&f),
            other => Err(f.unsupported(
                "quant_method",
                other,
                "gptq, awq and compressed-tensors are; or load the unquantized model with --load-in q4",
            )),
        }
    }
}

/// A text in lower case.
fn lower(f: &Fields<'_>, key: &str) -> Result<Option<String>, ModelError> {
    Ok(f.text(key)?.map(|text| text.to_ascii_lowercase()))
}

/// Columns of a group; `None` for -1, which stands for all.
fn group(f: &Fields<'_>, key: &str) -> Result<Option<usize>, ModelError> {
    match f.number(key)? {
        None => Err(f.error(key, "is missing", "a number of inputs, or -1 for all")),
        Some(-1.0) => Ok(None),
        Some(n) if n.fract() == 0.0 && (1.0..1e9).contains(&n) => Ok(Some(n as usize)),
        Some(n) => Err(f.error(key, format!("is {n}"), "a number of inputs, or -1 for all")),
    }
}

fn gptq(f: &Fields<'_>) -> Result<Gptq, ModelError> {
    let bits = f.need_int("bits")?;
    if ![2, 3, 4, 8].contains(&bits) {
        return Err(f.unsupported("bits", &bits.to_string(), "2, 3, 4 and 8 are"));
    }
    let key = if f.has("checkpoint_format") {
        "checkpoint_format"
    } else {
        "format"
    };
    let less_one = match lower(f, key)?.as_deref() {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(other) => {
            let hint = "gptq and gptq_v2 are; convert the checkpoint to one of these with the program that wrote it";
            return Err(f.unsupported(key, other, hint));
        }
    };
    if f.flag("is_marlin_format")?.unwrap_or(false) {
        let hint = "the checkpoint in its first layout is needed (checkpoint_format \"gptq\")";
        return Err(f.unsupported("is_marlin_format", "true", hint));
    }
    if let Some(words) = lower(f, "pack_dtype")?.filter(|words| words != "int32") {
        return Err(f.unsupported("pack_dtype", &words, "int32 is"));
    }
    f.flag("lm_head")?;
    Ok(Gptq {
        bits,
        group: group(f, "group_size")?,
        desc_act: f.flag("desc_act")?.unwrap_or(false),
        sym: f.flag("sym")?.unwrap_or(true),
        less_one,
        dynamic: f.has("dynamic"),
    })
}

fn awq_gemm(f: &Fields<'_>) -> Result<Quantization, ModelError> {
    let old = |new, old| if f.has(new) { new } else { old };
    let bits = old("bits", "w_bit");
    match f.need_int(bits)? {
        4 => {}
        n => return Err(f.unsupported(bits, &n.to_string(), "AWQ checkpoints have 4 bits")),
    }
    let version = old("version", "format");
    if let Some(other) = lower(f, version)?.filter(|v| v != "gemm") {
        let hint = "the layout \"gemm\" is; quantize with it, or load the unquantized model with --load-in q4g128";
        return Err(f.unsupported(version, &other, hint));
    }
    if !f.flag("zero_point")?.unwrap_or(true) {
        let hint = "the layout \"gemm\" has zero points";
        return Err(f.unsupported("zero_point", "false", hint));
    }
    f.list("modules_to_not_convert", |v| v.as_str().map(String::from))?;
    let group = group(f, old("group_size", "q_group_size"))?;
    Ok(Quantization::Awq { group })
}

fn compressed_tensors(f: &Fields<'_>) -> Result<Quantization, ModelError> {
    let format = lower(f, "format")?;
    let status = lower(f, "quantization_status")?;
    if let Some(status) = status.filter(|status| status != "compressed") {
        let hint = "save the checkpoint compressed";
        return Err(f.unsupported("quantization_status", &status, hint));
    }
    if let Some(sparsity) = f.object("sparsity_config")?
        && let Some(format) = lower(&sparsity, "format")?.filter(|format| format != "dense")
    {
        let hint = "save the checkpoint without compressing zeros (format \"dense\")";
        return Err(sparsity.unsupported("format", &format, hint));
    }
    f.list("ignore", |v| v.as_str().map(String::from))?;
    let groups = f.object("config_groups")?.ok_or_else(|| {
        f.error(
            "config_groups",
            "is missing",
            "it says how weights are stored",
        )
    })?;
    let mut schemes = Vec::new();
    for name in groups.keys() {
        let Some(group) = groups.object(name)? else {
            continue;
        };
        schemes.extend(scheme(&group, format.as_deref())?);
    }
    if schemes.is_empty() {
        let hint = "load it as a folder without quantization_config";
        return Err(f.error("config_groups", "no group has weights", hint));
    }
    Ok(Quantization::CompressedTensors { schemes })
}

fn scheme(f: &Fields<'_>, format: Option<&str>) -> Result<Option<Scheme>, ModelError> {
    let own = lower(f, "format")?;
    let Some(weights) = f.object("weights")? else {
        return Ok(None);
    };
    let kind = lower(&weights, "type")?.unwrap_or_else(|| "int".into());
    if kind != "int" {
        let hint = "integers are; load the unquantized model with --load-in q8";
        return Err(weights.unsupported("type", &kind, hint));
    }
    let packed = match own.as_deref().or(format) {
        Some("pack-quantized") => true,
        Some("int-quantized" | "naive-quantized") => false,
        other => {
            let hint = "pack-quantized and int-quantized are; load the unquantized model with --load-in q4";
            return Err(f.unsupported("format", other.unwrap_or("none"), hint));
        }
    };
    let bits = weights.need_int("num_bits")?;
    if bits != 8 && !(bits == 4 && packed) {
        let hint = "8 bits are, and 4 in the format pack-quantized";
        return Err(weights.unsupported("num_bits", &bits.to_string(), hint));
    }
    let sized = weights.has("group_size");
    let group = match lower(&weights, "strategy")?.as_deref() {
        Some("group") => group(&weights, "group_size")?,
        None if sized => group(&weights, "group_size")?,
        None | Some("channel" | "tensor") => None,
        Some(other) => {
            return Err(weights.unsupported("strategy", other, "group, channel and tensor are"));
        }
    };
    if let Some(inputs) = f.object("input_activations")?
        && let Some(kind) = lower(&inputs, "type")?.filter(|kind| kind != "int")
    {
        let hint = "activations are rounded to integers here; load the unquantized model";
        return Err(inputs.unsupported("type", &kind, hint));
    }
    Ok(Some(Scheme {
        packed,
        bits,
        group,
    }))
}
