//! The learning-rate schedules of DeepSpeed, by their names and with their formulas.
//!
//! A schedule is a function of `i`, the number of scheduler steps before, and has no state. DeepSpeed steps the
//! scheduler *after* each update of the optimizer, and not after a skipped one: the update after `n` others uses
//! `i = n - 1`, and the first one the value that the scheduler is created with. [`Scheduler::update_lr`] counts so.
//!
//! # Source
//! `runtime/lr_schedules.py` of DeepSpeed 0.19; one cycle and range test: Smith 2018, arXiv 1803.09820.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How a warm-up rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarmupType {
    /// `ln(i + 1) / ln(N)`.
    Log,
    /// `i / N`.
    Linear,
}

/// A warm-up of `max(2, steps)` steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Warmup {
    /// `warmup_num_steps`.
    pub steps: u64,
    /// How it rises.
    pub shape: WarmupType,
}

impl Warmup {
    fn length(&self) -> u64 {
        self.steps.max(2)
    }

    /// The fraction at `i`, while the warm-up lasts.
    fn gamma(&self, i: u64) -> Option<f64> {
        let length = self.length();
        (i < length).then(|| match self.shape {
            WarmupType::Log => 1.0 / (length as f64).ln() * ((i + 1) as f64).ln(),
            WarmupType::Linear => i as f64 / length as f64,
        })
    }
}

/// `OneCycle`: up, down, then decay; the momentum runs against the rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of the configuration")]
pub struct OneCycle {
    pub cycle_min_lr: f64,
    pub cycle_max_lr: f64,
    pub decay_lr_rate: f64,
    pub cycle_first_step_size: u64,
    /// `None` is as long as the first.
    pub cycle_second_step_size: Option<u64>,
    /// 0 is continuous.
    pub cycle_first_stair_count: u64,
    /// `None` is as many as in the first half.
    pub cycle_second_stair_count: Option<u64>,
    /// 0 does not decay.
    pub decay_step_size: u64,
    pub cycle_momentum: bool,
    pub cycle_min_mom: f64,
    pub cycle_max_mom: f64,
    pub decay_mom_rate: f64,
}

/// A schedule with its constants.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "params")]
pub enum Scheduler {
    /// From `min` to `max`, then constant: `min + (max - min) γ`.
    WarmupLR {
        /// `warmup_min_lr`.
        min: f64,
        /// `warmup_max_lr`.
        max: f64,
        /// The rise.
        warmup: Warmup,
    },
    /// From `min` to `max`, then straight back to `min` at `total`: `γ = max(0, (T - i) / max(1, T - W))`.
    WarmupDecayLR {
        /// `warmup_min_lr`.
        min: f64,
        /// `warmup_max_lr`.
        max: f64,
        /// The rise.
        warmup: Warmup,
        /// `total_num_steps`.
        total: u64,
    },
    /// From `base · min_ratio` to `base`, then half a cosine wave down to `base · cos_min_ratio`.
    WarmupCosineLR {
        /// The rate of the optimizer.
        base: f64,
        /// `warmup_min_ratio`.
        min_ratio: f64,
        /// `cos_min_ratio`.
        cos_min_ratio: f64,
        /// The rise.
        warmup: Warmup,
        /// `total_num_steps`.
        total: u64,
    },
    /// One cycle and a decay.
    OneCycle(OneCycle),
    /// `min (1 + rate · (i + 1) / size)`, the quotient rounded down in a staircase.
    LRRangeTest {
        /// `lr_range_test_min_lr`.
        min: f64,
        /// `lr_range_test_step_size`.
        step_size: u64,
        /// `lr_range_test_step_rate`.
        step_rate: f64,
        /// `lr_range_test_staircase`.
        staircase: bool,
    },
}

impl Scheduler {
    /// The rate at scheduler step `i`, counted from zero.
    pub fn lr(&self, i: u64) -> f64 {
        match *self {
            Self::WarmupLR { min, max, warmup } => {
                min + (max - min) * warmup.gamma(i).unwrap_or(1.0)
            }
            Self::WarmupDecayLR {
                min,
                max,
                warmup,
                total,
            } => {
                let decay = || {
                    let left = total as f64 - i as f64;
                    (left / (total as f64 - warmup.length() as f64).max(1.0)).max(0.0)
                };
                min + (max - min) * warmup.gamma(i).unwrap_or_else(decay)
            }
            Self::WarmupCosineLR {
                base,
                min_ratio,
                cos_min_ratio,
                warmup,
                total,
            } => {
                let length = warmup.length();
                let ratio = match warmup.gamma(i) {
                    Some(gamma) => min_ratio + gamma * (1.0 - min_ratio),
                    None => {
                        let steps = total.saturating_sub(length).max(1);
                        let x = ((i - length + 1) as f64 / steps as f64).min(1.0);
                        let wave = (1.0 + (PI * x).cos()) / 2.0;
                        (cos_min_ratio + (1.0 - cos_min_ratio) * wave).max(0.0)
                    }
                };
                base * ratio
            }
            Self::OneCycle(cycle) => cycle.lr(i),
            Self::LRRangeTest {
                min,
                step_size,
                step_rate,
                staircase,
            } => {
                let quotient = (i + 1) as f64 / step_size as f64;
                let quotient = if staircase {
                    quotient.floor()
                } else {
                    quotient
                };
                min * (1.0 + step_rate * quotient)
            }
        }
    }

    /// The betas at scheduler step `i`, when the schedule moves them.
    pub fn betas(&self, i: u64) -> Option<(f64, f64)> {
        match self {
            Self::OneCycle(cycle) if cycle.cycle_momentum => Some((cycle.momentum(i), CYCLE_BETA2)),
            _ => None,
        }
    }

    /// The rate of the update that comes after `updates` others.
    pub fn update_lr(&self, updates: u64) -> f64 {
        match (updates.checked_sub(1), *self) {
            (Some(i), _) => self.lr(i),
            (None, Self::WarmupLR { min, .. } | Self::WarmupDecayLR { min, .. }) => min,
            (None, Self::LRRangeTest { min, .. }) => min,
            (None, Self::WarmupCosineLR { .. }) => 0.0,
            (None, Self::OneCycle(cycle)) => cycle.cycle_min_lr,
        }
    }

    /// The betas of the update that comes after `updates` others, when the schedule moves them.
    pub fn update_betas(&self, updates: u64) -> Option<(f64, f64)> {
        match (updates.checked_sub(1), *self) {
            (Some(i), _) => self.betas(i),
            // DeepSpeed creates the scheduler with the least momentum, though the rate is least too.
            (None, Self::OneCycle(cycle)) if cycle.cycle_momentum => {
                Some((cycle.cycle_min_mom, CYCLE_BETA2))
            }
            (None, _) => None,
        }
    }
}

/// The second beta while a cycle moves the first.
const CYCLE_BETA2: f64 = 0.99;

impl OneCycle {
    fn second_step_size(&self) -> u64 {
        self.cycle_second_step_size
            .unwrap_or(self.cycle_first_step_size)
    }

    fn length(&self) -> u64 {
        self.cycle_first_step_size + self.second_step_size()
    }

    /// From 0 at both ends of the cycle to 1 at its peak.
    fn height(&self, i: u64) -> f64 {
        let (length, first) = (self.length() as f64, self.cycle_first_step_size as f64);
        let position = (i + 1) as f64 / length;
        let x = 1.0 + position - (1.0 + position).floor();
        let peak = first / length;
        let rising = x <= peak;
        let first_stairs = self.cycle_first_stair_count;
        let stairs = match rising {
            true => first_stairs,
            false => self.cycle_second_stair_count.unwrap_or(first_stairs),
        };
        if stairs > 0 {
            let at = ((i + 1) % self.length()) as f64;
            let stair = match at <= first {
                true => at * stairs as f64 / first,
                false => (length - at) * stairs as f64 / self.second_step_size() as f64,
            };
            return stair.floor() / stairs as f64;
        }
        match rising {
            true => x / peak,
            false => (x - 1.0) / (peak - 1.0),
        }
    }

    /// Decay intervals since the cycle's end, once it has ended.
    fn decayed(&self, i: u64) -> Option<f64> {
        let past = (i + 1)
            .checked_sub(self.length())
            .filter(|past| *past > 0)?;
        Some(past as f64 / self.decay_step_size as f64)
    }

    fn lr(&self, i: u64) -> f64 {
        match self.decayed(i) {
            None => self.cycle_min_lr + (self.cycle_max_lr - self.cycle_min_lr) * self.height(i),
            Some(_) if self.decay_step_size == 0 || self.decay_lr_rate == 0.0 => self.cycle_min_lr,
            Some(intervals) => self.cycle_min_lr / (1.0 + self.decay_lr_rate * intervals),
        }
    }

    fn momentum(&self, i: u64) -> f64 {
        let range = self.cycle_max_mom - self.cycle_min_mom;
        match self.decayed(i) {
            None => self.cycle_max_mom - range * self.height(i),
            Some(_) if self.decay_step_size == 0 || self.decay_mom_rate == 0.0 => {
                self.cycle_max_mom
            }
            Some(intervals) => self.cycle_max_mom * (1.0 + self.decay_mom_rate * intervals),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::WarmupType::{Linear, Log};
    use super::*;

    impl From<OneCycle> for Scheduler {
        fn from(cycle: OneCycle) -> Self {
            Self::OneCycle(cycle)
        }
    }

    fn warmup_lr(min: f64, steps: u64, shape: WarmupType) -> Scheduler {
        let warmup = Warmup { steps, shape };
        let max = 0.01;
        Scheduler::WarmupLR { min, max, warmup }
    }

    fn decay_lr(min: f64, shape: WarmupType, total: u64) -> Scheduler {
        let warmup = Warmup { steps: 10, shape };
        let max = 0.01;
        Scheduler::WarmupDecayLR {
            min,
            max,
            warmup,
            total,
        }
    }

    fn cosine_lr(min_ratio: f64, cos_min_ratio: f64, shape: WarmupType) -> Scheduler {
        Scheduler::WarmupCosineLR {
            base: 0.01,
            min_ratio,
            cos_min_ratio,
            warmup: Warmup { steps: 10, shape },
            total: 40,
        }
    }

    fn range_test(staircase: bool) -> Scheduler {
        Scheduler::LRRangeTest {
            min: 1e-3,
            step_size: 10,
            step_rate: 2.0,
            staircase,
        }
    }

    const CYCLE: OneCycle = OneCycle {
        cycle_min_lr: 0.001,
        cycle_max_lr: 0.01,
        decay_lr_rate: 0.0,
        cycle_first_step_size: 10,
        cycle_second_step_size: None,
        cycle_first_stair_count: 0,
        cycle_second_stair_count: None,
        decay_step_size: 0,
        cycle_momentum: true,
        cycle_min_mom: 0.8,
        cycle_max_mom: 0.9,
        decay_mom_rate: 0.0,
    };

    const UNEVEN: OneCycle = OneCycle {
        decay_lr_rate: 0.5,
        cycle_first_step_size: 6,
        cycle_second_step_size: Some(14),
        decay_step_size: 5,
        decay_mom_rate: 0.01,
        ..CYCLE
    };

    fn stairs(second: Option<u64>) -> OneCycle {
        OneCycle {
            decay_lr_rate: 0.5,
            cycle_second_step_size: Some(20),
            cycle_first_stair_count: 2,
            cycle_second_stair_count: second,
            decay_step_size: 5,
            ..CYCLE
        }
    }

    /// The steps that the tables below are for.
    const STEPS: [u64; 11] = [0, 1, 2, 5, 9, 10, 11, 25, 39, 40, 99];

    #[test]
    fn rates_are_those_of_the_formulas_in_python() {
        let check = |name: &str, schedule: Scheduler, expected: [f64; 11]| {
            for (i, expected) in STEPS.into_iter().zip(expected) {
                let lr = schedule.lr(i);
                assert!(
                    (lr - expected).abs() < 1e-15,
                    "{name} at {i}: {lr}, not {expected}"
                );
                assert_eq!(schedule.update_lr(i + 1), lr, "{name} at {i}");
            }
        };
        check(
            "WarmupLR log",
            warmup_lr(0.001, 10, Log),
            [
                0.001,
                0.0037092699609758304,
                0.005294091292476963,
                0.008003361253452792,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
            ],
        );
        check(
            "WarmupLR linear",
            warmup_lr(0.001, 10, Linear),
            [
                0.001,
                0.0019000000000000002,
                0.0028000000000000004,
                0.0055000000000000005,
                0.0091,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
                0.010000000000000002,
            ],
        );
        check(
            "WarmupLR of one step",
            warmup_lr(0.0, 1, Log),
            [
                0.0, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01,
            ],
        );
        check(
            "WarmupDecayLR log",
            decay_lr(0.001, Log, 40),
            [
                0.001,
                0.0037092699609758304,
                0.005294091292476963,
                0.008003361253452792,
                0.010000000000000002,
                0.010000000000000002,
                0.0097,
                0.0055000000000000005,
                0.0013,
                0.001,
                0.001,
            ],
        );
        check(
            "WarmupDecayLR linear",
            decay_lr(0.0, Linear, 40),
            [
                0.0,
                0.001,
                0.002,
                0.005,
                0.009000000000000001,
                0.01,
                0.009666666666666667,
                0.005,
                0.0003333333333333333,
                0.0,
                0.0,
            ],
        );
        check(
            "WarmupDecayLR shorter than its warm-up",
            decay_lr(0.0, Linear, 5),
            [
                0.0,
                0.001,
                0.002,
                0.005,
                0.009000000000000001,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
            ],
        );
        check(
            "WarmupCosineLR log",
            cosine_lr(0.1, 1e-4, Log),
            [
                0.001,
                0.003709269960975831,
                0.005294091292476963,
                0.008003361253452792,
                0.01,
                0.009972612215893682,
                0.00989074892986866,
                0.0044779099478933675,
                1.0000000000000002e-06,
                1.0000000000000002e-06,
                1.0000000000000002e-06,
            ],
        );
        check(
            "WarmupCosineLR linear",
            cosine_lr(0.0, 0.05, Linear),
            [
                0.0,
                0.001,
                0.002,
                0.005,
                0.009000000000000001,
                0.009973979002999298,
                0.009896201103485576,
                0.004753489799478646,
                0.0005,
                0.0005,
                0.0005,
            ],
        );
        check(
            "OneCycle",
            CYCLE.into(),
            [
                0.0019000000000000002,
                0.0028000000000000004,
                0.0037,
                0.0064,
                0.010000000000000002,
                0.0091,
                0.008200000000000002,
                0.001,
                0.001,
                0.001,
                0.001,
            ],
        );
        check(
            "OneCycle uneven, decaying",
            UNEVEN.into(),
            [
                0.0025,
                0.004,
                0.0055000000000000005,
                0.010000000000000002,
                0.007428571428571429,
                0.006785714285714286,
                0.0061428571428571435,
                0.000625,
                0.0003333333333333333,
                0.0003225806451612903,
                0.00011111111111111112,
            ],
        );
        check(
            "OneCycle in stairs",
            stairs(Some(5)).into(),
            [
                0.001,
                0.001,
                0.001,
                0.0055000000000000005,
                0.010000000000000002,
                0.008200000000000002,
                0.008200000000000002,
                0.0028000000000000004,
                0.0005,
                0.0004761904761904762,
                0.000125,
            ],
        );
        check(
            "OneCycle in as many stairs",
            stairs(None).into(),
            [
                0.001,
                0.001,
                0.001,
                0.0055000000000000005,
                0.010000000000000002,
                0.0055000000000000005,
                0.0055000000000000005,
                0.001,
                0.0005,
                0.0004761904761904762,
                0.000125,
            ],
        );
        check(
            "LRRangeTest",
            range_test(false),
            [
                0.0012,
                0.0014,
                0.0016,
                0.0022,
                0.003,
                0.0032,
                0.0034,
                0.006200000000000001,
                0.009000000000000001,
                0.0092,
                0.021,
            ],
        );
        check(
            "LRRangeTest staircase",
            range_test(true),
            [
                0.001,
                0.001,
                0.001,
                0.001,
                0.003,
                0.003,
                0.003,
                0.005,
                0.009000000000000001,
                0.009000000000000001,
                0.021,
            ],
        );
    }

    #[test]
    fn momentum_runs_against_the_rate() {
        let check = |cycle: OneCycle, expected: [f64; 11]| {
            for (i, expected) in STEPS.into_iter().zip(expected) {
                let (beta1, beta2) = Scheduler::OneCycle(cycle).betas(i).unwrap();
                assert!(
                    (beta1 - expected).abs() < 1e-15,
                    "{i}: {beta1}, not {expected}"
                );
                assert_eq!(beta2, 0.99);
            }
            assert_eq!(
                Scheduler::OneCycle(cycle).update_betas(0),
                Some((0.8, 0.99))
            );
        };
        check(
            CYCLE,
            [
                0.89,
                0.88,
                0.87,
                0.8400000000000001,
                0.8,
                0.81,
                0.8200000000000001,
                0.9,
                0.9,
                0.9,
                0.9,
            ],
        );
        check(
            UNEVEN,
            [
                0.8833333333333333,
                0.8666666666666667,
                0.8500000000000001,
                0.8,
                0.8285714285714286,
                0.8357142857142857,
                0.8428571428571429,
                0.9108,
                0.936,
                0.9378000000000001,
                1.044,
            ],
        );
        let still = OneCycle {
            cycle_momentum: false,
            ..CYCLE
        };
        assert_eq!(Scheduler::OneCycle(still).betas(3), None);
        assert_eq!(range_test(true).update_betas(0), None);
    }

    #[test]
    fn the_first_update_has_the_rate_that_the_scheduler_is_made_with() {
        for (schedule, first) in [
            (warmup_lr(0.001, 10, Linear), 0.001),
            (decay_lr(0.002, Linear, 40), 0.002),
            (cosine_lr(0.1, 0.0, Linear), 0.0),
            (CYCLE.into(), 0.001),
            (range_test(false), 1e-3),
        ] {
            assert_eq!(schedule.update_lr(0), first, "{schedule:?}");
        }
    }
}
