//! Frequencies of the rotary embedding and their scalings.

use crate::config::{Fields, ModelError};
use std::sync::{Arc, Mutex};
use windlass_tensor::RopeTable;

/// How a file's scaling changes the frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    Plain,
    /// All are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Low ones are divided, as in Llama 3.1.
    Llama3,
    /// Low ones are divided, and scores are scaled.
    Yarn {
        /// By this.
        factor: f64,
        /// The context before.
        original: f64,
        /// Rotations in that context above which a frequency stays.
        beta_fast: f64,
        /// Rotations below which it is divided by all of the factor.
        beta_slow: f64,
        /// Whether the bounds are rounded to whole dimensions.
        truncate: bool,
    },
    /// Each is divided by a number of its own, others beyond a context.
    Long {
        /// That context.
        original: usize,
    },
}

/// A rotary embedding: frequencies, and a table of cosines and sines that grows with the positions asked for.
pub struct Rope {
    theta: f64,
    rotary: usize,
    scaling: Scaling,
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
        let plain = Frequencies {
            inv_freq: plain(rotary, theta),
            scale: 1.0,
        };
        let (scaling, short, long) = match scaling {
            None => (Scaling::Plain, plain, None),
            Some(s) => scaled(plain, rotary, theta, s, config)?,
        };
        Ok(Rope {
            theta,
            rotary,
            scaling,
            short,
            long,
            tables: Mutex::default(),
        })
    }

    /// The base of the frequencies.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// Dimensions of a head that are rotated.
    pub fn rotary(&self) -> usize {
        self.rotary
    }

    /// How the frequencies are changed.
    pub fn scaling(&self) -> Scaling {
        self.scaling
    }

    /// Factor of the cosines and sines.
    pub fn scale(&self) -> f64 {
        self.short.scale
    }

    /// What each frequency is divided by; those for long texts, where they have their own.
    pub fn divisors(&self, long: bool) -> Vec<f32> {
        let frequencies = match &self.long {
            Some((_, frequencies)) if long => frequencies,
            _ => &self.short,
        };
        let plain = plain(self.rotary, self.theta);
        let pairs = plain.iter().zip(&frequencies.inv_freq);
        pairs
            .map(|(plain, scaled)| (plain / scaled) as f32)
            .collect()
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

/// Frequencies before a scaling.
fn plain(rotary: usize, theta: f64) -> Vec<f64> {
    (0..rotary / 2)
        .map(|i| theta.powf(-((2 * i) as f64) / rotary as f64))
        .collect()
}

/// Frequencies, and others beyond a context.
type Scaled = (Scaling, Frequencies, Option<(usize, Frequencies)>);

fn scaled(
    plain: Frequencies,
    rotary: usize,
    theta: f64,
    s: &Fields<'_>,
    config: &Fields<'_>,
) -> Result<Scaled, ModelError> {
    let kind = s
        .text("rope_type")?
        .or(s.text("type")?)
        .unwrap_or("default".into());
    Ok(match kind.as_str() {
        "default" => (Scaling::Plain, plain, None),
        "linear" => {
            let factor = s.need_number("factor")?;
            let frequencies = Frequencies {
                inv_freq: plain.inv_freq.iter().map(|f| f / factor).collect(),
                scale: 1.0,
            };
            (Scaling::Linear { factor }, frequencies, None)
        }
        "llama3" => (Scaling::Llama3, llama3(&plain.inv_freq, s)?, None),
        "yarn" => {
            let (scaling, frequencies) = yarn(&plain.inv_freq, rotary, theta, s, config)?;
            (scaling, frequencies, None)
        }
        "longrope" | "su" => {
            let (original, short, long) = long_rope(&plain.inv_freq, s, config)?;
            (Scaling::Long { original }, short, Some((original, long)))
        }
        other => {
            return Err(s.unsupported(
                "rope_type",
                other,
                "known rotary scalings: default, linear, llama3, yarn, longrope",
            ));
        }
    })
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
) -> Result<(Scaling, Frequencies), ModelError> {
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
    let truncate = s.flag("truncate")?.unwrap_or(true);
    if truncate {
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
    let scaling = Scaling::Yarn {
        factor,
        original: context,
        beta_fast: fast,
        beta_slow: slow,
        truncate,
    };
    let inv_freq = scaled.collect();
    Ok((scaling, Frequencies { inv_freq, scale }))
}

/// The context up to which the first frequencies are meant, and the second ones.
fn long_rope(
    inv_freq: &[f64],
    s: &Fields<'_>,
    config: &Fields<'_>,
) -> Result<(usize, Frequencies, Frequencies), ModelError> {
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
    Ok((
        context as usize,
        scaled("short_factor")?,
        scaled("long_factor")?,
    ))
}
