//! Flags that say how tokens are chosen.

use windlass::infer::SamplingParams;

/// How tokens are chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Sampling {
    /// Below 1 more predictable, above 1 more surprising; 0 is greedy
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temperature: f64,
    /// Choose among the K likeliest tokens only [default: all]
    #[arg(long, value_name = "K", default_value_t = 0, hide_default_value = true)]
    top_k: usize,
    /// Choose among the likeliest tokens whose probabilities sum to P
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.95,
        allow_negative_numbers = true
    )]
    top_p: f64,
    /// Choose among tokens at least P times as likely as the likeliest
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    min_p: f64,
    /// Make tokens that were there before less likely (1: off)
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repetition_penalty: f64,
    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,
    /// Decides all draws: the same prompt, flags and seed give the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl Sampling {
    /// The flags as settings.
    pub fn params(&self) -> SamplingParams {
        match self.greedy {
            true => SamplingParams {
                repetition_penalty: self.repetition_penalty,
                ..SamplingParams::greedy()
            },
            false => SamplingParams {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                ..SamplingParams::default()
            },
        }
    }
}
