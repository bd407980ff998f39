//! Frequencies of the rotary embedding and their scalings.

use crate::config::{Fields, ModelError};
use std::sync::{Arc, Mutex};
use windlass_tensor::RopeTable;

/// A rotary embedding: frequencies, and a table of cosines and sines that grows with the positions asked for.
pub struct Rope {
    short: Frequencies,
    /// For sequences beyond the original context (`longrope`): that context and the other frequencies.
    long: Option<(usize, Frequencies)>,
    tables: Mutex<[Option<Arc<RopeTable>>; 2]>,
}

#[derive(Clone, Debug, PartialEq)]
struct Frequencies {
    inv_freq: Vec<f64>,
    scale: f64,
}

impl Rope {
    /// `inv_freq[i] = theta^(-2i / rotary)`, scaled as the `rope_parameters` (or `rope_scaling`) object says:
    /// `default`, `linear`, `llama3`, `yarn` or `longrope`.
    ///
    /// # Errors
    /// An unknown scaling, by name.
    ///
    /// # Source
    /// Su et al. 2021; Peng et al. 2023 (YaRN); Ding et al. 2024 (LongRoPE); the Llama 3.1 model card.
    pub fn new(
        rotary: usize,
        theta: f64,
        scaling: Option<&Fields<'_>>,
        config: &Fields<'_>,
    ) -> Result<Self, ModelError> {
        let inv_freq: Vec<f64> = (0..rotary / 2)
            .map(|i| theta.powf(-((2 * i) as f64) / rotary as f64))
            .collect();
        let plain = Frequencies {
            inv_freq,
            scale: 1.0,
        };
        let Some(s) = scaling else {
            return Ok(Self::fixed(plain));
        };
        let kind = s
            .text("rope_type")?
            .or(s.text("type")?)
            .unwrap_or("default".into());
        match kind.as_str() {
            "default" => Ok(Self::fixed(plain)),
            "linear" => {
                let factor = s.need_number("factor")?;
                Ok(Self::fixed(Frequencies {
                    inv_freq: plain.inv_freq.iter().map(|f| f / factor).collect(),
                    scale: 1.0,
                }))
            }
            "llama3" => Ok(Self::fixed(llama3(&plain.inv_freq, s)?)),
            "yarn" => Ok(Self::fixed(yarn(
                &plain.inv_freq,
                rotary,
                theta,
                s,
                config,
            )?)),
            "longrope" | "su" => long_rope(&plain.inv_freq, s, config),
            other => Err(s.unsupported(
                "rope_type",
                other,
                "known rotary scalings: default, linear, llama3, yarn, longrope",
            )),
        }
    }

    fn fixed(short: Frequencies) -> Self {
        Rope {
            short,
            long: None,
            tables: Mutex::default(),
        }
    }

    /// The table that serves positions `0..positions`.
    pub fn table(&self, positions: usize) -> Arc<RopeTable> {
        let (index, frequencies) = match &self.long {
            Some((context, long)) if positions > *context => (1, long),
            _ => (0, &self.short),
        };
        let table = &mut self.tables.lock().expect("rope tables")[index];
        match table {
            Some(table) if table.positions() >= positions => table.clone(),
            _ => {
                let size = positions.next_power_of_two().max(256);
                table
                    .insert(Arc::new(RopeTable::new(
                        size,
                        &frequencies.inv_freq,
                        frequencies.scale,
                        false,
                    )))
                    .clone()
            }
        }
    }
}

fn llama3(inv_freq: &[f64], s: &Fields<'_>) -> Result<Frequencies, ModelError> {
    let (factor, low, high) = (
        s.need_number("factor")?,
        s.need_number("low_freq_factor")?,
        s.need_number("high_freq_factor")?,
    );
    let context = s.need_number("original_max_position_embeddings")?;
    let scaled = inv_freq.iter().map(|&f| {
        let wavelength = 2.0 * std::f64::consts::PI / f;
        if wavelength > context / low {
            f / factor
        } else if wavelength < context / high {
            f
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    });
    Ok(Frequencies {
        inv_freq: scaled.collect(),
        scale: 1.0,
    })
}

fn yarn(
    inv_freq: &[f64],
    rotary: usize,
    theta: f64,
    s: &Fields<'_>,
    config: &Fields<'_>,
) -> Result<Frequencies, ModelError> {
    let factor = s.need_number("factor")?;
    let context = match s.number("original_max_position_embeddings")? {
        Some(context) => context,
        None => config.need_number("max_position_embeddings")?,
    };
    let (fast, slow) = (
        s.number("beta_fast")?.unwrap_or(32.0),
        s.number("beta_slow")?.unwrap_or(1.0),
    );
    let mscale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * factor.ln() + 1.0
        }
    };
    let scale = match (
        s.number("attention_factor")?,
        s.number("mscale")?,
        s.number("mscale_all_dim")?,
    ) {
        (Some(given), ..) => given,
        (None, Some(m), Some(all)) => mscale(m) / mscale(all),
        _ => mscale(1.0),
    };
    let dim = |rotations: f64| {
        rotary as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln()
            / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (dim(fast), dim(slow));
    if s.flag("truncate")?.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(rotary as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    let scaled = inv_freq.iter().enumerate().map(|(i, &f)| {
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        f / factor * ramp + f * (1.0 - ramp)
    });
    Ok(Frequencies {
        inv_freq: scaled.collect(),
        scale,
    })
}

fn long_rope(inv_freq: &[f64], s: &Fields<'_>, config: &Fields<'_>) -> Result<Rope, ModelError> {
    let positions = config.need_number("max_position_embeddings")?;
    let original = match s.number("original_max_position_embeddings")? {
        Some(context) => Some(context),
        None => config.number("original_max_position_embeddings")?,
    };
    let context = original.unwrap_or(positions);
    let factor = if original.is_some() {
        positions / context
    } else {
        s.number("factor")?.unwrap_or(1.0)
    };
    let scale = match s.number("attention_factor")? {
        Some(scale) => scale,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / context.ln()).sqrt(),
    };
    let scaled = |key: &str| -> Result<Frequencies, ModelError> {
        let factors = s.need_numbers(key, inv_freq.len())?;
        Ok(Frequencies {
            inv_freq: inv_freq.iter().zip(factors).map(|(f, by)| f / by).collect(),
            scale,
        })
    };
    Ok(Rope {
        short: scaled("short_factor")?,
        long: Some((context as usize, scaled("long_factor")?)),
        tables: Mutex::default(),
    })
}
