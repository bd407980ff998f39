//! From a tree of places to one value for each known key, with everything that is wrong on the way.
//!
//! Unknown keys, wrong kinds, what is not supported. It does not know what the values mean together.

use std::collections::HashMap;

use serde_json::Value;
use windlass_model::config::nearest;

use super::keys::optimizer::{OPTIMIZERS, TORCH_ADAMW};
use super::keys::scheduler::SCHEDULERS;
use super::keys::{Key, Kind, SECTIONS, Section, Status};
use super::kind::{convert, show};
use super::problem::Problem;
use super::report::Row;
use super::tree::{Node, Origin, Tree};

/// One value for each known key.
pub(super) struct Values {
    rows: Vec<Slot>,
    index: HashMap<String, usize>,
    problems: Vec<Problem>,
}

struct Slot {
    path: String,
    kind: Kind,
    status: Status,
    default: Value,
    value: Value,
    origin: Origin,
    /// Whether something took the place of `"auto"`.
    filled: bool,
}

impl Values {
    /// The values of a configuration.
    pub fn new(root: &Node) -> Self {
        let mut values = Self {
            rows: Vec::new(),
            index: HashMap::new(),
            problems: Vec::new(),
        };
        let top = SECTIONS.iter().copied().flatten();
        for section in top.clone() {
            for key in section.keys {
                values.declare(section.path, key);
            }
            if section.path == "optimizer" {
                values.declare_optimizer(root);
            }
            if section.path == "scheduler" {
                values.declare_scheduler(root);
            }
        }
        let open: Vec<&Section> = top.filter(|section| section.others.is_some()).collect();
        values.walk("", root, &open);
        values.refuse_unsupported();
        values
    }

    fn declare(&mut self, section: &str, key: &Key) {
        let path = join(section, key.name);
        let written: Value = serde_json::from_str(key.default).expect("defaults are JSON");
        let default = convert(key.kind, &written).unwrap_or(written);
        self.index.insert(path.clone(), self.rows.len());
        self.rows.push(Slot {
            path,
            kind: key.kind,
            status: key.status,
            default: default.clone(),
            value: default,
            origin: Origin::Default,
            filled: false,
        });
    }

    fn declare_optimizer(&mut self, root: &Node) {
        let Some(section) = root.get("optimizer").filter(|node| node.is_there()) else {
            return;
        };
        let Some((name, origin)) = type_of(section) else {
            let hint = "set optimizer.type, for example to \"AdamW\"";
            self.problem("optimizer.type", &section.origin, "it is missing", hint);
            return;
        };
        let names = OPTIMIZERS.iter().map(|optimizer| optimizer.name);
        let small = name.to_lowercase();
        let Some(found) = OPTIMIZERS.iter().find(|known| known.name == small) else {
            let near = nearest(&small, names.clone()).unwrap_or_default();
            let all: Vec<&str> = names.collect();
            let hint = format!("nearest known: {near}; all: {}", all.join(", "));
            let message = format!("unknown optimizer \"{name}\"");
            self.problem("optimizer.type", origin, message, hint);
            return;
        };
        let flag = |key: &str| {
            let node = section.get("params")?.get(key)?;
            node.to_value().as_bool()
        };
        let decoupled = small == "adamw" || flag("adam_w_mode").unwrap_or(true);
        let torch = small.starts_with("adam") && flag("torch_adam") == Some(true) && decoupled;
        match found.params {
            Ok(_) if torch && small != "adamw8bit" => self.declare_all(TORCH_ADAMW, "optimizer"),
            Ok(keys) => self.declare_all(keys, "optimizer"),
            Err(why) => {
                self.problem(
                    "optimizer.type",
                    origin,
                    format!("\"{name}\" is not supported"),
                    why,
                );
            }
        }
    }

    fn declare_scheduler(&mut self, root: &Node) {
        let Some(section) = root.get("scheduler").filter(|node| node.is_there()) else {
            return;
        };
        let Some((name, origin)) = type_of(section) else {
            let hint = "set scheduler.type, for example to \"WarmupLR\"";
            self.problem("scheduler.type", &section.origin, "it is missing", hint);
            return;
        };
        let same = |known: &str| known.eq_ignore_ascii_case(name);
        match SCHEDULERS.iter().find(|(known, _)| same(known)) {
            Some((_, keys)) => self.declare_all(keys, "scheduler"),
            None => {
                let all: Vec<&str> = SCHEDULERS.iter().map(|(name, _)| *name).collect();
                let near = nearest(name, all.iter().copied()).unwrap_or_default();
                let hint = format!("nearest known: {near}; all: {}", all.join(", "));
                let message = format!("unknown scheduler \"{name}\"");
                self.problem("scheduler.type", origin, message, hint);
            }
        }
    }

    fn declare_all(&mut self, keys: &[Key], section: &str) {
        for key in keys {
            self.declare(&format!("{section}.params"), key);
        }
    }

    /// Takes over what stands in the tree under `path`.
    fn walk(&mut self, path: &str, node: &Node, open: &[&Section]) {
        let Some(entries) = node.entries() else {
            return;
        };
        for (name, node) in entries {
            let path = join(path, name);
            if let Some(&slot) = self.index.get(&path) {
                self.take(slot, node);
            } else if self.is_section(&path) {
                match &node.value {
                    Tree::Object(_) => self.walk(&path, node, open),
                    Tree::Leaf(Value::Null) => {}
                    Tree::Leaf(value) => {
                        let message =
                            format!("an object {{…}} is expected and this is {}", show(value));
                        self.problem(&path, &node.origin, message, "");
                    }
                }
            } else if let Some(section) = open.iter().find(|s| join(s.path, name) == path) {
                let status = section.others.expect("an open section");
                self.index.insert(path.clone(), self.rows.len());
                self.rows.push(Slot {
                    path,
                    kind: Kind::Any,
                    status,
                    default: Value::Null,
                    value: node.to_value(),
                    origin: node.origin.clone(),
                    filled: false,
                });
            } else if !self.params_of_nothing(&path) {
                self.unknown(&path, name, &node.origin);
            }
        }
    }

    /// Whether known keys stand under a path.
    fn is_section(&self, path: &str) -> bool {
        self.rows.iter().any(|slot| {
            slot.path
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('.'))
        }) || path == "optimizer.params"
            || path == "scheduler.params"
    }

    /// Whether these are parameters of an optimizer or scheduler that was refused already.
    fn params_of_nothing(&self, path: &str) -> bool {
        ["optimizer", "scheduler"].iter().any(|section| {
            let under = format!("{section}.params.");
            path.starts_with(&under) && !self.rows.iter().any(|slot| slot.path.starts_with(&under))
        })
    }

    fn unknown(&mut self, path: &str, name: &str, origin: &Origin) {
        let parent = path.strip_suffix(name).expect("a path ends with its name");
        let siblings: Vec<&str> = self
            .rows
            .iter()
            .filter_map(|slot| slot.path.strip_prefix(parent))
            .map(|rest| rest.split('.').next().unwrap_or(rest))
            .collect();
        let elsewhere = self.rows.iter().find(|slot| {
            slot.path
                .rsplit('.')
                .next()
                .is_some_and(|last| last == name)
        });
        let hint = match (elsewhere, nearest(name, siblings)) {
            _ if name == "max_grad_norm" => "the largest norm is gradient_clipping".to_owned(),
            (Some(slot), _) => format!("did you mean {}?", slot.path),
            (None, Some(near)) => format!("nearest known: {parent}{near}"),
            (None, None) => String::new(),
        };
        self.problem(path, origin, "unknown key", hint);
    }

    fn take(&mut self, slot: usize, node: &Node) {
        let value = node.to_value();
        let given = match &value {
            Value::Null => return,
            Value::String(auto) if auto == "auto" => Ok(None),
            value => convert(self.rows[slot].kind, value).map(Some),
        };
        let row = &mut self.rows[slot];
        match given {
            Ok(Some(value)) => {
                row.value = value;
                row.origin = node.origin.clone();
            }
            Ok(None) if row.default == "auto" => {}
            Ok(None) => {
                let line = node.origin.line().unwrap_or(0);
                row.origin = Origin::Auto { line };
            }
            Err(expected) => {
                let path = row.path.clone();
                let message = format!("{expected} is expected and this is {}", show(&value));
                self.problem(&path, &node.origin, message, "");
            }
        }
    }

    /// Refuses what is switched on and not there.
    fn refuse_unsupported(&mut self) {
        let mut found = Vec::new();
        for row in &self.rows {
            let Status::Unsupported(why) = row.status else {
                continue;
            };
            if row.value != row.default && self.is_on(&row.path) {
                found.push((row.path.clone(), row.origin.clone(), why, show(&row.value)));
            }
        }
        for (path, origin, why, value) in found {
            let hint = format!("remove {path}, or leave it off");
            self.problem(
                &path,
                &origin,
                format!("{value} is not supported: {why}"),
                hint,
            );
        }
    }

    /// Whether no `enabled` above a key is false.
    fn is_on(&self, path: &str) -> bool {
        let mut above = path;
        while let Some((parent, _)) = above.rsplit_once('.') {
            above = parent;
            for gate in ["enabled", "shared_parameters.enabled"] {
                let gate = join(parent, gate);
                if let Some(&gate) = self.index.get(&gate)
                    && self.rows[gate].value != true
                {
                    return false;
                }
            }
        }
        true
    }

    /// Adds something that is wrong.
    pub fn problem(
        &mut self,
        path: &str,
        origin: &Origin,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) {
        self.problems.push(Problem {
            key: path.to_owned(),
            line: origin.line(),
            message: message.into(),
            hint: Some(hint.into()).filter(|hint| !hint.is_empty()),
        });
    }

    /// Adds something that is wrong with a known key.
    #[track_caller]
    pub fn wrong(&mut self, path: &str, message: impl Into<String>, hint: impl Into<String>) {
        let origin = self.slot(path).origin.clone();
        self.problem(path, &origin, message, hint);
    }

    #[track_caller]
    fn slot(&self, path: &str) -> &Slot {
        match self.index.get(path) {
            Some(&slot) => &self.rows[slot],
            None => panic!("{path} is in no table of keys"),
        }
    }

    /// Whether a key is known in this configuration.
    pub fn has(&self, path: &str) -> bool {
        self.index.contains_key(path)
    }

    /// Whether the value is not the default one of the table: the file or the run gives it.
    #[track_caller]
    pub fn is_given(&self, path: &str) -> bool {
        self.slot(path).origin != Origin::Default
    }

    /// Whether the file says `"auto"`.
    #[track_caller]
    pub fn is_auto(&self, path: &str) -> bool {
        matches!(self.slot(path).origin, Origin::Auto { .. })
    }

    /// Whether the command line sets the value.
    #[track_caller]
    pub fn is_set(&self, path: &str) -> bool {
        self.slot(path).origin == Origin::CommandLine
    }

    /// Sets a value that follows from other keys; the origin stays unless it was a default.
    ///
    /// # Panics
    /// When the key is in no table.
    #[track_caller]
    pub fn set(&mut self, path: &str, value: Value) {
        let Some(&slot) = self.index.get(path) else {
            panic!("{path} is in no table of keys");
        };
        let row = &mut self.rows[slot];
        if row.origin == Origin::Default && row.value != value {
            row.origin = Origin::Inferred;
        }
        row.value = value;
        row.filled = true;
    }

    /// What the file leaves to the run and the run does not say: a line for each key.
    pub fn unfilled(&self) -> Vec<String> {
        let auto = |slot: &&Slot| matches!(slot.origin, Origin::Auto { .. }) && !slot.filled;
        self.rows
            .iter()
            .filter(auto)
            .map(|slot| {
                let (path, value) = (&slot.path, show(&slot.value));
                format!("{path} is \"auto\" and the run does not say: the default is {value}")
            })
            .collect()
    }

    /// The value of a key.
    #[track_caller]
    pub fn value(&self, path: &str) -> &Value {
        &self.slot(path).value
    }

    /// A truth value.
    #[track_caller]
    pub fn bool(&self, path: &str) -> bool {
        let value = self.value(path).as_bool();
        value.unwrap_or_else(|| panic!("{path} is not a Bool with a default"))
    }

    /// An integer with a default.
    #[track_caller]
    pub fn int(&self, path: &str) -> u64 {
        let value = self.value(path).as_u64();
        value.unwrap_or_else(|| panic!("{path} is not an Int with a default"))
    }

    /// A number with a default.
    #[track_caller]
    pub fn number(&self, path: &str) -> f64 {
        let value = self.value(path).as_f64();
        value.unwrap_or_else(|| panic!("{path} is not a Number with a default"))
    }

    /// A text, when there is one.
    #[track_caller]
    pub fn text(&self, path: &str) -> Option<&str> {
        self.value(path).as_str()
    }

    /// The rows of the report, and what is wrong.
    pub fn finish(self) -> (Vec<Row>, Vec<Problem>) {
        let rows = self.rows.into_iter().map(|slot| Row {
            key: slot.path,
            value: slot.value,
            origin: slot.origin,
            status: slot.status,
        });
        let mut problems = self.problems;
        problems.sort_by_key(|problem| problem.line.unwrap_or(u32::MAX));
        (rows.collect(), problems)
    }
}

fn type_of(section: &Node) -> Option<(&str, &Origin)> {
    let node = section.get("type")?;
    match &node.value {
        Tree::Leaf(Value::String(name)) => Some((name, &node.origin)),
        _ => None,
    }
}

pub(super) fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}
