//! From one row of logits to one token.
//!
//! The transforms compose in the order of Hugging Face transformers: bias, repetition penalty, (of OpenAI, as vLLM
//! places them) frequency and presence penalty, tokens that are not allowed, temperature, top-k, top-p, min-p.
//! Randomness is an argument: the same logits, settings and generator state give the same token on every machine. The
//! module neither runs a model nor decides when to stop.

mod logprobs;
mod weights;

pub use logprobs::{TokenLogprobs, token_logprobs};
use weights::{best, sum, weigh};

use std::cmp::Ordering;

use windlass_tensor::rng::Rng;

use crate::InferError;

/// The user's sampling settings, under the names of `generation_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy decoding, where the truncations below change nothing.
    pub temperature: f64,
    /// Keeps the k most likely tokens (and those tied with the k-th); 0 is off.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probabilities sum to this or more; 1 is off.
    pub top_p: f64,
    /// Keeps tokens at least this many times as likely as the most likely one; 0 is off.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of the tokens seen before, in the prompt too; 1 is off.
    pub repetition_penalty: f64,
    /// Is subtracted from the logit of a token for each time it was generated; 0 is off.
    pub frequency_penalty: f64,
    /// Is subtracted once from the logits of the tokens generated so far; 0 is off.
    pub presence_penalty: f64,
    /// Is added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    /// The model's own distribution: temperature 1 and everything else off.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// The most likely token at each step.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`InferError::Setting`] names the first flag at fault.
    pub fn validate(&self) -> Result<(), InferError> {
        let refuse = |flag, value: f64, rule, hint| {
            Err(InferError::Setting {
                flag,
                value: value.to_string(),
                rule,
                hint,
            })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            let hint = "0 always takes the most likely token; 0.7 to 1 are usual";
            let rule = "a number of 0 or more";
            return refuse("temperature", self.temperature, rule, hint);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let hint = "1 keeps every token; 0.9 and 0.95 are usual";
            let rule = "more than 0 and at most 1";
            return refuse("top-p", self.top_p, rule, hint);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            let hint = "0 keeps every token; 0.05 and 0.1 are usual";
            return refuse("min-p", self.min_p, "between 0 and 1", hint);
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let hint = "1 is no penalty; 1.1 and 1.2 are usual";
            let rule = "a number greater than 0";
            return refuse("repetition-penalty", self.repetition_penalty, rule, hint);
        }
        let biases = self.logit_bias.iter();
        for (flag, value) in [
            ("frequency-penalty", self.frequency_penalty),
            ("presence-penalty", self.presence_penalty),
        ]
        .into_iter()
        .chain(biases.map(|&(_, bias)| ("logit-bias", f64::from(bias))))
        {
            if !value.is_finite() {
                return refuse(flag, value, "a finite number", "0 changes nothing");
            }
        }
        Ok(())
    }
}

/// A token that may be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token id.
    pub id: u32,
    /// The probability, among the candidates it came with.
    pub probability: f64,
}

impl Candidate {
    /// The order of preference: by probability, and of equals the lower id is the greater.
    fn preference(&self, other: &Self) -> Ordering {
        let by_probability = self.probability.total_cmp(&other.probability);
        by_probability.then(other.id.cmp(&self.id))
    }
}

/// What a token is chosen after.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The tokens of the prompt.
    pub prompt: &'a [u32],
    /// The tokens generated so far.
    pub generated: &'a [u32],
    /// Tokens that are not allowed.
    pub banned: &'a [u32],
    /// The tokens that are allowed, where not all are: bit `id % 32` of word `id / 32`.
    pub mask: Option<&'a [u32]>,
}

impl<'a> Context<'a> {
    /// After a text whose first `prompt` tokens were given.
    ///
    /// # Panics
    /// When the text is shorter.
    #[track_caller]
    pub fn split(ids: &'a [u32], prompt: usize) -> Self {
        let (prompt, generated) = ids.split_at(prompt);
        Context {
            prompt,
            generated,
            ..Self::default()
        }
    }
}

/// Space to apply settings in, which serves one row of logits after another.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    scores: Vec<f32>,
    weights: Vec<f32>,
    order: Vec<f32>,
    ids: Vec<u32>,
    candidates: Vec<Candidate>,
    ranked: Vec<Candidate>,
}

/// Checked settings and the scratch space to apply them.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    scratch: Scratch,
}

impl Sampler {
    /// A sampler for valid settings.
    ///
    /// # Errors
    /// Those of [`SamplingParams::validate`].
    pub fn new(params: SamplingParams) -> Result<Self, InferError> {
        params.validate()?;
        Ok(Self {
            params,
            scratch: Scratch::default(),
        })
    }

    /// The settings.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// As [`Scratch::sample`].
    ///
    /// # Errors
    /// [`InferError::BadLogit`] and [`InferError::NoToken`].
    ///
    /// # Panics
    /// As [`Scratch::sample`].
    #[track_caller]
    pub fn sample(
        &mut self,
        logits: &[f32],
        context: Context<'_>,
        rng: &mut Rng,
    ) -> Result<u32, InferError> {
        self.scratch.sample(&self.params, logits, context, rng)
    }

    /// As [`Scratch::distribution`].
    ///
    /// # Errors
    /// [`InferError::BadLogit`] and [`InferError::NoToken`].
    ///
    /// # Panics
    /// As [`Scratch::sample`].
    #[track_caller]
    pub fn distribution(
        &mut self,
        logits: &[f32],
        context: Context<'_>,
    ) -> Result<&[Candidate], InferError> {
        self.scratch.distribution(&self.params, logits, context)
    }
}

impl Scratch {
    /// Chooses one token by valid settings, drawing at most one number from `rng` (none when greedy).
    ///
    /// # Errors
    /// [`InferError::BadLogit`] and [`InferError::NoToken`].
    ///
    /// # Panics
    /// When an id of the context or of the settings has no logit.
    #[track_caller]
    pub fn sample(
        &mut self,
        params: &SamplingParams,
        logits: &[f32],
        context: Context<'_>,
        rng: &mut Rng,
    ) -> Result<u32, InferError> {
        if params.temperature == 0.0 {
            self.adjust(params, logits, context);
            return Ok(best(&self.scores)?.0);
        }
        let all = params.top_k == 0 && params.top_p >= 1.0 && params.min_p == 0.0;
        if all {
            self.adjust(params, logits, context);
            let (_, most) = best(&self.scores)?;
            weigh(&self.scores, most, sharpness(params), &mut self.weights);
            let ids = 0..self.weights.len() as u32;
            let draw = rng.uniform_f64() * sum(&self.weights);
            return Ok(pick(
                ids.zip(self.weights.iter().map(|&w| f64::from(w))),
                draw,
            ));
        }
        let candidates = self.distribution(params, logits, context)?;
        let weights = candidates.iter().map(|c| (c.id, c.probability));
        Ok(pick(weights, rng.uniform_f64()))
    }

    /// The tokens left by valid settings with their probabilities, which sum to 1, in the order of ids.
    ///
    /// Greedy settings leave the most likely token alone.
    ///
    /// # Errors
    /// [`InferError::BadLogit`] and [`InferError::NoToken`].
    ///
    /// # Panics
    /// As [`Scratch::sample`].
    ///
    /// # Source
    /// transformers, `generation/logits_process.py`: the classes `SequenceBiasLogitsProcessor`,
    /// `RepetitionPenaltyLogitsProcessor`, `MinNewTokensLengthLogitsProcessor` and `TemperatureLogitsWarper` to
    /// `MinPLogitsWarper`. Of tokens tied at the border of top-p, whose order is unspecified there, the lower ids are
    /// kept. Frequency and presence penalty: OpenAI, API reference.
    #[track_caller]
    pub fn distribution(
        &mut self,
        params: &SamplingParams,
        logits: &[f32],
        context: Context<'_>,
    ) -> Result<&[Candidate], InferError> {
        self.adjust(params, logits, context);
        let (best_id, best_score) = best(&self.scores)?;
        self.candidates.clear();
        if params.temperature == 0.0 {
            self.candidates.push(Candidate {
                id: best_id,
                probability: 1.0,
            });
            return Ok(&self.candidates);
        }
        weigh(
            &self.scores,
            best_score,
            sharpness(params),
            &mut self.weights,
        );
        let floor = self.top_k_floor(params.top_k);
        if floor > f32::NEG_INFINITY {
            for (weight, &score) in self.weights.iter_mut().zip(&self.scores) {
                *weight = if score < floor { 0.0 } else { *weight };
            }
        }
        // All weights below this together are within what top-p drops, so they go without being ranked: of a large
        // vocabulary that leaves a few hundred. Their sum still counts.
        let budget = (1.0 - params.top_p) * sum(&self.weights);
        let surely_dropped = (budget / self.weights.len() as f64) as f32;
        let mut dropped = 0.0;
        for (id, &weight) in self.weights.iter().enumerate() {
            if weight > 0.0 && weight >= surely_dropped {
                self.candidates.push(Candidate {
                    id: id as u32,
                    probability: f64::from(weight),
                });
            } else {
                dropped += f64::from(weight);
            }
        }
        if params.top_p < 1.0 {
            self.ranked.clone_from(&self.candidates);
            if let Some(lowest) = lowest_kept(&mut self.ranked, budget - dropped) {
                self.candidates
                    .retain(|c| c.preference(&lowest) != Ordering::Less);
            }
        }
        let min_p = params.min_p;
        self.candidates.retain(|c| c.probability >= min_p);
        let total: f64 = self.candidates.iter().map(|c| c.probability).sum();
        for candidate in &mut self.candidates {
            candidate.probability /= total;
        }
        Ok(&self.candidates)
    }

    /// Fills `scores` with the logits after everything that comes before the temperature.
    #[track_caller]
    fn adjust(&mut self, params: &SamplingParams, logits: &[f32], context: Context<'_>) {
        let scores = &mut self.scores;
        scores.clear();
        scores.extend_from_slice(logits);
        let check = |id: u32| {
            let vocabulary = logits.len();
            assert!(
                (id as usize) < vocabulary,
                "token {id} of a vocabulary of {vocabulary}"
            );
            id as usize
        };
        for &(id, bias) in &params.logit_bias {
            scores[check(id)] += bias;
        }
        let repetition = params.repetition_penalty as f32;
        if repetition != 1.0 {
            self.ids.clear();
            self.ids.extend_from_slice(context.prompt);
            self.ids.extend_from_slice(context.generated);
            self.ids.sort_unstable();
            self.ids.dedup();
            for &id in &self.ids {
                let score = &mut scores[check(id)];
                *score = match *score < 0.0 {
                    true => *score * repetition,
                    false => *score / repetition,
                };
            }
        }
        let (frequency, presence) = (params.frequency_penalty, params.presence_penalty);
        if frequency != 0.0 || presence != 0.0 {
            self.ids.clear();
            self.ids.extend_from_slice(context.generated);
            self.ids.sort_unstable();
            for same in self.ids.chunk_by(|a, b| a == b) {
                let penalty = frequency * same.len() as f64 + presence;
                scores[check(same[0])] -= penalty as f32;
            }
        }
        for &id in context.banned {
            scores[check(id)] = f32::NEG_INFINITY;
        }
        if let Some(mask) = context.mask {
            let words = mask.iter().copied().chain(std::iter::repeat(0));
            for (scores, word) in scores.chunks_mut(32).zip(words) {
                for (bit, score) in scores.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }

    /// The score of the k-th best token, or −∞ when top-k keeps all.
    fn top_k_floor(&mut self, k: usize) -> f32 {
        if k == 0 || k >= self.scores.len() {
            return f32::NEG_INFINITY;
        }
        self.order.clear();
        self.order.extend_from_slice(&self.scores);
        let (_, floor, _) = self
            .order
            .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
        *floor
    }
}

/// The factor of the scores: finite, so that a distance of 0 stays 0.
fn sharpness(params: &SamplingParams) -> f64 {
    (1.0 / params.temperature).min(f64::MAX)
}

/// The token at which the sum of weights goes beyond `draw`. The sum ends within rounding of what was drawn from: a draw
/// beyond it belongs to the last token with a weight. There is one: the best token's weight is the greatest.
fn pick(weights: impl Iterator<Item = (u32, f64)>, draw: f64) -> u32 {
    let mut sum = 0.0;
    let mut chosen = 0;
    for (id, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        chosen = id;
        sum += weight;
        if sum > draw {
            break;
        }
    }
    chosen
}

/// The last candidate in the order of preference that stays when the least likely ones are dropped while their
/// probabilities sum to at most `budget`. Halves are ranked against each other, never all candidates.
fn lowest_kept(mut candidates: &mut [Candidate], mut budget: f64) -> Option<Candidate> {
    while candidates.len() > 1 {
        let middle = candidates.len() / 2;
        candidates.select_nth_unstable_by(middle, Candidate::preference);
        let (lower, upper) = candidates.split_at_mut(middle);
        let weight: f64 = lower.iter().map(|c| c.probability).sum();
        if weight <= budget {
            budget -= weight;
            candidates = upper;
        } else {
            candidates = lower;
        }
    }
    candidates.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 10] = [1.5, -0.5, 2.25, 0.0, -3.0, 2.0, 0.75, -1.25, 3.0, 0.5];
    const PREVIOUS: Context<'static> = Context {
        prompt: &[8, 1, 8],
        generated: &[3, 4],
        banned: &[],
        mask: None,
    };
    const NOTHING: Context<'static> = Context {
        prompt: &[],
        generated: &[],
        banned: &[],
        mask: None,
    };

    /// Penalty, temperature, top-k, top-p, min-p.
    type Settings = (f64, f64, usize, f64, f64);

    fn params(penalty: f64, temperature: f64, top_k: usize, top_p: f64, min_p: f64) -> Sampler {
        Sampler::new(SamplingParams {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty: penalty,
            ..SamplingParams::default()
        })
        .unwrap()
    }

    /// Probabilities by the logits processors of transformers 5.23 and torch 2.15, chained in this order.
    #[test]
    fn distributions_equal_those_of_transformers() {
        #[rustfmt::skip]
        let cases: [(Settings, [f64; 10]); 14] = [
            ((1.0, 1.0, 0, 1.0, 0.0), [0.095046566, 0.0128631539, 0.201213582, 0.0212077555, 0.00105587197, 0.156705295, 0.0448968187, 0.00607612368, 0.425969156, 0.0349656776]),
            ((1.3, 1.0, 0, 1.0, 0.0), [0.121112992, 0.0141077452, 0.256396206, 0.0270239613, 0.000547016711, 0.199681566, 0.0572097266, 0.00774249456, 0.271623311, 0.0445549799]),
            ((0.8, 1.0, 0, 1.0, 0.0), [0.0643063176, 0.00961820707, 0.136136475, 0.0143486789, 0.00130168266, 0.106023194, 0.0303761536, 0.00411096534, 0.610121354, 0.0236569722]),
            ((1.0, 0.5, 0, 1.0, 0.0), [0.0348234446, 0.000637813636, 0.156067851, 0.00173375722, 4.29755448e-06, 0.0946599367, 0.00777016077, 0.000142315459, 0.699447582, 0.00471284074]),
            ((1.0, 2.0, 0, 1.0, 0.0), [0.119784556, 0.0440662757, 0.174285501, 0.056582218, 0.0126251994, 0.153806415, 0.0823266414, 0.0302862788, 0.253583908, 0.072653006]),
            ((1.0, 1.0, 3, 1.0, 0.0), [0.0, 0.0, 0.256686636, 0.0, 0.0, 0.199907753, 0.0, 0.0, 0.543405612, 0.0]),
            ((1.0, 1.0, 0, 0.7, 0.0), [0.0, 0.0, 0.256686636, 0.0, 0.0, 0.199907753, 0.0, 0.0, 0.543405612, 0.0]),
            ((1.0, 1.0, 0, 0.95, 0.0), [0.0991310534, 0.0, 0.209860442, 0.0, 0.0, 0.163439476, 0.0468261939, 0.0, 0.444274558, 0.0364682765]),
            ((1.0, 1.0, 0, 0.01, 0.0), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
            ((1.0, 1.0, 0, 1.0, 0.1), [0.10288302, 0.0, 0.217803355, 0.0, 0.0, 0.169625423, 0.0485984974, 0.0, 0.461089705, 0.0]),
            ((1.0, 1.0, 0, 1.0, 0.5), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]),
            ((1.2, 0.7, 6, 0.9, 0.05), [0.0986678919, 0.0, 0.288065637, 0.0, 0.0, 0.201551601, 0.0, 0.0, 0.41171487, 0.0]),
            ((1.5, 1.5, 7, 0.8, 0.2), [0.165385566, 0.0, 0.2726747, 0.0, 0.0, 0.230814159, 0.100311416, 0.0, 0.230814159, 0.0]),
            ((1.1, 0.9, 20, 0.99, 0.01), [0.099905581, 0.0102414954, 0.229880315, 0.0188697253, 0.0, 0.174126341, 0.0434187848, 0.0, 0.390669543, 0.032888215]),
        ];
        for ((penalty, temperature, top_k, top_p, min_p), expected) in cases {
            let mut sampler = params(penalty, temperature, top_k, top_p, min_p);
            let mut full = [0.0; 10];
            for candidate in sampler.distribution(&LOGITS, PREVIOUS).unwrap() {
                full[candidate.id as usize] = candidate.probability;
            }
            for (id, (got, want)) in full.iter().zip(&expected).enumerate() {
                let close = (got - want).abs() <= 2e-6 * want;
                assert!(close, "{:?}: token {id}: {got} {want}", sampler.params());
            }
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_draws_nothing() {
        let mut sampler = Sampler::new(SamplingParams::greedy()).unwrap();
        let mut rng = Rng::new(1);
        for (logits, expected) in [
            (&[0.0, 2.0, 2.0, 1.0][..], 1),
            (&[f32::NEG_INFINITY, -7.0, f32::NEG_INFINITY], 1),
            (&[0.0, -0.0], 0),
            (&LOGITS, 8),
        ] {
            assert_eq!(sampler.sample(logits, NOTHING, &mut rng).unwrap(), expected);
            let alone = sampler.distribution(logits, NOTHING).unwrap();
            assert_eq!((alone.len(), alone[0].id), (1, expected));
        }
        assert_eq!(rng, Rng::new(1));
        let mut penalized = params(2.0, 0.0, 0, 1.0, 0.0);
        assert_eq!(
            penalized
                .sample(&LOGITS, Context::split(&[8, 8], 1), &mut rng)
                .unwrap(),
            2
        );
    }

    #[test]
    fn ties_follow_the_stated_rules() {
        let kept = |mut sampler: Sampler, logits: &[f32]| -> Vec<u32> {
            let candidates = sampler.distribution(logits, NOTHING).unwrap();
            candidates.iter().map(|c| c.id).collect()
        };
        let tied = [1.0, 2.0, 1.0, 1.0];
        assert_eq!(kept(params(1.0, 1.0, 2, 1.0, 0.0), &tied), [0, 1, 2, 3]);
        assert_eq!(kept(params(1.0, 1.0, 1, 1.0, 0.0), &tied), [1]);
        assert_eq!(kept(params(1.0, 1.0, 0, 0.5, 0.0), &[0.0; 4]), [0, 1]);
        assert_eq!(kept(params(1.0, 1.0, 0, 1.0, 1.0), &tied), [1]);
        let cold = [0.0, f32::MAX, f32::MIN, f32::NEG_INFINITY];
        assert_eq!(kept(params(1.0, 1e-300, 0, 0.5, 0.0), &cold), [1]);
    }

    /// Top-p of a large vocabulary against the definition, computed by a full sort.
    #[test]
    fn top_p_of_a_large_vocabulary_equals_the_definition() {
        let mut rng = Rng::new(3);
        let mut logits = vec![0.0; 5000];
        for (std, top_p) in [(0.05, 0.3), (0.5, 0.5), (3.0, 0.9), (8.0, 0.999)] {
            rng.fill_normal(&mut logits, 0.0, std);
            let mut all = Sampler::new(SamplingParams::default()).unwrap();
            let mut sorted = all.distribution(&logits, NOTHING).unwrap().to_vec();
            sorted.sort_by(|a, b| b.preference(a));
            let mut mass = 0.0;
            let keep = sorted.iter().take_while(|c| {
                let needed = mass < top_p;
                mass += c.probability;
                needed
            });
            let mut expected: Vec<u32> = keep.map(|c| c.id).collect();
            expected.sort_unstable();
            let mut sampler = params(1.0, 1.0, 0, top_p, 0.0);
            let got = sampler.distribution(&logits, NOTHING).unwrap();
            let got: Vec<u32> = got.iter().map(|c| c.id).collect();
            assert!(got == expected, "deviation {std}, top-p {top_p}");
        }
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        // The 0.999 quantiles of chi-square for 1 to 9 degrees of freedom.
        let limits = [
            10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88,
        ];
        for (index, mut sampler) in [
            params(1.0, 1.0, 0, 1.0, 0.0),
            params(1.2, 0.7, 6, 0.9, 0.05),
            params(1.1, 2.0, 0, 0.8, 0.0),
        ]
        .into_iter()
        .enumerate()
        {
            let candidates = sampler.distribution(&LOGITS, PREVIOUS).unwrap().to_vec();
            let draws = 100_000;
            let mut rng = Rng::stream(11, index as u64);
            let mut again = rng.clone();
            let mut counts = [0u32; 10];
            for _ in 0..draws {
                let token = sampler.sample(&LOGITS, PREVIOUS, &mut rng).unwrap();
                counts[token as usize] += 1;
            }
            let statistic: f64 = candidates
                .iter()
                .map(|c| {
                    let expected = c.probability * f64::from(draws);
                    (f64::from(counts[c.id as usize]) - expected).powi(2) / expected
                })
                .sum();
            let limit = limits[candidates.len() - 2];
            assert!(statistic < limit, "{statistic} of {limit}: {counts:?}");
            let inside: u32 = candidates.iter().map(|c| counts[c.id as usize]).sum();
            assert_eq!(inside, draws, "a dropped token was drawn: {counts:?}");
            let mut repeated = [0u32; 10];
            for _ in 0..draws {
                let token = sampler.sample(&LOGITS, PREVIOUS, &mut again).unwrap();
                repeated[token as usize] += 1;
            }
            assert_eq!(counts, repeated);
        }
    }

    /// Each setting before the temperature, by what it leaves of five logits when greedy or in the distribution.
    #[test]
    fn biases_penalties_and_masks_come_in_their_order() {
        let logits = [1.0, 2.0, -1.0, 0.5, 0.0];
        type Change = fn(&mut SamplingParams);
        let context = Context {
            prompt: &[1, 1],
            generated: &[0, 3, 3, 2],
            ..Context::default()
        };
        let masked = Context {
            mask: Some(&[0b10101]),
            ..context
        };
        let banned = Context {
            banned: &[1, 4],
            ..context
        };
        let none = f32::NEG_INFINITY;
        let cases: [(Context<'_>, Change, [f32; 5]); 8] = [
            (context, |_| {}, logits),
            (
                context,
                |p| p.logit_bias = vec![(0, -3.0), (4, 7.5)],
                [-2.0, 2.0, -1.0, 0.5, 7.5],
            ),
            (
                context,
                |p| p.repetition_penalty = 2.0,
                [0.5, 1.0, -2.0, 0.25, 0.0],
            ),
            (
                context,
                |p| p.presence_penalty = 0.5,
                [0.5, 2.0, -1.5, 0.0, 0.0],
            ),
            (
                context,
                |p| p.frequency_penalty = -0.5,
                [1.5, 2.0, -0.5, 1.5, 0.0],
            ),
            (
                context,
                |p| {
                    // The bias comes before the division, the other penalties after it.
                    p.logit_bias = vec![(0, 3.0)];
                    (
                        p.repetition_penalty,
                        p.frequency_penalty,
                        p.presence_penalty,
                    ) = (2.0, 0.25, 1.0);
                },
                [0.75, 1.0, -3.25, -1.25, 0.0],
            ),
            (
                masked,
                |p| p.logit_bias = vec![(1, 100.0)],
                [1.0, none, -1.0, none, 0.0],
            ),
            (
                banned,
                |p| p.presence_penalty = 1.0,
                [0.0, none, -2.0, -0.5, none],
            ),
        ];
        for (context, change, expected) in cases {
            let mut params = SamplingParams::default();
            change(&mut params);
            let mut scratch = Scratch::default();
            scratch.adjust(&params, &logits, context);
            assert_eq!(scratch.scores, expected, "{params:?} {context:?}");
        }
        let short = Context {
            mask: Some(&[]),
            ..NOTHING
        };
        let mut sampler = Sampler::new(SamplingParams::default()).unwrap();
        let error = sampler
            .sample(&logits, short, &mut Rng::new(0))
            .unwrap_err();
        assert!(matches!(error, InferError::NoToken { vocabulary: 5 }));
    }

    #[test]
    fn bad_settings_and_logits_are_refused_by_name() {
        let flag = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            let error = Sampler::new(params).unwrap_err();
            assert!(error.hint().is_some(), "{error}");
            error.to_string()
        };
        for (got, expected) in [
            (
                flag(|p| p.temperature = -0.5),
                "--temperature -0.5: must be a number of 0 or more",
            ),
            (
                flag(|p| p.temperature = f64::INFINITY),
                "--temperature inf: must be a number of 0 or more",
            ),
            (
                flag(|p| p.top_p = 0.0),
                "--top-p 0: must be more than 0 and at most 1",
            ),
            (
                flag(|p| p.top_p = f64::NAN),
                "--top-p NaN: must be more than 0 and at most 1",
            ),
            (
                flag(|p| p.min_p = 1.5),
                "--min-p 1.5: must be between 0 and 1",
            ),
            (
                flag(|p| p.repetition_penalty = 0.0),
                "--repetition-penalty 0: must be a number greater than 0",
            ),
            (
                flag(|p| p.presence_penalty = f64::NAN),
                "--presence-penalty NaN: must be a finite number",
            ),
            (
                flag(|p| p.logit_bias = vec![(3, 1.0), (4, f32::NEG_INFINITY)]),
                "--logit-bias -inf: must be a finite number",
            ),
        ] {
            assert_eq!(got, expected);
        }
        let mut sampler = params(1.0, 1.0, 2, 0.9, 0.1);
        let mut rng = Rng::new(0);
        let mut sample = |logits: &[f32]| sampler.sample(logits, NOTHING, &mut rng).unwrap_err();
        let nan = sample(&[0.0, f32::NAN]).to_string();
        assert_eq!(nan, "the model gave the logit NaN to token 1");
        let infinite = sample(&[f32::INFINITY, 0.0]).to_string();
        assert_eq!(infinite, "the model gave the logit inf to token 0");
        let none = sample(&[f32::NEG_INFINITY; 2]);
        assert!(matches!(none, InferError::NoToken { vocabulary: 2 }));
        assert!(matches!(sample(&[]), InferError::NoToken { vocabulary: 0 }));
    }
}
