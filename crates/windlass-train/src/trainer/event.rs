//! What a run tells: steps with their numbers and times, evaluations, checkpoints.

use crate::preference::Rewards;
use crate::profile::LayerProfile;
use std::path::PathBuf;
use std::time::Instant;
use windlass_comm::Traffic;

/// What a run tells while it goes.
#[derive(Clone, Debug)]
pub enum Event {
    /// An optimizer step is done.
    Step(Box<StepEvent>),
    /// The held-out data were measured.
    Evaluated {
        /// After this step.
        step: u64,
        /// Mean loss of a token, in nats; of a comparison where answers are compared or rated.
        loss: f64,
        /// `e^loss` where the loss is that of tokens.
        perplexity: Option<f64>,
    },
    /// Weights better than all before were written to a folder of their own.
    Best {
        /// After this step.
        step: u64,
        /// Their loss on the held-out data.
        loss: f64,
    },
    /// The layers were profiled on one micro-batch.
    Profiled(Vec<LayerProfile>),
    /// A checkpoint is complete.
    Saved(PathBuf),
}

/// One optimizer step.
#[derive(Clone, Copy, Debug)]
pub struct StepEvent {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss of the step's tokens.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Seconds of the step.
    pub seconds: f64,
    /// Steps skipped so far.
    pub skipped: u64,
    /// Where this rank's time went.
    pub times: StepTimes,
    /// What this rank has sent.
    pub traffic: Traffic,
    /// What comparisons of answers have shown.
    pub rewards: Option<Rewards>,
}

/// Where the time of a step went, in seconds, waits for other ranks included.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// Forward passes, with the backward pass of the last layer.
    pub forward: f64,
    /// Backward passes, with the reduction of gradients.
    pub backward: f64,
    /// Gradient norm, optimizer and, where weights are whole on each rank, their exchange.
    pub step: f64,
}

/// Seconds that a call takes, added to a sum.
pub(super) fn timed<T>(sum: &mut f64, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = call();
    *sum += start.elapsed().as_secs_f64();
    value
}

impl StepEvent {
    /// Milliseconds by what they were spent on. The last two, waits for other ranks while weights are gathered and
    /// gradients reduced, are part of those before.
    pub fn milliseconds(&self) -> [(&'static str, f64); 5] {
        let Traffic {
            all_gather: gather,
            reduce_scatter,
            all_reduce,
            ..
        } = self.traffic;
        [
            ("forward_ms", self.times.forward * 1e3),
            ("backward_ms", self.times.backward * 1e3),
            ("step_ms", self.times.step * 1e3),
            ("gather_ms", gather.seconds * 1e3),
            (
                "reduce_ms",
                (reduce_scatter.seconds + all_reduce.seconds) * 1e3,
            ),
        ]
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Finished,
    /// The loss on the held-out data fell no more; a checkpoint was saved.
    Stopped,
    /// The stop flag was raised; a checkpoint was saved.
    Interrupted,
}
