//! Perplexity over the windows of llama-perplexity, and how far a model's predictions are from those of a reference.
//!
//! A text is cut into windows without overlap, the rest is left out. The first token of each window is replaced by the one
//! that begins a text, where the model has texts begin with one, and the tokens of the second half but the first are
//! scored: each is predicted from half a window at least.
//!
//! # Source
//! `tools/perplexity/perplexity.cpp` of llama.cpp; the measures of the divergence are its own too.

use crate::saved_logits::{Row, SavedLogits, Writer, encode, first_scored};
use crate::score::{Moments, PASS_TOKENS, Perplexity, losses};
use crate::{InferError, LoadedModel};
use serde::Serialize;
use std::path::Path;
use std::sync::OnceLock;
use windlass_model::Goal;
use windlass_store::atomic::Disk;
use windlass_tensor::{Category, DType};

/// Bytes of logits that are computed at once, as far as windows can be parted.
const LOGIT_BYTES: usize = 64 << 20;

/// `exp` of the mean loss over the second halves of windows of `window` tokens. With `save` the log-probabilities are
/// written to a file that [`divergence`] reads.
///
/// `tell` hears after each pass how many tokens are done, and the mean loss so far.
///
/// # Errors
/// [`InferError::Setting`] for a window that is longer than the context or the text; [`InferError::Empty`],
/// [`InferError::UnknownToken`], [`InferError::BadLogit`]; whatever hinders writing.
pub fn perplexity_of_halves(
    model: &LoadedModel,
    ids: &[u32],
    window: usize,
    save: Option<(&dyn Disk, &Path)>,
    tell: &mut dyn FnMut(usize, f64),
) -> Result<Perplexity, InferError> {
    let read = Windows::new(model, ids, window)?;
    let kept = &ids[..ids.len() / window * window];
    let vocabulary = model.config.vocab_size;
    let mut writer = save
        .map(|(disk, path)| Writer::create(disk, path, kept, window, vocabulary))
        .transpose()?;
    let mut scored = Moments::default();
    let mut done = 0;
    let at_once = match writer {
        Some(_) => read.at_once(),
        None => (PASS_TOKENS / window).max(1),
    };
    for pass in read.windows.chunks(at_once) {
        match &mut writer {
            None => {
                let from = first_scored(window) + 1;
                let sequences: Vec<(&[u32], usize)> =
                    pass.iter().map(|ids| (&ids[..], from)).collect();
                let losses = losses(model, &sequences);
                losses.iter().flatten().for_each(|loss| scored.add(*loss));
            }
            Some(writer) => {
                let rows = read.map(pass, |logits, next, _| {
                    let log_sum = log_sum(logits)?;
                    let loss = log_sum - f64::from(logits[next]);
                    Ok((loss, encode(logits, log_sum)))
                })?;
                for (loss, bytes) in rows {
                    scored.add(loss);
                    writer.write(&bytes)?;
                }
            }
        }
        done += pass.len() * window;
        tell(done, scored.mean());
    }
    if let Some(writer) = writer {
        writer.finish()?;
    }
    let windows = kept.len() / window;
    Ok(scored.perplexity(ids.len(), window, None, windows))
}

fn check(model: &LoadedModel, ids: &[u32], window: usize) -> Result<(), InferError> {
    let refuse = |rule, hint| {
        Err(InferError::Setting {
            flag: "window",
            value: window.to_string(),
            rule,
            hint,
        })
    };
    if ids.len() < 2 {
        return Err(InferError::Empty {
            what: "the text",
            hint: "a text of at least two tokens is needed",
        });
    }
    model.check_ids(ids)?;
    if window < 4 || window > model.context() {
        let rule = "4 or more, and at most the context of the model (max_position_embeddings)";
        return refuse(rule, "leave out the flag to use 512, or the whole context");
    }
    if ids.len() < window {
        let rule = "at most the tokens of the text, of which only whole windows are scored";
        let hint = "take a longer text or a smaller window, or score every token with --stride";
        return refuse(rule, hint);
    }
    Ok(())
}

/// The windows of a text, as they are read.
pub(crate) struct Windows<'a> {
    model: &'a LoadedModel,
    pub windows: Vec<Vec<u32>>,
}

impl<'a> Windows<'a> {
    /// # Errors
    /// [`InferError::Setting`] for a window that is longer than the context or the text; [`InferError::Empty`],
    /// [`InferError::UnknownToken`].
    pub fn new(model: &'a LoadedModel, ids: &[u32], window: usize) -> Result<Self, InferError> {
        check(model, ids, window)?;
        let begin = model.begins_texts_with()?;
        let windows = ids.chunks_exact(window).map(|ids| {
            let mut ids = ids.to_vec();
            if let Some(begin) = begin {
                ids[0] = begin;
            }
            ids
        });
        Ok(Windows {
            model,
            windows: windows.collect(),
        })
    }

    /// Windows whose logits are computed in one pass.
    fn at_once(&self) -> usize {
        let window = self.windows[0].len();
        let bytes = 4 * self.model.config.vocab_size * (window - first_scored(window));
        (PASS_TOKENS / window).min(LOGIT_BYTES / bytes).max(1)
    }

    /// Something of every scored token of some windows, made on all threads from the logits before it, the token, and the
    /// index of the row.
    fn map<T: Send + Sync>(
        &self,
        windows: &[Vec<u32>],
        make: impl Fn(&[f32], usize, usize) -> Result<T, InferError> + Sync,
    ) -> Result<Vec<T>, InferError> {
        let window = windows[0].len();
        let scored = first_scored(window)..window - 1;
        let rows = (0..windows.len()).flat_map(|w| scored.clone().map(move |at| w * window + at));
        let rows: Vec<usize> = rows.collect();
        let ids = windows.concat();
        let goal = Goal::Logits {
            rows: rows.iter().map(|&row| row as u32).collect(),
        };
        let lengths = vec![window; windows.len()];
        let batch = self.model.whole(ids.clone(), &lengths, goal);
        let cpu = self.model.store.cpu();
        let mut logits = self.model.run(&batch, true);
        if logits.dtype() != DType::F32 {
            logits = logits.cast(cpu, DType::F32, Category::Activations);
        }
        let logits = logits.as_slice::<f32>();
        let vocabulary = self.model.config.vocab_size;
        let made: Vec<OnceLock<Result<T, InferError>>> =
            rows.iter().map(|_| OnceLock::new()).collect();
        cpu.pool.run(rows.len(), |row, _| {
            let logits = &logits[row * vocabulary..][..vocabulary];
            let value = make(logits, ids[rows[row] + 1] as usize, row);
            let _ = made[row].set(value);
        });
        let made = made.into_iter();
        made.map(|value| value.into_inner().expect("every row was made"))
            .collect()
    }
}

/// The logarithm of the sum of exponentials.
fn log_sum(logits: &[f32]) -> Result<f64, InferError> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let largest = f64::from(largest);
    let sum: f64 = logits.iter().map(|&l| (f64::from(l) - largest).exp()).sum();
    if sum.is_finite() {
        return Ok(largest + sum.ln());
    }
    let bad = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
    let token = logits.iter().position(bad).unwrap_or(0);
    Err(InferError::BadLogit {
        token: token as u32,
        value: logits[token],
    })
}

/// How far a model's predictions are from those of a reference. Errors are standard errors of the mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean of `KL(reference || model)` over the scored tokens, in nats.
    pub mean_kl: f64,
    /// Its error.
    pub mean_kl_error: f64,
    /// The value that half of the tokens stay below.
    pub median_kl: f64,
    /// The value that 99 of 100 tokens stay below.
    pub kl_99: f64,
    /// The largest one.
    pub max_kl: f64,
    /// Share of the tokens where both find the same one likeliest.
    pub same_top: f64,
    /// Its error.
    pub same_top_error: f64,
    /// Mean of the change in probability of the text's own token: 0.01 is one percent.
    pub mean_delta_p: f64,
    /// Its error.
    pub mean_delta_p_error: f64,
    /// Root of the mean square of that change.
    pub rms_delta_p: f64,
    /// Its error.
    pub rms_delta_p_error: f64,
    /// Perplexity of the model.
    pub perplexity: f64,
    /// Its error.
    pub perplexity_error: f64,
    /// Perplexity of the reference, as far as its file tells: losses of more than 16 above the likeliest token's are cut.
    pub reference_perplexity: f64,
    /// Its error.
    pub reference_perplexity_error: f64,
    /// The model's perplexity over the reference's.
    pub perplexity_ratio: f64,
    /// Its error, smaller than those of the two: they err alike.
    pub perplexity_ratio_error: f64,
    /// Tokens scored.
    pub scored_tokens: usize,
    /// Tokens that a window holds.
    pub window: usize,
    /// Windows read.
    pub windows: usize,
}

/// What is measured at one token.
struct Measured {
    kl: f64,
    loss: f64,
    reference_loss: f64,
    same_top: bool,
}

/// Compares a model with the reference that a file was saved of, on the text that is in the file.
///
/// `tell` hears after each pass how many windows are done, and the mean divergence so far.
///
/// # Errors
/// [`InferError::OtherVocabulary`]; [`InferError::Setting`] for windows longer than the context;
/// [`InferError::UnknownToken`], [`InferError::BadLogit`]; a damaged file.
pub fn divergence(
    model: &LoadedModel,
    reference: &SavedLogits,
    tell: &mut dyn FnMut(usize, f64),
) -> Result<Divergence, InferError> {
    if reference.vocabulary() != model.config.vocab_size {
        return Err(InferError::OtherVocabulary {
            found: model.config.vocab_size,
            expected: reference.vocabulary(),
        });
    }
    let ids = reference.ids();
    let read = Windows::new(model, &ids, reference.window())?;
    let mut sums = Sums::default();
    let mut done = 0;
    for pass in read.windows.chunks(read.at_once()) {
        let mut rows = Vec::new();
        for window in done..done + pass.len() {
            rows.extend(reference.rows(window)?);
        }
        let measured = read.map(pass, |logits, next, row| measure(logits, rows[row], next))?;
        measured.iter().for_each(|measured| sums.add(measured));
        done += pass.len();
        tell(done, sums.kl.mean());
    }
    Ok(sums.finish(reference))
}

fn measure(logits: &[f32], reference: Row<'_>, next: usize) -> Result<Measured, InferError> {
    /// Probabilities below `e^-16` are not told apart by the file.
    const LEAST: f32 = -16.0;
    let log_sum = log_sum(logits)?;
    let mut kl = 0.0;
    let mut top = ((f32::NEG_INFINITY, 0), (f32::NEG_INFINITY, 0));
    for (token, &logit) in logits.iter().enumerate() {
        let expected = reference.of(token);
        if logit > top.0.0 {
            top.0 = (logit, token);
        }
        if expected > top.1.0 {
            top.1 = (expected, token);
        }
        if expected > LEAST {
            let expected = f64::from(expected);
            kl += expected.exp() * (expected - f64::from(logit) + log_sum);
        }
    }
    Ok(Measured {
        kl,
        loss: log_sum - f64::from(logits[next]),
        reference_loss: -f64::from(reference.of(next)),
        same_top: top.0.1 == top.1.1,
    })
}

/// Sums over tokens.
#[derive(Default)]
struct Sums {
    kl: Moments,
    kls: Vec<f64>,
    loss: Moments,
    reference_loss: Moments,
    /// Of the difference of the losses.
    ratio: Moments,
    delta_p: Moments,
    delta_p_squared: Moments,
    same_top: Moments,
}

impl Sums {
    fn add(&mut self, measured: &Measured) {
        let (loss, reference_loss) = (measured.loss, measured.reference_loss);
        self.kl.add(measured.kl);
        self.kls.push(measured.kl);
        self.loss.add(loss);
        self.reference_loss.add(reference_loss);
        self.ratio.add(loss - reference_loss);
        let change = (-loss).exp() - (-reference_loss).exp();
        self.delta_p.add(change);
        self.delta_p_squared.add(change * change);
        self.same_top.add(f64::from(u8::from(measured.same_top)));
    }

    fn finish(mut self, reference: &SavedLogits) -> Divergence {
        self.kls.sort_by(f64::total_cmp);
        let quantile = |share: f64| {
            let at = share * (self.kls.len() - 1) as f64;
            let (low, part) = (at as usize, at.fract());
            let high = (low + 1).min(self.kls.len() - 1);
            (1.0 - part) * self.kls[low] + part * self.kls[high]
        };
        let exp =
            |moments: &Moments| (moments.mean().exp(), moments.mean().exp() * moments.error());
        let (perplexity, perplexity_error) = exp(&self.loss);
        let (reference_perplexity, reference_perplexity_error) = exp(&self.reference_loss);
        let (perplexity_ratio, perplexity_ratio_error) = exp(&self.ratio);
        let rms_delta_p = self.delta_p_squared.mean().sqrt();
        Divergence {
            mean_kl: self.kl.mean(),
            mean_kl_error: self.kl.error(),
            median_kl: quantile(0.5),
            kl_99: quantile(0.99),
            max_kl: quantile(1.0),
            same_top: self.same_top.mean(),
            same_top_error: self.same_top.error(),
            mean_delta_p: self.delta_p.mean(),
            mean_delta_p_error: self.delta_p.error(),
            rms_delta_p,
            rms_delta_p_error: match rms_delta_p > 0.0 {
                true => self.delta_p_squared.error() / (2.0 * rms_delta_p),
                false => 0.0,
            },
            perplexity,
            perplexity_error,
            reference_perplexity,
            reference_perplexity_error,
            perplexity_ratio,
            perplexity_ratio_error,
            scored_tokens: self.kls.len(),
            window: reference.window(),
            windows: reference.windows(),
        }
    }
}
