//! Older names and forms of keys, turned into today's; each leaves a note.

use serde_json::{Value, json};

use super::problem::Problem;
use super::tree::{Node, Origin, Tree};

/// What an older name became.
enum Today {
    /// The same value under another name.
    Renamed(&'static str),
    /// `true` is a device of `cpu` in this section.
    CpuDevice(&'static str),
    /// Nothing.
    Nothing,
}

use Today::{CpuDevice, Nothing, Renamed};

/// Section, older name, today's form.
const ALIASES: &[(&str, &str, Today)] = &[
    ("", "bfloat16", Renamed("bf16")),
    ("aio", "thread_count", Renamed("intra_op_parallelism")),
    (
        "elasticity",
        "prefer_large_batch",
        Renamed("prefer_larger_batch"),
    ),
    (ZERO, "cpu_offload", CpuDevice("offload_optimizer")),
    (ZERO, "cpu_offload_param", CpuDevice("offload_param")),
    (ZERO, "cpu_offload_use_pin_memory", Nothing),
    (
        ZERO,
        "stage3_gather_fp16_weights_on_model_save",
        Renamed(GATHER),
    ),
    (ZERO, "gather_16bit_weights_on_model_save", Renamed(GATHER)),
    (
        ZERO,
        "prefetch_bucket_size",
        Renamed("stage3_prefetch_bucket_size"),
    ),
    (
        ZERO,
        "param_persistence_threshold",
        Renamed("stage3_param_persistence_threshold"),
    ),
    (
        ZERO,
        "model_persistence_threshold",
        Renamed("stage3_model_persistence_threshold"),
    ),
    (
        ZERO,
        "max_live_parameters",
        Renamed("stage3_max_live_parameters"),
    ),
    (
        ZERO,
        "max_reuse_distance",
        Renamed("stage3_max_reuse_distance"),
    ),
    (
        ZERO,
        "module_granularity_threshold",
        Renamed("stage3_module_granularity_threshold"),
    ),
];
const ZERO: &str = "zero_optimization";
const GATHER: &str = "stage3_gather_16bit_weights_on_model_save";

/// Renames in place; gives the notes and what cannot be renamed.
pub(super) fn apply(root: &mut Node) -> (Vec<String>, Vec<Problem>) {
    let mut notes = Vec::new();
    let mut problems = Vec::new();
    stage_as_bool(root, &mut notes);
    for (section, old, today) in ALIASES {
        let target = match *section {
            "" => Some(&mut *root),
            section => root.get_mut(section),
        };
        let Some(entries) = target.and_then(Node::entries_mut) else {
            continue;
        };
        let Some(at) = entries.iter().position(|(name, _)| name == old) else {
            continue;
        };
        let new = match today {
            Renamed(new) | CpuDevice(new) => *new,
            Nothing => "",
        };
        if entries.iter().any(|(name, _)| name == new) {
            problems.push(Problem {
                key: super::values::join(section, old),
                line: entries.remove(at).1.origin.line(),
                message: format!("an older name of {new}, which is given as well"),
                hint: Some(format!("remove {old}")),
            });
            continue;
        }
        let (_, node) = entries.remove(at);
        let origin = Origin::Alias {
            name: (*old).to_owned(),
            line: node.origin.line().unwrap_or(0),
        };
        let shown = super::values::join(section, old);
        let became = match today {
            Nothing => {
                notes.push(format!(
                    "{shown} has no meaning here: there is no device that copies from pinned memory"
                ));
                continue;
            }
            Renamed(_) => {
                let mut node = node;
                node.set_origin(&origin);
                node
            }
            CpuDevice(_) => match node.value {
                Tree::Leaf(Value::Bool(on)) => {
                    let device = if on { "cpu" } else { "none" };
                    Node::from_value(json!({ "device": device }), &origin)
                }
                _ => node,
            },
        };
        notes.push(format!("{shown} is an older name of {new}"));
        entries.insert(at, (new.to_owned(), became));
    }
    (notes, problems)
}

/// `"zero_optimization": true` is stage 1.
fn stage_as_bool(root: &mut Node, notes: &mut Vec<String>) {
    let Some(Node { origin, value }) = root.get_mut(ZERO) else {
        return;
    };
    if let Tree::Leaf(Value::Bool(on)) = *value {
        let line = origin.line().unwrap_or(0);
        let name = format!("{ZERO}: {on}");
        notes.push(format!("{name} is an older form of stage {}", u8::from(on)));
        let origin = Origin::Alias { name, line };
        *value = Node::from_value(json!({ "stage": u8::from(on) }), &origin).value;
    }
}

/// Sets keys by their path, making the objects above them.
pub(super) fn set(root: &mut Node, path: &str, value: &Value) -> Result<(), Problem> {
    let origin = Origin::CommandLine;
    let mut node = root;
    let mut rest = path;
    while let Some((section, below)) = rest.split_once('.') {
        rest = below;
        if !node.is_there() {
            node.value = Tree::Object(Vec::new());
        }
        let entries = node.entries_mut().ok_or_else(|| not_a_section(path))?;
        if !entries.iter().any(|(name, _)| name == section) {
            let empty = Node::from_value(json!({}), &origin);
            entries.push((section.to_owned(), empty));
        }
        node = node.get_mut(section).expect("it was just made");
    }
    if !node.is_there() {
        node.value = Tree::Object(Vec::new());
    }
    let entries = node.entries_mut().ok_or_else(|| not_a_section(path))?;
    entries.retain(|(name, _)| name != rest);
    entries.push((rest.to_owned(), Node::from_value(value.clone(), &origin)));
    Ok(())
}

fn not_a_section(path: &str) -> Problem {
    Problem {
        key: path.to_owned(),
        line: None,
        message: "a key above it is no section".to_owned(),
        hint: None,
    }
}
