//! The loss scale of fp16 training: a state machine without arithmetic on tensors.

use serde::{Deserialize, Serialize};

/// How the loss scale is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossScale {
    /// Always this.
    Static(f64),
    /// As large as gradients allow.
    Dynamic {
        /// The scale at the start is 2 to this power.
        initial_scale_power: u32,
        /// Clean steps before the scale doubles.
        loss_scale_window: u64,
        /// Overflows before the scale halves.
        hysteresis: u64,
        /// Whether a clean step restores the hysteresis.
        consecutive_hysteresis: bool,
        /// The least scale.
        min_loss_scale: f64,
    },
}

impl Default for LossScale {
    fn default() -> Self {
        Self::Dynamic {
            initial_scale_power: 16,
            loss_scale_window: 1000,
            hysteresis: 2,
            consecutive_hysteresis: false,
            min_loss_scale: 1.0,
        }
    }
}

/// The loss scale and what it remembers.
///
/// An overflow skips the step. With the hysteresis used up it halves the scale, down to the minimum; before that it
/// uses up one of the hysteresis. `loss_scale_window` clean steps after the last overflow double the scale and restore
/// the hysteresis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    rule: LossScale,
    scale: f64,
    iteration: u64,
    /// The first step after the last overflow.
    clean_since: u64,
    hysteresis: u64,
    exhausted: bool,
}

impl LossScaler {
    /// A scaler at its start.
    pub fn new(rule: LossScale) -> Self {
        let (scale, hysteresis) = match rule {
            LossScale::Static(scale) => (scale, 1),
            LossScale::Dynamic {
                initial_scale_power,
                hysteresis,
                ..
            } => (2f64.powi(initial_scale_power as i32), hysteresis),
        };
        Self {
            rule,
            scale,
            iteration: 0,
            clean_since: 0,
            hysteresis,
            exhausted: false,
        }
    }

    /// The rule that it follows.
    pub fn rule(&self) -> LossScale {
        self.rule
    }

    /// What the loss is multiplied by, and gradients are divided by.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Steps seen, skipped ones included.
    pub fn iteration(&self) -> u64 {
        self.iteration
    }

    /// Overflows that the scale still bears before it halves.
    pub fn hysteresis(&self) -> u64 {
        self.hysteresis
    }

    /// Whether the last step overflowed at the least scale: nothing is left to try. DeepSpeed ends the run here
    /// ("Current loss scale already at minimum - cannot decrease scale anymore").
    pub fn exhausted(&self) -> bool {
        self.exhausted
    }

    /// Takes note of a step and says whether it is to be skipped: when a gradient of any rank was not finite.
    pub fn update(&mut self, overflow: bool) -> bool {
        self.exhausted = false;
        if let LossScale::Dynamic {
            loss_scale_window,
            hysteresis,
            consecutive_hysteresis,
            min_loss_scale,
            ..
        } = self.rule
        {
            if overflow {
                if self.hysteresis <= 1 {
                    self.exhausted = self.scale <= min_loss_scale;
                    self.scale = (self.scale / 2.0).max(min_loss_scale);
                } else {
                    self.hysteresis -= 1;
                }
                self.clean_since = self.iteration + 1;
            } else {
                if consecutive_hysteresis {
                    self.hysteresis = hysteresis;
                }
                let clean = self.iteration - self.clean_since;
                if clean > 0 && clean.is_multiple_of(loss_scale_window) {
                    self.hysteresis = hysteresis;
                    self.scale *= 2.0;
                }
            }
        }
        self.iteration += 1;
        overflow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dynamic(power: u32, window: u64, hysteresis: u64, consecutive: bool) -> LossScaler {
        LossScaler::new(LossScale::Dynamic {
            initial_scale_power: power,
            loss_scale_window: window,
            hysteresis,
            consecutive_hysteresis: consecutive,
            min_loss_scale: 1.0,
        })
    }

    /// Runs a scaler over steps (`x` overflows) and compares the scale after each with powers of two.
    #[track_caller]
    fn check(mut scaler: LossScaler, steps: &str, powers: &[i32]) {
        assert_eq!(steps.len(), powers.len());
        for (at, (step, power)) in steps.chars().zip(powers).enumerate() {
            let copy = serde_json::to_string(&scaler).unwrap();
            scaler = serde_json::from_str(&copy).unwrap();
            let overflow = step == 'x';
            assert_eq!(scaler.update(overflow), overflow, "step {at}");
            assert_eq!(
                scaler.scale(),
                2f64.powi(*power),
                "after step {at} of {steps}"
            );
            assert_eq!(scaler.iteration(), at as u64 + 1);
        }
    }

    #[test]
    fn the_scale_doubles_after_each_window_of_clean_steps() {
        check(
            dynamic(8, 2, 1, false),
            "..........",
            &[8, 8, 9, 9, 10, 10, 11, 11, 12, 12],
        );
        check(dynamic(16, 1, 2, false), "....", &[16, 17, 18, 19]);
    }

    #[test]
    fn each_overflow_halves_the_scale_down_to_its_least() {
        check(
            dynamic(4, 2, 1, false),
            "xxxxxxxx",
            &[3, 2, 1, 0, 0, 0, 0, 0],
        );
        let mut scaler = dynamic(1, 2, 1, false);
        let exhausted: Vec<bool> = [true, true, true, false]
            .map(|overflow| (scaler.update(overflow), scaler.exhausted()).1)
            .into();
        assert_eq!(exhausted, [false, true, true, false]);
    }

    #[test]
    fn windows_are_counted_from_the_last_overflow() {
        // The step of the overflow is not part of the window, and one more clean step closes it.
        check(
            dynamic(8, 2, 1, false),
            "...x...x....",
            &[8, 8, 9, 8, 8, 8, 9, 8, 8, 8, 9, 9],
        );
    }

    #[test]
    fn hysteresis_bears_overflows_until_it_is_used_up() {
        // Restored by a full window only,
        check(
            dynamic(8, 3, 2, false),
            "x.x.x....x",
            &[8, 8, 7, 7, 6, 6, 6, 6, 7, 7],
        );
        // or by every clean step.
        check(
            dynamic(8, 9, 2, true),
            "x.x.xx.x",
            &[8, 8, 8, 8, 8, 7, 7, 7],
        );
        check(dynamic(8, 9, 3, false), "xxxx", &[8, 8, 7, 6]);
    }

    #[test]
    fn a_static_scale_stays_and_still_skips() {
        let mut scaler = LossScaler::new(LossScale::Static(128.0));
        assert_eq!(
            [true, false, true].map(|overflow| scaler.update(overflow)),
            [true, false, true]
        );
        assert_eq!(
            (scaler.scale(), scaler.iteration(), scaler.exhausted()),
            (128.0, 3, false)
        );
    }

    #[test]
    fn the_default_is_that_of_the_configuration() {
        let mut scaler = LossScaler::new(LossScale::default());
        assert_eq!(scaler.scale(), 65536.0);
        for _ in 0..=1000 {
            assert_eq!(scaler.scale(), 65536.0);
            scaler.update(false);
        }
        assert_eq!(scaler.scale(), 131072.0);
    }
}
