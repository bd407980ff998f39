//! The three batch sizes, of which any that determine the others may be given.

use serde::{Deserialize, Serialize};

use super::values::Values;

/// The batch of a step, divided over accumulation and ranks: `train = micro · accumulation · world`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Sequences of one optimizer step, over all ranks.
    pub train_batch_size: u64,
    /// Sequences of one forward pass of one rank.
    pub train_micro_batch_size_per_gpu: u64,
    /// Forward passes of one optimizer step.
    pub gradient_accumulation_steps: u64,
    /// Data-parallel ranks.
    pub world_size: u64,
}

const TRAIN: &str = "train_batch_size";
const MICRO: &str = "train_micro_batch_size_per_gpu";
const STEPS: &str = "gradient_accumulation_steps";

impl Batch {
    /// The sizes that follow from those given, by integer division.
    ///
    /// # Errors
    /// DeepSpeed's message, when they do not determine the others or their product is not the batch.
    pub fn infer(
        train: Option<u64>,
        micro: Option<u64>,
        steps: Option<u64>,
        world: u64,
    ) -> Result<Self, String> {
        let product = |micro: u64, steps: u64| micro.saturating_mul(steps).saturating_mul(world);
        let (train, micro, steps) = match (train, micro, steps) {
            (Some(train), Some(micro), Some(steps)) => (train, micro, steps),
            (Some(train), Some(micro), None) => (train, micro, train / micro.max(1) / world),
            (Some(train), None, Some(steps)) => (train, train / world / steps.max(1), steps),
            (Some(train), None, None) => (train, train / world, 1),
            (None, Some(micro), steps) => {
                let steps = steps.unwrap_or(1);
                (product(micro, steps), micro, steps)
            }
            (None, None, _) => {
                return Err(format!("Either {TRAIN} or {MICRO} needs to be provided"));
            }
        };
        let positive = |name: &str, value: u64| match value {
            0 => Err(format!("{name}: {value} has to be greater than 0")),
            _ => Ok(()),
        };
        positive("Train batch size", train)?;
        positive("Micro batch size per gpu", micro)?;
        positive("Gradient accumulation steps", steps)?;
        if train != product(micro, steps) {
            return Err(format!(
                "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * \
                 gradient_acc_step * world_size {train} != {micro} * {steps} * {world}"
            ));
        }
        Ok(Self {
            train_batch_size: train,
            train_micro_batch_size_per_gpu: micro,
            gradient_accumulation_steps: steps,
            world_size: world,
        })
    }

    pub(super) fn read(values: &mut Values, world_size: u64) -> Option<Self> {
        let given = |key| values.value(key).as_u64();
        match Self::infer(given(TRAIN), given(MICRO), given(STEPS), world_size) {
            Ok(batch) => {
                values.set(TRAIN, batch.train_batch_size.into());
                values.set(MICRO, batch.train_micro_batch_size_per_gpu.into());
                values.set(STEPS, batch.gradient_accumulation_steps.into());
                Some(batch)
            }
            Err(message) => {
                let hint = match (given(TRAIN), given(MICRO)) {
                    (None, None) => format!(
                        "give {MICRO} a number; \"auto\" is filled in from the micro batch of the run"
                    ),
                    _ => {
                        format!("with {world_size} ranks, remove one of the three: it is inferred")
                    }
                };
                let key = if given(TRAIN).is_some() { TRAIN } else { MICRO };
                values.wrong(key, message, hint);
                None
            }
        }
    }
}
