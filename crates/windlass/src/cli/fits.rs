//! Whether a run fits in memory, and if not, which setting would make it fit.

use super::drive::{bytes, machine_memory};
use super::failure;
use anyhow::Result;
use windlass::model::DecoderConfig;
use windlass::progress::say;
use windlass::train::{Change, Fit, Outline, fit};

/// Says that a run of `here` ranks on this machine fits, or refuses it and names what would make it fit. `given` bounds
/// the memory that they may take together, in place of what the machine has left.
///
/// # Errors
/// A run that does not fit.
pub fn check(
    config: &DecoderConfig,
    run: Outline,
    needed: usize,
    here: usize,
    given: Option<usize>,
) -> Result<()> {
    let Some(available) = given.or_else(machine_memory) else {
        return Ok(());
    };
    let needed = needed * here;
    if needed <= available {
        let room = bytes(available);
        say(&format!("fits: {} of {room} available", bytes(needed)));
        return Ok(());
    }
    let message = format!(
        "the run needs {} and {} are available",
        bytes(needed),
        bytes(available)
    );
    Err(failure(
        message,
        hint(&fit(config, run, available / here), here),
    ))
}

/// What to change so that a run fits.
fn hint(fit: &Fit, here: usize) -> String {
    let (needed, settings) = (bytes(fit.bytes * here), settings(&fit.changes));
    match fit.fits {
        true => format!("it fits with {settings}: it then needs {needed}"),
        false => format!(
            "no setting that keeps its results makes it fit: with {settings} it still needs {needed}; a shorter --seq-len, \
             moments in 8 bits, --dtype bf16, --optimizer lion or a smaller model need less"
        ),
    }
}

/// Changes in the words of flags and of `ds_config.json`.
pub fn settings(changes: &[Change]) -> String {
    let words = changes.iter().map(|change| match *change {
        Change::WaitForCheckpoints => "no --async-checkpoints".to_owned(),
        Change::CheckpointActivations => "--checkpoint-activations".to_owned(),
        Change::Batch {
            micro_batch,
            accumulation,
        } => format!("--batch {micro_batch} --accumulate {accumulation}"),
        Change::Stage(stage) => format!("--zero-stage {stage}"),
        Change::OffloadActivations => {
            "\"nvme_path\" of \"activation_checkpointing\" in a --config".to_owned()
        }
        Change::OffloadOptimizer => "\"offload_optimizer\" to nvme in a --config".to_owned(),
        Change::OffloadParameters => {
            "\"offload_param\" to nvme in a --config at stage 3".to_owned()
        }
    });
    let words: Vec<String> = words.collect();
    match words.is_empty() {
        true => "these settings".to_owned(),
        false => words.join(" and "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_as_flags() {
        let batch = Change::Batch {
            micro_batch: 2,
            accumulation: 4,
        };
        for (changes, words) in [
            (&[][..], "these settings"),
            (
                &[batch, Change::Stage(3)],
                "--batch 2 --accumulate 4 and --zero-stage 3",
            ),
            (
                &[Change::OffloadOptimizer],
                "\"offload_optimizer\" to nvme in a --config",
            ),
        ] {
            assert_eq!(settings(changes), words);
        }
    }
}
