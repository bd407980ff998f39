//! What a program usually needs, in one `use windlass::prelude::*`.

pub use windlass_infer::score::{Perplexity, perplexity};
pub use windlass_infer::{
    GenerateOptions, Generation, Generator, InferError, LoadedModel, SamplingParams, StopReason,
};
pub use windlass_model::{DecoderConfig, Tokenizer};
pub use windlass_tensor::{Cpu, DType};
