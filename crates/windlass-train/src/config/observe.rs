//! What a run prints, measures and keeps beside the weights.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::values::Values;
use super::zero::Zero;

/// What a run prints and measures.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Observe {
    /// A line after this many steps; `None` prints none.
    pub steps_per_print: Option<u64>,
    /// Times of forward, backward and step.
    pub wall_clock_breakdown: bool,
    /// Whether the resolved configuration is printed at the start.
    pub dump_state: bool,
    /// The profile of one step.
    pub flops_profiler: Option<FlopsProfiler>,
    /// Curves for TensorBoard.
    pub tensorboard: Option<MonitorFile>,
    /// Curves as CSV.
    pub csv_monitor: Option<MonitorFile>,
    /// Bytes and times of collectives.
    pub comms_logger: Option<CommsLogger>,
}

/// `flops_profiler`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlopsProfiler {
    /// Forward passes that a layer's backward pass repeats; 0 lets the profiler count.
    pub recompute_fwd_factor: f64,
    /// The step, counted from one.
    pub profile_step: u64,
    /// Whether each layer is listed.
    pub detailed: bool,
    /// Where it is written; `None` prints it.
    pub output_file: Option<PathBuf>,
}

/// `tensorboard` or `csv_monitor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorFile {
    /// The folder; empty is that of the run.
    pub output_path: PathBuf,
    /// The folder below it.
    pub job_name: String,
}

/// `comms_logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommsLogger {
    /// Whether the table is printed whenever a step is, and not only at the end.
    pub verbose: bool,
    /// The collectives by name; empty is all.
    pub prof_ops: Vec<String>,
}

/// The collectives that are counted, and the beginnings of DeepSpeed's names for them.
const COLLECTIVES: [&str; 5] = [
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "broadcast",
    "all_to_all",
];

/// `activation_checkpointing`: it is on when the section is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivationCheckpointing {
    /// How many layers keep their input; `None` is all of them.
    pub number_checkpoints: Option<u64>,
    /// Whether inputs are kept on the tier `cpu`.
    pub cpu_checkpointing: bool,
    /// The folder for swap files in which inputs rest; a key that DeepSpeed does not have.
    pub nvme_path: Option<PathBuf>,
}

/// What happens when ranks name a checkpoint differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TagValidation {
    /// Nothing.
    Ignore,
    /// A line is printed.
    Warn,
    /// The run ends.
    Fail,
}

impl Observe {
    pub(super) fn read(values: &mut Values) -> Self {
        Self {
            steps_per_print: values.value("steps_per_print").as_u64(),
            wall_clock_breakdown: values.bool("wall_clock_breakdown"),
            dump_state: values.bool("dump_state"),
            flops_profiler: values
                .bool("flops_profiler.enabled")
                .then(|| FlopsProfiler::read(values)),
            tensorboard: MonitorFile::read(values, "tensorboard"),
            csv_monitor: MonitorFile::read(values, "csv_monitor"),
            comms_logger: values
                .bool("comms_logger.enabled")
                .then(|| CommsLogger::read(values)),
        }
    }
}

impl FlopsProfiler {
    fn read(values: &Values) -> Self {
        Self {
            recompute_fwd_factor: values.number("flops_profiler.recompute_fwd_factor"),
            profile_step: values.int("flops_profiler.profile_step"),
            detailed: values.bool("flops_profiler.detailed"),
            output_file: values.text("flops_profiler.output_file").map(PathBuf::from),
        }
    }
}

impl MonitorFile {
    fn read(values: &Values, section: &str) -> Option<Self> {
        let text = |key: &str| {
            let text = values.text(&format!("{section}.{key}"));
            text.unwrap_or_default().to_owned()
        };
        values.bool(&format!("{section}.enabled")).then(|| Self {
            output_path: text("output_path").into(),
            job_name: text("job_name"),
        })
    }
}

impl CommsLogger {
    fn read(values: &mut Values) -> Self {
        let listed = values.value("comms_logger.prof_ops").as_array();
        let names: Option<Vec<String>> = listed
            .into_iter()
            .flatten()
            .map(|name| name.as_str().map(str::to_owned))
            .collect();
        let mut prof_ops = names.unwrap_or_else(|| {
            values.wrong("comms_logger.prof_ops", "a list of texts is expected", "");
            Vec::new()
        });
        for name in &mut prof_ops {
            // all_gather_into_tensor, reduce_scatter_tensor, all_to_all_single: ways of PyTorch to do the same.
            match COLLECTIVES.iter().find(|known| name.starts_with(**known)) {
                Some(known) => *name = (*known).to_owned(),
                None => {
                    let message = format!("no collective is called \"{name}\"");
                    let hint = format!("known: {}", COLLECTIVES.join(", "));
                    values.wrong("comms_logger.prof_ops", message, hint);
                }
            }
        }
        let all = values.bool("comms_logger.prof_all");
        if !all && prof_ops.is_empty() {
            let message = "prof_all is false and prof_ops is empty: nothing would be logged";
            let hint = "list collectives, or set comms_logger.enabled to false";
            values.wrong("comms_logger.prof_ops", message, hint);
        }
        Self {
            verbose: values.bool("comms_logger.verbose"),
            prof_ops: if all { Vec::new() } else { prof_ops },
        }
    }
}

impl ActivationCheckpointing {
    pub(super) fn read(values: &mut Values, zero: &Zero) -> Self {
        const FOLDER: &str = "activation_checkpointing.nvme_path";
        let folder = values.text(FOLDER).map(PathBuf::from);
        if let (Some(one), Some(other)) = (&folder, zero.nvme_path())
            && one != other
        {
            let message = "a rank has one swap file, and this is another folder than that of zero_optimization";
            values.wrong(FOLDER, message, "give both the same folder");
        }
        Self {
            number_checkpoints: values
                .value("activation_checkpointing.number_checkpoints")
                .as_u64(),
            cpu_checkpointing: values.bool("activation_checkpointing.cpu_checkpointing"),
            nvme_path: folder,
        }
    }
}

impl TagValidation {
    pub(super) fn read(values: &Values) -> Self {
        match values.text("checkpoint.tag_validation") {
            Some("ignore") => Self::Ignore,
            Some("fail") => Self::Fail,
            _ => Self::Warn,
        }
    }
}
