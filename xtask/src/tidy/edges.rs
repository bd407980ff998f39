//! Who may depend on whom.

use anyhow::Context;
use serde_json::Value;

use super::Violation;

/// Our crates and those of ours that each may use outside its tests; `*` is all.
const ALLOWED: [(&str, &[&str]); 11] = [
    ("windlass-kernels", &[]),
    ("windlass-comm", &[]),
    ("windlass-tensor", &["kernels"]),
    ("windlass-store", &["tensor", "comm"]),
    // A model cannot know where its weights live, not even by mistake.
    ("windlass-model", &["tensor", "comm"]),
    ("windlass-train", &["model", "store", "tensor", "comm"]),
    ("windlass-compress", &["model", "store", "tensor", "train"]),
    ("windlass-infer", &["model", "store", "tensor", "comm"]),
    ("windlass-serve", &["infer", "model"]),
    ("windlass", &["*"]),
    ("xtask", &[]),
];

/// Foreign crates that only some of ours may use, in tests neither.
const KEPT: [(&str, &[&str]); 12] = [
    ("anyhow", &["windlass", "xtask"]),
    ("clap", &["windlass"]),
    ("hf-hub", &["windlass"]),
    ("indicatif", &["windlass"]),
    ("ureq", &["windlass"]),
    ("axum", &["windlass-serve"]),
    ("hyper", &["windlass-serve"]),
    ("tokio", &["windlass-serve"]),
    ("fastrand", &[]),
    ("getrandom", &[]),
    ("rand", &[]),
    ("rayon", &[]),
];

/// Checks the packages of `cargo metadata --no-deps`.
pub fn check(metadata: &Value) -> anyhow::Result<Vec<Violation>> {
    let packages = metadata["packages"].as_array().context("no packages")?;
    let names: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let mut violations = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without name")?;
        let mut refuse = |message| violations.push(Violation::new(name, 0, message));
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            refuse("unknown crate: give it a row in xtask/src/tidy/edges.rs".to_owned());
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().context("no name")?;
            let in_tests = dependency["kind"] == "dev";
            let short = used.strip_prefix("windlass-").unwrap_or(used);
            let ours = names.contains(&used);
            if ours && !in_tests && !allowed.contains(&short) && !allowed.contains(&"*") {
                refuse(format!("may not depend on {used}"));
            }
            let kept = KEPT.iter().find(|(known, _)| *known == used);
            if kept.is_some_and(|(_, users)| !users.contains(&name)) {
                refuse(format!("may not depend on {used}, a crate kept to others"));
            }
        }
    }
    Ok(violations)
}
