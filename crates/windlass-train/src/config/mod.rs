//! `ds_config.json`: DeepSpeed's configuration, read into types that cannot be wrong.
//!
//! The text is relaxed JSON with places ([`tree`]); every key is a row of a table ([`keys`]); nothing is swallowed: each
//! key is honoured, has no meaning here, or is refused when it asks for something that is not there. Nothing here
//! knows models, stores or ranks; the engine takes what it needs from [`Config`].

mod alias;
mod auto;
mod base64;
mod batch;
pub mod keys;
mod kind;
mod observe;
mod optimizer;
mod precision;
mod problem;
mod report;
mod scheduler;
pub mod tree;
mod values;
mod zero;

use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

pub use auto::{Auto, Context};
pub use batch::Batch;
pub use keys::Status;
pub use observe::{
    ActivationCheckpointing, CommsLogger, FlopsProfiler, MonitorFile, Observe, TagValidation,
};
pub use optimizer::{Adam, NewtonSchulz, OptimizerConfig};
pub use precision::{FloatType, Precision, ReduceOp, Reduction};
pub use problem::{Invalid, Problem};
pub use report::Row;
pub use tree::Origin;
pub use zero::{Aio, OffloadOptimizer, OffloadParam, Stage, Tier, Zero};

use crate::error::{Error, Result};
use crate::schedule::deepspeed::Scheduler;
use tree::{Node, Tree};
use values::Values;

/// A configuration for a number of ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The batch and how it is divided.
    pub batch: Batch,
    /// The update rule, when the file has one.
    pub optimizer: Option<OptimizerConfig>,
    /// The schedule of the learning rate, when the file has one.
    pub scheduler: Option<Scheduler>,
    /// The precision of weights and activations.
    pub precision: Precision,
    /// The largest gradient norm; `None` does not clip. DeepSpeed's default is 1.
    pub gradient_clipping: Option<f64>,
    /// How gradients become one.
    pub reduction: Reduction,
    /// What is partitioned, and where it lives.
    pub zero: Zero,
    /// How files are read and written.
    pub aio: Aio,
    /// Whether and how activations are computed again, when the file has the section.
    pub activation_checkpointing: Option<ActivationCheckpointing>,
    /// What happens when ranks name a checkpoint differently.
    pub tag_validation: TagValidation,
    /// Whether checkpoints are written while training goes on (`checkpoint.writer.decoupled`).
    pub async_checkpoints: bool,
    /// What is printed and measured.
    pub observe: Observe,
    rows: Vec<Row>,
    remarks: Vec<String>,
}

impl Config {
    /// Reads a file. As in DeepSpeed, the JSON itself in base64 may stand in place of the path.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read, [`Error::Config`] for one that cannot be used.
    pub fn load(path: &Path, context: &Context) -> Result<Self> {
        if !path.exists()
            && let Some(text) = path.to_str().and_then(base64::json)
        {
            return Self::parse("base64", &text, context);
        }
        let bytes = std::fs::read(path).map_err(|error| Error::io("read", path, error))?;
        let text = String::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
            path: path.to_owned(),
            offset: error.utf8_error().valid_up_to() as u64,
        })?;
        Self::parse(&path.display().to_string(), &text, context)
    }

    /// Reads a text: relaxed JSON, or JSON in base64. `name` stands for the file in messages.
    ///
    /// # Errors
    /// [`Error::Config`], with everything that is wrong.
    pub fn parse(name: &str, text: &str, context: &Context) -> Result<Self> {
        let decoded = base64::json(text.trim());
        let root = tree::parse(decoded.as_deref().unwrap_or(text));
        let root = root.map_err(|error| {
            let problem = Problem {
                key: error.key,
                line: Some(error.line),
                message: error.message,
                hint: None,
            };
            invalid(name, vec![problem])
        })?;
        Self::from_tree(name, root, context)
    }

    /// Reads a value of a program. `name` stands for the file in messages.
    ///
    /// # Errors
    /// [`Error::Config`], with everything that is wrong.
    pub fn from_value(name: &str, value: Value, context: &Context) -> Result<Self> {
        let root = Node::from_value(value, &Origin::File { line: 0 });
        Self::from_tree(name, root, context)
    }

    fn from_tree(name: &str, mut root: Node, context: &Context) -> Result<Self> {
        if !matches!(root.value, Tree::Object(_)) {
            let problem = Problem {
                key: String::new(),
                line: None,
                message: "a configuration is an object".to_owned(),
                hint: None,
            };
            return Err(invalid(name, vec![problem]));
        }
        let mut refused = Vec::new();
        for (path, value) in &context.overrides {
            refused.extend(alias::set(&mut root, path, value).err());
        }
        let (mut remarks, aliases) = alias::apply(&mut root);
        refused.extend(aliases);
        let mut values = Values::new(&root);
        auto::fill(&mut values, &context.auto);
        let config = Self::build(&root, &mut values, context.world_size.max(1));
        remarks.extend(values.unfilled());
        let (rows, problems) = values.finish();
        refused.extend(problems);
        match config {
            Some(mut config) if refused.is_empty() => {
                remarks.append(&mut config.remarks);
                Ok(Self {
                    rows,
                    remarks,
                    ..config
                })
            }
            _ => Err(invalid(name, refused)),
        }
    }

    fn build(root: &Node, values: &mut Values, world_size: u64) -> Option<Self> {
        let batch = Batch::read(values, world_size);
        let optimizer = OptimizerConfig::read(values);
        let base = optimizer.map(|optimizer| optimizer.lr());
        let mut scheduler = scheduler::read(values, base);
        let mut remarks = Vec::new();
        if let (Some(Scheduler::OneCycle(cycle)), Some(optimizer)) = (&mut scheduler, optimizer)
            && cycle.cycle_momentum
            && !optimizer.has_betas()
        {
            cycle.cycle_momentum = false;
            values.set(CYCLE_MOMENTUM, false.into());
            remarks.push(format!(
                "{CYCLE_MOMENTUM} is off: this optimizer has no betas"
            ));
        }
        let precision = Precision::read(values);
        let reduction = Reduction::read(values);
        let zero = Zero::read(values);
        let async_checkpoints = zero.reads_decoupled(values);
        let observe = Observe::read(values);
        let activations = root
            .get("activation_checkpointing")
            .is_some_and(Node::is_there)
            .then(|| ActivationCheckpointing::read(values, &zero));
        let clip = values.number("gradient_clipping");
        Some(Self {
            batch: batch?,
            optimizer,
            scheduler,
            precision,
            gradient_clipping: (clip > 0.0).then_some(clip),
            reduction,
            zero,
            aio: Aio::read(values),
            activation_checkpointing: activations,
            tag_validation: TagValidation::read(values),
            async_checkpoints,
            observe,
            rows: Vec::new(),
            remarks,
        })
    }

    /// Every key that is known for this configuration, with value, origin and status.
    pub fn report(&self) -> &[Row] {
        &self.rows
    }

    /// What a user should know that is in no row: older names, `"auto"` that stayed a default.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// What a user should know before a run: the remarks, and a line for each key that the file sets in vain.
    pub fn notes(&self) -> Vec<String> {
        let given = self.rows.iter().filter(|row| row.origin != Origin::Default);
        let vain = given.filter_map(|row| {
            let key = &row.key;
            match row.status {
                Status::Honoured => None,
                Status::NoMeaning(why) => Some(format!("{key} has no meaning here: {why}")),
                Status::Unsupported(why) => {
                    Some(format!("{key} is off; it would not be supported: {why}"))
                }
            }
        });
        self.remarks.iter().cloned().chain(vain).collect()
    }

    /// A hash of all values that change what a run computes or how: ranks compare it at the start.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let honoured = |row: &&Row| row.status == Status::Honoured;
        for row in self.rows.iter().filter(honoured) {
            hash.update(format!("{}={}\n", row.key, row.value));
        }
        hash.finalize().into()
    }
}

const CYCLE_MOMENTUM: &str = "scheduler.params.cycle_momentum";

fn invalid(name: &str, problems: Vec<Problem>) -> Error {
    Error::Config(Invalid {
        name: name.to_owned(),
        problems,
    })
}
