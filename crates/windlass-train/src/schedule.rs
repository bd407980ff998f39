//! The learning rate as a function of the step: warm-up, then a decay.
//!
//! Nothing here has a state: a resumed run asks for the same step and gets the same rate.

pub mod deepspeed;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How the learning rate falls after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Half a cosine wave from the peak to the minimum.
    #[default]
    Cosine,
    /// A straight line from the peak to the minimum.
    Linear,
    /// No decay.
    Constant,
}

/// How long the warm-up lasts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warmup {
    /// A number of steps.
    Steps(u64),
    /// A fraction of all steps, rounded to the nearest step.
    Fraction(f64),
}

/// Where the learning rate of each step comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// The same in all steps.
    Constant(f64),
    /// A warm-up and a decay.
    Schedule(Schedule),
    /// A schedule of DeepSpeed's.
    DeepSpeed(deepspeed::Scheduler),
}

impl Rate {
    /// The rate of the step after `steps` others.
    pub fn lr(&self, steps: u64) -> f64 {
        match self {
            Rate::Constant(lr) => *lr,
            Rate::Schedule(schedule) => schedule.lr(steps),
            Rate::DeepSpeed(scheduler) => scheduler.update_lr(steps),
        }
    }

    /// The betas of the step after `steps` others, where the schedule moves them.
    pub fn betas(&self, steps: u64) -> Option<(f64, f64)> {
        match self {
            Rate::DeepSpeed(scheduler) => scheduler.update_betas(steps),
            _ => None,
        }
    }
}

impl From<Schedule> for Rate {
    fn from(schedule: Schedule) -> Self {
        Rate::Schedule(schedule)
    }
}

/// The learning rate of every step of a run.
///
/// With `w` warm-up steps of `n` in total, peak `p`, minimum `m = p · min_ratio` and `x = (i − w) / (n − w)`:
/// `p · (i + 1) / w` for `i < w`, then `m + (p − m) · ½ (1 + cos πx)` (cosine), `p + (m − p) · x` (linear) or `p`
/// (constant). Steps after the last have the rate at `x = 1`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    peak: f64,
    min: f64,
    warmup: u64,
    total: u64,
    decay: Decay,
}

impl Schedule {
    /// A schedule of `total` steps with the largest rate `peak` and the smallest `peak · min_ratio`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a peak that is not positive and finite, a ratio or a fraction outside `[0, 1]`, or a
    /// warm-up longer than the run.
    pub fn new(
        peak: f64,
        min_ratio: f64,
        warmup: Warmup,
        total: u64,
        decay: Decay,
    ) -> Result<Self> {
        let check = |good: bool, setting, value: String, range| {
            let error = Error::Setting {
                setting,
                value,
                range,
            };
            if good { Ok(()) } else { Err(error) }
        };
        let positive = peak.is_finite() && peak > 0.0;
        check(
            positive,
            "the learning rate",
            peak.to_string(),
            "a positive number",
        )?;
        let ratio = (0.0..=1.0).contains(&min_ratio);
        check(
            ratio,
            "the minimum learning rate ratio",
            min_ratio.to_string(),
            "from 0 to 1",
        )?;
        let steps = match warmup {
            Warmup::Steps(steps) => steps,
            Warmup::Fraction(fraction) => {
                let inside = (0.0..=1.0).contains(&fraction);
                check(
                    inside,
                    "the warm-up fraction",
                    fraction.to_string(),
                    "from 0 to 1",
                )?;
                (fraction * total as f64).round() as u64
            }
        };
        check(
            steps <= total,
            "the number of warm-up steps",
            steps.to_string(),
            "at most the number of steps",
        )?;
        Ok(Self {
            peak,
            min: peak * min_ratio,
            warmup: steps,
            total,
            decay,
        })
    }

    /// The learning rate of step `step`, counted from zero.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let length = (self.total - self.warmup).max(1) as f64;
        let x = ((step - self.warmup) as f64 / length).min(1.0);
        match self.decay {
            Decay::Cosine => {
                let wave = 0.5 * (1.0 + (std::f64::consts::PI * x).cos());
                self.min + (self.peak - self.min) * wave
            }
            Decay::Linear => self.peak + (self.min - self.peak) * x,
            Decay::Constant => self.peak,
        }
    }

    /// The number of warm-up steps.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup
    }

    /// The number of steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_the_formulas() {
        let check = |decay, ratio, warmup, total, step, expected: f64| {
            let lr = Schedule::new(2.0, ratio, warmup, total, decay)
                .unwrap()
                .lr(step);
            assert!(
                (lr - expected).abs() < 1e-12,
                "{decay:?} {warmup:?} step {step}: {lr}"
            );
        };
        let warmup = Warmup::Steps(4);
        for decay in [Decay::Cosine, Decay::Linear, Decay::Constant] {
            for step in 0..4 {
                check(decay, 0.1, warmup, 20, step, 0.5 * (step + 1) as f64);
            }
            check(decay, 0.1, warmup, 20, 4, 2.0);
            check(decay, 0.1, Warmup::Fraction(0.2), 20, 3, 2.0);
            check(decay, 0.1, Warmup::Steps(0), 20, 0, 2.0);
            check(decay, 1.0, warmup, 20, 17, 2.0);
            check(decay, 0.1, Warmup::Steps(20), 20, 19, 2.0);
        }
        check(Decay::Cosine, 0.1, warmup, 20, 12, 1.1);
        check(
            Decay::Cosine,
            0.1,
            warmup,
            20,
            8,
            0.2 + 1.8 * 0.5 * (1.0 + 0.5f64.sqrt()),
        );
        check(Decay::Cosine, 0.1, warmup, 20, 20, 0.2);
        check(Decay::Cosine, 0.0, warmup, 20, 99, 0.0);
        check(Decay::Linear, 0.1, warmup, 20, 8, 1.55);
        check(Decay::Linear, 0.0, warmup, 20, 20, 0.0);
        check(Decay::Constant, 0.1, warmup, 20, 20, 2.0);
        let one = Schedule::new(1.0, 0.0, Warmup::Fraction(0.0), 0, Decay::Cosine).unwrap();
        assert_eq!(one.lr(0), 1.0);
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        for (peak, ratio, warmup, name) in [
            (0.0, 0.1, Warmup::Steps(0), "learning rate is 0"),
            (f64::NAN, 0.1, Warmup::Steps(0), "learning rate is NaN"),
            (1.0, 1.5, Warmup::Steps(0), "ratio is 1.5"),
            (1.0, 0.1, Warmup::Steps(11), "steps is 11"),
            (1.0, 0.1, Warmup::Fraction(-0.1), "fraction is -0.1"),
        ] {
            let error = Schedule::new(peak, ratio, warmup, 10, Decay::Cosine).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
