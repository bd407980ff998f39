//! Which settings make a run fit in memory: plans of its variants, the cheapest ones for the user first.
//!
//! Only settings that leave the run's results alone are tried, up to rounding: nothing here shortens sequences, rounds
//! moments, or takes another optimizer. A plan is a dry run, so all variants together take less time than a step.

use crate::engine::EngineOptions;
use crate::plan::{StepShape, plan_rank};
use windlass_model::DecoderConfig;
use windlass_store::{Placement, Stage, Tier};
use windlass_tensor::DType;

/// A run, as far as its memory depends on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outline {
    /// Storage type of weights and activations.
    pub dtype: DType,
    /// Optimizer, activation checkpointing.
    pub options: EngineOptions,
    /// Sequences of a step on each rank.
    pub shape: StepShape,
    /// What is partitioned, and where it rests.
    pub placement: Placement,
    /// Ranks.
    pub ranks: usize,
}

impl Outline {
    /// Bytes that a rank takes from the system at most.
    pub fn bytes(&self, config: &DecoderConfig) -> usize {
        // From the third micro-batch on, nothing new is allocated.
        let parts = self.shape.gradient_accumulation_steps.min(2);
        let shape = StepShape {
            gradient_accumulation_steps: parts,
            ..self.shape
        };
        let Outline {
            dtype,
            options,
            placement,
            ranks,
            ..
        } = *self;
        let plan = plan_rank(config, dtype, options, shape, placement, ranks);
        plan.memory.reserved
    }
}

/// A setting that takes memory away, in the order of what it costs in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Checkpoints are written before the next step, not from a copy in memory.
    WaitForCheckpoints,
    /// Every layer is run again in the backward pass.
    CheckpointActivations,
    /// Smaller batches and as many more of them.
    Batch {
        /// Sequences of one forward pass.
        micro_batch: usize,
        /// Forward passes of a step.
        accumulation: usize,
    },
    /// A higher stage of ZeRO.
    Stage(u8),
    /// Inputs of layers on a disk until the backward pass.
    OffloadActivations,
    /// Optimizer state on a disk.
    OffloadOptimizer,
    /// Parameters on a disk too.
    OffloadParameters,
}

impl Change {
    /// Its rank in the order of cost.
    fn cost(self) -> usize {
        match self {
            Change::WaitForCheckpoints => 0,
            Change::CheckpointActivations => 1,
            Change::Batch { .. } => 2,
            Change::Stage(_) => 4,
            Change::OffloadActivations => 6,
            Change::OffloadOptimizer => 8,
            Change::OffloadParameters => 16,
        }
    }
}

/// What would make a run fit.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// The settings to change, cheapest first; none where the run fits as it is.
    pub changes: Vec<Change>,
    /// The run with them.
    pub outline: Outline,
    /// Bytes that a rank then takes.
    pub bytes: usize,
    /// Whether that fits; if not, this takes least of all that was tried.
    pub fits: bool,
}

/// The fewest and cheapest changes with which a rank takes at most `limit` bytes.
pub fn fit(config: &DecoderConfig, run: Outline, limit: usize) -> Fit {
    let plan = |(changes, outline): (Vec<Change>, Outline)| {
        let bytes = outline.bytes(config);
        Fit {
            changes,
            outline,
            bytes,
            fits: bytes <= limit,
        }
    };
    let mut variants = variants(run);
    variants.sort_by_key(|(changes, outline)| {
        let cost: usize = changes.iter().map(|c| c.cost()).sum();
        let parts = outline.shape.gradient_accumulation_steps;
        (changes.len(), cost, parts, outline.placement.stage)
    });
    let mut least: Option<Fit> = None;
    for found in variants.into_iter().map(plan) {
        if found.fits {
            return found;
        }
        if least.as_ref().is_none_or(|least| found.bytes < least.bytes) {
            least = Some(found);
        }
    }
    least.expect("the run itself is a variant")
}

/// The run with every combination of changes.
fn variants(run: Outline) -> Vec<(Vec<Change>, Outline)> {
    let mut variants = rearranged(run);
    if run.options.async_checkpoints {
        let options = EngineOptions {
            async_checkpoints: false,
            ..run.options
        };
        // A copy in memory of what rests on a disk is refused.
        variants.retain(|(_, outline)| {
            [outline.placement.parameters, outline.placement.optimizer] == [Tier::Memory; 2]
        });
        let more = rearranged(Outline { options, ..run }).into_iter();
        variants.extend(more.map(|(mut changes, outline)| {
            changes.insert(0, Change::WaitForCheckpoints);
            (changes, outline)
        }));
    }
    variants
}

/// The run with every combination of changes but that of when checkpoints are written.
fn rearranged(run: Outline) -> Vec<(Vec<Change>, Outline)> {
    let mut variants = Vec::new();
    for (checkpointing, shelving) in [(false, false), (true, false), (true, true)] {
        let before = run.options.activation_checkpointing;
        let shelved = run.placement.activations == Tier::Nvme;
        if (before && !checkpointing) || (shelved && !shelving) {
            continue;
        }
        for shape in shapes(run.shape) {
            for (moved, placement) in placements(run.placement, run.ranks) {
                let mut outline = Outline {
                    shape,
                    placement,
                    ..run
                };
                let mut changes = Vec::new();
                if checkpointing && !before {
                    outline.options.activation_checkpointing = true;
                    changes.push(Change::CheckpointActivations);
                }
                if shelving && !shelved {
                    outline.placement.activations = Tier::Nvme;
                    changes.push(Change::OffloadActivations);
                }
                if shape != run.shape {
                    changes.push(Change::Batch {
                        micro_batch: shape.micro_batch,
                        accumulation: shape.gradient_accumulation_steps,
                    });
                }
                changes.extend(moved);
                variants.push((changes, outline));
            }
        }
    }
    variants
}

/// The same sequences in a step, in smaller batches.
fn shapes(shape: StepShape) -> impl Iterator<Item = StepShape> {
    let whole = shape.micro_batch;
    let sizes = (1..=whole).rev().filter(move |n| whole.is_multiple_of(*n));
    sizes.map(move |micro_batch| StepShape {
        micro_batch,
        gradient_accumulation_steps: shape.gradient_accumulation_steps * (whole / micro_batch),
        ..shape
    })
}

/// Higher stages, and the disk.
fn placements(placement: Placement, ranks: usize) -> Vec<(Vec<Change>, Placement)> {
    let mut found = Vec::new();
    for stage in (0..4).filter_map(Stage::from_number) {
        for [parameters, optimizer] in [
            [Tier::Memory, Tier::Memory],
            [Tier::Memory, Tier::Nvme],
            [Tier::Nvme, Tier::Nvme],
        ] {
            let new = Placement {
                stage,
                parameters,
                optimizer,
                ..placement
            };
            let lower = stage < placement.stage
                || (placement.parameters == Tier::Nvme && parameters == Tier::Memory)
                || (placement.optimizer == Tier::Nvme && optimizer == Tier::Memory);
            if lower || !new.is_consistent() {
                continue;
            }
            let rests = |old, new| old == Tier::Memory && new == Tier::Nvme;
            let offloads = [
                (
                    rests(placement.optimizer, optimizer),
                    Change::OffloadOptimizer,
                ),
                (
                    rests(placement.parameters, parameters),
                    Change::OffloadParameters,
                ),
            ];
            let offloads = offloads.iter().filter(|(new, _)| *new).map(|(_, c)| *c);
            let mut changes: Vec<Change> = offloads.collect();
            if stage > placement.stage {
                // A rank alone partitions nothing: there a stage is only what the disk asks for.
                let least = match [parameters, optimizer] {
                    [Tier::Nvme, _] => Stage::Parameters,
                    [_, Tier::Nvme] => Stage::Optimizer,
                    _ => Stage::Replicated,
                };
                if ranks == 1 && stage != least {
                    continue;
                }
                if ranks > 1 {
                    changes.insert(0, Change::Stage(stage.number()));
                }
            }
            found.push((changes, new));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_model::preset_config;

    fn run(ranks: usize) -> (DecoderConfig, Outline) {
        let text = preset_config("llama", "1m", 1024).unwrap();
        let outline = Outline {
            dtype: DType::Bf16,
            options: EngineOptions::default(),
            shape: StepShape {
                micro_batch: 4,
                seq_len: 128,
                gradient_accumulation_steps: 1,
            },
            placement: Placement {
                swap_from: 1 << 12,
                persistence_threshold: 0,
                ..Placement::default()
            },
            ranks,
        };
        (DecoderConfig::from_json("1m", &text).unwrap(), outline)
    }

    /// The advice is the first variant in the order of cost: all cheaper ones take too much.
    #[test]
    fn the_cheapest_setting_that_fits_is_named() {
        for ranks in [1, 4] {
            let (config, outline) = run(ranks);
            let whole = outline.bytes(&config);
            let as_it_is = fit(&config, outline, whole);
            assert!(as_it_is.fits && as_it_is.changes.is_empty());
            let checkpointed = fit(&config, outline, whole - 1);
            assert_eq!(checkpointed.changes, [Change::CheckpointActivations]);
            assert!(checkpointed.fits && checkpointed.bytes < whole);
            let mut held = outline;
            held.options.async_checkpoints = true;
            let waiting = fit(&config, held, held.bytes(&config) - 1);
            assert_eq!(waiting.changes, [Change::WaitForCheckpoints]);
            assert_eq!(waiting.outline, outline);
            let mut limit = whole;
            let mut seen = Vec::new();
            loop {
                let found = fit(&config, outline, limit);
                if !found.fits {
                    // Nothing takes less than what the last advice took.
                    assert!(found.bytes > limit, "{found:?}");
                    break;
                }
                assert!(found.bytes <= limit);
                assert_eq!(found.outline.bytes(&config), found.bytes);
                let sequences = |s: StepShape| s.micro_batch * s.gradient_accumulation_steps;
                assert_eq!(sequences(found.outline.shape), sequences(outline.shape));
                limit = found.bytes - 1;
                seen.push(found.changes);
            }
            let last = seen.last().unwrap();
            assert!(last.contains(&Change::OffloadParameters), "{seen:?}");
            let staged = seen.iter().flatten().any(|c| matches!(c, Change::Stage(_)));
            assert_eq!(staged, ranks > 1, "{seen:?}");
            for pair in seen.windows(2) {
                assert!(
                    pair[0].len() <= pair[1].len(),
                    "fewer changes first: {seen:?}"
                );
            }
        }
    }
}
