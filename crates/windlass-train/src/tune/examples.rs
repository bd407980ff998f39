//! Tokenized samples, packed into sequences and handed out in batches.
//!
//! A sequence holds one sample, or as many as fit; samples that share one never see each other. Nothing is padded.

use super::encode::Example;
use crate::data::sampler::Permutation;
use crate::data::{Batch, SamplerState};
use crate::error::{Error, Result};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use windlass_tensor::IGNORED;

/// Samples in sequences.
#[derive(Clone, Debug)]
pub struct Examples {
    /// What belongs together: one example, or the two of a preference.
    samples: Vec<Vec<Example>>,
    /// The samples of each sequence.
    sequences: Vec<Vec<usize>>,
    /// Tokens of the longest sequence.
    longest: usize,
}

impl Examples {
    /// One sequence for each sample; or with `pack`, as many samples as fit in so many tokens: the longest first, each where
    /// the least room is left over.
    pub fn new(samples: Vec<Vec<Example>>, pack: Option<usize>) -> Self {
        let length = |index: usize| samples[index].iter().map(|e| e.ids.len()).sum::<usize>();
        let sequences: Vec<Vec<usize>> = match pack {
            None => (0..samples.len()).map(|index| vec![index]).collect(),
            Some(room) => {
                let mut order: Vec<usize> = (0..samples.len()).collect();
                order.sort_by_key(|&index| std::cmp::Reverse(length(index)));
                let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
                // By the room that is left, those with the same room in the order they were begun.
                let mut open = std::collections::BTreeSet::new();
                for index in order {
                    let need = length(index);
                    let fitting = open.range((need, 0)..).next().copied();
                    let bin = match fitting {
                        Some((left, bin)) => {
                            open.remove(&(left, bin));
                            bin
                        }
                        None => {
                            bins.push((room.max(need), Vec::new()));
                            bins.len() - 1
                        }
                    };
                    bins[bin].0 -= need;
                    bins[bin].1.push(index);
                    open.insert((bins[bin].0, bin));
                }
                bins.into_iter().map(|(_, members)| members).collect()
            }
        };
        let total = |members: &Vec<usize>| members.iter().map(|&index| length(index)).sum();
        let longest = sequences.iter().map(total).max().unwrap_or(0);
        Examples {
            samples,
            sequences,
            longest,
        }
    }

    /// Holds back a part of the samples, chosen by a seed: those to train on, and those to measure on.
    pub fn split(
        samples: Vec<Vec<Example>>,
        held_out: f64,
        seed: u64,
    ) -> (Vec<Vec<Example>>, Vec<Vec<Example>>) {
        let count = samples.len();
        let held = match held_out > 0.0 && count > 1 {
            true => ((count as f64 * held_out).round() as usize).clamp(1, count - 1),
            false => 0,
        };
        let order = Permutation::new(count as u64, seed ^ 0x5eed, 0);
        let chosen: std::collections::BTreeSet<u64> =
            (0..held as u64).map(|i| order.at(i)).collect();
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for (index, sample) in samples.into_iter().enumerate() {
            match chosen.contains(&(index as u64)) {
                true => test.push(sample),
                false => train.push(sample),
            }
        }
        (train, test)
    }

    /// Sequences.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.samples.iter().flatten().map(|e| e.ids.len()).sum()
    }

    /// The mean number of tokens of a sequence.
    pub fn mean(&self) -> f64 {
        self.tokens() as f64 / self.len().max(1) as f64
    }

    /// A number that other examples do not have.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for example in self.samples.iter().flatten() {
            (&example.ids, &example.learned, example.label).hash(&mut hasher);
        }
        self.sequences.hash(&mut hasher);
        hasher.finish()
    }

    /// The longest sequence, of at most so many tokens of its longest example.
    pub fn sample(&self, tokens: usize) -> Batch {
        let largest = self.largest(1);
        let length = largest.segments.iter().max().map_or(0, |&n| n.min(tokens));
        Batch {
            ids: largest.ids[..length].to_vec(),
            targets: largest.targets[..length].to_vec(),
            positions: (0..length as u32).collect(),
            segments: vec![length],
            sequences: 1,
            labels: Vec::new(),
        }
    }

    /// Adds a sequence to a batch.
    fn push(&self, batch: &mut Batch, sequence: usize) {
        for example in self.sequences[sequence]
            .iter()
            .flat_map(|&i| &self.samples[i])
        {
            let count = example.ids.len();
            batch.ids.extend_from_slice(&example.ids);
            let next = example.ids.iter().zip(&example.learned).skip(1);
            let target = |(&id, &learned): (&u32, &bool)| match learned {
                true => i64::from(id),
                false => IGNORED,
            };
            batch.targets.extend(next.map(target));
            batch.targets.extend((count > 0).then_some(IGNORED));
            batch.positions.extend(0..count as u32);
            batch.segments.push(count);
            batch.labels.push(example.label);
        }
        batch.sequences += 1;
    }

    /// The sequence with the most tokens, several times: the largest batch there can be.
    pub fn largest(&self, micro_batch: usize) -> Batch {
        let length = |members: &Vec<usize>| -> usize {
            let examples = members.iter().flat_map(|&i| &self.samples[i]);
            examples.map(|e| e.ids.len()).sum()
        };
        let longest = (0..self.len()).max_by_key(|&i| length(&self.sequences[i]));
        let mut batch = Batch::default();
        for _ in 0..micro_batch {
            self.push(&mut batch, longest.expect("at least one sequence"));
        }
        batch
    }

    /// All sequences once, in order.
    pub fn batches(&self, micro_batch: usize) -> impl Iterator<Item = Batch> + '_ {
        let starts = (0..self.len()).step_by(micro_batch.max(1));
        starts.map(move |start| {
            let mut batch = Batch::default();
            let end = (start + micro_batch.max(1)).min(self.len());
            (start..end).for_each(|sequence| self.push(&mut batch, sequence));
            batch
        })
    }
}

/// Batches without end, every sequence once an epoch, in an order that depends on seed and epoch alone; as
/// [`Sampler`](crate::data::Sampler).
#[derive(Clone, Debug)]
pub struct ExampleSampler {
    examples: Arc<Examples>,
    state: SamplerState,
    rank: u64,
    world_size: u64,
    order: Permutation,
}

impl ExampleSampler {
    /// A sampler at the beginning of the first epoch, for one rank of several.
    ///
    /// # Errors
    /// No sequence to train on.
    pub fn new(examples: Arc<Examples>, seed: u64, rank: usize, ranks: usize) -> Result<Self> {
        let sequences = examples.len() as u64;
        if sequences == 0 {
            return Err(Error::TooFewTokens {
                part: "training",
                tokens: 0,
                needed: 1,
            });
        }
        Ok(ExampleSampler {
            state: SamplerState {
                seed,
                epoch: 0,
                position: 0,
                sequences,
                seq_len: examples.longest() as u64,
            },
            examples,
            rank: rank as u64,
            world_size: ranks as u64,
            order: Permutation::new(sequences, seed, 0),
        })
    }

    /// The next `micro_batch` sequences of this rank.
    pub fn next_batch(&mut self, micro_batch: usize) -> Batch {
        let mut batch = Batch::default();
        let count = micro_batch as u64;
        let mine = self.rank * count..(self.rank + 1) * count;
        for number in 0..count * self.world_size {
            if mine.contains(&number) {
                let sequence = self.order.at(self.state.position);
                self.examples.push(&mut batch, sequence as usize);
            }
            self.state.position += 1;
            if self.state.position == self.state.sequences {
                self.enter(self.state.epoch + 1, 0);
            }
        }
        batch
    }

    fn enter(&mut self, epoch: u64, position: u64) {
        (self.state.epoch, self.state.position) = (epoch, position);
        self.order = Permutation::new(self.state.sequences, self.state.seed, epoch);
    }

    /// Where the sampler stands.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Goes to a saved place.
    ///
    /// # Errors
    /// [`Error::Changed`] when the data, their packing or the seed are not those of the saved state.
    pub fn resume(&mut self, saved: &SamplerState) -> Result<()> {
        self.state.check(saved)?;
        self.enter(saved.epoch, saved.position % saved.sequences);
        Ok(())
    }
}
