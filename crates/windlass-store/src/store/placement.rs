//! Where the parts of a training run live: partitioned over ranks or whole on each.

use std::ops::Range;
use windlass_tensor::DType;
use windlass_tensor::kernels::optim::BLOCK;

/// What is partitioned over the ranks: the stages of ZeRO (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward
/// Training Trillion Parameter Models"), each including the ones before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// Nothing: every rank holds everything (data parallelism).
    #[default]
    Replicated,
    /// Stage 1: optimizer state.
    Optimizer,
    /// Stage 2: and gradients.
    Gradients,
    /// Stage 3: and parameters.
    Parameters,
}

impl Stage {
    /// The stage of a number from 0 to 3.
    pub fn from_number(stage: u8) -> Option<Self> {
        [
            Stage::Replicated,
            Stage::Optimizer,
            Stage::Gradients,
            Stage::Parameters,
        ]
        .get(stage as usize)
        .copied()
    }

    /// Its number.
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// How gradients travel between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// In the accumulation type.
    #[default]
    Exact,
    /// Rounded to `bf16` before they are sent; sums are kept in `f32`.
    Bf16,
}

/// Where what a rank owns rests while it is not used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// In memory.
    #[default]
    Memory,
    /// In a swap file on a fast disk.
    Nvme,
}

/// Where a run's parts live.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placement {
    /// What is partitioned.
    pub stage: Stage,
    /// Parameters of at most so many elements stay whole on each rank in stage 3
    /// (`stage3_param_persistence_threshold`).
    pub persistence_threshold: usize,
    /// Most elements of one collective (`reduce_bucket_size`, `allgather_bucket_size`).
    pub bucket: usize,
    /// How gradients travel.
    pub wire: Wire,
    /// The type in which reduced gradients are kept and added up from one micro-batch to the next (`grad_accum_dtype`):
    /// `f32`, or `bf16` or `f16`, which round each sum and take half the memory. Within a micro-batch sums are in `f32`,
    /// as are those that [`Placement::reduce_once`] leaves on a rank and those that rest on a disk: another type needs
    /// them in memory.
    pub grad_accum: DType,
    /// Whether gradients of several micro-batches are summed on each rank and reduced once a step, which sends less;
    /// otherwise each micro-batch is reduced at once, which gives the same bits in all stages. Needs a stage below
    /// [`Stage::Gradients`].
    pub reduce_once: bool,
    /// Where parameters rest (`offload_param`); needs [`Stage::Parameters`].
    pub parameters: Tier,
    /// Where optimizer state and reduced gradients rest (`offload_optimizer`); needs [`Stage::Optimizer`].
    pub optimizer: Tier,
    /// Where the inputs of layers rest between the forward and the backward pass, where nothing else is kept of a layer
    /// (activation checkpointing).
    pub activations: Tier,
    /// Elements of the smallest part that goes to a disk: moving smaller ones would cost more than it saves.
    pub swap_from: usize,
    /// Buffers of state on their way between memory and disk (`buffer_count`).
    pub buffers: usize,
    /// Most elements of such a buffer (`sub_group_size`).
    pub sub_group: usize,
}

impl Placement {
    /// Whether every part that rests on a disk is one that the stage partitions, gradients are summed on each rank
    /// only where each keeps them all, and they are kept in a type of their own only in memory, reduced.
    pub fn is_consistent(&self) -> bool {
        (self.parameters == Tier::Memory || self.stage == Stage::Parameters)
            && (self.optimizer == Tier::Memory || self.stage >= Stage::Optimizer)
            && (!self.reduce_once || self.stage < Stage::Gradients)
            && self.keeps_as_asked()
    }

    /// Whether gradients are where they can be kept in the type that is asked for.
    fn keeps_as_asked(&self) -> bool {
        self.grad_accum == DType::F32 || (!self.reduce_once && self.optimizer == Tier::Memory)
    }

    /// Whether something rests on a disk.
    pub fn needs_disk(&self) -> bool {
        [self.parameters, self.optimizer, self.activations].contains(&Tier::Nvme)
    }

    /// Refuses what contradicts itself, as [`Placement::is_consistent`] says.
    ///
    /// # Panics
    /// When something rests on a disk that the stage does not partition, gradients are summed on each rank although
    /// no rank keeps them all, or kept in another type than `f32` where they are left on a rank or a disk.
    #[track_caller]
    pub(super) fn check(&self) {
        let stage = self.stage;
        assert!(
            self.parameters == Tier::Memory || stage == Stage::Parameters,
            "parameters on a disk in stage {}: they need stage 3",
            stage.number()
        );
        assert!(
            self.optimizer == Tier::Memory || stage >= Stage::Optimizer,
            "optimizer state on a disk in stage 0: it needs stage 1"
        );
        assert!(
            self.keeps_as_asked(),
            "gradients in {} that are left on a rank or on a disk: those are f32",
            self.grad_accum
        );
        assert!(
            !self.reduce_once || stage < Stage::Gradients,
            "gradients summed on each rank in stage {}: that needs stage 0 or 1",
            stage.number()
        );
    }
}

impl Default for Placement {
    fn default() -> Self {
        Placement {
            stage: Stage::Replicated,
            persistence_threshold: 100_000,
            bucket: 500_000_000,
            wire: Wire::Exact,
            grad_accum: DType::F32,
            reduce_once: false,
            parameters: Tier::Memory,
            optimizer: Tier::Memory,
            activations: Tier::Memory,
            swap_from: 1 << 16,
            buffers: 4,
            sub_group: 2 << 20,
        }
    }
}

/// The parts of `len` elements that each of `ranks` ranks owns: contiguous, in rank order, cut at multiples of
/// [`BLOCK`], the block of 8-bit optimizer state; the first is the largest, and some are empty where there are fewer blocks than ranks.
pub fn partition(len: usize, ranks: usize) -> Vec<Range<usize>> {
    let blocks = len.div_ceil(BLOCK);
    let cut = |rank: usize| ((rank * blocks).div_ceil(ranks) * BLOCK).min(len);
    (0..ranks).map(|rank| cut(rank)..cut(rank + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once() {
        for len in [0, 1, 255, 256, 257, 1000, 4096, 70_001] {
            for ranks in [1, 2, 3, 4, 7] {
                let parts = partition(len, ranks);
                assert_eq!(parts.len(), ranks);
                assert_eq!((parts[0].start, parts[ranks - 1].end), (0, len));
                for pair in parts.windows(2) {
                    assert_eq!(pair[0].end, pair[1].start, "{len} over {ranks}");
                    assert!(pair[0].end % BLOCK == 0 || pair[0].end == len);
                }
                let most = parts.iter().map(|p| p.len()).max().unwrap();
                assert!(most <= len / ranks + BLOCK, "{len} over {ranks}: {most}");
            }
        }
    }
}
