//! Losses over answers that are compared or rated: DPO, ORPO and KTO.
//!
//! # Source
//! Rafailov et al. 2023 (DPO), Hong et al. 2024 (ORPO; as in TRL and the authors' code, its likelihood is that of the prompt with
//! the better answer), Ethayarajh et al. 2024 (KTO), as TRL writes them.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use windlass_model::Objective;

/// How answers are compared.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Preference {
    /// `-ln σ(β ((πc - rc) - (πr - rr)))` of the answers' log-likelihoods under the model and under its reference;
    /// `label_smoothing` is the part of the pairs that is taken to be the wrong way round.
    Dpo {
        /// How much the model is held to the reference.
        beta: f64,
        /// Part of the pairs that is taken to be the wrong way round.
        label_smoothing: f64,
    },
    /// The loss of the tokens of prompt and better answer, and `-β ln σ` of the log odds ratio of the answers' mean
    /// likelihoods.
    Orpo {
        /// How much the ratio counts.
        beta: f64,
    },
    /// `w (1 - σ(±β ((π - r) - kl)))` of each answer, `+` for a good one.
    Kto {
        /// How much the model is held to the reference.
        beta: f64,
        /// Weight of good answers.
        desirable_weight: f64,
        /// Weight of the others.
        undesirable_weight: f64,
    },
}

impl Preference {
    /// Whether answers come in pairs, the better one first.
    pub fn is_paired(&self) -> bool {
        !matches!(self, Preference::Kto { .. })
    }

    /// Passes through the model that come before the one that gives the loss.
    pub fn passes(&self) -> usize {
        match self {
            Preference::Orpo { .. } => 0,
            Preference::Dpo { .. } => 1,
            Preference::Kto { .. } => 3,
        }
    }

    /// Whether the model is compared with what it was before.
    pub fn has_reference(&self) -> bool {
        !matches!(self, Preference::Orpo { .. })
    }
}

/// What comparisons show, in TRL's words; sums over them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rewards {
    /// `rewards/chosen`: of the better, or good, answers.
    pub chosen: f64,
    /// `rewards/rejected`.
    pub rejected: f64,
    /// Pairs whose better answer has the higher reward.
    pub right: f64,
    /// Better, or good, answers.
    pub count_chosen: f64,
    /// Others.
    pub count_rejected: f64,
}

impl Rewards {
    /// Adds up what several batches show.
    pub(crate) fn add(&mut self, other: &Rewards) {
        self.chosen += other.chosen;
        self.rejected += other.rejected;
        self.right += other.right;
        self.count_chosen += other.count_chosen;
        self.count_rejected += other.count_rejected;
    }

    pub(crate) fn to_array(self) -> [f64; 5] {
        [
            self.chosen,
            self.rejected,
            self.right,
            self.count_chosen,
            self.count_rejected,
        ]
    }

    pub(crate) fn from_array(
        [chosen, rejected, right, count_chosen, count_rejected]: [f64; 5],
    ) -> Self {
        Rewards {
            chosen,
            rejected,
            right,
            count_chosen,
            count_rejected,
        }
    }

    /// Means by TRL's names. Accuracies are of pairs.
    pub fn means(&self) -> [(&'static str, f64); 4] {
        let mean = |sum: f64, count: f64| if count > 0.0 { sum / count } else { 0.0 };
        let chosen = mean(self.chosen, self.count_chosen);
        let rejected = mean(self.rejected, self.count_rejected);
        [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margins", chosen - rejected),
            ("rewards/accuracies", mean(self.right, self.count_chosen)),
        ]
    }
}

/// A batch of answers.
#[derive(Debug)]
pub struct Comparison {
    /// How they are compared.
    pub method: Preference,
    /// The positions of each answer's text. Of pairs, the better one stands before the other.
    pub segments: Vec<Range<usize>>,
    /// Whether each answer is a good one.
    pub labels: Vec<bool>,
    /// Tokens of each answer.
    pub tokens: Vec<usize>,
    /// The positions whose target is of a prompt, where there are such: they count in ORPO's likelihood alone.
    pub prompts: Vec<bool>,
    /// The log-likelihood of each answer under the reference.
    pub reference: Vec<f64>,
    /// KTO's estimate of how far the model is from the reference.
    pub kl: f64,
    /// Comparisons that the loss is a mean over: all of a step.
    pub count: f64,
    /// Tokens of better answers and their prompts that ORPO's likelihood is a mean over: all of a step.
    pub chosen_tokens: f64,
    /// What it has shown; see [`Comparison::rewards`].
    pub rewards: Mutex<Rewards>,
}

/// `ln σ(x)`.
fn log_sigmoid(x: f64) -> f64 {
    -((-x.abs()).exp().ln_1p()) + x.min(0.0)
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}

impl Comparison {
    /// The log-likelihood of each answer.
    pub fn log_likelihoods(&self, losses: &[f64]) -> Vec<f64> {
        let sum = |range: &Range<usize>| -> f64 {
            let answer = range.clone().filter(|&at| !self.is_prompt(at));
            -answer.map(|at| losses[at]).sum::<f64>()
        };
        self.segments.iter().map(sum).collect()
    }

    fn is_prompt(&self, at: usize) -> bool {
        self.prompts.get(at).copied().unwrap_or(false)
    }

    /// What it has shown.
    pub fn rewards(&self) -> Rewards {
        *self.rewards.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reward(&self, good: bool, reward: f64) {
        let mut rewards = self.rewards.lock().unwrap_or_else(PoisonError::into_inner);
        match good {
            true => {
                rewards.chosen += reward;
                rewards.count_chosen += 1.0;
            }
            false => {
                rewards.rejected += reward;
                rewards.count_rejected += 1.0;
            }
        }
    }

    /// Notes the rewards of a pair.
    fn pair(&self, chosen: f64, rejected: f64) {
        self.reward(true, chosen);
        self.reward(false, rejected);
        let mut rewards = self.rewards.lock().unwrap_or_else(PoisonError::into_inner);
        rewards.right += f64::from(u8::from(chosen > rejected));
    }

    /// Value of a pair but for ORPO's likelihood, and its derivatives by the two log-likelihoods.
    fn compare(&self, at: usize, logps: &[f64]) -> (f64, [f64; 2]) {
        let (c, r) = (at, at + 1);
        match self.method {
            Preference::Dpo {
                beta,
                label_smoothing: wrong,
            } => {
                let (chosen, rejected) = (
                    beta * (logps[c] - self.reference[c]),
                    beta * (logps[r] - self.reference[r]),
                );
                self.pair(chosen, rejected);
                let x = chosen - rejected;
                let value = -(1.0 - wrong) * log_sigmoid(x) - wrong * log_sigmoid(-x);
                let slope = beta * (wrong * sigmoid(x) - (1.0 - wrong) * sigmoid(-x));
                (
                    value / self.count,
                    [slope / self.count, -slope / self.count],
                )
            }
            Preference::Orpo { beta } => {
                let lengths = [c, r].map(|at| self.tokens[at].max(1) as f64);
                let means = [logps[c] / lengths[0], logps[r] / lengths[1]];
                self.pair(beta * means[0], beta * means[1]);
                // 1 - p, of a mean likelihood p.
                let rest = means.map(|mean| -mean.min(-1e-12).exp_m1());
                let odds = means[0] - means[1] - (rest[0].ln() - rest[1].ln());
                let slope = -beta * sigmoid(-odds) / self.count;
                let value = -beta * log_sigmoid(odds) / self.count;
                let slopes = [slope / rest[0], -slope / rest[1]];
                (value, [slopes[0] / lengths[0], slopes[1] / lengths[1]])
            }
            Preference::Kto { .. } => unreachable!("answers that are rated are not in pairs"),
        }
    }
}

impl Objective for Comparison {
    fn evaluate(&self, losses: &[f64]) -> (f64, Vec<f64>) {
        let logps = self.log_likelihoods(losses);
        let (mut value, mut by_logp) = (0.0, vec![0.0; logps.len()]);
        if let Preference::Kto {
            beta,
            desirable_weight,
            undesirable_weight,
        } = self.method
        {
            for (at, &good) in self.labels.iter().enumerate() {
                let ratio = logps[at] - self.reference[at];
                self.reward(good, beta * ratio);
                let (weight, sign) = match good {
                    true => (desirable_weight, 1.0),
                    false => (undesirable_weight, -1.0),
                };
                let p = sigmoid(sign * beta * (ratio - self.kl));
                value += weight * (1.0 - p) / self.count;
                by_logp[at] = -weight * sign * beta * p * (1.0 - p) / self.count;
            }
        } else {
            for at in (0..logps.len()).step_by(2) {
                let (pair, slopes) = self.compare(at, &logps);
                value += pair;
                by_logp[at..at + 2].copy_from_slice(&slopes);
            }
        }
        let mut slopes = vec![0.0; losses.len()];
        for (range, by_logp) in self.segments.iter().zip(by_logp) {
            for at in range.clone().filter(|&at| !self.is_prompt(at)) {
                slopes[at] = -by_logp;
            }
        }
        if let Preference::Orpo { .. } = self.method {
            for range in self.segments.iter().step_by(2) {
                value += losses[range.clone()].iter().sum::<f64>() / self.chosen_tokens;
                let slopes = slopes[range.clone()].iter_mut();
                slopes.for_each(|slope| *slope += 1.0 / self.chosen_tokens);
            }
        }
        (value, slopes)
    }
}
